"""A stage's report: one HTML file that loads nothing, and the samples that Prefect's UI shows."""

from __future__ import annotations

import base64
import json
from importlib.resources import files

import polars as pl
from jinja2 import Environment, StrictUndefined

from secateur.storage.attempt import Attempt
from secateur.tasks.analysis.influence_profile import write_profile
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.reporting.previews import Preview, preview_sample
from secateur.tasks.reporting.summary import StageSummary, summarize_stage
from secateur.tasks.results.audit_results import AUDIT_PLOT, audit_output
from secateur.tasks.results.profile_results import PROFILE_PLOT
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run

HTML, TOP_SAMPLES = "report.html", "samples.json"
TOP = 8


def write_report(run: Run, stage: int) -> str:
    """Write the report of a stage that is scored and, if the plan says so, pruned and audited.

    Returns:
        Path or URL of the HTML file.
    """
    folder = run.folder.stage(stage)

    def write(attempt: Attempt) -> None:
        summary = summarize_stage(run, stage)
        top = top_samples(run, stage, read_scores(run, stage))
        write_profile(run, stage)
        profile_plot = folder.profile.read(PROFILE_PLOT)
        audit_plot = None
        if summary.audited:
            audit_plot = audit_output(run, stage, summary.audited.removals).read(AUDIT_PLOT)
        values = {name: [one.model_dump() for one in previews] for name, previews in top.items()}
        attempt.write(TOP_SAMPLES, json.dumps(values).encode())
        page = render_page(run, summary, top, profile_plot, audit_plot)
        attempt.write(HTML, page.encode())

    folder.report.write_once("report", {"scores": folder.scores.fingerprint}, write)
    return folder.report.url(HTML)


def top_samples(run: Run, stage: int, scores: pl.DataFrame) -> dict[str, list[Preview]]:
    """Return the samples that were most `helpful` and most `harmful` to the pruning target.

    Each sample is listed once, by its strongest use.
    """
    samples = read_stage_samples(run, stage)
    column = f"score_{run.plan.pruning_target}"
    top = {}
    for name, sign in (("helpful", 1.0), ("harmful", -1.0)):
        signed = sign * pl.col(column)
        rows = (
            scores.filter(signed > 0)
            .sort(signed, descending=True, maintain_order=True)
            .unique("sample", keep="first", maintain_order=True)
            .head(TOP)
        )
        contents = samples.read(rows["sample"].to_list())
        top[name] = [
            preview_sample(content, row[column], row["step"])
            for content, row in zip(contents, rows.iter_rows(named=True), strict=True)
        ]
    return top


def read_top_samples(run: Run, stage: int) -> dict[str, list[Preview]]:
    """Return the samples that a stage's report shows."""
    values = json.loads(run.folder.stage(stage).report.read(TOP_SAMPLES))
    return {name: [Preview(**one) for one in previews] for name, previews in values.items()}


def render_page(
    run: Run,
    summary: StageSummary,
    top: dict[str, list[Preview]],
    profile_plot: bytes,
    audit_plot: bytes | None,
) -> str:
    """Return the HTML. Everything that comes from data is escaped, and no script may run."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("secateur.tasks.reporting") / "report.html.j2"
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(
        run=run.plan.run,
        target=run.plan.pruning_target,
        stage=summary,
        top=top,
        picture=_data_uri(profile_plot),
        audit=audit_plot and _data_uri(audit_plot),
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
