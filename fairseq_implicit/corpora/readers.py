"""Readers: one source file to its documents, and one sentence for everything in it that could not be read.

Nothing is dropped in silence: what a reader cannot turn into a `Document` becomes a `ReadProblem` with file and offset,
and the rest of the file goes on wherever that is possible.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import orjson

from fairseq_implicit.corpora.content import (
    PARQUET,
    encoding_fault,
    encoding_of,
    invalid_in,
    is_tar,
    refuse_binary,
    refuse_foreign,
)
from fairseq_implicit.corpora.problems import CorpusError, ReadNote, ReadProblem
from fairseq_implicit.corpora.records import TEXT_FIELDS, Document, RecordError, document_from_record
from fairseq_implicit.corpora.side_files import checked_by_side_file, side_file_of
from fairseq_implicit.corpora.sources import (
    STANDARD_INPUT,
    Source,
    is_archived_corpus_file,
    looks_like_json,
    suffixes_of,
)
from fairseq_implicit.corpora.streams import (
    LONGEST_LINE,
    BlockReader,
    PeekableFile,
    StreamDamage,
    compression_of,
    lines_of,
    raising,
    transcoded,
    uncompressed_blocks,
    with_head,
)
from fairseq_implicit.corpora.tar import TarMember, tar_members

logger = logging.getLogger(__name__)

# Text files without any document boundary are read in pieces of this many bytes, so that memory stays flat.
LONGEST_TEXT_PIECE = 64 * 2**20
# In compressed text so much is held until a blank line shows that documents are separated by blank lines.
LOOK_AHEAD = 16 * 2**20
_HEAD_FOR_DETECTION = 2**20
_BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*+\n")

Item = Document | ReadProblem | ReadNote


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read.

    Attributes:
        boundary: what separates documents in plain text: "blank-line", "line", "file" or "auto" (by content).
        encoding: of text and JSON lines; "" reads UTF-8, and UTF-16 and UTF-32 where a byte order mark says so.
        text_fields: names of the field with the text in JSON and parquet; the first one that is there counts.
        on_compressed: called with numbers of consumed file bytes.
        on_lost: called with shares of the consumed bytes that gave nothing: 1 for a file that is refused, the share of
            the members without text for an archive.
    """

    boundary: str = "auto"
    encoding: str = ""
    text_fields: tuple[str, ...] = TEXT_FIELDS
    on_compressed: Callable[[int], None] | None = None
    on_lost: Callable[[float], None] = lambda share: None


def read_source(source: Source, options: ReadOptions = ReadOptions()) -> Iterator[Item]:
    """Yields the documents of one source, and its problems where they occur.

    No file ends the reading with an error: a file that cannot be read, or is no corpus, is one problem.
    """
    name = source.name
    try:
        if name == STANDARD_INPUT:
            yield from _read_stream(PeekableFile(sys.stdin.buffer), "standard input", options)
            return
        if os.path.isdir(name):
            # `find_sources` could not list it.
            os.scandir(name).close()
            yield ReadProblem("unreadable folder", name, 0, f"{name} could not be read, and can be now; start again.")
            return
        # Opened once, for a pipe gives its bytes once.
        with open(name, "rb") as file:
            yield from _read_stream(PeekableFile(file), name, options, Path(name), file)
    except OSError as error:
        reason = error.strerror or str(error)
        yield ReadProblem(
            "unreadable file",
            name,
            0,
            f"{name} cannot be read ({reason}); check its permissions and the disk, then run again.",
        )


def _read_stream(
    file: PeekableFile | TarMember,
    name: str,
    options: ReadOptions,
    path: Path | None = None,
    seekable: BinaryIO | None = None,
) -> Iterator[Item]:
    """Reads one file, pipe or archive member; whatever is wrong with it ends in a problem.

    Args:
        path: of a file, None for the standard input and archive members.
        seekable: the file itself, for formats that are not read from front to end.

    Raises:
        OSError: of the file, or of the archive around it.
    """
    try:
        yield from _read_recognised(file, name, options, path, seekable)
    except StreamDamage as error:
        if isinstance(file, TarMember) and not file.is_cut:  # the archive goes on behind it
            options.on_lost(1 - error.compressed_offset / max(file.size, 1))
        yield ReadProblem(
            "truncated file" if error.truncated else "corrupt compressed data",
            name,
            error.compressed_offset,
            f"{name}: {error.sentence_end} after byte {error.compressed_offset} of the file; the documents before it "
            "are kept, fetch the file again for the rest.",
        )
    except CorpusError as error:
        options.on_lost(1.0)
        yield ReadProblem("no corpus file", name, 0, str(error))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a file that nobody thought of must not end the reading of a corpus
        logger.debug("%s", name, exc_info=True)
        sentence = f"{name} cannot be read further ({type(error).__name__}: {error}); the documents before are kept."
        yield ReadProblem("unexpected content", name, 0, sentence)


def _read_recognised(
    file: PeekableFile | TarMember, name: str, options: ReadOptions, path: Path | None, seekable: BinaryIO | None
) -> Iterator[Item]:
    is_member = isinstance(file, TarMember)
    file = PeekableFile(file) if is_member else file
    head = file.peek(512)
    suffix, promised = suffixes_of(name)
    refuse_foreign(head, name)
    compression = compression_of(head)
    wrong = promised if promised and head and compression != promised else ""
    if suffix == ".parquet" and not promised and not head.startswith(PARQUET):
        wrong = "parquet"
    if wrong:
        raise CorpusError(
            f"{name} is named like a {wrong} file but does not begin like one; it may be an error page saved under "
            "that name or a file cut at its beginning: fetch it again."
        )
    if head.startswith(PARQUET):
        if seekable is None or not seekable.seekable():
            raise CorpusError(f"{name} is a parquet file, which is not read out of an archive or a pipe: unpack it.")
        # Imported here because pyarrow is needed for this one format only.
        from fairseq_implicit.corpora.parquet import read_parquet

        yield from read_parquet(seekable, name, options.text_fields, options.on_compressed)
        return
    blocks = uncompressed_blocks(file, compression, options.on_compressed)
    head, blocks = with_head(blocks, _HEAD_FOR_DETECTION)
    if compression is not None:
        refuse_foreign(head, name)
        if head.startswith(PARQUET) or compression_of(head) is not None:
            what = "a compressed parquet file" if head.startswith(PARQUET) else "compressed twice"
            raise CorpusError(f"{name} is {what}, which is not read: decompress it.")
    if suffix == ".tar" or is_tar(head):
        if is_member:
            raise CorpusError(f"{name} is an archive inside an archive, which is not read: unpack it.")
        yield from _read_tar(blocks, name, options)
        return
    encoding = options.encoding or encoding_of(head)
    if encoding:
        head, blocks = with_head(transcoded(blocks, encoding), _HEAD_FOR_DETECTION)
    else:
        refuse_binary(head, name)
    is_json = looks_like_json(name, head)
    if is_json:
        _refuse_other_json(head, name)
    del head  # it may be large
    if is_json:
        yield from _read_json_lines(blocks, name, encoding, options.text_fields)
        return
    boundary, watched = options.boundary, False
    if boundary == "auto":
        boundary = "blank-line"
        if compression or promised:
            found, blocks = _has_blank_line(blocks)
            if not found:
                boundary, watched = "line", True
                yield ReadNote(
                    "compressed text read line by line",
                    name,
                    f"{name} has no blank line in its first {LOOK_AHEAD} bytes: every line is read as a document (as "
                    "in OSCAR 2019; --document-boundary decides otherwise).",
                )
    documents = _read_text(blocks, name, boundary, encoding, watched)
    metadata = side_file_of(path) if path is not None and boundary == "blank-line" else None
    yield from documents if metadata is None else checked_by_side_file(documents, metadata)


def _read_tar(blocks: Iterator[bytes], path: str, options: ReadOptions) -> Iterator[Item]:
    read, passed_over, lost = 0, 0, 0.0
    stream = BlockReader(blocks)

    def lose(share: float) -> None:
        nonlocal lost
        lost += share * member.size

    of_members = replace(options, on_compressed=None, on_lost=lose)
    try:
        for member in tar_members(stream, path):
            if isinstance(member, ReadProblem):
                lost += member.lost_bytes
                yield member
                continue
            name = f"{path}!{member.name}"
            if not is_archived_corpus_file(member.name):
                passed_over += 1
                yield ReadNote("archive member passed over", name, f"{name} is no corpus file and is not read")
            elif member.kind == "a hard link":
                sentence = f"{name} is a hard link to {member.linkname}, which is read under that name"
                yield ReadNote("archive member passed over", name, sentence)
            elif member.kind:
                lose(1.0)
                sentence = f"{name} is {member.kind}, whose text cannot be read from the archive; add the file itself."
                documents = 1 if member.size else 0
                yield ReadProblem("archive member without text", name, 0, sentence, documents, member.size)
            else:
                read += 1
                yield from _read_stream(member, name, of_members)
    finally:  # also of an archive that ends in damage
        options.on_lost(lost / max(stream.position, 1))
    if passed_over and not read:
        raise CorpusError(
            f"None of the {passed_over} members of the archive {path} has the name of a corpus file (.jsonl, .json, "
            ".ndjson, .txt, .tokens, .raw or a compressed form of them); unpack it and name the files themselves."
        )


def _has_blank_line(blocks: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether a blank line stands between two lines of a text's first `LOOK_AHEAD` bytes, and the whole text again."""
    taken: list[bytes] = []
    length, found, tail = 0, False, b""
    try:
        while not found and length < LOOK_AHEAD and (block := next(blocks, None)) is not None:
            taken.append(block)
            length += len(block)
            # White space at the end waits for the text after it, and before the first text it separates nothing.
            window = tail + block if tail else block.lstrip()
            text = window.rstrip()
            found = _BLANK_LINE.search(text) is not None
            tail = window[max(len(text) - 1, 0) :]
    except StreamDamage as error:
        return found, chain(taken, raising(error))
    return found, chain(taken, blocks)


class EncodingError(ValueError):
    """A text is not in the encoding that it was read in; the message says why."""


def _decoded(data: bytes, encoding: str) -> tuple[str, tuple[str, ...]]:
    """Text of UTF-8 bytes, and what had to be repaired.

    Args:
        encoding: what the bytes were transcoded from, "" when they come as they are.

    Raises:
        EncodingError: too much of it is invalid.
    """
    try:
        text = data.decode("utf-8")
        invalid = text.count("\ufffd") if encoding else 0
    except UnicodeDecodeError:
        text, invalid = data.decode("utf-8", "replace"), invalid_in(data)
    if not invalid:
        return text, ()
    fault = encoding_fault(text if encoding else data, invalid)
    if fault:
        raise EncodingError(fault)
    return text, (f"invalid {encoding.upper() or 'UTF-8'}",)


def _wrong_encoding(name: str, offset: int, size: int, error: EncodingError, encoding: str) -> ReadProblem:
    sentence = (
        f"{name}: the document at byte {offset} is not {encoding.upper() or 'UTF-8'} ({error}); read the file with the "
        "--encoding that it is in."
    )
    return ReadProblem("text in another encoding", name, offset, sentence, 1, size)


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


def _read_json_lines(blocks: Iterator[bytes], name: str, encoding: str, text_fields: tuple[str, ...]) -> Iterator[Item]:
    lines = lines_of(blocks, LONGEST_LINE)
    for number, (offset, line, length, ended) in enumerate(lines, start=1):
        if line is None:
            yield _too_long(name, offset, length)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record, repairs = _record_of(line, encoding)
            line = None  # a long line should be in memory once
            document = document_from_record(record, name, offset, text_fields)
        except EncodingError as error:
            yield _wrong_encoding(name, offset, length, error, encoding)
            continue
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
        record = None
        if repairs:
            document.repairs += repairs
        yield document


def _record_of(line: bytes, encoding: str) -> tuple[object, tuple[str, ...]]:
    """The JSON value of a line, and what had to be repaired."""
    if not encoding:
        try:
            return orjson.loads(line), ()
        except ValueError:  # it is stricter than json: half a surrogate pair, NaN, deep nesting, invalid UTF-8
            pass
    text, repairs = _decoded(line, encoding)
    del line
    return json.loads(text), repairs


def _refuse_other_json(head: bytes, name: str) -> None:
    """Checks that a JSON file does not begin with an array, or with an object that goes on in the next line.

    Raises:
        CorpusError: it does.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_array = start.startswith(b"[")
    if is_array or start.partition(b"\n")[0].rstrip() == b"{":
        kind, program = ("an array", ".[]") if is_array else ("an object over several lines", ".")
        raise CorpusError(
            f"{name} holds {kind} of JSON where one record per line is expected; convert it with 'jq -c {program}'."
        )


def _read_text(
    blocks: Iterator[bytes], name: str, boundary: str, encoding: str, watched: bool = False
) -> Iterator[Item]:
    """Documents of a text stream; the line feed that ends a document is not part of its text.

    Args:
        watched: the boundary "line" was concluded from the beginning; report the first blank line after it.
    """
    parts: list[bytes] = []
    start, held = 0, 0
    blank_at = -1
    lines = lines_of(blocks, LONGEST_LINE, LONGEST_TEXT_PIECE)

    def document(*repairs: str) -> Document | ReadProblem:
        data = b"\n".join(parts)
        parts.clear()  # a long text should be in memory as few times as possible
        try:
            text, decoding = _decoded(data, encoding)
        except EncodingError as error:
            return _wrong_encoding(name, start, len(data), error, encoding)
        return Document(text, name, start, repairs=repairs + decoding)

    while True:
        try:
            offset, line, length, ended = next(lines)
        except StopIteration:
            if parts:
                yield document()
            return
        except StreamDamage:
            if parts:
                sentence = f"{name}: the file ends inside the document at byte {start}."
                yield ReadProblem("truncated record", name, start, sentence, 1, held)
            raise
        blank = not line.strip()
        if boundary == "line":
            # One line of look-ahead keeps a line that a truncated file cut off from passing for a whole one.
            if parts:
                if watched and blank and blank_at < 0:
                    blank_at = offset
                yield document()
            if watched and not blank and blank_at >= 0:
                watched = False
                sentence = (
                    f"{name} was read as one document per line, as its first {LOOK_AHEAD} bytes have no blank line, "
                    f"but there is one at byte {blank_at}; when blank lines separate its documents, prepare it again "
                    "with --document-boundary blank-line, else with --document-boundary line."
                )
                yield ReadProblem("document boundary contradicted", name, blank_at, sentence)
            if not blank:
                parts.append(line)
                start, held, line = offset, length, None
            continue
        if blank and boundary == "blank-line":
            if parts:
                yield document()
            continue
        if parts and held + length > LONGEST_TEXT_PIECE:
            yield document("cut at 64 MiB")
        if not parts:
            start, held = offset, 0
        parts.append(line)
        held += length + 1
        line = None
        if not ended and length > LONGEST_TEXT_PIECE - 4:
            yield document("cut at 64 MiB")
