"""What is to be predicted from a block of text. numpy alone: no torch, no fairseq.

A new objective is one file beside `masked_tokens.py` and one entry in `OBJECTIVES`.
"""

from fairseq_implicit.data.objectives.masked_spans import MaskedSpans
from fairseq_implicit.data.objectives.masked_tokens import MaskedTokens
from fairseq_implicit.data.objectives.masked_words import MaskedWords
from fairseq_implicit.data.objectives.objective import Objective

#: By the name that ``--objective`` has for them.
OBJECTIVES: dict[str, type[Objective]] = {
    "masked-tokens": MaskedTokens,
    "masked-words": MaskedWords,
    "masked-spans": MaskedSpans,
}
