"""Errors about user mistakes: each says in one sentence what is wrong, where, and what to do."""

from __future__ import annotations


class SecateurError(ValueError):
    """A model, optimizer or recording that cannot be followed.

    The base of every error in this module.
    """


class StorageError(SecateurError):
    """A file, shard or store that cannot be used."""


class UnavailableError(StorageError):
    """A disk or store that failed in a way that may pass: the same request may succeed later."""


class PlanError(SecateurError):
    """A plan or command that cannot be carried out."""
