"""Recording a stage that another loop trains."""
