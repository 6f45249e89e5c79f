"""Pruning a stage: policies, trust gates, decisions and pruned shards."""
