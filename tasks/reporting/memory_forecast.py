"""The peak memory of each part of a run, foretold from the plan, the samples and the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from pydantic import BaseModel
from torch import Tensor

from secateur.influence.memory_meter import measure_peak, shape_mode
from secateur.influence.moments import LARGEST_SIDE
from secateur.influence.optimizers import UpdateRule
from secateur.storage.shards import Samples
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.pass_memory import PassMemory, coefficients_per_block
from secateur.tasks.training.optimizers import plan_update_rule
from secateur.tasks.training.pass_size import pass_size

INDEX_BYTES = {"flat": 4, "fp16": 2, "sq8": 1}
PRODUCT_ROWS = 4096  # vectors whose products with target gradients are formed at a time
FRAME_BYTES = 150  # of a row of `scores.parquet`, with its key, in memory


class PartMemory(BaseModel):
    """The peak memory of a part of a run, beside Python and its libraries.

    Attributes:
        part: the part's name.
        state: bytes of weights, gradients, the optimizer's slots, and copies of them.
        passes: bytes of passes through the model: activations, logits, captures and gradients.
        records: bytes of what is recorded or computed per sample, step or coefficient.
    """

    part: str
    state: int
    passes: int
    records: int

    @property
    def peak(self) -> int:
        """All of these together."""
        return self.state + self.passes + self.records


class RecordedStage(BaseModel):
    """The size of a stage's record.

    Attributes:
        batch: samples per step.
        micro_batch: samples that pass together.
        segment_steps: steps of a segment.
        segments: number of segments.
        records: recorded uses of the stage.
    """

    batch: int
    micro_batch: int
    segment_steps: int
    segments: int
    records: int


@dataclass(frozen=True)
class Sizes:
    """The sizes that every part is made of, in bytes unless stated otherwise.

    Attributes:
        weights: of parameters and buffers.
        trained: of the trainable parameters.
        largest: of the largest parameter.
        rule: the optimizer's update rule.
        spans: coefficients that are coupled, per span.
        dtype: of parameters and coefficients.
    """

    weights: int
    trained: int
    largest: int
    rule: UpdateRule
    spans: list[int]
    dtype: torch.dtype

    @property
    def item(self) -> int:
        """Of one coefficient or element."""
        return self.dtype.itemsize

    @property
    def slots(self) -> int:
        """Of the optimizer's slots."""
        return (self.rule.state_tensors - 1) * self.trained

    @property
    def width(self) -> int:
        """Coefficients per sample."""
        return sum(self.spans)

    @property
    def transition(self) -> int:
        """Of a segment's transition."""
        return sum((self.rule.state_tensors * span) ** 2 for span in self.spans) * self.item


def forecast_memory(
    plan: Plan,
    passes: PassMemory,
    stages: list[RecordedStage],
    samples: Samples,
    targets: dict[str, Samples],
) -> list[PartMemory]:
    """Return the peak memory of each part, at its largest stage.

    Args:
        stages: the sizes of the stages' records.
        samples: the samples to train on.
        targets: the samples of each target.
    """
    sizes = _measure_sizes(plan, passes)
    largest = max(stages, key=lambda stage: stage.batch * stage.segment_steps)
    batch = max(stage.micro_batch for stage in stages)
    accumulates = any(stage.micro_batch < stage.batch for stage in stages)
    parts = []
    if getattr(plan.basis_config, "method", "pca") == "pca":  # coordinates are fitted too
        one_pass = passes.fit(samples, stages[0].micro_batch)
        parts.append(_fit(plan, sizes, one_pass, passes))
    parts.append(_training(sizes, largest, passes.training(samples, batch, accumulates)))
    parts.append(_embedding(plan, sizes, largest))
    parts.append(_composing(plan, sizes, max(stages, key=lambda stage: stage.records)))
    parts.append(_targets(plan, sizes, passes, targets))
    if plan.estimate == "replay" or any(plan.audits(n) for n in range(len(plan.stages))):
        step = passes.replay(samples, batch)
        start = _replay_start(plan, passes, targets)
        parts.append(
            _replay(sizes, len(targets), step, start, passes.training(samples, batch, False))
        )
    parts.append(_scoring(plan, sizes, largest, stages, targets))
    return parts


def _measure_sizes(plan: Plan, passes: PassMemory) -> Sizes:
    parameters = list(passes.model.parameters())
    blocks = list(coefficients_per_block(plan, passes.bindings).values())
    return Sizes(
        weights=sum(t.nbytes for t in [*parameters, *passes.model.buffers()]),
        trained=sum(p.nbytes for p in parameters if p.requires_grad),
        largest=max(p.nbytes for p in parameters),
        rule=plan_update_rule(plan.optimizer),
        spans=blocks if plan.curvature.coupling == "block" else [sum(blocks)],
        dtype=getattr(torch, plan.dtype),
    )


def _fit(plan: Plan, sizes: Sizes, one_pass: int, passes: PassMemory) -> PartMemory:
    """The passes with the fit's sums; or the eigenvectors of the largest second moment."""
    state = sizes.weights + sizes.slots
    eigenvectors = 0
    if plan.basis_config.kind == "kronecker":
        sides = [n for b in passes.bindings.blocks for n in (b.rows, b.cols)]
        # Two copies, the vectors in two orders, and a workspace of twice the matrix, in float64.
        eigenvectors = 6 * 8 * max(min(side, LARGEST_SIDE) for side in sides) ** 2
    return PartMemory(
        part="fit of the basis",
        state=state,
        passes=max(one_pass, eigenvectors + sizes.trained),
        records=0,
    )


def _training(sizes: Sizes, stage: RecordedStage, one_pass: int) -> PartMemory:
    """The largest of a pass, an update, and the copy of the state for a checkpoint."""
    state = sizes.weights + sizes.slots
    ledger = _ledger(sizes, stage)
    moments = [
        (state, one_pass, ledger),
        # Two temporary tensors of the parameter that is updated.
        (state + sizes.trained + 2 * sizes.largest, 0, ledger),
        # The steps' records are joined.
        (state + sizes.trained, 0, 2 * ledger),
        # The checkpoint is a copy.
        (2 * state + sizes.trained, 0, ledger),
    ]
    held, passes, records = max(moments, key=sum)
    return PartMemory(part="training", state=held, passes=passes, records=records)


def _ledger(sizes: Sizes, stage: RecordedStage) -> int:
    """Of a segment's record, and of the gradient and state of every step if they are needed."""
    rows = stage.batch * stage.segment_steps
    if not sizes.rule.linear:
        rows += stage.segment_steps * (1 + sizes.rule.state_tensors)
    return rows * sizes.width * sizes.item


def _embedding(plan: Plan, sizes: Sizes, stage: RecordedStage) -> PartMemory:
    """A segment's record, Jacobians, effects, and the matrices of the widest span."""
    slots = sizes.rule.state_tensors
    effects = stage.batch * stage.segment_steps * slots * sizes.item
    widest = max(sizes.spans)
    # The record's columns of one span are copied, unless the span is all of them.
    record = _ledger(sizes, stage)
    if len(sizes.spans) > 1:
        record += stage.batch * stage.segment_steps * widest * sizes.item
    matrices = 2 * sizes.transition + 3 * (slots * widest) ** 2 * sizes.item
    records = record + effects * (sizes.width + widest) + matrices + _jacobian(sizes, stage)
    return PartMemory(part="embedding", state=0, passes=0, records=records)


def _jacobian(sizes: Sizes, stage: RecordedStage) -> int:
    return _measure_vjp(sizes.rule, stage.segment_steps * sizes.width, torch.float64) + (
        8 * stage.segment_steps * sizes.width * (1 + sizes.rule.state_tensors) ** 2
    )


def _composing(plan: Plan, sizes: Sizes, stage: RecordedStage) -> PartMemory:
    """All transitions of the stage, one segment's embeddings; or the index with all embeddings."""
    slots = sizes.rule.state_tensors
    kept = slots if plan.optimizer.at_stage == "carry" else 1
    rows = stage.batch * stage.segment_steps
    transitions = (stage.segments + 1) * sizes.transition * kept // slots
    local = rows * sizes.width * sizes.item * (slots + 2 * kept)
    moment = 0
    width = kept * sizes.width
    if plan.components:
        moment = 3 * 8 * width**2 + 8 * rows * width
        width = min(width, plan.components)
    index = stage.records * width * (sizes.item + INDEX_BYTES[plan.index])
    records = max(transitions + sizes.transition + local + moment, index)
    return PartMemory(part="composing and index", state=0, passes=0, records=records)


def _targets(
    plan: Plan, sizes: Sizes, passes: PassMemory, targets: dict[str, Samples]
) -> PartMemory:
    """The largest target: its passes, and the gradients that they return."""
    parts = []
    for samples in targets.values():
        size = pass_size(plan, partial(passes.target, samples), len(samples))
        gradients = 2 * len(samples) * sizes.width * sizes.item
        parts.append(
            PartMemory(
                part="targets",
                state=sizes.weights,
                passes=passes.target(samples, size),
                records=gradients,
            )
        )
    loading = PartMemory(part="targets", state=2 * sizes.weights, passes=0, records=0)
    return max([*parts, loading], key=lambda part: part.peak)


def _replay_start(plan: Plan, passes: PassMemory, targets: dict[str, Samples]) -> int:
    """The largest pass for a target's mean gradient."""
    found = []
    for name, samples in targets.items():
        rows = len(scoring_rows(plan, name, len(samples)))
        size = pass_size(plan, partial(passes.mean_gradient, samples), rows)
        found.append(passes.mean_gradient(samples, size))
    return max(found)


def _replay(sizes: Sizes, targets: int, step: int, start: int, repeat: int) -> PartMemory:
    """The largest of the start, the repeated steps, the check of their end, and the walk back."""
    slots = sizes.rule.state_tensors
    loop = sizes.weights + sizes.slots
    adjoints = targets * slots * sizes.trained
    vector = sizes.trained
    state = loop + vector  # the last step's gradients stay
    moments = [
        # The target's gradient and its sum.
        (loop + vector + adjoints, start),
        # The states of a step, which are joined to vectors and stacked.
        (loop + adjoints + 2 * slots * vector + vector, repeat),
        # The end is compared with its checkpoint.
        (state + adjoints + loop + sizes.weights, 0),
        # The states of a step, their sensitivities, the direction, and the parameters before.
        (state + adjoints + (slots + 1) * vector + (slots + 2) * vector, step),
    ]
    held, passes = max(moments, key=sum)
    return PartMemory(part="replay", state=held, passes=passes, records=0)


def _measure_vjp(rule: UpdateRule, count: int, dtype: torch.dtype) -> int:
    """The bytes of pulling a sensitivity back through one update of so many elements."""

    def run() -> tuple[Tensor, Tensor]:
        return rule.vjp(state, state, gradient, hyper)

    with shape_mode():
        state = torch.empty(rule.state_tensors, count, dtype=dtype)
        gradient = torch.empty(count, dtype=dtype)
        hyper = {name: torch.empty((), dtype=dtype) for name in rule.hyper}
        return measure_peak(run)


def _scoring(
    plan: Plan,
    sizes: Sizes,
    largest: RecordedStage,
    stages: list[RecordedStage],
    targets: dict[str, Samples],
) -> PartMemory:
    """A segment's vectors and products with every target sample in float64, and the frame."""
    rows = largest.batch * largest.segment_steps
    gradients = sum(len(samples) for samples in targets.values())
    largest_target = max(len(samples) for samples in targets.values())
    products = min(rows, PRODUCT_ROWS) * 8 * (3 * largest_target + 2 * sizes.width)
    vectors = 3 * rows * sizes.width * sizes.item
    held = gradients * sizes.width * (sizes.item + 2 * 8)
    frame = 2 * max(stage.records for stage in stages) * (FRAME_BYTES + 8 * len(targets))
    records = vectors + products + held + frame
    return PartMemory(part="scoring", state=0, passes=0, records=records)
