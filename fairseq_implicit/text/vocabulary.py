"""What every vocabulary has: the rows of an embedding, and the text that they stand for.

Rows: ``<s> <pad> </s> <unk>``, the tokenizer's pieces in its order, then ``madeupword`` rows up to a size that matrix
units like. fairseq's ``dict.txt`` lists them without the first four. ``<mask>`` comes last and is appended by the task,
so that it is no part of a file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from fairseq_implicit.text.token_files import id_type

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNKNOWN = range(4)
MASK = "<mask>"
MADE_UP = "madeupword"


def dictionary_rows(pieces: Iterable[str], multiple: int = 64) -> list[str]:
    """The rows for the pieces of a tokenizer, without ``<mask>``; with it their number is a multiple of ``multiple``.

    Raises:
        ValueError: a piece that fairseq's ``dict.txt`` cannot hold, or that is a symbol of fairseq's own; a filling row
            is one only where more are to come.
    """
    rows = list(SPECIAL_SYMBOLS)
    taken = {*rows, MASK}
    for piece in pieces:
        if not piece or re.search(r"\s", piece):
            raise ValueError(
                f"the piece {piece!r} contains white space, which fairseq's dict.txt cannot hold; train the tokenizer "
                "on text without control characters."
            )
        if piece in taken or (multiple > 1 and piece.startswith(MADE_UP)):
            raise ValueError(
                f"the piece {piece!r} collides with a symbol of fairseq's own; train the tokenizer without it among "
                "its user-defined symbols."
            )
        rows.append(piece)
        taken.add(piece)
    return rows + [f"{MADE_UP}{number:04d}" for number in range(-(len(rows) + 1) % multiple)]


def are_text(symbols: Sequence[str]) -> np.ndarray:
    """Which rows stand for text, ``(rows,)`` bool: neither special symbols nor ``<mask>`` nor filling."""
    text = np.array([symbol != MASK and not symbol.startswith(MADE_UP) for symbol in symbols], dtype=bool)
    text[: len(SPECIAL_SYMBOLS)] = False
    return text


def word_starts(symbols: Sequence[str], surface: Callable[[str], str]) -> np.ndarray:
    """Which rows begin a word, ``(rows,)`` bool: those whose text begins with a space, and all that are no text.

    Args:
        symbols: of all rows.
        surface: see `Vocabulary.surface`.

    Raises:
        ValueError: no piece begins a word.
    """
    text = are_text(symbols)
    begins = np.array([surface(symbol).startswith(" ") for symbol in symbols], dtype=bool)
    if not (begins & text).any():
        raise ValueError("no symbol of dict.txt begins a word, as '▁' does in sentencepiece's.")
    return begins | ~text


class Vocabulary(ABC):
    """A tokenizer and the rows of its pieces.

    A kind says how its files hold pieces (`_read`), how text is split into them and what text each stands for; it may
    be faster at whole lines (`_encode`). It pickles by its files' contents, for worker processes.

    Args:
        contents: of the tokenizer's files, in the order of `FILES`.
        symbols: the rows of a ``dict.txt`` in another order or size, ``<mask>`` included or not; by default those of
            `dictionary_rows`. Pieces that are not among them are unknown.

    Attributes:
        contents: of the files, by the names that they are published with.
        symbols: of all rows.

    Raises:
        ValueError: the files are damaged, or have a piece that ``dict.txt`` cannot hold; the sentence goes on from a
            file's name.
    """

    #: What its files are called in a sentence.
    NAME: ClassVar[str]
    #: Its files under the names that models are published with, by fairseq's flag.
    FILES: ClassVar[dict[str, str]]

    def __init__(self, *contents: bytes, symbols: Sequence[str] | None = None):
        self.contents = dict(zip(self.published_names(), contents, strict=True))
        pieces = self._read(*contents)
        self.symbols = self._rows_of(pieces) if symbols is None else list(symbols)
        # Text that merely looks like <mask>, a special symbol or filling is unknown text, not that symbol.
        self._rows = {self.symbols[row]: int(row) for row in np.flatnonzero(are_text(self.symbols))}

    @classmethod
    def open(cls, *paths: str | Path, symbols: Sequence[str] | None = None) -> Self:
        """Reads the tokenizer's files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: see the class; the sentence begins with the file's name.
        """
        for path in paths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: there is no such {cls.NAME}; train one, or mend the path.")
        try:
            return cls(*(Path(path).read_bytes() for path in paths), symbols=symbols)
        except ValueError as error:
            raise ValueError(f"{paths[0]}: {error}") from error

    @classmethod
    def published_names(cls) -> list[str]:
        return list(cls.FILES.values())

    def __reduce__(self):
        return partial(type(self), symbols=self.symbols), tuple(self.contents.values())

    @abstractmethod
    def _read(self, *contents: bytes) -> Iterable[str]:
        """Loads the tokenizer from its files' contents and returns its pieces in their order."""

    def _rows_of(self, pieces: Iterable[str]) -> list[str]:
        return dictionary_rows(pieces)

    @abstractmethod
    def split(self, text: str, glued: bool = False) -> list[str]:
        """The pieces of a text, without white space; ``glued`` text continues the word before it."""

    @abstractmethod
    def surface(self, symbol: str) -> str:
        """The text that one symbol stands for, with its leading space where it begins a word."""

    def join(self, symbols: Iterable[str]) -> str:
        """The text of symbols: the inverse of `split`."""
        return "".join(map(self.surface, symbols)).strip()

    @property
    def dtype(self) -> np.dtype:
        """Integer type of the ids in token files."""
        return id_type(len(self.symbols))

    def ids(self, pieces: Iterable[str]) -> np.ndarray:
        """Ids of pieces, ``(length,)``; `UNKNOWN` for whatever is no text of the vocabulary."""
        return np.array([self._rows.get(piece, UNKNOWN) for piece in pieces], dtype=self.dtype)

    def encode(self, text: str, glued: bool = False) -> np.ndarray:
        """Ids of a text without special symbols, ``(length,)``."""
        return self.ids(self.split(text, glued))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; one beyond the rows is unknown."""
        rows = self.symbols
        return self.join([rows[number] if number < len(rows) else SPECIAL_SYMBOLS[UNKNOWN] for number in ids])

    def encode_lines(self, lines: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of lines, each followed by ``</s>``.

        Args:
            lines: UTF-8, without line ends; an empty line gives a lone ``</s>``.

        Returns:
            ids ``(tokens,)``, and the number of tokens of each line ``(lines,)`` int32.
        """
        flat, lengths = self._encode(lines)
        lengths = lengths + 1
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype=self.dtype)
        is_text = np.ones(len(ids), dtype=bool)
        is_text[ends - 1] = False
        ids[is_text] = flat
        ids[ends - 1] = EOS
        return ids, lengths.astype(np.int32)

    def _encode(self, lines: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all lines one after the other, and each line's number of them ``(lines,)`` int64."""
        parts = [self.encode(line.decode()) for line in lines]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return np.concatenate([np.zeros(0, dtype=self.dtype), *parts]), lengths

    def dictionary_text(self) -> str:
        """Content of fairseq's ``dict.txt``."""
        return "".join(f"{symbol} {count_of(symbol)}\n" for symbol in self.symbols[len(SPECIAL_SYMBOLS) :])


def count_of(symbol: str) -> int:
    """What ``dict.txt`` says of a symbol's frequency: fairseq sorts by it and never draws what is 0."""
    return 0 if symbol.startswith(MADE_UP) else 1
