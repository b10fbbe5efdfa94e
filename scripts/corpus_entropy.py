"""What a model must beat: the entropy of single tokens in a data folder of fairseq-preprocess, in nats per token.

    python scripts/corpus_entropy.py DATA [--loss-bits VALIDATION_LOSS_AS_FAIRSEQ_LOGS_IT]

* unigram: cross entropy of the validation tokens under the frequencies of the training tokens. A masked-language model
  that ignores the context reaches exactly this loss, and training sits on it for a while before it learns to read.
* bigram: the same when the token before is known (interpolated Kneser-Ney, one discount).

`</s>` is left out, as it is never masked. fairseq logs losses in bits (base 2); one bit is ln 2 = 0.693 nats.
"""

import argparse
import logging
import math
import os
import sys
from typing import NamedTuple

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq.data import Dictionary  # noqa: E402

from fairseq_implicit.text.token_files import MappedTokens  # noqa: E402

DISCOUNT = 0.75


class Entropies(NamedTuple):
    """Nats per token."""

    unigram: float
    bigram: float


def unigram_probabilities(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Frequencies with one count added to each type, `(vocabulary,)`."""
    counts = np.bincount(tokens, minlength=vocabulary) + 1.0
    return counts / counts.sum()


def entropies(train: np.ndarray, valid: np.ndarray, vocabulary: int, eos: int) -> Entropies:
    """Cross entropies of `valid` under the statistics of `train`; both are flat arrays of ids, `eos` ends each line.

    Raises ValueError when `valid` holds nothing but `eos`.
    """
    if not (valid != eos).any():
        raise ValueError("the validation text is empty")
    unigram = unigram_probabilities(train[train != eos], vocabulary)
    target = valid != eos
    nats = -np.log(unigram[valid[target]]).mean()

    # Ney et al. 1994: absolute discounting, the rest spread by the number of different tokens that a type follows.
    follows = train[1:] != eos
    pairs = train[:-1][follows].astype(np.int64) * vocabulary + train[1:][follows]
    pairs, counts = np.unique(pairs, return_counts=True)
    before, after = pairs // vocabulary, pairs % vocabulary
    total = np.bincount(before, weights=counts, minlength=vocabulary)
    different = np.bincount(before, minlength=vocabulary)
    continuation = np.bincount(after, minlength=vocabulary) + 1.0
    continuation[eos] = 0.0
    continuation /= continuation.sum()
    context, token = valid[:-1][target[1:]].astype(np.int64), valid[1:][target[1:]]
    wanted = context * vocabulary + token
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place] - DISCOUNT, 0.0)
    known = total[context] > 0
    share = np.where(known, DISCOUNT * different[context] / np.maximum(total[context], 1), 1.0)
    probability = seen / np.maximum(total[context], 1) + share * continuation[token]
    return Entropies(float(nats), float(-np.log(probability).mean()))


def folder_entropies(folder: str) -> Entropies:
    """The entropies of a data folder. Raises FileNotFoundError when a file is missing."""
    dictionary_file = os.path.join(folder, "dict.txt")
    if not os.path.isfile(dictionary_file):
        raise FileNotFoundError(f"{dictionary_file} does not exist: name a folder of fairseq-preprocess")
    dictionary = Dictionary.load(dictionary_file)
    splits = [MappedTokens(os.path.join(folder, split)) for split in ("train", "valid")]
    train, valid = (tokens.slice(0, tokens.token_count) for tokens in splits)
    return entropies(train, valid, len(dictionary), dictionary.eos())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of fairseq-preprocess")
    parser.add_argument("--loss-bits", type=float, metavar="LOSS", help="validation loss in bits, to compare with")
    arguments = parser.parse_args()
    try:
        reference = folder_entropies(arguments.data)
    except (OSError, ValueError) as error:
        sys.exit(f"corpus_entropy: {error}")
    if arguments.loss_bits is not None:
        loss = arguments.loss_bits * math.log(2)
        print(f"  validation loss   {loss:6.3f} nats per masked token (fairseq logs {arguments.loss_bits:.3f} bits)")
    print(f"  unigram entropy   {reference.unigram:6.3f} nats per token: what a model without context reaches")
    print(f"  bigram entropy    {reference.bigram:6.3f} nats per token: with the token before known")
    if arguments.loss_bits is not None:
        difference = reference.unigram - loss
        print(f"  the model is {abs(difference):.3f} nats {'below' if difference > 0 else 'ABOVE'} the unigram entropy")


if __name__ == "__main__":
    main()
