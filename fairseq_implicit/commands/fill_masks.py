"""Loads a trained checkpoint through the hub interface and fills masks.

    fairseq-implicit fill-masks FOLDER "Return the <mask> of the file."
    fairseq-implicit fill-masks FOLDER --text corpus/test.txt --count 5

In each of a few sentences of --text one word is hidden; it is printed beside the candidates, and in [brackets] among
them where the model has found it.
"""

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from fairseq_implicit.models.bert import ImplicitBertModel

#: Letters, spaces and what joins words, in any alphabet; a full stop.
PLAIN = re.compile(r"(?:[^\W\d_]|[ ,;'’-])+[.]")


class Question(NamedTuple):
    sentence: str  # with one <mask>
    answer: str | None  # the hidden word, where it is known


def is_one_piece(bert, word: str) -> bool:
    """Whether a word inside a sentence is a single piece of a model's vocabulary."""
    ids = bert.ids(f"a {word}")
    return len(ids) == len(bert.ids("a")) + 1 and ids[-1] != bert.dictionary.unk()


def is_plain_word(word: str) -> bool:
    """Whether a word is worth guessing: four or more letters, not a name."""
    return len(word) >= 4 and word.isalpha() and word.islower()


def questions(path: str, is_one_piece) -> Iterator[Question]:
    """Sentences of 6 to 16 words with one plain word hidden that is a single piece of the vocabulary. The order is that
    of a hash, so that neighbours in the text do not follow each other, and is always the same."""
    found = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if not 6 <= len(words) <= 16 or not line[0].isupper() or not PLAIN.fullmatch(line.strip()):
                continue
            digest = hashlib.sha256(line.encode("utf-8")).digest()
            inner = [i for i in range(1, len(words) - 1) if is_plain_word(words[i]) and is_one_piece(words[i])]
            if inner:
                found.append((digest, words, inner[digest[0] % len(inner)]))
    for _, words, hidden in sorted(found):
        yield Question(" ".join(words[:hidden] + ["<mask>"] + words[hidden + 1 :]), words[hidden])


def report(question: Question, filled) -> list[str]:
    """Lines for the terminal: the sentence, then the candidates with their probabilities."""
    lines = [f"  {question.sentence}" + (f"   (hidden: {question.answer})" if question.answer else "")]
    candidates = []
    for one in filled:
        word = one.token.strip() or repr(one.token)
        candidates.append(f"{f'[{word}]' if word == question.answer else word} {one.probability:.2f}")
    return lines + [f"      {', '.join(candidates)}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder of the checkpoint")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="with one <mask> each")
    parser.add_argument(
        "--checkpoint-file", help="default: the first there is of checkpoint_best.pt, model.pt, checkpoint_last.pt"
    )
    parser.add_argument("--text", metavar="FILE", help="take further sentences from here")
    parser.add_argument("--count", type=int, default=6, help="sentences taken from --text (default: 6)")
    parser.add_argument("--candidates", type=int, default=5, help="printed for each mask (default: 5)")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.sentences and not arguments.text:
        raise argparse.ArgumentError(None, "give sentences with a <mask>, or --text FILE to take them from")
    bert = ImplicitBertModel.from_pretrained(arguments.folder, arguments.checkpoint_file)
    asked = [Question(sentence, None) for sentence in arguments.sentences]
    if arguments.text:
        found = questions(arguments.text, lambda word: is_one_piece(bert, word))
        fitting = (question for question in found if len(bert.masked_ids(question.sentence)) - 2 <= bert.room())
        asked += itertools.islice(fitting, arguments.count)
    for question in asked:
        filled = bert.fill_mask(question.sentence, topk=arguments.candidates)
        sys.stdout.write("\n".join(report(question, filled)) + "\n")
    if not asked:
        sys.stdout.write(
            f"  {arguments.text} holds no plain sentence of 6 to 16 words that fits into the model's "
            f"{bert.model.max_positions()} positions: give sentences with a <mask> instead\n"
        )
