"""Masked language modelling (Devlin et al. 2019, section 3.1), drawn without a loop over tokens.

Which positions are selected (`Masked.unit_begins`, `select`) is apart from what the model sees there (`Corruption`).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from fairseq_implicit.data.objectives.objective import MaskRates, Objective, Sample
from fairseq_implicit.text.vocabulary import BOS, EOS, MASK, PAD, are_text

_NOT_SELECTED = 2.0  # the fates of the selected lie in [0, 1)


class Masked(Objective):
    """Selects units (tokens, words or spans) and masks them.

    ``<s>``, ``</s>`` and ``<pad>`` are never masked (fairseq's ``masked_lm`` masks them like text, which spends targets
    on what the position alone tells). ``<unk>`` is text and is masked like any other token.
    """

    def __init__(self, symbols: Sequence[str], surface: Callable[[str], str], rates: MaskRates):
        self.probability = rates.probability
        self.corruption = Corruption(symbols, rates)

    @abstractmethod
    def unit_begins(self, tokens: np.ndarray, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Where each unit that is selected as a whole begins, ``(length,)`` bool, at positions of ``text`` only.

        Args:
            tokens: ids, ``(length,)`` int64.
            text: ``(length,)`` bool, where text stands and no special symbol.
            rng: source of all randomness.
        """

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Sample:
        text = is_text(tokens)
        places, fates = select(text, self.unit_begins(tokens, text, rng), self.probability, rng)
        target = np.full_like(tokens, PAD)
        target[places] = tokens[places]
        return Sample(self.corruption(tokens, places, fates, rng), target)


def is_text(tokens: np.ndarray) -> np.ndarray:
    """Which tokens are neither ``<s>`` nor ``</s>`` nor ``<pad>``, ``(length,)`` bool."""
    return (tokens != BOS) & (tokens != EOS) & (tokens != PAD)


def after_special(text: np.ndarray) -> np.ndarray:
    """Which positions come first or after one that is no text, ``(length,)`` bool: nothing goes on there."""
    after = np.ones_like(text)
    np.logical_not(text[:-1], out=after[1:])
    return after


def select(
    text: np.ndarray, begins: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Selects a share of the units, and draws a number for each that says what becomes of it.

    Args:
        text: ``(length,)`` bool.
        begins: where units begin, ``(length,)`` bool.
        share: of the units.
        rng: source of all randomness.

    Returns:
        selected places ``(selected,)`` int64, and the fate of each place, in [0, 1), which is its unit's.
    """
    # unit[i]: which unit position i belongs to
    unit = np.cumsum(begins) - 1
    units = int(unit[-1]) + 1 if len(unit) else 0
    # probabilistic rounding keeps the expected share exact on short sequences
    selected = min(int(share * units + rng.random()), units)
    if share * np.count_nonzero(text) >= 1.0:
        # a few long words may be due less than one target, and a block without is wasted
        selected = max(selected, 1)
    fate = np.full(units + 1, _NOT_SELECTED)  # the extra entry belongs to special symbols before the first unit
    fate[rng.permutation(units)[:selected]] = rng.random(selected)
    fates = fate[unit]
    places = np.flatnonzero(text & (fates < 1.0))
    return places, fates[places]


class Corruption:
    """What the model sees in the place of selected tokens: themselves, random tokens, or ``<mask>``.

    A random token is never a special symbol, ``<mask>`` or a ``madeupword``.
    """

    def __init__(self, symbols: Sequence[str], rates: MaskRates):
        self.mask = symbols.index(MASK)
        self.replacements = np.flatnonzero(are_text(symbols))
        self.left = rates.leave_unmasked
        self.masked = rates.leave_unmasked + rates.random

    def __call__(
        self, tokens: np.ndarray, places: np.ndarray, fates: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """A copy of ``tokens`` ``(length,)``, corrupted at the ``places`` and by the ``fates`` of `select`."""
        source = tokens.copy()
        source[places[fates >= self.masked]] = self.mask
        randomised = places[(fates >= self.left) & (fates < self.masked)]
        source[randomised] = self.replacements[rng.integers(len(self.replacements), size=len(randomised))]
        return source
