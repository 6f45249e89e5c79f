"""Room `tasks`: what is accepted of another trainer: a plan, a model and an optimizer that belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.errors import PlanError
from secateur.influence.optimizers import find_update_rule
from secateur.tasks.analysis.audit import is_audited
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.plan import Plan, WindowConfig
from secateur.tasks.run.run import Run
from secateur.tasks.training.optimizer import plan_update_rule


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Leaves the trainer's random numbers and threads as they were."""
    threads, cards = torch.get_num_threads(), range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=list(cards)):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def check_plan(plan: Plan, stage: int) -> None:
    """What a plan may not ask of steps that only their trainer can take.

    Raises:
        PlanError: it asks for it, or has no such stage.
    """
    if not 0 <= stage < len(plan.stages):
        raise PlanError(f"the plan has no stage {stage}; its last is {len(plan.stages) - 1}")
    again = "another trainer's steps cannot be run again"
    if plan.estimate == "replay":
        raise PlanError(f"the plan scores by replay, and {again}; set `score.estimate: embedding`")
    if is_audited(plan, stage):
        raise PlanError(
            f"the plan has stage {stage} audited, and {again}; take the stage out of `audit.stages` and leave out "
            f"`trust.min_fidelity`"
        )
    if plan.stages[stage].selections:
        raise PlanError(
            f"a window of stage {stage} selects online, which only `secateur run` does; leave out its `select`"
        )
    if plan.curvature.kind in ("fisher", "hessian"):
        raise PlanError(
            f"`curvature.kind: {plan.curvature.kind}` needs more passes than another trainer makes; set `empirical_fisher` "
            f"or `none`"
        )


def check_model(run: Run, model: nn.Module) -> None:
    """Whether a model's state is one of the plan's model.

    Raises:
        PlanError: names, shapes, types, device or what is frozen differ.
    """
    made, given = (_described(m) for m in (run.model(), model))
    for name in (*made, *given):
        if made.get(name) != given.get(name):
            have, want = given.get(name, "not there"), made.get(name, "not there")
            raise PlanError(
                f"{name} of the trainer's model is {have}, and in the plan's ({run.plan.model.factory}) it is {want}; give "
                f"both the same architecture, `dtype` and frozen parameters"
            )
    device, planned = next(model.parameters()).device.type, torch.device(run.plan.device).type
    if device != planned:
        raise PlanError(
            f"the trainer's model is on {device} and the plan says `device: {planned}`; make them the same"
        )


def check_optimizer(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whether an optimizer is of the plan's kind, over the model's parameters and no others.

    Raises:
        PlanError: it is not.
        SecateurError: its kind is not known.
    """
    planned, given = plan_update_rule(plan.optimizer), find_update_rule(optimizer)
    if (type(planned), planned.slots) != (type(given), given.slots):
        kinds = [
            f"{type(o).__name__} with slots {', '.join(o.slots) or 'none'}"
            for o in (given, planned)
        ]
        raise PlanError(
            f"the trainer's optimizer is {kinds[0]} and the plan's {kinds[1]}; make `optimizer` the trainer's"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held - names.keys():
        raise PlanError(
            "the optimizer trains parameters that are not the model's; give them an optimizer of their own"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise PlanError(
                f"the optimizer does not train {name}; freeze it with requires_grad_(False)"
            )


def resolve_windows(plan: Plan, stage: int, samples: int, steps: int | None) -> list[range] | None:
    """A stage's windows in steps; None where one window is the whole stage, however long.

    Raises:
        PlanError: a window is a fraction of nobody knows how many steps, or lies outside the stage.
    """
    spec = plan.stages[stage]
    if spec.windows == [WindowConfig()]:
        return None
    if steps is None and any(window.unit == "fraction" for window in spec.given):
        raise PlanError(
            f"the windows of stage {stage} are fractions of its steps, and only the trainer knows how many there will be; "
            f"give `steps` to the recording, or use `unit: steps`"
        )
    length = steps or max((round(window.stop) for window in spec.given), default=1)
    stages = [*plan.stages]
    stages[stage] = spec.model_copy(update={"steps": length, "epochs": None})
    return BatchSchedule(plan.model_copy(update={"stages": stages}), stage, samples).windows()


def _described(model: nn.Module) -> dict[str, str]:
    """Shape and type of everything in a model's state, and whether it is frozen."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    kinds = {
        name: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for name, t in model.state_dict().items()
    }
    return {name: kind + (", frozen" if name in frozen else "") for name, kind in kinds.items()}
