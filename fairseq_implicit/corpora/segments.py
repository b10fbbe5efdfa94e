"""The intermediate files between reading and merging: documents of one source, ordered by hash.

A segment file is a sequence of frames, zstd's or plain ones. Each holds the documents of one bucket (one range of the
document hash) out of one block of input, in hash order. The index at the end says where each bucket's frames are, so
that the merge of a bucket reads only its own bytes of every source. Equal documents of one block are stored once.
Layout::

    frame, frame, ...          records: key (16), split (u8), repeats (u64), length (u32), text
    held-out keys: 16 bytes for each document of a held-out split
    index: (bucket u16, offset u64, length u32, bytes u64) per frame, little-endian
    footer: offset of the held-out keys (u64), offset of the index (u64), magic (8)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from fairseq_implicit.corpora.problems import CorpusError

_COMPRESSED, _PLAIN = b"FICORP02", b"FICORP03"
_RECORD = struct.Struct("<16sBQI")
_FOOTER = struct.Struct("<QQ8s")
INDEX = np.dtype([("bucket", "<u2"), ("offset", "<u8"), ("length", "<u4"), ("bytes", "<u8")])
# Stored split numbers, in the order in which a split keeps a document that several splits have. A copy is a train
# document once more, under a key of its own (`derived_key`).
TEST, VALID, TRAIN, COPY = 0, 1, 2, 3
# Text that is held and sorted before it is written: larger blocks mean longer frames, smaller ones less memory.
BLOCK_SIZE = 64 * 2**20
# Cost of one document in memory beyond its text (the entry of the dictionary, the key, the tuple, the bytes object).
_DOCUMENT_OVERHEAD = 300

Stored = tuple[bytes, int, int, bytes]
"""(key, split number, number of equal documents, text)."""


def document_key(text: bytes, seed: int) -> bytes:
    """128-bit hash of a cleaned text: its identity for deduplication, its place in the order, its split.

    Bytes 0–7 order the documents, bytes 8–15 choose the split; BLAKE2b makes the two independent.
    """
    return hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, "little", signed=True)).digest()


def derived_key(key: bytes, number: int) -> bytes:
    """Key of a document's further copy, so that copies spread over the whole order."""
    return hashlib.blake2b(key, digest_size=16, salt=number.to_bytes(8, "little")).digest()


def share_of(key: bytes, purpose: int) -> float:
    """A number in [0, 1) drawn from a key; different purposes give independent numbers (0 splits, 1 samples, ...)."""
    digest = key[8:] if purpose == 0 else hashlib.blake2b(key, digest_size=8, salt=bytes([purpose])).digest()
    return int.from_bytes(digest, "big") / 2**64


def bucket_of(key: bytes, buckets: int) -> int:
    """Range of the hash that a key falls into, 0 to ``buckets - 1``, in the order of the keys."""
    return int.from_bytes(key[:4], "big") * buckets >> 32


def first_key_after(bucket: int, buckets: int) -> bytes:
    """A bound above all keys of a bucket and not above those of the next one."""
    first = -((bucket + 1) * -(2**32) // buckets)
    return first.to_bytes(4, "big") if first < 2**32 else b"\xff" * 17


class SegmentWriter:
    """Writes one segment file; give it a temporary path and rename the result.

    Args:
        path: file to write.
        buckets: number of hash ranges.
        compress: a third to a half of the size, for more time than all the rest of the preparation's writing takes.
    """

    def __init__(self, path: Path, buckets: int, compress: bool = False):
        self._path = path
        self._file = open(path, "wb")
        self._buckets = buckets
        # Sorted, the keys with the split behind them give the order of the records.
        self._documents: dict[tuple[bytes, int], tuple[int, bytes]] = {}
        self._size = 0
        self._offset = 0
        self._index: list[tuple[int, int, int, int]] = []
        self._held_out = bytearray()
        self._hash = hashlib.sha256()
        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=True) if compress else None

    def add(self, key: bytes, split: int, text: bytes) -> None:
        """Adds one document."""
        equal = self._documents.get((key, split))
        if equal is not None:
            self._documents[key, split] = (equal[0] + 1, equal[1])
            return
        self._documents[key, split] = (1, text)
        self._size += len(text) + _DOCUMENT_OVERHEAD
        if split < TRAIN:
            self._held_out += key
        if self._size >= BLOCK_SIZE:
            self._flush()

    def _write(self, data: bytes | bytearray) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def _flush(self) -> None:
        bucket, size, length, parts, pack = -1, 0, 0, [], _RECORD.pack
        following = b""
        for (key, split), (repeats, text) in sorted(self._documents.items()):
            # A frame's length must fit the index's 32 bits; 1 GiB of text per frame stays far below.
            if key >= following or length >= 2**30:
                self._write_frame(bucket, size, parts)
                bucket, size, length, parts = bucket_of(key, self._buckets), 0, 0, []
                following = first_key_after(bucket, self._buckets)
            parts += (pack(key, split, repeats, len(text)), text)
            length += len(text)
            # Counted with its repetitions, for the sizes of shards must not depend on what was found equal here.
            size += repeats * len(text)
        self._write_frame(bucket, size, parts)
        self._documents.clear()
        self._size = 0

    def _write_frame(self, bucket: int, size: int, parts: list[bytes]) -> None:
        if parts:
            frame = b"".join(parts)
            if self._compressor is not None:
                frame = self._compressor.compress(frame)
            self._index.append((bucket, self._offset, len(frame), size))
            self._write(frame)

    def abandon(self) -> None:
        """Removes the unfinished file."""
        with contextlib.suppress(OSError):  # a full disk is reported once
            self._file.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> str:
        """Writes the keys and the index and makes the file durable; returns the file's SHA-256."""
        self._flush()
        held_out_offset = self._offset
        self._write(self._held_out)
        index_offset = self._offset
        self._write(np.array(self._index, dtype=INDEX).tobytes())
        self._write(_FOOTER.pack(held_out_offset, index_offset, _PLAIN if self._compressor is None else _COMPRESSED))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


class SegmentFile:
    """Reads one segment file bucket by bucket.

    Attributes:
        index: one entry per frame, dtype `INDEX`, sorted by bucket.
        held_out: keys of the documents of held-out splits, ``(documents, 2)`` uint64, in no order.

    Raises:
        CorpusError: the file is no complete segment file.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(size - _FOOTER.size, 0))
            footer = file.read()
            held_out, offset, magic = _FOOTER.unpack(footer) if len(footer) == _FOOTER.size else (0, 0, b"")
            end = size - _FOOTER.size
            if magic not in (_COMPRESSED, _PLAIN) or not held_out <= offset <= end or (end - offset) % INDEX.itemsize:
                raise CorpusError(
                    f"The intermediate file {path} is incomplete; remove it with the .json file beside it and run the "
                    "same command again."
                )
            self._is_compressed = magic == _COMPRESSED
            file.seek(held_out)
            self.held_out = np.frombuffer(file.read(offset - held_out), dtype=">u8").reshape(-1, 2).astype(np.uint64)
            index = np.frombuffer(file.read(end - offset), dtype=INDEX)
        self.index = index[np.argsort(index["bucket"], kind="stable")]
        self._buckets = np.ascontiguousarray(self.index["bucket"])

    def documents(self, bucket: int) -> Iterator[Stored]:
        """The documents of one bucket, frame by frame; each frame is in hash order."""
        first, last = self._buckets.searchsorted([bucket, bucket + 1])
        if first == last:
            return
        decompressor = zstandard.ZstdDecompressor() if self._is_compressed else None
        unpack, header = _RECORD.unpack_from, _RECORD.size
        file = os.open(self.path, os.O_RDONLY)  # not held open: there may be thousands
        try:
            for _, offset, length, _ in self.index[first:last].tolist():
                data = os.pread(file, length, offset)
                try:
                    if decompressor is not None:
                        data = decompressor.decompress(data)
                except zstandard.ZstdError as error:
                    raise CorpusError(
                        f"The intermediate file {self.path} is damaged at byte {offset} ({error}); remove it with the "
                        ".json file beside it and run the same command again."
                    ) from error
                end, size = 0, len(data)
                while end < size:
                    key, split, repeats, length = unpack(data, end)
                    start = end + header
                    end = start + length
                    yield key, split, repeats, data[start:end]
        finally:
            os.close(file)
