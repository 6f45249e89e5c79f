"""Windows from profiles: how the budget is allocated, freezing, and refused plans."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PlanError
from secateur.tasks.analysis.allocation import allocate_windows
from secateur.tasks.analysis.windows import WindowSuggestion, freeze_windows, suggest_windows
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.plan import Plan, SelectionConfig, WindowConfig
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.results.profile_results import Phase, Phases
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from tests.tasks.small import curate_small, make_data, small_plan

STAGE = {"steps": 20, "batch_size": 20}
AUTO = {"auto": "previous", "budget": 0.3}


def make_phases(*pieces: tuple[str, int, float]) -> Phases:
    """Phases from the name, the length and the level of each piece."""
    phases = []
    start = 0
    for name, length, level in pieces:
        values = {"name": name, "start": start, "stop": start + length, "level": level}
        phases.append(Phase.model_validate(values))
        start += length
    steps = start or 100
    return Phases(steps=steps, recorded=steps, phases=phases, boundaries=[], support=1.0)


PUBLISHED = make_phases(
    ("warm-up", 10, 100.0), ("basin", 60, 1.0), ("ascent", 15, 4.0), ("ascent", 15, 14.0)
)


def test_the_budget_is_spent_where_influence_is_largest() -> None:
    assert allocate_windows(PUBLISHED, 0.05, 100) == [range(0, 5)]
    assert allocate_windows(PUBLISHED, 0.2, 100) == [range(0, 10), range(90, 100)]
    assert allocate_windows(PUBLISHED, 0.4, 100) == [range(0, 10), range(70, 100)]
    assert allocate_windows(PUBLISHED, 0.9, 100) == [range(0, 10), range(70, 100)]
    assert allocate_windows(PUBLISHED, 0.3, 50) == [range(0, 5), range(40, 50)]
    assert allocate_windows(make_phases(), 0.4, 100) == [range(60, 100)]


NAMED = st.tuples(
    st.sampled_from(["warm-up", "basin", "ascent"]), st.integers(1, 50), st.floats(0.1, 100)
)


@given(st.lists(NAMED, max_size=6), st.floats(0.01, 1), st.integers(6, 300))
def test_windows_are_disjoint_and_within_stage_and_budget(
    pieces: list[tuple[str, int, float]], budget: float, steps: int
) -> None:
    order = {"warm-up": 0, "basin": 1, "ascent": 2}
    found = allocate_windows(
        make_phases(*sorted(pieces, key=lambda piece: order[piece[0]])), budget, steps
    )
    assert found
    assert sum(map(len, found)) <= max(1, budget * steps)
    places = [place for window in found for place in window]
    assert places == sorted(set(places))
    assert set(places) <= set(range(steps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    make_data(folder)
    return folder


def plan_of(folder: Path, name: str, *stages: dict[str, Any]) -> Plan:
    return small_plan(folder, run=name, stages=list(stages))


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """A run of three stages: the second and third take the windows that the first suggests."""
    select = {"method": "random", "candidates": 2}
    later = (
        STAGE | {"steps": 10, "windows": AUTO | {"select": select}},
        STAGE | {"steps": 10, "windows": AUTO},
    )
    return curate_small(plan_of(folder, "whole", STAGE, *later))


def test_later_stages_use_the_nearest_stage_that_is_recorded_in_full(run: Run) -> None:
    (suggestion,) = suggest_windows(run, 0, 0.3)
    expected = [
        WindowConfig(start=r.start, stop=r.stop, unit="steps")
        for r in allocate_windows(suggestion.phases, 0.3, 10)
    ]
    second, third = (Run.open(run.url).plan.stages[n] for n in (1, 2))
    assert third.windows == expected
    assert second.listed_windows == [
        w.model_copy(update={"select": SelectionConfig(method="random", candidates=2)})
        for w in expected
    ]
    inside = {step for w in expected for step in range(int(w.start), int(w.stop))}
    assert sum(w.stop - w.start for w in expected) == len(inside) <= 3
    assert run.folder.stage(2).windows.manifest.facts["source"] == f"stage 0 of {run.url}"


def test_suggestions_give_their_reason(run: Run) -> None:
    found: list[WindowSuggestion] = suggest_windows(run, budget=0.5)
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


def test_frozen_windows_stay_after_their_source_is_removed(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(f"{folder}/runs/source")
    shutil.copytree(run.url, source)
    plan = plan_of(folder, "taker", STAGE | {"windows": {"auto": str(source), "budget": 0.3}})
    preview = estimate_run(plan)
    taker = Run.start(plan)
    list_stage_samples(taker, 0)
    windows = freeze_windows(taker, 0)
    take_step = TrainingLoop.step

    def interrupt(loop: TrainingLoop, number: int, recording: object = None) -> object:
        if number == 8:
            raise KeyboardInterrupt
        return take_step(loop, number, recording)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingLoop, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        curate_small(plan)
    monkeypatch.undo()
    shutil.rmtree(source)
    assert curate_small(plan).url == taker.url
    again = Run.open(taker.url)
    assert freeze_windows(again, 0) == windows
    schedule = BatchSchedule(again.plan, 0, 140)
    assert preview.stages[0].windows == [(w.start, w.stop) for w in schedule.windows()]
    assert f"taken from stage 0 of {source}" in preview.automatic[0]
    assert estimate_run(plan).automatic[0] == f"frozen, taken from stage 0 of {source}"
    with pytest.raises(PlanError, match=r"holds a run of another plan .they differ in stages"):
        Run.start(plan_of(folder, "taker", STAGE))


def test_the_dry_run_assumes_the_last_steps_for_unknown_windows(folder: Path) -> None:
    found = estimate_run(plan_of(folder, "dry", STAGE, STAGE | {"windows": AUTO}))
    assert found.stages[1].windows == [(14, 20)]
    assert (
        "to be taken from stage 0 when the stage begins; the last steps stand in for them here"
        in found.automatic[1]
    )
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
            "stage 1 takes .* no stage before it is recorded in full",
        ),
        ([STAGE, STAGE | {"windows": AUTO | {"stage": 0}}], "leave it out if `auto` is `previous`"),
        ([STAGE, STAGE | {"windows": AUTO | {"budget": 1.5}}], r"windows\.auto\.budget"),
        ([STAGE, STAGE | {"windows": {"auto": ""}}], r"windows\.auto\.auto"),
        (
            [STAGE, STAGE | {"windows": AUTO | {"select": {"target": "none"}}}],
            "select.target none is none of the targets",
        ),
        ([STAGE, STAGE | {"windows": []}], "at least 1 item"),
    ],
)
def test_plans_with_impossible_windows_are_refused(
    folder: Path, stages: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan_of(folder, "refused", *stages)


def test_several_windows_may_record_a_stage_in_full(folder: Path) -> None:
    halves = [{"start": 0.5, "stop": 1.0}, {"start": 0.0, "stop": 0.5}]
    steps = [{"start": 0, "stop": 7, "unit": "steps"}, {"start": 7, "stop": 20, "unit": "steps"}]
    stages = plan_of(
        folder, "any", *(STAGE | {"windows": w} for w in (halves, steps, steps[:1])), STAGE
    ).stages
    assert [stage.is_recorded_in_full for stage in stages] == [True, True, False, True]


@pytest.mark.parametrize(
    ("auto", "sentence"),
    [
        ({"auto": "nowhere"}, "nowhere holds no run"),
        (
            {"auto": "RUN", "stage": 7},
            "stage 1 takes its windows from stage 7 of .*, whose last stage is 2",
        ),
        (
            {"auto": "RUN"},
            "from stage 1 of .*, which was recorded in 3 of 10 steps only; "
            "name a stage that was recorded in full",
        ),
        ({"auto": "EMPTY", "stage": 0}, "from stage 0 of .*, which is not scored yet"),
    ],
)
def test_an_earlier_run_without_windows_is_named_at_the_start(
    folder: Path, run: Run, auto: dict[str, Any], sentence: str
) -> None:
    names = {"RUN": run.url, "EMPTY": Run.start(plan_of(folder, "empty", STAGE)).url}
    auto = auto | {"auto": names.get(auto["auto"], auto["auto"])}
    plan = plan_of(
        folder,
        f"at-{auto['auto'].rsplit('/')[-1]}-{auto.get('stage')}",
        STAGE,
        STAGE | {"windows": auto},
    )
    taker = Run.start(plan)
    list_stage_samples(taker, 0)
    with pytest.raises(PlanError, match=sentence):
        freeze_windows(taker, 0)
    with pytest.raises(PlanError, match=sentence):
        estimate_run(plan)
    assert not taker.folder.stage(0).windows.committed


def test_a_stage_whose_windows_are_not_frozen_is_not_trained(folder: Path) -> None:
    run = Run.start(plan_of(folder, "unfrozen", STAGE, STAGE | {"windows": AUTO}))
    list_stage_samples(run, 0)
    freeze_windows(run, 0)
    schedule = BatchSchedule(run.plan, 1, 140)
    with pytest.raises(
        PlanError,
        match="windows of stage 1 are taken from previous when the stage begins; "
        "`secateur run` does that",
    ):
        schedule.windows()
    with pytest.raises(PlanError, match=r"stage 0 of .*, which is not scored yet"):
        freeze_windows(run, 1)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        ((7, 0.4), "stage 7 of .* is not scored; the scored stages are 0, 1, 2"),
        ((0, 0.0), "the budget is 0; give a share"),
    ],
)
def test_impossible_suggestions_are_refused(
    run: Run, ask: tuple[int, float], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        suggest_windows(run, *ask)
