"""Binarises the shards of prepare-corpus (or any text files) for fairseq-train.

    fairseq-implicit binarise prepared --tokenizer tokenizer/spm.model --output data-bin --workers 8 --fast
    fairseq-train "$(cat data-bin/data-bin.txt)" ...

Writes folders shard0 to shardN, the held-out splits in shard0. The same command again goes on after an interruption.
"""

import argparse
import os
import sys
from pathlib import Path

from fairseq_implicit.commands.values import part_from_environment, part_of
from fairseq_implicit.corpora.binarisation import Binarisation, shards_of_files, shards_of_folder
from fairseq_implicit.corpora.problems import CorpusError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", nargs="?", type=Path, help="folder that prepare-corpus has finished")
    parser.add_argument(
        "--train", nargs="+", type=Path, default=[], help="text files instead of a folder, one per shard"
    )
    parser.add_argument("--valid", type=Path, help="text file of the valid split")
    parser.add_argument("--test", type=Path, help="text file of the test split")
    parser.add_argument("--tokenizer", required=True, type=Path, help="sentencepiece model, or tokenizer.json")
    parser.add_argument("--output", required=True, type=Path, help="parent of the data-bin folders")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--fast", action="store_true", help="encode without fairseq; the files are the same")
    parser.add_argument(
        "--part", type=part_of, help="binarise only part i/n of the shards (default: from SLURM or torchrun variables)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs one command; returns the exit status.

    Raises:
        CorpusError: with the sentence for the user.
    """
    if arguments.workers < 1:
        raise CorpusError(f"--workers {arguments.workers} must be at least 1.")
    if (arguments.corpus is None) == (not arguments.train):
        raise CorpusError("Give either the folder of a prepared corpus or text files with --train.")
    if arguments.corpus is not None:
        if arguments.valid or arguments.test:
            raise CorpusError("--valid and --test belong to --train; a prepared corpus brings its own splits.")
        shards = shards_of_folder(arguments.corpus)
    else:
        held_out = {split: path for split in ("valid", "test") if (path := getattr(arguments, split)) is not None}
        shards = shards_of_files(arguments.train, held_out)
    job = Binarisation(shards, arguments.tokenizer, arguments.output, arguments.workers)
    part, parts = arguments.part or part_from_environment(os.environ)
    rows = []
    for record in job.run(arguments.fast, part, parts):
        rows += [(split, counts["lines"], counts["tokens"]) for split, counts in record["counts"].items()]
    for split in dict.fromkeys(split for split, *_ in rows):
        lines = sum(count for name, count, _ in rows if name == split)
        tokens = sum(count for name, _, count in rows if name == split)
        sys.stdout.write(f"{split}: {lines:,} lines, {tokens:,} tokens (one end mark per line included)\n")
    sys.stdout.write(f"{job.data_argument()}\n")
    return 0
