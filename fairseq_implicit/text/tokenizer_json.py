"""Tokenizers of ``tokenizer.json``: word pieces, byte pairs or unigram pieces, as transformers' models come with.

The ids are those of the tokenizer in another order: the four symbols that fairseq begins with, all other pieces in
their own order, ``<mask>``. Nothing is filled up, so that there are as many rows as the tokenizer has tokens. Tokens of
nothing but spaces, which ``dict.txt`` cannot hold, are written with ``␣`` there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from fairseq_implicit.text.vocabulary import MASK, UNKNOWN, Vocabulary, dictionary_rows

#: What tokenizers call fairseq's symbols.
ROLES = {
    "<s>": ("[CLS]", "<s>"),
    "<pad>": ("[PAD]", "<pad>"),
    "</s>": ("[SEP]", "</s>"),
    "<unk>": ("[UNK]", "<unk>"),
    MASK: ("[MASK]", MASK),
}


class TokenizerVocabulary(Vocabulary):
    """The tokens of a tokenizer that are no special symbols.

    Text that looks like one is text. What follows a mask is split as the tokenizer splits it there: pieces of bytes and
    of unigram models go on with the word, word pieces begin another.

    Attributes:
        special: the tokenizer's names of fairseq's symbols and of ``<mask>``, those that it has.
        blanks: the tokenizer's name of the symbols that stand for nothing but spaces.
        token_ids: the tokenizer's own id of each row, ``<mask>`` included, ``(rows,)`` int64; -1 where it has none.
    """

    NAME = "tokenizer.json"
    FILES = {"hf_tokenizer": "tokenizer.json"}

    def __init__(self, tokenizer_json: bytes, symbols: Sequence[str] | None = None):
        super().__init__(tokenizer_json, symbols=symbols)
        known = int((self.ids(self._pieces) != UNKNOWN).sum())
        if 2 * known < len(self._pieces):  # the numbers of another tokenizer's dict.txt are pieces of text, too
            raise ValueError(
                f"dict.txt holds only {known:,} of its {len(self._pieces):,} tokens: it belongs to a model with "
                "another tokenizer"
            )
        own = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = {**self.special, **self.blanks}
        names = [tokens.get(symbol, symbol) for symbol in (*self.symbols, *[MASK] * (MASK not in self.symbols))]
        self.token_ids = np.array([own.get(name, -1) for name in names], dtype=np.int64)

    def _rows_of(self, pieces: Iterable[str]) -> list[str]:
        return dictionary_rows(pieces, multiple=1)

    def _read(self, *contents: bytes) -> list[str]:
        (text,) = contents
        try:
            self._tokenizer = Tokenizer.from_str(text.decode("utf-8"))
            described = json.loads(text)
        except Exception as error:  # tokenizers raises no other class
            raise ValueError(f"this is no tokenizer ({error}).") from error
        if described.get("decoder") is None:
            raise ValueError("it has no decoder, so that nothing says which of its pieces begin a word.")
        decoder = described["decoder"]
        if "cleanup" in decoder:  # it moves a comma to the word before it, and so does not say what a piece is
            decoder["cleanup"] = False
        # The text of a symbol is text to the one, and the symbol to the other.
        self._after_mask = Tokenizer.from_str(json.dumps(described))
        self._tokenizer.encode_special_tokens = True
        for tokenizer in (self._tokenizer, self._after_mask):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.special = {
            symbol: next(name for name in names if name in vocabulary)
            for symbol, names in ROLES.items()
            if any(name in vocabulary for name in names)
        }
        names = set(self.special.values())
        self.blanks = {"␣" * len(piece): piece for piece in vocabulary if piece and not piece.strip(" ")}
        self._shown = {piece: symbol for symbol, piece in self.blanks.items()}
        pieces = (piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece not in names)
        self._pieces = [self._shown.get(piece, piece) for piece in pieces]
        self._anchor = next((piece for piece in self._pieces if piece.isascii() and piece.isalnum()), "a")
        return self._pieces

    def split(self, text: str, glued: bool = False) -> list[str]:
        if not glued or MASK not in self.special:
            return self._symbols(self._tokenizer.encode(text, add_special_tokens=False).tokens)
        return self._symbols(self._after_mask.encode(self.special[MASK] + text, add_special_tokens=False).tokens[1:])

    def _symbols(self, tokens: list[str]) -> list[str]:
        return [self._shown.get(token, token) for token in tokens] if self._shown else tokens

    def surface(self, symbol: str) -> str:
        # Only after another piece does a decoder say whether there is a space.
        decoder = self._after_mask.decoder
        return decoder.decode([self._anchor, self.blanks.get(symbol, symbol)])[len(decoder.decode([self._anchor])) :]

    def join(self, symbols: Iterable[str]) -> str:
        return self._tokenizer.decoder.decode([self.blanks.get(symbol, symbol) for symbol in symbols]).strip()
