"""Whole runs in bfloat16, against autograd in float32, one sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from examples.images import make_shards as images
from examples.text import make_shards as text
from secateur.storage.ledger import read_checkpoint
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_scores, read_target_gradients
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation.dynamics import read_segment
from tests.tasks.small import curate_small

EXAMPLES: dict[str, dict[str, Any]] = {
    "images": {
        "model": {"factory": "examples.images.model:mlp", "args": {"hidden": 16}},
        "audit": None,
    },
    "llama": {
        "task": {
            "factory": "secateur.text:NextToken",
            "args": {"length": 40},
            "reduction": "token_mean",
        }
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {
        "optimizer": {"kind": "sgd", "lr": 0.05},
        "basis": {"kind": "kronecker", "method": "pca", "rank": 4, "fit_steps": 2},
    },
    "adamw": {
        "optimizer": {"kind": "adamw", "lr": 0.003, "clip_norm": 1.0},
        "basis": {"kind": "coordinates", "numbers": 400, "fit_steps": 2},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision")
    images.make(f"{path}/images", seed=0)
    text.make(f"{path}/llama", seed=0)
    return path


# The pairs that CI leaves out take as long, and differ in one part only.
LESS_OFTEN = (("sgd", "autocast"), ("adamw", "dtype"))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        pytest.param(o, p, marks=pytest.mark.server if (o, p) in LESS_OFTEN else ())
        for o in OPTIMIZERS
        for p in ("dtype", "autocast")
    ],
)
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_run_in_bfloat16(folder: Path, example: str, optimizer: str, precision: str) -> None:
    """The last segment is one step, so autograd can start from the checkpoint before it."""
    path = f"examples/{example}/plan.yaml"
    target = next(iter(read_plan(path).targets))
    values = {
        "run": f"{example}-{optimizer}-{precision}",
        "root": f"{folder}/runs",
        "threads": 1,
        precision: "bfloat16",
        "data": {"shards": f"{folder}/{example}/train-000000.tar"},
        "targets": {target: {"shards": f"{folder}/{example}/target-000000.tar"}},
        "schedule": {"kind": "constant"},
        "stages": [
            {"steps": 4, "batch_size": 16, "prune": {"policy": "top", "keep": 0.5}},
            {"steps": 1, "batch_size": 16},
        ],
        "segment_steps": 3,
        "score": {"aggregate": "mean"},
    }
    run = curate_small(read_plan(path, values | EXAMPLES[example] | OPTIMIZERS[optimizer]))
    stage = run.folder.stage(0)
    segment = read_segment(stage.segment(1))
    assert segment.steps.unique().tolist() == [3]
    loop = single_precision_loop(run, read_checkpoint(stage.segment(0)))
    expected, losses = own_gradients(loop, segment.samples, segment.weights)
    assert relative(segment.contributions, expected) < 2e-2
    torch.testing.assert_close(segment.losses.float(), losses, rtol=1e-2, atol=0)
    gradient = read_target_gradients(run, 0, target).float().mean(0)
    scores = read_scores(run, 0).filter(pl.col("step") == 3)[f"score_{target}"].to_torch()
    exact = expected @ gradient
    limit = 2e-2 * float((expected.norm(dim=1) * gradient.norm()).max())
    torch.testing.assert_close(scores.float(), exact, rtol=0, atol=limit)
    assert read_decisions(run, 0)["keep"].any()
    assert run.folder.stage(1).trained.committed


def single_precision_loop(run: Run, checkpoint: dict[str, Tensor]) -> TrainingLoop:
    """Return a loop of the first stage that computes in float32, from a checkpoint's weights."""
    plan = run.plan.model_copy(update={"dtype": "float32", "autocast": None})
    loop = TrainingLoop(Run(plan, run.folder), 0, read_stage_samples(run, 0))
    weights = {n: t for n, t in checkpoint.items() if n.startswith("model.")}
    loop.model.load_state_dict({n.removeprefix("model."): t for n, t in weights.items()})
    return loop


def own_gradients(loop: TrainingLoop, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's weighted gradient, and its loss, by autograd of the sample alone."""
    basis = loop.run.basis(loop.run.bindings(loop.model))
    gradients, losses = [], []
    for row, weight in zip(rows, weights, strict=True):
        loop.model.zero_grad()
        loss = loop.losses(loop.batch(row[None]))[0]
        (loss * weight).backward()
        named = {n: p.grad for n, p in loop.model.named_parameters() if p.grad is not None}
        gradients.append(basis.project_tensors(named))
        losses.append(loss.detach())
    return torch.stack(gradients), torch.stack(losses)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest distance of a row, relative to its length."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
