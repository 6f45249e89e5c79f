"""What people look at: reports and artifacts show whatever is in the data, and are never formed by it."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from examples.shards import write_shards
from secateur.flows.run_artifacts import stage_rows, top_samples_markdown
from secateur.tasks.analysis.influence_profile import PICTURE
from secateur.tasks.engine import ui_artifacts
from secateur.tasks.engine.ui_artifacts import artifact_key
from secateur.tasks.reporting.html_report import (
    HTML,
    TOP,
    read_top_samples,
    top_samples,
    write_report,
)
from secateur.tasks.reporting.previews import LETTERS, SIDE, Preview, preview_sample
from secateur.tasks.reporting.summary import summarize_stage
from secateur.tasks.run.run import Run
from secateur.tasks.valuation.score import read_scores
from tests.tasks.small import curate_small, make_data, sample, small_plan

HOSTILE = "</td><script>alert(1)</script>|`x`![](http://evil.example/p.png)[a](javascript:b) www.evil.example *b* <img src=x>"
STAGES = [{"steps": 6, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}]


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile(number: int, picture: bytes) -> dict[str, Any]:
    """A digit whose key and text would form a page; a key holds no slash, and no dot."""
    key = f"{number:03d}{HOSTILE}".replace("/", "\u2215").replace(".", "\u2024")
    return sample(number) | {"__key__": key, "png": picture, "txt": HOSTILE.encode()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    picture = io.BytesIO()
    Image.fromarray(np.arange(100 * 80, dtype=np.uint8).reshape(80, 100)).save(picture, "PNG")
    make_data(folder)
    write_shards(
        f"{folder}/train-%d.tar", [hostile(number, picture.getvalue()) for number in range(160)], 2
    )
    run = curate_small(small_plan(folder, stages=STAGES, audit={"removals": 4, "stages": [0]}))
    write_report.fn(run.url, 0)
    return run


def test_a_report_is_one_page_that_data_cannot_form(run: Run) -> None:
    page = Elements(run.folder.stage(0).report.read(HTML).decode())
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "table", "tr", "th", "td", "p", "img"
    }  # fmt: skip
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(str(source).startswith("data:image/png;base64,") for source in pictures)
    for source in pictures:
        Image.open(io.BytesIO(base64.b64decode(str(source).split(",")[1]))).verify()
    assert HOSTILE[:40].replace("/", "\u2215") in page.text
    summary = summarize_stage(run, 0)
    assert summary.pruned is not None
    for told in (
        "160",
        str(summary.pruned.kept),
        *summary.pruned.reasons,
        "Most helpful to clean",
        "Audit: 4 removals",
    ):
        assert told in page.text


def test_top_samples_are_the_scores_own(run: Run) -> None:
    found = read_top_samples(run.folder.stage(0).report)
    strongest: dict[str, dict[str, float]] = {"helpful": {}, "harmful": {}}
    for row in read_scores(run, 0).iter_rows(named=True):
        value, name = row["score_clean"], "helpful" if row["score_clean"] > 0 else "harmful"
        held = strongest[name].get(row["key"], 0.0)
        strongest[name][row["key"]] = max(held, value, key=abs)
    for name, scores in strongest.items():
        best = sorted(scores.values(), key=abs, reverse=True)[:TOP]
        assert [one.score for one in found[name]] == pytest.approx(best)
        assert all(scores[one.key] == one.score for one in found[name])
    assert top_samples(run, 0, read_scores(run, 0)) == found


def test_a_report_is_made_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.tasks.reporting.html_report.render_page", None)
    assert write_report.fn(run.url, 0) == run.folder.stage(0).report.url(HTML)
    assert run.folder.stage(0).profile.read(PICTURE).startswith(b"\x89PNG")


def test_markdown_shows_samples_and_nothing_of_their_making(run: Run) -> None:
    hostile = Preview(
        score=1e-3, key=HOSTILE, step=3, picture="data:image/png;base64,AAAA", text=HOSTILE
    )
    markdown = top_samples_markdown(run, 0, {"helpful": [hostile], "harmful": []})
    rendered = Elements(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))
    assert {tag for tag, _ in rendered.tags} == {
        "h1",
        "h2",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "img",
    }
    assert [attributes["src"] for tag, attributes in rendered.tags if tag == "img"] == [
        hostile.picture
    ]
    assert rendered.text.count(HOSTILE) == 2
    assert "&#" not in markdown  # Prefect's UI would show it as it is written


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    rendered = Elements(MarkdownIt("gfm-like", {"linkify": False}).render(f"x{escape_markdown(text)}x"))
    assert {tag for tag, _ in rendered.tags} <= {"p"}
    assert rendered.text.strip() == f"x{text}x".strip()


def test_a_stages_table(run: Run) -> None:
    rows = {str(row["figure"]): row["value"] for row in stage_rows(summarize_stage(run, 0))}
    own = summarize_stage(run, 0).pruned
    assert own is not None
    assert (rows["samples"], rows["kept"], rows["dropped"]) == (160, own.kept, own.dropped)
    assert sum(v for name, v in rows.items() if name.startswith("dropped: ")) == own.dropped  # type: ignore[misc]
    assert rows["clean: loss"] == summarize_stage(run, 0).targets["clean"]["loss"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("images", "secateur-images-stage-0"),
        ("images-2026-11-24-0300", "secateur-images-stage-0"),
        ("images-2026-11-25-0300", "secateur-images-stage-0"),
        ("Big_Run.v2", "secateur-big-run-v2-stage-0"),
        ("2026-11-24", "secateur-stage-0"),
    ],
)
def test_keys_stay_from_night_to_night(tmp_path: Path, name: str, key: str) -> None:
    assert artifact_key(Run.of(small_plan(tmp_path, run=name)), "stage-0") == key


def test_members_that_are_looked_at() -> None:
    def picture(kind: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (300, 100), "red").save(out, kind)
        return out.getvalue()

    found = preview_sample({"__key__": "a", "jpg": picture("JPEG"), "cls": b"7"}, 1.0, 2)
    assert (found.text, found.step) == ("cls: 7", 2)
    small = Image.open(io.BytesIO(base64.b64decode(str(found.picture).split(",")[1])))
    assert (small.format, max(small.size)) == ("PNG", SIDE)
    assert (
        preview_sample({"__key__": "a", "png": b"no picture", "raw": b"1234"}, 1.0, 0).text
        == "png: 10 bytes; raw: 4 bytes"
    )
    assert (
        preview_sample({"__key__": "a", "png": picture("JPEG")}, 1.0, 0).picture is None
    )  # not what its name says
    long = preview_sample(
        {"__key__": "a", "txt": ("\u202ebad\n" + "word " * 1000).encode() + b"\xff"}, 1.0, 0
    ).text
    assert "\u202e" not in long
    assert "\n" not in long
    assert len(long) <= LETTERS + 10


def test_an_artifact_that_is_not_taken_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, asked = Run.of(small_plan(tmp_path)), list[object]()

    def refuse(**fields: object) -> None:
        asked.append(fields)
        raise ConnectionError

    monkeypatch.setattr(ui_artifacts, "watched", lambda: True)
    monkeypatch.setattr(ui_artifacts.FlowRunContext, "get", classmethod(lambda cls: object()))
    monkeypatch.setattr("secateur.tasks.engine.progress.log_to_prefect", lambda sentence: False)
    monkeypatch.setattr(ui_artifacts, "create_progress_artifact", refuse)
    live = ui_artifacts.ProgressArtifact(run, "stage-0-training", 5)
    live.reach(5)
    assert len(asked) == 1
    assert (
        "does not take the artifact secateur-small-stage-0-training (ConnectionError); the run goes on"
        in capsys.readouterr().err
    )

    monkeypatch.setattr(ui_artifacts, "create_progress_artifact", lambda **fields: "id")
    monkeypatch.setattr(ui_artifacts, "update_progress_artifact", refuse)
    live = ui_artifacts.ProgressArtifact(run, "stage-0-training", 5)
    live.reach(5)
    live.reach(5)
    assert len(asked) == 2


def test_nothing_is_asked_of_a_server_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui_artifacts, "create_progress_artifact", None)
    ui_artifacts.ProgressArtifact(Run.of(small_plan(tmp_path)), "stage-0-training", 5).reach(5)
