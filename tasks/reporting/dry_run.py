"""The estimate of `secateur plan`: what a plan would do and cost. Nothing is trained or written."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.influence.bindings import Bindings
from secateur.influence.coordinate_basis import share_coefficients
from secateur.storage.shard_listing import list_shards
from secateur.storage.shards import expand_shard_urls
from secateur.tasks.analysis.retraining import expected_audit_cost
from secateur.tasks.analysis.windows import preview_windows
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import (
    damaged_shard_handler,
    list_target_samples,
    read_stage_samples,
)
from secateur.tasks.plan import CoordinateBasisConfig, Plan
from secateur.tasks.results.training_results import check_replayable
from secateur.tasks.run import Run
from secateur.tasks.training.optimizers import plan_update_rule

# The time of scoring one sample in online selection, as a multiple of the time of training on one
# sample. It was measured by benchmarks/selection.py.
SELECTION_COST = 0.6
INDEX_BYTES = {"flat": 4, "fp16": 2, "sq8": 1}
RECORD_BYTES = 56  # of a ledger record, besides its coefficients


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


class StageEstimate(BaseModel):
    """One stage's expected size, with its windows in steps.

    Samples of later stages follow from the fractions that the policies keep, if they have one.
    """

    stage: int
    samples: int
    steps: int
    windows: list[tuple[int, int]]
    records: int
    ledger_bytes: int
    embedding_bytes: int
    index_bytes: int
    checkpoint_bytes: int


class RunEstimate(BaseModel):
    """What a plan would do.

    Attributes:
        blocks: coefficients per block.
        uncaptured: parameters that are left out, with their sizes.
        numbers: coefficients over all blocks.
        automatic: where the windows of a stage are taken from, in a sentence.
        selections: online selection by stage, for the stages that select.
        audits: cost of each stage's audit, in trainings of the stage.
        trials: steps of each stage's trial.
        disk_bytes: the largest size of all stages' outputs together.
        memory_bytes: of embedding one segment, and of the model with its training state.
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
    trials: dict[int, int]
    disk_bytes: int
    memory_bytes: int


def estimate_run(plan: Plan) -> RunEstimate:
    """Estimate a run from the headers in its shards and from its model.

    Raises:
        StorageError, SecateurError, PlanError: whatever would stop the run when it starts.
    """
    run = Run.of_plan(plan)
    model = run.model()
    run.task()  # raises if the plan's task cannot be made
    bindings = run.bindings(model)
    blocks = _coefficients_per_block(plan, bindings)
    width = sum(blocks.values())
    parameters = sum(p.numel() for p in model.parameters())
    targets = {name: len(list_target_samples(run, name)) for name in plan.targets}
    plan, stages, automatic = _estimate_stages(plan, width, parameters)
    audits = {
        stage.stage: expected_audit_cost(plan, BatchSchedule(plan, stage.stage, stage.samples))
        for stage in stages
        if plan.audits(stage.stage)
    }
    selections = {stage.stage: _estimate_selection(plan, stage, targets) for stage in stages}
    return RunEstimate(
        run=run.url,
        blocks=blocks,
        uncaptured=bindings.uncaptured,
        parameters=parameters,
        numbers=width,
        targets=targets,
        stages=stages,
        automatic=automatic,
        selections={stage: one for stage, one in selections.items() if one.steps},
        audits=audits,
        trials=_trial_steps(plan),
        disk_bytes=sum(map(_stage_bytes, stages)),
        memory_bytes=_memory_bytes(plan, blocks, parameters),
    )


def estimate_audit_cost(run: Run, stage: int, removals: int | None = None) -> float:
    """Return the expected cost of auditing a trained stage, in trainings of the stage."""
    check_replayable(run, stage)
    schedule = BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage)))
    return expected_audit_cost(run.plan, schedule, removals)


def _estimate_stages(
    plan: Plan, width: int, parameters: int
) -> tuple[Plan, list[StageEstimate], dict[int, str]]:
    """The plan with windows as far as they are known, its stages, and where windows come from."""
    urls = expand_shard_urls(plan.data.shards)
    samples = len(list_shards(urls, damaged_shard_handler(plan.data, [])))
    stages = []
    automatic = {}
    for number, stage in enumerate(plan.stages):
        plan, sentence = preview_windows(plan, number, samples)
        if sentence:
            automatic[number] = sentence
        stages.append(_estimate_stage(plan, number, samples, width, parameters))
        if stage.prune:
            fraction = stage.prune.keep_fraction
            samples = round(samples * (1.0 if fraction is None else fraction))
    return plan, stages, automatic


def _estimate_stage(
    plan: Plan, number: int, samples: int, width: int, parameters: int
) -> StageEstimate:
    schedule = BatchSchedule(plan, number, samples)
    itemsize = _itemsize(plan)
    windows = schedule.windows()
    selected_steps = sum(len(window) for window in windows)
    recorded_steps = selected_steps + (schedule.steps - selected_steps) // schedule.stage.stride
    batch = min(schedule.stage.batch_size, samples)
    state = plan_update_rule(plan.optimizer).state_tensors
    # Embeddings keep the optimizer's slots only if its state crosses the stage's end.
    slots = state if plan.optimizer.at_stage == "carry" else 1
    kept = min(width * slots, plan.components or width * slots)
    checkpoints = -(-schedule.steps // plan.segment_steps)
    return StageEstimate(
        stage=number,
        samples=samples,
        steps=schedule.steps,
        windows=[(window.start, window.stop) for window in windows],
        records=selected_steps * batch,
        ledger_bytes=recorded_steps * batch * (width * itemsize + RECORD_BYTES),
        embedding_bytes=selected_steps * batch * kept * itemsize,
        index_bytes=selected_steps * batch * kept * INDEX_BYTES[plan.index],
        checkpoint_bytes=checkpoints * parameters * state * itemsize,
    )


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


def _coefficients_per_block(plan: Plan, bindings: Bindings) -> dict[str, int]:
    config = plan.basis_config
    blocks = bindings.blocks
    if isinstance(config, CoordinateBasisConfig):
        shares = share_coefficients([block.size for block in blocks], config.numbers)
        return {block.name: share for block, share in zip(blocks, shares, strict=True)}
    rank = config.rank
    return {block.name: min(rank, block.rows) * min(rank, block.cols) for block in blocks}


def _trial_steps(plan: Plan) -> dict[int, int]:
    trial = plan.trust.trial
    if trial is None:
        return {}
    pruned = [number for number, stage in enumerate(plan.stages) if stage.prune]
    return dict.fromkeys(pruned, trial.steps * (1 + trial.draws))


def _stage_bytes(stage: StageEstimate) -> int:
    # Embeddings count twice, because each segment's own are on disk until the stage's are composed.
    return (
        stage.ledger_bytes + 2 * stage.embedding_bytes + stage.index_bytes + stage.checkpoint_bytes
    )


def _memory_bytes(plan: Plan, blocks: dict[str, int], parameters: int) -> int:
    """The memory of embedding one segment, and of the model with its training state."""
    width = sum(blocks.values())
    coupled = max(blocks.values()) if plan.curvature.coupling == "block" else width
    batch = max(stage.batch_size for stage in plan.stages)
    state = plan_update_rule(plan.optimizer).state_tensors
    records = plan.segment_steps * batch * width * (1 + state)
    transitions = 3 * (state * coupled) ** 2
    return (records + transitions + 4 * parameters) * _itemsize(plan)


def _itemsize(plan: Plan) -> int:
    return 8 if plan.number_type == "float64" else 4
