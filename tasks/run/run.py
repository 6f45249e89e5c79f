"""Room `tasks`: an opened run: its plan, its folder, and the model, task and basis that they describe."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.basis import Basis, restore_basis
from secateur.influence.bindings import Bindings, bind_layers
from secateur.storage.layout import RunFolder
from secateur.storage.tensors import read_tensors
from secateur.tasks.plan import AutoWindowsConfig, FactoryConfig, Plan, WindowConfig
from secateur.tasks.plan.plan_file import parse_plan, plan_text


class LearningTask(Protocol):
    """How samples become tensors and losses; made by the plan's `task` factory.

    Two methods are optional: `metrics(model, batch) -> dict[str, Tensor]`, numbers a sample reported for targets, and
    `sizes(batch) -> Tensor`, the tokens of each sample, which `reduction: token_mean` needs.
    """

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Decodes samples (`__key__` and the bytes of each member by extension) into tensors, batch first."""
        ...

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """One loss a sample."""
        ...


@dataclass(frozen=True)
class Run:
    """A run that exists on disk, with the plan it was started with."""

    plan: Plan
    folder: RunFolder

    @property
    def url(self) -> str:
        """Where the run is; what tasks pass to one another."""
        return self.folder.url

    @staticmethod
    def of(plan: Plan) -> Run:
        """The run of a plan, which need not have been started."""
        return Run(plan, RunFolder(f"{plan.root.rstrip('/')}/{plan.run}"))

    @staticmethod
    def start(plan: Plan) -> Run:
        """Makes the run's folder, or joins it where the same plan has been started before, perhaps with other `workers`.

        Raises:
            PlanError: the folder holds a run of another plan, or the store ignores conditional puts.
        """
        folder = Run.of(plan).folder
        if plan.commits == "conditional" and not folder.root.supports_conditional_put():
            raise PlanError(
                f"the store of {folder.url} ignores conditional puts, so of two processes that run the same stage either could "
                f"replace what the other committed; use another store, or accept that risk with `commits: last_writer_wins`"
            )
        if not folder.plan.committed:
            with folder.plan.attempt("plan", {}) as attempt:
                attempt.write("plan.yaml", plan_text(plan).encode())
        if differing := _differences(_as_written(folder), plan):
            raise PlanError(
                f"{folder.url} holds a run of another plan (they differ in {', '.join(differing)}); "
                f"choose another `run` name, or remove that folder"
            )
        return Run.open(folder.url)

    @staticmethod
    def open(url: str) -> Run:
        """The run at a path or URL; in its plan stand the automatic windows of stages that have begun as they were settled.

        Raises:
            PlanError: there is no run.
        """
        folder = RunFolder(url.rstrip("/"))
        if not folder.plan.committed:
            raise PlanError(
                f"{url} holds no run; give the folder that `secateur run` made (root/run of the plan)"
            )
        plan = _with_settled_windows(_as_written(folder), folder)
        if plan.threads:  # whatever process this is, its results are to be the same
            torch.set_num_threads(plan.threads)
        return Run(plan, folder)

    def task(self) -> LearningTask:
        """The plan's task."""
        task = call_factory(self.plan.task, "task")
        if self.plan.task.reduction == "token_mean" and not hasattr(task, "sizes"):
            raise PlanError(
                f"`reduction: token_mean` needs a method sizes(batch) on {self.plan.task.factory}"
            )
        return task

    def model(self) -> nn.Module:
        """The plan's model with its initial weights, which the seed determines."""
        torch.manual_seed(self.plan.seed)
        model = call_factory(self.plan.model, "model")
        if not isinstance(model, nn.Module):
            raise PlanError(
                f"the model factory {self.plan.model.factory} gave a {type(model).__name__}, no nn.Module"
            )
        return model.to(device=self.plan.device, dtype=getattr(torch, self.plan.dtype))

    def bindings(self, model: nn.Module) -> Bindings:
        """Which layers of the model are captured."""
        return bind_layers(model, self.plan.uncaptured)

    def basis(self, bindings: Bindings) -> Basis:
        """The basis that was fitted for the run."""
        artefact = self.folder.basis
        tensors = {
            name: t.to(self.plan.device)
            for name, t in read_tensors(artefact, "basis.safetensors").items()
        }
        return restore_basis(self.plan.numbers.kind, bindings.blocks, tensors)


def call_factory(factory: FactoryConfig, role: str) -> Any:
    """Calls the factory of a plan.

    Raises:
        PlanError: it cannot be imported, or does not take the arguments.
    """
    module_name, name = factory.factory.split(":")
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"the {role} factory {factory.factory} cannot be imported: {error}; run from the folder that holds it, or "
            f"install it"
        ) from error
    try:
        return make(**factory.args)
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"the {role} factory {factory.factory} refuses its args: {error}"
        ) from error


def _as_written(folder: RunFolder) -> Plan:
    return parse_plan(folder.plan.read("plan.yaml").decode(), f"{folder.url}/plan")


def _with_settled_windows(plan: Plan, folder: RunFolder) -> Plan:
    """The plan with the automatic windows of every stage that has begun as they were settled then."""
    stages = list(plan.stages)
    for number, stage in enumerate(stages):
        if (
            isinstance(stage.windows, AutoWindowsConfig)
            and (settled := folder.stage(number).windows).committed
        ):
            found = [
                WindowConfig(**spec, select=stage.windows.select)
                for spec in settled.manifest.facts["windows"]
            ]
            stages[number] = stage.model_copy(update={"windows": found})
    return plan.model_copy(update={"stages": stages})


def _differences(old: Plan, new: Plan) -> list[str]:
    """Top-level keys in which two plans differ; who does the work is no part of what is done."""
    before, after = (json.loads(plan.model_dump_json(exclude={"workers"})) for plan in (old, new))
    return [key for key in after if before[key] != after[key]]
