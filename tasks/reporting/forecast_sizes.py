"""The sizes that the parts of a run are made of, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel

from secateur.influence.optimizers import UpdateRule
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.pass_memory import PassMemory, coefficients_per_block
from secateur.tasks.run import LearningTask
from secateur.tasks.training.optimizers import plan_update_rule

INDEX_BYTES = {"flat": 4, "fp16": 2, "sq8": 1}


class PartMemory(BaseModel):
    """The peak memory of a part of a run, beside Python and its libraries.

    Attributes:
        part: the part's name.
        state: bytes of weights, gradients, the optimizer's slots, and copies of them.
        passes: bytes of passes through the model: activations, logits, captures and gradients.
        records: bytes of what is recorded or computed per sample, step or coefficient.
        processes: how many processes do this part together. The figures are those of the first,
            which takes most.
    """

    part: str
    state: int
    passes: int
    records: int
    processes: int = 1

    @property
    def peak(self) -> int:
        """All of these together."""
        return self.state + self.passes + self.records


class RecordedStage(BaseModel):
    """The size of a stage's record.

    Attributes:
        batch: samples per step.
        accumulate: micro-batches per step.
        processes: processes that train together, each on a part of the batch.
        segment_steps: steps of a segment.
        segments: number of segments.
        records: recorded uses of the stage.
    """

    batch: int
    accumulate: int
    processes: int
    segment_steps: int
    segments: int
    records: int

    @property
    def share(self) -> int:
        """The most samples of a step that one process trains on."""
        return -(-self.batch // self.processes)

    @property
    def micro_batch(self) -> int:
        """The most samples that pass together in training."""
        return -(-self.share // self.accumulate)

    @property
    def whole_micro_batch(self) -> int:
        """The most samples that pass together if one process trains alone, as in the fit."""
        return -(-self.batch // self.accumulate)


@dataclass(frozen=True)
class Sizes:
    """The sizes that every part is made of, in bytes unless stated otherwise.

    Attributes:
        weights: of parameters and buffers.
        trained: of the trainable parameters.
        largest: of the largest parameter.
        rule: the optimizer's update rule.
        spans: coefficients that are coupled, per span.
        components: numbers of an embedding, if it has fewer than there are coefficients.
        dtype: of coefficients.
        task: the learning task, by which a curvature may need gradients of its own.
    """

    weights: int
    trained: int
    largest: int
    rule: UpdateRule
    spans: list[int]
    components: int | None
    dtype: torch.dtype
    task: LearningTask

    @property
    def item(self) -> int:
        """Of one coefficient."""
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
    def coupled(self) -> int:
        """Of one matrix of coefficients by coefficients per span, such as a Hessian."""
        return sum(span**2 for span in self.spans) * self.item

    @property
    def transition(self) -> int:
        """Of a segment's transition."""
        return self.rule.state_tensors**2 * self.coupled

    @property
    def step(self) -> int:
        """Of the gradient and state of a step in the record, if the Jacobian needs them."""
        return 0 if self.rule.linear else (1 + self.rule.state_tensors) * self.width * self.item

    def ledger(self, stage: RecordedStage, samples: int) -> int:
        """Return the size of a segment's record, with so many samples per step."""
        return stage.segment_steps * (samples * self.width * self.item + self.step)


def measure_sizes(plan: Plan, passes: PassMemory) -> Sizes:
    """Return the sizes of a plan's model and record."""
    parameters = list(passes.model.parameters())
    blocks = coefficients_per_block(plan, passes.bindings)
    return Sizes(
        weights=sum(t.nbytes for t in [*parameters, *passes.model.buffers()]),
        trained=sum(p.nbytes for p in parameters if p.requires_grad),
        largest=max(p.nbytes for p in parameters),
        rule=plan_update_rule(plan.optimizer),
        components=plan.components if (plan.components or sum(blocks)) < sum(blocks) else None,
        spans=blocks if plan.coupling == "block" else [sum(blocks)],
        dtype=getattr(torch, plan.number_type),
        task=passes.task,
    )
