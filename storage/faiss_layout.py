"""The layout of FAISS's index files, which is checked before FAISS maps a file."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import faiss

# FAISS's file layout. The header: kind, width, number of vectors, two unused fields, whether the
# index is trained, metric.
HEADER = struct.Struct("<4siqqq?i")
# Then, of a quantizer: its type, how it found its ranges (two fields), width, bytes per vector,
# number of floats that its ranges take.
QUANTIZER = struct.Struct("<iifQQQ")
# The bytes per coefficient of each known quantizer.
QUANTIZED_BYTES = {faiss.ScalarQuantizer.QT_8bit: 1, faiss.ScalarQuantizer.QT_fp16: 2}


def check_layout(path: Path) -> None:
    """Compare the sizes that a file declares with its length.

    FAISS maps the file without this check, and would read beyond its end.

    Raises:
        RuntimeError, struct.error: the file is no index of `faiss_index.INDEX_KINDS`, or has
            another length.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        kind, width, total, *_ = HEADER.unpack(file.read(HEADER.size))
        if width <= 0 or total < 0:
            raise RuntimeError("its header declares an impossible size")
        if kind == b"IxSQ":
            # The codes are counted in bytes.
            unit = 1
            per_vector = _check_quantizer(file, width)
        elif kind == b"IxFI":
            # The coefficients are counted in float32 numbers.
            unit = 4
            per_vector = width
        else:
            raise RuntimeError("it is of an unknown kind")
        (count,) = struct.unpack("<Q", file.read(8))
        if count != total * per_vector or size != file.tell() + unit * count:
            raise RuntimeError("its length is not what its header declares")


def _check_quantizer(file: BinaryIO, width: int) -> int:
    """Check a quantizer's header, skip its ranges, and return the bytes per vector."""
    quantizer, _, _, own_width, per_vector, ranges = QUANTIZER.unpack(file.read(QUANTIZER.size))
    per_coefficient = QUANTIZED_BYTES.get(quantizer)
    # Half precision needs no ranges.
    expected_ranges = 2 * width if per_coefficient == 1 else 0
    if (
        per_coefficient is None
        or own_width != width
        or per_vector != width * per_coefficient
        or ranges != expected_ranges
    ):
        raise RuntimeError("its quantizer does not match its header")
    file.seek(4 * ranges, os.SEEK_CUR)
    return int(per_vector)
