"""OSCAR 21.09's side files, which describe the documents of a text file and hold no text themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fairseq_implicit.corpora.problems import ReadNote, ReadProblem
from fairseq_implicit.corpora.records import Document, is_oscar_2109_metadata
from fairseq_implicit.corpora.streams import (
    LONGEST_LINE,
    PeekableFile,
    StreamDamage,
    compression_of,
    lines_of,
    uncompressed_blocks,
)

_OSCAR_METADATA = re.compile(r"_meta(_part_\d+)?(_dedup)?\.jsonl(\.gz|\.zst)?$")


def side_file_of(path: Path) -> Path | None:
    """OSCAR 21.09's side file of a text file if it is there: ``fr_meta_part_3.jsonl.gz`` of ``fr_part_3.txt.gz``."""
    match = re.fullmatch(r"(.+?)(_part_\d+)?(_dedup)?\.txt(\.gz|\.zst)?", path.name)
    if not match:
        return None
    language, part, dedup = match[1], match[2] or "", match[3] or ""
    for stem in (f"{language}_meta{part}{dedup}", f"{language}{part}_meta{dedup}", f"{language}{part}{dedup}_meta"):
        for ending in (".jsonl.gz", ".jsonl.zst", ".jsonl"):
            candidate = path.with_name(stem + ending)
            if candidate.is_file():
                return candidate
    return None


def is_side_file(path: Path) -> bool:
    """True for a side file of OSCAR 21.09, which has no text; 22.01 and later keep the text under the same name."""
    if not _OSCAR_METADATA.search(path.name) or not path.is_file():  # a pipe would lose what is looked at
        return False
    try:
        with open(path, "rb") as file:
            compression = compression_of(file.read(16))
            file.seek(0)
            line = next(lines_of(uncompressed_blocks(file, compression), 2**20), None)
        return line is not None and line[1] is not None and is_oscar_2109_metadata(json.loads(line[1]))
    except (OSError, ValueError, RecursionError, StreamDamage):
        return False  # the reader says what is wrong with it


def checked_by_side_file(
    items: Iterator[Document | ReadProblem | ReadNote], metadata_path: Path
) -> Iterator[Document | ReadProblem | ReadNote]:
    """Passes the documents of an OSCAR 21.09 text through and compares their line counts with the side file's.

    A text that lost or gained a blank line would silently merge or cut documents; the first disagreement is reported.
    """
    try:
        opened = open(metadata_path, "rb")
    except OSError as error:
        sentence = f"{metadata_path} cannot be read ({error.strerror or error}); its text is read without a check."
        yield ReadProblem("unreadable side file", str(metadata_path), 0, sentence)
        yield from items
        return
    with opened:
        lines = _lines_of_side_file(PeekableFile(opened))
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


def _lines_of_side_file(file: PeekableFile) -> Iterator[bytes]:
    blocks = uncompressed_blocks(file, compression_of(file.peek(16)))
    yield from (line for _, line, _, _ in lines_of(blocks, LONGEST_LINE) if line)


def _sentences_of(lines: Iterator[bytes]) -> tuple[int | None, str]:
    try:
        line = next(lines, None)
        if line is None:
            return None, "the side file has no further entry"
        return json.loads(line)["nb_sentences"], ""
    except (StreamDamage, OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        return None, f"the side file cannot be read there ({type(error).__name__}: {error})"
