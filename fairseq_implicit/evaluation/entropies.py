"""Entropy of single tokens in a data folder, in nats per token, without fairseq and torch."""

import os
from typing import NamedTuple

import numpy as np

from fairseq_implicit.text.token_files import MappedTokens
from fairseq_implicit.text.vocabulary import EOS, SPECIAL_SYMBOLS

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
    with open(dictionary_file, encoding="utf-8") as rows:
        vocabulary = len(SPECIAL_SYMBOLS) + sum(1 for _ in rows)
    splits = [MappedTokens(os.path.join(folder, split)) for split in ("train", "valid")]
    train, valid = (tokens.slice(0, tokens.token_count) for tokens in splits)
    return entropies(train, valid, vocabulary, EOS)
