"""Step time with recording over step time without, in turns in one process, for language models.

`python -m benchmarks.overhead [--repeats 5] [--steps 6] [--json FILE]`, with AdamW, 2,048
coordinates, 8 texts of 128 tokens, float32 and one thread. Times are CPU seconds of the process, so
that other programs on the machine disturb them less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.timing import format_spread
from examples.shards import write_shards
from secateur.flows.trainers.huggingface import KeepKeys, RecordingCallback
from secateur.influence.recorder import Recorder
from secateur.tasks.plan import Plan

TEXTS, LENGTH, BATCH, COORDINATES = 64, 128, 8, 2048
NEOX = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096}
PYTHIA = {"hidden_size": 128, "num_hidden_layers": 6, "vocab_size": 50304}  # 14 million parameters


def build_model(hidden_size: int, **shape: int) -> nn.Module:
    """Return a GPT-NeoX of a shape. A plan names this function."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        **shape,
    )
    return GPTNeoXForCausalLM(config)


def random_texts(vocab_size: int) -> Tensor:
    """Return texts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (TEXTS, LENGTH), generator=generator)


class Texts:
    """The learning task of the plan under which `Trainer` is recorded."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the token ids."""
        return {"input_ids": torch.tensor([list(sample["ids"]) for sample in samples])}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of each text."""
        return mean_losses(model, batch["input_ids"])


def mean_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of each text, from flattened logits."""
    logits = model(input_ids=ids).logits
    labels = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(ids.shape).sum(1) / (LENGTH - 1)


class LoopPair:
    """Two equal models, of which a plain loop trains one and a recorded loop the other."""

    def __init__(self, shape: dict[str, int], steps: int) -> None:
        self._texts = random_texts(shape["vocab_size"])
        self._steps = steps
        self._models = [build_model(**shape) for _ in range(2)]
        self._optimizers = [torch.optim.AdamW(m.parameters(), 1e-4) for m in self._models]
        self._recorder = Recorder(self._models[1], self._optimizers[1], coefficients=COORDINATES)

    def ratio(self) -> float:
        """Return the median, over some steps in turns, of recorded over plain seconds."""
        ratios = []
        for _ in range(self._steps):
            rows = torch.randperm(TEXTS)[:BATCH]
            plain = _seconds(self._plain, rows)
            ratios.append(_seconds(self._recorded, rows) / plain)
        self._recorder.take_segment()
        return statistics.median(ratios)

    def _plain(self, rows: Tensor) -> None:
        self._optimizers[0].zero_grad()
        mean_losses(self._models[0], self._texts[rows]).mean().backward()
        self._optimizers[0].step()

    def _recorded(self, rows: Tensor) -> None:
        self._optimizers[1].zero_grad()
        with self._recorder.batch(rows) as batch:
            losses = mean_losses(self._models[1], self._texts[rows])
            batch.losses = losses
            losses.mean().backward()
        self._optimizers[1].step()


class TrainerPair:
    """Runs of a `Trainer` with the callback and without, in turns."""

    def __init__(self, shape: dict[str, int], steps: int) -> None:
        self._shape = shape
        self._steps = steps
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0
        texts = random_texts(shape["vocab_size"]).tolist()
        self._examples = [
            {"__key__": f"text-{n:03d}", "input_ids": ids} for n, ids in enumerate(texts)
        ]
        samples = [{"__key__": e["__key__"], "ids": bytes(LENGTH)} for e in self._examples]
        write_shards(f"{self._folder.name}/train-%d.tar", samples, 1)
        write_shards(f"{self._folder.name}/target-%d.tar", samples[:2], 1)

    def ratio(self) -> float:
        """Return the median step of a recorded run over that of a plain run."""
        plain = self._step_seconds([])
        return self._step_seconds([RecordingCallback(self._plan(), 0)]) / plain

    def _plan(self) -> Plan:
        self._runs += 1
        folder = self._folder.name
        return Plan.model_validate(
            {
                "run": f"run-{self._runs}",
                "root": f"{folder}/runs",
                "threads": 1,
                "model": {"factory": "benchmarks.overhead:build_model", "args": self._shape},
                "task": {"factory": "benchmarks.overhead:Texts"},
                "data": {"shards": f"{folder}/train-0.tar"},
                "targets": {"texts": {"shards": f"{folder}/target-0.tar"}},
                "optimizer": {"kind": "adamw", "lr": 1e-4},
                "stages": [
                    {
                        "steps": self._steps,
                        "batch_size": BATCH,
                        "prune": {"policy": "top", "keep": 0.5},
                    }
                ],
                "segment_steps": self._steps + 1,  # so that no timed step commits a segment
                "basis": {"kind": "coordinates", "numbers": COORDINATES, "fit_steps": 1},
            }
        )

    def _step_seconds(self, callbacks: list[TrainerCallback]) -> float:
        clock = Clock()
        arguments = TrainingArguments(
            f"{self._folder.name}/trainer",
            per_device_train_batch_size=BATCH,
            max_steps=self._steps,
            learning_rate=1e-4,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        Trainer(
            build_model(**self._shape),
            arguments,
            data_collator=KeepKeys(collate) if callbacks else collate,
            train_dataset=self._examples,
            callbacks=[clock, *callbacks],
        ).train()
        # The first step makes the optimizer's state.
        return statistics.median(clock.seconds[1:])


class Clock(TrainerCallback):
    """Times each step of a `Trainer`, from the data to after the optimizer's step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Stop it, before a segment is committed at the end of the last step."""
        self.seconds.append(time.process_time() - self._start)


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return texts of equal length as a batch, with labels."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids}


def _seconds(step: Callable[[Tensor], None], rows: Tensor) -> float:
    start = time.process_time()
    step(rows)
    return time.process_time() - start


ROWS: dict[str, Callable[[int], LoopPair | TrainerPair]] = {
    "GPT-NeoX, 4 layers of width 256": partial(LoopPair, NEOX),
    "Pythia-14M": partial(LoopPair, PYTHIA),
    "Pythia-14M under Trainer": partial(TrainerPair, PYTHIA),
}


def main() -> None:
    """Print one row per model, and write all ratios to a file if `--json` names one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios = {}
    for name, make in ROWS.items():
        pair = make(arguments.steps)
        pair.ratio()  # warms up
        ratios[name] = [pair.ratio() for _ in range(arguments.repeats)]
        print(f"{name:34} recorded over plain  {format_spread(ratios[name], 3)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=2) + "\n")


if __name__ == "__main__":
    main()
