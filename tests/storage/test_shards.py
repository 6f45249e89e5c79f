"""Tests of listing and reading shards, and of every kind of damaged shard."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import StorageError, UnavailableError
from secateur.storage import shard_listing, shard_members
from secateur.storage.sample_hashes import ShardHashes, hash_shard
from secateur.storage.schemas import SAMPLES
from secateur.storage.shard_listing import WrongShardError, list_shards
from secateur.storage.shards import Samples, expand_shard_urls

# WebDataset's grammar of names: a key without dots (its folders may contain them), then an
# extension that may contain more dots.
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
    """Write a tar of raw members in order, and return its path."""
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


def test_braces_and_lists_are_expanded(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"t-{number}.tar", [(f"{number}.a", b"x")])
    assert expand_shard_urls(f"{tmp_path}/t-{{0..2}}.tar") == [
        f"{tmp_path}/t-{n}.tar" for n in range(3)
    ]
    assert expand_shard_urls([f"{tmp_path}/t-0.tar", f"{tmp_path}/t-2.tar"]) == [
        f"{tmp_path}/t-0.tar",
        f"{tmp_path}/t-2.tar",
    ]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "t-0.tar", [("0.a", b"x")])
    with pytest.raises(StorageError, match=r"shard .*t-1\.tar does not exist; check `shards`"):
        expand_shard_urls(f"{tmp_path}/t-{{0..1}}.tar")


@pytest.mark.parametrize("cut", [100, 512, 1024, 1500, 2048, 2560])
def test_truncated_shard_is_named(tmp_path: Path, cut: int) -> None:
    """WebDataset silently reads a shard whose writer was killed at the end of a member."""
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
def test_file_that_is_no_plain_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(
        StorageError, match=r"a\.tar is truncated, damaged, compressed or not a tar"
    ):
        list_shards([str(tmp_path / "a.tar")])


def test_concatenated_archives_are_refused(tmp_path: Path) -> None:
    """tarfile stops at the first end of archive, and would silently lose the second half."""
    one, two = (
        Path(write_tar(tmp_path / f"{n}.tar", [(f"{n}.a", b"x")])).read_bytes() for n in range(2)
    )
    (tmp_path / "both.tar").write_bytes(one + two)
    with pytest.raises(StorageError, match="data after the end of archive"):
        list_shards([str(tmp_path / "both.tar")])


def test_repeated_key_is_named_with_both_places(tmp_path: Path) -> None:
    urls = [
        write_tar(tmp_path / f"{n}.tar", [(f"own{n}.a", b"x"), ("same.a", b"x")]) for n in range(2)
    ]
    with pytest.raises(
        StorageError,
        match=r"key same occurs twice, as sample 1 of .*0\.tar and as sample 1 of .*1\.tar",
    ):
        list_shards(urls)


def test_separated_members_are_a_repeated_key(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x"), ("1.a", b"x"), ("0.b", b"x")])
    with pytest.raises(StorageError, match="key 0 occurs twice"):
        list_shards([url])


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.a")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(StorageError, match="not a regular file"):
        list_shards([str(tmp_path / "a.tar")])


def test_shard_that_shrinks_after_listing_is_named(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 9000)])
    samples = Samples([url], list_shards([url]))
    Path(url).write_bytes(Path(url).read_bytes()[:2000])
    with pytest.raises(StorageError, match="has changed since it was listed"):
        samples.read([0])


def flip_bit(data: bytes) -> bytes:
    return data[:700] + bytes([data[700] ^ 1]) + data[701:]


def swap_samples(data: bytes) -> bytes:
    return data[2048:4096] + data[:2048] + data[4096:]


def replace_payload(data: bytes) -> bytes:
    return data.replace(b"y", b"z")


@pytest.mark.parametrize("damage", [flip_bit, swap_samples, replace_payload])
def test_shard_that_changes_after_listing_is_named(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """The shard has the same size and is still a tar, so only its content reveals the change."""
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 1500), ("1.a", b"y" * 1500)])
    samples = Samples([url], list_shards([url]))
    Path(url).write_bytes(damage(Path(url).read_bytes()))
    with pytest.raises(
        StorageError, match=r"a\.tar has changed since it was listed; its sample \d is different"
    ):
        samples.read([0, 1])


def test_shard_that_changes_during_listing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change between the two passes would mix the offsets and hashes of two versions."""
    url = write_tar(tmp_path / "a.tar", [("0.a", b"x" * 1500), ("1.a", b"y" * 1500)])

    def replace_and_hash(url: str, *arguments: Any) -> ShardHashes:
        write_tar(Path(url), [("0.a", b"z" * 1500), ("1.a", b"y" * 1500)])
        return hash_shard(url, *arguments)

    monkeypatch.setattr(shard_listing, "hash_shard", replace_and_hash)
    with pytest.raises(StorageError, match=r"a\.tar has changed since it was listed"):
        list_shards([url])


@pytest.fixture
def expected_shards(tmp_path: Path) -> dict[str, str]:
    """Two shards, and their SHA-256."""
    urls = [
        write_tar(tmp_path / f"{n}.tar", [(f"{n}.a", b"x" * 1500), (f"{n}-b.a", b"y" * 300)])
        for n in range(2)
    ]
    return {url: hashlib.sha256(Path(url).read_bytes()).hexdigest() for url in urls}


def test_expected_shards_are_listed_as_others(expected_shards: dict[str, str]) -> None:
    urls = list(expected_shards)
    frame = list_shards(urls, expected_sha256=expected_shards)
    assert frame.equals(list_shards(urls))
    assert dict(frame.schema) == SAMPLES


@pytest.mark.parametrize(
    "damage",
    [
        flip_bit,
        lambda data: data[:-1],
        lambda data: data + b"\0" * 512,
        lambda data: data[:1500],
        lambda data: bytes(10240),
        lambda data: b"",
        # The keys of the other shard: a repeated key must not hide the reason.
        lambda data: data.replace(b"1.a", b"0.a"),
    ],
    ids=["flip", "shorter", "longer", "truncated", "no samples", "empty", "repeated key"],
)
@pytest.mark.parametrize("skips", [False, True])
def test_changed_expected_shard_is_named_and_never_skipped(
    expected_shards: dict[str, str], damage: Callable[[bytes], bytes], skips: bool
) -> None:
    changed = Path(list(expected_shards)[1])
    changed.write_bytes(damage(changed.read_bytes()))
    skipped: list[str] = []
    with pytest.raises(WrongShardError, match=r"1\.tar is changed; restore it") as raised:
        list_shards(list(expected_shards), skipped.append if skips else None, expected_shards)
    assert (raised.value.url, raised.value.problem) == (str(changed), "changed")
    assert skipped == []


def test_missing_expected_shard_is_named(expected_shards: dict[str, str]) -> None:
    missing = Path(list(expected_shards)[1])
    missing.unlink()
    with pytest.raises(WrongShardError, match=r"1\.tar is missing; restore it") as raised:
        list_shards(list(expected_shards), None, expected_shards)
    assert (raised.value.url, raised.value.problem) == (str(missing), "missing")


def test_expected_shards_are_hashed_only_once(
    expected_shards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def record_and_hash(url: str, *arguments: Any) -> ShardHashes:
        hashed.append(url)
        return hash_shard(url, *arguments)

    monkeypatch.setattr(shard_listing, "hash_shard", record_and_hash)
    list_shards(list(expected_shards), None, expected_shards)
    assert hashed == list(expected_shards)


def test_unavailable_store_is_an_error_and_never_a_skipped_shard(
    expected_shards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str) -> Iterator[tarfile.TarInfo]:
        raise UnavailableError("the store does not answer")

    monkeypatch.setattr(shard_members, "iter_members", fail)
    skipped: list[str] = []
    with pytest.raises(UnavailableError):
        list_shards(list(expected_shards), skipped.append)
    assert skipped == []


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_header_of_a_huge_size_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("0.a")
    info.type, info.size = kind, 1 << 45
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(StorageError, match=r"a\.tar is truncated, damaged"):
        list_shards([str(tmp_path / "a.tar")])


def test_content_is_equal_where_members_are_whatever_their_keys_and_order(tmp_path: Path) -> None:
    long = b"x" * (1 << 20)  # reaches over the chunks that a shard is read in
    samples = {
        "0": [("a", long), ("b", b"two"), ("c", b"")],
        "a longer key": [("c", b""), ("b", b"two"), ("a", long)],
        "other bytes": [("a", long), ("b", b"too"), ("c", b"")],
        "other names": [("a", b"two"), ("b", long), ("c", b"")],
        "fewer": [("a", long), ("b", b"two")],
        "moved": [("a", long + b"t"), ("b", b"wo"), ("c", b"")],
    }
    urls = [
        write_tar(tmp_path / f"{n}.tar", [(f"{key}.{name}", data) for name, data in members])
        for n, (key, members) in enumerate(samples.items())
    ]
    frame = list_shards(urls)
    content = dict(frame.select("key", "content").iter_rows())
    assert content["0"] == content["a longer key"]
    assert len(set(content.values())) == len(samples) - 1
    assert frame["sha256"].n_unique() == len(samples)
