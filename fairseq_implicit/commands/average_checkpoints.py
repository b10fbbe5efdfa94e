"""The mean of the weights of several checkpoints, which is often better than the last of them.

    fairseq-implicit average-checkpoints runs/checkpoints --last 5 --output runs/checkpoints/average.pt
    fairseq-implicit average-checkpoints seed1.pt seed2.pt --output mean.pt

A folder stands for the checkpoints of its last updates; fairseq-train keeps as many as --keep-interval-updates says.
The result is for fairseq-validate, --finetune-from-model and the hub: it holds no state of an optimiser.
"""

import argparse
import os
import pickle
import re
import sys
from typing import Any

import torch
from fairseq import checkpoint_utils

from fairseq_implicit.evaluation.checkpoints import write

#: The names that fairseq-train gives.
SAVED = re.compile(r"checkpoint(\d+|_\d+_\d+|_last|_best|\.best_.*)\.pt")

#: Under which a checkpoint says what dictionary it was trained with.
TASK = "ImplicitMaskedLMTask"


def opened(path: str) -> dict[str, Any]:
    """A checkpoint whose tensors stay in the file until they are used.

    Raises:
        FileNotFoundError, ValueError: there is none, or it was not written by fairseq-train.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        checkpoint = checkpoint_utils.load_checkpoint_to_cpu(path)  # an older format, or a sentence about what is wrong
    if not (isinstance(checkpoint, dict) and checkpoint.get("cfg") and checkpoint.get("optimizer_history")):
        raise ValueError(f"{path} is no checkpoint of fairseq-train")
    return checkpoint


def updates(checkpoint: dict[str, Any]) -> int:
    """After how many updates a checkpoint was saved."""
    return checkpoint["optimizer_history"][-1]["num_updates"]


def last_of(folder: str, count: int) -> list[str]:
    """The checkpoints of the last ``count`` different updates in a folder, oldest first.

    Raises:
        ValueError: the folder holds fewer.
    """
    found = {}
    for name in sorted(os.listdir(folder)):
        if SAVED.fullmatch(name):  # copies under other names (last, best) are of the same update
            path = os.path.join(folder, name)
            found[updates(opened(path))] = path
    if len(found) < count:
        raise ValueError(
            f"--last {count}: {folder} holds checkpoints of {len(found)} updates; train with --keep-interval-updates "
            f"{count} or more, or ask for fewer"
        )
    return [found[number] for number in sorted(found)[-count:]]


def refuse_different(path: str, checkpoint: dict[str, Any], other_path: str, other: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the two checkpoints hold different models; the message names what differs.
    """
    mine, theirs = checkpoint["cfg"]["model"], other["cfg"]["model"]
    for field in sorted({*mine, *theirs}):
        # What is dropped in training, and how it ends, play no part in the function that is evaluated.
        if "drop" not in field and field != "save_on_signal" and mine.get(field) != theirs.get(field):
            raise ValueError(
                f"{path} and {other_path} hold different models: {field.lstrip('_')} is {mine.get(field)!r} in the one "
                f"and {theirs.get(field)!r} in the other"
            )
    # Beside the dictionary stands how far the training had come.
    told, others_told = ((each["extra_state"].get(TASK) or {}).get("dictionary") for each in (checkpoint, other))
    if told != others_told:
        raise ValueError(f"{path} and {other_path} were trained with different dictionaries")
    shapes, others = ({name: tuple(tensor.shape) for name, tensor in c["model"].items()} for c in (checkpoint, other))
    for name in sorted({*shapes, *others}):
        if shapes.get(name) != others.get(name):
            raise ValueError(
                f"{path} and {other_path} hold different models: {name} is {shapes.get(name)} in the one and "
                f"{others.get(name)} in the other"
            )


def average(paths: list[str]) -> dict[str, Any]:
    """A checkpoint with the mean of the weights, summed in float64; all else, integers among the tensors included, is
    that of the checkpoint with the most updates.

    Raises:
        ValueError: they do not hold the same model.
    """
    checkpoints = [opened(path) for path in paths]
    for path, checkpoint in zip(paths[1:], checkpoints[1:], strict=True):
        refuse_different(paths[0], checkpoints[0], path, checkpoint)
    last = max(checkpoints, key=updates)
    weights, shared = {}, {}
    for name, tensor in last["model"].items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in shared:  # tied weights stay tied
            mean = tensor.clone()
            if tensor.is_floating_point():
                total = sum(checkpoint["model"][name].double() for checkpoint in checkpoints)
                mean = (total / len(checkpoints)).to(tensor.dtype)
            shared[place] = mean
        weights[name] = shared[place]
    # Other copies of the weights (of the optimiser, of --store-ema) are those of the last checkpoint, not of the mean.
    kept = ("args", "cfg", "criterion", "optimizer_history", "task_state")
    kept_extra = ("train_iterator", "val_loss", "best", "metrics", "previous_training_time", TASK)
    return {
        **{key: last.get(key) for key in kept},
        "model": weights,
        "extra_state": {key: last["extra_state"][key] for key in kept_extra if key in last["extra_state"]},
        "last_optimizer_state": None,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="checkpoints, or one folder of them with --last")
    parser.add_argument("--last", type=int, metavar="N", help="average the last N checkpoints of the folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write; must not exist")


def wrong_arguments(options: argparse.Namespace, folders: list[str]) -> str | None:
    """What is wrong with the arguments, in a sentence."""
    if options.last is not None and not os.path.exists(options.inputs[0]):
        return f"there is no folder {options.inputs[0]}"
    if folders and (options.last is None or len(options.inputs) > 1):
        return f"{folders[0]} is a folder: give it alone, with --last N"
    if options.last is not None and (not folders or options.last < 1):
        return "--last takes one folder and a positive number"
    if os.path.exists(options.output):
        return f"{options.output} exists: remove it or choose another name"
    return None


def run(options: argparse.Namespace) -> None:
    folders = [path for path in options.inputs if os.path.isdir(path)]
    if wrong := wrong_arguments(options, folders):
        raise argparse.ArgumentError(None, wrong)
    paths = last_of(folders[0], options.last) if folders else options.inputs
    write(average(paths), options.output)
    sys.stdout.write(f"wrote {options.output}: the mean of {', '.join(paths)}\n")
