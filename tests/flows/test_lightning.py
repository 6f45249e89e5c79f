"""The callback for Lightning's Trainer records what autograd gives, and resumes with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from secateur.errors import PlanError, SecateurError
from secateur.flows.trainers.lightning import RecordingCallback
from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.storage.outputs import Output
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run
from tests.tasks.external.test_recording import assert_equal_ledgers
from tests.tasks.small import make_data, sample, score_small, small_plan

# Lightning itself warns.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")
]


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lightning")
    make_data(made)
    return made


class Numbers(Dataset[int]):
    """Numbers of digits, which `collate` reads."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> int:
        return self.numbers[place]


class Module(LightningModule):
    """A module as a user writes it. It may leave each sample's loss for the callback."""

    def __init__(self, net: nn.Module, gives_losses: bool) -> None:
        super().__init__()
        self.net = net
        self.gives_losses = gives_losses
        self.sample_losses: Tensor | None = None

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        losses = functional.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")
        if self.gives_losses:
            self.sample_losses = losses
            return (losses * batch["weight"]).sum()
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.2, momentum=0.5)


def collate(numbers: list[int]) -> dict[str, Any]:
    """Read digits with their keys. Later ones in a batch weigh more."""
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


def load_weights(model: nn.Module, checkpoint: Output) -> None:
    """Load a checkpoint's weights into a model."""
    tensors = read_checkpoint(checkpoint)
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )


def read_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the gradient of every parameter."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.clone()
    return gradients


def make_plan(folder: Path, **changes: Any) -> Plan:
    """Return a plan of five steps with every coordinate, with some of its keys replaced."""
    basis = {"kind": "coordinates", "numbers": None, "fit_steps": 1}
    model = {"factory": "tests.tasks.digits:network", "args": {"dropout": 0.0}}
    settings = {
        "segment_steps": 2,
        "basis": basis,
        "model": model,
        "stages": [{"steps": 5, "batch_size": 12}],
    }
    return small_plan(folder, **settings | changes)


class Stop(Callback):
    """Ends training by an error before the fourth step."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError


def fit(
    plan: Plan,
    gives_losses: bool,
    *more: Callback,
    checkpoint: str | None = None,
    compiled: Callable[[nn.Module], Any] = lambda net: net,
    **settings: Any,
) -> tuple[RecordingCallback, Module]:
    """Train with two micro-batches of 6 per step, clipped."""
    callback = RecordingCallback(plan, 0, model="net")
    module = Module(compiled(Run.of_plan(plan).model()), gives_losses)
    trainer = Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=[callback, *more],
        default_root_dir=plan.root,
        **QUIET | settings,
    )
    trainer.fit(
        module,
        DataLoader(Numbers(range(140)), batch_size=6, collate_fn=collate),
        ckpt_path=checkpoint,
    )
    return callback, module


PRECISIONS: dict[str, dict[str, Any]] = {
    "single": {},
    "mixed": {"precision": "bf16-mixed"},
    "half": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("gives_losses", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_contributions_are_those_of_autograd(
    folder: Path, precision: str, gives_losses: bool
) -> None:
    changes = {"dtype": "bfloat16"} if precision == "half" else {}
    name = f"losses-{precision}-{gives_losses}"
    plan = make_plan(folder, run=name, segment_steps=1, **changes)
    _, module = fit(plan, gives_losses, **PRECISIONS[precision])
    run = Run.of_plan(plan)
    stage = run.folder.stage(0)
    facts = stage.trained.manifest.facts
    counts = [facts[name] for name in ("samples", "steps", "segments", "by")]
    assert counts == [140, 5, 5, "lightning"]
    for step in range(5):
        check_segment(run, step, gives_losses, half=precision != "single")
    for name, tensor in module.net.state_dict().items():
        assert torch.equal(tensor, read_checkpoint(stage.segment(4))[f"model.{name}"])


@pytest.mark.parametrize("gives_losses", [True, False])
def test_a_step_that_a_scaler_skips_is_recorded_as_one_that_changes_nothing(
    folder: Path, gives_losses: bool
) -> None:
    """The loss is multiplied by 2^21 at first, which overflows in float16."""
    plan = make_plan(folder, run=f"scaled{gives_losses}", segment_steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
    fit(plan, gives_losses, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    run = Run.of_plan(plan)
    stage = run.folder.stage(0)
    # The scaler halves its factor at every overflow.
    skipped = round(math.log2(2**21 / scaler.get_scale()))
    assert 0 < skipped < 4
    start = read_checkpoint(stage.start)
    for step in range(skipped):
        segment, first = read_ledger(stage.segment(step))
        assert first == step
        assert len(segment["samples"]) == 0
        after = read_checkpoint(stage.segment(step))
        assert all(torch.equal(after[n], t) for n, t in start.items() if n.startswith("model."))
    for step in range(skipped, 5):
        check_segment(run, step, gives_losses, half=True)
    score_small(run, 0)
    assert stage.scores.committed


def check_segment(run: Run, step: int, gives_losses: bool, half: bool = False) -> None:
    """Compare a recorded step with autograd in float32, one sample at a time."""
    stage = run.folder.stage(0)
    net = run.model().float()
    project = run.basis(run.bindings(net)).project_tensors
    segment, _ = read_ledger(stage.segment(step))
    load_weights(net, stage.segment(step - 1) if step else stage.start)
    numbers = list(range(12 * step, 12 * step + 12))
    assert segment["samples"].tolist() == numbers
    losses, projected = [], []
    for number in numbers:
        batch = collate([number])
        net.zero_grad()
        loss = functional.cross_entropy(net(batch["x"]), batch["y"])
        loss.backward()
        losses.append(float(loss.detach()))
        projected.append(project(read_gradients(net)))
    weights = torch.full((12,), 1 / 12)
    if gives_losses:
        weights = torch.linspace(0.1, 0.4, 6).repeat(2) / 2
    gradients = torch.stack(projected)
    weights = weights * min(1.0, 0.5 / float((weights[:, None] * gradients).sum(0).norm()))
    limit = 2e-2 if half else 1e-4
    torch.testing.assert_close(segment["weights"].float(), weights, rtol=limit, atol=0)
    expected = weights[:, None] * gradients
    distances = (segment["contributions"] - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(distances.max()) < limit
    if gives_losses:
        torch.testing.assert_close(
            segment["losses"].float(), torch.tensor(losses), rtol=limit, atol=1e-5
        )
    else:
        assert segment["losses"].isnan().all()


def test_a_compiled_model_runs_compiled_outside_recorded_steps(folder: Path) -> None:
    """Step 0 is recorded for the curvature, and steps 2 and 3 in a window."""
    torch._dynamo.reset()
    counter = CompileCounter()
    windows = [{"start": 2, "stop": 4, "unit": "steps"}]
    stage = {"steps": 5, "batch_size": 12, "windows": windows, "stride": 5}
    plan = make_plan(folder, run="compiled", segment_steps=1, stages=[stage])
    fit(plan, True, compiled=lambda net: torch.compile(net, backend=counter))
    assert counter.frame_count == 1
    for step in (0, 2, 3):
        check_segment(Run.of_plan(plan), step, True)


def test_it_resumes_with_the_trainer(folder: Path) -> None:
    """It repeats the steps that the ledger has, and a trained stage is not trained again."""
    whole, plan, saved = (make_plan(folder, run=name) for name in ("whole", "stopped", "saved"))
    _, ended = fit(whole, True)
    for run in (plan, saved):
        with pytest.raises(ZeroDivisionError):
            fit(run, True, Stop())
        assert len(Run.of_plan(run).folder.stage(0).segments()) == 1
    fit(plan, True)
    assert_equal_ledgers(Run.of_plan(whole), Run.of_plan(plan), 0)
    _, module = fit(plan, True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ended.net.parameters(), module.net.parameters(), strict=True)
    )


def test_manual_optimization_is_refused(folder: Path) -> None:
    plan = make_plan(folder, run="manual")
    module = Module(Run.of_plan(plan).model(), True)
    module.automatic_optimization = False
    callback = RecordingCallback(plan, 0, model="net")
    trainer = Trainer(max_steps=1, callbacks=[callback], default_root_dir=plan.root, **QUIET)
    with pytest.raises(PlanError, match="one optimizer under automatic optimization"):
        trainer.fit(module, DataLoader(Numbers(range(12)), batch_size=6, collate_fn=collate))


class Centered(Module):
    """A module whose loss depends on the other samples of the batch."""

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        logits = self.net(batch["x"])
        loss = functional.cross_entropy(logits - logits.mean(0), batch["y"])
        self.log("loss", loss)
        return loss


def test_mixed_samples_are_refused(folder: Path) -> None:
    plan = make_plan(folder, run="mixed")
    module = Centered(Run.of_plan(plan).model(), False)
    callback = RecordingCallback(plan, 0, model="net")
    trainer = Trainer(max_steps=1, callbacks=[callback], default_root_dir=plan.root, **QUIET)
    with pytest.raises(SecateurError, match="mixes a batch's samples"):
        trainer.fit(module, DataLoader(Numbers(range(12)), batch_size=6, collate_fn=collate))
