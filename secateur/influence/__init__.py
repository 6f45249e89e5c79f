"""The mathematics: the effect of each sample of a training run on the model. PyTorch only."""
