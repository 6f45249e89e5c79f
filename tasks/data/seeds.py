"""Seeds of random draws, derived from what each draw is for."""

from __future__ import annotations

import hashlib


def seed_for(*parts: int | str) -> int:
    """Return a seed that the parts determine and that no other parts share (63 bits)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
