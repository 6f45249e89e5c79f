"""What an example ends with: its stages beside a control's, and its most influential samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from flows.curate import curate
from flows.query import query
from flows.tables import audited, reasons, show
from tasks.comparison.arms import ALWAYS, RANDOM, arm_plan
from tasks.comparison.runs import share
from tasks.plan import Plan
from tasks.reading import read_plan
from tasks.run import Run
from tasks.samples import stage_samples
from tasks.summary import StageSummary


def with_control(path: str, **changes: Any) -> tuple[Plan, Plan]:
    """The plan in a file, and one whose stages keep as many samples at random; the control is not audited."""
    plan = read_plan(path, changes)
    shares = {n: getattr(stage.prune, "keep", 1.0) for n, stage in enumerate(plan.stages)}
    return plan, arm_plan(plan, f"{plan.run}-random", ALWAYS[RANDOM], shares)


def run_and_show(plans: tuple[Plan, Plan], describe: Callable[[dict[str, Any]], str]) -> None:
    """Runs a plan and its control, and prints the closing tables; `describe` says what a sample is."""
    own = curate(plans[0])
    share.fn(Run.start(plans[1]).url, Run.of(plans[0]).url)  # the first stage is trained once
    summaries = {plans[0].run: own, plans[1].run: curate(plans[1])}
    table = Table("run", "stage", "in", "kept", "dropped", *_columns(summaries[plans[0].run]))
    for name, summary in summaries.items():
        for stage in summary:
            table.add_row(name, *_row(stage))
    show(table)
    if audits := [stage.audited for summary in summaries.values() for stage in summary if stage.audited]:
        audited(audits)
    run = Run.of(plans[0])
    samples = stage_samples(run, 0)
    place = {key: row for row, key in enumerate(samples.frame["key"])}
    for harmful in (False, True):
        hits = query(run.url, target=plans[0].target, top=5, harmful=harmful)
        title = f"the 5 most {'harmful' if harmful else 'helpful'} samples for target {plans[0].target}"
        shown = Table("rank", "score", "key", "stage", "step", "sample", title=title)
        for hit in hits:
            sample = samples.read([place[hit.key]])[0]
            shown.add_row(str(hit.rank), f"{hit.score:+.2e}", hit.key, str(hit.stage), str(hit.step), describe(sample))
        show(shown)


def _columns(summary: list[StageSummary]) -> list[str]:
    return [
        f"{name} {figure}" for name, figures in summary[0].targets.items() for figure in figures if figure != "samples"
    ]


def _row(stage: StageSummary) -> list[str]:
    own = stage.pruned
    kept = [str(own.kept), reasons(own)] if own else ["all", "not pruned"]
    figures = [f"{v:.3f}" for target in stage.targets.values() for k, v in target.items() if k != "samples"]
    return [str(stage.stage), str(stage.samples), *kept, *figures]
