"""The fairseq-train flags that rebuild a checkpoint's model, for fine-tuning it.

    eval "flags=($(fairseq-implicit checkpoint-flags FOLDER --finetune))"
    fairseq-train ... "${flags[@]}"

Prints `--arch`, `--max-positions` and every model field that differs from the preset's default, quoted for a shell.
Dropout and drop-path rates and --save-on-signal are left out: they belong to the run, not to the weights.
"""

import argparse
import dataclasses
import os
import shlex
import sys

from fairseq.models import MODEL_REGISTRY
from omegaconf import ListConfig

from fairseq_implicit.evaluation.checkpoints import model_name, stored
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.hub_interface import find_checkpoint


def of_the_run(name: str) -> bool:
    """Whether a field says how a model is trained, not what it computes."""
    return "dropout" in name or name.endswith(("drop_path", "layerdrop", "save_on_signal"))


def model_flags(path: str) -> list[str]:
    """The flags, as a list of arguments.

    Raises ValueError when it is no checkpoint of this package.
    """
    checkpoint = stored(path)
    name, trained = model_name(checkpoint), checkpoint["cfg"]["model"]
    model = MODEL_REGISTRY.get(name)
    if model is None or not issubclass(model, ImplicitBertModel):
        raise ValueError(f"{path} was trained as the model {name!r}, which this package does not register")
    if trained.get("max_positions") is None:  # the task chose it
        trained = {**trained, "max_positions": (checkpoint["cfg"].get("task") or {}).get("tokens_per_sample")}
    flags = ["--arch", name]
    for field in dataclasses.fields(model.config_class()):
        value = trained.get(field.name)
        if field.name == "_name" or of_the_run(field.name) or value is None or value == field.default:
            continue
        flags.append("--" + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            flags.append(",".join(map(str, value)) if isinstance(value, ListConfig) else str(value))
    return flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file, or a folder of which checkpoint_best.pt, model.pt or checkpoint_last.pt is taken",
    )
    parser.add_argument("--finetune", action="store_true", help="--finetune-from-model with the checkpoint, too")


def run(arguments: argparse.Namespace) -> None:
    path = arguments.checkpoint
    if not os.path.isfile(path):
        path = find_checkpoint(path)
    flags = model_flags(path)
    if arguments.finetune:
        flags += ["--finetune-from-model", os.path.abspath(path)]
    sys.stdout.write(shlex.join(flags) + "\n")
