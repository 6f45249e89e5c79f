"""Windows from profiles: the budget's rule, settling them as a stage begins, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PlanError
from secateur.tasks.analysis.phases import Phase, Phases
from secateur.tasks.analysis.windows import (
    WindowSuggestion,
    allocate_windows,
    freeze_windows,
    suggest_windows,
)
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.plan import Plan, SelectionConfig, WindowConfig
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop
from tests.tasks.small import curate_small, make_data, small_plan

STAGE = {"steps": 20, "batch_size": 20}
AUTO = {"auto": "previous", "budget": 0.3}


def phases(*pieces: tuple[str, int, float]) -> Phases:
    """Phases from the name, the length and the level of each piece."""
    found, start = [], 0
    for name, length, level in pieces:
        found.append(Phase(name=name, start=start, stop=start + length, level=level))  # type: ignore[arg-type]
        start += length
    return Phases(
        steps=start or 100, recorded=start or 100, phases=found, boundaries=[], support=1.0
    )


PUBLISHED = phases(
    ("warm-up", 10, 100.0), ("basin", 60, 1.0), ("ascent", 15, 4.0), ("ascent", 15, 14.0)
)


def test_the_budget_goes_where_influence_is_largest() -> None:
    assert allocate_windows(PUBLISHED, 0.05, 100) == [range(0, 5)]
    assert allocate_windows(PUBLISHED, 0.2, 100) == [range(0, 10), range(90, 100)]
    assert allocate_windows(PUBLISHED, 0.4, 100) == [range(0, 10), range(70, 100)]
    assert allocate_windows(PUBLISHED, 0.9, 100) == [range(0, 10), range(70, 100)]
    assert allocate_windows(PUBLISHED, 0.3, 50) == [range(0, 5), range(40, 50)]
    assert allocate_windows(phases(), 0.4, 100) == [range(60, 100)]


NAMED = st.tuples(
    st.sampled_from(["warm-up", "basin", "ascent"]), st.integers(1, 50), st.floats(0.1, 100)
)


@given(st.lists(NAMED, max_size=6), st.floats(0.01, 1), st.integers(6, 300))
def test_windows_are_apart_within_the_stage_and_within_the_budget(
    pieces: list[tuple[str, int, float]], budget: float, steps: int
) -> None:
    order = {"warm-up": 0, "basin": 1, "ascent": 2}
    found = allocate_windows(
        phases(*sorted(pieces, key=lambda piece: order[piece[0]])), budget, steps
    )
    assert found
    assert sum(map(len, found)) <= max(1, budget * steps)
    places = [place for window in found for place in window]
    assert places == sorted(set(places))
    assert set(places) <= set(range(steps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("windows")
    make_data(made)
    return made


def plan_of(folder: Path, name: str, *stages: dict[str, Any]) -> Plan:
    return small_plan(folder, run=name, stages=list(stages))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """A run of three stages: the second and third take the windows that the first suggests."""
    select = {"method": "random", "candidates": 2}
    later = (
        STAGE | {"steps": 10, "windows": AUTO | {"select": select}},
        STAGE | {"steps": 10, "windows": AUTO},
    )
    return curate_small(plan_of(folder, "whole", STAGE, *later))


def test_later_stages_take_them_from_the_nearest_one_recorded_whole(whole: Run) -> None:
    (suggestion,) = suggest_windows.fn(whole.url, 0, 0.3)
    expected = [
        WindowConfig(start=r.start, stop=r.stop, unit="steps")
        for r in allocate_windows(suggestion.phases, 0.3, 10)
    ]
    second, third = (Run.open(whole.url).plan.stages[n] for n in (1, 2))
    assert third.windows == expected
    assert second.given == [
        w.model_copy(update={"select": SelectionConfig(method="random", candidates=2)})
        for w in expected
    ]
    inside = {step for w in expected for step in range(int(w.start), int(w.stop))}
    assert sum(w.stop - w.start for w in expected) == len(inside) <= 3
    assert whole.folder.stage(2).windows.manifest.facts["source"] == f"stage 0 of {whole.url}"


def test_suggestions_say_what_they_rest_on(whole: Run) -> None:
    found: list[WindowSuggestion] = suggest_windows.fn(whole.url, budget=0.5)
    assert [one.stage for one in found] == [0, 1, 2]
    assert 0 < found[0].share <= 0.5
    assert found[0].windows[-1].stop <= 1
    assert Path(found[0].picture).read_bytes().startswith(b"\x89PNG")
    for one in found[1:]:
        assert one.windows == []
        assert (
            "recorded in 3 of 10 steps: a profile of windows cannot show a stage's phases"
            in one.sentence
        )


def test_they_stay_when_the_run_they_came_from_is_gone(
    folder: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(f"{folder}/runs/source")
    shutil.copytree(whole.url, source)
    plan = plan_of(folder, "taker", STAGE | {"windows": {"auto": str(source), "budget": 0.3}})
    foretold = estimate_run(plan)
    run = Run.start(plan)
    list_stage_samples.fn(run.url, 0)
    settled = freeze_windows.fn(run.url, 0)
    step = TrainingLoop.step

    def interrupted(loop: TrainingLoop, number: int, recording: object = None) -> object:
        if number == 8:
            raise KeyboardInterrupt
        return step(loop, number, recording)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingLoop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    monkeypatch.undo()
    shutil.rmtree(source)
    assert curate_small(plan).url == run.url
    assert freeze_windows.fn(run.url, 0) == settled
    order = BatchSchedule(Run.open(run.url).plan, 0, 140)
    assert foretold.stages[0].windows == [(w.start, w.stop) for w in order.windows()]
    assert f"taken from stage 0 of {source}" in foretold.automatic[0]
    assert estimate_run(plan).automatic[0] == f"settled from stage 0 of {source}"
    with pytest.raises(PlanError, match=r"holds a run of another plan .they differ in stages"):
        Run.start(plan_of(folder, "taker", STAGE))


def test_the_dry_run_counts_what_is_not_known_yet(folder: Path) -> None:
    found = estimate_run(plan_of(folder, "dry", STAGE, STAGE | {"windows": AUTO}))
    assert found.stages[1].windows == [(14, 20)]
    assert "to be taken from stage 0 as the stage begins" in found.automatic[1]
    assert not (folder / "runs" / "dry").exists()


HALF = {"windows": [{"start": 0.0, "stop": 0.5}]}


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (
            [STAGE | {"windows": AUTO}],
            "stage 0 takes its windows from the stage before it, and no stage before it",
        ),
        (
            [STAGE | HALF, STAGE | {"windows": AUTO}],
            "stage 1 takes .* no stage before it is recorded whole",
        ),
        ([STAGE, STAGE | {"windows": AUTO | {"stage": 0}}], "leave it out beside `auto: previous`"),
        ([STAGE, STAGE | {"windows": AUTO | {"budget": 1.5}}], r"windows\.auto\.budget"),
        ([STAGE, STAGE | {"windows": {"auto": ""}}], r"windows\.auto\.auto"),
        (
            [STAGE, STAGE | {"windows": AUTO | {"select": {"target": "none"}}}],
            "select.target none is none of the targets",
        ),
        ([STAGE, STAGE | {"windows": []}], "at least 1 item"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    folder: Path, stages: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan_of(folder, "refused", *stages)


def test_whole_is_whole_in_pieces_and_in_steps(folder: Path) -> None:
    halves = [{"start": 0.5, "stop": 1.0}, {"start": 0.0, "stop": 0.5}]
    steps = [{"start": 0, "stop": 7, "unit": "steps"}, {"start": 7, "stop": 20, "unit": "steps"}]
    stages = plan_of(
        folder, "any", *(STAGE | {"windows": w} for w in (halves, steps, steps[:1])), STAGE
    ).stages
    assert [stage.is_recorded_whole for stage in stages] == [True, True, False, True]


@pytest.mark.parametrize(
    ("auto", "sentence"),
    [
        ({"auto": "nowhere"}, "nowhere holds no run"),
        (
            {"auto": "RUN", "stage": 7},
            "stage 1 takes its windows from stage 7 of .*, whose last is 2",
        ),
        (
            {"auto": "RUN"},
            "from stage 1 of .*, which was recorded in 3 of 10 steps only; name a stage that was recorded whole",
        ),
        ({"auto": "EMPTY", "stage": 0}, "from stage 0 of .*, which is not scored yet"),
    ],
)
def test_an_earlier_run_that_cannot_give_any_is_found_out_at_the_start(
    folder: Path, whole: Run, auto: dict[str, Any], sentence: str
) -> None:
    names = {"RUN": whole.url, "EMPTY": Run.start(plan_of(folder, "empty", STAGE)).url}
    auto = auto | {"auto": names.get(auto["auto"], auto["auto"])}
    plan = plan_of(
        folder,
        f"at-{auto['auto'].rsplit('/')[-1]}-{auto.get('stage')}",
        STAGE,
        STAGE | {"windows": auto},
    )
    run = Run.start(plan)
    list_stage_samples.fn(run.url, 0)
    for asking in (lambda: freeze_windows.fn(run.url, 0), lambda: estimate_run(plan)):
        with pytest.raises(PlanError, match=sentence):
            asking()
    assert not run.folder.stage(0).windows.committed


def test_a_stage_whose_windows_are_not_settled_is_not_trained(folder: Path) -> None:
    run = Run.start(plan_of(folder, "unsettled", STAGE, STAGE | {"windows": AUTO}))
    for task in (list_stage_samples.fn, freeze_windows.fn):
        task(run.url, 0)
    order = BatchSchedule(run.plan, 1, 140)
    with pytest.raises(
        PlanError,
        match="windows of stage 1 are taken from previous, which happens as the stage begins",
    ):
        order.windows()
    with pytest.raises(PlanError, match=r"stage 0 of .*, which is not scored yet"):
        freeze_windows.fn(run.url, 1)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        ((7, 0.4), "stage 7 of .* is not scored; scored are 0, 1, 2"),
        ((0, 0.0), "the budget is 0; give a share"),
    ],
)
def test_suggestions_that_cannot_be(whole: Run, ask: tuple[int, float], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        suggest_windows.fn(whole.url, *ask)
