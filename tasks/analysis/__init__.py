"""Looking at scores: audits by retraining, influence profiles, phases and windows."""
