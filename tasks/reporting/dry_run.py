"""Room `tasks`: what a plan would do and cost, with nothing trained."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.influence.basis_fitting import share_coefficients
from secateur.influence.bindings import Bindings
from secateur.storage.shards import expand_shard_urls, list_shards
from secateur.tasks.analysis.audit import is_audited
from secateur.tasks.analysis.retraining import expected_audit_cost
from secateur.tasks.analysis.windows import preview_windows
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import (
    damaged_shard_handler,
    list_target_samples,
    read_stage_samples,
    scoring_rows,
)
from secateur.tasks.plan import CoordinateBasisConfig, Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.optimizer import plan_update_rule
from secateur.tasks.training.train import check_replayable

JUDGING_COST = (
    0.6  # of a sample in online selection, in trainings of one; see benchmarks/selection.py
)


class SelectionEstimate(BaseModel):
    """Online selection in a stage: the steps that select, the samples judged in them (candidates and target's), and what that
    costs in trainings of the stage."""

    steps: int
    judged: int
    cost: float


class StageEstimate(BaseModel):
    """One stage's expected size, and its windows in steps; samples of later stages follow from the policies' fractions where they have one."""

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
    """What a plan would do; `audits` in trainings of their stage, `trials` in steps; `automatic` says where a stage's windows
    are taken from."""

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
    """Reads the shards' headers, builds the model, and reckons; nothing is written.

    Raises:
        StorageError, SecateurError, PlanError: what would stop the run at its start.
    """
    run = Run.of(plan)
    model, _ = run.model(), run.task()
    bindings = run.bindings(model)
    blocks = _numbers(plan, bindings)
    samples = len(
        list_shards(expand_shard_urls(plan.data.shards), damaged_shard_handler(plan.data, []))
    )
    slots = (
        len(plan_update_rule(plan.optimizer).slots) + 1 if plan.optimizer.at_stage == "carry" else 1
    )
    parameters = sum(p.numel() for p in model.parameters())
    stages: list[StageEstimate] = []
    automatic: dict[int, str] = {}
    for number, stage in enumerate(plan.stages):
        plan, automatic[number] = preview_windows(plan, number, samples)
        stages.append(_stage(plan, number, samples, sum(blocks.values()), slots, parameters))
        samples = round(samples * getattr(stage.prune, "keep", 1.0)) if stage.prune else samples
    targets = {name: len(list_target_samples(run, name)) for name in plan.targets}
    trial = plan.trust.trial
    itemsize = 4 if plan.dtype == "float32" else 8
    widest = max(blocks.values()) if plan.curvature.coupling == "block" else sum(blocks.values())
    batch = max(stage.batch_size for stage in plan.stages)
    inner = len(plan_update_rule(plan.optimizer).slots) + 1
    walking = (
        plan.segment_steps * batch * sum(blocks.values()) * (1 + inner) + 3 * (inner * widest) ** 2
    )
    return RunEstimate(
        run=run.url,
        blocks=blocks,
        uncaptured=bindings.uncaptured,
        parameters=parameters,
        numbers=sum(blocks.values()),
        audits={
            s.stage: expected_audit_cost(plan, BatchSchedule(plan, s.stage, s.samples))
            for s in stages
            if is_audited(plan, s.stage)
        },
        trials={
            n: trial.steps * (1 + trial.draws)
            for n, stage in enumerate(plan.stages)
            if trial and stage.prune
        },
        targets=targets,
        stages=stages,
        automatic={number: said for number, said in automatic.items() if said},
        selections={
            s.stage: found for s in stages if (found := _selection(plan, s, targets)).steps
        },
        disk_bytes=sum(
            s.ledger_bytes + 2 * s.embedding_bytes + s.index_bytes + s.checkpoint_bytes
            for s in stages
        ),
        memory_bytes=(walking + 4 * parameters) * itemsize,
    )


def estimate_audit_cost(run_url: str, stage: int, removals: int | None = None) -> float:
    """What an audit of a trained stage will cost, in trainings of the stage."""
    run = Run.open(run_url)
    check_replayable(run, stage)
    return expected_audit_cost(
        run.plan, BatchSchedule(run.plan, stage, len(read_stage_samples(run, stage))), removals
    )


def _stage(
    plan: Plan, number: int, samples: int, width: int, slots: int, parameters: int
) -> StageEstimate:
    order, itemsize = BatchSchedule(plan, number, samples), 4 if plan.dtype == "float32" else 8
    inside = sum(len(window) for window in order.windows())
    recorded = inside + (order.steps - inside) // order.stage.stride
    batch = min(order.stage.batch_size, samples)
    kept = min(width * slots, plan.components or width * slots)
    embeddings = inside * batch * kept * itemsize
    state = 1 + len(plan_update_rule(plan.optimizer).slots)
    return StageEstimate(
        stage=number,
        samples=samples,
        steps=order.steps,
        windows=[(window.start, window.stop) for window in order.windows()],
        records=inside * batch,
        ledger_bytes=recorded * batch * (width * itemsize + 56),
        embedding_bytes=embeddings,
        index_bytes=inside * batch * kept * {"flat": 4, "fp16": 2, "sq8": 1}[plan.index],
        checkpoint_bytes=-(-order.steps // plan.segment_steps) * parameters * state * itemsize,
    )


def _selection(plan: Plan, stage: StageEstimate, targets: dict[str, int]) -> SelectionEstimate:
    order, steps, judged = BatchSchedule(plan, stage.stage, stage.samples), 0, 0
    for window, spec in zip(order.windows(), order.stage.given, strict=True):
        if spec.select:
            steps += len(window)
            name = spec.select.target or plan.target
            asked = spec.select.candidates * order.stage.batch_size
            asked += min(spec.select.samples, len(scoring_rows(plan, name, targets[name])))
            judged += asked * len(window) if spec.select.method != "random" else 0
    cost = JUDGING_COST * judged / (stage.steps * min(order.stage.batch_size, stage.samples))
    return SelectionEstimate(steps=steps, judged=judged, cost=cost)


def _numbers(plan: Plan, bindings: Bindings) -> dict[str, int]:
    """Numbers a block in the plan's basis."""
    spec = plan.numbers
    if isinstance(spec, CoordinateBasisConfig):
        found = share_coefficients([block.size for block in bindings.blocks], spec.numbers)
        return {block.name: share for block, share in zip(bindings.blocks, found, strict=True)}
    return {b.name: min(spec.rank, b.rows) * min(spec.rank, b.cols) for b in bindings.blocks}
