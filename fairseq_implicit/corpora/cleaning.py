"""Cleaning of one document: what must hold so that text, sentencepiece and fairseq agree on its lines.

fairseq reads text with universal line ends, cuts it at Python's white space and takes an empty line for the end of a
document. So a document must have no carriage return, no control character (U+0085 and U+001C–U+001F count as white
space there) and no line that is empty or becomes empty once it is tokenised.
"""

from __future__ import annotations

import re
import unicodedata

_SURROGATES = re.compile("[\ud800-\udfff]")

# Line separators proper become line feeds. U+0085 is none of them: in crawled text it is a misread ellipsis of
# code page 1252, so it becomes a space like the other white-space controls; the remaining controls carry nothing.
_LINE_SEPARATORS = "\v\f\u2028\u2029"
_WHITE_CONTROLS = "\x1c\x1d\x1e\x1f\x85"
_CONTROL_TABLE: dict[int, str | None] = {
    code: None for code in [*range(0x00, 0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n\r"
}
_CONTROL_TABLE |= {ord(c): "\n" for c in _LINE_SEPARATORS} | {ord(c): " " for c in _WHITE_CONTROLS}
# Bytes below 0x80 never occur inside a multi-byte UTF-8 sequence. Looking for the others by their bytes is several
# times as fast as a character class over the text, which would be the most expensive step of the whole preparation.
_ASCII_CONTROLS = bytes(code for code in sorted(_CONTROL_TABLE) if code < 0x80)
_C1_CONTROLS = re.compile(b"\xc2[\x80-\x9f]")
_SEPARATOR_BYTES = ("\u2028".encode(), "\u2029".encode())

# Characters that sentencepiece's nmt_nfkc normalisation turns into a space or into nothing: a line of only these
# would encode to no piece at all and end the document.
_INVISIBLE = "\u061c\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd"
_WHITE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace() and chr(code) != "\n")
_BLANK = _WHITE + _INVISIBLE
_BLANK_LINE = re.compile(f"\n[{re.escape(_BLANK)}]*\n")


def clean(text: str) -> tuple[str, list[str]]:
    """Cleans one document.

    Args:
        text: any string, unpaired surrogates included.

    Returns:
        the cleaned text, ``""`` when nothing is left, and the names of the changes that were made.
    """
    if not text:
        return "", []
    changes: list[str] = []
    ascii_only = text.isascii()
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        text = _SURROGATES.sub("\ufffd", text)
        data = text.encode("utf-8")
        changes.append("unpaired surrogates replaced")
    if b"\r" in data:
        without_pairs = text.replace("\r\n", "\n")
        if without_pairs != text:
            changes.append("CRLF line ends")
        text = without_pairs.replace("\r", "\n")
        if text != without_pairs:
            changes.append("lone carriage returns")
    if _has_controls(data):
        text = text.translate(_CONTROL_TABLE)
        changes.append("control characters removed")
    if not ascii_only and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        changes.append("Unicode NFC")
    if _BLANK_LINE.search(f"\n{text}\n"):
        text = "\n".join(line for line in text.split("\n") if line.strip(_BLANK))
        changes.append("blank lines folded")
    if text.startswith("\ufeff"):
        text = text.lstrip("\ufeff")
        changes.append("byte order mark removed")
    return text, changes


def _has_controls(data: bytes) -> bool:
    """True when a UTF-8 text contains a character of `_CONTROL_TABLE`."""
    return (
        len(data.translate(None, _ASCII_CONTROLS)) != len(data)
        or _C1_CONTROLS.search(data) is not None
        or any(separator in data for separator in _SEPARATOR_BYTES)
    )


def split_text(text: str, longest: int) -> list[str]:
    """Cuts a text into pieces of at most ``longest`` UTF-8 bytes, at line ends where possible, losing no character
    but the line feed or the space at a cut.

    Lines longer than ``longest`` are wrapped by `wrap_line`.
    """
    pieces: list[str] = []
    held: list[str] = []
    size = 0
    for whole in text.split("\n"):
        for line in wrap_line(whole, longest):
            length = len(line.encode("utf-8"))
            if held and size + 1 + length > longest:
                pieces.append("\n".join(held))
                held, size = [], 0
            size += length + (1 if held else 0)
            held.append(line)
    pieces.append("\n".join(held))
    return pieces


def wrap_line(line: str, longest: int) -> list[str]:
    """Wraps one line into lines of at most ``longest`` UTF-8 bytes, at spaces where possible.

    The space at a cut is dropped; without a space the cut falls between two characters. No piece is blank.
    """
    if len(line) * 4 <= longest:
        return [line]
    data = line.encode("utf-8")
    pieces: list[str] = []
    start = 0
    while len(data) - start > longest:
        end = data.rfind(b" ", start + 1, start + longest + 1)
        following = end + 1
        if end < 0:
            end = start + longest
            while data[end] & 0xC0 == 0x80:
                end -= 1
            following = end
        pieces.append(data[start:end].decode("utf-8"))
        start = following
    pieces.append(data[start:].decode("utf-8"))
    return [piece for piece in pieces if piece.strip(_BLANK)] or [line]
