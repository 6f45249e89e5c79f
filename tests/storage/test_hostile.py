"""Tests of hostile data: one clear error or a counted skip, bounded memory, no other folder."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import polars as pl
import pytest

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.outputs import Output
from secateur.storage.shard_listing import list_shards
from secateur.storage.tensors import read_tensors
from tests.storage.test_shards import write_tar

READER = """
import resource, sys
from secateur.errors import StorageError
from secateur.storage.frames import read_frame
from secateur.storage.outputs import Output
from secateur.storage.folder import Folder
from secateur.storage.shard_listing import list_shards
kind, place = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    if kind == "shard":
        frame = list_shards([place])
    else:
        frame = read_frame(Output(Folder(place)), "frame.parquet")
    print(len(frame))
except StorageError as error:
    print(error)
print(peak() - before)
"""


def read_in_new_process(kind: str, place: str) -> tuple[str, float]:
    """Read a shard or a frame in a new process.

    Returns:
        What the process prints, and the growth of its memory in MiB.
    """
    done = subprocess.run(
        [sys.executable, "-c", READER, kind, place], capture_output=True, text=True, check=True
    )
    printed, growth = done.stdout.splitlines()
    return printed, int(growth) / 1024


@pytest.mark.parametrize(
    "name",
    [
        "../0.cls",
        "a/../../0.cls",
        "/etc/0.cls",
        "../0",
        "0\n1.cls",
        "0\t.cls",
        "\x1b[2J0.cls",
        "0\x7f.cls",
        "é\u2028.cls",
    ],
)
def test_names_that_escape_or_mislead_are_refused_or_skipped(tmp_path: Path, name: str) -> None:
    """Other programs unpack pruned shards. Tables, logs and dropped.txt contain names."""
    bad = write_tar(tmp_path / "bad.tar", [("1.cls", b"x"), (name, b"x")])
    good = write_tar(tmp_path / "good.tar", [("2.cls", b"x")])
    with pytest.raises(
        StorageError, match=r"bad\.tar has a member whose name .*; rename it"
    ) as raised:
        list_shards([bad, good])
    assert str(raised.value).isprintable()
    skipped: list[str] = []
    assert list_shards([bad, good], skipped.append)["key"].to_list() == ["2"]
    assert len(skipped) == 1


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("0.cls")
    header = info.tobuf(tarfile.GNU_FORMAT).replace(b"0.cls", b"\xff.cls", 1)
    header = header[:148] + b"%06o\0 " % (256 + sum(header[:148] + header[156:])) + header[156:]
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(StorageError, match=r"not UTF-8, or holds control characters .*rename it"):
        list_shards([str(tmp_path / "a.tar")])


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_may_be_skipped_with_a_message(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("0.cls")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(info)
    skipped: list[str] = []
    assert len(list_shards([str(tmp_path / "a.tar")], skipped.append)) == 0
    assert "not a regular file" in skipped[0]


def test_repeated_member_is_refused(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.cls", b"x"), ("0.cls", b"y")])
    with pytest.raises(StorageError, match=r"sample 0 of .*a\.tar has a member \.cls twice"):
        list_shards([url])


def _header_declaring(size: int, body: bytes = b"") -> bytes:
    info = tarfile.TarInfo("0.cls")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + body


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_header_declaring(1 << 50, bytes(4096)), id="a member of a pebibyte"),
        pytest.param(
            _header_declaring((1 << 63) - 1, bytes(4096)), id="a member up to the last offset"
        ),
        pytest.param(_header_declaring(-512, bytes(4096)), id="a member of negative size"),
        pytest.param(gzip.compress(bytes(200 << 20)), id="a gzip bomb"),
        pytest.param(zlib.compress(bytes(200 << 20)), id="a zlib bomb"),
    ],
)
def test_declared_sizes_and_bombs_take_no_memory(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    printed, growth = read_in_new_process("shard", str(tmp_path / "a.tar"))
    assert "a.tar is truncated, damaged, compressed or not a tar" in printed
    assert growth < 50


def test_bomb_within_a_shard_is_not_decompressed(tmp_path: Path) -> None:
    printed, growth = read_in_new_process(
        "shard", write_tar(tmp_path / "a.tar", [("0.gz", gzip.compress(bytes(200 << 20)))])
    )
    assert printed == "1"
    assert growth < 50


def test_frame_replaced_by_a_bomb_is_never_decoded(tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path / "a")))
    with output.attempt("test", {}) as attempt:
        write_frame(attempt, "frame.parquet", pl.DataFrame({"a": [1]}), {"a": pl.Int64})
    bomb = io.BytesIO()
    pl.select(pl.zeros(50_000_000, dtype=pl.Int64)).write_parquet(bomb, compression="zstd")
    Path(output.url("frame.parquet")).write_bytes(bomb.getvalue())
    printed, growth = read_in_new_process("frame", output.root.url)
    assert "frame.parquet is damaged; restore it" in printed
    assert growth < 50


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000, b"NaN", b'{"seal": null}'],
)
def test_unexpected_json_is_an_error_of_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(StorageError, match=r"manifest\.json is damaged") as raised:
        Output(Folder(str(tmp_path))).read("a")
    assert "\n" not in str(raised.value)


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + HEADER,
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(7),
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[2]", b"[9]") + bytes(8),
        (2).to_bytes(8, "little") + b"{]",
    ],
)
def test_tensors_of_wrong_sizes_are_an_error(tmp_path: Path, data: bytes) -> None:
    """The manifest matches the file, as if someone had forged both."""
    output = Output(Folder(str(tmp_path)))
    with output.attempt("test", {}) as attempt:
        attempt.write("a", data)
    with pytest.raises(StorageError, match=r"a is damaged \(.*restore it"):
        read_tensors(output, "a")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -8])
def test_truncated_frame_is_an_error(tmp_path: Path, cut: int) -> None:
    """Here too, the manifest matches the file."""
    whole = io.BytesIO()
    pl.DataFrame({"a": range(100)}).write_parquet(whole)
    output = Output(Folder(str(tmp_path)))
    with output.attempt("test", {}) as attempt:
        attempt.write("a.parquet", whole.getvalue()[:cut])
    with pytest.raises(StorageError, match=r"a\.parquet is damaged \(.*restore it") as raised:
        read_frame(output, "a.parquet")
    assert "\n" not in str(raised.value)
