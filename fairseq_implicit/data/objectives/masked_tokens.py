"""Single tokens are selected."""

import numpy as np

from fairseq_implicit.data.objectives.masked import Masked


class MaskedTokens(Masked):
    """Masked tokens, as BERT's and RoBERTa's."""

    def unit_begins(self, tokens: np.ndarray, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return text
