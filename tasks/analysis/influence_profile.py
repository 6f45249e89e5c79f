"""Room `tasks`: the influence profile: what each step's samples did to the targets, as seen from a stage's end.

Influence is the effect on a target's mean loss (DESIGN, section 1), whatever score the plan prunes by.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from secateur.errors import PlanError
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.ledger import read_ledger
from secateur.tasks.analysis.phases import Phases, find_phases
from secateur.tasks.analysis.plots import draw_evolution, draw_profile
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.run.run import Run
from secateur.tasks.training.optimizer import plan_update_rule
from secateur.tasks.training.train import TrainingResult, end_checkpoint
from secateur.tasks.valuation.embed import stage_embeddings
from secateur.tasks.valuation.query import stage_queries
from secateur.tasks.valuation.score import read_scores
from secateur.tasks.valuation.target_gradients import read_scoring_gradients

PROFILE, EVOLUTION = "profile.parquet", "evolution.parquet"
PICTURE, EVOLUTION_PICTURE = "profile.png", "evolution.png"
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


@pipeline_task("profile", makes=lambda run, stage: run.folder.stage(stage).profile)
def write_profile(run_url: str, stage: int) -> str:
    """Writes the profile of all steps up to a stage's end as seen from there, and how it has evolved.

    `profile.parquet`: one row for each recorded step (`stage`, `step`, its learning rate `rate`), `target`, `estimate` and
    `quantity`, with `count`, `mean`, `std`, `mean_abs` and five quantiles over the step's samples. The quantity is the `score`; `per_rate`, the score over the learning rate (Wang et al., 2025, section 5.3); or `relative`, that over the norms
    of the contribution and of the target's gradient, which other runs can be compared with. The `estimate` is `embedding`,
    for earlier stages by the query pulled back through those after them; for the stage's own steps there is `replay` too
    where the plan scores by it.

    `evolution.parquet`: for each `stage` and `target` its mean influence over learning rate as seen from the end of each
    stage, `view`, from its own to this one (figure 4 there).

    Returns:
        Path or URL of the picture.

    Raises:
        PlanError: the stage has not been embedded and scored.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    end_checkpoint(run, stage)
    if not folder.scores.committed:
        raise PlanError(
            f"stage {stage} of {run.url} is not scored yet; `secateur run` its plan, or prune the stage, first"
        )
    if not folder.profile.committed:
        for earlier in range(stage):
            write_profile.fn(run_url, earlier)
        frame = pl.concat(_summaries(run, stage))
        with folder.profile.attempt("profile", {"scores": folder.scores.fingerprint}) as attempt:
            found = {
                target: find_phases(*profile_series(frame, stage, target), _steps(run, stage))
                for target in run.plan.targets
            }
            evolution = _evolution(run, stage, frame)
            write_frame(attempt, PROFILE, frame)
            write_frame(attempt, EVOLUTION, evolution)
            attempt.write(
                PICTURE, draw_profile(frame, found, stage, f"{run.plan.run}, stage {stage}")
            )
            if stage:
                attempt.write(
                    EVOLUTION_PICTURE,
                    draw_evolution(evolution, f"{run.plan.run}, stages 0 to {stage}"),
                )
            attempt.facts["phases"] = {
                target: phases.model_dump(mode="json") for target, phases in found.items()
            }
    return folder.profile.url(PICTURE)


def read_phases(run: Run, stage: int, target: str) -> Phases:
    """The phases of a stage whose profile is made, as seen from its own end."""
    return Phases.model_validate(run.folder.stage(stage).profile.manifest.facts["phases"][target])


def profile_series(frame: pl.DataFrame, stage: int, target: str) -> tuple[list[int], list[float]]:
    """A stage's recorded steps, and their mean absolute influence over learning rate, by replay where there is one."""
    rows = frame.filter(stage=stage, target=target, quantity="per_rate")
    best = rows.filter(estimate="replay") if "replay" in rows["estimate"] else rows
    return best["step"].to_list(), best["mean_abs"].fill_null(0.0).to_list()


def learning_rates(run: Run, stage: int) -> pl.DataFrame:
    """The learning rate that each step of a stage really had; the mean over the numbers where groups differ."""
    place, found = plan_update_rule(run.plan.optimizer).hyper.index("lr"), []
    for segment in run.folder.stage(stage).segments():
        tensors, first = read_ledger(segment)
        values = tensors["hyper"][:, tensors["groups"].long(), place].double().mean(1).numpy()
        found.append(
            pl.DataFrame(
                {"step": np.arange(first, first + len(values), dtype=np.uint32), "rate": values}
            )
        )
    return pl.concat(found)


def _known_rates(run: Run, stage: int, view: int) -> pl.DataFrame:
    """The rates of a stage's recorded steps; an earlier stage's ledger need not be read again for them."""
    if stage == view:
        return learning_rates(run, stage)
    return (
        read_frame(run.folder.stage(stage).profile, PROFILE)
        .filter(stage=stage)
        .select("step", "rate")
        .unique()
    )


def _steps(run: Run, stage: int) -> int:
    return TrainingResult(**run.folder.stage(stage).trained.manifest.facts).steps


def _summaries(run: Run, view: int) -> Iterator[pl.DataFrame]:
    """The profile's rows, a stage, target and estimate at a time, as seen from the end of stage `view`."""
    targets = list(run.plan.targets)
    gradients = torch.stack(
        [read_scoring_gradients(run, view, name).double().mean(0) for name in targets]
    )
    for stage, query in sorted(
        stage_queries(run, list(range(view + 1)), gradients), key=lambda pair: pair[0]
    ):
        known = read_scores(run, stage).join(
            _known_rates(run, stage, view), "step", maintain_order="left"
        )
        parts = stage_embeddings(run.folder.stage(stage).embeddings)
        effects = np.concatenate(
            [part.double().numpy() @ query.T.astype(np.float64) for part in parts]
        )
        for number, name in enumerate(targets):
            length = float(gradients[number].norm())
            yield _summary(known, pl.Series(effects[:, number]), length, stage, name, "embedding")
            if stage == view and run.plan.estimate == "replay":
                yield _summary(known, known[f"score_{name}"], length, stage, name, "replay")


def _summary(
    known: pl.DataFrame, scores: pl.Series, length: float, stage: int, target: str, estimate: str
) -> pl.DataFrame:
    """Mean and spread over each step's samples."""
    per_rate = scores / known["rate"]
    quantities = {
        "score": scores,
        "per_rate": per_rate,
        "relative": per_rate / (known["norm"] * length),
    }
    found = []
    for name, values in quantities.items():
        kept = pl.when(pl.col("value").is_finite()).then("value")  # a step at rate 0 did nothing
        frame, value = (
            known.select("step", "rate", value=values).with_columns(kept.alias("value")),
            pl.col("value"),
        )
        figures = {
            "count": value.count(),
            "mean": value.mean(),
            "std": value.std(),
            "mean_abs": value.abs().mean(),
        }
        figures |= {quantile: value.quantile(at, "linear") for quantile, at in QUANTILES.items()}
        steps = frame.group_by("step", "rate").agg(**figures).sort("step")
        labels = {"stage": pl.lit(stage, pl.UInt32), "target": pl.lit(target)}
        labels |= {"estimate": pl.lit(estimate), "quantity": pl.lit(name)}
        found.append(
            steps.select(**labels, step="step", rate="rate", **{key: key for key in figures})
        )
    return pl.concat(found)


def _evolution(run: Run, last: int, frame: pl.DataFrame) -> pl.DataFrame:
    """Each stage's influence over learning rate as seen from its own end and those after it, by embeddings."""
    views = [read_frame(run.folder.stage(view).profile, PROFILE) for view in range(last)]
    found = []
    for view, seen in enumerate([*views, frame]):
        rows = seen.filter(quantity="per_rate", estimate="embedding")
        spread = {q: pl.col("mean").quantile(at, "linear") for q, at in QUANTILES.items()}
        figures = rows.group_by("stage", "target").agg(pl.col("mean", "mean_abs").mean(), **spread)
        found.append(figures.with_columns(view=pl.lit(view, pl.UInt32)))
    return pl.concat(found).sort("target", "stage", "view")
