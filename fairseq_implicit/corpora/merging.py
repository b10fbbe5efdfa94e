"""The merging step: segment files to numbered text shards, in hash order, without duplicates.

The result depends on the documents alone: neither on the order of the files, nor on the number of workers or machines,
nor on interruptions. Documents come out in the order of their hash, which mixes every shard from the whole corpus.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fairseq_implicit.corpora.counts import COUNTS, Counts
from fairseq_implicit.corpora.durable import (
    HashedFile,
    is_whole,
    publish,
    read_json,
    sha256_of,
    write_bytes,
    write_json,
)
from fairseq_implicit.corpora.near_duplicates import SIGNATURE, KeySet, keys_to_drop
from fairseq_implicit.corpora.preparation import SourceFiles
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.segments import COPY, TRAIN, SegmentFile, document_key
from fairseq_implicit.corpora.settings import PrepareSettings
from fairseq_implicit.corpora.workers import advance

logger = logging.getLogger(__name__)

SPLIT_NAMES = ("test", "valid", "train")
_NEAR_DUPLICATES = "near-duplicates.npy"
# Text that is written in one call: most documents are so small that a call for each would take longer than its bytes.
_WRITTEN_TOGETHER = 2**20
_PIECE = {"counts": COUNTS, "files": {"*": {"sha256": str, "bytes": int}}}


@dataclass(frozen=True)
class ShardRange:
    """One numbered shard: the buckets ``[first, last)``."""

    number: int
    first: int
    last: int


def plan_shards(files: list[SourceFiles], settings: PrepareSettings) -> list[ShardRange]:
    """Divides the buckets into ranges of about ``shard_size`` bytes of text each (duplicates included).

    Bounds lie between buckets, so with few documents the sizes are uneven.
    """
    sizes = np.zeros(settings.buckets, dtype=np.int64)
    for file in files:
        index = SegmentFile(file.segments).index
        np.add.at(sizes, index["bucket"], index["bytes"].astype(np.int64))
    total = int(sizes.sum())
    count = max(1, round(total / settings.shard_size))
    ends = np.cumsum(sizes)
    inner = (int(np.searchsorted(ends, total * k / count)) + 1 for k in range(1, count))
    bounds = sorted({0, settings.buckets, *inner})
    return [ShardRange(number, *pair) for number, pair in enumerate(pairwise(bounds))]


def inputs_digest(files: list[SourceFiles]) -> str:
    """A short hash of all intermediate files' checksums."""
    checksums = [file.read_record()["segments_sha256"] for file in files]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:16]


def verify_source(files: SourceFiles) -> str | None:
    """Compares the intermediate files of one source with their checksums; returns a sentence when they differ.

    A marker spares the parts of a merge from reading again what another one has verified.
    """
    record = files.read_record()
    advance(consumed=files.segments.stat().st_size)
    pairs = [(files.segments, record["segments_sha256"]), (files.signatures, record["signatures_sha256"])]
    pairs = [(path, expected) for path, expected in pairs if expected is not None]
    marker = files.record.with_suffix(".verified")
    state = [[path.stat().st_size, path.stat().st_mtime_ns, sha256] for path, sha256 in pairs if path.is_file()]
    if read_json(marker, {"state": list}) == {"state": state} and len(state) == len(pairs):
        return None
    for path, expected in pairs:
        if not path.is_file() or sha256_of(path) != expected:
            return (
                f"The intermediate file {path} of {record['source']['name']} does not match its checksum; remove "
                f"{files.record} and prepare its part again."
            )
    write_json(marker, {"state": state})
    return None


def find_near_duplicates(files: list[SourceFiles], folder: Path) -> None:
    """Writes the keys of all near-duplicates."""
    path = folder / _NEAR_DUPLICATES
    if path.is_file():
        return
    rows = [np.fromfile(file.signatures, dtype=SIGNATURE) for file in files]
    buffer = io.BytesIO()
    np.save(buffer, keys_to_drop(np.concatenate(rows) if rows else np.zeros(0, dtype=SIGNATURE)))
    write_bytes(path, buffer.getbuffer())


def _held_out_keys(segments: list[SegmentFile]) -> KeySet:
    keys = np.concatenate([file.held_out for file in segments])
    return KeySet(keys[np.lexsort((keys[:, 1], keys[:, 0]))])


def shard_name(split: str, number: int) -> str:
    """``train.00007.txt``; wide enough for every corpus so that names sort."""
    return f"{split}.{number:05d}.txt"


def pieces_of(shard: ShardRange, count: int) -> list[ShardRange]:
    """Cuts a shard into at most ``count`` ranges of buckets, which several workers can write."""
    bounds = sorted({int(bound) for bound in np.linspace(shard.first, shard.last, count + 1)})
    return [ShardRange(shard.number, *pair) for pair in pairwise(bounds)]


def _piece_path(split: str, piece: ShardRange, folder: Path) -> Path:
    return folder / f"{split}.{piece.first:05d}-{piece.last:05d}.txt"


def _piece_record(piece: ShardRange, folder: Path) -> Path:
    return folder / f"piece.{piece.first:05d}-{piece.last:05d}.json"


def write_piece(
    piece: ShardRange, files: list[SourceFiles], settings: PrepareSettings, folder: Path
) -> tuple[ShardRange, Counts]:
    """Writes the documents of one range of buckets, a text file per split, into ``folder``.

    The JSON record beside them is written last and marks the piece as complete.
    """
    record = read_json(_piece_record(piece, folder), _PIECE)
    if record is not None and all(
        is_whole(_piece_path(split, piece, folder), facts["bytes"]) for split, facts in record["files"].items()
    ):
        return piece, Counts.from_dict(record["counts"])
    counts = Counts()
    near = KeySet(np.load(folder / _NEAR_DUPLICATES, mmap_mode="r")) if settings.drop_near_duplicates else ()
    segments = [SegmentFile(file.segments) for file in files]
    held_out = _held_out_keys(segments) if settings.makes_copies() else ()
    texts = {split: HashedFile(_piece_path(split, piece, folder)) for split in SPLIT_NAMES}
    try:
        for bucket in range(piece.first, piece.last):
            waiting: dict[str, list[bytes]] = {split: [] for split in SPLIT_NAMES}
            size = 0
            for split, text in documents_of_bucket(bucket, segments, settings, near, held_out, counts):
                waiting[SPLIT_NAMES[split]].append(text)
                size += len(text)
                if size > _WRITTEN_TOGETHER:
                    _write_documents(waiting, texts, counts)
                    size = 0
            _write_documents(waiting, texts, counts)
        published = _publish(texts)
    except BaseException:
        for file in texts.values():
            file.discard()
        raise
    write_json(_piece_record(piece, folder), {"counts": counts.as_dict(), "files": published})
    return piece, counts


def _write_documents(waiting: dict[str, list[bytes]], files: dict[str, HashedFile], counts: Counts) -> None:
    """Appends the documents that wait for a split to its file; none waits afterwards."""
    for split, documents in waiting.items():
        if not documents:
            continue
        # One blank line between documents: it is fairseq's document separator, not part of any document.
        text, number = b"\n\n".join(documents), len(documents)
        documents.clear()
        file = files[split]
        if file.size:
            file.write(b"\n")
        file.write(text)
        file.write(b"\n")
        size = len(text) - 2 * (number - 1)
        counts.written[split] += number
        counts.written_bytes[split] += size
        line_ends = np.count_nonzero(
            np.frombuffer(text, dtype=np.uint8) == ord("\n")
        )  # six times `bytes.count`'s speed
        counts.written_lines[split] += int(line_ends) - number + 2
        advance(consumed=size, text=size)


def _publish(texts: dict[str, HashedFile]) -> dict[str, dict]:
    """Gives the files their names, without those in which nothing stands; returns checksums and sizes."""
    published = {}
    for split, file in texts.items():
        if file.size:
            published[split] = {"sha256": file.publish(), "bytes": file.size}
        else:
            file.discard()
    return published


def documents_of_bucket(
    bucket: int,
    segments: list[SegmentFile],
    settings: PrepareSettings,
    near: KeySet | tuple,
    held_out: KeySet | tuple,
    counts: Counts,
) -> Iterator[tuple[int, bytes]]:
    """The documents of one bucket that stay, as (split number, text) in their final order.

    Here alone it is decided what is written: a document of a held-out split is in no other one, whatever the settings.
    """
    stored: dict[tuple[bytes, int], tuple[int, bytes]] = {}  # equal documents are held once
    for file in segments:
        for key, split, repeats, text in file.documents(bucket):
            known = stored.get((key, split))
            stored[key, split] = (repeats, text) if known is None else (known[0] + repeats, known[1])
    previous_key = b""
    for key, split in sorted(stored):
        repeats, text = stored[key, split]
        # A copy has a key of its own, in another bucket than the document that it copies.
        identity = document_key(text, settings.seed) if split == COPY else key
        if key == previous_key or (split == COPY and identity in held_out):
            counts.drop("exact duplicate of a held-out document", repeats * len(text), repeats)
            continue
        previous_key = key
        if not settings.keep_duplicates and repeats > 1:
            counts.drop("exact duplicate", (repeats - 1) * len(text), repeats - 1)
            repeats = 1
        if identity in near:
            counts.drop("near duplicate", repeats * len(text), repeats)
            continue
        for _ in range(repeats):
            yield min(split, TRAIN), text


class ShardJoin:
    """One train shard, and its share of the held-out splits, out of its pieces in the order of their buckets.

    The pieces may come in any order; each is appended as soon as those before it are. The JSON record in ``folder`` is
    written last and marks the shard as complete.
    """

    def __init__(self, shard: ShardRange, pieces: list[ShardRange], output: Path, folder: Path):
        self._pieces, self._folder = pieces, folder
        self._record = folder / f"shard.{shard.number:05d}.json"
        self._paths = {
            split: (output if split == "train" else folder) / shard_name(split, shard.number) for split in SPLIT_NAMES
        }
        self._counts: dict[int, Counts] = {}
        self._appended = 0
        self._texts: dict[str, HashedFile] = {}

    def finished(self) -> Counts | None:
        """The counts of a shard that an earlier run has completed, else None."""
        record = read_json(self._record, _PIECE)
        if record is None or not all(is_whole(self._paths[s], facts["bytes"]) for s, facts in record["files"].items()):
            return None
        return Counts.from_dict(record["counts"])

    def take(self, piece: ShardRange, counts: Counts) -> Counts | None:
        """Takes a written piece; returns the counts of the shard when it was the last one."""
        self._counts[piece.first] = counts
        if len(self._pieces) > 1:
            self._append()
        if len(self._counts) < len(self._pieces):
            return None
        published = _publish(self._texts) if len(self._pieces) > 1 else self._rename(piece)
        total = Counts()
        for part in self._counts.values():
            total.add(part)
        write_json(self._record, {"counts": total.as_dict(), "files": published})
        for each in self._pieces:
            _piece_record(each, self._folder).unlink(missing_ok=True)
            for split in SPLIT_NAMES:
                _piece_path(split, each, self._folder).unlink(missing_ok=True)
        return total

    def discard(self) -> None:
        """Removes what is unfinished; the pieces stay."""
        for file in self._texts.values():
            file.discard()

    def _append(self) -> None:
        if not self._texts:
            self._texts = {split: HashedFile(path) for split, path in self._paths.items()}
        while self._appended < len(self._pieces) and self._pieces[self._appended].first in self._counts:
            for split, file in self._texts.items():
                _append_text(file, _piece_path(split, self._pieces[self._appended], self._folder))
            self._appended += 1

    def _rename(self, piece: ShardRange) -> dict[str, dict]:
        published = read_json(_piece_record(piece, self._folder), _PIECE)["files"]
        for split in published:
            publish(_piece_path(split, piece, self._folder), self._paths[split])
        return published


def _append_text(joined: HashedFile, piece: Path) -> None:
    if not piece.is_file():  # a split without a document there
        return
    if joined.size:
        joined.write(b"\n")
    with open(piece, "rb") as file:
        while block := file.read(2**20):
            joined.write(block)


def join_split(split: str, numbers: list[int], folder: Path, output: Path) -> dict | None:
    """Joins the pieces of a held-out split into ``valid.txt`` or ``test.txt``; returns its checksum and size."""
    joined = HashedFile(output / f"{split}.txt")
    for number in numbers:
        _append_text(joined, folder / shard_name(split, number))
    return _publish({split: joined}).get(split)


def add_up(counts: Counts) -> None:
    """Checks that every document and byte that was read is accounted for.

    Raises:
        CorpusError: the books do not balance, which is a defect of this program.
    """
    if counts.documents_missing() or counts.bytes_missing():
        raise CorpusError(
            f"The report does not add up: {counts.documents_missing()} documents and {counts.bytes_missing()} bytes "
            "are unaccounted for; this is a defect of the corpus tools, please report it with the command line."
        )
