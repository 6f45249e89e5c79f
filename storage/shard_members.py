"""The members of a shard, grouped into samples as WebDataset groups them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from secateur.errors import StorageError
from secateur.storage.tars import iter_members

SIDE_FILE = re.compile(r"__[^/]*__($|/)")  # WebDataset's own, which belong to no sample
RESERVED = {"__key__", "__url__"}
MISLEADING = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, surrogates, line separators


class Member(NamedTuple):
    """A member of a shard that belongs to a sample.

    Attributes:
        begins_sample: whether it is the first member of its sample.
        key: the sample's key.
        name: its extension.
        begin: the first byte of its header.
        offset: the first byte of its payload.
        size: bytes of its payload.
    """

    begins_sample: bool
    key: str
    name: str
    begin: int
    offset: int
    size: int


def iter_sample_members(url: str) -> Iterator[Member]:
    """Yield each member that belongs to a sample.

    Consecutive members with the same key form a sample, as WebDataset groups them.
    """
    last_key = None
    names: set[str] = set()
    for info in iter_members(url):
        _check_member_name(url, info.name)
        key, extension = base_plus_ext(info.name)
        if not key or SIDE_FILE.match(info.name):
            continue
        name = extension.lower()
        begins_sample = key != last_key
        if begins_sample:
            last_key = key
            names = set(RESERVED)
        if name in names:
            raise StorageError(
                f"sample {key} of {url} has a member .{name} twice, or one with a name that "
                f"WebDataset reserves; rename it"
            )
        names.add(name)
        yield Member(begins_sample, key, name, info.offset, info.offset_data, info.size)


def _check_member_name(url: str, name: str) -> None:
    """Check that a member's name cannot mislead a reader or another program.

    Keys are printed in reports and tables, and other programs unpack shards.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise StorageError(
            f"shard {url} has a member whose name points outside it ({name!a}); rename it"
        )
    # `isprintable` is quick, but it also rejects harmless characters such as rare spaces.
    if not name.isprintable() and any(unicodedata.category(c) in MISLEADING for c in name):
        raise StorageError(
            f"shard {url} has a member whose name is not UTF-8, or holds control characters "
            f"({name!a}); rename it"
        )
