"""Tar archives as streams, in which a damaged header costs its own member.

Python's ``tarfile`` ends an archive without a word at any bad or missing header but the first, and at the end mark of
the first of several concatenated archives. Here the reading goes on at the next good header, and what was passed over
is a `ReadProblem`. Formats: POSIX.1-2008 (ustar, pax) and GNU tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from fairseq_implicit.corpora.problems import ReadProblem
from fairseq_implicit.corpora.streams import BlockReader, StreamDamage

_BLOCK = 512
# Names and extended headers are read into memory; no real one comes near this.
_LONGEST_EXTENSION = 2**20
_PAX_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=")
# Of these types the size says nothing about the blocks that follow.
_WITHOUT_DATA = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}


@dataclass
class TarMember:
    """One member of an archive, at its data.

    Attributes:
        name: its path; bytes that are no UTF-8 are escaped as in file names.
        kind: "" for a regular file, else what it is, such as "a symbolic link".
        linkname: what a link points to.
        size: bytes of its data.
    """

    name: str
    kind: str
    linkname: str
    size: int
    _stream: BlockReader
    _left: int
    is_cut: bool = False

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes of its data; empty at the end alone.

        Raises:
            StreamDamage: the archive ends or is damaged inside the member.
        """
        try:
            data = self._stream.read(min(size, self._left))
        except StreamDamage:
            self.is_cut = True
            raise
        if not data and self._left:
            self.is_cut = True
            raise StreamDamage(True, self._stream.position, "the archive ends inside this member")
        self._left -= len(data)
        return data


def tar_members(stream: BlockReader, path: str) -> Iterator[TarMember | ReadProblem]:
    """Yields the members of an archive; read each one before the next is asked for.

    Args:
        stream: the uncompressed archive, at its beginning.
        path: its name, for the problems.

    Raises:
        StreamDamage: of the stream, outside of the members' data.
    """
    ended, damaged_at, fault, last = False, -1, "", 0
    overrides: dict[str, str] = {}
    while True:
        offset = stream.position
        block = stream.read_all(_BLOCK)
        if not block.strip(b"\0"):
            if len(block) == _BLOCK:
                # One archive may follow another: what comes after the end mark is looked at too.
                ended = True
                continue
            break
        header = None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size, extension = _size_of(header, overrides), None
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) or _is_pax(header):
                extension = _extension(header, stream, size)
        except (tarfile.HeaderError, ValueError) as error:
            if damaged_at < 0:
                damaged_at, fault = offset, _reason(block, error)
            last, overrides = stream.position, {}
            continue
        ended = False
        if damaged_at >= 0:
            yield _damage(path, damaged_at, last, fault)
            damaged_at = -1
        if extension is not None:
            overrides |= extension if header.type != tarfile.XGLTYPE else {}
            continue
        kind = _kind_of(header, overrides)
        if header.type == tarfile.GNUTYPE_SPARSE and block[482]:
            while (more := stream.read_all(_BLOCK)) and len(more) == _BLOCK and more[504]:
                pass
        name, linkname = overrides.get("path", header.name), overrides.get("linkpath", header.linkname)
        overrides = {}
        length = 0 if header.type in _WITHOUT_DATA else size
        member = TarMember(name, kind, linkname, length, stream, length)
        if header.type != tarfile.DIRTYPE:
            yield member
        try:
            if member.is_cut:
                return  # its reader has said so
            while member.read(2**20):
                pass
        except StreamDamage as error:
            sentence = f"The archive {path} ends inside its member {name} ({error.sentence_end}); fetch it again."
            yield ReadProblem("truncated file", path, error.compressed_offset, sentence)
            return
        stream.read_all(-length % _BLOCK)
    if damaged_at >= 0:
        yield _damage(path, damaged_at, last, fault)
    elif not ended:
        sentence = (
            f"The archive {path} ends at byte {stream.position} without the mark that ends an archive: members may be "
            "missing; fetch it again."
        )
        yield ReadProblem("truncated file", path, stream.position, sentence)


def _reason(block: bytes, error: Exception) -> str:
    return "the archive ends inside of it" if len(block) < _BLOCK else str(error)


def _damage(path: str, start: int, end: int, fault: str) -> ReadProblem:
    """How many documents a lost member holds is not known: it counts as one."""
    sentence = (
        f"The archive {path} is damaged: the member's header at byte {start} cannot be read ({fault}), and the "
        f"{end - start} bytes to the next good header are lost; fetch it again."
    )
    return ReadProblem("damaged archive member", path, start, sentence, 1, end - start)


def _size_of(header: tarfile.TarInfo, overrides: dict[str, str]) -> int:
    size = header.size
    if "size" in overrides and not _is_pax(header):
        size = int(overrides["size"])
    if size < 0:
        raise ValueError(f"its size is {size}")
    return size


def _is_pax(header: tarfile.TarInfo) -> bool:
    return header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def _kind_of(header: tarfile.TarInfo, overrides: dict[str, str]) -> str:
    if header.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse.") for name in overrides):
        return "a sparse file"
    if header.type in _WITHOUT_DATA:
        return _WITHOUT_DATA[header.type]
    return "" if header.isreg() else f"of the unknown type {header.type!r}"


def _extension(header: tarfile.TarInfo, stream: BlockReader, size: int) -> dict[str, str]:
    """What a header of GNU's long names or of pax says about the member after it.

    Raises:
        ValueError: it is damaged.
    """
    if size > _LONGEST_EXTENSION:
        raise ValueError(f"its extension has {size} bytes")
    data = stream.read_all(size)
    stream.read_all(-size % _BLOCK)
    if len(data) < size:
        raise ValueError("the archive ends inside its extension")
    if not _is_pax(header):
        value = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return {"path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath": value}
    records: dict[str, str] = {}
    position = 0
    while position < size:
        match = _PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= size:
            raise ValueError("its extended header is damaged")
        key = match[2].decode("utf-8", "surrogateescape")
        records[key] = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        position = end
    return records
