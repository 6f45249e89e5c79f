"""Windows from an influence profile: suggested to a user, or frozen when a stage begins."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from secateur.errors import PlanError
from secateur.storage.attempt import Attempt
from secateur.tasks.analysis.allocation import allocate_windows, describe_phases
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan import PREVIOUS, AutoWindowsConfig, Plan, WindowConfig
from secateur.tasks.results.profile_results import PROFILE_PLOT, Phases, read_phases
from secateur.tasks.run import Run


class WindowSuggestion(BaseModel):
    """The windows that a stage's profile suggests for a similar stage.

    Attributes:
        windows: in fractions of the stage's steps.
        share: of the steps in these windows.
        sentence: the reason for the suggestion.
        picture: path or URL of the profile's plot.
    """

    stage: int
    target: str
    phases: Phases
    windows: list[WindowConfig]
    share: float
    sentence: str
    picture: str


def suggest_windows(
    run: Run, stage: int | None = None, budget: float = 0.4
) -> list[WindowSuggestion]:
    """Return the windows that the profiles of a run's scored stages suggest.

    Args:
        stage: one stage only.
        budget: largest share of a stage's steps in its windows.

    Raises:
        PlanError: the budget is not a share, or no stage is scored.
    """
    if not 0 < budget <= 1:
        raise PlanError(
            f"the budget is {budget:g}; give a share of the steps, above 0 and at most 1"
        )
    stages = [n for n in range(len(run.plan.stages)) if run.folder.stage(n).scores.committed]
    if not stages:
        raise PlanError(f"{run.url} has no scored stage yet; `secateur run` its plan first")
    if stage is not None and stage not in stages:
        scored = ", ".join(map(str, stages))
        raise PlanError(f"stage {stage} of {run.url} is not scored; the scored stages are {scored}")
    return [_suggestion(run, number, budget) for number in stages if stage in (None, number)]


def freeze_windows(run: Run, stage: int) -> list[dict[str, Any]]:
    """Store the windows that a stage takes from a profile, so that they never change afterwards.

    When the first stage begins, the earlier runs that later stages name are checked too.

    Returns:
        The windows, in steps of the stage. None if the plan lists them.

    Raises:
        PlanError: the profile is missing, or was not recorded in full.
    """
    if stage == 0:
        _check_named_runs(run)
    auto = run.plan.stages[stage].auto_windows
    output = run.folder.stage(stage).windows
    if auto:
        phases, source = _profile_source(run.plan, run, stage, auto)
        steps = BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage))).steps
        windows = [
            {"start": window.start, "stop": window.stop, "unit": "steps"}
            for window in allocate_windows(phases, auto.budget, steps)
        ]

        def write(attempt: Attempt) -> None:
            facts = phases.model_dump(mode="json")
            attempt.facts.update(windows=windows, source=source, budget=auto.budget, phases=facts)

        output.write_once("windows", {}, write)
    return list(output.manifest.facts["windows"]) if output.committed else []


def preview_windows(plan: Plan, stage: int, samples: int) -> tuple[Plan, str]:
    """Return the plan with a stage's automatic windows as far as they are known, and a sentence.

    If the source stage has not run yet, the last steps that the budget allows stand in for them.

    Raises:
        PlanError: an earlier run that the plan names cannot give any.
    """
    auto = plan.stages[stage].auto_windows
    if auto is None:
        return plan, ""
    run = Run.of_plan(plan)
    frozen = run.folder.stage(stage).windows
    steps = BatchSchedule(plan, stage, samples).steps
    if frozen.committed:
        facts = frozen.manifest.facts
        ranges = [range(window["start"], window["stop"]) for window in facts["windows"]]
        sentence = f"frozen, taken from {facts['source']}"
    elif auto.auto == PREVIOUS:
        ranges = [range(steps - max(1, int(auto.budget * steps)), steps)]
        sentence = (
            f"to be taken from stage {plan.profiled_before(stage)} when the stage begins; the last "
            f"steps stand in for them here"
        )
    else:
        phases, source = _profile_source(plan, run, stage, auto)
        ranges = allocate_windows(phases, auto.budget, steps)
        sentence = f"taken from {source} ({describe_phases(phases)})"
    windows = [
        WindowConfig(start=window.start, stop=window.stop, unit="steps", select=auto.select)
        for window in ranges
    ]
    stages = list(plan.stages)
    stages[stage] = stages[stage].model_copy(update={"windows": windows})
    return plan.model_copy(update={"stages": stages}), sentence


def _suggestion(run: Run, stage: int, budget: float) -> WindowSuggestion:
    """A stage's suggestion. Its profile is written if it is missing."""
    _write_profile(run, stage)
    phases = read_phases(run, stage, run.plan.pruning_target)
    ranges = allocate_windows(phases, budget, phases.steps) if phases.is_complete else []
    windows = []
    for steps in ranges:
        start = round(steps.start / phases.steps, 6)
        windows.append(WindowConfig(start=start, stop=round(steps.stop / phases.steps, 6)))
    return WindowSuggestion(
        stage=stage,
        target=run.plan.pruning_target,
        phases=phases,
        windows=windows,
        share=sum(window.stop - window.start for window in windows),
        sentence=describe_phases(phases),
        picture=run.folder.stage(stage).profile.url(PROFILE_PLOT),
    )


def _check_named_runs(run: Run) -> None:
    """Check that the earlier runs named by later stages can give windows."""
    for number, stage in enumerate(run.plan.stages[1:], 1):
        if stage.auto_windows and stage.auto_windows.auto != PREVIOUS:
            _profile_source(run.plan, run, number, stage.auto_windows)


def _profile_source(
    plan: Plan, run: Run, stage: int, auto: AutoWindowsConfig
) -> tuple[Phases, str]:
    """The phases that a stage's windows are taken from, and the stage that has them.

    Raises:
        PlanError: they are missing, or that stage was not recorded in full.
    """
    if auto.auto == PREVIOUS:
        source = run
        number = plan.profiled_before(stage)
    else:
        source = Run.open(auto.auto)
        number = stage if auto.stage is None else auto.stage
    where = f"stage {number} of {source.url}"
    if number >= len(source.plan.stages):
        raise PlanError(
            f"stage {stage} takes its windows from {where}, whose last stage is "
            f"{len(source.plan.stages) - 1}; name one with "
            f"`windows: {{auto: {auto.auto}, stage: 0}}`"
        )
    if not source.folder.stage(number).scores.committed:
        raise PlanError(
            f"stage {stage} takes its windows from {where}, which is not scored yet; run that first"
        )
    _write_profile(source, number)
    phases = read_phases(source, number, source.plan.pruning_target)
    if not phases.is_complete:
        raise PlanError(
            f"stage {stage} takes its windows from {where}, which was recorded in "
            f"{phases.recorded} of {phases.steps} steps only; name a stage that was recorded in "
            f"full"
        )
    return phases, where


def _write_profile(run: Run, stage: int) -> None:
    # Imported here, because it imports matplotlib and ruptures, which take seconds, and a dry run
    # of a plan without automatic windows needs neither.
    from secateur.tasks.analysis.influence_profile import write_profile

    write_profile(run, stage)
