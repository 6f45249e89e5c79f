"""Other projects' estimators on the same workloads. `pip install .[peers]` first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.dattri_capture import capture_gradients
from benchmarks.workloads import Workload

Scores = Callable[[Workload], Tensor]


def dattri(factorization: str, numbers: int | None) -> Scores:
    """Return a function that scores removals by dattri's data value embeddings.

    Args:
        factorization: `none` for full gradients, or `kronecker` or `elementwise` factors.
        numbers: that a gradient is reduced to.
    """

    def score(workload: Workload) -> Tensor:
        from dattri.algorithm.dvemb import DVEmbAttributor  # type: ignore[import-not-found]

        model = workload.model()
        optimizer = workload.optimizer(model)
        task = _dattri_task(model, factorization)
        attributor = DVEmbAttributor(task=task, proj_dim=numbers, factorization_type=factorization)
        size = len(workload.batches[0])
        for step, ids in enumerate(workload.batches):
            records = torch.arange(step * size, step * size + len(ids))
            attributor.cache_gradients(0, workload.data(ids), records, workload.rate(step))
            workload.step(model, optimizer, step)
        attributor.cache()
        target = TensorDataset(*workload.data(None))
        influence = attributor.attribute(DataLoader(target, batch_size=len(target)))
        removed = torch.tensor([step * size + place for step, place in workload.removals])
        scores: Tensor = influence.mean(1)[removed].double().cpu()
        return scores

    return score


def _dattri_task(model: torch.nn.Module, factorization: str) -> Any:
    from dattri.task import AttributionTask  # type: ignore[import-not-found]

    def loss_of_parameters(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return functional.cross_entropy(torch.func.functional_call(model, parameters, x), y)

    def loss_of_model(model: torch.nn.Module, data: list[Tensor], device: torch.device) -> Tensor:
        return functional.cross_entropy(model(data[0]), data[1])

    loss = loss_of_parameters if factorization == "none" else loss_of_model
    return AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])


def dattri_llm(adamw: bool, mask: int | None = None) -> Scores:
    """Return a function that scores removals by dattri-llm.

    Args:
        adamw: score by AdamW-influence; otherwise by data value embeddings.
        mask: size of a random mask of coordinates per layer; all of them if None.
    """
    projection = {"__default__": {"style": "mask", "proj_dim": mask}} if mask else None

    def score(workload: Workload) -> Tensor:
        import dattri_llm as peer  # type: ignore[import-not-found]

        model = workload.model()
        optimizer = workload.optimizer(model)
        moments = None
        if adamw:
            moments = peer.OptimizerStateCallback(model, optimizer, projection_kwargs=projection)
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [moments] if moments else []
            with capture_gradients(model, projection, f"{folder}/train", callbacks):
                for step, ids in enumerate(workload.batches):
                    for group in optimizer.param_groups:
                        group["lr"] = workload.rate(step)
                    _backward(workload, model, ids)
                    optimizer.step()
                    if moments:
                        moments.record_post(step)
            with capture_gradients(model, projection, f"{folder}/test", []):
                _backward(workload, model, None)
            result = _attribute(workload, folder, moments)
        # AdamWInfluence gives the change of the final loss as a sample's weight grows, DVEmb as the
        # sample is removed.
        sign = -1 if moments else 1
        values = sign * result.scores.double().sum(1)
        steps = torch.tensor(result.row_steps)
        places = [(steps == step).nonzero()[place, 0] for step, place in workload.removals]
        return torch.stack([values[place] for place in places])

    return score


def _backward(workload: Workload, model: torch.nn.Module, ids: Tensor | None) -> None:
    model.zero_grad()
    x, y = workload.data(ids)
    functional.cross_entropy(model(x), y).backward()


def _attribute(workload: Workload, folder: str, moments: Any) -> Any:
    import dattri_llm as peer

    arguments = peer.AttributionArguments(output_dir=f"{folder}/out")
    stores = f"{folder}/train", f"{folder}/test"
    if moments:
        attributor = peer.AdamWInfluenceAttributor(arguments)
        dynamics = moments.dynamics()
        return attributor.attribute_from_cache(*stores, dynamics=dynamics, propagation="test")
    rates = {step: workload.rate(step) for step in range(len(workload.batches))}
    attributor = peer.DVEmbAttributor(arguments)
    return attributor.attribute_from_cache(*stores, learning_rate=rates, propagation="test")


PEERS = {
    "dattri DVEmb, full gradients": dattri("none", None),
    "dattri DVEmb, kronecker": dattri("kronecker", 416),
    "dattri DVEmb, elementwise": dattri("elementwise", 416),
    "dattri-llm DVEmb, full gradients": dattri_llm(False),
    "dattri-llm DVEmb, mask": dattri_llm(False, 208),
    "dattri-llm AdamWInfluence, full gradients": dattri_llm(True),
    "dattri-llm AdamWInfluence, mask": dattri_llm(True, 208),
}
ADAMW_ONLY = {name for name in PEERS if "AdamW" in name}
