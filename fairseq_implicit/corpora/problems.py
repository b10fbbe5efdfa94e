"""What can be wrong with a corpus file, said in one sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass


class CorpusError(RuntimeError):
    """The preparation cannot go on; the message is one sentence with the file, flag or number at fault."""


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
