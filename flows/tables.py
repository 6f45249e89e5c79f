"""Print results as tables on stdout."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from secateur.tasks.comparison.arms import RANDOM, UNPRUNED

if TYPE_CHECKING:  # what prints a result must not import what makes it
    from secateur.tasks.analysis.groups import SampleGroup
    from secateur.tasks.analysis.windows import WindowSuggestion
    from secateur.tasks.comparison.comparison_report import Comparison
    from secateur.tasks.reporting.dry_run import RunEstimate
    from secateur.tasks.reporting.summary import StageSummary
    from secateur.tasks.results.agreement_results import AgreementResult
    from secateur.tasks.results.audit_results import AuditResult
    from secateur.tasks.results.pruning_results import PruneResult
    from secateur.tasks.valuation.query_answer import QueryAnswer

# Wide enough for every table, so that files and pipes get whole cells.
WIDTH_WITHOUT_TERMINAL = 200
SHOWN_COPIES = 4


def print_run(url: str, summary: list[StageSummary]) -> None:
    """Print the stages of a run."""
    targets = list(summary[0].targets) if summary else []
    losses = [f"loss {name}" for name in targets]
    table = Table("stage", "samples", "kept", "dropped", *losses, title=url)
    for stage in summary:
        pruned = ["all", "not pruned"]
        if stage.pruned:
            pruned = [str(stage.pruned.kept), describe_drops(stage.pruned)]
        values = [f"{stage.targets[name]['loss']:.4f}" for name in targets]
        table.add_row(str(stage.stage), str(stage.samples), *pruned, *values)
    print_table(table)
    for stage in summary:
        if stage.candidates:
            print(
                f"online selection in stage {stage.stage} trained on {stage.chosen:,} of "
                f"{stage.candidates:,} candidates"
            )
    for stage in summary:
        for sentence in stage.skipped:
            print(f"left out: {sentence}")
    agreements = [stage.agreement for stage in summary if stage.agreement]
    if agreements:
        print_agreements(agreements)
    audits = [stage.audited for stage in summary if stage.audited]
    if audits:
        print_audits(audits)


def describe_drops(result: PruneResult) -> str:
    """Return how many samples were dropped for each reason."""
    return "; ".join(f"{count} {reason}" for reason, count in result.reasons.items()) or "0"


def print_pruning(result: PruneResult) -> None:
    """Print the result of a pruning."""
    table = Table("stage", "policy", "samples", "kept", "dropped")
    counts = [str(result.samples), str(result.kept), describe_drops(result)]
    table.add_row(str(result.stage), result.name, *counts)
    print_table(table)
    for shard in result.shards:
        print(shard)


def print_answer(answer: QueryAnswer) -> None:
    """Print the samples that a query found, and how far the answer can be trusted."""
    table = Table("rank", "score", "key", "copies", "stage", "step", "shard")
    for hit in answer.hits:
        score = f"{hit.score:+.3e}"
        copies = str(hit.copies or "")
        table.add_row(
            str(hit.rank), score, hit.key, copies, str(hit.stage), str(hit.step), hit.shard
        )
    print_table(table)
    if any(hit.copies for hit in answer.hits):
        print("`secateur groups --by duplicates` adds up the scores of copies")
    for sentence in answer.trust():
        print(sentence)


def print_groups(groups: list[SampleGroup]) -> None:
    """Print groups of samples, what their scores sum up to, and what removing them did."""
    if not groups:
        print("no recorded use is in such a group")
        return
    columns = ("samples", "uses", "sum of scores", "per sample", "removed at once")
    table = Table("rank", "group", *columns, "kept", "dropped")
    for group in groups:
        removal = "" if group.removal is None else f"{group.removal:+.3e}"
        values = (f"{group.score:+.3e}", f"{group.mean:+.3e}", removal)
        counts = ["" if n is None else str(n) for n in (group.kept, group.dropped)]
        sizes = (str(group.samples), str(group.uses))
        table.add_row(str(group.rank), _name_group(group), *sizes, *values, *counts)
    print_table(table)


def _name_group(group: SampleGroup) -> str:
    """A group's name, or the keys of the first few copies."""
    keys = list(group.members)
    more = f" and {len(keys) - SHOWN_COPIES} more" if len(keys) > SHOWN_COPIES else ""
    return ", ".join(keys[:SHOWN_COPIES]) + more or group.group


def print_audit(result: AuditResult | AgreementResult) -> None:
    """Print what an audit found."""
    from secateur.tasks.results.agreement_results import AgreementResult

    if isinstance(result, AgreementResult):
        print_agreements([result])
    else:
        print_audits([result])


def print_audits(audits: list[AuditResult]) -> None:
    """Print how well scores agree with retraining."""
    table = Table("stage", "target", "removals", "estimate", "Spearman (95%)", "Pearson (95%)")
    for audit in audits:
        for estimate, fidelity in audit.fidelity.items():
            spearman = _correlation(fidelity.spearman, fidelity.spearman_interval)
            pearson = _correlation(fidelity.pearson, fidelity.pearson_interval)
            removals = str(audit.removals)
            table.add_row(str(audit.stage), audit.target, removals, estimate, spearman, pearson)
    print_table(table)
    for audit in audits:
        print(audit.plot)


def print_agreements(agreements: list[AgreementResult]) -> None:
    """Print how far answers agree with replay."""
    columns = ("questions", "estimate", "Spearman (lowest)", "found", "gradient held")
    table = Table("stage", *columns, title="answers compared with replay, medians over questions")
    for one in agreements:
        for name, agreement in one.estimates.items():
            spearman = f"{agreement.spearman:.2f} ({agreement.lowest:.2f})"
            found = f"{agreement.found:.0%} of {one.most} in {one.best:,}"
            cells = (str(one.questions), name, spearman, found, f"{one.held:.0%}")
            table.add_row(str(one.stage), *cells)
    print_table(table)


def print_comparison(comparison: Comparison) -> None:
    """Print whether pruning pays: what the arms used, each metric, and the verdict."""
    print_table(_arms_table(comparison))
    for metric in comparison.before:
        print_table(_metric_table(comparison, metric))
    print(comparison.verdict)
    for sentence in comparison.notes:
        print(f"note: {sentence}")
    for file in comparison.files:
        print(file)


def print_windows(suggestions: list[WindowSuggestion]) -> None:
    """Print phases and the windows that they suggest, with the lines to put in a plan."""
    table = Table("stage", "phase", "steps", "begins (95%)", "influence / learning rate")
    for suggestion in suggestions:
        intervals = {b.step: f"{b.low} to {b.high}" for b in suggestion.phases.boundaries}
        for phase in suggestion.phases.phases:
            steps = f"{phase.start} to {phase.stop}"
            begins = intervals.get(phase.start, "")
            level = f"{phase.level:.3e}"
            table.add_row(str(suggestion.stage), phase.name, steps, begins, level)
    if table.rows:
        print_table(table)
    for suggestion in suggestions:
        print(f"stage {suggestion.stage}, target {suggestion.target}: {suggestion.sentence}")
        if suggestion.windows:
            windows = [f"{{start: {w.start:g}, stop: {w.stop:g}}}" for w in suggestion.windows]
            comment = f"{suggestion.share:.0%} of the steps"
            print(f"    windows: [{', '.join(windows)}]  # {comment}")
        print(f"  {suggestion.picture}")


def print_estimate(estimate: RunEstimate) -> None:
    """Print what a plan would do and cost."""
    print_table(_stages_table(estimate))
    for stage, sentence in estimate.automatic.items():
        print(f"the windows of stage {stage}: {sentence}")
    print_table(_blocks_table(estimate))
    targets = ", ".join(f"{name} ({count} samples)" for name, count in estimate.targets.items())
    print(
        f"{estimate.parameters} parameters, reduced to {estimate.numbers} coefficients per sample; "
        f"targets: {targets}"
    )
    for stage, selection in estimate.selections.items():
        print(
            f"online selection in {selection.steps} steps of stage {stage} scores "
            f"{selection.judged:,} samples, which costs about {selection.cost:.1f} trainings of "
            f"that stage"
        )
    for stage, trainings in estimate.audits.items():
        print(f"the audit of stage {stage} costs about {trainings:.1f} trainings of that stage")
    for stage, trainings in estimate.questions.items():
        print(
            f"comparing answers of stage {stage} with replay costs about {trainings:.1f} trainings "
            f"of that stage"
        )
    for stage, steps in estimate.trials.items():
        print(f"the trial of stage {stage} trains {steps} steps")
    if estimate.launch:
        print(estimate.launch)
    print_table(_memory_table(estimate))
    if estimate.extrapolated:
        print(
            f"memory was measured with passes of one and two samples, because shapes alone do not "
            f"give it ({estimate.extrapolated})"
        )
    if sum(estimate.blocks.values()) > estimate.numbers:
        print(
            "records and matrices are foretold for coefficients that are nearly all in one block; "
            "if the fit of the basis spreads them, embedding and composing take less"
        )
    together = max(estimate.memory, key=lambda part: part.processes)
    if together.processes > 1:
        memory = _format_bytes(together.peak * together.processes)
        print(f"the {together.processes} processes of {together.part} take up to {memory} together")
    if estimate.replay_disk_bytes:
        temporary = _format_bytes(estimate.replay_disk_bytes)
        print(f"replay takes {temporary} of temporary files in the folder that TMPDIR names")
    disk = _format_bytes(estimate.disk_bytes)
    memory = _format_bytes(max(part.peak for part in estimate.memory))
    print(f"about {disk} on disk and {memory} of memory; nothing was trained")


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or as wide as it needs if there is no terminal."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else WIDTH_WITHOUT_TERMINAL
    Console(width=width).print(table)


def _correlation(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _arms_table(comparison: Comparison) -> Table:
    """What each arm used."""
    seeds = len(comparison.seeds)
    title = f"{comparison.url}: means over {seeds} seed{'s' if seeds > 1 else ''}"
    table = Table("arm", "samples", "steps", "training s", "selecting s", title=title)
    for arm in comparison.arms:
        training = f"{arm.train_seconds:.1f}"
        selecting = "-" if arm.select_seconds is None else f"{arm.select_seconds:.1f}"
        table.add_row(arm.arm, f"{arm.samples:.0f}", f"{arm.steps:.0f}", training, selecting)
    return table


def _metric_table(comparison: Comparison, metric: str) -> Table:
    """A metric of each arm, and its differences from the controls."""
    controls = (UNPRUNED, RANDOM)
    title = f"{metric} on {comparison.judge}: mean over seeds (95% interval)"
    columns = [f"minus {control}" for control in controls]
    table = Table("arm", "at the end", *columns, title=title)
    table.add_row("before pruning", comparison.before[metric].text(), "", "")
    for arm in comparison.arms:
        differences = arm.differences[metric]
        # A control has no difference from itself.
        cells = [differences[c].text(signed=True) if c in differences else "" for c in controls]
        table.add_row(arm.arm, arm.figures[metric].text(), *cells)
    return table


def _stages_table(estimate: RunEstimate) -> Table:
    sizes = ("ledger", "embeddings", "index", "checkpoints", "replay")
    table = Table("stage", "samples", "steps", "windows", "records", *sizes, title=estimate.run)
    for stage in estimate.stages:
        windows = ", ".join(f"{start} to {stop}" for start, stop in stage.windows)
        table.add_row(
            str(stage.stage),
            str(stage.samples),
            str(stage.steps),
            windows,
            str(stage.records),
            _format_bytes(stage.ledger_bytes),
            _format_bytes(stage.embedding_bytes),
            _format_bytes(stage.index_bytes),
            _format_bytes(stage.checkpoint_bytes),
            _format_bytes(stage.replay_bytes + stage.question_bytes),
        )
    return table


def _memory_table(estimate: RunEstimate) -> Table:
    columns = ("weights and their state", "passes", "records", "peak", "")
    table = Table("part", *columns, title="memory of one process, beside its libraries")
    largest = max(estimate.memory, key=lambda part: part.peak)
    for part in estimate.memory:
        sizes = map(_format_bytes, (part.state, part.passes, part.records, part.peak))
        table.add_row(part.part, *sizes, "largest" if part is largest else "")
    return table


def _blocks_table(estimate: RunEstimate) -> Table:
    table = Table("block", "coefficients, at most")
    for name, coefficients in estimate.blocks.items():
        table.add_row(name, str(coefficients))
    for name, parameters in estimate.uncaptured.items():
        table.add_row(name, f"not captured ({parameters} parameters)")
    return table


def _format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
