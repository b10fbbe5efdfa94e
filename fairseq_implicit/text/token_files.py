"""The tokens of one binarised split: fairseq's memory-mapped format, read as one flat array.

``.bin`` holds the token ids of all lines without gaps. ``.idx`` holds the magic ``MMIDIDX\\0\\0``, version 1 (u64), the
type code (u8), the number of lines (u64), the length of each line (int32) and its byte offset in ``.bin`` (int64).
"""

from __future__ import annotations

import os
import struct

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQ")  # magic, version, type code, number of lines
_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2", 9: "u4", 10: "u8"}  # of fairseq's codes, for integers
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
# fairseq stores ids of smaller vocabularies in 16 bits.
_UINT16_LIMIT = 65500


def id_type(rows: int) -> np.dtype:
    """Integer type of the ids of a vocabulary with so many rows."""
    return np.dtype(np.uint16 if rows < _UINT16_LIMIT else np.uint32)


def index_header(dtype: np.dtype, lines: int) -> bytes:
    """Beginning of an ``.idx``; the lengths and the offsets of all lines follow."""
    return _HEADER.pack(_MAGIC, 1, _CODES[np.dtype(dtype)], lines)


class MappedTokens:
    """One ``<prefix>.bin``/``<prefix>.idx`` pair.

    fairseq's own reader reads the whole ``.bin`` once to warm the page cache, in every process that opens or unpickles
    it; this one touches only what is asked for. The lines of a ``.bin`` follow each other without gaps, so a block
    that spans lines is one slice.

    Attributes:
        line_lengths: tokens of each line, ``(lines,)`` int32, mapped from the index.
        token_count: tokens in the file.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the pair is truncated, or not in mmap format.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        index_path, data_path = f"{prefix}.idx", f"{prefix}.bin"
        for path in (index_path, data_path):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path} does not exist: binarise the split with fairseq-preprocess.")
        with open(index_path, "rb") as stream:
            header = stream.read(_HEADER.size)
        magic, _, code, lines = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
        if magic != _MAGIC or code not in _TYPES:
            raise ValueError(
                f"{index_path} is not an index in fairseq's mmap format: binarise again with --dataset-impl mmap."
            )
        expected = _HEADER.size + 12 * lines  # int32 length and int64 offset per line
        if os.path.getsize(index_path) < expected:
            raise ValueError(
                f"{index_path} is truncated ({os.path.getsize(index_path)} of {expected} bytes): binarise again."
            )
        self._dtype = np.dtype(_TYPES[code])
        self.line_lengths = (
            np.memmap(index_path, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(lines,))
            if lines
            else np.zeros(0, dtype=np.int32)
        )
        self.token_count = int(self.line_lengths.sum(dtype=np.int64))
        size = os.path.getsize(data_path)
        if size != self.token_count * self._dtype.itemsize:
            raise ValueError(
                f"{data_path} has {size} bytes where its index says {self.token_count * self._dtype.itemsize}: "
                "the file is truncated or belongs to another index; binarise again."
            )
        self._tokens = np.memmap(data_path, dtype=self._dtype, mode="r") if size else np.zeros(0, dtype=self._dtype)

    def __reduce__(self):
        return type(self), (self.prefix,)

    def slice(self, start: int, length: int) -> np.ndarray:
        """Tokens ``[start, start + length)`` of the flat file, ``(length,)`` int64 (a copy)."""
        return np.array(self._tokens[start : start + length], dtype=np.int64)
