"""Turns a checkpoint into one of this package, or of another family of it; a folder of transformers' too, and back.

    fairseq-implicit convert roberta.base/model.pt roberta.ode/model.pt
    fairseq-implicit convert ode/checkpoint_best.pt deq.pt --data DATA
    fairseq-implicit convert bert-base-uncased bert.ode
    fairseq-implicit convert bert.ode/model.pt bert --to bert
    fairseq-implicit convert bert.ode/model.pt deq.pt --tie --prelude 1 --coda 1

What it becomes follows from what it holds: fairseq's RoBERTa becomes an ode_bert, a weight-tied ode_bert (Euler) a
deq_bert, and a deq_bert without injection a weight-tied ode_bert. With --data the losses of the last two are printed
before and after, and that of the deq_bert of the two at its equilibrium.

--tie puts the mean of an ode_bert's blocks in their place: as the cell of a deq_bert that is applied as often, the
first and last blocks kept as its prelude and coda, or with --to ode_bert as a weight-tied stack of the same scheme.
--gain makes it a cell with an equilibrium, into which its input is injected. The result is to be trained further, with
--finetune-from-model and the flags that `fairseq-implicit checkpoint-flags` reads from it; --data prints its loss.

A folder of transformers' BERT, RoBERTa, ELECTRA, ALBERT or DeBERTa v2 and v3 (config.json, model.safetensors,
tokenizer.json), with the head of masked LM or of sentence classes, becomes a folder with model.pt, dict.txt and the
same tokenizer: the symbols change their order, nothing else, and --to brings them back to the last bit. So does
ModernBERT, with the head of masked LM. Published folders that hold no tokenizer.json, such as those of DeBERTa v3 with
spm.model alone, get one from transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).

The hub interface and fine-tuning also need the dictionary and the tokenizer beside OUTPUT: dict.txt and, for the public
weights of RoBERTa, GPT-2's encoder.json and vocab.bpe (for a sentencepiece vocabulary sentencepiece.bpe.model).
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fairseq.models import MODEL_REGISTRY

from fairseq_implicit.commands import transformers_folder
from fairseq_implicit.commands.values import positive
from fairseq_implicit.conversion import averaged
from fairseq_implicit.conversion.roberta import checkpoint_from_fairseq
from fairseq_implicit.conversion.tied import deq_from_tied, tied_from_deq
from fairseq_implicit.evaluation.checkpoints import model_name, stored, write
from fairseq_implicit.evaluation.masked_lm import Blocks, evaluate
from fairseq_implicit.models.presets import family_of

#: Of what a checkpoint holds.
Conversion = Callable[[dict[str, Any]], dict[str, Any]]
#: By the model's family; every other model is taken for a RoBERTa, which says so if it is none.
CONVERSIONS: dict[str, Conversion] = {"ode_bert": deq_from_tied, "deq_bert": tied_from_deq}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="checkpoint of a RoBERTa, a weight-tied ode_bert or a deq_bert; or a folder of transformers'",
    )
    parser.add_argument("output", metavar="OUTPUT", help="file, or for transformers folder, to write; must not exist")
    parser.add_argument(
        "--to",
        choices=[*sorted(transformers_folder.MODELS), *averaged.FAMILIES],
        help="write a folder of transformers' from an ode_bert with Euler steps: post-norm, for ModernBERT pre-norm; "
        "with --tie the family (default deq_bert)",
    )
    parser.add_argument("--tie", action="store_true", help="the mean of an ode_bert's blocks in place of all of them")
    parser.add_argument("--prelude", type=int, default=0, metavar="N", help="with --tie: keep the first N blocks")
    parser.add_argument("--coda", type=int, default=0, metavar="N", help="with --tie: keep the last N blocks")
    parser.add_argument(
        "--gain", type=float, default=0.0, help="with --tie: inject the cell's input at each evaluation, this strongly"
    )
    parser.add_argument("--data", metavar="DATA", help="data folder, as for fairseq-validate, to compare the losses on")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=positive, default=32)


def convert(path: str, conversion: Conversion | None = None) -> tuple[Any, dict[str, Any]]:
    """The settings of the model that is read, and the checkpoint of the other model.

    Args:
        path: of the checkpoint.
        conversion: of checkpoints; by default the one for its family.

    Raises:
        OSError, ValueError: the checkpoint cannot be read or has no counterpart.
    """
    checkpoint = stored(path)
    family = family_of(model_name(checkpoint))
    if family in CONVERSIONS:  # a preset is one of its family
        checkpoint["cfg"]["model"]["_name"] = family
    try:
        other = (conversion or CONVERSIONS.get(family, checkpoint_from_fairseq))(checkpoint)
        _check(other["cfg"]["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint["cfg"]["model"], other


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that the model's family does: what is written must open."""
    MODEL_REGISTRY[settings["_name"]].configuration(settings).check()


def compare(options: argparse.Namespace, blocks: Blocks, before: float, read: Any, written: Any) -> None:
    """Prints the losses of both models, and that of a deq_bert that takes steps at its equilibrium."""
    after = evaluate(options.output, blocks).loss
    sys.stdout.write(f"loss {before:.4f} -> {after:.4f} ({after - before:+.4f} nats per masked token)\n")
    deq, settings = (options.output, written) if written["_name"].startswith("deq_bert") else (options.input, read)
    if not settings["_name"].startswith("deq_bert") or options.gain:
        return
    if settings.get("deq_no_final_norm"):
        sys.stdout.write("a pre-norm cell without a norm inside the map has no equilibrium to compare with\n")
        return
    solved = evaluate(deq, blocks, deq_gradient="ift", deq_gradient_damping=None).loss
    sys.stdout.write(f"at the equilibrium of the same cell {solved:.4f} ({solved - before:+.4f})\n")


def refused(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments."""
    if not options.tie and (options.prelude or options.coda or options.gain):
        return "--prelude, --coda and --gain belong to --tie"
    if options.to and options.tie != (options.to in averaged.FAMILIES):
        tied = f"--tie makes {' or '.join(averaged.FAMILIES)}, not {options.to}"
        return tied if options.tie else f"--to {options.to} needs --tie: without it the family follows from INPUT"
    if os.path.isdir(options.input):
        if options.to or options.tie:
            flag = "--tie" if options.tie else f"--to {options.to}"
            return f"{flag} needs a checkpoint, and {options.input} is a folder: convert that first"
        if options.data:
            return "--data compares losses of checkpoints, not of folders of transformers'"
    elif not os.path.isfile(options.input):
        return f"there is no checkpoint {options.input}"
    elif options.data and options.to in transformers_folder.MODELS:
        return "--data compares losses of checkpoints, not of folders of transformers'"
    if os.path.lexists(options.output):
        return f"{options.output} exists: remove it or choose another name"
    return None


def run(options: argparse.Namespace) -> None:
    if (sentence := refused(options)) is not None:
        raise argparse.ArgumentError(None, sentence)
    if os.path.isdir(options.input):
        written = transformers_folder.from_folder(Path(options.input), Path(options.output))
        sys.stdout.write(f"wrote {options.output}: {written['_name']}\n")
    elif options.to in transformers_folder.MODELS:
        written = transformers_folder.to_folder(Path(options.input), Path(options.output), options.to)
        sys.stdout.write(f"wrote {options.output}: {written['model_type']}\n")
    else:
        tie = partial(
            averaged.tied,
            family=options.to or averaged.FAMILIES[0],
            prelude=options.prelude,
            coda=options.coda,
            gain=options.gain,
        )
        read, other = convert(options.input, tie if options.tie else None)
        written, blocks = other["cfg"]["model"], Blocks(options.data, options.subset, options.batch_size)
        # What is wrong with the data shows before anything is written.
        before = evaluate(options.input, blocks).loss if options.data else math.nan
        write(other, options.output)
        sys.stdout.write(f"wrote {options.output}: {written['_name']}\n")
        if options.data:
            compare(options, blocks, before, read, written)
