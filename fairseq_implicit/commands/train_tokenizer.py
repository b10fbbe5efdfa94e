"""Trains a sentencepiece model on text, ready for `fairseq-preprocess --srcdict`, and writes dict.txt beside it.

    fairseq-implicit train-tokenizer corpus/train.txt --out tokenizer/sentencepiece.bpe.model --dictionary-size 2048
    fairseq-implicit train-tokenizer prepared --preset bert-32k --out tokenizer/sentencepiece.bpe.model

The size is that of the model's embedding: pieces, fairseq's own four symbols and <mask>. Multiples of 64 suit the
matrix units of accelerators; other sizes are filled up to the next in dict.txt, with symbols that no text has. Scripts
with thousands of characters need a large dictionary, or a --character-coverage below 0.9995 (0.98 is the least).
"""

import argparse
import sys
from pathlib import Path

from fairseq_implicit.commands.values import byte_size
from fairseq_implicit.corpora.tokenizer_training import PRESETS, train_tokenizer

DEFAULT_SIZE = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text", nargs="+", type=Path, metavar="TEXT", help="text, one paragraph per line, or a prepared corpus folder"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the model to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="published size and options")
    parser.add_argument(
        "--dictionary-size",
        "--dictionary",
        type=int,
        help=f"rows of the embedding (default: the preset's, else {DEFAULT_SIZE})",
    )
    parser.add_argument("--kind", choices=("unigram", "bpe"), help="sentencepiece's model type (default: unigram)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help="share of the text's characters that get pieces of their own, the rest is <unk>: 0.98 to 1 (default: the "
        "preset's, else 0.9995)",
    )
    parser.add_argument(
        "--sample-size", type=byte_size, default=500 * 10**6, help="text to train on, drawn at random (500MB)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--threads", type=int, default=4, help="part of the result; keep it for equal bytes")


def run(arguments: argparse.Namespace) -> None:
    options = dict(PRESETS[arguments.preset].options) if arguments.preset else {"model_type": "unigram"}
    if arguments.kind:
        options["model_type"] = arguments.kind
    if arguments.character_coverage is not None:
        if not 0.98 <= arguments.character_coverage <= 1.0:
            raise argparse.ArgumentError(
                None, f"--character-coverage {arguments.character_coverage} must lie between 0.98 and 1"
            )
        options["character_coverage"] = arguments.character_coverage
    size = arguments.dictionary_size or (
        PRESETS[arguments.preset].dictionary_size if arguments.preset else DEFAULT_SIZE
    )
    train_tokenizer(
        arguments.text, arguments.out, size, options, arguments.sample_size, arguments.seed, arguments.threads
    )
    rows = -(-size // 64) * 64
    filled = f", filled up to {rows:,} (a multiple of 64)" if rows != size else ""
    sys.stdout.write(
        f"  {arguments.out}: {size:,} symbols in the dictionary{filled}, {arguments.out.parent / 'dict.txt'}\n"
    )
