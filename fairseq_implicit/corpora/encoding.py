"""Text straight to fairseq token ids: whole blocks of lines at a time, as numpy arrays.

Byte for byte the result of ``fairseq-preprocess`` on the pieces that sentencepiece writes as text, without the text:
that route spends its time in a Python loop over pieces.
"""

from __future__ import annotations

import re

import numpy as np
import sentencepiece

from fairseq_implicit.corpora.vocabulary import EOS, SPECIAL_SYMBOLS, UNKNOWN, Vocabulary

# White space other than the plain space. A known piece never contains it, but the surface of an unknown one can where
# the model's normalisation leaves it, and then fairseq's text route cuts the surface there.
_UNUSUAL_SPACE = re.compile(r"[^\S ]")


class LineEncoder:
    """Encodes blocks of lines.

    Args:
        vocabulary: pieces and ids.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(vocabulary.model)
        self._table = vocabulary.ids.astype(vocabulary.dtype)
        self._index = {symbol: number for number, symbol in enumerate(vocabulary.symbols)}
        self._dtype = vocabulary.dtype

    def encode(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of lines, each followed by ``</s>``.

        Args:
            lines: UTF-8, without line ends; an empty line gives a lone ``</s>``.

        Returns:
            ids ``(tokens,)`` in the vocabulary's dtype, and the number of tokens of each line ``(lines,)`` int32.
        """
        arrays = self._processor.encode(lines, return_type="numpy", num_threads=1)
        flat = self._table[np.concatenate(arrays)] if arrays else np.zeros(0, dtype=self._dtype)
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        unknown = np.flatnonzero(flat == UNKNOWN)
        if len(unknown):
            ends = np.cumsum(lengths)
            suspects = np.unique(np.searchsorted(ends, unknown, side="right"))
            texts = {int(n): lines[n].decode() for n in suspects}
            # Most models make the ideographic space of Japanese and Chinese a plain one: encoding every line with one
            # a second time would cost a quarter of the speed.
            replaced = {
                n: self._encode_as_text(text)
                for n, text in texts.items()
                if _UNUSUAL_SPACE.search(text) and _UNUSUAL_SPACE.search(self._processor.normalize(text))
            }
            if replaced:
                parts = np.split(flat, ends[:-1])
                for number, ids in replaced.items():
                    parts[number] = ids
                    lengths[number] = len(ids)
                flat = np.concatenate(parts)
        lengths += 1
        ends = np.cumsum(lengths)
        result = np.empty(int(ends[-1]) if len(ends) else 0, dtype=self._dtype)
        is_token = np.ones(len(result), dtype=bool)
        is_token[ends - 1] = False
        result[is_token] = flat
        result[ends - 1] = EOS
        return result, lengths.astype(np.int32)

    def _encode_as_text(self, line: str) -> np.ndarray:
        pieces = " ".join(self._processor.encode(line, out_type=str)).split()
        ids = [self._index.get(piece, UNKNOWN) for piece in pieces]
        # Text that merely looks like a special symbol is unknown text, not that symbol.
        return np.array([number if number >= len(SPECIAL_SYMBOLS) else UNKNOWN for number in ids], dtype=self._dtype)
