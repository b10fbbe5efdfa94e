"""Turns a checkpoint into one of this package, or of another family of it; a folder of transformers' too, and back.

    fairseq-implicit convert roberta.base/model.pt roberta.ode/model.pt
    fairseq-implicit convert ode/checkpoint_best.pt deq.pt --data DATA
    fairseq-implicit convert bert-base-uncased bert.ode
    fairseq-implicit convert bert.ode/model.pt bert --to bert

What it becomes follows from what it holds: fairseq's RoBERTa becomes an ode_bert, a weight-tied ode_bert (Euler) a
deq_bert, and a deq_bert without injection a weight-tied ode_bert. With --data the losses of the last two are printed
before and after, and that of the deq_bert of the two at its equilibrium.

A folder of transformers' BERT, RoBERTa, ELECTRA, ALBERT or DeBERTa v2 and v3 (config.json, model.safetensors,
tokenizer.json), with the head of masked LM or of sentence classes, becomes a folder with model.pt, dict.txt and the
same tokenizer: the symbols change their order, nothing else, and --to brings them back to the last bit. So does
ModernBERT, with the head of masked LM.

The hub interface and fine-tuning also need the dictionary and the tokenizer beside OUTPUT: dict.txt and, for the public
weights of RoBERTa, GPT-2's encoder.json and vocab.bpe (for a sentencepiece vocabulary sentencepiece.bpe.model).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fairseq_implicit.commands import transformers_folder
from fairseq_implicit.commands.values import positive
from fairseq_implicit.conversion.roberta import checkpoint_from_fairseq
from fairseq_implicit.conversion.tied import deq_from_tied, tied_from_deq
from fairseq_implicit.evaluation.checkpoints import model_name, stored, write
from fairseq_implicit.evaluation.masked_lm import Blocks, evaluate
from fairseq_implicit.models.presets import family_of

#: By the model's family; every other model is taken for a RoBERTa, which says so if it is none.
CONVERSIONS = {"ode_bert": deq_from_tied, "deq_bert": tied_from_deq}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="checkpoint of a RoBERTa, a weight-tied ode_bert or a deq_bert; or a folder of transformers'",
    )
    parser.add_argument("output", metavar="OUTPUT", help="file, or for transformers folder, to write; must not exist")
    parser.add_argument(
        "--to",
        choices=sorted(transformers_folder.MODELS),
        help="write a folder of transformers' from an ode_bert with Euler steps: post-norm, for ModernBERT pre-norm",
    )
    parser.add_argument("--data", metavar="DATA", help="data folder, as for fairseq-validate, to compare the losses on")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=positive, default=32)


def convert(path: str, output: str) -> tuple[Any, Any]:
    """Writes the other model; returns the settings of the model that was read and of the one that was written.

    Raises:
        OSError, ValueError: the checkpoint cannot be read or has no counterpart, or the file cannot be written.
    """
    checkpoint = stored(path)
    family = family_of(model_name(checkpoint))
    if family in CONVERSIONS:  # a preset is one of its family
        checkpoint["cfg"]["model"]["_name"] = family
    try:
        converted = CONVERSIONS.get(family, checkpoint_from_fairseq)(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write(converted, output)
    return checkpoint["cfg"]["model"], converted["cfg"]["model"]


def compare(options: argparse.Namespace, read: Any, written: Any) -> None:
    """Prints the losses of both models, and that of the deq_bert of the two at its equilibrium."""
    blocks = Blocks(options.data, options.subset, options.batch_size)
    before, after = evaluate(options.input, blocks).loss, evaluate(options.output, blocks).loss
    sys.stdout.write(f"loss {before:.4f} -> {after:.4f} ({after - before:+.4f} nats per masked token)\n")
    to_deq = written["_name"].startswith("deq_bert")
    if (written if to_deq else read).get("deq_no_final_norm"):
        sys.stdout.write("a pre-norm cell without a norm inside the map has no equilibrium to compare with\n")
        return
    deq = options.output if to_deq else options.input
    solved = evaluate(deq, blocks, deq_gradient="ift", deq_gradient_damping=None).loss
    sys.stdout.write(f"at the equilibrium of the same cell {solved:.4f} ({solved - before:+.4f})\n")


def run(options: argparse.Namespace) -> None:
    from_transformers = os.path.isdir(options.input)
    if from_transformers and options.to:
        raise argparse.ArgumentError(None, f"--to {options.to} needs a checkpoint, and {options.input} is a folder")
    if options.data and (from_transformers or options.to):
        raise argparse.ArgumentError(None, "--data compares losses of checkpoints, not of folders of transformers'")
    if not from_transformers and not os.path.isfile(options.input):
        raise argparse.ArgumentError(None, f"there is no checkpoint {options.input}")
    if os.path.exists(options.output):
        raise argparse.ArgumentError(None, f"{options.output} exists: remove it or choose another name")
    if from_transformers:
        written = transformers_folder.from_folder(Path(options.input), Path(options.output))
        sys.stdout.write(f"wrote {options.output}: {written['_name']}\n")
        return
    if options.to:
        written = transformers_folder.to_folder(Path(options.input), Path(options.output), options.to)
        sys.stdout.write(f"wrote {options.output}: {written['model_type']}\n")
        return
    read, written = convert(options.input, options.output)
    sys.stdout.write(f"wrote {options.output}: {written['_name']}\n")
    if options.data:
        compare(options, read, written)
