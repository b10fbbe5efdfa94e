"""The merging step: segment files to numbered text shards, in hash order, without duplicates.

The result depends on the documents alone: neither on the order of the files, nor on the number of workers or machines,
nor on interruptions. Documents come out in the order of their hash, which mixes every shard from the whole corpus.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_implicit.corpora.counts import Counts
from fairseq_implicit.corpora.durable import HashedFile, read_json, sha256_of, temporary_beside, write_json
from fairseq_implicit.corpora.near_duplicates import SIGNATURE, KeySet, keys_to_drop
from fairseq_implicit.corpora.preparation import TRAIN, SourceFiles
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.segments import SegmentFile, Stored, derived_key
from fairseq_implicit.corpora.settings import PrepareSettings
from fairseq_implicit.corpora.workers import advance

logger = logging.getLogger(__name__)

SPLIT_NAMES = ("test", "valid", "train")
_NEAR_DUPLICATES = "near-duplicates.npy"


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
    return [ShardRange(number, *pair) for number, pair in enumerate(zip(bounds, bounds[1:]))]


def inputs_digest(files: list[SourceFiles]) -> str:
    """A short hash of all intermediate files' checksums."""
    checksums = [read_json(file.record)["segments_sha256"] for file in files]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:16]


def verify_source(files: SourceFiles) -> str | None:
    """Compares the intermediate files of one source with their checksums; returns a sentence when they differ.

    A marker spares the parts of a merge from reading again what another one has verified.
    """
    record = read_json(files.record)
    advance(consumed=files.segments.stat().st_size)
    pairs = [(files.segments, record["segments_sha256"]), (files.signatures, record["signatures_sha256"])]
    pairs = [(path, expected) for path, expected in pairs if expected is not None]
    marker = files.record.with_suffix(".verified")
    state = [[path.stat().st_size, path.stat().st_mtime_ns, sha256] for path, sha256 in pairs if path.is_file()]
    if read_json(marker) == {"state": state} and len(state) == len(pairs):
        return None
    for path, expected in pairs:
        if not path.is_file() or sha256_of(path) != expected:
            return (
                f"The intermediate file {path} of {record['source']['name']} does not match its checksum; remove "
                f"{files.record} and prepare its part again."
            )
    write_json(marker, {"state": state})
    return None


def find_near_duplicates(files: list[SourceFiles], settings: PrepareSettings, folder: Path) -> None:
    """Writes the keys of all near-duplicates, and of the copies that component weights made of them."""
    path = folder / _NEAR_DUPLICATES
    if path.is_file():
        return
    rows = [np.fromfile(file.signatures, dtype=SIGNATURE) for file in files]
    keys = keys_to_drop(np.concatenate(rows) if rows else np.zeros(0, dtype=SIGNATURE))
    copies = max([1, *(int(np.ceil(weight)) for weight in settings.component_weights.values())])
    derived = [derived_key(key.astype(">u8").tobytes(), number) for key in keys for number in range(1, copies)]
    if derived:
        keys = np.concatenate([keys, np.frombuffer(b"".join(derived), dtype=">u8").reshape(-1, 2).astype(np.uint64)])
        keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    temporary = temporary_beside(path)
    with open(temporary, "wb") as file:
        np.save(file, keys)
    os.replace(temporary, path)


def shard_name(split: str, number: int) -> str:
    """``train.00007.txt``; wide enough for every corpus so that names sort."""
    return f"{split}.{number:05d}.txt"


def write_shard(
    shard: ShardRange, files: list[SourceFiles], settings: PrepareSettings, output: Path, folder: Path
) -> Counts:
    """Writes one train shard into ``output`` and its share of the held-out splits into ``folder``.

    The JSON record beside the latter is written last and marks the shard as complete.
    """
    record_path = folder / f"shard.{shard.number:05d}.json"
    record = read_json(record_path)
    if record is not None and _is_complete(record, output, folder):
        return Counts.from_dict(record["counts"])
    counts = Counts()
    near = KeySet(np.load(folder / _NEAR_DUPLICATES, mmap_mode="r")) if settings.drop_near_duplicates else ()
    segments = [SegmentFile(file.segments) for file in files]
    places = {name: output if name == "train" else folder for name in SPLIT_NAMES}
    texts = {name: HashedFile(place / shard_name(name, shard.number)) for name, place in places.items()}
    try:
        for bucket in range(shard.first, shard.last):
            for split, text in _documents_of(bucket, segments, settings, near, counts):
                name = SPLIT_NAMES[split]
                file = texts[name]
                # One blank line between documents: it is fairseq's document separator, not part of any document.
                file.write(b"\n" + text + b"\n" if file.size else text + b"\n")
                counts.written[name] += 1
                counts.written_bytes[name] += len(text)
                counts.written_lines[name] += text.count(b"\n") + 1
                advance(consumed=len(text), text=len(text))
    except BaseException:
        for file in texts.values():
            file.discard()
        raise
    published = {}
    for name, file in texts.items():
        if file.size:
            published[name] = {"sha256": file.publish(), "bytes": file.size}
        else:
            file.discard()
    write_json(record_path, {"counts": counts.as_dict(), "files": published, "number": shard.number})
    return counts


def _is_complete(record: dict, output: Path, folder: Path) -> bool:
    for name, facts in record["files"].items():
        path = (output if name == "train" else folder) / shard_name(name, record["number"])
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return False
    return True


def _documents_of(
    bucket: int, segments: list[SegmentFile], settings: PrepareSettings, near: KeySet | tuple, counts: Counts
) -> Iterator[tuple[int, bytes]]:
    """The documents of one bucket that stay, as (split number, text) in their final order."""
    documents: list[Stored] = [stored for file in segments for stored in file.documents(bucket)]
    documents.sort()
    previous_key, keeper = b"", TRAIN
    for key, split, text in documents:
        if key == previous_key and not settings.keep_duplicates:
            counts.drop("exact duplicate" if split == keeper else "exact duplicate of a held-out document", len(text))
        elif key in near:
            counts.drop("near duplicate", len(text))
            previous_key, keeper = key, split
        else:
            previous_key, keeper = key, split
            yield split, text


def join_split(split: str, numbers: list[int], folder: Path, output: Path) -> dict | None:
    """Joins the pieces of a held-out split into ``valid.txt`` or ``test.txt``; returns its checksum and size."""
    pieces = [folder / shard_name(split, number) for number in numbers]
    pieces = [piece for piece in pieces if piece.is_file()]
    if not pieces:
        return None
    joined = HashedFile(output / f"{split}.txt")
    for piece in pieces:
        if joined.size:
            joined.write(b"\n")
        with open(piece, "rb") as file:
            while block := file.read(2**20):
                joined.write(block)
    return {"sha256": joined.publish(), "bytes": joined.size}


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
