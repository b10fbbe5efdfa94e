"""Compressed files as streams of byte blocks that never end early in silence and never expand without bound.

The libraries' own file objects are not enough here: ``zstandard``'s one-shot and object interfaces stop after the first
frame, its stream reader ends without complaint in the middle of a frame, and none of them says where a file is damaged.
Every stream below reads all frames or members, and ends a truncated or damaged file with a `StreamDamage` that carries
both offsets.
"""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO

import zstandard

_COMPRESSED_BLOCK = 64 * 1024
_PLAIN_BLOCK = 1024 * 1024
# What one step of gzip, bzip2 or xz may return. A bzip2 file of 5 kB can hold gigabytes.
_LARGEST_STEP = 1024 * 1024
# zstandard has no limit of output. A block of 4 bytes may stand for 128 KiB, so that this much input gives 32 MiB at
# most; much larger pieces would be some 15 % faster.
_ZSTD_PIECE = 1024
# Outputs are gathered to blocks of this size: a block costs the reader of lines more than a byte does.
_GATHERED = 64 * 1024
# A line beyond this length is a damaged file (a lost line feed, a binary file), not a document.
LONGEST_LINE = 2**30
# Of a long line, what exceeds this is kept compressed until its end is seen (and may be past what is read at all).
_LONG_LINE = 16 * 1024 * 1024

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


def _zlib_step(frame, data) -> tuple[bytes, bytes, bool]:
    output = frame.decompress(data, _LARGEST_STEP)
    if frame.eof:
        return output, frame.unused_data, False
    return output, frame.unconsumed_tail, len(output) == _LARGEST_STEP


def _bz2_or_xz_step(frame, data) -> tuple[bytes, bytes, bool]:
    output = frame.decompress(data, _LARGEST_STEP)
    return output, frame.unused_data, not (frame.eof or frame.needs_input)


def _zstd_step(frame, data) -> tuple[bytes, bytes, bool]:
    data, decompress = memoryview(data), frame.decompress
    outputs: list[bytes] = []
    end, size = 0, 0
    while size < _GATHERED and not frame.eof and end < len(data):
        output = decompress(data[end : end + _ZSTD_PIECE])
        end += _ZSTD_PIECE
        if output:
            outputs.append(output)
            size += len(output)
    unused = len(frame.unused_data) if frame.eof else 0
    return b"".join(outputs), data[min(end, len(data)) - unused :], False


def _zstd_frames() -> Callable:
    # Long-distance windows (up to 2 GiB) appear in re-compressed corpora and exceed the default limit.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj


# For each compression: a function that gives the maker of the frames of one stream; a step, which takes a frame and
# input to (output, input that is left, whether the frame can go on without further input); the errors.
_DECOMPRESSORS: dict[str, tuple[Callable, Callable, type[Exception] | tuple[type[Exception], ...]]] = {
    "gz": (lambda: lambda: zlib.decompressobj(wbits=31), _zlib_step, zlib.error),
    "zst": (_zstd_frames, _zstd_step, zstandard.ZstdError),
    "bz2": (lambda: bz2.BZ2Decompressor, _bz2_or_xz_step, (OSError, EOFError)),
    "xz": (lambda: lzma.LZMADecompressor, _bz2_or_xz_step, (lzma.LZMAError, EOFError)),
}


def uncompressed_blocks(
    file: BinaryIO, compression: str | None, on_compressed: Callable[[int], None] | None = None
) -> Iterator[bytes]:
    """Yields the uncompressed content of ``file`` in blocks of some 64 KiB to 32 MiB, however far it expands.

    Args:
        file: an open binary file, at its beginning.
        compression: what `compression_of` returned for its first bytes.
        on_compressed: called with the number of file bytes that were consumed, for progress.

    Raises:
        StreamDamage: the file is truncated or corrupt; everything before was yielded.
    """
    consumed = 0
    if compression is None:
        while block := file.read(_PLAIN_BLOCK):
            if on_compressed is not None:
                on_compressed(len(block))
            yield block
        return
    frames, step, errors = _DECOMPRESSORS[compression]
    make, frame = frames(), None
    gathered: list[bytes] = []
    size = 0
    while pending := file.read(_COMPRESSED_BLOCK):
        block_size, more = len(pending), True
        if on_compressed is not None:
            on_compressed(block_size)
        while more:
            if frame is None:
                # Padding of zeros after a member is legal (tapes, block devices) and carries no data.
                if compression in ("gz", "xz") and not bytes(pending).strip(b"\0"):
                    break
                frame = make()
            try:
                data, pending, unfinished = step(frame, pending)
            except errors as error:
                yield b"".join(gathered)
                raise StreamDamage(False, consumed, f"its {compression} data are corrupt ({error})") from error
            gathered.append(data)
            size += len(data)
            if size >= _GATHERED:
                yield b"".join(gathered)
                gathered, size = [], 0
            if frame.eof:
                frame = None
            more = unfinished or len(pending) > 0
        consumed += block_size
    if gathered:
        yield b"".join(gathered)
    if frame is not None:
        raise StreamDamage(True, consumed, f"the {compression} data end in the middle of a frame")


class PeekableFile:
    """Lets the first bytes of a file be looked at without losing them, which a pipe could not give again."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._held = b""

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end."""
        while len(self._held) < size and (data := self._file.read(size - len(self._held))):
            self._held += data
        return self._held

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes or what was peeked at; empty at the end alone."""
        if self._held:
            held, self._held = self._held, b""
            return held
        return self._file.read(size)


class BlockReader:
    """Reads a stream of blocks by numbers of bytes.

    Attributes:
        position: bytes read so far.
    """

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._block = memoryview(b"")
        self.position = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; empty at the end alone."""
        while not self._block and size:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._block = memoryview(block)
        data = bytes(self._block[:size])
        self._block = self._block[size:]
        self.position += len(data)
        return data

    def read_all(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end of the stream alone."""
        parts: list[bytes] = []
        while size and (data := self.read(size)):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)


def with_head(blocks: Iterator[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """The first blocks of a stream, ``size`` bytes or a little more, and the whole stream again.

    Damage within the head is raised by the stream, where it belongs.
    """
    taken: list[bytes] = []
    length = 0
    try:
        while length < size and (block := next(blocks, None)) is not None:
            taken.append(block)
            length += len(block)
    except StreamDamage as error:
        blocks = raising(error)
    head = b"".join(taken)
    return head, chain([head], blocks)


def raising(damage: StreamDamage) -> Iterator[bytes]:
    """The rest of a stream whose damage was met while its beginning was looked at."""
    raise damage
    yield b""  # makes it a generator: the damage is met where the stream goes on


def transcoded(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """A stream in another encoding as UTF-8, U+FFFD in the place of what is not valid in it."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for block in blocks:
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")


class _Line:
    """The beginning of a line whose end is not seen yet; a long one is kept compressed."""

    def __init__(self, longest: int):
        self._longest = longest
        self._parts: list[bytes] = []
        self._packed: list[bytes] = []
        self._loose = 0
        self.length = 0

    def add(self, data: bytes) -> None:
        self.length += len(data)
        if self.length > self._longest:
            self._parts, self._packed = [], []
            return
        self._parts.append(data)
        self._loose += len(data)
        if self._loose > _LONG_LINE:
            packed = zstandard.ZstdCompressor(level=1).compress(b"".join(self._parts))
            self._packed.append(bytes(memoryview(packed)))  # a copy, for zstandard's bytes keep the room of the input
            self._parts, self._loose = [], 0

    def take(self) -> bytes | None:
        """The line, or None when it was too long; it is empty afterwards."""
        parts, packed, length = self._parts, self._packed, self.length
        self._parts, self._packed, self._loose, self.length = [], [], 0, 0
        if length > self._longest:
            return None
        if not packed:
            return b"".join(parts)
        line = io.BytesIO()  # hands its buffer out without a copy
        for data in packed:
            line.write(zstandard.decompress(data))
        for data in parts:
            line.write(data)
        return line.getvalue()


def _open_character(data: bytes) -> int:
    """Bytes at the end that may belong to a UTF-8 character whose rest is still to come."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return back if data[-back] >= 0xC0 else 0
    return 0


def lines_of(blocks: Iterator[bytes], longest: int, cut: int = 0) -> Iterator[tuple[int, bytes | None, int, bool]]:
    """Cuts blocks into lines at ``\\n`` alone.

    ``str.splitlines`` would also cut at U+0085 and U+2028, which stand unescaped inside JSON strings.

    Args:
        blocks: byte blocks of one stream.
        longest: a line of more bytes than this is not kept in memory; it is yielded as None.
        cut: a longer line is yielded in pieces of at least so many bytes, cut between characters; 0 never cuts.

    Yields:
        (offset of the line, its bytes without the line feed or None, its length, whether a line feed ended it).
        A StreamDamage of ``blocks`` passes through after the unfinished line was yielded.
    """
    line = _Line(longest)
    offset = 0
    damage = None
    while True:
        try:
            block = next(blocks, None)
        except StreamDamage as error:
            damage, block = error, None
        if block is None:
            break
        first, *complete = block.split(b"\n")
        line.add(first)
        first = block = None  # both may be large
        if not complete:
            if cut and line.length > cut:
                piece = line.take()
                if open_end := _open_character(piece):
                    line.add(piece[-open_end:])
                    piece = piece[:-open_end]
                length = len(piece)
                yield offset, piece, length, False
                piece = None
                offset += length
            continue
        length = line.length
        yield offset, line.take(), length, True
        offset += length + 1
        rest = complete.pop()
        for whole in complete:
            length = len(whole)
            yield offset, (whole if length <= longest else None), length, True
            offset += length + 1
        if rest:
            line.add(rest)
    if line.length:
        length = line.length
        yield offset, line.take(), length, False
    if damage is not None:
        raise damage
