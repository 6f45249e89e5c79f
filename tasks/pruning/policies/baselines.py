"""Baselines from the literature: loss, GraNd, EL2N and TracIn."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl
from pydantic import Field

from secateur.tasks.plan import Fraction, Policy, register_policy
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.ranking import keep_best, mark_kept, rank_samples
from secateur.tasks.valuation.tracin import stage_tracin_scores


class BaselinePolicy(Policy):
    """Keeps a fraction by a measure of each sample's last use that knows no target.

    The measure is the column of `scores.parquet` that has the policy's name.
    """

    keep: Fraction
    prefer: Literal["lowest", "highest"] = Field(
        "lowest",
        description="the end that is kept: `lowest` drops what fits badly (wrong labels), "
        "`highest` drops what is easy",
    )

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        # nan is a measure that is not known; it ranks last.
        measure = pl.col(self.policy).fill_nan(None)
        ranked = rank_samples(samples, measure, descending=self.prefer == "highest")
        quota = round(len(ranked) * self.keep)
        reason = f"not among the {self.prefer} {self.keep:g}"
        return mark_kept(ranked, pl.col("rank") <= quota, self.policy, reason)


@register_policy
class LossPolicy(BaselinePolicy):
    """By the loss before the step."""

    policy: Literal["loss"] = "loss"
    needs_losses: ClassVar[bool] = True


@register_policy
class GraNdPolicy(BaselinePolicy):
    """GraNd (Paul et al., 2021): by the norm of the loss's gradient, in the basis."""

    policy: Literal["grand"] = "grand"


@register_policy
class EL2NPolicy(BaselinePolicy):
    """EL2N (Paul et al., 2021): by the norm of softmax minus one-hot.

    More precisely, by the norm of the loss's gradient with respect to the logits.
    """

    policy: Literal["el2n"] = "el2n"


@register_policy
class TracInPolicy(Policy):
    """Keeps the fraction with the highest TracIn (Pruthi et al., 2020).

    That is the sum over a sample's uses of the learning rate times the product of its contribution
    with the target's mean gradient at the nearest segment checkpoint.
    """

    policy: Literal["tracin"] = "tracin"
    reads_checkpoints: ClassVar[bool] = True
    keep: Fraction

    def read_scores(self, context: PruningContext) -> pl.DataFrame:
        scores = context.read_scores()
        tracin = stage_tracin_scores(context.run, context.stage)
        columns = zip(context.run.plan.targets, tracin.unbind(1), strict=True)
        return scores.with_columns(
            pl.Series(f"tracin_{name}", values.numpy()) for name, values in columns
        )

    def sample_score(self, context: PruningContext) -> pl.Expr:
        return pl.col(f"tracin_{context.run.plan.pruning_target}").sum()

    def decide(self, samples: pl.DataFrame, context: PruningContext) -> pl.DataFrame:
        ranked = rank_samples(samples, pl.col("score"), descending=True)
        return keep_best(ranked, self.keep, "score", self.policy)
