"""Room `tasks.comparison`: whether pruning pays: a plan beside arms that differ from it in the pruning only."""
