"""Shards: listing, reading, and every way in which one can be wrong."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import StorageError
from secateur.storage import shards
from secateur.storage.sample_hashes import ShardHashes, Span
from secateur.storage.shards import Samples, expand_shard_urls, list_shards

# WebDataset's grammar of names: a key without dots (folders may hold them), then an extension that may hold more dots.
STEMS = st.text("abcXYZ019_-é ", min_size=1, max_size=12)
KEYS = st.lists(STEMS, min_size=1, max_size=3).map("/".join)
EXTENSIONS = st.lists(st.text("abc012", min_size=1, max_size=4), min_size=1, max_size=2).map(
    ".".join
)
CONTENTS = st.lists(
    st.tuples(KEYS, st.dictionaries(EXTENSIONS, st.binary(max_size=700), min_size=1, max_size=3)),
    min_size=1,
    max_size=8,
    unique_by=lambda sample: sample[0],
)


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> str:
    """A tar of raw members, in order."""
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@settings(deadline=None, max_examples=60)
@given(CONTENTS, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_samples_read_as_webdataset_reads_them(
    content: list[tuple[str, dict[str, bytes]]], layout: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        members = [
            (f"{key}.{name}", data) for key, parts in content for name, data in parts.items()
        ]
        url = write_tar(Path(folder) / "a.tar", members, format=layout)
        samples = Samples([url], list_shards([url]))
        expected = []
        for sample in webdataset.WebDataset(url, shardshuffle=False, empty_check=False):
            expected.append(
                {k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")}
            )
        backwards = samples.read(list(reversed(range(len(samples)))))[::-1]
    assert backwards == expected


def test_braces_and_lists_name_shards(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"t-{number}.tar", [(f"{number}.a", b"x")])
    assert expand_shard_urls(f"{tmp_path}/t-{{0..2}}.tar") == [
        f"{tmp_path}/t-{n}.tar" for n in range(3)
    ]
    assert expand_shard_urls([f"{tmp_path}/t-0.tar", f"{tmp_path}/t-2.tar"]) == [
        f"{tmp_path}/t-0.tar",
        f"{tmp_path}/t-2.tar",
    ]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "t-0.tar", [("0.a", b"x")])
    with pytest.raises(StorageError, match=r"shard .*t-1\.tar does not exist; check `shards`"):
        expand_shard_urls(f"{tmp_path}/t-{{0..1}}.tar")


@pytest.mark.parametrize("cut", [100, 512, 1024, 1500, 2048, 2560])
def test_a_truncated_shard_is_named_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    """WebDataset reads a shard whose writer was killed at a member's end without a word."""
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 700), ("1.a", b"y" * 300)])
    data = Path(url).read_bytes()
    Path(url).write_bytes(data[:cut])
    with pytest.raises(StorageError, match=r"a\.tar is truncated"):
        list_shards([url])


@pytest.mark.parametrize(
    "data",
    [b"", b"no tar at all" * 100, gzip.compress(b"x" * 10_000), bytes(512) + b"x" * 512],
    ids=["empty", "text", "gzip", "a second archive"],
)
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(StorageError, match=r"a\.tar is truncated, damaged, compressed or no tar"):
        list_shards([str(tmp_path / "a.tar")])


def test_two_archives_put_together_are_refused(tmp_path: Path) -> None:
    """tarfile stops at the first end of archive, and the second half would be lost unseen."""
    one, two = (
        Path(write_tar(tmp_path / f"{n}.tar", [(f"{n}.a", b"x")])).read_bytes() for n in range(2)
    )
    (tmp_path / "both.tar").write_bytes(one + two)
    with pytest.raises(StorageError, match="more after the end of archive"):
        list_shards([str(tmp_path / "both.tar")])


def test_a_key_in_two_shards_is_named_with_both_places(tmp_path: Path) -> None:
    urls = [
        write_tar(tmp_path / f"{n}.tar", [(f"own{n}.a", b"x"), ("same.a", b"x")]) for n in range(2)
    ]
    with pytest.raises(
        StorageError,
        match=r"key same is there twice, as sample 1 of .*0\.tar and as sample 1 of .*1\.tar",
    ):
        list_shards(urls)


def test_a_sample_whose_members_lie_apart_is_a_repeated_key(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x"), ("1.a", b"x"), ("0.b", b"x")])
    with pytest.raises(StorageError, match="key 0 is there twice"):
        list_shards([url])


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.a")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(StorageError, match="no regular file"):
        list_shards([str(tmp_path / "a.tar")])


def test_a_shard_that_shrinks_after_listing_is_named(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 9000)])
    samples = Samples([url], list_shards([url]))
    Path(url).write_bytes(Path(url).read_bytes()[:2000])
    with pytest.raises(StorageError, match="has changed since it was listed"):
        samples.read([0])


def flipped(data: bytes) -> bytes:
    return data[:700] + bytes([data[700] ^ 1]) + data[701:]


def reordered(data: bytes) -> bytes:
    return data[2048:4096] + data[:2048] + data[4096:]


def replaced(data: bytes) -> bytes:
    return data.replace(b"y", b"z")


@pytest.mark.parametrize("damage", [flipped, reordered, replaced])
def test_a_shard_that_changes_after_listing_is_named(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Of the same size and still a tar: only its content tells."""
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 1500), ("1.a", b"y" * 1500)])
    samples = Samples([url], list_shards([url]))
    Path(url).write_bytes(damage(Path(url).read_bytes()))
    with pytest.raises(
        StorageError, match=r"a\.tar has changed since it was listed; its sample \d is another"
    ):
        samples.read([0, 1])


def test_a_shard_that_changes_while_it_is_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the pass over its headers and the one over its bytes: the places of one version, the hashes of another."""
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 1500), ("1.a", b"y" * 1500)])
    hash_shard = shards.hash_shard

    def replace_and_hash(url: str, spans: list[Span], with_sha256: bool) -> ShardHashes:
        write_tar(Path(url), [("0.a", b"z" * 1500), ("1.a", b"y" * 1500)])
        return hash_shard(url, spans, with_sha256)

    monkeypatch.setattr(shards, "hash_shard", replace_and_hash)
    with pytest.raises(StorageError, match=r"a\.tar has changed since it was listed"):
        list_shards([url])


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_declares_a_huge_size_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("0.a")
    info.type, info.size = kind, 1 << 45
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(StorageError, match=r"a\.tar is truncated, damaged"):
        list_shards([str(tmp_path / "a.tar")])
