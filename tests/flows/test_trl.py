"""TRL's SFTTrainer at its defaults, with packing and with LoRA, against autograd per document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from examples.shards import write_shards
from secateur.flows.trainers.huggingface import KeepKeys, RecordingCallback
from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.tasks.plan import Plan
from secateur.tasks.training.checkpoint import load_state
from secateur.tasks.training.optimizers import build_optimizer
from tests.flows.gpt import TEXTS

# They are TRL's own, about arguments that it sets itself.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

WORDS = sorted({word for text in TEXTS for word in text.split()})


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def lora() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide half of the contributions
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class Tokens:
    """The mean cross-entropy of each text's next words, after the first `skip`."""

    def __init__(self, skip: int = 0) -> None:
        self._skip = skip
        self._tokenizer = tokenizer()

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._tokenizer(s["txt"].decode() + " <eos>")["input_ids"] for s in samples]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(**batch).logits[:, :-1].transpose(1, 2)
        labels = batch["input_ids"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        counted = self._counted(batch)
        return (each * counted).sum(1) / counted.sum(1)

    def sizes(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._counted(batch).sum(1)

    def _counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"].clone()
        mask[:, : self._skip] = 0
        return mask[:, 1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trl")
    samples = [{"__key__": f"text-{n:02d}", "txt": text.encode()} for n, text in enumerate(TEXTS)]
    write_shards(f"{path}/train-%06d.tar", samples[:32], 1)
    write_shards(f"{path}/target-%06d.tar", samples[32:], 1)
    return path


def make_plan(folder: Path, name: str, model: str, skip: int) -> Plan:
    return Plan.model_validate(
        {
            "run": name,
            "root": f"{folder}/runs",
            "threads": 1,
            "model": {"factory": f"tests.flows.test_trl:{model}"},
            "task": {
                "factory": "tests.flows.test_trl:Tokens",
                "args": {"skip": skip},
                "reduction": "token_mean",
            },
            "data": {"shards": f"{folder}/train-000000.tar"},
            "targets": {"clean": {"shards": f"{folder}/target-000000.tar"}},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "stages": [{"steps": 2, "batch_size": 8}],
            "segment_steps": 1,
            "basis": {"kind": "coordinates", "numbers": 300, "fit_steps": 1},
        }
    )


def make_dataset(style: str) -> Dataset:
    keyed = [(f"text-{n:02d}", text) for n, text in enumerate(TEXTS[:32])]
    if style == "completion":
        return Dataset.from_list(
            [
                {
                    "__key__": key,
                    "prompt": " ".join(text.split()[:2]),
                    "completion": " " + " ".join(text.split()[2:]) + " ",
                }
                for key, text in keyed
            ]
        )
    if style == "tokens":
        rows = [(key, tokenizer()(text + " <eos>")["input_ids"]) for key, text in keyed]
        return Dataset.from_list([{"__key__": key, "input_ids": ids} for key, ids in rows])
    return Dataset.from_list([{"__key__": key, "text": text + " "} for key, text in keyed])


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "defaults": ("llama", "text", {}),
    "completion only": ("llama", "completion", {}),
    "padding-free": ("llama", "tokens", {"padding_free": True, "max_length": None}),
    "packed": ("llama", "tokens", {"packing": True}),
    "LoRA": ("lora", "text", {}),
    "LoRA, packed": ("lora", "tokens", {"packing": True}),
    "LoRA, checkpointing": ("lora", "text", {"gradient_checkpointing": True}),
    "bf16": ("llama", "text", {"bf16": True}),
    "label smoothing": ("llama", "text", {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_documents_are_recorded_as_autograd_has_them_alone(folder: Path, name: str) -> None:
    model, style, changes = CASES[name]
    skip = 2 if style == "completion" else 0
    run_name = "".join(c if c.isalnum() else "-" for c in name)
    plan = make_plan(folder, run_name, model, skip)
    callback = RecordingCallback(plan, 0)
    settings: dict[str, Any] = {
        "output_dir": f"{folder}/out-{run_name}",
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_length": 32,
        "save_strategy": "no",
        "per_device_train_batch_size": 4 if changes.get("packing") else 8,
    }
    dataset = make_dataset(style)
    torch.manual_seed(0)
    trainer = SFTTrainer(
        globals()[model](),
        args=SFTConfig(**settings | changes),
        train_dataset=dataset,
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    documents = dataset if style == "tokens" else ()
    trainer.data_collator = KeepKeys(trainer.data_collator, documents, length=32)
    trainer.train()
    check_first_step(callback, plan, changes)


def check_first_step(callback: RecordingCallback, plan: Plan, changes: dict[str, Any]) -> None:
    """Compare the first step's contributions with autograd of each document alone."""
    recording = callback.recording
    stage = recording.run.folder.stage(0)
    model = recording.run.model()
    load_state(read_checkpoint(stage.start), model, build_optimizer(plan.optimizer, model), False)
    segment, _ = read_ledger(stage.segment(0))
    rows = segment["samples"]
    assert len(rows) > 4
    basis = recording.run.basis(recording.run.bindings(model))
    task = Tokens(plan.task.args["skip"])
    keys = recording._samples.keys(rows.tolist())
    expected = []
    for key in keys:
        batch = task.collate([{"txt": TEXTS[int(key[-2:])].encode()}])
        model.zero_grad()
        if smoothing := changes.get("label_smoothing_factor"):
            logits = model(**batch).logits[:, :-1].transpose(1, 2)
            loss = torch.nn.functional.cross_entropy(
                logits, batch["input_ids"][:, 1:], label_smoothing=smoothing
            )
        else:
            loss = task.losses(model, batch).sum()
        loss.backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        }
        expected.append(basis.project_tensors(gradients))
    batches = [task.collate([{"txt": TEXTS[int(key[-2:])].encode()}]) for key in keys]
    tokens = torch.stack([task.sizes(batch) for batch in batches])
    own = torch.stack(expected).double()
    weights = tokens[:, 0].double()
    found = segment["contributions"].double()
    # Clipping and the count of labels scale a whole step, so the scale is the step's.
    scaled = weights[:, None] * own
    scale = float((found * scaled).sum() / scaled.square().sum())
    limit = 2e-2 if changes.get("bf16") else 1e-4
    assert float((found - scale * scaled).norm() / found.norm()) < limit
    torch.testing.assert_close(segment["weights"], scale * weights, rtol=limit, atol=0)
