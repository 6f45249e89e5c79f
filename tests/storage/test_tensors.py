"""Files of tensors that are written piece by piece, against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from secateur.storage.folder import Folder
from secateur.storage.outputs import Output
from secateur.storage.tensors import DTYPES, TensorStack, read_tensors, write_tensors


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Output:
    output = Output(Folder(str(folder)))
    with output.attempt("tensors", {}) as attempt:
        write_tensors(attempt, "file.safetensors", tensors, {"kind": "test"})
    return output


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.tensor([[0, 1, 3], [1, 0, 7]]).to(dtype) for dtype in DTYPES}
    tensors |= {
        "transposed": torch.randn(3, 4).T,
        "column": torch.randn(5, 6)[:, 2],
        "number": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "größe": torch.randn(2),
    }
    output = written(tmp_path, tensors)
    for found in (load(output.read("file.safetensors")), read_tensors(output, "file.safetensors")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    with output.local("file.safetensors") as path, safe_open(path, "pt") as file:
        assert file.metadata() == {"kind": "test"}


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_the_order_of_tensors_does_not_change_the_file(tmp_path: Path, names: str) -> None:
    values = {"a": torch.arange(3), "b": torch.ones(5)}
    output = written(tmp_path, {name: values[name] for name in names})
    assert output.read("file.safetensors") == save(values, {"kind": "test"})


def test_a_stack_gives_back_what_was_put_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    entries = [{"x": torch.full((1000,), n), "y": torch.randn(2, 3)} for n in range(3)]
    with TensorStack() as stack:
        for entry in entries:
            stack.push(entry)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3
        for left, entry in reversed(list(enumerate(entries))):
            found = stack.pop()
            assert found.keys() == entry.keys()
            assert all(torch.equal(found[name], entry[name]) for name in entry)
            assert len(list(tmp_path.rglob("*.safetensors"))) == left
        stack.push(entries[0])
    assert not list(tmp_path.iterdir())
