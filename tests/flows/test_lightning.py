"""What the callback records of Lightning's Trainer is autograd's, one sample at a time; and it resumes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from secateur.errors import PlanError
from secateur.flows.trainers.lightning import RecordingCallback
from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from tests.tasks.small import make_data, sample, small_plan
from tests.tasks.test_outside import assert_equal_ledgers

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")
]  # its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lightning")
    make_data(made)
    return made


class Module(LightningModule):
    """As a user writes it."""

    def __init__(self, net: nn.Module, telling: bool) -> None:
        super().__init__()
        self.net, self.telling = net, telling
        self.sample_losses: Tensor | None = None

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        losses = functional.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")
        if self.telling:
            self.sample_losses = losses
            return (losses * batch["weight"]).sum()
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.2, momentum=0.5)


def collate(numbers: list[int]) -> dict[str, Any]:
    """Digits with their keys; later ones in a batch weigh more."""
    samples = [sample(n) for n in numbers]
    pixels = torch.stack(
        [torch.frombuffer(bytearray(s["raw"]), dtype=torch.float32) for s in samples]
    )
    weight = torch.linspace(0.1, 0.4, len(numbers))
    return {
        "__key__": [s["__key__"] for s in samples],
        "x": pixels,
        "y": torch.tensor([int(s["cls"]) for s in samples]),
        "weight": weight,
    }


def plan_of(folder: Path, **changes: Any) -> Plan:
    basis = {"kind": "coordinates", "numbers": None, "fit_steps": 1}
    model = {"factory": "tests.tasks.small:network", "args": {"dropout": 0.0}}
    settings = {
        "segment_steps": 2,
        "basis": basis,
        "model": model,
        "stages": [{"steps": 5, "batch_size": 12}],
    }
    return small_plan(folder, **settings | changes)


class Stop(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError


def fit(
    plan: Plan, telling: bool, *more: Callback, checkpoint: str | None = None, **settings: Any
) -> tuple[RecordingCallback, Module]:
    """Two micro-batches of 6 a step, clipped."""
    callback = RecordingCallback(plan, 0, model="net")
    module = Module(Run.of(plan).model(), telling)
    trainer = Trainer(
        max_steps=5, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[callback, *more], accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=plan.root,
        **{"enable_checkpointing": False} | settings,
    )  # fmt: skip
    trainer.fit(
        module, DataLoader(range(140), batch_size=6, collate_fn=collate), ckpt_path=checkpoint
    )
    return callback, module


@pytest.mark.parametrize("telling", [True, False])
def test_contributions_are_autograds(folder: Path, telling: bool) -> None:
    plan = plan_of(folder, run=f"telling{telling}", segment_steps=1)
    _, module = fit(plan, telling)
    run = Run.of(plan)
    stage = run.folder.stage(0)
    facts = stage.trained.manifest.facts
    assert [facts[name] for name in ("samples", "steps", "segments", "by")] == [
        140,
        5,
        5,
        "lightning",
    ]
    net = run.model()
    project = run.basis(run.bindings(net)).project_tensors
    for step, ledger in enumerate(stage.segments()):
        segment, _ = read_ledger(ledger)
        before = read_checkpoint(stage.segment(step - 1) if step else stage.start)
        net.load_state_dict(
            {n.removeprefix("model."): t for n, t in before.items() if n.startswith("model.")}
        )
        numbers = list(range(12 * step, 12 * step + 12))
        assert segment["samples"].tolist() == numbers
        own, losses = [], []
        for number in numbers:
            one = collate([number])
            net.zero_grad()
            loss = functional.cross_entropy(net(one["x"]), one["y"])
            loss.backward()
            losses.append(float(loss.detach()))
            own.append(project({n: p.grad for n, p in net.named_parameters()}))
        weights = (
            torch.linspace(0.1, 0.4, 6).repeat(2) / 2 if telling else torch.full((12,), 1 / 12)
        )
        gradients = torch.stack(own)
        scale = min(1.0, 0.5 / float((weights[:, None] * gradients).sum(0).norm()))
        torch.testing.assert_close(segment["weights"].float(), weights * scale, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            segment["contributions"], (weights * scale)[:, None] * gradients, rtol=1e-4, atol=1e-6
        )
        if telling:
            torch.testing.assert_close(segment["losses"].float(), torch.tensor(losses))
        else:
            assert segment["losses"].isnan().all()
    for name, tensor in module.net.state_dict().items():
        assert torch.equal(tensor, read_checkpoint(stage.segment(4))[f"model.{name}"])


def test_it_resumes_with_the_trainer(folder: Path) -> None:
    """From a checkpoint of Lightning's own, or by repeating what the ledger has; and what is trained is not trained again."""
    whole, plan, saved = (plan_of(folder, run=name) for name in ("whole", "stopped", "saved"))
    _, ended = fit(whole, True)
    for run in (plan, saved):
        with pytest.raises(ZeroDivisionError):
            fit(run, True, Stop())
        assert len(Run.of(run).folder.stage(0).segments()) == 1
    fit(plan, True)
    assert_equal_ledgers(Run.of(whole), Run.of(plan), 0)
    _, module = fit(plan, True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ended.net.parameters(), module.net.parameters(), strict=True)
    )


def test_what_cannot_be_recorded_is_refused(folder: Path) -> None:
    plan = plan_of(folder, run="manual")
    module = Module(Run.of(plan).model(), True)
    module.automatic_optimization = False
    trainer = Trainer(max_steps=1, callbacks=[RecordingCallback(plan, 0, model="net")], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=plan.root)  # fmt: skip
    with pytest.raises(PlanError, match="one optimizer under automatic optimization"):
        trainer.fit(module, DataLoader(range(12), batch_size=6, collate_fn=collate))
