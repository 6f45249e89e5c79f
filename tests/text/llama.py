"""A small Llama, and texts of different lengths for it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from secateur.huggingface import build_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TEXTS = ["An oak.", "The secateurs cut what the knife cannot.", "Prune in spring", "Ash"]


def llama(attention: str | None = None, **changes: Any) -> nn.Module:
    """Return a Llama whose weights are large enough that positions and contexts matter."""
    torch.manual_seed(0)
    config = CONFIG | {"initializer_range": 0.3} | changes
    model = build_model(config=config, attn_implementation=attention)
    return model.double()


def model_of(kind: str) -> nn.Module:
    """Return a small model of any type, with those of the settings that its configuration has."""
    known = CONFIG_MAPPING[kind]()
    more = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.3}
    special = {"bos_token_id": 1, "eos_token_id": 1}
    settings = {n: v for n, v in (CONFIG | more | special).items() if hasattr(known, n)}
    torch.manual_seed(0)
    # Dropout is off, because some types have it by default.
    return build_model(config=settings | {"model_type": kind}).eval()


def make_samples(texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    """Return texts as samples, with a JSON member that holds the text as prompt and answer."""
    return [
        {
            "__key__": f"text-{number}",
            "txt": text.encode(),
            "json": json.dumps({"prompt": text[:3], "answer": text[3:]}).encode(),
        }
        for number, text in enumerate(texts)
    ]


def loss_alone(model: nn.Module, tokens: list[int], prompt: int = 0) -> Tensor:
    """Return Hugging Face's own loss of one text, without padding and without its prompt."""
    ids = torch.tensor([tokens])
    labels = ids.clone()
    labels[:, :prompt] = -100
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient of a loss with respect to all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])
