"""The rows of an influence profile, and of how it changes from stage to stage."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from secateur.storage.ledger import read_ledger
from secateur.tasks.results.profile_results import read_profile
from secateur.tasks.results.valuation_results import (
    read_embeddings,
    read_scores,
    read_scoring_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.training.optimizers import plan_update_rule
from secateur.tasks.valuation.query import stage_queries

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def profile_series(frame: pl.DataFrame, stage: int, target: str) -> tuple[list[int], list[float]]:
    """Return a stage's recorded steps, and their mean absolute influence over learning rate.

    It is the influence by replay if the profile has that.
    """
    rows = frame.filter(stage=stage, target=target, quantity="per_rate")
    if "replay" in rows["estimate"]:
        rows = rows.filter(estimate="replay")
    return rows["step"].to_list(), rows["mean_abs"].fill_null(0.0).to_list()


def learning_rates(run: Run, stage: int) -> pl.DataFrame:
    """Return the learning rate that each `step` of a stage had, as `rate`.

    It is the mean over the coefficients if parameter groups differ.
    """
    column = plan_update_rule(run.plan.optimizer).hyper.index("lr")
    frames = []
    for segment in run.folder.stage(stage).segments():
        tensors, first = read_ledger(segment)
        hyper = tensors["hyper"][:, tensors["groups"].long(), column].double()
        rates = hyper.nanmean(1).numpy()  # a parameter without gradient has no settings
        steps = np.arange(first, first + len(rates), dtype=np.uint32)
        frames.append(pl.DataFrame({"step": steps, "rate": rates}))
    return pl.concat(frames)


def _recorded_rates(run: Run, stage: int, view: int) -> pl.DataFrame:
    """The learning rates of a stage's recorded steps."""
    if stage == view:
        return learning_rates(run, stage)
    # An earlier stage's profile has them, so its ledger is not read again.
    return read_profile(run, stage).filter(stage=stage).select("step", "rate").unique()


def profile_rows(run: Run, view: int) -> Iterator[pl.DataFrame]:
    """Yield the profile's rows as seen from stage `view`'s end, per stage, target and estimate."""
    targets = list(run.plan.targets)
    gradients = torch.stack(
        [read_scoring_gradients(run, view, name).double().mean(0) for name in targets]
    )
    queries = stage_queries(run, list(range(view + 1)), gradients)
    for stage, query in sorted(queries, key=lambda pair: pair[0]):
        uses = read_scores(run, stage)
        uses = uses.join(_recorded_rates(run, stage, view), "step", maintain_order="left")
        parts = read_embeddings(run.folder.stage(stage).embeddings)
        vectors = query.T.astype(np.float64)
        effects = np.concatenate([part.double().numpy() @ vectors for part in parts])
        for number, name in enumerate(targets):
            length = float(gradients[number].norm())
            by_embedding = pl.Series(effects[:, number])
            yield _summary(uses, by_embedding, length, stage, name, "embedding")
            if stage == view and run.plan.estimate == "replay":
                yield _summary(uses, uses[f"score_{name}"], length, stage, name, "replay")


def _summary(
    uses: pl.DataFrame, scores: pl.Series, length: float, stage: int, target: str, estimate: str
) -> pl.DataFrame:
    """Mean and spread over each step's samples; `length` is the norm of the target's gradient."""
    per_rate = scores / uses["rate"]
    relative = per_rate / (uses["norm"] * length)
    frames = []
    for name, values in {"score": scores, "per_rate": per_rate, "relative": relative}.items():
        # A step at learning rate 0 had no effect, and its ratio is not finite.
        finite = pl.when(pl.col("value").is_finite()).then("value")
        frame = uses.select("step", "rate", value=values).with_columns(finite.alias("value"))
        value = pl.col("value")
        figures = {
            "count": value.count(),
            "mean": value.mean(),
            "std": value.std(),
            "mean_abs": value.abs().mean(),
        }
        figures |= {column: value.quantile(at, "linear") for column, at in QUANTILES.items()}
        steps = frame.group_by("step", "rate").agg(**figures).sort("step")
        labels = {
            "stage": pl.lit(stage, pl.UInt32),
            "target": pl.lit(target),
            "estimate": pl.lit(estimate),
            "quantity": pl.lit(name),
        }
        frames.append(steps.select(**labels, step="step", rate="rate", **{c: c for c in figures}))
    return pl.concat(frames)


def evolution_rows(run: Run, last: int, frame: pl.DataFrame) -> pl.DataFrame:
    """Return each stage's influence over learning rate, as seen from its own end to the last.

    It is the influence by embeddings.

    Args:
        frame: the profile as seen from the last stage's end.
    """
    views = [read_profile(run, view) for view in range(last)]
    frames = []
    for view, profile in enumerate([*views, frame]):
        rows = profile.filter(quantity="per_rate", estimate="embedding")
        spread = {c: pl.col("mean").quantile(at, "linear") for c, at in QUANTILES.items()}
        means = rows.group_by("stage", "target").agg(pl.col("mean", "mean_abs").mean(), **spread)
        frames.append(means.with_columns(view=pl.lit(view, pl.UInt32)))
    return pl.concat(frames).sort("target", "stage", "view")
