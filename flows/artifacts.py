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

from tasks.artifacts import key_of, post
from tasks.comparison.report import Comparison
from tasks.profile import PICTURE
from tasks.report import HTML, stored_extremes
from tasks.run import Run
from tasks.search import Hit
from tasks.server import watched
from tasks.shown import Shown
from tasks.summary import StageSummary, summary_of

# Backslashes, for Prefect's UI shows the entities of HTML as they are written.
ESCAPES = {ord(c): f"\\{c}" for c in string.punctuation if c not in "-_,"} | dict.fromkeys(range(32), " ")


def stage(run_url: str, number: int) -> None:
    """What a stage came to, once its report is written: its table, influence profile, top samples, and the report."""
    if not watched():
        return
    run = Run.open(run_url)
    artefact, name = run.folder.stage(number).report, f"stage-{number}"
    post(
        create_table_artifact, table=figures(summary_of(run, number)), key=key_of(run, name),
        description=f"{plain(run.plan.run)}: what stage {number} came to",
    )  # fmt: skip
    picture = base64.b64encode(run.folder.stage(number).profile.read(PICTURE)).decode()
    post(
        create_image_artifact, image_url=f"data:image/png;base64,{picture}", key=key_of(run, name, "profile"),
        description=f"{plain(run.plan.run)}: influence profile of stage {number}",
    )  # fmt: skip
    post(
        create_markdown_artifact, markdown=top_samples(run, number, stored_extremes(artefact)),
        key=key_of(run, name, "samples"),
    )  # fmt: skip
    post(
        create_link_artifact, link=_link(run, number), link_text=f"report of stage {number}",
        key=key_of(run, name, "report"),
    )  # fmt: skip


def query(run_url: str, hits: list[Hit]) -> None:
    """What a query found."""
    if watched():
        rows = [hit.model_dump(include={"rank", "score", "key", "stage", "step", "shard"}) for hit in hits]
        post(create_table_artifact, table=rows, key=key_of(Run.open(run_url), "query"))


def comparison(run: Run, found: Comparison, picture: bytes) -> None:
    """What a comparison came to: its arms, and the picture under its verdict."""
    if watched():
        post(create_table_artifact, table=arms(found), key=key_of(run, "compare"), description=plain(found.verdict))
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        name = key_of(run, "compare", "picture")
        post(create_image_artifact, image_url=url, key=name, description=plain(found.verdict))


def arms(found: Comparison) -> list[dict[str, str | float]]:
    """A comparison's table, one row an arm."""
    rows: list[dict[str, str | float]] = []
    for arm in found.arms:
        row: dict[str, str | float] = {"arm": arm.arm, "samples": arm.samples, "steps": arm.steps}
        for figure in found.before:
            row[f"{figure} on {found.judge}"] = arm.figures[figure].text()
            row |= {f"{figure} less {other}": gap.text(signed=True) for other, gap in arm.differences[figure].items()}
        rows.append(row)
    return rows


def figures(summary: StageSummary) -> list[dict[str, str | float]]:
    """A stage's table: what went in, what was kept, what was dropped for which reason, and every target's figures."""
    own = summary.pruned
    counts: dict[str, float] = {"samples": summary.samples}
    if summary.candidates:
        counts |= {"candidates of online selection": summary.candidates, "chosen": summary.chosen}
    if own is not None:
        counts |= {"kept": own.kept, "dropped": own.dropped}
        counts |= {f"dropped: {reason}": count for reason, count in own.reasons.items()}
    for name, found in summary.targets.items():
        counts |= {f"{name}: {figure}": value for figure, value in found.items() if figure != "samples"}
    return [{"figure": figure, "value": value} for figure, value in counts.items()]


def top_samples(run: Run, number: int, top: dict[str, list[Shown]]) -> str:
    """The samples that were most helpful and most harmful, as markdown tables."""
    lines = [f"# {plain(run.plan.run)}, stage {number}"]
    for name, samples in top.items():
        lines += ["", f"## Most {name} to {plain(run.plan.target)}", ""]
        lines += ["| score | sample | step | | |", "|---|---|---|---|---|"]
        for one in samples:
            picture = f"![]({one.picture})" if one.picture else ""
            lines.append(f"| {one.score:+.3e} | {plain(one.key)} | {one.step} | {picture} | {plain(one.text)} |")
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that markdown shows as it is, whatever is in it."""
    return text.translate(ESCAPES)


def _link(run: Run, number: int) -> str:
    """Where the report is, for a browser."""
    artefact = run.folder.stage(number).report
    files = artefact.files()
    return files.path(HTML).resolve().as_uri() if files.is_local else files.url_of(HTML)
