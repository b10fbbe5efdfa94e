"""Compares the ids of a vocabulary with those of its fast tokenizer, line by line.

    python -m tests.huggingface.compare_tokenizers MODEL TEXT ... [--lines 10000]

MODEL is a sentencepiece model, TEXT are files of text. Each unequal line is shown where it begins to differ, with its
reason: ``tie`` where both segmentations of the same normalised text have the same score, ``normalisation`` where the
normalised texts differ, ``other`` for what nothing explains.
"""

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from fairseq_implicit.huggingface.tokenization import fast_tokenizer
from fairseq_implicit.text.sentence_pieces import MODEL_FILE, WORD_START, SentencePieceVocabulary


class Comparison:
    """A vocabulary and its fast tokenizer."""

    def __init__(self, vocabulary):
        self.vocabulary, self.tokenizer = vocabulary, fast_tokenizer(vocabulary)
        self.tokenizer.split_special_tokens = True
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(vocabulary.contents[MODEL_FILE])
        self.unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
        self.scores = {piece.piece: piece.score for piece in proto.pieces}

    def ids(self, line):
        """Ids of both, ``(length,)`` each."""
        ours = self.vocabulary.encode(line).tolist()
        return ours, self.tokenizer(line, add_special_tokens=False)["input_ids"]

    def reason(self, line, ours, theirs):
        """Why they are not equal."""
        normalised = self.tokenizer.backend_tokenizer.normalizer.normalize_str(line).strip().replace(" ", WORD_START)
        expected = self.vocabulary._processor.normalize(line).strip(WORD_START)
        if expected != normalised.strip(WORD_START):
            return "normalisation"
        sums = [sum(self.scores.get(self.vocabulary.symbols[number], 0.0) for number in ids) for ids in (ours, theirs)]
        texts = ["".join(self.vocabulary.symbols[number] for number in ids) for ids in (ours, theirs)]
        # What float32 can tell apart in a sum of that size.
        near = abs(sums[0] - sums[1]) <= 4 * len(ours) * np.spacing(np.float32(abs(sums[0])))
        return "tie" if self.unigram and texts[0] == texts[1] and near else "other"

    def of(self, lines):
        """Number of tokens, and the unequal lines with reason and ids of both."""
        tokens, unequal = 0, []
        for line in lines:
            ours, theirs = self.ids(line)
            tokens += len(ours)
            if ours != theirs:
                unequal.append((line, self.reason(line, ours, theirs), ours, theirs))
        return tokens, unequal


def _from_first_difference(symbols, ours, theirs):
    first = next(
        (n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
        min(len(ours), len(theirs)),
    )
    shown = [[symbols[number] for number in ids[max(0, first - 1) : first + 7]] for ids in (ours, theirs)]
    return f"{' '.join(shown[0])!a} | {' '.join(shown[1])!a}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--shown", type=int, default=10)
    options = parser.parse_args()
    comparison = Comparison(SentencePieceVocabulary.open(options.model))
    for path in options.text:
        with open(path, encoding="utf-8", newline="\n") as file:
            lines = [line.rstrip("\n") for line in itertools.islice(file, options.lines)]
        tokens, unequal = comparison.of(lines)
        reasons = dict(Counter(reason for _, reason, _, _ in unequal))
        sys.stdout.write(f"{path.name}: {len(lines):,} lines, {tokens:,} tokens, {len(unequal)} unequal {reasons}\n")
        for _, reason, ours, theirs in unequal[: options.shown]:
            difference = _from_first_difference(comparison.vocabulary.symbols, ours, theirs)
            sys.stdout.write(f"    {reason}: {difference}\n")


if __name__ == "__main__":
    main()
