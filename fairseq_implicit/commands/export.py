"""Writes a checkpoint as a folder that transformers opens: weights, configuration, tokenizer and model card.

    fairseq-implicit export checkpoints/checkpoint_best.pt my-bert
    AutoModelForMaskedLM.from_pretrained("my-bert", trust_remote_code=True)

The folder holds the code of the model, so that it opens where neither this package nor fairseq is installed. With
--no-bundle it does not, and opens after `import fairseq_implicit.huggingface`. `fairseq-implicit import` is the way
back.
"""

import argparse
import os
import sys

from fairseq_implicit.evaluation.folders import trained_model
from fairseq_implicit.huggingface.export import write_folder
from fairseq_implicit.models.hub_interface import find_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file, or a folder of which checkpoint_best.pt, model.pt or checkpoint_last.pt is taken",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--no-bundle", action="store_true", help="leave the model's code out")
    parser.add_argument(
        "--data", metavar="DATA", help="folder of dict.txt and the tokenizer (default: the checkpoint's, then its data)"
    )
    parser.add_argument("--head", help="the classification head to export, where the checkpoint has several")


def run(arguments: argparse.Namespace) -> None:
    if os.path.exists(arguments.folder):
        raise argparse.ArgumentError(None, f"{arguments.folder} exists: remove it or choose another name")
    path = arguments.checkpoint
    if not os.path.isfile(path):
        path = find_checkpoint(path)
    model = trained_model(path, arguments.data, arguments.head)
    write_folder(model, arguments.folder, bundled=not arguments.no_bundle)
    (architecture,) = model.config.architectures
    sys.stdout.write(f"wrote {arguments.folder}: {architecture}\n")
    if model.left_out:
        sys.stdout.write(f"left out: the classification heads {', '.join(model.left_out)}; --head chooses another\n")
