"""Room `flows`: what Prefect's UI shows of a run: tables, pictures and samples, under keys that stay from run to run."""

from __future__ import annotations

import base64
import string

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from secateur.tasks.comparison.comparison_report import Comparison
from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.engine.ui_artifacts import artifact_key, post_artifact
from secateur.tasks.reporting.html_report import HTML, read_top_samples
from secateur.tasks.reporting.previews import Preview
from secateur.tasks.reporting.summary import StageSummary, summarize_stage
from secateur.tasks.results.profile_results import PROFILE_PLOT
from secateur.tasks.run import Run
from secateur.tasks.valuation.query import QueryHit

# Backslashes, for Prefect's UI shows the entities of HTML as they are written.
ESCAPES = {ord(c): f"\\{c}" for c in string.punctuation if c not in "-_,"} | dict.fromkeys(
    range(32), " "
)


def post_stage(run_url: str, number: int) -> None:
    """What a stage came to, once its report is written: its table, influence profile, top samples, and the report."""
    if not has_lasting_server():
        return
    run = Run.open(run_url)
    name = f"stage-{number}"
    post_artifact(
        create_table_artifact, table=stage_rows(summarize_stage(run, number)), key=artifact_key(run, name),
        description=f"{escape_markdown(run.plan.run)}: what stage {number} came to",
    )  # fmt: skip
    picture = base64.b64encode(run.folder.stage(number).profile.read(PROFILE_PLOT)).decode()
    post_artifact(
        create_image_artifact, image_url=f"data:image/png;base64,{picture}", key=artifact_key(run, name, "profile"),
        description=f"{escape_markdown(run.plan.run)}: influence profile of stage {number}",
    )  # fmt: skip
    post_artifact(
        create_markdown_artifact, markdown=top_samples_markdown(run, number, read_top_samples(run, number)),
        key=artifact_key(run, name, "samples"),
    )  # fmt: skip
    post_artifact(
        create_link_artifact, link=_link(run, number), link_text=f"report of stage {number}",
        key=artifact_key(run, name, "report"),
    )  # fmt: skip


def post_query(run_url: str, hits: list[QueryHit]) -> None:
    """What a query found."""
    if has_lasting_server():
        rows = [
            hit.model_dump(include={"rank", "score", "key", "stage", "step", "shard"})
            for hit in hits
        ]
        post_artifact(
            create_table_artifact, table=rows, key=artifact_key(Run.open(run_url), "query")
        )


def post_comparison(run: Run, found: Comparison, picture: bytes) -> None:
    """What a comparison came to: its arms, and the picture under its verdict."""
    if has_lasting_server():
        post_artifact(
            create_table_artifact,
            table=comparison_rows(found),
            key=artifact_key(run, "compare"),
            description=escape_markdown(found.verdict),
        )
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        name = artifact_key(run, "compare", "picture")
        post_artifact(
            create_image_artifact,
            image_url=url,
            key=name,
            description=escape_markdown(found.verdict),
        )


def comparison_rows(found: Comparison) -> list[dict[str, str | float]]:
    """A comparison's table, one row an arm."""
    rows: list[dict[str, str | float]] = []
    for arm in found.arms:
        row: dict[str, str | float] = {"arm": arm.arm, "samples": arm.samples, "steps": arm.steps}
        for figure in found.before:
            row[f"{figure} on {found.judge}"] = arm.figures[figure].text()
            row |= {
                f"{figure} less {other}": gap.text(signed=True)
                for other, gap in arm.differences[figure].items()
            }
        rows.append(row)
    return rows


def stage_rows(summary: StageSummary) -> list[dict[str, str | float]]:
    """A stage's table: what went in, what was kept, what was dropped for which reason, and every target's figures."""
    own = summary.pruned
    counts: dict[str, float] = {"samples": summary.samples}
    if summary.candidates:
        counts |= {"candidates of online selection": summary.candidates, "chosen": summary.chosen}
    if own is not None:
        counts |= {"kept": own.kept, "dropped": own.dropped}
        counts |= {f"dropped: {reason}": count for reason, count in own.reasons.items()}
    for name, found in summary.targets.items():
        counts |= {
            f"{name}: {figure}": value for figure, value in found.items() if figure != "samples"
        }
    return [{"figure": figure, "value": value} for figure, value in counts.items()]


def top_samples_markdown(run: Run, number: int, top: dict[str, list[Preview]]) -> str:
    """The samples that were most helpful and most harmful, as markdown tables."""
    lines = [f"# {escape_markdown(run.plan.run)}, stage {number}"]
    for name, samples in top.items():
        lines += ["", f"## Most {name} to {escape_markdown(run.plan.pruning_target)}", ""]
        lines += ["| score | sample | step | | |", "|---|---|---|---|---|"]
        for one in samples:
            picture = f"![]({one.picture})" if one.picture else ""
            lines.append(
                f"| {one.score:+.3e} | {escape_markdown(one.key)} | {one.step} | {picture} | {escape_markdown(one.text)} |"
            )
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text that markdown shows as it is, whatever is in it."""
    return text.translate(ESCAPES)


def _link(run: Run, number: int) -> str:
    """Where the report is, for a browser."""
    artefact = run.folder.stage(number).report
    files = artefact.files()
    return files.local_path(HTML).resolve().as_uri() if files.is_local else files.url_of(HTML)
