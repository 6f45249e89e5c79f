"""The influence profile: how each step's samples affected the targets, as seen from a stage's end.

Influence is the effect on a target's mean loss, whatever score the plan prunes by.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from secateur.errors import PlanError
from secateur.storage import schemas
from secateur.storage.frames import write_frame
from secateur.storage.ledger import read_ledger
from secateur.storage.outputs import Attempt
from secateur.tasks.analysis.phases import find_phases
from secateur.tasks.analysis.plots import draw_evolution, draw_profile
from secateur.tasks.results.profile_results import (
    EVOLUTION,
    EVOLUTION_PLOT,
    PROFILE,
    PROFILE_PLOT,
    read_profile,
)
from secateur.tasks.results.training_results import end_checkpoint, read_training_result
from secateur.tasks.results.valuation_results import (
    read_embeddings,
    read_scores,
    read_scoring_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.training.optimizers import plan_update_rule
from secateur.tasks.valuation.query import stage_queries

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def write_profile(run: Run, stage: int) -> str:
    """Write the profile of all steps up to a stage's end as seen from there, and its evolution.

    `profile.parquet` has one row per recorded step (`stage`, `step`, its learning rate `rate`),
    `target`, `estimate` and `quantity`, with `count`, `mean`, `std`, `mean_abs` and five quantiles
    over the step's samples. The quantity is:

    - `score`: the effect itself;
    - `per_rate`: the effect over the learning rate (Wang et al., 2025, section 5.3);
    - `relative`: that over the norms of the contribution and of the target's gradient, which can be
      compared between runs.

    The `estimate` is `embedding`. For earlier stages the query is pulled back through the stages
    after them. The stage's own steps also have `replay` if the plan scores by it.

    `evolution.parquet` has, for each `stage` and `target`, its mean influence over learning rate as
    seen from the end of each stage, `view`, from its own to this one (figure 4 there).

    Returns:
        Path or URL of the plot.

    Raises:
        PlanError: the stage is not scored yet.
    """
    folder = run.folder.stage(stage)
    end_checkpoint(run, stage)
    if not folder.scores.committed:
        raise PlanError(
            f"stage {stage} of {run.url} is not scored yet; `secateur run` its plan, or prune the "
            f"stage, first"
        )

    def write(attempt: Attempt) -> None:
        # The evolution needs the view of every earlier stage.
        for earlier in range(stage):
            write_profile(run, earlier)
        frame = pl.concat(_summaries(run, stage))
        steps = read_training_result(run, stage).steps
        phases = {
            target: find_phases(*profile_series(frame, stage, target), steps)
            for target in run.plan.targets
        }
        evolution = _evolution(run, stage, frame)
        write_frame(attempt, PROFILE, frame, schemas.PROFILE)
        write_frame(attempt, EVOLUTION, evolution, schemas.EVOLUTION)
        title = f"{run.plan.run}, stage {stage}"
        attempt.write(PROFILE_PLOT, draw_profile(frame, phases, stage, title))
        if stage:
            title = f"{run.plan.run}, stages 0 to {stage}"
            attempt.write(EVOLUTION_PLOT, draw_evolution(evolution, title))
        attempt.facts["phases"] = {
            target: found.model_dump(mode="json") for target, found in phases.items()
        }

    folder.profile.write_once("profile", {"scores": folder.scores.fingerprint}, write)
    return folder.profile.url(PROFILE_PLOT)


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
        rates = tensors["hyper"][:, tensors["groups"].long(), column].double().mean(1).numpy()
        steps = np.arange(first, first + len(rates), dtype=np.uint32)
        frames.append(pl.DataFrame({"step": steps, "rate": rates}))
    return pl.concat(frames)


def _recorded_rates(run: Run, stage: int, view: int) -> pl.DataFrame:
    """The learning rates of a stage's recorded steps."""
    if stage == view:
        return learning_rates(run, stage)
    # An earlier stage's profile has them, so its ledger is not read again.
    return read_profile(run, stage).filter(stage=stage).select("step", "rate").unique()


def _summaries(run: Run, view: int) -> Iterator[pl.DataFrame]:
    """The profile's rows as seen from the end of stage `view`, per stage, target and estimate."""
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


def _evolution(run: Run, last: int, frame: pl.DataFrame) -> pl.DataFrame:
    """Each stage's influence over learning rate, by embeddings, from its own end to the last."""
    views = [read_profile(run, view) for view in range(last)]
    frames = []
    for view, profile in enumerate([*views, frame]):
        rows = profile.filter(quantity="per_rate", estimate="embedding")
        spread = {c: pl.col("mean").quantile(at, "linear") for c, at in QUANTILES.items()}
        means = rows.group_by("stage", "target").agg(pl.col("mean", "mean_abs").mean(), **spread)
        frames.append(means.with_columns(view=pl.lit(view, pl.UInt32)))
    return pl.concat(frames).sort("target", "stage", "view")
