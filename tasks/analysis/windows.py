"""Room `tasks`: windows from an influence profile: suggested to a user, and settled as a stage of the plan begins."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from secateur.errors import PlanError
from secateur.tasks.analysis.influence_profile import PICTURE, read_phases, write_profile
from secateur.tasks.analysis.phases import Phases
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.plan import PREVIOUS, AutoWindowsConfig, Plan, WindowConfig
from secateur.tasks.run.run import Run


class WindowSuggestion(BaseModel):
    """The windows that a stage's profile suggests for a stage like it.

    Attributes:
        windows: in fractions of the stage's steps.
        share: of the steps, that they hold.
        sentence: what the suggestion rests on.
        picture: path or URL of the profile's plot.
    """

    stage: int
    target: str
    phases: Phases
    windows: list[WindowConfig]
    share: float
    sentence: str
    picture: str


@pipeline_task("suggest windows")
def suggest_windows(
    run_url: str, stage: int | None = None, budget: float = 0.4
) -> list[WindowSuggestion]:
    """The windows that the profiles of a run's scored stages, or one of them, suggest for the target pruned for.

    Args:
        budget: share of a stage's steps that its windows may hold at most.

    Raises:
        PlanError: the budget is no share, or no stage is scored.
    """
    if not 0 < budget <= 1:
        raise PlanError(
            f"the budget is {budget:g}; give a share of the steps, above 0 and at most 1"
        )
    run = Run.open(run_url)
    stages = [n for n in range(len(run.plan.stages)) if run.folder.stage(n).scores.committed]
    if not stages:
        raise PlanError(f"{run_url} has no scored stage yet; `secateur run` its plan first")
    if stage is not None and stage not in stages:
        raise PlanError(
            f"stage {stage} of {run_url} is not scored; scored are {', '.join(map(str, stages))}"
        )
    return [_suggestion(run, number, budget) for number in stages if stage in (None, number)]


@pipeline_task("settle windows")
def freeze_windows(run_url: str, stage: int) -> list[dict[str, Any]]:
    """Stores the windows that a stage takes from a profile, if it does, so that from now on they do not change.

    As the first stage begins, the earlier runs that later stages name are looked at too.

    Returns:
        The windows, in steps of the stage; none where the plan gives them.

    Raises:
        PlanError: the profile they are to be taken from is not there, or was not recorded whole.
    """
    run = Run.open(run_url)
    for later, spec in enumerate(run.plan.stages[1:] if stage == 0 else [], 1):
        if isinstance(spec.windows, AutoWindowsConfig) and spec.windows.auto != PREVIOUS:
            _source(run.plan, run, later, spec.windows)
    artefact, auto = run.folder.stage(stage).windows, run.plan.stages[stage].windows
    if isinstance(auto, AutoWindowsConfig):
        phases, where = _source(run.plan, run, stage, auto)
        steps = BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage))).steps
        found = [
            {"start": r.start, "stop": r.stop, "unit": "steps"}
            for r in allocate_windows(phases, auto.budget, steps)
        ]
        with artefact.attempt("windows", {}) as attempt:
            attempt.facts.update(
                windows=found,
                source=where,
                budget=auto.budget,
                phases=phases.model_dump(mode="json"),
            )
    return list(artefact.manifest.facts["windows"]) if artefact.committed else []


def allocate_windows(phases: Phases, budget: float, steps: int) -> list[range]:
    """The windows of a stage of `steps` steps: at most `budget` of them, spent where influence a step is largest.

    The pieces of warm-up and ascent are taken in the order of their levels. The one that does not fit keeps the end that
    is away from the basin: a warm-up its first steps, an ascent its last. Nothing is spent on the basin. Where there are no phases any
    steps are as good as others, and the stage's last ones are taken.
    """
    room, last = max(1, int(budget * steps)), len(phases.phases) - 1
    cuts = [0]
    for number, phase in enumerate(
        phases.phases
    ):  # each phase keeps a step, however short the stage
        stop = round(phase.stop * steps / phases.steps)
        cuts.append(min(max(stop, cuts[-1] + 1), steps - last + number))
    found = []
    for phase, start, stop in sorted(
        zip(phases.phases, cuts, cuts[1:], strict=False), key=lambda cut: -cut[0].level
    ):
        length = min(stop - start, room)
        if phase.name != "basin" and length > 0:
            found.append(
                range(start, start + length)
                if phase.name == "warm-up"
                else range(stop - length, stop)
            )
            room -= length
    joined: list[range] = []
    for part in sorted(found, key=lambda r: r.start):
        if joined and joined[-1].stop == part.start:
            part = range(joined.pop().start, part.stop)
        joined.append(part)
    return joined or [range(steps - room, steps)]


def preview_windows(plan: Plan, stage: int, samples: int) -> tuple[Plan, str]:
    """The plan with a stage's automatic windows as far as they are known now, and a sentence about them.

    Windows that a stage of the same run is still to give stand as the last steps that the budget allows.

    Raises:
        PlanError: an earlier run that is named cannot give any.
    """
    auto, run = plan.stages[stage].windows, Run.of(plan)
    if not isinstance(auto, AutoWindowsConfig):
        return plan, ""
    settled, steps = run.folder.stage(stage).windows, BatchSchedule(plan, stage, samples).steps
    if settled.committed:
        ranges = [range(spec["start"], spec["stop"]) for spec in settled.manifest.facts["windows"]]
        said = f"settled from {settled.manifest.facts['source']}"
    elif auto.auto == PREVIOUS:
        ranges = [range(steps - max(1, int(auto.budget * steps)), steps)]
        said = f"to be taken from stage {plan.profiled_before(stage)} as the stage begins; the last steps stand for them here"
    else:
        phases, where = _source(plan, run, stage, auto)
        ranges, said = (
            allocate_windows(phases, auto.budget, steps),
            f"taken from {where} ({_sentence(phases)})",
        )
    windows = [
        WindowConfig(start=r.start, stop=r.stop, unit="steps", select=auto.select) for r in ranges
    ]
    stages = [
        spec.model_copy(update={"windows": windows}) if n == stage else spec
        for n, spec in enumerate(plan.stages)
    ]
    return plan.model_copy(update={"stages": stages}), said


def _suggestion(run: Run, stage: int, budget: float) -> WindowSuggestion:
    """A stage's suggestion, whose profile is made if it is not there."""
    write_profile.fn(run.url, stage)
    phases = read_phases(run, stage, run.plan.target)
    windows = []
    for steps in allocate_windows(phases, budget, phases.steps) if phases.whole else []:
        windows.append(
            WindowConfig(
                start=round(steps.start / phases.steps, 6), stop=round(steps.stop / phases.steps, 6)
            )
        )
    return WindowSuggestion(
        stage=stage,
        target=run.plan.target,
        phases=phases,
        windows=windows,
        share=sum(w.stop - w.start for w in windows),
        sentence=_sentence(phases),
        picture=run.folder.stage(stage).profile.url(PICTURE),
    )


def _sentence(phases: Phases) -> str:
    if not phases.whole:
        return (
            f"recorded in {phases.recorded} of {phases.steps} steps: a profile of windows cannot show a stage's phases; record a "
            f"stage whole (no `windows`) to have some suggested"
        )
    if not phases.phases:
        return "no phases found: the profile is flat, and any steps are as good as others"
    names = dict.fromkeys(phase.name for phase in phases.phases if phase.name != "basin")
    times = [f"{name} {phases.ratio(name):.3g} times the basin" for name in names]
    return f"{' and '.join(times)}; {phases.support:.0%} of resampled profiles show the same phases"


def _source(plan: Plan, run: Run, stage: int, auto: AutoWindowsConfig) -> tuple[Phases, str]:
    """The phases that a stage's windows are taken from, and where those are.

    Raises:
        PlanError: they are not there, or the stage was not recorded whole.
    """
    if auto.auto == PREVIOUS:
        source, number = run, plan.profiled_before(stage)
    else:
        source, number = Run.open(auto.auto), stage if auto.stage is None else auto.stage
    where = f"stage {number} of {source.url}"
    if number >= len(source.plan.stages):
        raise PlanError(
            f"stage {stage} takes its windows from {where}, whose last is {len(source.plan.stages) - 1}; name one with "
            f"`windows: {{auto: {auto.auto}, stage: 0}}`"
        )
    if not source.folder.stage(number).scores.committed:
        raise PlanError(
            f"stage {stage} takes its windows from {where}, which is not scored yet; run that first"
        )
    write_profile.fn(source.url, number)
    phases = read_phases(source, number, source.plan.target)
    if not phases.whole:
        raise PlanError(
            f"stage {stage} takes its windows from {where}, which was recorded in {phases.recorded} of {phases.steps} steps only; "
            f"name a stage that was recorded whole"
        )
    return phases, where
