"""Room `tasks`: a stage's report: one HTML file that needs nothing beside it, and what Prefect's artifacts show of it."""

from __future__ import annotations

import base64
import json
from importlib.resources import files

import polars as pl
from jinja2 import Environment, StrictUndefined

from secateur.storage.outputs import Output
from secateur.tasks.analysis.influence_profile import PICTURE, write_profile
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.reporting.previews import Preview, preview_sample
from secateur.tasks.reporting.summary import StageSummary, summarize_stage
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.score import read_scores

HTML, SAMPLES = "report.html", "samples.json"
TOP = 8


@pipeline_task("report", makes=lambda run, stage: run.folder.stage(stage).report)
def write_report(run_url: str, stage: int) -> str:
    """Writes what a stage came to, once it is scored and, where the plan says so, pruned and audited.

    Returns:
        Path or URL of the HTML file.
    """
    run = Run.open(run_url)
    artefact = run.folder.stage(stage).report
    if not artefact.committed:
        summary, scores = summarize_stage(run, stage), read_scores(run, stage)
        top = top_samples(run, stage, scores)
        write_profile.fn(run_url, stage)
        picture = run.folder.stage(stage).profile.read(PICTURE)
        with artefact.attempt(
            "report", {"scores": run.folder.stage(stage).scores.fingerprint}
        ) as attempt:
            attempt.write(
                SAMPLES,
                json.dumps(
                    {n: [s.model_dump() for s in found] for n, found in top.items()}
                ).encode(),
            )
            attempt.write(
                HTML,
                render_page(
                    run, summary, top, picture, _audit_picture(run, stage, summary)
                ).encode(),
            )
    return artefact.url(HTML)


def top_samples(run: Run, stage: int, scores: pl.DataFrame) -> dict[str, list[Preview]]:
    """The samples that were most `helpful` and most `harmful` to the target pruned for, each once, by its strongest use."""
    samples, column, found = read_stage_samples(run, stage), f"score_{run.plan.target}", {}
    for name, sign in (("helpful", 1.0), ("harmful", -1.0)):
        rows = (
            scores.filter(sign * pl.col(column) > 0)
            .sort(sign * pl.col(column), descending=True, maintain_order=True)
            .unique("sample", keep="first", maintain_order=True)
            .head(TOP)
        )
        read = samples.read(rows["sample"].to_list())
        found[name] = [
            preview_sample(s, row[column], row["step"])
            for s, row in zip(read, rows.iter_rows(named=True), strict=True)
        ]
    return found


def read_top_samples(artefact: Output) -> dict[str, list[Preview]]:
    """What `extremes` gave for a report."""
    return {
        n: [Preview(**s) for s in found] for n, found in json.loads(artefact.read(SAMPLES)).items()
    }


def render_page(
    run: Run,
    summary: StageSummary,
    top: dict[str, list[Preview]],
    picture: bytes,
    audit: bytes | None,
) -> str:
    """The HTML; whatever comes from data is escaped, and the page may load and run nothing."""
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(
        (files("secateur.tasks.reporting") / "report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        run=run.plan.run,
        target=run.plan.target,
        stage=summary,
        top=top,
        picture=_uri(picture),
        audit=audit and _uri(audit),
    )


def _audit_picture(run: Run, stage: int, summary: StageSummary) -> bytes | None:
    if summary.audited is None:
        return None
    return run.folder.stage(stage).audit(summary.audited.removals).read("audit.png")


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
