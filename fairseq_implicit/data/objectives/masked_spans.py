"""Spans of tokens are selected, which need no words."""

import numpy as np

from fairseq_implicit.data.objectives.masked import Masked, after_special

_LENGTHS = np.repeat([1, 2, 3, 4], [4, 3, 2, 1])


class MaskedSpans(Masked):
    """All text is cut into spans of 1 to 4 tokens, anew with every mask, in the shares of MacBERT's n-grams (Cui et al.
    2020, section 3.2): for scripts without spaces between words."""

    def unit_begins(self, tokens: np.ndarray, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        begins = text & after_special(text)
        places = np.flatnonzero(text)
        begins[places[span_begins(len(places), rng)]] = True
        return begins


def span_begins(length: int, rng: np.random.Generator) -> np.ndarray:
    """Where the second and every further span of ``length`` tokens begins, ``(spans - 1,)`` int64."""
    ends = np.cumsum(_LENGTHS[rng.integers(len(_LENGTHS), size=length)])
    return ends[ends < length]
