"""The reading step: one source to one segment file, with a JSON record of what happened."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from fairseq_implicit.corpora.cleaning import clean_utf8, split_text, wrap_line
from fairseq_implicit.corpora.counts import COUNTS, Counts
from fairseq_implicit.corpora.durable import HashedFile, publish, read_json, temporary_beside, write_json
from fairseq_implicit.corpora.filters import component_of, reason_to_drop
from fairseq_implicit.corpora.near_duplicates import band_hashes, signature
from fairseq_implicit.corpora.problems import CorpusError, ReadNote, ReadProblem
from fairseq_implicit.corpora.quality import FilterFailed, quality_check
from fairseq_implicit.corpora.readers import ReadOptions, read_source
from fairseq_implicit.corpora.records import TEXT_FIELDS, Document
from fairseq_implicit.corpora.segments import (
    COPY,
    TEST,
    TRAIN,
    VALID,
    SegmentWriter,
    derived_key,
    document_key,
    share_of,
)
from fairseq_implicit.corpora.settings import PrepareSettings
from fairseq_implicit.corpora.sources import Source
from fairseq_implicit.corpora.workers import advance

logger = logging.getLogger(__name__)

SPLIT_NUMBERS = {"test": TEST, "valid": VALID, "train": TRAIN}

# A badly damaged file could fill the report; the counts go on beyond this.
_REPORTED_PROBLEMS = 200
_SPLIT, _SAMPLE, _WEIGHT = 0, 1, 2
IDENTITY = {"name": str, "split": str, "size": int, "changed": int}
_RECORD = {
    "source": IDENTITY,
    "fingerprint": str,
    "segments_sha256": str,
    "signatures_sha256": (str, type(None)),
    "counts": COUNTS,
    "problems": [{"sentence": str}],
    "problems_total": int,
}


@dataclass(frozen=True)
class SourceFiles:
    """The intermediate files of one source in the work folder."""

    segments: Path
    signatures: Path
    record: Path

    @classmethod
    def of(cls, source: Source, work: Path) -> SourceFiles:
        name = hashlib.sha256(f"{source.split}\0{source.name}".encode("utf-8", "surrogateescape")).hexdigest()[:20]
        return cls(work / f"{name}.segments", work / f"{name}.signatures", work / f"{name}.json")

    def read_record(self) -> dict | None:
        """The JSON record, or None when the source is not prepared."""
        return read_json(self.record, _RECORD)


def identity_of(source: Source) -> dict:
    """What shows that a file is still the one that was read: name, size and time of change."""
    if source.is_pipe:
        return {"name": source.name, "split": source.split, "size": 0, "changed": 0}
    try:
        status = os.stat(source.name)
    except OSError:
        return {"name": source.name, "split": source.split, "size": -1, "changed": 0}
    return {"name": source.name, "split": source.split, "size": status.st_size, "changed": status.st_mtime_ns}


def is_prepared(source: Source, settings: PrepareSettings, work: Path) -> bool:
    """True when the source's intermediate files are complete, of these settings and of the file as it is now."""
    files = SourceFiles.of(source, work)
    record = files.read_record()
    return (
        record is not None
        and record["fingerprint"] == settings.fingerprint()
        and record["source"] == identity_of(source)
        and files.segments.is_file()
    )


def prepare_source(source: Source, settings: PrepareSettings, work: Path) -> SourceFiles:
    """Reads, cleans and filters one source into its segment file; the JSON record is written last.

    Raises:
        CorpusError: a problem of the file under ``strict``.
    """
    files = SourceFiles.of(source, work)
    identity = identity_of(source)
    temporary = temporary_beside(files.segments)
    writer = SegmentWriter(temporary, settings.buckets, settings.compress_work)
    signatures = HashedFile(files.signatures) if settings.drop_near_duplicates else None
    step = _Step(source, settings, writer, signatures)
    step.counts.input_size = max(identity["size"], 0)
    try:
        step.run()
    except BaseException:
        writer.abandon()
        if signatures is not None:
            signatures.discard()
        raise
    checksum = writer.close()
    publish(temporary, files.segments)
    write_json(
        files.record,
        {
            "source": identity,
            "fingerprint": settings.fingerprint(),
            "segments_sha256": checksum,
            "signatures_sha256": signatures.publish() if signatures is not None else None,
            "counts": step.counts.as_dict(),
            "problems": [problem.as_dict() for problem in step.problems],
            "problems_total": step.problems_total,
        },
    )
    return files


class _Step:
    """The documents of one source on their way into its segment file."""

    def __init__(self, source: Source, settings: PrepareSettings, writer: SegmentWriter, signatures: HashedFile | None):
        self.counts = Counts()
        self.problems: list[ReadProblem] = []
        self.problems_total = 0
        self._source = source
        self._settings = settings
        self._writer = writer
        self._signatures = signatures
        self._quality = quality_check(settings.quality_filters)

    def run(self) -> None:
        limit = self._settings.documents_per_file
        consumed, without_text = 0, 0.0

        def consume(size: int) -> None:
            nonlocal consumed
            consumed += size
            advance(consumed=size)

        def lose(share: float) -> None:
            nonlocal without_text
            without_text = min(without_text + share, 1.0)

        options = ReadOptions(
            boundary=self._settings.boundary,
            encoding=self._settings.encoding,
            text_fields=self._settings.text_fields or TEXT_FIELDS,
            on_compressed=consume,
            on_lost=lose,
        )
        for item in read_source(self._source, options):
            if isinstance(item, ReadProblem):
                self._take_problem(item)
            elif isinstance(item, ReadNote):
                self.counts.changed[item.reason] += 1
                logger.info("%s", item.sentence)
            else:
                self._take_document(item)
            if limit and self.counts.documents_read >= limit:
                self.counts.changed["file not read beyond --documents-per-file"] += 1
                return
        if self.problems_total:
            self.counts.input_lost = max(self.counts.input_size - round((1 - without_text) * consumed), 0)

    def _take_problem(self, problem: ReadProblem) -> None:
        self.counts.documents_read += problem.lost_documents
        self.counts.bytes_read += problem.lost_bytes
        self._lose(problem)

    def _lose(self, problem: ReadProblem) -> None:
        if self._settings.strict:
            raise CorpusError(f"{problem.sentence} (--strict stops here; without it the rest of the corpus is read.)")
        self.problems_total += 1
        if len(self.problems) < _REPORTED_PROBLEMS:
            self.problems.append(problem)
            logger.warning("%s", problem.sentence)
        self.counts.documents_lost += problem.lost_documents
        self.counts.bytes_lost += problem.lost_bytes
        if problem.lost_documents:
            self.counts.drop(problem.reason, problem.lost_bytes, problem.lost_documents)

    def _take_document(self, document: Document) -> None:
        counts, settings = self.counts, self._settings
        component = component_of(document)
        reason = reason_to_drop(document, component, settings)
        if reason is None:
            text, data, size, changes = clean_utf8(document.text)
        else:
            size = len(document.text.encode("utf-8", "surrogatepass"))
        counts.documents_read += 1
        counts.bytes_read += size
        counts.components[component or "(none)"] += 1
        advance(text=size)
        if reason is not None:
            counts.drop(reason, size)
            return
        if not text:
            counts.drop("empty", size)
            return
        if len(data) < settings.min_document_size:
            counts.drop("shorter than --min-document-size", size)
            return
        try:
            reason = self._quality(text)
        except FilterFailed as error:
            sentence = f"{document.path}: the document at byte {document.offset} is not kept: {error}."
            self._lose(ReadProblem("quality filter failed", document.path, document.offset, sentence, 1, size))
            return
        if reason is not None:
            counts.drop(reason, size)
            return
        key = document_key(data, settings.seed)
        sample = settings.held_out_sample if self._source.split else settings.sample
        if sample < 1 and share_of(key, _SAMPLE) >= sample:
            counts.drop("not sampled", size)
            return
        split = self._split_of(key)
        copies = self._copies_of(component, key) if split == TRAIN else 1
        if copies == 0:
            counts.drop("component weight", size)
            return
        for change in (*changes, *document.repairs):  # Counter.update is slow, and most documents have none
            counts.changed[change] += 1
        counts.bytes_removed += size
        pieces = self._pieces_of(text, data)
        counts.pieces_added += len(pieces) - 1
        for piece in pieces:
            counts.bytes_removed -= len(piece)
            piece_key = key if piece is data else document_key(piece, settings.seed)
            self._write(piece_key, split, piece)
            for number in range(1, copies):
                counts.copies_added += 1
                counts.copies_bytes += len(piece)
                self._writer.add(derived_key(piece_key, number), COPY, piece)

    def _write(self, key: bytes, split: int, data: bytes) -> None:
        self._writer.add(key, split, data)
        if self._signatures is not None:
            bands = band_hashes(data.decode("utf-8"))
            if bands is not None:
                self._signatures.write(signature(split, key, bands))

    def _split_of(self, key: bytes) -> int:
        if self._source.split:
            return SPLIT_NUMBERS[self._source.split]
        share = share_of(key, _SPLIT)
        if share < self._settings.test_fraction:
            return TEST
        return VALID if share < self._settings.test_fraction + self._settings.valid_fraction else TRAIN

    def _copies_of(self, component: str, key: bytes) -> int:
        weight = self._settings.component_weights.get(component, 1.0)
        whole = int(weight)
        if whole == weight:
            return whole
        return whole + (share_of(key, _WEIGHT) < weight - whole)

    def _pieces_of(self, text: str, data: bytes) -> list[bytes]:
        """The document as one or several documents within the limits of size."""
        settings, counts = self._settings, self.counts
        if settings.max_line_size and len(data) > settings.max_line_size:
            lines = [piece for line in text.split("\n") for piece in wrap_line(line, settings.max_line_size)]
            wraps = len(lines) - text.count("\n") - 1
            if wraps:
                counts.lines_wrapped += wraps
                counts.changed["long lines wrapped"] += 1
                text = "\n".join(lines)
                data = text.encode("utf-8")
        if settings.max_document_size and len(data) > settings.max_document_size:
            counts.changed["split at --max-document-size"] += 1
            return [piece.encode("utf-8") for piece in split_text(text, settings.max_document_size)]
        return [data]
