"""The seam between a block of text and a model: an objective makes of the one what the other sees and is to predict."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One sequence for a model.

    Attributes:
        source: ids that the model sees, ``(length,)`` int64.
        target: ids that it is to predict there, ``(length,)`` int64, ``<pad>`` wherever nothing is.
        segments: the part of the sequence (sentence A or B) that each token belongs to, ``(length,)`` int64; None where
            it has no parts.
    """

    source: np.ndarray
    target: np.ndarray
    segments: np.ndarray | None = None


@dataclass(frozen=True)
class MaskRates:
    """How much is masked, and how.

    Attributes:
        probability: share of the tokens (words, spans) that are selected.
        leave_unmasked: share of the selected that stay as they are.
        random: share of the selected that become a random token; the rest become ``<mask>``.

    Raises:
        ValueError: a share is impossible; the sentence names its flag.
    """

    probability: float = 0.15
    leave_unmasked: float = 0.1
    random: float = 0.1

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


class Objective(ABC):
    """What is to be predicted. It is sent to worker processes, so it keeps numbers and arrays and no function.

    Args:
        symbols: the rows of the dictionary, ``<mask>`` included.
        surface: the text that a symbol stands for (`Vocabulary.surface`); a tokenizer may be opened when it is called.
        rates: of masks.

    Raises:
        ValueError: the dictionary does not allow it; the task puts its flag before the sentence.
    """

    def __init__(self, symbols: Sequence[str], surface: Callable[[str], str], rates: MaskRates):
        super().__init__()

    @abstractmethod
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Sample:
        """Makes the sample of one block.

        Args:
            tokens: ids with ``<s>``, ``(length,)`` int64, left as they are.
            rng: source of all randomness.
        """

    def remarks(self, blocks: Iterable[np.ndarray]) -> list[str]:
        """Sentences for a user about this objective on a text; by default none, and nothing is read.

        Args:
            blocks: some of the text's, as for a call.
        """
        return []
