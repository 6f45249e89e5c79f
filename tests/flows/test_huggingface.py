"""What the callback records of Hugging Face's Trainer is autograd's, one sample at a time; and it resumes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from secateur.errors import PlanError
from secateur.flows.trainers.huggingface import KeepKeys, RecordingCallback
from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from tests.flows import gpt
from tests.tasks.small import score_small
from tests.tasks.test_outside import assert_equal_ledgers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt")
    gpt.make_data(made)
    return made


class Stop(TrainerCallback):
    """Ends the process, as far as the Trainer knows, before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(plan: Plan, callback: RecordingCallback, stop: int = -1, **changes: Any) -> Trainer:
    """As a user writes it; two micro-batches of 4 a step, clipped, with AdamW and a schedule."""
    settings = {
        "output_dir": f"{plan.root}/{plan.run}-trainer", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": 5, "learning_rate": 0.01, "weight_decay": 0.1, "remove_unused_columns": False, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "logging_strategy": "no",
    }  # fmt: skip
    return Trainer(
        Run.of(plan).model(), TrainingArguments(**settings | changes), data_collator=KeepKeys(gpt.collate),
        train_dataset=gpt.examples(), callbacks=[callback, Stop(stop)],
    )  # fmt: skip


def test_contributions_are_autograds(folder: Path) -> None:
    plan = gpt.plan(folder)
    callback = RecordingCallback(plan, 0)
    trained = trainer(plan, callback)
    trained.train()
    run = callback.recording.run
    stage = run.folder.stage(0)
    assert stage.trained.manifest.facts["by"] == "huggingface"
    assert stage.trained.manifest.facts["steps"] == 5
    model, task = run.model(), run.task()
    assert isinstance(task, gpt.NextToken)
    project = run.basis(run.bindings(model)).project_tensors
    texts = {e["__key__"]: e for e in gpt.examples()}
    keys = callback.recording._samples.keys
    for number, ledger in enumerate(stage.segments()):
        segment, _ = read_ledger(ledger)
        before = read_checkpoint(stage.segment(number - 1) if number else stage.start)
        model.load_state_dict(
            {n.removeprefix("model."): t for n, t in before.items() if n.startswith("model.")}
        )
        assert len(segment["samples"]) == 8
        own, sizes = [], []
        for key in keys(segment["samples"].tolist()):
            batch = gpt.collate([texts[key]])
            model.zero_grad()
            loss = task.losses(model, batch)[0]
            loss.backward()
            sizes.append(float(task.sizes(batch)))
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
            own.append((float(loss.detach()), project(gradients), gradients))
        counted = sum(sizes) + (
            0 if trained._loss_shifts_labels else 8
        )  # GPT-2's first labels, which no loss reads, count
        weights = torch.tensor(sizes, dtype=torch.float64) / counted
        whole = [
            sum(w * g[n] for w, (_, _, g) in zip(weights, own, strict=True)) for n in own[0][2]
        ]
        norm = float(torch.cat([g.flatten() for g in whole]).norm())
        weights = weights * min(1.0, 1.0 / norm)
        torch.testing.assert_close(segment["weights"], weights, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            segment["losses"],
            torch.tensor([loss for loss, _, _ in own]).double(),
            rtol=1e-5,
            atol=1e-6,
        )
        expected = torch.stack([w * g for w, (_, g, _) in zip(weights, own, strict=True)]).float()
        torch.testing.assert_close(
            segment["contributions"], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, read_checkpoint(stage.segment(4))[f"model.{name}"])
    score_small(run, 0)
    assert stage.scores.committed


@pytest.mark.parametrize("saving", ["steps", "no"])
def test_it_resumes_with_the_trainer(
    folder: Path, saving: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint of the last segment, or, where the Trainer saves none, by repeating what the ledger has."""
    dropping = {"factory": "tests.flows.gpt:gpt2", "args": {"dropout": 0.2}}
    whole, plan = (
        gpt.plan(folder, run=f"{name}-{saving}", model=dropping, segment_steps=2)
        for name in ("whole", "stopped")
    )
    trainer(whole, RecordingCallback(whole, 0), save_strategy=saving).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(plan, RecordingCallback(plan, 0), 3, save_strategy=saving).train()
    assert len(Run.of(plan).folder.stage(0).segments()) == 1
    callback = RecordingCallback(plan, 0)
    again = trainer(plan, callback, save_strategy=saving)
    checkpoint = callback.checkpoint(again.args.output_dir)
    assert (Path(checkpoint).name if checkpoint else None) == (
        "checkpoint-2" if saving == "steps" else None
    )
    again.train(resume_from_checkpoint=checkpoint)
    assert_equal_ledgers(Run.of(whole), Run.of(plan), 0)
    before = again.model.state_dict()
    finished = RecordingCallback(plan, 0)
    last = trainer(plan, finished, save_strategy=saving)
    last.train()
    assert last.state.global_step == 1
    assert all(
        torch.equal(before[name], tensor) for name, tensor in last.model.state_dict().items()
    )
    assert "no Prefect server is configured, so nothing was triggered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"remove_unused_columns": True}, "set `remove_unused_columns=False`"),
        ({"label_smoothing_factor": 0.1}, "compute_loss_func or label smoothing"),
        ({"optim": "adafactor"}, "Adafactor is not known"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    folder: Path, settings: dict[str, Any], sentence: str
) -> None:
    plan = gpt.plan(folder, run="refused")
    with pytest.raises(Exception, match=sentence):
        trainer(plan, RecordingCallback(plan, 0), **settings).train()


def test_a_collator_without_keys_is_named(folder: Path) -> None:
    plan = gpt.plan(folder, run="keyless")
    keyless = trainer(plan, RecordingCallback(plan, 0))
    keyless.data_collator = gpt.collate
    with pytest.raises(PlanError, match="the batch carries no `__key__`"):
        keyless.train()
