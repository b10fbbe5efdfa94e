"""Writes a folder of transformers as a checkpoint of fairseq: model.pt, dict.txt and the tokenizer's files.

    fairseq-implicit import my-bert checkpoint-folder
    fairseq-implicit fill-masks checkpoint-folder "Return the <mask> of the file."

The folder is one that `fairseq-implicit export` wrote, or that transformers saved after training it further. The
number of updates stays with the weights, the optimiser's state does not: continue with --finetune-from-model. A model
without a head of masked tokens, such as a classifier, gets an untrained one, which every model of fairseq has.
"""

import argparse
import os
import sys
from pathlib import Path

from fairseq_implicit.evaluation.checkpoints import write
from fairseq_implicit.evaluation.folders import checkpoint_of, vocabulary_files
from fairseq_implicit.huggingface.export import read_folder
from fairseq_implicit.new_folder import new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="of the model, with config.json and model.safetensors")
    parser.add_argument("output", metavar="CHECKPOINT_FOLDER", help="folder to write; must not exist")


def run(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.exists():
        raise argparse.ArgumentError(None, f"{output} exists: remove it or choose another name")
    model = read_folder(arguments.folder)
    files = vocabulary_files(model)
    checkpoint = checkpoint_of(model, os.path.abspath(output))
    with new_folder(output) as part:
        for name, contents in files.items():
            (part / name).write_bytes(contents)
        write(checkpoint, str(part / "model.pt"))
    sys.stdout.write(f"wrote {output / 'model.pt'}: {model.config.model_type}\n")
    if model.untrained:
        sys.stdout.write("the folder has no head of masked tokens: that of model.pt is untrained, it fills no masks\n")
