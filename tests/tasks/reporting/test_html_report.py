"""Reports and artifacts show whatever text is in the data, and their form never depends on it."""

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
from prefect import artifacts
from prefect.context import FlowRunContext

from examples.shards import write_shards
from secateur.flows.run_artifacts import escape_markdown, stage_rows, top_samples_markdown
from secateur.tasks.engine import ui_artifacts
from secateur.tasks.engine.ui_artifacts import artifact_key
from secateur.tasks.reporting.html_report import (
    HTML,
    TOP,
    read_top_samples,
    top_samples,
    write_report,
)
from secateur.tasks.reporting.previews import (
    MOST_CHARACTERS,
    THUMBNAIL_SIDE,
    Preview,
    preview_sample,
)
from secateur.tasks.reporting.summary import summarize_stage
from secateur.tasks.results.profile_results import PROFILE_PLOT
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.run import Run
from tests.tasks.small import curate_small, make_data, sample, small_plan

HOSTILE = (
    "</td><script>alert(1)</script>|`x`![](http://evil.example/p.png)[a](javascript:b) "
    "www.evil.example *b* <img src=x>"
)
TABLE = ("table", "tr", "th", "td")
STAGES = [{"steps": 6, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}]


class Elements(HTMLParser):
    """The tags of a page with their attributes, and the text outside tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_sample(number: int, picture: bytes) -> dict[str, Any]:
    """A digit with HTML and markdown in key and text. A key must hold no slash and no dot."""
    key = f"{number:03d}{HOSTILE}".replace("/", "\u2215").replace(".", "\u2024")
    return sample(number) | {"__key__": key, "png": picture, "txt": HOSTILE.encode()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    picture = io.BytesIO()
    Image.fromarray(np.arange(100 * 80, dtype=np.uint8).reshape(80, 100)).save(picture, "PNG")
    make_data(folder)
    write_shards(
        f"{folder}/train-%d.tar",
        [hostile_sample(number, picture.getvalue()) for number in range(160)],
        2,
    )
    run = curate_small(small_plan(folder, stages=STAGES, audit={"removals": 4, "stages": [0]}))
    write_report(run, 0)
    return run


def test_data_cannot_change_the_elements_of_a_report(run: Run) -> None:
    page = Elements(run.folder.stage(0).report.read(HTML).decode())
    head = {"html", "head", "meta", "title", "style"}
    body = {"body", "h1", "h2", "p", "img", *TABLE}
    assert {tag for tag, _ in page.tags} <= head | body
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(str(source).startswith("data:image/png;base64,") for source in pictures)
    for source in pictures:
        Image.open(io.BytesIO(base64.b64decode(str(source).split(",")[1]))).verify()
    assert HOSTILE[:40].replace("/", "\u2215") in page.text
    summary = summarize_stage(run, 0)
    assert summary.pruned is not None
    for text in (
        "160",
        str(summary.pruned.kept),
        *summary.pruned.reasons,
        "Most helpful to clean",
        "Audit: 4 removals",
    ):
        assert text in page.text


def test_top_samples_have_the_strongest_scores(run: Run) -> None:
    found = read_top_samples(run, 0)
    strongest: dict[str, dict[str, float]] = {"helpful": {}, "harmful": {}}
    for row in read_scores(run, 0).iter_rows(named=True):
        value = row["score_clean"]
        scores = strongest["helpful" if value > 0 else "harmful"]
        scores[row["key"]] = max(scores.get(row["key"], 0.0), value, key=abs)
    for name, scores in strongest.items():
        best = sorted(scores.values(), key=abs, reverse=True)[:TOP]
        assert [one.score for one in found[name]] == pytest.approx(best)
        assert all(scores[one.key] == one.score for one in found[name])
    assert top_samples(run, 0, read_scores(run, 0)) == found


def test_a_report_is_written_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.tasks.reporting.html_report.render_page", None)
    assert write_report(run, 0) == run.folder.stage(0).report.url(HTML)
    assert run.folder.stage(0).profile.read(PROFILE_PLOT).startswith(b"\x89PNG")


def test_samples_cannot_change_the_elements_of_markdown(run: Run) -> None:
    hostile = Preview(
        score=1e-3, key=HOSTILE, step=3, picture="data:image/png;base64,AAAA", text=HOSTILE
    )
    markdown = top_samples_markdown(run, 0, {"helpful": [hostile], "harmful": []})
    rendered = Elements(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))
    expected = {"h1", "h2", "img", "thead", "tbody", *TABLE}
    assert {tag for tag, _ in rendered.tags} == expected
    assert [attributes["src"] for tag, attributes in rendered.tags if tag == "img"] == [
        hostile.picture
    ]
    assert rendered.text.count(HOSTILE) == 2
    assert "&#" not in markdown  # Prefect's UI shows entities literally


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))
def test_any_text_is_shown_literally(text: str) -> None:
    rendered = Elements(
        MarkdownIt("gfm-like", {"linkify": False}).render(f"x{escape_markdown(text)}x")
    )
    assert {tag for tag, _ in rendered.tags} <= {"p"}
    assert rendered.text.strip() == f"x{text}x".strip()


def test_a_stages_table_holds_its_summary(run: Run) -> None:
    rows = {str(row["figure"]): row["value"] for row in stage_rows(summarize_stage(run, 0))}
    result = summarize_stage(run, 0).pruned
    assert result is not None
    assert (rows["samples"], rows["kept"], rows["dropped"]) == (160, result.kept, result.dropped)
    drops = [float(value) for name, value in rows.items() if name.startswith("dropped: ")]
    assert sum(drops) == result.dropped
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
def test_artifact_keys_do_not_depend_on_the_runs_date(tmp_path: Path, name: str, key: str) -> None:
    assert artifact_key(Run.of_plan(small_plan(tmp_path, run=name)), "stage-0") == key


def test_previews_show_pictures_and_texts() -> None:
    def encode(kind: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (300, 100), "red").save(out, kind)
        return out.getvalue()

    found = preview_sample({"__key__": "a", "jpg": encode("JPEG"), "cls": b"7"}, 1.0, 2)
    assert (found.text, found.step) == ("cls: 7", 2)
    small = Image.open(io.BytesIO(base64.b64decode(str(found.picture).split(",")[1])))
    assert (small.format, max(small.size)) == ("PNG", THUMBNAIL_SIDE)
    unreadable = preview_sample({"__key__": "a", "png": b"no picture", "raw": b"1234"}, 1.0, 0)
    assert unreadable.text == "png: 10 bytes; raw: 4 bytes"
    assert (
        preview_sample({"__key__": "a", "png": encode("JPEG")}, 1.0, 0).picture is None
    )  # not what its name says
    long = preview_sample(
        {"__key__": "a", "txt": ("\u202ebad\n" + "word " * 1000).encode() + b"\xff"}, 1.0, 0
    ).text
    assert "\u202e" not in long
    assert "\n" not in long
    assert len(long) <= MOST_CHARACTERS + 10


def test_an_artifact_that_is_not_accepted_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.of_plan(small_plan(tmp_path))
    requests: list[object] = []

    def refuse(**fields: object) -> None:
        requests.append(fields)
        raise ConnectionError

    monkeypatch.setattr(ui_artifacts, "has_lasting_server", lambda: True)
    monkeypatch.setattr(FlowRunContext, "get", classmethod(lambda cls: object()))
    monkeypatch.setattr("secateur.tasks.engine.progress.log_to_prefect", lambda sentence: False)
    monkeypatch.setattr(artifacts, "create_progress_artifact", refuse)
    progress = ui_artifacts.ProgressArtifact(run, "stage-0-training", 5)
    progress.update(5)
    assert len(requests) == 1
    message = (
        "does not accept the artifact secateur-small-stage-0-training (ConnectionError); "
        "the run continues"
    )
    assert capsys.readouterr().err.count(message) == 1

    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda **fields: "id")
    monkeypatch.setattr(artifacts, "update_progress_artifact", refuse)
    progress = ui_artifacts.ProgressArtifact(run, "stage-0-training", 5)
    progress.update(5)
    progress.update(5)
    assert len(requests) == 2


def test_no_artifact_is_posted_without_a_lasting_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "create_progress_artifact", None)
    run = Run.of_plan(small_plan(tmp_path))
    ui_artifacts.ProgressArtifact(run, "stage-0-training", 5).update(5)
