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
# All this is done on UTF-8, where bytes below 0x80 never occur inside a character: `str.translate` and a character
# class over the text would be the most expensive steps of the whole preparation.
_ASCII_REPLACED = bytes.maketrans(b"\v\f\x1c\x1d\x1e\x1f", b"\n\n    ")
_ASCII_REMOVED = bytes(code for code in [*range(0x20), 0x7F] if chr(code) not in "\t\n\r\v\f\x1c\x1d\x1e\x1f")
# Two patterns of a literal beginning: together in one they would take ten times as long.
_C1_CONTROLS = re.compile(b"\xc2[\x80-\x9f]")
_SEPARATORS = re.compile(b"\xe2\x80[\xa8\xa9]")
_ASCII = bytes(range(0x80))
_NEXT_LINE = "\x85".encode()

# Normalising takes time that is quadratic in the length of a run of combining marks. Unicode's stream-safe text has no
# run of more than 30: a combining grapheme joiner, which shows nothing, separates them (UAX #15, section 13). Three
# Tibetan vowel signs are no marks themselves but decompose to marks only.
_MARKS = frozenset([*filter(unicodedata.combining, map(chr, range(0x300, 0x1F000))), "\u0f73", "\u0f75", "\u0f81"])
_MARK = f"[{''.join(_MARKS)}]"
# A character class is a table up to U+FFFF and a slow list beyond: looking ahead with a coarser one spares the list.
_PERHAPS_MARK = "[{}\U00010000-\U0010ffff]".format("".join(mark for mark in _MARKS if len(mark.encode()) < 4))
_SOME_MARK = re.compile(_PERHAPS_MARK)
_LONG_RUN = re.compile(f"(?={_PERHAPS_MARK}{{31}})({_MARK}{{30}})(?={_MARK})")
_JOINER = "\u034f"

# Characters that sentencepiece's nmt_nfkc normalisation turns into a space or into nothing: a line of only these
# would encode to no piece at all and end the document.
_INVISIBLE = "\u061c\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd"
_WHITE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace() and chr(code) != "\n")
_BLANK = _WHITE + _INVISIBLE
_BLANK_LINE = re.compile(f"\n[{re.escape(_BLANK)}]*(?=\n)")


def clean(text: str) -> tuple[str, list[str]]:
    """Cleans one document.

    Args:
        text: any string, unpaired surrogates included.

    Returns:
        the cleaned text, ``""`` when nothing is left, and the names of the changes that were made.
    """
    text, _, _, changes = clean_utf8(text)
    return text, changes


def clean_utf8(text: str) -> tuple[str, bytes, int, list[str]]:
    """`clean` for a caller that needs the bytes too, which the cleaning has at hand.

    Returns:
        the cleaned text, the same in UTF-8, the size of ``text`` in UTF-8 bytes, and the names of the changes.
    """
    if not text:
        return "", b"", 0, []
    changes: list[str] = []
    try:
        read = text.encode("utf-8")
    except UnicodeEncodeError:
        read = _SURROGATES.sub("\ufffd", text).encode("utf-8")  # three bytes each, like the surrogates
        changes.append("unpaired surrogates replaced")
    data = read
    if b"\r" in data:
        data = read.replace(b"\r\n", b"\n")
        if len(data) != len(read):
            changes.append("CRLF line ends")
        if b"\r" in data:
            data = data.replace(b"\r", b"\n")
            changes.append("lone carriage returns")
    visible = data.translate(_ASCII_REPLACED, _ASCII_REMOVED)
    # Of a text in a Latin script the few characters beyond ASCII are looked at, of any other one all.
    is_latin = len(read) < 1.25 * len(text)
    others = b"" if len(read) == len(text) else visible.translate(None, _ASCII) if is_latin else visible
    if b"\xc2" in others and _C1_CONTROLS.search(others):
        others = visible = _C1_CONTROLS.sub(lambda found: b" " if found[0] == _NEXT_LINE else b"", visible)
    if _SEPARATORS.search(others):
        visible = _SEPARATORS.sub(b"\n", visible)
    if visible != data:
        changes.append("control characters removed")
    if changes:
        text = visible.decode("utf-8")
    changes_of_bytes = len(changes)
    if not (is_latin and _is_stable(others.decode("utf-8"))):
        text = _normalised(text, changes)
    if b"\n" in visible or not text or text[0] in _BLANK:
        folded, blank_lines = _BLANK_LINE.subn("", f"\n{text}\n")
        if blank_lines:
            text = folded[1:-1]
            changes.append("blank lines folded")
    if text.startswith("\ufeff"):
        text = text.lstrip("\ufeff")
        changes.append("byte order mark removed")
    return text, visible if len(changes) == changes_of_bytes else text.encode("utf-8"), len(read), changes


def _is_stable(others: str) -> bool:
    """Whether a text, of which these are the characters beyond ASCII, is stream-safe NFC; False where that is unsure.

    Nothing but marks composes with ASCII, so that without any of them what is left out makes no difference.
    """
    return not others or _SOME_MARK.search(others) is None and unicodedata.is_normalized("NFC", others)


def _normalised(text: str, changes: list[str]) -> str:
    """Stream-safe Unicode NFC, in linear time."""
    result = divided = _stream_safe(text)
    if not unicodedata.is_normalized("NFC", divided):
        composed = unicodedata.normalize("NFC", divided)
        result = _stream_safe(composed)  # some characters end in marks once more when they are normalised
        changes.append("Unicode NFC")
    if len(divided) != len(text) or (divided is not result and len(result) != len(composed)):
        changes.append("long runs of combining marks divided")
    return result


def _stream_safe(text: str) -> str:
    # Every run of more than 30 marks has one at a place that is a multiple of 31.
    sample = text[::31]
    if _SOME_MARK.search(sample) is None or _MARKS.isdisjoint(sample):
        return text
    return _LONG_RUN.sub(rf"\1{_JOINER}", text)


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
