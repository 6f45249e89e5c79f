"""Room `secateur`: what a user of the mathematics can get wrong."""

from __future__ import annotations


class SecateurError(ValueError):
    """A model, optimizer or recording that cannot be followed: one sentence, what is wrong, where, what to do."""
