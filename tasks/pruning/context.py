"""What a pruning policy may read beside its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from secateur.storage.shards import Samples
from secateur.tasks.data.groups import read_group_names
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run


@dataclass(frozen=True)
class PruningContext:
    """A scored stage of a run."""

    run: Run
    stage: int
    samples: Samples

    @staticmethod
    def of_stage(run: Run, stage: int) -> PruningContext:
        """Return the context of a run's stage."""
        return PruningContext(run, stage, read_stage_samples(run, stage))

    def read_scores(self) -> pl.DataFrame:
        """Return the score of every recorded use of a sample; see `write_scores`."""
        return read_scores(self.run, self.stage)

    def sample_score(self) -> pl.Expr:
        """Return one score per sample of its uses for the pruning target, sorted by step.

        Uses add up for the `mean` aggregate. For `nearest` the last one counts, because cosines do
        not add up.
        """
        plan = self.run.plan
        column = pl.col(f"score_{plan.pruning_target}")
        return column.sum() if plan.score.aggregate == "mean" else column.last()

    def seed(self, purpose: str) -> int:
        """Return a seed that the plan's seed, the stage and the purpose determine."""
        return seed_for(self.run.plan.seed, purpose, self.stage)

    def group_names(self, by: str, rows: Sequence[int]) -> list[str]:
        """Return the label or domain of some samples.

        Args:
            by: a member (`cls`), or a field of a JSON member (`json:domain`).
            rows: of the stage's sample list.

        Raises:
            PlanError: a sample has none.
        """
        return read_group_names(self.samples, by, rows)
