"""Groups of samples that a member names: a label, a domain, or any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from secateur.errors import PlanError
from secateur.storage.shards import Samples

READ_TOGETHER = 1024  # samples that are read from their shards in one request


def read_group_names(samples: Samples, by: str, rows: Sequence[int]) -> list[str]:
    """Return the label or domain of some samples.

    Args:
        by: a member (`cls`), or a field of a JSON member (`json:domain`).
        rows: of the sample list.

    Raises:
        PlanError: a sample has none.
    """
    names = []
    for start in range(0, len(rows), READ_TOGETHER):
        for sample in samples.read(rows[start : start + READ_TOGETHER]):
            names.append(_group_name(sample, by))
    return names


def _group_name(sample: dict[str, Any], by: str) -> str:
    member, _, field = by.partition(":")
    try:
        text = sample[member].decode()
        return str(json.loads(text)[field]) if field else text.strip()
    except (KeyError, TypeError, ValueError) as error:
        members = ", ".join(name for name in sample if name != "__key__")
        raise PlanError(
            f"sample {sample['__key__']} has no {by} to group by; `by` names a member ({members}), "
            f"or a field of a JSON member as member:field"
        ) from error
