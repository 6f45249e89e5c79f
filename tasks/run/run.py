"""An opened run: its plan, its folder, and the model, task and basis that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import nn

from secateur.errors import PlanError
from secateur.influence.basis import Basis
from secateur.influence.basis_kinds import restore_basis
from secateur.influence.bindings import Bindings, bind_layers
from secateur.storage.attempt import Attempt
from secateur.storage.layout import RunFolder
from secateur.storage.tensors import read_tensors
from secateur.tasks.plan import Plan, WindowConfig
from secateur.tasks.plan.plan_file import parse_plan, plan_text
from secateur.tasks.run.factories import LearningTask, call_factory


@dataclass(frozen=True)
class Run:
    """A run on disk or S3, with the plan it was started with."""

    plan: Plan
    folder: RunFolder

    @property
    def url(self) -> str:
        """Path or URL of the run. Pipeline tasks pass this to one another."""
        return self.folder.url

    @staticmethod
    def of_plan(plan: Plan) -> Run:
        """Return the run of a plan, which may not have been started."""
        return Run(plan, RunFolder(f"{plan.root.rstrip('/')}/{plan.run}"))

    @staticmethod
    def start(plan: Plan) -> Run:
        """Create the run's folder, or join a run that the same plan has started.

        Only `workers` and `launch` may differ from the plan that started it.

        Raises:
            PlanError: the folder holds a run of another plan, or the store ignores conditional puts
                (create a file only if there is none).
        """
        folder = Run.of_plan(plan).folder
        if plan.commits == "conditional" and not folder.root.supports_conditional_put():
            raise PlanError(
                f"the store of {folder.url} ignores conditional puts, so if two processes run the "
                f"same stage, either may replace what the other committed; use another store, or "
                f"accept that risk with `commits: last_writer_wins`"
            )

        def write(attempt: Attempt) -> None:
            attempt.write("plan.yaml", plan_text(plan).encode())

        folder.plan.write_once("plan", {}, write)
        if differing := _differing_keys(_stored_plan(folder), plan):
            raise PlanError(
                f"{folder.url} holds a run of another plan (they differ in "
                f"{', '.join(differing)}); choose another `run` name, or remove that folder"
            )
        return Run.open(folder.url)

    @staticmethod
    def open(url: str) -> Run:
        """Return the run at a path or URL.

        Automatic windows are chosen and frozen (stored) when their stage begins. In the plan of the
        opened run they are replaced by the frozen ones.

        Raises:
            PlanError: there is no run.
        """
        folder = RunFolder(url.rstrip("/"))
        if not folder.plan.committed:
            raise PlanError(
                f"{url} holds no run; give the folder that `secateur run` made (root/run of the "
                f"plan)"
            )
        plan = _with_frozen_windows(_stored_plan(folder), folder)
        # The rounding of sums depends on the number of threads, so every process of a run must use
        # the same.
        if plan.threads:
            torch.set_num_threads(plan.threads)
        return Run(plan, folder)

    def task(self) -> LearningTask:
        """Return the plan's learning task."""
        task = call_factory(self.plan.task, "task")
        if self.plan.task.reduction == "token_mean" and not hasattr(task, "sizes"):
            raise PlanError(
                f"`reduction: token_mean` needs a method sizes(batch) on {self.plan.task.factory}"
            )
        return cast(LearningTask, task)

    def model(self) -> nn.Module:
        """Return the plan's model with its initial weights, which the seed determines."""
        dtype = getattr(torch, self.plan.dtype)
        return self.bare_model().to(device=self.plan.device, dtype=dtype)

    def bare_model(self) -> nn.Module:
        """Return the model as the factory makes it, on its own device and in its own precision."""
        torch.manual_seed(self.plan.seed)
        model = call_factory(self.plan.model, "model")
        if not isinstance(model, nn.Module):
            raise PlanError(
                f"the model factory {self.plan.model.factory} returned a {type(model).__name__}, "
                f"not an nn.Module"
            )
        return model

    def bindings(self, model: nn.Module) -> Bindings:
        """Return which layers of the model are captured."""
        return bind_layers(model, self.plan.uncaptured)

    def basis(self, bindings: Bindings) -> Basis:
        """Return the basis that was fitted for the run."""
        stored = read_tensors(self.folder.basis, "basis.safetensors")
        tensors = {name: tensor.to(self.plan.device) for name, tensor in stored.items()}
        return restore_basis(self.plan.basis_config.kind, bindings.blocks, tensors)


# A process opens its run for every pipeline task, and YAML takes long to parse.
_parse_once = lru_cache(maxsize=8)(parse_plan)


def _stored_plan(folder: RunFolder) -> Plan:
    return _parse_once(folder.plan.read("plan.yaml").decode(), f"{folder.url}/plan")


def _with_frozen_windows(plan: Plan, folder: RunFolder) -> Plan:
    stages = list(plan.stages)
    for number, stage in enumerate(stages):
        frozen = folder.stage(number).windows
        if stage.auto_windows and frozen.committed:
            windows = [
                WindowConfig(**window, select=stage.auto_windows.select)
                for window in frozen.manifest.facts["windows"]
            ]
            stages[number] = stage.model_copy(update={"windows": windows})
    return plan.model_copy(update={"stages": stages})


def _differing_keys(old: Plan, new: Plan) -> list[str]:
    """Top-level keys in which two plans differ.

    `workers` and `launch` are left out: they say by how many processes a run is computed.
    """
    before = json.loads(old.model_dump_json(exclude={"workers", "launch"}))
    after = json.loads(new.model_dump_json(exclude={"workers", "launch"}))
    return [key for key in after if before[key] != after[key]]
