"""The plan of the Llama example, which names no code of its own, on real text."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from examples.text.make_shards import make
from secateur.huggingface import build_model
from secateur.storage.ledger import read_checkpoint
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_scores, read_target_gradients
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation.dynamics import read_segment
from secateur.text import NextToken
from tests.tasks.small import curate_small

PLAN = "examples/llama/plan.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    make(f"{path}/data/text", seed=0)
    return path


def test_the_plan_has_at_most_twenty_lines_and_names_only_the_package() -> None:
    text = Path(PLAN).read_text()
    assert len(text.splitlines()) <= 20
    assert all(name.startswith("secateur.") for name in re.findall(r'factory: "?([\w.]+):', text))


def test_the_page_shows_the_plan_and_arguments_that_exist() -> None:
    page = Path("docs/text.md").read_text()
    plan, *fragments = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert plan == Path(PLAN).read_text().split("\n", 1)[1]
    assert len(fragments) == 4
    rows = re.findall(r"\| `(\{length.*?\})` \|", page)
    assert len(rows) == 5
    for text in rows:
        NextToken(**yaml.safe_load(text))
    for fragment in map(yaml.safe_load, fragments):
        read_plan(PLAN, fragment)
        (part,) = fragment.values()
        factory: Any = build_model if "model" in fragment else NextToken
        inspect.signature(factory).bind(**part["args"])


def tiny_values(
    folder: Path, run: str, model: dict[str, Any], task: dict[str, Any]
) -> dict[str, Any]:
    """Return a plan's values for a Llama of width 16, with further arguments of model and task.

    The last segment is one step, so autograd can start from the checkpoint before it.
    """
    plan = read_plan(PLAN)
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "max_position_embeddings": 600,
    }
    arguments = {"config": plan.model.args["config"] | tiny} | model
    task_values = plan.task.model_dump()
    task_values["args"] |= {"length": 40, "eos": False} | task
    return {
        "run": run,
        "root": f"{folder}/runs",
        "threads": 1,
        "dtype": "float64",
        "model": plan.model.model_dump() | {"args": arguments},
        "task": task_values,
        "data": {"shards": f"{folder}/data/text/train-000000.tar"},
        "targets": {"manual": {"shards": f"{folder}/data/text/target-000000.tar"}},
        "stages": [{"steps": 4, "batch_size": 6, "prune": {"policy": "top", "keep": 0.5}}],
        "segment_steps": 3,
        "basis": {"kind": "coordinates", "numbers": 400, "fit_steps": 1},
        "score": {"aggregate": "mean"},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "model": {"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}},
            "task": {"text": "txt", "prompt": "json.domain"},
        },
        {"task": {"length": 600, "pack": True}},
        {
            "model": {"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}},
            "task": {"length": 600, "pack": True},
        },
    ],
    ids=["whole", "lora-completion", "packed", "lora-packed"],
)
def test_contributions_and_scores_equal_autograd_one_sample_at_a_time(
    folder: Path, changes: dict[str, Any]
) -> None:
    """Each sample is collated alone, so its row has no padding."""
    model, task = changes.get("model", {}), changes.get("task", {})
    values = tiny_values(folder, f"tiny{len(str(changes))}", model, task)
    run = curate_small(read_plan(PLAN, values))
    stage = run.folder.stage(0)
    segment = read_segment(stage.segment(1))
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    loop.load_state(read_checkpoint(stage.segment(0)))
    assert segment.steps.unique().tolist() == [3]
    sizes = loop.task.sizes(loop.batch(segment.samples))  # type: ignore[attr-defined]
    torch.testing.assert_close(segment.weights, (sizes / sizes.sum()).to(segment.weights))
    # By default the curvature has a gradient with random signs for each sample.
    torch.testing.assert_close(segment.fisher_weights, segment.weights / sizes)
    assert float((segment.fisher - segment.contributions).norm()) > 0
    basis = run.basis(run.bindings(loop.model))
    if task.get("pack"):
        assert len(loop.batch(segment.samples)["documents"]) < len(segment.samples)
    rows = []
    for position, row in enumerate(segment.samples):
        alone = loop.task.losses(loop.model, loop.batch(row[None]))
        torch.testing.assert_close(alone.detach()[0], segment.losses[position], rtol=1e-6, atol=0)
        loop.model.zero_grad()
        (alone * segment.weights[position]).sum().backward()
        gradients = {n: p.grad for n, p in loop.model.named_parameters() if p.grad is not None}
        rows.append(basis.project_tensors(gradients))
    expected = torch.stack(rows)
    error = (segment.contributions - expected).norm() / expected.norm()
    assert float(error) < 1e-6
    target = read_target_gradients(run, 0, "manual").mean(0)
    found = read_scores(run, 0).filter(pl.col("step") == 3)["score_manual"].to_list()
    assert found == pytest.approx((expected @ target).tolist(), rel=1e-4, abs=1e-9)
    kept = read_decisions(run, 0)
    assert kept["keep"].any()


@pytest.mark.slow
def test_the_commands_of_the_page_run_the_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pruning keeps of each domain about the share that the page says."""
    (folder / "examples").symlink_to(Path("examples").resolve())
    (commands,) = re.findall(r"```sh\n(.*?)```", Path("docs/text.md").read_text(), re.DOTALL)
    shards, curate, query = (line.split()[1:] for line in commands.splitlines())

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    python(*shards)
    assert "1200 top" in python("-m", "secateur.flows.cli", *curate)
    assert len(re.findall(r"train-\d{5} ", python("-m", "secateur.flows.cli", *query))) == 5
    monkeypatch.chdir(folder)  # the plan's paths are relative
    run = Run.open("runs/llama")
    keep = read_decisions(run, 0)["keep"].to_list()
    samples = read_stage_samples(run, 0)
    domains = [bytes(sample["json"]) for sample in samples.read(range(len(samples)))]
    kept = [
        sum(flag for flag, domain in zip(keep, domains, strict=True) if name in domain) / 800
        for name in (b"manual", b"code", b"tables")
    ]
    assert kept == pytest.approx([0.75, 0.5, 0.25], abs=0.1)


def test_the_gauss_newton_matrix_is_the_fisher_information_over_all_tokens(folder: Path) -> None:
    changes = {
        "curvature": {"kind": "gauss_newton", "coupling": "full", "every": 1},
        "basis": {"kind": "coordinates", "numbers": 40, "fit_steps": 1},
    }
    values = tiny_values(folder, "gauss-newton", {}, {"length": 5}) | changes
    run = curate_small(read_plan(PLAN, values))
    stage = run.folder.stage(0)
    segment = read_segment(stage.segment(1))
    loop = TrainingLoop(run, 0, read_stage_samples(run, 0))
    loop.load_state(read_checkpoint(stage.segment(0)))
    basis = run.basis(run.bindings(loop.model))
    names, parameters = zip(*loop.model.named_parameters(), strict=True)
    expected = torch.zeros(basis.size, basis.size, dtype=torch.float64)
    for position, row in enumerate(segment.samples):
        tokens = loop.batch(row[None])["input_ids"]
        log_shares = loop.model(input_ids=tokens).logits[0, :-1].log_softmax(-1).flatten()
        each = torch.eye(len(log_shares), dtype=torch.float64)
        gradients = torch.autograd.grad(
            log_shares, parameters, each, is_grads_batched=True, materialize_grads=True
        )
        named = dict(zip(names, gradients, strict=True))
        rows = torch.func.vmap(basis.project_tensors)(named)
        # The recorded weight has the factor of clipping, and the matrix is of the loss itself.
        weight = segment.weights[position] / segment.scales[0] / (tokens.shape[1] - 1)
        expected += weight * (rows.T * log_shares.detach().exp()) @ rows
    found = segment.hessian[0].view(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
