"""Peers on the same workloads and the same truth; `pip install .[peers]` first."""

from __future__ import annotations

from collections.abc import Callable

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
            loss_func=full if factorization == "none" else factored, model=model, checkpoints=[model.state_dict()]
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


PEERS = {
    "dattri DVEmb, full gradients": dattri("none", None),
    "dattri DVEmb, kronecker": dattri("kronecker", 416),
    "dattri DVEmb, elementwise": dattri("elementwise", 416),
}
