"""Training a stage: the loop, segments, checkpoints, the basis, and online selection."""
