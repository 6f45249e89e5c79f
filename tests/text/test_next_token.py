"""Losses of texts against Hugging Face's own loss of each text alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from examples.text.model import Transformer
from secateur.errors import PlanError
from secateur.huggingface import build_model
from secateur.text import NextToken
from secateur.text.models import PACKED_TYPES
from tests.text.llama import CONFIG, TEXTS, gradients, llama, loss_alone, make_samples, model_of

SAMPLES = make_samples()


@pytest.mark.parametrize("pad", ["longest", "length"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_no_loss_and_no_gradient(pad: str, attention: str) -> None:
    model = llama(attention)
    task = NextToken(length=48, pad=pad)  # type: ignore[arg-type]
    batch = task.collate(SAMPLES)
    assert batch["input_ids"].shape == (4, 48 if pad == "length" else max(map(len, TEXTS)))
    losses = task.losses(model, batch)
    for text, loss in zip(TEXTS, losses, strict=True):
        alone = loss_alone(model, list(text.encode()))
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
        expected = gradients(model, alone)
        assert float((gradients(model, loss) - expected).norm() / expected.norm()) < 1e-6


def test_prompts_are_read_and_not_counted() -> None:
    model = llama()
    task = NextToken(length=48, text="json.answer", prompt="json.prompt", eos=True)
    batch = task.collate(SAMPLES)
    losses = task.losses(model, batch)
    for text, loss in zip(TEXTS, losses, strict=True):
        alone = loss_alone(model, [*text.encode(), 256], prompt=3)
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    # "Ash" has an empty answer: only the end token is counted.
    assert task.sizes(batch).tolist() == [len(text) - 3 + 1 for text in TEXTS]


def test_a_loss_mask_leaves_tokens_out() -> None:
    model = llama()
    tokens = [7, 8, 9, 10, 11]
    member = b'{"ids": [7, 8, 9, 10, 11], "mask": [1, 0, 1, 0, 1]}'
    task = NextToken(length=4, tokens="json.ids", mask="json.mask")
    batch = task.collate([{"__key__": "a", "json": member}])
    log = model(input_ids=torch.tensor([tokens])).logits.log_softmax(2)
    # Of 8, 9, 10 the mask counts 9 only. 7 has nothing before it, and 11 is cut off.
    assert task.losses(model, batch).item() == pytest.approx(-log[0, 1, 9].item(), rel=1e-9)
    assert task.sizes(batch).tolist() == [1]


def test_sizes_make_the_token_mean() -> None:
    """The mean over samples, weighted by their sizes, is the mean over tokens."""
    model = llama()
    task = NextToken(length=20)
    batch = task.collate(SAMPLES)
    sizes = task.sizes(batch)
    cut = [text.encode()[:20] for text in TEXTS]
    assert sizes.tolist() == [len(text) - 1 for text in cut]
    expected = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    mean = (task.losses(model, batch) * sizes).sum() / sizes.sum()
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "sdpa"},
        {"attention": "eager"},
        {"model_type": "mistral", "sliding_window": 6, "num_key_value_heads": 2},
        {"model_type": "gpt_neox"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("pad", ["longest", "length"])
def test_packed_documents_have_the_loss_and_gradient_that_they_have_alone(
    changes: dict[str, Any], pad: str
) -> None:
    model: Any = llama(**changes)
    model.config.use_cache = True  # as in models that another factory makes
    task = NextToken(length=42, eos=True, pad=pad, pack=True)  # type: ignore[arg-type]
    batch = task.collate(SAMPLES)
    # The second has no room beside the first. The others have.
    rows = [[d for d in row.unique().tolist() if d >= 0] for row in batch["documents"]]
    assert rows == [[0, 2, 3], [1]]
    assert batch["input_ids"].shape == (2, 42 if pad == "length" else 41)
    assert task.sizes(batch).tolist() == [len(text) for text in TEXTS]
    losses = task.losses(model, batch)
    for text, loss in zip(TEXTS, losses, strict=True):
        alone = loss_alone(model, [*text.encode(), 256])
        assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
        expected = gradients(model, alone)
        assert float((gradients(model, loss) - expected).norm() / expected.norm()) < 1e-5


def test_packing_agrees_with_padding_in_every_number() -> None:
    model = llama()
    settings: dict[str, Any] = {
        "length": 48,
        "text": "json.answer",
        "prompt": "json.prompt",
        "eos": True,
    }
    padded, packed = (NextToken(**settings, pack=pack) for pack in (False, True))
    one, other = padded.collate(SAMPLES), packed.collate(SAMPLES)
    for name, values in padded.metrics(model, one).items():
        torch.testing.assert_close(packed.metrics(model, other)[name], values)
    assert packed.sizes(other).tolist() == padded.sizes(one).tolist()


@pytest.mark.parametrize("pack", [False, True])
def test_a_sample_with_nothing_to_predict_contributes_nothing(pack: bool) -> None:
    model = llama()
    task = NextToken(length=16, pack=pack)
    samples = make_samples(["", "a", "An oak.", ""])
    batch = task.collate(samples)
    losses = task.losses(model, batch)
    assert task.sizes(batch).tolist() == [0, 0, 6, 0]
    assert losses.tolist() == [0, 0, pytest.approx(losses[2].item()), 0]
    assert losses[2].item() == pytest.approx(loss_alone(model, list(b"An oak.")).item(), rel=1e-6)
    assert gradients(model, losses[[0, 1, 3]].sum()).abs().max() == 0


@pytest.mark.parametrize("pack", [False, True])
def test_sampled_labels_follow_the_model(pack: bool) -> None:
    """Of 4,000 draws of one token, each id has its share, to four standard errors."""
    model = llama()
    task = NextToken(length=8, text="json.answer", prompt="json.prompt", pack=pack)
    batch = task.collate(make_samples(["abcd"] * 4000))
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = task.sampled(model, batch)
        shares = model(input_ids=torch.tensor([list(b"abc")])).logits[0, -1].softmax(0)
    assert torch.equal(drawn["input_ids"], batch["input_ids"])
    counted = batch["labels"] != -100
    assert torch.equal(drawn["labels"] != -100, counted)
    labels = drawn["labels"][counted]
    assert len(labels) == 4000
    found = torch.bincount(labels, minlength=257) / 4000
    errors = (shares * (1 - shares) / 4000).sqrt()
    assert ((found - shares).abs() <= 4 * errors + 1e-3).all()


@pytest.mark.parametrize("pack", [False, True])
def test_every_token_has_a_sign_of_its_own(pack: bool) -> None:
    """Of 4,000 draws for three tokens, all eight sums appear equally often, to four errors."""
    model = llama()
    task = NextToken(length=8, pack=pack)
    batch = task.collate(make_samples(["abcd"] * 4000))
    torch.manual_seed(1)
    with torch.no_grad():
        found = task.signed_losses(model, batch)
        log = model(input_ids=torch.tensor([list(b"abc")])).logits[0].log_softmax(1)
    losses = -log[range(3), list(b"bcd")]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).to(losses)
    sums = signs @ losses / 3
    distances = (found[:, None] - sums).abs()
    assert float(distances.amin(1).max()) < 1e-6
    counts = torch.bincount(distances.argmin(1), minlength=8)
    assert int((counts - 500).abs().max()) <= 4 * math.sqrt(4000 / 8 * 7 / 8)


class Successor(nn.Module):
    """Predicts after each byte the next one, with nine tenths of the probability."""

    def forward(self, ids: Tensor) -> Tensor:
        share = torch.full((*ids.shape, 256), 0.1 / 255)
        return share.scatter(2, (ids + 1)[..., None], 0.9).log()


def test_metrics_of_a_model_that_is_known() -> None:
    task = NextToken(length=8)
    batch = task.collate(make_samples(["abcd", "abcx", "ab"]))
    metrics = task.metrics(Successor(), batch)
    assert metrics["token_accuracy"].tolist() == pytest.approx([1, 2 / 3, 1])
    wrong = math.exp(-(2 * math.log(0.9) + math.log(0.1 / 255)) / 3)
    assert metrics["perplexity"].tolist() == pytest.approx([1 / 0.9, wrong, 1 / 0.9], rel=1e-5)
    assert float(task.losses(Successor(), batch)[0]) == pytest.approx(-math.log(0.9), rel=1e-5)


def test_losses_are_in_float32_at_least() -> None:
    batch = NextToken(length=32).collate(SAMPLES)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        losses = NextToken(length=32).losses(llama().to(dtype), batch)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_models_that_are_wrapped_or_take_ids_alone(tmp_path: Path) -> None:
    """Wrappers hide the signature of `forward`; the model within is asked."""
    task = NextToken(length=48)
    batch = task.collate(SAMPLES)
    model = llama()
    expected = task.losses(model, batch)
    compiled = cast(nn.Module, torch.compile(model, backend="eager"))
    torch.testing.assert_close(task.losses(compiled, batch), expected)
    init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        torch.testing.assert_close(task.losses(parallel, batch), expected)
    finally:
        destroy_process_group()
    torch.manual_seed(0)
    plain = Transformer(width=8, heads=2, layers=1, context=48).double()
    for text, loss in zip(TEXTS, task.losses(plain, batch), strict=True):
        ids = torch.tensor([list(text.encode())])
        log = plain(ids)[0, :-1].log_softmax(1)
        assert loss.item() == pytest.approx(-log.gather(1, ids[0, 1:, None]).mean().item())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"length": 1}, "`length: 1` leaves no token to predict"),
        ({"pad": "left"}, "`pad: left` is not known"),
        ({"text": "txt", "tokens": "npy"}, "`text` and `tokens` both say"),
        ({"mask": "json.mask"}, "`mask` needs `tokens`"),
        ({"tokens": "npy", "mask": "m.npy", "prompt": "p.npy"}, "`prompt` and `mask` both say"),
        ({"tokens": "npy", "eos": True}, "remove `tokenizer` and `eos`"),
        ({"tokens": "npy", "tokenizer": "x.json"}, "remove `tokenizer` and `eos`"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        NextToken(**{"length": 8} | changes)


def test_models_without_room_are_refused() -> None:
    small = llama(vocab_size=200)
    text, tokens = NextToken(length=8), NextToken(length=8, tokens="json")
    with pytest.raises(PlanError, match="ids go up to 255, and the model has a vocabulary of 200"):
        text.losses(small, text.collate(SAMPLES))
    batch = tokens.collate([{"__key__": "a", "json": b"[1, 199]"}])
    assert tokens.losses(small, batch) > 0
    batch = tokens.collate([{"__key__": "a", "json": b"[1, 200]"}])
    with pytest.raises(PlanError, match="ids go up to 200"):
        tokens.losses(small, batch)
    wide = NextToken(length=65, pad="length")
    with pytest.raises(PlanError, match="a row has 65 tokens, and the model has room for 64"):
        wide.losses(llama(), wide.collate(SAMPLES))


@pytest.mark.parametrize("kind", sorted(PACKED_TYPES))
def test_every_type_that_may_be_packed_keeps_documents_apart(kind: str) -> None:
    model = model_of(kind)
    task = NextToken(length=48, pack=True)
    losses = task.losses(model, task.collate(SAMPLES))
    alone = [loss_alone(model, list(text.encode())).item() for text in TEXTS]
    assert losses.tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_adapters_are_called_like_the_model_within(pack: bool) -> None:
    torch.manual_seed(0)
    lora = {"r": 2, "target_modules": ["v_proj"], "init_lora_weights": False}
    model = build_model(config=CONFIG | {"initializer_range": 0.3}, lora=lora)
    task = NextToken(length=48, pack=pack)
    losses = task.losses(model, task.collate(SAMPLES))
    alone = [loss_alone(model, list(text.encode())).item() for text in TEXTS]
    assert losses.tolist() == pytest.approx(alone, rel=1e-5)


def test_models_that_do_not_keep_documents_apart_are_refused() -> None:
    """OPT takes position ids, and attends to the document before."""
    task = NextToken(length=48, pack=True)
    batch = task.collate(SAMPLES)
    for model in (model_of("opt"), Successor()):
        with pytest.raises(PlanError, match=f"{type(model).__name__} is not known to; remove"):
            task.losses(model, batch)
