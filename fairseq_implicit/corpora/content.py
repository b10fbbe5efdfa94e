"""What a stream's first bytes say: a compression, an archive, an encoding, or something that is no corpus."""

from __future__ import annotations

import codecs
import re
import tarfile

from fairseq_implicit.corpora.problems import CorpusError

PARQUET = b"PAR1"

# What is found under the names of corpora and is none of the formats that are read: the first bytes, what it is, what
# to do about it. Sources: the formats' own specifications and file(1)'s table.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a git-LFS pointer", "fetch the file itself with 'git lfs pull'"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"PK\x05\x06", "an empty zip archive", "fetch it again"),
    (b"\x04\x22\x4d\x18", "lz4 data", "decompress it with 'lz4 -d'"),
    (b"\x02\x21\x4c\x18", "lz4 data", "decompress it with 'lz4 -d'"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy data", "decompress it"),
    (b"LZIP", "lzip data", "decompress it with 'lzip -d'"),
    (b"\x1f\x9d", "compress data", "decompress it with 'uncompress'"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (b"WARC/", "a WARC file of crawled pages", "extract its text first"),
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"{\\rtf", "an RTF document", "extract its text first"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", "extract its text first"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "leave it out"),
    (b"\xff\xd8\xff", "a JPEG image", "leave it out"),
    (b"GIF87a", "a GIF image", "leave it out"),
    (b"GIF89a", "a GIF image", "leave it out"),
    (b"\x7fELF", "a program", "leave it out"),
    (b"ARROW1", "an Arrow file", "convert it to parquet or JSON lines"),
    (b"ORC\x03", "an ORC file", "convert it to parquet or JSON lines"),
    (b"Obj\x01", "an Avro file", "convert it to parquet or JSON lines"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "convert it to parquet or JSON lines"),
    (b"SQLite format 3\x00", "an SQLite database", "convert it to parquet or JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "convert it to parquet or JSON lines"),
)
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html|<\?xml[^>]*>\s*<(?:error|html)\b)", re.IGNORECASE)

_BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ASCII = bytes(range(0x80))
# A text is taken for another encoding's when more than one byte in 2,000 is invalid (French in Latin-1: one in 30,
# English with typographic quotes: one in 700) and most of what is not ASCII is. The least number lets single damaged
# characters pass in short texts.
_LEAST_INVALID, _MOST_INVALID = 4, 1 / 2000
_MOST_NULS = 0.1


def refuse_foreign(head: bytes, name: str) -> None:
    """Checks that a stream's first bytes, compressed or not, do not belong to a format that is not read.

    Raises:
        CorpusError: they do; the sentence says what it is and what to do.
    """
    for signature, kind, advice in _FOREIGN:
        if head.startswith(signature):
            raise CorpusError(f"{name} is {kind}, which is not read: {advice}.")
    if _PAGE.match(head):
        raise CorpusError(
            f"{name} is an HTML or XML page, perhaps an error page that was saved under that name, and is not read: "
            "fetch the file again, or extract its text first."
        )


def is_tar(head: bytes) -> bool:
    """True when a stream begins with the header of a tar member."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def encoding_of(head: bytes) -> str:
    """The encoding that a byte order mark announces: "utf-16", "utf-32", or "" without one (UTF-8's own included)."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS if head.startswith(mark)), "")


def encoding_fault(text: bytes | str, invalid: int) -> str:
    """Why text is not in the encoding that it was read in, or "" when it is but for single damaged characters.

    Args:
        text: bytes that should be UTF-8, or characters out of another encoding.
        invalid: number of places that could not be decoded.
    """
    if invalid < _LEAST_INVALID or invalid <= len(text) * _MOST_INVALID:
        return ""
    if isinstance(text, bytes):
        beyond_ascii, unit = len(text.translate(None, _ASCII)), "bytes"
    else:
        beyond_ascii, unit = sum(character > "\x7f" for character in text), "characters"
    if 2 * invalid <= beyond_ascii:
        return ""
    return f"{invalid} of its {beyond_ascii} {unit} beyond ASCII are invalid"


def refuse_binary(head: bytes, name: str) -> None:
    """Checks that a text without a byte order mark is UTF-8.

    Raises:
        CorpusError: the beginning of the file is text in another encoding, or no text.
    """
    nuls = head.count(0)
    if nuls >= _LEAST_INVALID and nuls > len(head) * _MOST_NULS:
        raise CorpusError(
            f"{name} is not UTF-8 text: {nuls / len(head):.0%} of its first {len(head)} bytes are NUL, as in UTF-16 "
            "without a byte order mark or in a binary file; name the encoding with --encoding (utf-16-le, utf-16-be), "
            "or leave the file out."
        )
    fault = encoding_fault(head, invalid_in(head))
    if fault:
        raise CorpusError(
            f"{name} is not UTF-8 text: {fault} in its first {len(head)}; name its encoding with --encoding (gb18030, "
            "latin-1, cp1252, shift_jis, ...), or leave the file out when it is binary."
        )


def invalid_in(data: bytes) -> int:
    """Number of places where bytes are no UTF-8."""
    try:
        data.decode("utf-8")
        return 0
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace").count("\ufffd") - data.count("\ufffd".encode())
