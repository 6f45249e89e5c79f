"""The base class of pruning policies, and their registry. The policies are in `tasks/pruning`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from secateur.tasks.plan.base import Config
from secateur.tasks.plan.registry import Registry

if TYPE_CHECKING:
    import polars as pl

    from secateur.tasks.pruning.context import PruningContext


class Policy(Config, ABC):
    """A rule that decides which samples of a stage the next stage trains on, with its settings.

    A subclass gives `policy` its name, adds its settings as fields, and implements `decide`::

        @register_policy
        class KeepShort(Policy):
            policy: Literal["short"] = "short"
            keep: Fraction

            def decide(self, samples, context):
                ranked = rank_samples(samples, pl.col("loss"), descending=False)
                return keep_best(ranked, self.keep, "loss", self.policy)

    Attributes:
        policy: the name, which a plan gives as `prune: {policy: <name>}`.
        needs_losses: whether it reads the losses before each step; a recording of another training
            loop must then give them.
        reads_checkpoints: whether it reads the checkpoints at the ends of segments; they are then
            kept until the stage is pruned.
    """

    policy: str
    needs_losses: ClassVar[bool] = False
    reads_checkpoints: ClassVar[bool] = False

    @property
    def keep_fraction(self) -> float | None:
        """The fraction it keeps, or None if that depends on the scores."""
        fraction: float | None = getattr(self, "keep", None)
        return fraction

    def read_scores(self, context: PruningContext) -> pl.DataFrame:
        """Return the score of every recorded use of a sample: by default the stage's own."""
        return context.read_scores()

    def sample_score(self, context: PruningContext) -> pl.Expr:
        """Return the expression that makes one score per sample of its uses, sorted by step."""
        return context.sample_score()

    @abstractmethod
    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        """Decide about every sample that was recorded in a window.

        Args:
            samples: one row per sample: `sample`, `key`, `shard`, `score` (None if it has none),
                `loss`, `grand`, `el2n` of its last use, and the number of its `uses`.
            context: the run and stage, and the bytes of samples.

        Returns:
            The same rows in any order, with `keep` (bool), `reason` (text) and `rank` (from 1,
            the best).
        """


POLICIES: Registry[Policy] = Registry(
    Policy,  # type: ignore[type-abstract]  # only concrete classes are registered
    tag="policy",
    builtins="secateur.tasks.pruning.policies",
)
register_policy = POLICIES.register
