"""Compressed files as streams of byte blocks that never end early in silence.

The libraries' own file objects are not enough here: ``zstandard``'s one-shot and object interfaces stop after the first
frame, its stream reader ends without complaint in the middle of a frame, and none of them says where a file is damaged.
Every stream below reads all frames or members, and ends a truncated or damaged file with a `StreamDamage` that carries
both offsets.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

# Compressed input is fed in small pieces: a text can expand 20-fold and a crafted one 1000-fold, and the pieces bound
# what one call may return.
_COMPRESSED_BLOCK = 64 * 1024
_PLAIN_BLOCK = 1024 * 1024

_SKIPPABLE_FRAME = {bytes([first, 0x2A, 0x4D, 0x18]) for first in range(0x50, 0x60)}


class StreamDamage(Exception):
    """A compressed stream ends too early or cannot be decoded.

    Attributes:
        truncated: True when the data stop in the middle of a frame, False when they are corrupt.
        compressed_offset: bytes of the compressed file consumed so far.
        sentence_end: how the sentence about the file goes on.
    """

    def __init__(self, truncated: bool, compressed_offset: int, sentence_end: str):
        super().__init__(sentence_end)
        self.truncated = truncated
        self.compressed_offset = compressed_offset
        self.sentence_end = sentence_end


def compression_of(head: bytes) -> str | None:
    """Name of the compression that a file's first bytes announce: gz, zst, bz2, xz or None."""
    if head[:2] == b"\x1f\x8b":
        return "gz"
    if head[:4] == b"\x28\xb5\x2f\xfd" or head[:4] in _SKIPPABLE_FRAME:
        return "zst"
    if head[:3] == b"BZh":
        return "bz2"
    if head[:6] == b"\xfd7zXZ\x00":
        return "xz"
    return None


def _zstd_frame():
    # Long-distance windows (up to 2 GiB) appear in re-compressed corpora and exceed the default limit.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


_DECOMPRESSORS: dict[str, tuple[Callable, type[Exception] | tuple[type[Exception], ...]]] = {
    "gz": (lambda: zlib.decompressobj(wbits=31), zlib.error),
    "zst": (_zstd_frame, zstandard.ZstdError),
    "bz2": (bz2.BZ2Decompressor, (OSError, EOFError)),
    "xz": (lzma.LZMADecompressor, (lzma.LZMAError, EOFError)),
}


def uncompressed_blocks(
    file: BinaryIO, compression: str | None, on_compressed: Callable[[int], None] | None = None
) -> Iterator[bytes]:
    """Yields the uncompressed content of ``file`` in blocks of bytes.

    Args:
        file: an open binary file, at its beginning.
        compression: what `compression_of` returned for its first bytes.
        on_compressed: called with the number of file bytes that were consumed, for progress.

    Raises:
        StreamDamage: the file is truncated or corrupt; everything before was yielded.
    """
    block_size = _PLAIN_BLOCK if compression is None else _COMPRESSED_BLOCK
    consumed = 0
    make, errors = _DECOMPRESSORS[compression] if compression else (None, ())
    frame = None
    while block := file.read(block_size):
        if on_compressed is not None:
            on_compressed(len(block))
        if make is None:
            yield block
            continue
        pending = block
        while pending:
            if frame is None:
                # Padding of zeros after a gzip member is legal (tapes, block devices) and carries no data.
                if compression == "gz" and not pending.strip(b"\0"):
                    break
                frame = make()
            try:
                data = frame.decompress(pending)
            except errors as error:
                raise StreamDamage(False, consumed, f"its {compression} data are corrupt ({error})") from error
            if data:
                yield data
            if frame.eof:
                pending, frame = frame.unused_data, None
            else:
                pending = b""
        consumed += len(block)
    if frame is not None:
        raise StreamDamage(True, consumed, f"the {compression} data end in the middle of a frame")


class BlockFile(io.RawIOBase):
    """A file object over an iterator of blocks, for `tarfile`'s streaming mode (wrap it in a BufferedReader)."""

    def __init__(self, blocks: Iterator[bytes]):
        super().__init__()
        self._blocks = blocks
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        size = min(len(buffer), len(self._block))
        buffer[:size] = self._block[:size]
        self._block = self._block[size:]
        return size


def head_of(path: Path, size: int = 512) -> bytes:
    """The first ``size`` bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size)


def lines_of(blocks: Iterator[bytes], longest: int) -> Iterator[tuple[int, bytes | None, int, bool]]:
    """Cuts blocks into lines at ``\\n`` alone.

    ``str.splitlines`` would also cut at U+0085 and U+2028, which stand unescaped inside JSON strings.

    Args:
        blocks: byte blocks of one stream.
        longest: a line of more bytes than this is not kept in memory; it is yielded as None.

    Yields:
        (offset of the line, its bytes without the line feed or None, its length, whether a line feed ended it).
        A StreamDamage of ``blocks`` passes through after the unfinished line was yielded.
    """
    parts: list[bytes] = []
    length, offset = 0, 0
    damage = None
    while True:
        try:
            block = next(blocks, None)
        except StreamDamage as error:
            damage, block = error, None
        if block is None:
            break
        if b"\n" not in block:
            length += len(block)
            if length <= longest:
                parts.append(block)
            else:
                parts.clear()
            continue
        first, *complete, rest = block.split(b"\n")
        length += len(first)
        yield offset, (b"".join([*parts, first]) if length <= longest else None), length, True
        offset += length + 1
        for line in complete:
            yield offset, (line if len(line) <= longest else None), len(line), True
            offset += len(line) + 1
        parts, length = ([rest] if rest else []), len(rest)
    if length:
        yield offset, (b"".join(parts) if length <= longest else None), length, False
    if damage is not None:
        raise damage
