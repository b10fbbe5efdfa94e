"""Masks for masked language modelling (Devlin et al. 2019, section 3.1), drawn without a loop over tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from fairseq.data import Dictionary

from fairseq_implicit.text.vocabulary import MASK, are_text, word_starts

# What stands between two spaces is no word in a script without them but a clause or a paragraph: one of more pieces
# than this is cut into spans of 1 to 4 pieces, drawn anew with every mask in the shares of MacBERT's n-grams (Cui et
# al. 2020, section 3.2). English words of so many pieces are addresses, numbers and misprints.
LONGEST_WORD = 8
_SPAN_LENGTHS = np.repeat([1, 2, 3, 4], [4, 3, 2, 1])


@dataclass(frozen=True)
class Masking:
    """How the tokens of a block are masked.

    ``<s>``, ``</s>`` and ``<pad>`` are never masked (fairseq's ``masked_lm`` masks them like text, which spends targets
    on what the position alone tells), and a random replacement is never a special symbol, ``<mask>`` or a
    ``madeupword``. ``<unk>`` is text and is masked like any other token.

    Attributes:
        pad, bos, eos, mask: ids.
        replacements: ids that a random replacement is drawn from, ``(n,)`` int64.
        vocabulary: number of ids; larger ones in the data mean that it was binarised with another dictionary.
        probability: share of the tokens (or words) that are selected.
        leave_unmasked: share of the selected that stay as they are.
        random: share of the selected that become a random token; the rest become ``<mask>``.
        word_starts: ids that begin a word, ``(vocabulary,)`` bool, to select whole words, or spans of pieces in "words"
            of more than `LONGEST_WORD` pieces; None selects tokens.
    """

    pad: int
    bos: int
    eos: int
    mask: int
    replacements: np.ndarray
    vocabulary: int
    probability: float = 0.15
    leave_unmasked: float = 0.1
    random: float = 0.1
    word_starts: np.ndarray | None = None

    def __post_init__(self):
        if not 0.0 < self.probability < 1.0:
            raise ValueError(f"--mask-prob must lie between 0 and 1, not {self.probability}.")
        for flag, share in (("--leave-unmasked-prob", self.leave_unmasked), ("--random-token-prob", self.random)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{flag} must lie in [0, 1], not {share}.")
        if self.leave_unmasked + self.random > 1.0:
            raise ValueError(
                f"--leave-unmasked-prob {self.leave_unmasked} and --random-token-prob {self.random} add up to more "
                "than 1: they are shares of the selected tokens."
            )

    @classmethod
    def for_dictionary(
        cls, dictionary: Dictionary, surface: Callable[[str], str] | None = None, **shares: float
    ) -> "Masking":
        """Masking over a dictionary to which ``<mask>`` has been added.

        Args:
            dictionary: with ``<mask>``.
            surface: the text of a symbol (`Vocabulary.surface`), to select whole words: pieces from one that begins
                with a space to the next, and spans in text without word spaces. None selects tokens.
            shares: ``probability``, ``leave_unmasked``, ``random``.

        Raises:
            ValueError: a share is impossible, or no symbol begins a word.
        """
        try:
            starts = None if surface is None else word_starts(dictionary.symbols, surface)
        except ValueError as error:
            raise ValueError(f"--mask-whole-words: {error}") from None
        return cls(
            pad=dictionary.pad(),
            bos=dictionary.bos(),
            eos=dictionary.eos(),
            mask=dictionary.index(MASK),
            replacements=np.flatnonzero(are_text(dictionary.symbols)),
            vocabulary=len(dictionary),
            word_starts=starts,
            **shares,
        )

    def apply(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Masks one sequence.

        Args:
            tokens: ids, ``(length,)`` int64, left as it is.
            rng: source of all randomness.

        Returns:
            source ``(length,)``, and target ``(length,)`` with ``pad`` wherever nothing is to be predicted.
        """
        maskable = self._maskable(tokens)
        # unit[i]: which selectable unit (token, word or span) position i belongs to
        begins = maskable if self.word_starts is None else self._unit_begins(tokens, maskable, rng)
        unit = np.cumsum(begins) - 1
        units = int(unit[-1]) + 1 if len(unit) else 0
        # probabilistic rounding keeps the expected share exact on short sequences
        selected = min(int(self.probability * units + rng.random()), units)
        if self.probability * np.count_nonzero(maskable) >= 1.0:
            selected = max(
                selected, 1
            )  # a few long words may be due less than one target, and a block without is wasted
        fate = np.full(units + 1, 2.0)  # the extra entry belongs to special symbols before the first unit
        fate[rng.permutation(units)[:selected]] = rng.random(selected)
        fate = np.where(maskable, fate[unit], 2.0)
        chosen = fate < 1.0
        source = tokens.copy()
        source[chosen & (fate >= self.leave_unmasked + self.random)] = self.mask
        randomised = chosen & (fate >= self.leave_unmasked) & (fate < self.leave_unmasked + self.random)
        source[randomised] = self.replacements[rng.integers(len(self.replacements), size=int(randomised.sum()))]
        target = np.where(chosen, tokens, self.pad)
        return source, target

    def words(self, tokens: np.ndarray) -> tuple[int, int]:
        """Number of text tokens, and of the words that they make up (with `word_starts`)."""
        maskable = self._maskable(tokens)
        return int(np.count_nonzero(maskable)), int(np.count_nonzero(self._word_begins(tokens, maskable)))

    def _maskable(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens != self.bos) & (tokens != self.eos) & (tokens != self.pad)

    def _word_begins(self, tokens: np.ndarray, maskable: np.ndarray) -> np.ndarray:
        """Where a word begins, ``(length,)`` bool."""
        after_special = np.append(True, ~maskable[:-1])
        return maskable & (self.word_starts[tokens] | after_special)

    def _unit_begins(self, tokens: np.ndarray, maskable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Where a word, or a span inside a word of more than `LONGEST_WORD` pieces, begins, ``(length,)`` bool."""
        begins = self._word_begins(tokens, maskable)
        places = np.flatnonzero(maskable)
        word = np.cumsum(begins[places]) - 1
        too_long = np.bincount(word) > LONGEST_WORD
        if too_long.any():
            inside = places[too_long[word]]
            ends = np.cumsum(_SPAN_LENGTHS[rng.integers(len(_SPAN_LENGTHS), size=len(inside))])
            begins[inside[ends[ends < len(inside)]]] = True
        return begins
