"""Whole words are selected."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fairseq_implicit.data.objectives.masked import Masked, after_special, is_text
from fairseq_implicit.data.objectives.masked_spans import span_begins
from fairseq_implicit.data.objectives.objective import MaskRates
from fairseq_implicit.text.vocabulary import word_starts

# What stands between two spaces is no word in a script without them but a clause or a paragraph: one of more pieces
# than this is cut into spans. English words of so many pieces are addresses, numbers and misprints.
LONGEST_WORD = 8
#: Words of more pieces than this on average are none. English has 1.3, code and small dictionaries below 3.
_PIECES_OF_A_WORD = 4.0


class MaskedWords(Masked):
    """Words, from a piece that begins one to the next, and spans in what is too long to be one.

    Attributes:
        word_starts: ids that begin a word, ``(symbols,)`` bool.
    """

    def __init__(self, symbols: Sequence[str], surface: Callable[[str], str], rates: MaskRates):
        super().__init__(symbols, surface, rates)
        self.word_starts = word_starts(symbols, surface)

    def unit_begins(self, tokens: np.ndarray, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        begins = self._word_begins(tokens, text)
        places = np.flatnonzero(text)
        word = np.cumsum(begins[places]) - 1
        too_long = np.bincount(word) > LONGEST_WORD
        if too_long.any():
            inside = places[too_long[word]]
            begins[inside[span_begins(len(inside), rng)]] = True
        return begins

    def _word_begins(self, tokens: np.ndarray, text: np.ndarray) -> np.ndarray:
        return text & (self.word_starts[tokens] | after_special(text))

    def pieces_per_word(self, blocks: Iterable[np.ndarray]) -> float:
        """Mean number of pieces of a word in ``blocks``, each ``(length,)``."""
        pieces = words = 0
        for tokens in blocks:
            text = is_text(tokens)
            pieces += np.count_nonzero(text)
            words += np.count_nonzero(self._word_begins(tokens, text))
        return pieces / max(words, 1)

    def remarks(self, blocks: Iterable[np.ndarray]) -> list[str]:
        if (pieces := self.pieces_per_word(blocks)) <= _PIECES_OF_A_WORD:
            return []
        return [
            f"what stands between two beginnings of words has {pieces:.1f} pieces on average, so the text has no word "
            f"spaces; spans of 1 to 4 pieces are masked inside whatever is longer than {LONGEST_WORD}."
        ]
