"""The estimate of `secateur plan`: what a plan would do and cost. Nothing is trained or written."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.storage.shard_listing import list_shards
from secateur.storage.shards import Samples, expand_shard_urls
from secateur.tasks.analysis.question_replays import expected_agreement_cost
from secateur.tasks.analysis.retraining import expected_audit_cost
from secateur.tasks.analysis.windows import preview_windows
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import (
    damaged_shard_handler,
    list_target_samples,
    read_stage_samples,
)
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.disk_forecast import StageEstimate, estimate_stage, largest_disk
from secateur.tasks.reporting.forecast_sizes import (
    PartMemory,
    RecordedStage,
    Sizes,
    measure_sizes,
)
from secateur.tasks.reporting.memory_forecast import forecast_memory
from secateur.tasks.reporting.pass_memory import PassMemory, most_coefficients
from secateur.tasks.reporting.replay_memory import replay_disk, replays
from secateur.tasks.results.training_results import check_replayable
from secateur.tasks.run import Run
from secateur.tasks.valuation.drawn_questions import draw_questions

# The time of scoring one sample in online selection, as a multiple of the time of training on one
# sample. It was measured by benchmarks/selection.py.
SELECTION_COST = 0.6


class SelectionEstimate(BaseModel):
    """The size of online selection in a stage.

    Attributes:
        steps: steps that select.
        judged: samples that are scored in them, candidates and target samples.
        cost: the time of scoring, as a multiple of the time of training the stage.
    """

    steps: int
    judged: int
    cost: float


class RunEstimate(BaseModel):
    """What a plan would do.

    Attributes:
        blocks: coefficients per block, at most if they are coordinates.
        uncaptured: parameters that are left out, with their sizes.
        numbers: coefficients over all blocks.
        automatic: where the windows of a stage are taken from, in a sentence.
        selections: online selection by stage, for the stages that select.
        audits: cost of each stage's audit, in trainings of the stage.
        questions: cost of comparing each stage's answers with replay, in trainings of the stage;
            none if the plan asks no questions.
        trials: steps of each stage's trial.
        disk_bytes: the largest size of all stages' outputs together.
        replay_disk_bytes: temporary files of one walk of replay, where `TMPDIR` says.
        launch: how several processes share a step, in a sentence.
        memory: the peak memory of each part of the run.
        extrapolated: why the memory of passes was measured on two samples; None if it was not.
    """

    run: str
    blocks: dict[str, int]
    uncaptured: dict[str, int]
    parameters: int
    numbers: int
    targets: dict[str, int]
    stages: list[StageEstimate]
    automatic: dict[int, str]
    selections: dict[int, SelectionEstimate]
    audits: dict[int, float]
    questions: dict[int, float]
    trials: dict[int, int]
    disk_bytes: int
    replay_disk_bytes: int
    launch: str | None
    memory: list[PartMemory]
    extrapolated: str | None


def estimate_run(plan: Plan) -> RunEstimate:
    """Estimate a run from the headers in its shards and from its model.

    Raises:
        StorageError, SecateurError, PlanError: whatever would stop the run when it starts.
    """
    run = Run.of_plan(plan)
    passes = PassMemory(run)
    sizes = measure_sizes(plan, passes)
    parameters = sum(p.numel() for p in passes.model.parameters())
    target_samples = {name: list_target_samples(run, name) for name in plan.targets}
    targets = {name: len(samples) for name, samples in target_samples.items()}
    draw_questions(run, plan.trust.asked)
    samples = _list_samples(plan)
    plan, stages, automatic = _estimate_stages(plan, len(samples), sizes)
    audits = {
        stage.stage: expected_audit_cost(plan, BatchSchedule(plan, stage.stage, stage.samples))
        for stage in stages
        if plan.audits(stage.stage)
    }
    selections = {stage.stage: _estimate_selection(plan, stage, targets) for stage in stages}
    records = [_recorded_stage(plan, stage) for stage in stages]
    return RunEstimate(
        run=run.url,
        blocks=most_coefficients(plan, passes.bindings),
        uncaptured=passes.bindings.uncaptured,
        parameters=parameters,
        numbers=sizes.width,
        targets=targets,
        stages=stages,
        automatic=automatic,
        selections={stage: one for stage, one in selections.items() if one.steps},
        audits=audits,
        questions=_question_costs(plan),
        trials=_trial_steps(plan),
        disk_bytes=largest_disk(stages),
        replay_disk_bytes=replay_disk(sizes, records) if replays(plan) else 0,
        launch=_describe_launch(plan, records),
        memory=forecast_memory(plan, sizes, passes, records, samples, target_samples),
        extrapolated=passes.extrapolated,
    )


def estimate_audit_cost(
    run: Run, stage: int, removals: int | None = None, questions: int | None = None
) -> float:
    """Return the expected cost of auditing a trained stage, in trainings of the stage.

    Args:
        removals: how many samples are left out, in place of the plan's number.
        questions: how many questions are asked instead, if any.
    """
    check_replayable(run, stage)
    if questions is not None:
        return expected_agreement_cost(questions)
    schedule = BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage)))
    return expected_audit_cost(run.plan, schedule, removals)


def _list_samples(plan: Plan) -> Samples:
    urls = expand_shard_urls(plan.data.shards)
    return Samples(urls, list_shards(urls, damaged_shard_handler(plan.data, [])))


def _estimate_stages(
    plan: Plan, samples: int, sizes: Sizes
) -> tuple[Plan, list[StageEstimate], dict[int, str]]:
    """The plan with windows as far as they are known, its stages, and where windows come from."""
    stages = []
    automatic = {}
    for number, stage in enumerate(plan.stages):
        plan, sentence = preview_windows(plan, number, samples)
        if sentence:
            automatic[number] = sentence
        stages.append(estimate_stage(plan, number, samples, sizes))
        if stage.prune:
            fraction = stage.prune.keep_fraction
            samples = round(samples * (1.0 if fraction is None else fraction))
    return plan, stages, automatic


def _estimate_selection(
    plan: Plan, stage: StageEstimate, targets: dict[str, int]
) -> SelectionEstimate:
    schedule = BatchSchedule(plan, stage.stage, stage.samples)
    steps = 0
    scored = 0
    for window, config in zip(schedule.windows(), schedule.stage.listed_windows, strict=True):
        if config.select is None:
            continue
        steps += len(window)
        if config.select.method == "random":
            continue
        name = config.select.target or plan.pruning_target
        candidates = config.select.candidates * schedule.stage.batch_size
        target_samples = len(scoring_rows(plan, name, targets[name]))
        scored += len(window) * (candidates + min(config.select.samples, target_samples))
    trained = stage.steps * min(schedule.stage.batch_size, stage.samples)
    return SelectionEstimate(steps=steps, judged=scored, cost=SELECTION_COST * scored / trained)


def _question_costs(plan: Plan) -> dict[int, float]:
    if not plan.trust.asked:
        return {}
    return dict.fromkeys(range(len(plan.stages)), expected_agreement_cost(plan.trust.asked))


def _trial_steps(plan: Plan) -> dict[int, int]:
    trial = plan.trust.trial
    if trial is None:
        return {}
    pruned = [number for number, stage in enumerate(plan.stages) if stage.prune]
    return dict.fromkeys(pruned, trial.steps * (1 + trial.draws))


def _recorded_stage(plan: Plan, estimate: StageEstimate) -> RecordedStage:
    stage = plan.stages[estimate.stage]
    batch = min(stage.batch_size, estimate.samples)
    return RecordedStage(
        batch=batch,
        accumulate=stage.accumulate,
        processes=plan.launch.processes,
        segment_steps=min(plan.segment_steps, estimate.steps),
        segments=-(-estimate.steps // plan.segment_steps),
        records=estimate.records,
    )


def _describe_launch(plan: Plan, stages: list[RecordedStage]) -> str | None:
    """How the plan's processes divide a step, or None if there is only one."""
    processes = plan.launch.processes
    if processes == 1:
        return None
    shares = []
    for number, stage in enumerate(stages):
        least = stage.batch // processes
        share = str(least) if stage.share == least else f"{least} or {stage.share}"
        shares.append(f"{share} of the {stage.batch} samples of a step of stage {number}")
    idle = " (some have none, so fewer processes would do)" * any(
        stage.batch < processes for stage in stages
    )
    return f"each of {processes} processes trains on {', '.join(shares)}{idle}"
