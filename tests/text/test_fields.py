"""Where samples hold text, token ids and masks."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from secateur.errors import PlanError
from secateur.text import NextToken


def array(values: Any, **settings: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, **settings), allow_pickle=True)
    return file.getvalue()


SAMPLE = {
    "__key__": "a",
    "txt": b"text",
    "py": b"\xff\xfe",
    "json": b'{"text": "t\xc3\xa4xt", "ids": [3, 1], "empty": [], "deep.key": "d", "n": 3}',
    "meta.json": b'{"text": "meta"}',
    "list.json": b"[5, 6]",
    "npy": array([9, 8, 7], dtype=np.uint16),
    "tokens.npy": array([], dtype=np.int32),
    "mask.npy": array([True, False, True]),
    "object.npy": array([{"a": 1}], dtype=object),
    "float.npy": array([0.5]),
    "square.npy": array([[1]]),
    "negative.npy": array([1, -1]),
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, list(b"text")),
        ({"text": "txt"}, list(b"text")),
        ({"text": "py"}, [255, 254]),
        ({"text": "json.text"}, list("täxt".encode())),
        ({"text": "json.deep.key"}, list(b"d")),
        ({"text": "meta.json.text"}, list(b"meta")),
        ({"tokens": "json.ids"}, [3, 1]),
        ({"tokens": "list.json"}, [5, 6]),
        ({"tokens": "npy"}, [9, 8, 7]),
        ({"tokens": "npy", "prompt": "json.ids"}, [3, 1, 9, 8, 7]),
        ({"tokens": "tokens.npy"}, [0]),  # empty: one token of padding
        ({"tokens": "json.empty"}, [0]),
        ({"text": "txt", "eos": True}, [*b"text", 256]),
    ],
)
def test_fields_are_read(settings: dict[str, Any], expected: list[int]) -> None:
    batch = NextToken(length=16, **settings).collate([SAMPLE])
    assert batch["input_ids"].tolist() == [expected]
    assert batch["input_ids"].dtype == torch.long


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"text": "md"}, "it has no member `md`, only txt, py, json"),
        ({"text": "json.prompt"}, "its member `json` has no key `prompt`"),
        ({"text": "json.n"}, r"its `json\.n` is not a string"),
        ({"text": "list.json"}, r"its `list\.json` is not a string"),
        ({"tokens": "float.npy"}, "it must be one dimension of whole numbers"),
        ({"tokens": "square.npy"}, r"its `square\.npy` has shape \(1, 1\)"),
        ({"tokens": "json.n"}, "it must be one dimension of whole numbers"),
        ({"tokens": "json.text"}, "it must be one dimension of whole numbers"),
        ({"tokens": "negative.npy"}, "holds the negative token id -1"),
        ({"tokens": "list.json", "mask": "mask.npy"}, "one 0 or 1 for each of its 2 tokens"),
        ({"tokens": "npy", "mask": "npy"}, "one 0 or 1 for each of its 3 tokens"),
    ],
)
def test_samples_that_hold_something_else_are_refused(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        NextToken(length=16, **settings).collate([SAMPLE])


def test_pickled_arrays_are_not_loaded() -> None:
    with pytest.raises(ValueError, match="allow_pickle=False"):
        NextToken(length=16, tokens="object.npy").collate([SAMPLE])
