"""What is scheduled, triggered or asked: Prefect flows, workers, events and the command line."""
