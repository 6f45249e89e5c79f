"""The memory of a replay, and the disk that it takes for a time."""

from __future__ import annotations

from functools import partial

from secateur.storage.shards import Samples
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.forecast_sizes import PartMemory, RecordedStage, Sizes
from secateur.tasks.reporting.pass_memory import PassMemory
from secateur.tasks.training.pass_size import pass_size


def replays(plan: Plan) -> bool:
    """Return whether a plan replays a stage: for its scores, an audit, or its questions."""
    return _walks_together(plan) > 0


def _walks_together(plan: Plan) -> int:
    """The most targets or questions that one walk replays."""
    scored = plan.estimate == "replay" or any(plan.audits(n) for n in range(len(plan.stages)))
    return max(len(plan.targets) * scored, plan.trust.asked)


def replay_disk(sizes: Sizes, stages: list[RecordedStage]) -> int:
    """Return the bytes of the temporary files of one walk: each step's state and gradient."""
    steps = max(stage.segment_steps for stage in stages)
    return steps * (sizes.rule.state_tensors + 1) * sizes.trained


def forecast_replay(
    plan: Plan,
    sizes: Sizes,
    passes: PassMemory,
    samples: Samples,
    stages: list[RecordedStage],
    targets: dict[str, Samples],
) -> PartMemory:
    """Return the largest of the start, the repeated steps, the check of their end, the walk."""
    batch = max(stage.micro_batch for stage in stages)
    repeat = passes.training(samples, batch, False)
    step = passes.replay(samples, batch)
    start = _replay_start(plan, passes, targets)
    slots = sizes.rule.state_tensors
    loop = sizes.weights + sizes.slots
    adjoints = _walks_together(plan) * slots * sizes.trained
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
    held, passing = max(moments, key=sum)
    return PartMemory(part="replay", state=held, passes=passing, records=0)


def _replay_start(plan: Plan, passes: PassMemory, targets: dict[str, Samples]) -> int:
    """The largest pass for a target's mean gradient."""
    found = []
    for name, samples in targets.items():
        rows = len(scoring_rows(plan, name, len(samples)))
        size = pass_size(plan, partial(passes.mean_gradient, samples), rows)
        found.append(passes.mean_gradient(samples, size))
    return max(found)
