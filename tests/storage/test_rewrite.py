"""Tests of pruned shards: the bytes of the kept samples in order, and no other change."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output
from secateur.storage.rewrite import rewrite_shards
from secateur.storage.shard_listing import list_shards
from tests.storage.test_shards import CONTENTS, write_tar


def rewrite(folder: Path, urls: list[str], keep: list[bool]) -> list[str]:
    """Rewrite shards, and return the paths of the results."""
    output = Output(Folder(str(folder / "out")))
    with output.attempt("prune", {}) as attempt:
        names = rewrite_shards(attempt, urls, list_shards(urls), np.array(keep))
    return [output.url(name) for name in names]


@settings(deadline=None, max_examples=60)
@given(CONTENTS, st.data())
def test_rewritten_shard_equals_a_tar_of_the_kept_samples(
    content: list, data: st.DataObject
) -> None:
    """tarfile writes the kept members to a new tar, which must have the same bytes."""
    keep = data.draw(st.lists(st.booleans(), min_size=len(content), max_size=len(content)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flat = [[(f"{key}.{ext}", data) for ext, data in parts.items()] for key, parts in content]
        url = write_tar(folder / "a.tar", [member for sample in flat for member in sample])
        written = rewrite(folder, [url], keep)
        if not any(keep):
            assert written == []
            return
        kept = [
            member for sample, stays in zip(flat, keep, strict=True) if stays for member in sample
        ]
        expected = Path(write_tar(folder / "b.tar", kept)).read_bytes()
        rewritten = Path(written[0]).read_bytes()
        assert rewritten.rstrip(b"\0") == expected.rstrip(b"\0")
        assert list_shards(written)["key"].to_list() == [
            k for (k, _), stays in zip(content, keep, strict=True) if stays
        ]


def test_side_files_headers_and_order_do_not_change(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, name in enumerate(["__meta__/x.json", "0.a", "0.b", "1.a", "2.a"]):
            (tmp_path / "payload").write_bytes(bytes([number]) * 600)
            info = archive.gettarinfo(tmp_path / "payload", name)
            info.uid, info.mtime, info.uname = 1000 + number, 77 + number, f"user{number}"
            with open(tmp_path / "payload", "rb") as file:
                archive.addfile(info, file)
    (written,) = rewrite(tmp_path, [str(tmp_path / "a.tar")], [True, False, True])
    with tarfile.open(written) as archive:
        rewritten = [(m.name, m.uid, m.mtime, m.uname) for m in archive]
    expected = [(0, "__meta__/x.json"), (1, "0.a"), (2, "0.b"), (4, "2.a")]
    assert rewritten == [(name, 1000 + n, 77 + n, f"user{n}") for n, name in expected]
    read = list(webdataset.WebDataset(written, shardshuffle=False))
    assert [(s["__key__"], sorted(k for k in s if not k.startswith("__"))) for s in read] == [
        ("0", ["a", "b"]),
        ("2", ["a"]),
    ]


def test_shards_of_equal_names_are_numbered(tmp_path: Path) -> None:
    urls = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        urls.append(write_tar(tmp_path / str(number) / "a.tar", [(f"{number}.x", b"x")]))
    assert [Path(w).name for w in rewrite(tmp_path, urls, [True, True])] == [
        "00000-a.tar",
        "00001-a.tar",
    ]


def test_shard_that_shrank_is_not_rewritten(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 700), ("1.a", b"y" * 700)])
    frame = list_shards([url])
    Path(url).write_bytes(Path(url).read_bytes()[:1600])
    output = Output(Folder(str(tmp_path / "out")))
    with (
        pytest.raises(StorageError, match="has changed since it was listed"),
        output.attempt("prune", {}) as attempt,
    ):
        rewrite_shards(attempt, [url], frame, np.array([True, True]))
    assert not output.committed
    assert output.root.files() == []
