"""Where a sample holds text or token ids: in a member, or under a key of a JSON member."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import PlanError

JSON_KEY = re.compile(r"((?:.+\.)?json)\.(.+)")


@dataclass(frozen=True)
class Field:
    """A place within every sample.

    Attributes:
        name: as the plan names it: `txt`, `tokens.npy` or `json.answer`.
        member: the member's extension.
        key: the key within a JSON member, or None for all of it.
    """

    name: str
    member: str
    key: str | None

    @staticmethod
    def parse(name: str) -> Field:
        """Return the field of a name: a member's extension, or `json.KEY`."""
        match = JSON_KEY.fullmatch(name)
        return Field(name, *match.groups()) if match else Field(name, name, None)

    def read_text(self, sample: dict[str, Any]) -> bytes:
        """Return the text of a sample.

        Raises:
            PlanError: the sample lacks the field, or it holds no text.
        """
        if self._kind != "json":
            return self._read_member(sample)
        value = self._read_json(sample)
        if not isinstance(value, str):
            raise PlanError(f"its `{self.name}` is not a string")
        return value.encode()

    def read_integers(self, sample: dict[str, Any]) -> Int[Tensor, " n"]:
        """Return the whole numbers of an `.npy` member of one dimension, or of a JSON list.

        Raises:
            PlanError: the sample lacks the field, or it holds something else.
        """
        if self._kind == "npy":
            # By default, NumPy refuses a file that holds pickled objects.
            value = np.load(io.BytesIO(self._read_member(sample)))
        else:
            value = np.asarray(self._read_json(sample) or np.zeros(0, np.int64))
        if value.ndim != 1 or value.dtype.kind not in "iub":
            raise PlanError(
                f"its `{self.name}` has shape {value.shape} and type {value.dtype}; it must be one "
                f"dimension of whole numbers"
            )
        return torch.from_numpy(value.astype(np.int64))

    @property
    def _kind(self) -> str:
        return self.member.rpartition(".")[2]

    def _read_member(self, sample: dict[str, Any]) -> bytes:
        if self.member not in sample:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            raise PlanError(f"it has no member `{self.member}`, only {members}")
        data: bytes = sample[self.member]
        return data

    def _read_json(self, sample: dict[str, Any]) -> Any:
        value = json.loads(self._read_member(sample))
        if self.key is None:
            return value
        if not isinstance(value, dict) or self.key not in value:
            raise PlanError(f"its member `{self.member}` has no key `{self.key}`")
        return value[self.key]
