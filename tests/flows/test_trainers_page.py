"""The code of docs/trainers.md runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from secateur.storage.ledger import read_ledger
from secateur.tasks.data.samples import stage_shard_urls
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import plan_text
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run
from tests.flows import gpt
from tests.flows.test_lightning import Numbers, collate
from tests.tasks.digits import network
from tests.tasks.small import make_data, score_small, small_plan

QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
    "accelerator": "cpu",
}
OTHERS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 0.01,
    "logging_strategy": "no",
}


def make_batches(numbers: range, size: int) -> list[dict[str, Any]]:
    """Return batches of consecutive digits."""
    return [collate(list(numbers[start : start + size])) for start in range(0, len(numbers), size)]


def make_names() -> dict[str, Any]:
    """Return what the page's code takes as given."""
    return {
        "make_model": lambda: network(dropout=0.0),
        "make_gpt": gpt.gpt2,
        "examples": gpt.make_examples(),
        "collate": gpt.collate,
        "batches": lambda: [(b["__key__"], b["x"], b["y"]) for b in make_batches(range(80), 20)],
        "others": OTHERS,
        "quiet": QUIET,
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, waiting_code, huggingface, lightning = re.findall(
        r"^```python\n(.*?)^```", Path("docs/trainers.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "gpt").mkdir()
    gpt.make_data(tmp_path / "gpt")
    make_data(tmp_path)
    stages = [
        {"steps": 4, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}},
        {"steps": 4, "batch_size": 20},
    ]
    model = {"factory": "tests.tasks.digits:network", "args": {"dropout": 0.0}}
    plan = small_plan(tmp_path, stages=stages, model=model, optimizer={"kind": "sgd", "lr": 0.1})
    written: dict[str, Plan] = {"plan.yaml": plan, "gpt.yaml": gpt.make_plan(tmp_path / "gpt")}
    for name, made in written.items():
        (tmp_path / name).write_text(plan_text(made))
    monkeypatch.chdir(tmp_path)
    names = make_names()
    exec(compile(loop, "docs/trainers.md", "exec"), names)
    run = Run.open(names["recording"].run.url)
    score_small(run, 0)
    write_pruned_stage(run, 0)
    exec(compile(waiting_code, "docs/trainers.md", "exec"), names)
    assert names["shards"] == stage_shard_urls(run, 1)
    exec(compile(huggingface, "docs/trainers.md", "exec"), names)
    kept = [int(key.removeprefix("digit-")) for key in stage_keys(run)]
    names["loader"] = DataLoader(Numbers(kept[:40]), batch_size=10, collate_fn=collate)
    exec(compile(lightning, "docs/trainers.md", "exec"), names)
    for made, stage, by in (
        (plan, 0, "outside"),
        (plan, 1, "lightning"),
        (written["gpt.yaml"], 0, "huggingface"),
    ):
        folder = Run.of_plan(made).folder.stage(stage)
        assert [folder.trained.manifest.facts[name] for name in ("steps", "by")] == [4, by]
        ledger, _ = read_ledger(folder.segment(0))
        assert torch.isfinite(ledger["losses"]).all()
    assert "nothing was triggered: `secateur prune" in capsys.readouterr().err


def stage_keys(run: Run) -> list[str]:
    """Return the keys that the second stage trains on."""
    keys: list[str] = read_decisions(run, 0).filter("keep")["key"].to_list()
    return keys
