"""Room `storage`: artefacts on a local disk or S3; a module a kind. No Prefect, no mathematics."""
