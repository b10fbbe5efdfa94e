"""Trains a sentencepiece model on a text file, ready for `fairseq-preprocess --srcdict`.

    python scripts/train_tokenizer.py corpus/train.txt --out tokenizer/sentencepiece.bpe.model --dictionary-size 2048

The size is that of the model's embedding: pieces, fairseq's own four symbols and <mask>. Multiples of 64 suit the
matrix units of accelerators.
"""

import argparse
import io
import os
import sys
from typing import Iterator

import sentencepiece

# sentencepiece's <unk>, <s>, </s> fall away in fairseq's dictionary; <s>, <pad>, </s>, <unk> and <mask> are added.
ADDED_BY_FAIRSEQ = 5
DROPPED_BY_FAIRSEQ = 3
LARGEST_TEXT = 10_000_000  # paragraphs drawn for training the model; more change nothing but time and memory


def paragraphs(text: str) -> Iterator[str]:
    with open(text, encoding="utf-8") as lines:
        for line in lines:
            if not line.isspace():
                yield line.rstrip("\n")


def train_tokenizer(text: str, out: str, dictionary_size: int, kind: str = "unigram") -> None:
    """Writes the model to `out`. The same text gives the same bytes, wherever the files lie.

    Raises FileNotFoundError when `text` is missing and ValueError when it is too small for so many pieces.
    """
    if not os.path.isfile(text):
        raise FileNotFoundError(f"{text}: no such text file")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=paragraphs(text),  # given file names, sentencepiece would store them in the model
            model_writer=model,
            model_type=kind,
            vocab_size=dictionary_size - ADDED_BY_FAIRSEQ + DROPPED_BY_FAIRSEQ,
            character_coverage=0.9995,
            input_sentence_size=LARGEST_TEXT,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 20,  # bytes; longer lines would be left out of training
            num_threads=4,  # a constant: the sums of the EM steps depend on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or "it holds no text"  # what follows the C++ condition
        raise ValueError(
            f"{text} gives no dictionary of {dictionary_size} symbols ({reason}): "
            "give more text or another --dictionary-size"
        ) from None
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(out + ".partial", "wb") as file:
        file.write(model.getvalue())
    os.replace(out + ".partial", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT", help="one paragraph per line")
    parser.add_argument("--out", required=True, metavar="FILE", help="the model to write")
    parser.add_argument("--dictionary-size", type=int, default=2048, help="rows of the embedding (default: 2048)")
    parser.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="sentencepiece's model type")
    arguments = parser.parse_args()
    try:
        train_tokenizer(arguments.text, arguments.out, arguments.dictionary_size, arguments.kind)
    except (OSError, ValueError) as error:
        sys.exit(f"train_tokenizer: {error}")
    print(f"  {arguments.out}: {arguments.dictionary_size} symbols in the dictionary")


if __name__ == "__main__":
    main()
