"""What samples are worth: embeddings, index, target gradients, replay, scores and queries."""
