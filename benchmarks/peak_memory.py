"""Peak memory of training steps with recording over that of steps without, for a Llama.

`python -m benchmarks.peak_memory [--repeats 5] [--steps 3]`: 12 layers of width 256, 8 texts of 256
tokens, 2,048 coefficients, float32 and one thread. Every run is a process of its own. Its peak is
the largest resident set during the steps, less that after the imports (Linux only). The C library
returns every tensor of 256 KiB or more as soon as it is free, so that a peak is of tensors in use,
not of what the heap keeps for later.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.resident_set import measure_growth, run_apart
from benchmarks.timing import format_spread
from secateur.flows.tables import print_table
from secateur.influence.recorder import Recorder

VOCABULARY, BATCH, LENGTH, COEFFICIENTS = 4096, 8, 256, 2048
CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}
ROWS = [
    ("SGD", "none"),
    ("AdamW", "none"),
    ("SGD", "reentrant"),
    ("AdamW", "reentrant"),
    ("SGD", "non-reentrant"),
    ("AdamW", "non-reentrant"),
]


def build_model(checkpointing: str) -> nn.Module:
    """Return the Llama, with gradient checkpointing of a kind."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # The first checkpointed part would have no input with a gradient.
        model.enable_input_require_grads()
    return model


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of each text."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def train(optimizer_name: str, checkpointing: str, recorded: bool, steps: int) -> None:
    """Train for some steps."""
    model = build_model(checkpointing)
    kinds: dict[str, Any] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
    optimizer = kinds[optimizer_name](model.parameters(), 1e-4)
    recorder = Recorder(model, optimizer, coefficients=COEFFICIENTS) if recorded else None
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
        optimizer.zero_grad()
        if recorder is None:
            losses_of(model, ids).mean().backward()
        else:
            with recorder.batch(torch.arange(BATCH) + step * BATCH) as batch:
                losses = losses_of(model, ids)
                batch.losses = losses
                losses.mean().backward()
        optimizer.step()


def measure(optimizer: str, checkpointing: str, recorded: bool, steps: int) -> float:
    """Return the peak in MiB of training in a process of its own."""
    kind = "recorded" if recorded else "plain"
    arguments = ["--steps", str(steps), "--run", optimizer, checkpointing, kind]
    return run_apart("benchmarks.peak_memory", *arguments)


def main() -> None:
    """Print one row per optimizer and kind of checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.run:
        optimizer, checkpointing, recorded = arguments.run
        run = partial(train, optimizer, checkpointing, recorded == "recorded", arguments.steps)
        print(measure_growth(run))
        return
    table = Table("optimizer", "checkpointing", "plain MiB", "recorded MiB", "recorded over plain")
    for row in ROWS:
        pairs = [
            [measure(*row, recorded, arguments.steps) for recorded in (False, True)]
            for _ in range(arguments.repeats)
        ]
        plain, with_recording = zip(*pairs, strict=True)
        ratios = [recorded / plain for plain, recorded in pairs]
        cells = [format_spread(list(plain), 0), format_spread(list(with_recording), 0)]
        table.add_row(*row, *cells, format_spread(ratios))
    print_table(table)


if __name__ == "__main__":
    main()
