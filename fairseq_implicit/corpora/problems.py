"""What can be wrong with a corpus file, said in one sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass


class CorpusError(RuntimeError):
    """The preparation cannot go on; the message is one sentence with the file, flag or number at fault.

    Attributes:
        status: exit status of the command.
    """

    status = 1


class NothingWritten(CorpusError):
    """The result would be empty."""

    status = 3


class TooMuchLost(CorpusError):
    """More of the input was unreadable than ``--max-loss`` allows."""

    status = 4


@dataclass(frozen=True)
class ReadProblem:
    """A defect of one input file that a reader met.

    Attributes:
        reason: the heading under which the report counts it, such as ``"corrupt JSON line"``.
        path: the file, with the member's name after ``!`` inside an archive.
        offset: byte position in the uncompressed stream (in the file itself for plain files).
        sentence: what happened and where, for people.
        lost_documents: documents that were in the file and could not be read (0 when only the file's end is missing).
        lost_bytes: bytes of them that were seen.
    """

    reason: str
    path: str
    offset: int
    sentence: str
    lost_documents: int = 0
    lost_bytes: int = 0

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class ReadNote:
    """What a reader decided about an input without a loss of text; the report counts it under its reason.

    Attributes:
        reason: the heading under which it is counted.
        path: the file, with the member's name after ``!`` inside an archive.
        sentence: what was decided, for people.
    """

    reason: str
    path: str
    sentence: str


def shown(text: str, longest: int = 100) -> str:
    """Text from an input as it may stand in a sentence: short, on one line, every character printable."""
    escaped = repr(text[:longest])[1:-1]
    return escaped if len(text) <= longest else f"{escaped}..."
