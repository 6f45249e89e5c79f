"""Room `tasks.comparison`: a comparison's report: figures as Parquet, a table, a plot, and what follows."""

from __future__ import annotations

import hashlib
import json

import polars as pl
from pydantic import BaseModel

from secateur.storage.frames import write_frame
from secateur.storage.layout import ComparisonFolder
from secateur.tasks.comparison.arms import PLAN, RANDOM, UNPRUNED
from secateur.tasks.comparison.comparison_plot import draw_comparison
from secateur.tasks.comparison.figures import FIGURES, Interval, read_figures, summarize_figures
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run

SUMMARY = "summary.parquet"
PICTURE = "compare.png"


class ArmResult(BaseModel):
    """An arm at the last stage's end; means over the seeds, and figures of the target that judges.

    Attributes:
        samples: trained on in the last stage.
        steps: of all stages.
        train_seconds: of all stages, shared ones included.
        select_seconds: scoring and pruning that no other arm did for this one; None where no seed was timed whole.
        figures, differences: by figure, and by figure and the arm it is held against, seed by seed.
    """

    arm: str
    samples: float
    steps: float
    train_seconds: float
    select_seconds: float | None
    figures: dict[str, Interval]
    differences: dict[str, dict[str, Interval]]


class Comparison(BaseModel):
    """Whether pruning pays.

    Attributes:
        before: the judge's figures at the end of the stages that the arms share, the loss first.
    """

    run: str
    url: str
    seeds: list[int]
    judge: str
    before: dict[str, Interval]
    arms: list[ArmResult]
    verdict: str
    notes: list[str]
    files: list[str]


def write_comparison(
    plan: Plan, seeds: list[int], judge: str, urls: list[str]
) -> tuple[Comparison, bytes]:
    """Writes the report of finished arms, under a name that they determine.

    Args:
        urls: the arms' runs.

    Returns:
        What it says, and its plot as PNG.
    """
    folder = ComparisonFolder(plan.root, plan.run)
    prints = [Run.open(url).folder.figures.fingerprint for url in urls]
    digest = hashlib.sha256(json.dumps([judge, prints]).encode()).hexdigest()[:8]
    artefact = folder.report(f"{len(seeds)}-seeds-{digest}")
    frame = read_figures(urls)
    summary = summarize_figures(frame, (UNPRUNED, RANDOM))
    first = frame.filter(
        pl.col("stage") == plan.first_pruned_stage, pl.col("arm") == PLAN, pl.col("target") == judge
    )
    if not artefact.committed:
        with artefact.attempt("comparison", {}) as attempt:
            write_frame(attempt, FIGURES, frame)
            write_frame(attempt, SUMMARY, summary)
            attempt.write(PICTURE, draw_comparison(frame, summary, judge, plan.run, first))
            attempt.facts.update(seeds=seeds, judge=judge)
    arms = [_result(frame, summary, arm, judge) for arm in frame["arm"].unique(maintain_order=True)]
    figures = sorted(first["figure"].unique(), key=lambda name: (name != "loss", name))
    found = Comparison(
        run=plan.run,
        url=folder.root.url,
        seeds=seeds,
        judge=judge,
        before={
            name: Interval.of(first.filter(pl.col("figure") == name)["value"].to_list())
            for name in figures
        },
        arms=arms,
        verdict=summarize_verdict(judge, arms[0]),
        notes=_notes(arms, len(seeds)),
        files=[artefact.url(file) for file in artefact.names()],
    )
    return found, artefact.read(PICTURE)


def _result(frame: pl.DataFrame, summary: pl.DataFrame, arm: str, judge: str) -> ArmResult:
    stages = frame.filter(pl.col("arm") == arm).unique(["seed", "stage"])
    seeds = stages.group_by("seed").agg(
        pl.col("samples").sort_by("stage").last(),
        pl.col("steps", "train_seconds").sum(),
        pl.when(pl.col("select_seconds").is_null().any()).then(None).otherwise(pl.col("select_seconds").sum()).alias("select_seconds"),
    )  # fmt: skip
    means = seeds.select(pl.exclude("seed").mean()).row(0, named=True)
    own = summary.filter(pl.col("arm") == arm, pl.col("target") == judge).rows(named=True)
    return ArmResult(
        arm=arm,
        **means,
        figures={row["figure"]: _interval(row, "") for row in own},
        differences={
            row["figure"]: {
                other: _interval(row, f"{other}_") for other in (UNPRUNED, RANDOM) if other != arm
            }
            for row in own
        },
    )


def _interval(row: dict[str, float], prefix: str) -> Interval:
    return Interval(**{key: row[f"{prefix}{key}"] for key in Interval.model_fields})


def summarize_verdict(judge: str, plan: ArmResult) -> str:
    """What the plan's loss against both controls says."""
    found = plan.differences["loss"]
    names = {UNPRUNED: "without pruning", RANDOM: "with as many samples at random"}
    gaps = "; less that ".join(
        f"{what} {found[other].text(signed=True)}" for other, what in names.items()
    )
    told = f"the plan's loss on {judge} less that {gaps}"
    if any(found[other].low is None for other in names):
        return f"{told}: one seed gives no interval, ask for more"
    signs = [found[other].sign for other in names]
    if signs == [-1, -1]:
        return f"{told}: pruning pays"
    if signs[0] > 0:
        return f"{told}: pruning does harm"
    if signs[0] < 0:
        return f"{told}: fewer samples pay, but that these were chosen {'does harm' if signs[1] > 0 else 'is not shown to matter'}"
    return f"{told}: that pruning pays is not shown"


def _notes(arms: list[ArmResult], seeds: int) -> list[str]:
    notes = []
    if len({arm.steps for arm in arms}) > 1:
        notes.append(
            "the arms train different numbers of steps, for epochs shrink as data is pruned; give the later stages `steps` "
            "to compare at equal steps"
        )
    if 1 < seeds < 5:
        notes.append(f"{seeds} seeds give wide intervals; 5 or more tell smaller differences")
    return notes
