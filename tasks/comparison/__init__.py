"""Does pruning pay? A plan compared with arms that differ from it in the pruning only."""
