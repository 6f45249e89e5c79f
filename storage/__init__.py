"""Outputs on a local disk or in S3. Imports neither Prefect nor the mathematics."""
