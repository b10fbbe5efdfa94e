"""Counting that adds up: every document that is read is written or dropped under a named reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Documents and UTF-8 bytes by what became of them.

    Attributes:
        documents_read, bytes_read: everything in the input, unreadable records included.
        documents_lost, bytes_lost: unreadable records; they are among the dropped as well.
        input_size, input_lost: bytes of the input files (pipes have none), and those of refused files, of lost members
            of archives and behind damage that no reader can pass.
        dropped, dropped_bytes: by reason, as read for reasons of the reading step, as cleaned for duplicates.
        changed: documents by kind of change.
        pieces_added: documents that splitting long ones added.
        copies_added, copies_bytes: documents that component weights above 1 added.
        bytes_removed: net loss through cleaning and splitting of kept documents.
        lines_wrapped: line ends that wrapping of long lines added.
        written, written_bytes, written_lines: by split; bytes of text without the line feeds after each document.
        components: documents read by component.
    """

    documents_read: int = 0
    bytes_read: int = 0
    documents_lost: int = 0
    bytes_lost: int = 0
    input_size: int = 0
    input_lost: int = 0
    dropped: Counter = field(default_factory=Counter)
    dropped_bytes: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    pieces_added: int = 0
    copies_added: int = 0
    copies_bytes: int = 0
    bytes_removed: int = 0
    lines_wrapped: int = 0
    written: Counter = field(default_factory=Counter)
    written_bytes: Counter = field(default_factory=Counter)
    written_lines: Counter = field(default_factory=Counter)
    components: Counter = field(default_factory=Counter)

    def drop(self, reason: str, size: int, documents: int = 1) -> None:
        """Counts dropped documents and their bytes."""
        self.dropped[reason] += documents
        self.dropped_bytes[reason] += size

    def add(self, other: Counts) -> None:
        """Adds another count to this one."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def documents_missing(self) -> int:
        """Documents that went in (or were added) and came out nowhere: 0 when the books balance."""
        came = self.documents_read + self.pieces_added + self.copies_added
        return came - self.dropped.total() - self.written.total()

    def bytes_missing(self) -> int:
        """The same for bytes of text."""
        came = self.bytes_read + self.copies_bytes
        return came - self.dropped_bytes.total() - self.bytes_removed - self.written_bytes.total()

    def losses(self) -> dict[str, float]:
        """Shares of the input that could not be read, by what was counted."""
        pairs = {
            "documents": (self.documents_lost, self.documents_read),
            "bytes of text": (self.bytes_lost, self.bytes_read),
            "bytes of the input files": (self.input_lost, self.input_size),
        }
        return {what: lost / max(of, 1) for what, (lost, of) in pairs.items()}

    def as_dict(self) -> dict:
        return {k: dict(sorted(v.items())) if isinstance(v, Counter) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> Counts:
        """The counts of a record; those that older records lack are 0."""
        known = {k: values[k] for k in vars(cls()) if k in values}
        return cls(**{k: Counter(v) if isinstance(v, dict) else v for k, v in known.items()})


COUNTS = {f"{k}?": {"*": int} if isinstance(v, Counter) else int for k, v in vars(Counts()).items()}
"""Shape of a record of counts (see `read_json`)."""
