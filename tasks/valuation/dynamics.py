"""A recorded segment with the plan's optimizer and curvature, as the recursion needs it."""

from __future__ import annotations

from secateur.influence.recursion import Dynamics
from secateur.influence.segment import Segment
from secateur.storage.ledger import read_ledger
from secateur.storage.outputs import Output
from secateur.tasks.results.valuation_results import coupled_spans
from secateur.tasks.run import Run
from secateur.tasks.training.optimizers import plan_update_rule


def read_segment(output: Output) -> Segment:
    """Return a segment's record from its ledger file."""
    tensors, first_step = read_ledger(output)
    return Segment(first_step=first_step, **tensors)


def plan_dynamics(run: Run, segment: Segment) -> Dynamics:
    """Return a segment's dynamics with the plan's optimizer, curvature and coupling."""
    spans = coupled_spans(run)
    curvature = run.plan.curvature.build(segment, spans)
    return Dynamics.from_segment(segment, plan_update_rule(run.plan.optimizer), curvature, spans)


def count_slots(run: Run) -> int:
    """Return the optimizer's state tensors per parameter, theta included."""
    return plan_update_rule(run.plan.optimizer).state_tensors
