"""Results: the figures that a run's outputs hold, and functions that read them.

Readers are apart from the tasks that write, so that reading a result imports little.
"""
