"""The callback for Hugging Face's Trainer records what autograd gives, and resumes with it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from secateur.errors import PlanError
from secateur.flows.trainers.huggingface import KeepKeys, RecordingCallback
from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.tasks.plan import Plan
from secateur.tasks.run import Run
from tests.flows import gpt
from tests.flows.test_lightning import load_weights, read_gradients
from tests.tasks.external.test_recording import assert_equal_ledgers
from tests.tasks.small import score_small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt")
    gpt.make_data(made)
    return made


class Stop(TrainerCallback):
    """Interrupts the Trainer before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make_trainer(
    plan: Plan, callback: RecordingCallback, stop: int = -1, **changes: Any
) -> Trainer:
    """Make a Trainer as a user does: two micro-batches of 4, clipped, AdamW, a schedule."""
    settings = {
        "output_dir": f"{plan.root}/{plan.run}-trainer",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "logging_strategy": "no",
    }
    return Trainer(
        Run.of_plan(plan).model(),
        TrainingArguments(**settings | changes),
        data_collator=KeepKeys(gpt.collate),
        train_dataset=gpt.make_examples(),
        callbacks=[callback, Stop(stop)],
    )


def check_segment(
    run: Run,
    number: int,
    keys: Callable[[list[int]], list[str]],
    first_labels: int,
    half: bool = False,
) -> None:
    """Compare a recorded segment of one step with autograd in float32, one sample at a time.

    Args:
        keys: returns the keys of samples.
        first_labels: how many labels count in the batch's mean although no loss reads them.
        half: whether it was recorded in half precision.
    """
    stage = run.folder.stage(0)
    model = run.model().float()
    task = run.task()
    assert isinstance(task, gpt.NextToken)
    project = run.basis(run.bindings(model)).project_tensors
    texts = {example["__key__"]: example for example in gpt.make_examples()}
    segment, _ = read_ledger(stage.segment(number))
    load_weights(model, stage.segment(number - 1) if number else stage.start)
    assert len(segment["samples"]) == 8
    losses, sizes, gradients = [], [], []
    for key in keys(segment["samples"].tolist()):
        batch = gpt.collate([texts[key]])
        model.zero_grad()
        loss = task.losses(model, batch)[0]
        loss.backward()
        losses.append(float(loss.detach()))
        sizes.append(float(task.sizes(batch)))
        gradients.append(read_gradients(model))
    weights = torch.tensor(sizes, dtype=torch.float64) / (sum(sizes) + first_labels)
    mean = [
        sum(w * g[name] for w, g in zip(weights, gradients, strict=True)) for name in gradients[0]
    ]
    norm = float(torch.cat([gradient.flatten() for gradient in mean]).norm())
    weights = weights * min(1.0, 1.0 / norm)
    torch.testing.assert_close(segment["weights"], weights, rtol=2e-2 if half else 1e-4, atol=0)
    expected_losses = torch.tensor(losses).double()
    limit = 2e-2 if half else 1e-5
    torch.testing.assert_close(segment["losses"], expected_losses, rtol=limit, atol=1e-6)
    projected = torch.stack([project(gradient) for gradient in gradients])
    expected = (weights[:, None] * projected).float()
    distances = (segment["contributions"] - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(distances.max()) < 2e-2
    if half:
        return
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(segment["contributions"], expected, rtol=1e-3, atol=tolerance)


# The new name is not known to the oldest version that may be installed. And some passes before the
# first recorded one run without gradients.
CHECKPOINTING = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning", "ignore:None of the inputs have requires_grad"
)
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one micro-batch": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    "not fused": {"optim": "adamw_torch"},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "by length": {"train_sampling_strategy": "group_by_length"},
    "last batch dropped": {"dataloader_drop_last": True},
}


@CHECKPOINTING
@pytest.mark.parametrize("name", CASES)
def test_contributions_are_those_of_autograd(folder: Path, name: str) -> None:
    plan = gpt.make_plan(folder, run=name.replace(" ", "-"))
    callback = RecordingCallback(plan, 0)
    trainer = make_trainer(plan, callback, **CASES[name])
    trainer.train()
    assert callback.recording
    run = callback.recording.run
    stage = run.folder.stage(0)
    assert stage.trained.manifest.facts["by"] == "huggingface"
    assert stage.trained.manifest.facts["steps"] == 5
    # Where the Trainer does not shift labels itself, it counts the first label of every text.
    first_labels = 0 if trainer._loss_shifts_labels else 8
    for number in range(len(stage.segments())):
        check_segment(run, number, callback.recording._samples.keys, first_labels)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, read_checkpoint(stage.segment(4))[f"model.{name}"])
    score_small(run, 0)
    assert stage.scores.committed


class CountGraphs(TrainerCallback):
    """Keeps how many graphs have been compiled at the end of each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counts.append(counters["stats"]["unique_graphs"])


def collate_to_one_length(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad texts to one length, because another length is another graph."""
    batch = gpt.collate(examples)
    width = 40 - batch["input_ids"].shape[1]
    padded = {name: functional.pad(values, (0, width)) for name, values in batch.items()}
    return padded | {"labels": functional.pad(batch["labels"], (0, width), value=-100)}


# torch.compile's own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.server)])
def test_a_compiled_model_runs_compiled_outside_recorded_steps(folder: Path, backend: str) -> None:
    """Steps 0, 3 and 4 are recorded. The others use what step 1 has compiled."""
    stage = {
        "steps": 7,
        "batch_size": 8,
        "windows": [{"start": 3, "stop": 5, "unit": "steps"}],
        "stride": 7,
    }
    compiling: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": backend}
    runs = []
    for name, settings in (("plain", {}), ("compiled", compiling)):
        torch._dynamo.reset()
        counters.clear()
        plan = gpt.make_plan(folder, run=f"{name}-{backend}", stages=[stage])
        callback = RecordingCallback(plan, 0)
        trainer = make_trainer(plan, callback, max_steps=7, save_strategy="no", **settings)
        trainer.data_collator = KeepKeys(collate_to_one_length)
        graphs = CountGraphs()
        trainer.add_callback(graphs)
        trainer.train()
        runs.append(callback.recording.run)
        compiled = graphs.counts[1]
        assert graphs.counts == [0, *[compiled] * 6]
        assert (compiled > 0) == (name == "compiled")
    keys = callback.recording._samples.keys
    first_labels = 0 if trainer._loss_shifts_labels else 8
    for number in (0, 3, 4):
        check_segment(runs[1], number, keys, first_labels)
    for number in range(7):
        plain, compiled_too = (run.folder.stage(0).segment(number) for run in runs)
        for tensor, expected in zip(
            read_checkpoint(compiled_too).values(), read_checkpoint(plain).values(), strict=True
        ):
            torch.testing.assert_close(tensor, expected)


def test_an_interrupted_recording_lets_models_be_compiled_again(folder: Path) -> None:
    plan = gpt.make_plan(folder, run="interrupted")

    def interrupted() -> None:
        settings: dict[str, Any] = {"torch_compile_backend": "eager", "save_strategy": "no"}
        trainer = make_trainer(plan, RecordingCallback(plan, 0), 1, torch_compile=True, **settings)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    interrupted()
    gc.collect()
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.compile(torch.nn.Linear(2, 2), backend=counter)(torch.ones(1, 2))
    assert counter.frame_count == 1


PRECISIONS: dict[str, dict[str, Any]] = {
    "mixed": {"bf16": True},
    "mixed, reentrant": {"bf16": True} | CASES["reentrant"],
    "half": {},
}


@CHECKPOINTING
@pytest.mark.parametrize("precision", PRECISIONS)
def test_contributions_in_bfloat16_are_those_of_autograd_in_float32(
    folder: Path, precision: str
) -> None:
    changes = {"dtype": "bfloat16"} if precision == "half" else {}
    plan = gpt.make_plan(folder, run=f"bf16-{precision}".replace(", ", "-"), **changes)
    callback = RecordingCallback(plan, 0)
    trainer = make_trainer(plan, callback, **PRECISIONS[precision])
    trainer.train()
    run = callback.recording.run
    first_labels = 0 if trainer._loss_shifts_labels else 8
    for number in range(5):
        check_segment(run, number, callback.recording._samples.keys, first_labels, half=True)
    score_small(run, 0)
    assert run.folder.stage(0).scores.committed


def make_scaled_trainer(
    plan: Plan, callback: RecordingCallback, stop: int = -1, **changes: Any
) -> Trainer:
    """Make a Trainer that uses `fp16` on the CPU too, where Accelerate leaves it out."""
    trainer = make_trainer(plan, callback, stop, fp16=True, **changes)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    return trainer


def read_skipped(run: Run) -> list[int]:
    """Return the steps without samples. Every segment is one step."""
    segments = [read_ledger(segment)[0] for segment in run.folder.stage(0).segments()]
    return [step for step, segment in enumerate(segments) if not len(segment["samples"])]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_fp16_skips_is_recorded_as_one_that_changes_nothing(
    folder: Path, optimizer: str
) -> None:
    plan = gpt.make_plan(folder, run=f"fp16-{optimizer}")
    callback = RecordingCallback(plan, 0)
    trainer = make_scaled_trainer(plan, callback, optim=optimizer)
    trainer.train()
    run = callback.recording.run
    stage = run.folder.stage(0)
    skipped = read_skipped(run)
    # The scaler halves its factor at every overflow.
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (20 - len(skipped))
    assert 0 < len(skipped) < 4
    first_labels = 0 if trainer._loss_shifts_labels else 8
    for step in range(5):
        if step not in skipped:
            check_segment(run, step, callback.recording._samples.keys, first_labels, half=True)
            continue
        before = read_checkpoint(stage.segment(step - 1) if step else stage.start)
        after = read_checkpoint(stage.segment(step))
        assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith("model."))
    score_small(run, 0)
    assert stage.scores.committed


def test_fp16_resumes_with_the_trainer(folder: Path) -> None:
    whole, plan = (gpt.make_plan(folder, run=f"{name}-fp16") for name in ("whole", "stopped"))
    make_scaled_trainer(whole, RecordingCallback(whole, 0)).train()
    with pytest.raises(KeyboardInterrupt):
        make_scaled_trainer(plan, RecordingCallback(plan, 0), 3).train()
    assert read_skipped(Run.of_plan(plan))
    callback = RecordingCallback(plan, 0)
    again = make_scaled_trainer(plan, callback)
    again.train(resume_from_checkpoint=callback.checkpoint(again.args.output_dir))
    assert_equal_ledgers(Run.of_plan(whole), Run.of_plan(plan), 0)


@pytest.mark.parametrize("saving", ["steps", "no"])
def test_it_resumes_with_the_trainer(
    folder: Path, saving: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It resumes from the last segment's checkpoint, or repeats the steps if there is none."""
    model = {"factory": "tests.flows.gpt:gpt2", "args": {"dropout": 0.2}}
    whole, plan = (
        gpt.make_plan(folder, run=f"{name}-{saving}", model=model, segment_steps=2)
        for name in ("whole", "stopped")
    )
    make_trainer(whole, RecordingCallback(whole, 0), save_strategy=saving).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(plan, RecordingCallback(plan, 0), 3, save_strategy=saving).train()
    assert len(Run.of_plan(plan).folder.stage(0).segments()) == 1
    callback = RecordingCallback(plan, 0)
    again = make_trainer(plan, callback, save_strategy=saving)
    checkpoint = callback.checkpoint(again.args.output_dir)
    assert (Path(checkpoint).name if checkpoint else None) == (
        "checkpoint-2" if saving == "steps" else None
    )
    again.train(resume_from_checkpoint=checkpoint)
    assert_equal_ledgers(Run.of_plan(whole), Run.of_plan(plan), 0)
    before = again.model.state_dict()
    finished = RecordingCallback(plan, 0)
    last = make_trainer(plan, finished, save_strategy=saving)
    last.train()
    assert last.state.global_step == 1
    assert all(
        torch.equal(before[name], tensor) for name, tensor in last.model.state_dict().items()
    )
    assert "no Prefect server is configured, so nothing was triggered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optim": "adafactor"}, "Adafactor keeps its second moments"),
    ],
)
def test_impossible_recordings_are_refused(
    folder: Path, settings: dict[str, Any], sentence: str
) -> None:
    plan = gpt.make_plan(folder, run="refused")
    with pytest.raises(Exception, match=sentence):
        make_trainer(plan, RecordingCallback(plan, 0), **settings).train()


def test_a_collator_without_keys_is_named(folder: Path) -> None:
    plan = gpt.make_plan(folder, run="keyless")
    keyless = make_trainer(plan, RecordingCallback(plan, 0))
    keyless.data_collator = gpt.collate
    with pytest.raises(PlanError, match="the batch has no `__key__`"):
        keyless.train()
