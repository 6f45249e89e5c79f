"""The data of a stage: its sample list, its batch schedule, and seeds."""
