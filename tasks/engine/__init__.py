"""What runs the tasks: Prefect, its server and its UI, and the progress of long work."""
