"""Check that another trainer's plan, model and optimizer belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.errors import PlanError
from secateur.influence.optimizers import find_update_rule
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.plan import Plan, WindowConfig
from secateur.tasks.run import Run
from secateur.tasks.training.optimizers import plan_update_rule


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Leave torch's random numbers and thread count unchanged after the block."""
    threads = torch.get_num_threads()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def check_plan(plan: Plan, stage: int) -> None:
    """Check that a plan asks nothing that another trainer's loop cannot do.

    Raises:
        PlanError: it does, or it has no such stage.
    """
    if not 0 <= stage < len(plan.stages):
        raise PlanError(f"the plan has no stage {stage}; its last is {len(plan.stages) - 1}")
    reason = "another trainer's steps cannot be repeated"
    if plan.estimate == "replay":
        raise PlanError(f"the plan scores by replay, and {reason}; set `score.estimate: embedding`")
    if plan.audits(stage):
        raise PlanError(
            f"the plan has stage {stage} audited, and {reason}; take the stage out of "
            f"`audit.stages` and leave out `trust.min_fidelity`"
        )
    if plan.trust.asked:
        raise PlanError(
            f"the plan compares answers with replay, and {reason}; leave out `trust.questions` and "
            f"`trust.min_agreement`"
        )
    if plan.stages[stage].selections:
        raise PlanError(
            f"a window of stage {stage} selects online, which only `secateur run` does; leave out "
            f"its `select`"
        )
    if plan.curvature.needs_own_loop:
        raise PlanError(
            f"`curvature.kind: {plan.curvature.kind}` needs more passes than another trainer "
            f"makes; set `empirical_fisher` or `none`"
        )


def check_model(run: Run, model: nn.Module) -> None:
    """Check that a model's state has the names, shapes and types of the plan's model.

    Raises:
        PlanError: names, shapes, types, frozen parameters or the device differ.
    """
    planned = _describe_state(run.model())
    actual = _describe_state(model)
    for name in (*planned, *actual):
        if planned.get(name) != actual.get(name):
            theirs = actual.get(name, "missing")
            ours = planned.get(name, "missing")
            raise PlanError(
                f"{name} of the trainer's model is {theirs}, and in the plan's "
                f"({run.plan.model.factory}) it is {ours}; give both the same architecture, "
                f"`dtype` and frozen parameters"
            )
    device = next(model.parameters()).device.type
    if device != torch.device(run.plan.device).type:
        raise PlanError(
            f"the trainer's model is on {device} and the plan says `device: {run.plan.device}`; "
            f"make them the same"
        )


def check_optimizer(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer is of the plan's kind, over exactly the model's parameters.

    Raises:
        PlanError: it is not.
        SecateurError: its kind is not known.
    """
    planned = plan_update_rule(plan.optimizer)
    actual = find_update_rule(optimizer)
    if (type(planned), planned.slots) != (type(actual), actual.slots):
        kinds = (type(optimizer), plan.optimizer.optimizer_class)
        theirs, ours = (
            f"{kind.__name__} with slots {', '.join(rule.slots) or 'none'}"
            for kind, rule in zip(kinds, (actual, planned), strict=True)
        )
        raise PlanError(
            f"the trainer's optimizer is {theirs} and the plan's {ours}; set the plan's "
            f"`optimizer` to the trainer's"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if trained - names.keys():
        raise PlanError(
            "the optimizer trains parameters that are not the model's; train them with another "
            "optimizer"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise PlanError(
                f"the optimizer does not train {name}; freeze it with requires_grad_(False)"
            )


def resolve_windows(plan: Plan, stage: int, samples: int, steps: int | None) -> list[range] | None:
    """Return a stage's windows in steps; None if one window is the whole stage.

    Args:
        steps: optimizer steps of the stage, if the trainer knows them.

    Raises:
        PlanError: a window is a fraction of an unknown number of steps, or lies outside the stage.
    """
    config = plan.stages[stage]
    if config.windows == [WindowConfig()]:
        return None
    windows = config.listed_windows
    if steps is None and any(window.unit == "fraction" for window in windows):
        raise PlanError(
            f"the windows of stage {stage} are fractions of its steps, and only the trainer knows "
            f"how many there will be; give `steps` to the recording, or use `unit: steps`"
        )
    length = steps or max((round(window.stop) for window in windows), default=1)
    stages = list(plan.stages)
    stages[stage] = config.model_copy(update={"steps": length, "epochs": None})
    resized = plan.model_copy(update={"stages": stages})
    return BatchSchedule(resized, stage, samples).windows()


def _describe_state(model: nn.Module) -> dict[str, str]:
    """The shape and type of everything in a model's state, and whether it is frozen."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    described = {}
    for name, tensor in model.state_dict().items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        suffix = ", frozen" if name in frozen else ""
        described[name] = f"{tuple(tensor.shape)} {dtype}{suffix}"
    return described
