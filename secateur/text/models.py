"""Call a language model, of Hugging Face or of any other kind, for its logits."""

from __future__ import annotations

import inspect
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secateur.errors import PlanError

# Model types of Hugging Face that keep the documents of a row apart by their position ids. Each is
# tested. Many others take position ids, and let a document see the one before it: OPT, Falcon, and
# those that have a recurrent state.
PACKED_TYPES = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)


def compute_logits(
    model: nn.Module, batch: dict[str, Tensor], vocabulary: int
) -> Float[Tensor, "rows positions vocabulary"]:
    """Return the logits of the token after each position.

    A model whose `forward` has a parameter `input_ids` is called as Hugging Face's are: by keyword,
    with those of attention mask and position ids that it takes. Any other model is called with the
    token ids alone. It returns logits, or an object that has them as `logits`.

    Args:
        model: the model, which may be compiled or otherwise wrapped.
        batch: what `pad_documents` or `pack_documents` returned.
        vocabulary: one more than the largest token id that may occur.

    Raises:
        PlanError: the model has no room for so many tokens or positions, or cannot keep the
            documents of a row apart.
    """
    inner = _unwrap(model)
    _check_room(inner, vocabulary, batch["input_ids"].shape[1])
    accepted = inspect.signature(inner.forward).parameters
    packed = "documents" in batch
    if packed:
        _check_packing(inner)
    if "input_ids" in accepted:
        # Hugging Face's models attend within documents if they get position ids, and neither a mask
        # nor a cache.
        names = {"position_ids"} if packed else {"attention_mask"}
        given: dict[str, Any] = {name: batch[name] for name in names & set(accepted)}
        if "use_cache" in accepted:
            given["use_cache"] = False
        output = model(input_ids=batch["input_ids"], **given)
    else:
        output = model(batch["input_ids"])
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model within those that torch.compile, data parallelism and PEFT made of it."""
    inner: Any = model
    if isinstance(model, DistributedDataParallel):
        inner = model.module
    elif hasattr(model, "_orig_mod"):
        inner = model._orig_mod
    elif hasattr(model, "get_base_model"):
        inner = cast(Any, model).get_base_model()
    return model if inner is model else _unwrap(inner)


def _check_packing(model: nn.Module) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in PACKED_TYPES:
        raise PlanError(
            f"`pack: true` needs a model that keeps the samples of a row apart, and "
            f"{type(model).__name__} is not known to; remove `pack`, or take one of the types "
            f"{', '.join(sorted(PACKED_TYPES))}"
        )


def _check_room(model: nn.Module, vocabulary: int, positions: int) -> None:
    """Check tokens and positions against the model's configuration, if it has one."""
    config = getattr(model, "config", None)
    tokens = getattr(config, "vocab_size", None)
    if isinstance(tokens, int) and vocabulary > tokens:
        raise PlanError(
            f"token ids go up to {vocabulary - 1}, and the model has a vocabulary of {tokens}; set "
            f"`vocab_size: {vocabulary}` or more, or take the model's own tokenizer"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < positions:
        raise PlanError(
            f"a row has {positions} tokens, and the model has room for {limit}; lower the task's "
            f"`length`, or raise `max_position_embeddings`"
        )
