"""Room `tasks`: samples as people look at them: a thumbnail of a picture, the beginning of a text."""

from __future__ import annotations

import base64
import io
import unicodedata
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel

PICTURES = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
TEXTS = ("txt", "text", "md", "cls", "json", "csv", "tsv", "html", "py", "index")
SIDE = 64  # a thumbnail's, in pixels
LARGEST = 64_000_000  # pixels of a picture that is decoded
LETTERS = 200


class Preview(BaseModel):
    """A use of a sample, and what its members look like: `picture` is a PNG as a data URI."""

    score: float
    key: str
    step: int
    picture: str | None
    text: str


def preview_sample(sample: dict[str, Any], score: float, step: int) -> Preview:
    """A sample as `Samples.read` gives it."""
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    pictures = [found for name in members if (found := _thumbnail(name, members[name]))]
    texts = [
        f"{name}: {_text(data)}"
        for name, data in members.items()
        if name.rsplit(".", 1)[-1] in TEXTS
    ]
    others = [f"{name}: {len(data)} bytes" for name, data in members.items()]
    told = "; ".join(texts or ([] if pictures else others))
    return Preview(
        score=score, key=sample["__key__"], step=step, picture=next(iter(pictures), None), text=told
    )


def _thumbnail(name: str, data: bytes) -> str | None:
    """A small PNG of a picture; nothing where it is none, or one that cannot be read."""
    kind = PICTURES.get(name.rsplit(".", 1)[-1])
    if kind is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            if picture.width * picture.height > LARGEST:
                return None
            picture.draft("RGB", (SIDE, SIDE))
            small = picture.convert("RGBA" if "A" in picture.getbands() else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _text(data: bytes) -> str:
    """The beginning of a text, on one line, without characters that would turn or hide what stands around it."""
    text = data[: 4 * LETTERS].decode(errors="replace")
    plain = "".join(
        " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" if _hides(c) else c for c in text
    )
    return plain.strip() if len(plain) <= LETTERS else f"{plain[:LETTERS].strip()} ..."


def _hides(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
