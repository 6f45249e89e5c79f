"""Events hold what docs/events.md says, and are emitted when it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from secateur.flows import events
from secateur.flows.run_lock import absolute_url, limit_name
from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.results.agreement_results import read_agreement
from secateur.tasks.results.audit_results import Fidelity, read_audit
from secateur.tasks.results.pruning_results import unpruned_before
from secateur.tasks.run import Run
from secateur.tasks.training.train import train_stage
from tests.tasks.small import curate_small, make_data, small_plan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("events")
    make_data(folder)
    return curate_small(small_plan(folder))


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The events that would be sent to a server."""
    emitted: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "prefect.events.emit_event", lambda event, **rest: emitted.append({"event": event, **rest})
    )
    return emitted


def emit_all(run: Run) -> None:
    """Emit the events of a run's first stage and of its end, as if a server were configured."""
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        events.emit_trained(run.url, 0)
        events.emit_embedded(run.url, 0)
        events.emit_indexed(run.url, 0)
        events.emit_pruned(run.url, 0, PLAN_PRUNING)
        events.emit_finished(run.url)


def test_the_page_lists_every_payload() -> None:
    page = Path("docs/events.md").read_text()
    listed = dict(re.findall(r"### `(.*?)`\n(.*?)(?=\n### |\Z)", page, re.DOTALL))
    assert list(listed) == list(events.NAMES.values())
    for model, name in events.NAMES.items():
        rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", listed[name], re.MULTILINE)
        assert rows == [(field, info.description) for field, info in model.model_fields.items()]


def test_all_events_of_a_commit_have_one_id(run: Run, emitted: list[dict[str, Any]]) -> None:
    emit_all(run)
    first = [event["id"] for event in emitted]
    emit_all(run)
    assert [event["id"] for event in emitted] == first * 2
    assert len(set(first)) == 5
    run.folder.stage(0).trained.remove()
    train_stage(run, 0)
    emitted.clear()
    emit_all(run)
    assert [event["id"] == one for event, one in zip(emitted, first, strict=True)] == [
        False,
        True,
        True,
        True,
        True,
    ]


def test_nothing_is_emitted_without_a_server(run: Run, emitted: list[dict[str, Any]]) -> None:
    events.emit_trained(run.url, 0)
    events.emit_finished(run.url)
    assert emitted == []


@pytest.mark.parametrize(
    ("least", "spearman", "low", "expected"),
    [
        (0.5, 0.4, 0.2, True),
        (0.5, 0.6, -0.1, False),
        (None, 0.6, 0.1, False),
        (None, 0.6, -0.1, True),
    ],
)
def test_when_fidelity_is_low(
    least: float | None, spearman: float, low: float, expected: bool
) -> None:
    measured = Fidelity(
        spearman=spearman, spearman_interval=(low, 0.9), pearson=0, pearson_interval=(0, 0)
    )
    assert events.is_low(measured, least) is expected


def test_low_fidelity_is_emitted(tmp_path: Path, emitted: list[dict[str, Any]]) -> None:
    make_data(tmp_path)
    run = curate_small(
        small_plan(
            tmp_path,
            stages=[{"steps": 6, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}],
            audit={"removals": 12},
            score={"horizon": "stage", "aggregate": "mean", "estimate": "embedding"},
            trust={"min_fidelity": 1.0},
        )
    )
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        events.emit_low_fidelity(run.url, 0)
    (event,) = emitted
    assert event["event"] == "secateur.fidelity.low"
    assert event["payload"] == events.FidelityLow(**event["payload"]).model_dump(mode="json")
    assert event["payload"]["spearman"] == read_audit(run, 0).fidelity["embedding"].spearman
    assert (event["payload"]["least"], event["payload"]["estimate"]) == (1.0, "embedding")


@pytest.mark.parametrize("least", [None, -1.0, 1.0])
def test_low_agreement_is_emitted_if_the_plan_demands_more(
    tmp_path: Path, emitted: list[dict[str, Any]], least: float | None
) -> None:
    make_data(tmp_path)
    trust = {"questions": 2, "min_agreement": least}
    stages = [{"steps": 4, "batch_size": 10}]
    run = curate_small(small_plan(tmp_path, stages=stages, trust=trust))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        events.emit_low_agreement(run.url, 0)
    assert len(emitted) == (least == 1)
    for event in emitted:
        assert event["event"] == "secateur.agreement.low"
        payload = event["payload"]
        measured = [one.spearman for one in read_agreement(run, 0).estimates.values()]
        assert (payload["spearman"], payload["questions"]) == (min(measured), 2)
        assert payload["least"] == 1


def test_unpruned_stages_before_a_stage(run: Run) -> None:
    assert unpruned_before(run, 1) == []
    run.folder.stage(0).prune(PLAN_PRUNING).remove()
    assert (unpruned_before(run, 0), unpruned_before(run, 1)) == ([], [0])


def test_a_run_has_one_name_for_every_spelling_of_its_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, name = run.url.rsplit("/", 1)
    monkeypatch.chdir(parent)
    assert absolute_url(Run.open(name)) == run.url
    assert limit_name(Run.open(f"./{name}/")) == limit_name(run)
    assert re.fullmatch(r"secateur-small-[0-9a-f]{8}", limit_name(run))
