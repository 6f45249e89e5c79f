"""Peers on the same workloads and the same truth; `pip install .[peers]` first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workloads import Workload


def dattri(factorization: str, numbers: int | None) -> Callable[[Workload], Tensor]:
    """Scores of dattri's data value embeddings: `none` with full gradients, or `kronecker` or `elementwise` factors."""

    def scores(workload: Workload) -> Tensor:
        from dattri.algorithm.dvemb import DVEmbAttributor  # type: ignore[import-not-found]
        from dattri.task import AttributionTask  # type: ignore[import-not-found]

        model = workload.model()
        optimizer = workload.optimizer(model)

        def full(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
            x, y = data
            return functional.cross_entropy(torch.func.functional_call(model, parameters, x), y)

        def factored(model: torch.nn.Module, data: list[Tensor], device: torch.device) -> Tensor:
            return functional.cross_entropy(model(data[0]), data[1])

        task = AttributionTask(
            loss_func=full if factorization == "none" else factored,
            model=model,
            checkpoints=[model.state_dict()],
        )
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
        return influence.mean(1)[removed].double().cpu()

    return scores


def dattri_llm(adamw: bool, mask: int | None = None) -> Callable[[Workload], Tensor]:
    """Scores of dattri-llm: AdamW-influence, or data value embeddings; of all coordinates, or a random mask a layer."""

    def scores(workload: Workload) -> Tensor:
        import dattri_llm as peer  # type: ignore[import-not-found]

        model = workload.model()
        optimizer = workload.optimizer(model)
        projection = {"__default__": {"style": "mask", "proj_dim": mask}} if mask else None
        moments = (
            peer.OptimizerStateCallback(model, optimizer, projection_kwargs=projection)
            if adamw
            else None
        )

        def capturing(folder: str, *more: Any) -> Any:
            store = peer.OffloadCallback(
                offload_interval=1,
                file_manager=peer.GradientStorageManager(folder),
                recording_type="per_sample",
            )
            config = peer.HookManagerConfig(
                linear_io=peer.REGISTER_ALL, projection_kwargs=projection
            )
            return peer.HookManager(model, config=config, callbacks=[store, *more]).collect(
                deregister_on_exit=True
            )

        def backward(ids: Tensor | None) -> None:
            model.zero_grad()
            x, y = workload.data(ids)
            functional.cross_entropy(model(x), y).backward()

        with tempfile.TemporaryDirectory() as folder:
            with capturing(f"{folder}/train", *([moments] if moments else [])):
                for step, ids in enumerate(workload.batches):
                    for group in optimizer.param_groups:
                        group["lr"] = workload.rate(step)
                    backward(ids)
                    optimizer.step()
                    if moments:
                        moments.record_post(step)
            with capturing(f"{folder}/test"):
                backward(None)
            arguments = peer.AttributionArguments(output_dir=f"{folder}/out")
            stores = f"{folder}/train", f"{folder}/test"
            if moments:
                attributor = peer.AdamWInfluenceAttributor(arguments)
                found = attributor.attribute_from_cache(
                    *stores, dynamics=moments.dynamics(), propagation="test"
                )
            else:
                rates = {step: workload.rate(step) for step in range(len(workload.batches))}
                attributor = peer.DVEmbAttributor(arguments)
                found = attributor.attribute_from_cache(
                    *stores, learning_rate=rates, propagation="test"
                )
        # AdamWInfluence: the change of the final loss as the weight grows; DVEmb: as the sample is removed
        sign = -1 if moments else 1
        values, steps = sign * found.scores.double().sum(1), torch.tensor(found.row_steps)
        return torch.stack(
            [values[(steps == step).nonzero()[place, 0]] for step, place in workload.removals]
        )

    return scores


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
