"""Embeddings of recorded training, and scores of its samples for any question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.curvature import Curvature, EmpiricalFisher
from secateur.influence.pullback import query_at_stage_end
from secateur.influence.recorder import Recorder
from secateur.influence.recursion import Dynamics, Transition, identity_transition, walk_segment
from secateur.influence.segment import Segment


@dataclass(frozen=True)
class Embeddings:
    """The data value embeddings of a recorded run, one per use of a sample.

    Attributes:
        samples: the sample of each record, as the caller numbered it.
        steps: the step of each record.
        vectors: the predicted effect on the optimizer's state, after the last recorded step, of
            leaving that use of the sample out. The columns are grouped by span, then by slot (theta
            first).
        spans: the coefficients that are coupled.
        transition: from the start of the recorded steps to their end, one matrix per span.
        basis: the basis of the coefficients.
        parameters: the model's captured parameters by name, with their current values.
    """

    samples: Int[Tensor, " records"]
    steps: Int[Tensor, " records"]
    vectors: Float[Tensor, "records width"]
    spans: Sequence[slice]
    transition: Transition
    basis: Basis
    parameters: Mapping[str, nn.Parameter]

    def scores(self, losses: Callable[[], Tensor]) -> Float[Tensor, " records"]:
        """Return the predicted rise of a mean loss if each use of a sample had been left out.

        A positive score means that the sample helped. The prediction is about the model after the
        last recorded step, so ask before it is trained on. No parameter's `.grad` is changed.

        Args:
            losses: runs the forward pass on the samples that the question is about, and returns one
                loss per sample.
        """
        # The gradient of the mean is all that a mean score needs. It costs one ordinary backward
        # pass, and a forward pass that mixes samples is allowed.
        gradients = torch.autograd.grad(
            losses().mean(), list(self.parameters.values()), materialize_grads=True
        )
        named = dict(zip(self.parameters, gradients, strict=True))
        gradient = self.basis.project_tensors(named).cpu()
        slots = self.transition[0].shape[1]
        query = query_at_stage_end(gradient[None], self.spans, slots)
        return self.vectors @ torch.cat(query, 1)[0].to(self.vectors.dtype)


def embed(
    recorder: Recorder,
    curvature: Callable[[Segment, Sequence[slice]], Curvature] = EmpiricalFisher,
    coupled: bool = False,
) -> Embeddings:
    """Return the embeddings of all that was recorded since the last segment was taken.

    The recorder then starts an empty segment. The transition needs memory for the square of the
    coefficients that are coupled, times the square of the optimizer's slots.

    Args:
        recorder: the recorder, after training.
        curvature: a curvature class, such as `EmpiricalFisher` or `NoCurvature`.
        coupled: whether a change in one block is taken to change the gradient of the others. If
            not, every block is computed by itself, which is faster and less exact.

    Raises:
        SecateurError: nothing was recorded, or several processes train the model.
    """
    if recorder.ranks.size > 1:
        raise SecateurError(
            "`embed` works in one process; record into a run with `secateur.Recording`, and ask "
            "that run with `secateur.query`"
        )
    segment = _take_segment(recorder)
    basis = recorder.basis
    spans = [slice(0, basis.size)] if coupled else list(basis.spans)
    dynamics = Dynamics.from_segment(
        segment, recorder.update_rule, curvature(segment, spans), spans
    )
    slots = recorder.update_rule.state_tensors
    end = identity_transition(spans, slots, segment.contributions.dtype)
    vectors, transition = walk_segment(dynamics, end)
    return Embeddings(
        samples=segment.samples[segment.selected],
        steps=segment.steps[segment.selected],
        vectors=torch.cat(vectors, 1),
        spans=spans,
        transition=transition,
        basis=basis,
        parameters=recorder.parameters,
    )


def _take_segment(recorder: Recorder) -> Segment:
    """Return the segment recorded since the last one, or raise SecateurError if it is empty."""
    segment = recorder.take_segment()
    if not bool(segment.selected.any()):
        raise SecateurError(
            "nothing was recorded since the last segment was taken; put each step's forward and "
            "backward pass into a `with recorder.batch(ids)` block and call optimizer.step()"
        )
    return segment
