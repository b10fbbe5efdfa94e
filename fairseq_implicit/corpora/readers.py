"""Readers: one source file to its documents, and one sentence for everything in it that could not be read.

Nothing is dropped in silence: what a reader cannot turn into a `Document` becomes a `ReadProblem` with file and offset,
and the rest of the file goes on wherever that is possible.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from fairseq_implicit.corpora.problems import CorpusError, ReadProblem
from fairseq_implicit.corpora.records import Document, RecordError, document_from_record
from fairseq_implicit.corpora.sources import (
    STANDARD_INPUT,
    Source,
    container_of,
    looks_like_json,
    oscar_metadata_beside,
    suffixes_of,
)
from fairseq_implicit.corpora.streams import (
    BlockFile,
    StreamDamage,
    compression_of,
    lines_of,
    uncompressed_blocks,
)

# A "line" beyond this length is a damaged file (a lost line feed, a binary file), not a document.
LONGEST_LINE = 2**30
# Text files without any document boundary are read in pieces of this many bytes, so that memory stays flat.
LONGEST_TEXT_PIECE = 64 * 2**20
_HEAD_FOR_DETECTION = 2**20
_BLANK_LINE = re.compile(rb"(?:\A|\n)[ \t\r]*\n")

Item = Document | ReadProblem


def read_source(
    source: Source, boundary: str = "auto", on_compressed: Callable[[int], None] | None = None
) -> Iterator[Item]:
    """Yields the documents of one source, and its problems where they occur.

    Args:
        source: the file, or the standard input.
        boundary: what separates documents in plain text: "blank-line", "line", "file" or "auto" (by content).
        on_compressed: called with numbers of consumed file bytes.
    """
    try:
        if source.name == STANDARD_INPUT:
            yield from _read_stream(sys.stdin.buffer, "standard input", None, boundary, on_compressed)
            return
        path = Path(source.name)
        container, compression = container_of(path)
        if container == "parquet":
            # Imported here because pyarrow is needed for this one format only.
            from fairseq_implicit.corpora.parquet import read_parquet

            yield from read_parquet(path, on_compressed)
            return
        with open(path, "rb") as file:
            if container == "tar":
                yield from _read_tar(file, path, compression, boundary, on_compressed)
            else:
                yield from _read_stream(file, str(path), path, boundary, on_compressed)
    except OSError as error:
        reason = error.strerror or str(error)
        yield ReadProblem(
            "unreadable file",
            source.name,
            0,
            f"{source.name} cannot be read ({reason}); check its permissions and the disk, then run again.",
        )
    except CorpusError as error:
        yield ReadProblem("unreadable file", source.name, 0, str(error))


def _read_tar(
    file: BinaryIO, path: Path, compression: str | None, boundary: str, on_compressed: Callable[[int], None] | None
) -> Iterator[Item]:
    blocks = uncompressed_blocks(file, compression, on_compressed)
    try:
        with tarfile.open(fileobj=io.BufferedReader(BlockFile(blocks), 2**20), mode="r|") as archive:
            for member in archive:
                if member.isfile():
                    name = f"{path}!{member.name}"
                    yield from _read_stream(_Member(archive.extractfile(member)), name, None, boundary, None)
    except (tarfile.ReadError, StreamDamage) as error:
        yield ReadProblem(
            "truncated file", str(path), 0, f"The archive {path} ends early or is damaged ({error}); fetch it again."
        )


def _read_stream(
    file: BinaryIO, name: str, path: Path | None, boundary: str, on_compressed: Callable[[int], None] | None
) -> Iterator[Item]:
    """Reads one stream of JSON lines or text, compressed or not; ``path`` is None for pipes and archive members."""
    file = _Peekable(file)
    compression = compression_of(file.peek(16))
    blocks = uncompressed_blocks(file, compression, on_compressed)
    damage: StreamDamage | None = None
    head_blocks: list[bytes] = []
    try:
        while sum(map(len, head_blocks)) < _HEAD_FOR_DETECTION and (block := next(blocks, None)) is not None:
            head_blocks.append(block)
    except StreamDamage as error:
        damage = error
    head = b"".join(head_blocks)
    blocks = chain([head], blocks) if damage is None else _then_raise([head], damage)
    try:
        if looks_like_json(name, head):
            yield from _read_json_lines(blocks, name)
        else:
            if boundary == "auto":
                boundary = _boundary_of(name, head, compression)
            documents = _read_text(blocks, name, boundary)
            metadata = oscar_metadata_beside(path) if path is not None and boundary == "blank-line" else None
            yield from documents if metadata is None else _checked_by_metadata(documents, metadata)
    except StreamDamage as error:
        yield ReadProblem(
            "truncated file" if error.truncated else "corrupt compressed data",
            name,
            error.compressed_offset,
            f"{name}: {error.sentence_end} after byte {error.compressed_offset} of the file; the documents before it "
            "are kept, fetch the file again for the rest.",
        )


class _Member:
    """An archive member; the end of a cut archive becomes the damage of its stream."""

    # A read that meets the cut loses what it had already got, so reads are small.
    _LARGEST_READ = 2**14

    def __init__(self, file: BinaryIO):
        self._file = file
        self._consumed = 0

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(min(size, self._LARGEST_READ))
        except tarfile.ReadError as error:
            raise StreamDamage(True, self._consumed, f"the archive ends inside this member ({error})") from error
        self._consumed += len(data)
        return data


class _Peekable:
    """Lets the first bytes of a pipe be looked at without losing them."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._held = b""

    def peek(self, size: int) -> bytes:
        while len(self._held) < size and (data := self._file.read(size - len(self._held))):
            self._held += data
        return self._held

    def read(self, size: int) -> bytes:
        if self._held:
            held, self._held = self._held, b""
            return held
        return self._file.read(size)


def _then_raise(blocks: list[bytes], damage: StreamDamage) -> Iterator[bytes]:
    yield from blocks
    raise damage


def _boundary_of(name: str, head: bytes, compression: str | None) -> str:
    """Blank lines separate documents where there are any.

    Without them a compressed text is one of OSCAR 2019's line-shuffled files, and a plain one is a single document.
    """
    if _BLANK_LINE.search(head):
        return "blank-line"
    return "line" if compression or suffixes_of(name)[1] else "file"


def _decoded(data: bytes) -> tuple[str, tuple[str, ...]]:
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), ("invalid UTF-8",)


def _too_long(name: str, offset: int, length: int) -> ReadProblem:
    return ReadProblem(
        "line too long",
        name,
        offset,
        f"{name}: the line at byte {offset} has {length} bytes, more than {LONGEST_LINE}; the file is probably damaged "
        "or not a text file.",
        1,
        length,
    )


def _read_json_lines(blocks: Iterator[bytes], name: str) -> Iterator[Item]:
    for number, (offset, line, length, ended) in enumerate(lines_of(blocks, LONGEST_LINE), start=1):
        if line is None:
            yield _too_long(name, offset, length)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        text, repairs = _decoded(line)
        try:
            document = document_from_record(json.loads(text), name, offset)
        except RecordError as error:
            sentence = f"{name}: the record in line {number} (byte {offset}) is no document: {error}."
            yield ReadProblem("record without text", name, offset, sentence, 1, length)
            continue
        except (ValueError, RecursionError) as error:
            if ended:
                sentence = f"{name}: line {number} (byte {offset}) is no valid JSON ({error})."
                yield ReadProblem("corrupt JSON line", name, offset, sentence, 1, length)
            else:
                sentence = f"{name}: the file ends inside the record of line {number} (byte {offset})."
                yield ReadProblem("truncated record", name, offset, sentence, 1, length)
            continue
        document.repairs = repairs
        yield document


def _read_text(blocks: Iterator[bytes], name: str, boundary: str) -> Iterator[Item]:
    """Documents of a text stream; the line feed that ends a document is not part of its text."""
    parts: list[bytes] = []
    start, held = 0, 0
    lines = lines_of(blocks, LONGEST_LINE)
    while True:
        try:
            offset, line, length, ended = next(lines)
        except StopIteration:
            if parts:
                yield _text_document(parts, name, start)
            return
        except StreamDamage:
            if parts:
                sentence = f"{name}: the file ends inside the document at byte {start}."
                yield ReadProblem("truncated record", name, start, sentence, 1, held)
            raise
        if line is None:
            yield _too_long(name, offset, length)
            continue
        blank = not line.strip()
        if boundary == "line":
            # One line of look-ahead keeps a line that a truncated file cut off from passing for a whole one.
            if parts:
                yield _text_document(parts, name, start)
            parts, start, held = ([] if blank else [line]), offset, length
            continue
        if blank and boundary == "blank-line":
            if parts:
                yield _text_document(parts, name, start)
            parts, held = [], 0
            continue
        if parts and held + length > LONGEST_TEXT_PIECE:
            yield _text_document(parts, name, start, ("cut at 64 MiB",))
            parts, held = [], 0
        if not parts:
            start = offset
        parts.append(line)
        held += length + 1


def _text_document(parts: list[bytes], name: str, start: int, repairs: tuple[str, ...] = ()) -> Document:
    text, decoding = _decoded(b"\n".join(parts))
    return Document(text, name, start, repairs=repairs + decoding)


def _checked_by_metadata(items: Iterator[Item], metadata_path: Path) -> Iterator[Item]:
    """Passes the documents of an OSCAR 21.09 text through and compares their line counts with the side file's.

    A text that lost or gained a blank line would silently merge or cut documents; the first disagreement is reported.
    """
    with open(metadata_path, "rb") as file:
        compression = compression_of(file.read(16))
        file.seek(0)
        lines = (line for _, line, _, _ in lines_of(uncompressed_blocks(file, compression), LONGEST_LINE) if line)
        checking, number = True, 0
        for item in items:
            yield item
            if not checking or not isinstance(item, Document):
                continue
            number += 1
            expected, fault = _sentences_of(lines)
            found = item.text.count("\n") + 1
            if expected != found:
                checking = False
                fault = fault or f"its side file {metadata_path.name} says {expected}"
                yield ReadProblem(
                    "metadata disagree",
                    item.path,
                    item.offset,
                    f"{item.path}: document {number} (byte {item.offset}) has {found} lines, but {fault}; text and "
                    "side file do not belong together or the text is damaged.",
                )


def _sentences_of(lines: Iterator[bytes]) -> tuple[int | None, str]:
    try:
        line = next(lines, None)
        if line is None:
            return None, "the side file has no further entry"
        return json.loads(line)["nb_sentences"], ""
    except (StreamDamage, ValueError, KeyError, TypeError) as error:
        return None, f"the side file cannot be read there ({type(error).__name__}: {error})"
