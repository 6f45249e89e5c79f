"""Room `tasks`: what a user can get wrong in a plan, a task or a command."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan or command that cannot be carried out: one sentence that says what is wrong, where, and what to do."""
