"""Room `flows`: results as tables on stdout."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console
from rich.table import Table

from secateur.tasks.analysis.windows import WindowSuggestion
from secateur.tasks.comparison.comparison_report import Comparison
from secateur.tasks.reporting.dry_run import RunEstimate
from secateur.tasks.reporting.summary import StageSummary
from secateur.tasks.results.audit_results import AuditResult
from secateur.tasks.results.pruning_results import PruneResult
from secateur.tasks.valuation.query import QueryHit


def print_run(where: str, summary: list[StageSummary]) -> None:
    """A run's stages."""
    targets = list(summary[0].targets) if summary else []
    table = Table(
        "stage", "samples", "kept", "dropped", *(f"loss {name}" for name in targets), title=where
    )
    for stage in summary:
        own = stage.pruned
        kept = (str(own.kept), describe_drops(own)) if own else ("all", "not pruned")
        losses = (f"{stage.targets[name]['loss']:.4f}" for name in targets)
        table.add_row(str(stage.stage), str(stage.samples), *kept, *losses)
    print_table(table)
    for stage in (stage for stage in summary if stage.candidates):
        print(
            f"online selection in stage {stage.stage} trained on {stage.chosen:,} of {stage.candidates:,} candidates"
        )
    for sentence in (sentence for stage in summary for sentence in stage.skipped):
        print(f"left out: {sentence}")
    if audits := [stage.audited for stage in summary if stage.audited]:
        print_audits(audits)


def describe_drops(result: PruneResult) -> str:
    """How many were dropped, and why."""
    return "; ".join(f"{count} {reason}" for reason, count in result.reasons.items()) or "0"


def print_pruning(result: PruneResult) -> None:
    """One pruning."""
    table = Table("stage", "policy", "samples", "kept", "dropped")
    table.add_row(
        str(result.stage),
        result.name,
        str(result.samples),
        str(result.kept),
        describe_drops(result),
    )
    print_table(table)
    for shard in result.shards:
        print(shard)


def print_hits(found: list[QueryHit]) -> None:
    """Influential samples."""
    table = Table("rank", "score", "key", "stage", "step", "shard")
    for hit in found:
        table.add_row(
            str(hit.rank), f"{hit.score:+.3e}", hit.key, str(hit.stage), str(hit.step), hit.shard
        )
    print_table(table)


def print_audits(found: list[AuditResult]) -> None:
    """How far scores can be trusted."""
    table = Table("stage", "target", "removals", "estimate", "Spearman (95%)", "Pearson (95%)")
    for one in found:
        for name, f in one.fidelity.items():
            interval = "{:.2f} ({:.2f} to {:.2f})".format
            figures = (
                interval(f.spearman, *f.spearman_interval),
                interval(f.pearson, *f.pearson_interval),
            )
            table.add_row(str(one.stage), one.target, str(one.removals), name, *figures)
    print_table(table)
    for one in found:
        print(one.plot)


def print_comparison(found: Comparison) -> None:
    """Whether pruning pays: what the arms used, and each figure of the target that judges."""
    count = len(found.seeds)
    used = Table(
        "arm",
        "samples",
        "steps",
        "training s",
        "selecting s",
        title=f"{found.url}: means over {count} seed{'s' if count > 1 else ''}",
    )
    for arm in found.arms:
        selecting = "-" if arm.select_seconds is None else f"{arm.select_seconds:.1f}"
        used.add_row(
            arm.arm, f"{arm.samples:.0f}", f"{arm.steps:.0f}", f"{arm.train_seconds:.1f}", selecting
        )
    print_table(used)
    for figure, before in found.before.items():
        title = f"{figure} on {found.judge}: mean over seeds (95% interval)"
        table = Table("arm", "at the end", "less unpruned", "less random", title=title)
        table.add_row("before pruning", before.text(), "", "")
        for arm in found.arms:
            gaps = (arm.differences[figure].get(other) for other in ("unpruned", "random"))
            table.add_row(
                arm.arm,
                arm.figures[figure].text(),
                *(gap.text(signed=True) if gap else "" for gap in gaps),
            )
        print_table(table)
    print(found.verdict)
    for sentence in found.notes:
        print(f"note: {sentence}")
    for file in found.files:
        print(file)


def print_windows(found: list[WindowSuggestion]) -> None:
    """Phases and the windows that they suggest, with the lines to put in a plan."""
    table = Table("stage", "phase", "steps", "begins (95%)", "influence / learning rate")
    for one in found:
        begins = {b.step: f"{b.low} to {b.high}" for b in one.phases.boundaries}
        for phase in one.phases.phases:
            steps = f"{phase.start} to {phase.stop}"
            table.add_row(
                str(one.stage), phase.name, steps, begins.get(phase.start, ""), f"{phase.level:.3e}"
            )
    if table.rows:
        print_table(table)
    for one in found:
        print(f"stage {one.stage}, target {one.target}: {one.sentence}")
        if one.windows:
            spans = ", ".join(f"{{start: {w.start:g}, stop: {w.stop:g}}}" for w in one.windows)
            print(f"    windows: [{spans}]  # {one.share:.0%} of the steps")
        print(f"  {one.picture}")


def print_estimate(found: RunEstimate) -> None:
    """What a plan would do."""
    table = Table(
        "stage",
        "samples",
        "steps",
        "windows",
        "records",
        "ledger",
        "embeddings",
        "index",
        "checkpoints",
        title=found.run,
    )
    for s in found.stages:
        sizes = (s.ledger_bytes, s.embedding_bytes, s.index_bytes, s.checkpoint_bytes)
        spans = ", ".join(f"{start} to {stop}" for start, stop in s.windows)
        table.add_row(
            *map(str, (s.stage, s.samples, s.steps, spans, s.records)), *map(_bytes, sizes)
        )
    print_table(table)
    for stage, said in found.automatic.items():
        print(f"the windows of stage {stage}: {said}")
    blocks = Table("block", "numbers")
    for name, numbers in found.blocks.items():
        blocks.add_row(name, str(numbers))
    for name, count in found.uncaptured.items():
        blocks.add_row(name, f"not captured ({count} parameters)")
    print_table(blocks)
    targets = ", ".join(f"{name} ({count} samples)" for name, count in found.targets.items())
    print(f"{found.parameters} parameters in {found.numbers} numbers a sample; targets: {targets}")
    for stage, chosen in found.selections.items():
        print(
            f"online selection in {chosen.steps} steps of stage {stage} judges {chosen.judged:,} samples, which costs about "
            f"{chosen.cost:.1f} trainings of that stage"
        )
    for stage, trainings in found.audits.items():
        print(f"the audit of stage {stage} costs about {trainings:.1f} trainings of that stage")
    for stage, steps in found.trials.items():
        print(f"the trial of stage {stage} trains {steps} steps")
    print(
        f"about {_bytes(found.disk_bytes)} on disk and {_bytes(found.memory_bytes)} of memory; nothing was trained"
    )


def print_table(table: Table) -> None:
    """Prints a table as wide as the terminal, or as wide as it needs where there is none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
