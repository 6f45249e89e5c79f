"""The artifacts that Prefect's UI shows of a run, under keys that stay the same from run to run."""

from __future__ import annotations

import base64
import string

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from secateur.tasks.analysis.groups import SampleGroup
from secateur.tasks.comparison.comparison_report import Comparison
from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.engine.ui_artifacts import artifact_key, post_artifact
from secateur.tasks.reporting.html_report import HTML, read_top_samples
from secateur.tasks.reporting.previews import Preview
from secateur.tasks.reporting.summary import StageSummary, summarize_stage
from secateur.tasks.results.profile_results import PROFILE_PLOT
from secateur.tasks.run import Run
from secateur.tasks.valuation.query_answer import QueryAnswer

Rows = list[dict[str, str | float]]

# Backslashes rather than HTML entities, because Prefect's UI shows entities as they are written.
ESCAPES = {ord(c): f"\\{c}" for c in string.punctuation if c not in "-_,"} | dict.fromkeys(
    range(32), " "
)


def post_stage(run_url: str, number: int) -> None:
    """Post the result of a stage whose report is written.

    These are its table, influence profile and top samples, and a link to the report.
    """
    if not has_lasting_server():
        return
    run = Run.open(run_url)
    run_name = escape_markdown(run.plan.run)
    stage = f"stage-{number}"
    post_artifact(
        create_table_artifact,
        table=stage_rows(summarize_stage(run, number)),
        key=artifact_key(run, stage),
        description=f"{run_name}: result of stage {number}",
    )
    post_artifact(
        create_image_artifact,
        image_url=_data_uri(run.folder.stage(number).profile.read(PROFILE_PLOT)),
        key=artifact_key(run, stage, "profile"),
        description=f"{run_name}: influence profile of stage {number}",
    )
    post_artifact(
        create_markdown_artifact,
        markdown=top_samples_markdown(run, number, read_top_samples(run, number)),
        key=artifact_key(run, stage, "samples"),
    )
    post_artifact(
        create_link_artifact,
        link=_report_link(run, number),
        link_text=f"report of stage {number}",
        key=artifact_key(run, stage, "report"),
    )


def post_query(run_url: str, answer: QueryAnswer) -> None:
    """Post the samples that a query found, with how far the answer can be trusted as caption."""
    if not has_lasting_server():
        return
    columns = {"rank", "score", "key", "stage", "step", "shard", "copies"}
    rows = [hit.model_dump(include=columns) for hit in answer.hits]
    key = artifact_key(Run.open(run_url), "query")
    caption = escape_markdown("; ".join(answer.trust()))
    post_artifact(create_table_artifact, table=rows, key=key, description=caption)


def post_groups(run_url: str, groups: list[SampleGroup]) -> None:
    """Post the groups of samples that were valued."""
    if not has_lasting_server():
        return
    rows = [group.model_dump(exclude={"members"}) for group in groups]
    key = artifact_key(Run.open(run_url), "groups")
    post_artifact(create_table_artifact, table=rows, key=key)


def post_comparison(run: Run, comparison: Comparison, picture: bytes) -> None:
    """Post the arms of a comparison as a table, and its plot. Both have the verdict as caption."""
    if not has_lasting_server():
        return
    verdict = escape_markdown(comparison.verdict)
    post_artifact(
        create_table_artifact,
        table=comparison_rows(comparison),
        key=artifact_key(run, "compare"),
        description=verdict,
    )
    post_artifact(
        create_image_artifact,
        image_url=_data_uri(picture),
        key=artifact_key(run, "compare", "picture"),
        description=verdict,
    )


def comparison_rows(comparison: Comparison) -> Rows:
    """Return the table of a comparison, one row per arm."""
    rows: Rows = []
    for arm in comparison.arms:
        row: dict[str, str | float] = {"arm": arm.arm, "samples": arm.samples, "steps": arm.steps}
        for metric in comparison.before:
            row[f"{metric} on {comparison.judge}"] = arm.figures[metric].text()
            for control, difference in arm.differences[metric].items():
                row[f"{metric} minus {control}"] = difference.text(signed=True)
        rows.append(row)
    return rows


def stage_rows(summary: StageSummary) -> Rows:
    """Return the table of a stage: counts of samples, drops by reason, and targets' metrics."""
    figures: dict[str, float] = {"samples": summary.samples}
    if summary.candidates:
        figures["candidates of online selection"] = summary.candidates
        figures["chosen"] = summary.chosen
    if summary.pruned is not None:
        figures["kept"] = summary.pruned.kept
        figures["dropped"] = summary.pruned.dropped
        for reason, count in summary.pruned.reasons.items():
            figures[f"dropped: {reason}"] = count
    for target, metrics in summary.targets.items():
        for metric, value in metrics.items():
            if metric != "samples":
                figures[f"{target}: {metric}"] = value
    return [{"figure": name, "value": value} for name, value in figures.items()]


def top_samples_markdown(run: Run, number: int, top: dict[str, list[Preview]]) -> str:
    """Return the most helpful and the most harmful samples of a stage as markdown tables."""
    target = escape_markdown(run.plan.pruning_target)
    lines = [f"# {escape_markdown(run.plan.run)}, stage {number}"]
    for name, samples in top.items():
        lines += ["", f"## Most {name} to {target}", ""]
        lines += ["| score | sample | step | | |", "|---|---|---|---|---|"]
        for sample in samples:
            picture = f"![]({sample.picture})" if sample.picture else ""
            key = escape_markdown(sample.key)
            text = escape_markdown(sample.text)
            lines.append(f"| {sample.score:+.3e} | {key} | {sample.step} | {picture} | {text} |")
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Return a text that markdown shows literally, whatever it contains."""
    return text.translate(ESCAPES)


def _report_link(run: Run, number: int) -> str:
    """The report's address, for a browser."""
    files = run.folder.stage(number).report.files()
    return files.local_path(HTML).resolve().as_uri() if files.is_local else files.url_of(HTML)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
