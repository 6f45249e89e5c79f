"""The memory of embedding, composing, indexing, target gradients and scoring."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from secateur.influence.memory_meter import measure_peak, shape_mode
from secateur.influence.optimizers import UpdateRule
from secateur.storage.shards import Samples
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.forecast_sizes import INDEX_BYTES, PartMemory, RecordedStage, Sizes
from secateur.tasks.reporting.pass_memory import LOCATED, PassMemory
from secateur.tasks.training.pass_size import pass_size
from secateur.tasks.valuation.directions import GRADIENTS
from secateur.tasks.valuation.embed_reduced import group_size

PRODUCT_ROWS = 4096  # vectors whose products with target gradients are formed at a time
FRAME_BYTES = 150  # of a row of `scores.parquet`, with its key, in memory


def forecast_embedding(sizes: Sizes, stage: RecordedStage) -> PartMemory:
    """Return a segment's record, Jacobians, effects, and the matrices of the widest span."""
    if sizes.components:
        return _forecast_reduced(sizes, sizes.components, stage)
    slots = sizes.rule.state_tensors
    effects = stage.batch * stage.segment_steps * slots * sizes.item
    widest = max(sizes.spans)
    # The record's columns of one span are copied, unless the span is all of them.
    record = sizes.ledger(stage, stage.batch)
    if len(sizes.spans) > 1:
        record += stage.batch * stage.segment_steps * widest * sizes.item
    # The transitions to start from and those found, and of the widest span `a` with `a H`, or with
    # the slots that a step moves into others.
    matrices = 2 * sizes.transition + max(2, slots - 1) * slots * widest**2 * sizes.item
    records = record + effects * (sizes.width + widest) + matrices + _jacobian(sizes, stage)
    return PartMemory(part="embedding", state=0, passes=0, records=records)


def _forecast_reduced(sizes: Sizes, components: int, stage: RecordedStage) -> PartMemory:
    """The gradients that directions are found from, or a group that is taken back."""
    gradients = min(stage.records, GRADIENTS * components)
    choosing = (gradients + components) * sizes.width * sizes.item + 3 * 8 * gradients**2
    slots = sizes.rule.state_tensors
    group = min(components, group_size(sizes.width, slots))
    # Before and after a segment with every slot; theta, `a`, `a H` and the directions themselves.
    taken_back = group * sizes.width * (2 * slots + 4) * sizes.item
    effects = 2 * stage.batch * stage.segment_steps * group * sizes.item
    record = sizes.ledger(stage, stage.batch) + _jacobian(sizes, stage)
    records = max(choosing, record + effects + taken_back)
    return PartMemory(part="embedding", state=0, passes=0, records=records)


def _jacobian(sizes: Sizes, stage: RecordedStage) -> int:
    return _measure_vjp(sizes.rule, stage.segment_steps * sizes.width, torch.float64) + (
        8 * stage.segment_steps * sizes.width * (1 + sizes.rule.state_tensors) ** 2
    )


def forecast_composing(plan: Plan, sizes: Sizes, stage: RecordedStage) -> PartMemory:
    """Return all transitions and a segment's embeddings, or the index with all embeddings."""
    slots = sizes.rule.state_tensors
    kept = slots if plan.optimizer.at_stage == "carry" else 1
    rows = stage.batch * stage.segment_steps
    transitions = (stage.segments + 1) * sizes.transition * kept // slots
    local = rows * sizes.width * sizes.item * (slots + 2 * kept)
    composing = transitions + sizes.transition + local
    if sizes.components:
        composing = 2 * max(rows, sizes.width) * sizes.components * sizes.item
    width = sizes.components or kept * sizes.width
    index = stage.records * width * (sizes.item + INDEX_BYTES[plan.index])
    records = max(composing, index)
    return PartMemory(part="composing and index", state=0, passes=0, records=records)


def forecast_targets(
    plan: Plan, sizes: Sizes, passes: PassMemory, targets: dict[str, Samples]
) -> PartMemory:
    """Return the largest target: its passes, its check, and its gradients with their mean."""
    parts = []
    for samples in targets.values():
        size = pass_size(plan, partial(passes.target, samples), len(samples))
        largest = passes.target(samples, max(size, LOCATED))
        gradients = 2 * len(samples) * sizes.width * sizes.item
        parts.append(
            PartMemory(
                part="targets",
                state=sizes.weights,
                # To check the gradients, some samples run alone.
                passes=max(largest, passes.mean_gradient(samples, 1)),
                records=gradients,
            )
        )
        size = pass_size(plan, partial(passes.mean_gradient, samples), len(samples))
        parts.append(
            PartMemory(
                part="targets",
                state=sizes.weights + sizes.trained,  # the gradient so far
                passes=passes.mean_gradient(samples, size),
                records=gradients,
            )
        )
    loading = PartMemory(part="targets", state=2 * sizes.weights, passes=0, records=0)
    return max([*parts, loading], key=lambda part: part.peak)


def forecast_scoring(
    plan: Plan,
    sizes: Sizes,
    largest: RecordedStage,
    stages: list[RecordedStage],
    targets: dict[str, Samples],
) -> PartMemory:
    """Return a segment's vectors, its products with target samples in float64, and the frame."""
    rows = largest.batch * largest.segment_steps
    gradients = sum(len(samples) for samples in targets.values())
    largest_target = max(len(samples) for samples in targets.values())
    products = min(rows, PRODUCT_ROWS) * 8 * (3 * largest_target + 2 * sizes.width)
    vectors = 3 * rows * sizes.width * sizes.item
    held = gradients * sizes.width * (sizes.item + 2 * 8)
    frame = 2 * max(stage.records for stage in stages) * (FRAME_BYTES + 8 * len(targets))
    records = vectors + products + held + frame
    return PartMemory(part="scoring", state=0, passes=0, records=records)


def _measure_vjp(rule: UpdateRule, count: int, dtype: torch.dtype) -> int:
    """The bytes of pulling a sensitivity back through one update of so many elements."""

    def run() -> tuple[Tensor, Tensor]:
        return rule.vjp(state, state, gradient, hyper)

    with shape_mode():
        state = torch.empty(rule.state_tensors, count, dtype=dtype)
        gradient = torch.empty(count, dtype=dtype)
        hyper = {name: torch.empty((), dtype=dtype) for name in rule.hyper}
        return measure_peak(run)
