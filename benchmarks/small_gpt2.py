"""A small GPT-2 on the Python language reference, which can be trained again without some texts.

The settings follow bergson's leaderboard (GPT-2 on WikiText): AdamW with betas of .9 and .999, a
warm-up over a quarter of the steps, a linear decay to a tenth, 4 epochs, no dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import Workload

LR = 1e-3
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Size:
    """How large the model and its data are.

    Attributes:
        samples: texts to train on.
        questions: held-out texts.
        tokens: predicted per text.
        batch: texts per step.
        vocabulary: of the byte-pair encoding.
    """

    samples: int = 400
    questions: int = 20
    tokens: int = 32
    batch: int = 16
    epochs: int = 4
    layers: int = 2
    width: int = 48
    heads: int = 4
    vocabulary: int = 512


@dataclass(frozen=True)
class TextTraining:
    """A training on texts.

    Attributes:
        workload: the training. The questions are its validation samples, one target each.
        texts: tokens of all texts, first the samples to train on, then the questions.
        samples: number of texts to train on.
        tokenizer: of the texts.
    """

    workload: Workload
    texts: Tensor
    samples: int
    tokenizer: Any

    def retrain(self, removed: Tensor) -> Tensor:
        """Train to the end without some samples, and return the loss of every question.

        Initial weights, batches and the weights of the other samples stay as they are.

        Args:
            removed: whether each sample is left out, `samples`.
        """
        workload = self.workload
        model = workload.model()
        optimizer = workload.optimizer(model)
        for step, ids in enumerate(workload.batches):
            for group in optimizer.param_groups:
                group["lr"] = workload.rate(step)
            optimizer.zero_grad()
            (workload.losses(model, ids) * ~removed[ids] / len(ids)).sum().backward()
            optimizer.step()
        with torch.no_grad():
            return workload.target_losses(model)


def make_text_training(seed: int, size: Size) -> TextTraining:
    """Return a training on consecutive texts of the manual. The questions lie among them."""
    tokenizer, tokens = encode_manual(size.vocabulary)
    length = size.tokens + 1
    pieces = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    count = size.samples + size.questions
    first = int(torch.randint(len(pieces) - count + 1, (1,), generator=generator))
    texts = pieces[first : first + count][torch.randperm(count, generator=generator)]
    batches = [
        batch
        for _ in range(size.epochs)
        for batch in torch.randperm(size.samples, generator=generator).split(size.batch)
    ]
    steps = len(batches)

    def rate(step: int) -> float:
        warmup = math.ceil(steps / 4)
        if step < warmup:
            return LR * (step + 1) / warmup
        return LR * (1 - 0.9 * (step - warmup) / (steps - warmup))

    workload = Workload(
        "GPT-2",
        lambda: _make_model(seed, size),
        lambda model: torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY),
        batches,
        rate,
        lambda model, ids: _token_losses(model, texts[ids]).mean(1).double(),
        torch.arange(size.samples, count),
        [],
        lambda ids: (texts[ids, :-1], texts[ids, 1:]),
    )
    return TextTraining(workload, texts, size.samples, tokenizer)


@cache
def encode_manual(vocabulary: int) -> tuple[Any, list[int]]:
    """Return a byte-pair encoding of the Python language reference, and its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer, tokenizer.encode(text).ids


def _make_model(seed: int, size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size.vocabulary,
        # Twice the texts: bergson puts as many tokens in a batch as the model has positions.
        n_positions=2 * (size.tokens + 1),
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        # Some of the other projects' trainers would untie a head that is the embedding.
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="eager",
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _token_losses(model: nn.Module, texts: Tensor) -> Tensor:
    """Return the loss of every predicted token, `texts tokens`."""
    logits = model(input_ids=texts[:, :-1]).logits
    labels = texts[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)
