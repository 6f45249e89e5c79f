"""Room `storage`: what a user can get wrong about files and buckets."""

from __future__ import annotations


class StorageError(ValueError):
    """A file, shard or store that cannot be used: one sentence, what is wrong, where, what to do."""


class UnavailableError(StorageError):
    """A disk or store that fails in a way that can pass by itself: the same again, later, may succeed."""
