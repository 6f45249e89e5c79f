"""Previews of samples for people: a thumbnail of an image, the beginning of a text."""

from __future__ import annotations

import base64
import io
import unicodedata
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel

IMAGES = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
TEXTS = ("txt", "text", "md", "cls", "json", "csv", "tsv", "html", "py", "index")
THUMBNAIL_SIDE = 64  # pixels
# Larger images are not decoded, because they would fill memory.
MOST_PIXELS = 64_000_000
MOST_CHARACTERS = 200


class Preview(BaseModel):
    """A use of a sample, and what its members look like.

    Attributes:
        picture: a PNG as a data URI, or None.
    """

    score: float
    key: str
    step: int
    picture: str | None
    text: str


def preview_sample(sample: dict[str, Any], score: float, step: int) -> Preview:
    """Return the preview of a sample, given as `Samples.read` returns it."""
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    thumbnails = [_thumbnail(name, data) for name, data in members.items()]
    pictures = [picture for picture in thumbnails if picture]
    texts = [f"{name}: {_text(data)}" for name, data in members.items() if _kind(name) in TEXTS]
    if not texts and not pictures:
        texts = [f"{name}: {len(data)} bytes" for name, data in members.items()]
    return Preview(
        score=score,
        key=sample["__key__"],
        step=step,
        picture=pictures[0] if pictures else None,
        text="; ".join(texts),
    )


def _kind(name: str) -> str:
    """The last part of a member's extension."""
    return name.rsplit(".", 1)[-1]


def _thumbnail(name: str, data: bytes) -> str | None:
    """A small PNG of an image; None for other members and images that cannot be read."""
    kind = IMAGES.get(_kind(name))
    if kind is None:
        return None
    side = THUMBNAIL_SIDE
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            # JPEGs are decoded at a reduced size, which is much faster.
            image.draft("RGB", (side, side))
            small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    png = io.BytesIO()
    small.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _text(data: bytes) -> str:
    """The beginning of a text on one line, with characters replaced that could mislead."""
    # A character takes at most four bytes in UTF-8.
    text = data[: 4 * MOST_CHARACTERS].decode(errors="replace")
    plain = "".join(_plain(character) for character in text)
    if len(plain) <= MOST_CHARACTERS:
        return plain.strip()
    return f"{plain[:MOST_CHARACTERS].strip()} ..."


def _plain(character: str) -> str:
    """A character that neither breaks the line nor hides or reorders the text around it."""
    if character.isspace():
        return " "
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return "\N{REPLACEMENT CHARACTER}"
    return character
