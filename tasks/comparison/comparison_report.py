"""The report of a comparison: its metrics as Parquet, a plot, and whether pruning pays."""

from __future__ import annotations

import hashlib
import json

import polars as pl
from pydantic import BaseModel

from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import write_frame
from secateur.storage.layout import ComparisonFolder
from secateur.storage.outputs import Output
from secateur.tasks.comparison.arms import PLAN, RANDOM, UNPRUNED
from secateur.tasks.comparison.comparison_plot import draw_comparison
from secateur.tasks.comparison.figures import FIGURES, Interval, read_figures, summarize_figures
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run

SUMMARY = "summary.parquet"
PICTURE = "compare.png"
CONTROLS = (UNPRUNED, RANDOM)


class ArmResult(BaseModel):
    """The result of one arm at the end of the last stage, as means over the seeds.

    Attributes:
        samples: that the last stage trained on.
        steps: of all stages.
        train_seconds: of all stages, including those that the arms share.
        select_seconds: scoring and pruning in this arm, without what another arm did for it. None
            if the run of every seed was interrupted.
        figures: by metric, on held-out samples.
        differences: by metric and control arm, taken seed by seed.
    """

    arm: str
    samples: float
    steps: float
    train_seconds: float
    select_seconds: float | None
    figures: dict[str, Interval]
    differences: dict[str, dict[str, Interval]]


class Comparison(BaseModel):
    """The result of a comparison.

    Attributes:
        judge: the target whose held-out samples evaluate the arms.
        before: its metrics at the end of the stages that the arms share, the loss first.
        verdict: whether pruning pays, in a sentence.
        notes: sentences about what limits the comparison.
        files: paths or URLs of the report's files.
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
    """Write the report of finished arms, unless the same arms have one already.

    Args:
        plan: the plan that is compared.
        judge: the target to evaluate on.
        urls: the arms' runs.

    Returns:
        The comparison, and its plot as PNG.
    """
    frame = read_figures(urls)
    summary = summarize_figures(frame, CONTROLS)
    before = frame.filter(arm=PLAN, stage=plan.first_pruned_stage, target=judge)

    def write(attempt: Attempt) -> None:
        write_frame(attempt, FIGURES, frame, schemas.figures_schema(seeds))
        write_frame(attempt, SUMMARY, summary, schemas.summary_schema((UNPRUNED, RANDOM)))
        attempt.write(PICTURE, draw_comparison(frame, summary, judge, plan.run, before))
        attempt.facts.update(seeds=seeds, judge=judge)

    report = _report_output(plan, seeds, judge, urls)
    report.write_once("comparison", {}, write)
    arms = [
        _arm_result(frame, summary, arm, judge) for arm in frame["arm"].unique(maintain_order=True)
    ]
    comparison = Comparison(
        run=plan.run,
        url=ComparisonFolder(plan.root, plan.run).root.url,
        seeds=seeds,
        judge=judge,
        before=_metrics_before_pruning(before),
        arms=arms,
        verdict=summarize_verdict(judge, arms[0]),
        notes=_notes(arms, len(seeds)),
        files=[report.url(file) for file in report.names()],
    )
    return comparison, report.read(PICTURE)


def summarize_verdict(judge: str, plan: ArmResult) -> str:
    """Return a sentence on the plan's loss compared with no pruning and with random pruning.

    Args:
        judge: the target whose held-out samples evaluate the arms.
        plan: the result of the plan's own arm.
    """
    from_unpruned = plan.differences["loss"][UNPRUNED]
    from_random = plan.differences["loss"][RANDOM]
    differences = (
        f"compared with no pruning, the plan changes the loss on {judge} by "
        f"{from_unpruned.text(signed=True)}; compared with as many random samples, by "
        f"{from_random.text(signed=True)}"
    )
    return f"{differences}: {_conclusion(from_unpruned, from_random)}"


def _conclusion(from_unpruned: Interval, from_random: Interval) -> str:
    """What the differences of the loss show. A negative difference is in favor of the plan."""
    if from_unpruned.low is None:
        return "one seed gives no interval, so run more seeds"
    if from_unpruned.sign < 0 and from_random.sign < 0:
        return "pruning pays"
    if from_unpruned.sign > 0:
        return "pruning does harm"
    if from_unpruned.sign == 0:
        return "no benefit of pruning is shown"
    if from_random.sign > 0:
        return "fewer samples help, but the plan's choice is worse than a random one"
    return "fewer samples help, but the plan's choice is not shown to be better than a random one"


def _report_output(plan: Plan, seeds: list[int], judge: str, urls: list[str]) -> Output:
    """The report's output, under a name that depends on the arms' content."""
    fingerprints = [Run.open(url).folder.figures.fingerprint for url in urls]
    digest = hashlib.sha256(json.dumps([judge, fingerprints]).encode()).hexdigest()[:8]
    return ComparisonFolder(plan.root, plan.run).report(f"{len(seeds)}-seeds-{digest}")


def _metrics_before_pruning(frame: pl.DataFrame) -> dict[str, Interval]:
    """Each metric with its interval over the seeds, the loss first."""
    metrics = sorted(frame["figure"].unique(), key=lambda name: (name != "loss", name))
    return {
        metric: Interval.from_values(frame.filter(figure=metric)["value"].to_list())
        for metric in metrics
    }


def _arm_result(frame: pl.DataFrame, summary: pl.DataFrame, arm: str, judge: str) -> ArmResult:
    # A stage has one row per target and metric, which repeat its counts and times.
    stages = frame.filter(arm=arm).unique(["seed", "stage"])
    select_seconds = pl.col("select_seconds")
    is_complete = select_seconds.is_not_null().all()
    seeds = stages.group_by("seed").agg(
        pl.col("samples").sort_by("stage").last(),
        pl.col("steps", "train_seconds").sum(),
        pl.when(is_complete).then(select_seconds.sum()).alias("select_seconds"),
    )
    means = seeds.select(pl.exclude("seed").mean()).row(0, named=True)
    figures = {}
    differences = {}
    for row in summary.filter(arm=arm, target=judge).rows(named=True):
        figures[row["figure"]] = _interval(row, "")
        differences[row["figure"]] = {
            control: _interval(row, f"{control}_") for control in CONTROLS if control != arm
        }
    return ArmResult(arm=arm, **means, figures=figures, differences=differences)


def _interval(row: dict[str, float], prefix: str) -> Interval:
    return Interval(**{name: row[f"{prefix}{name}"] for name in Interval.model_fields})


def _notes(arms: list[ArmResult], seeds: int) -> list[str]:
    notes = []
    if len({arm.steps for arm in arms}) > 1:
        notes.append(
            "the arms train different numbers of steps, because epochs shrink as data is pruned; "
            "give the later stages `steps` to compare at equal steps"
        )
    if 1 < seeds < 5:
        notes.append(f"{seeds} seeds give wide intervals; 5 or more show smaller differences")
    return notes
