"""The fairseq-train flags that rebuild a checkpoint's model, for fine-tuning it.

    eval "flags=($(python scripts/checkpoint_flags.py FOLDER --finetune))"
    fairseq-train ... "${flags[@]}"

Prints `--arch`, `--max-positions` and every model field that differs from the preset's default, quoted for a shell.
Dropout and drop-path rates and --save-on-signal are left out: they belong to the run, not to the weights.
"""

import argparse
import dataclasses
import logging
import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.models import MODEL_REGISTRY  # noqa: E402
from omegaconf import DictConfig, ListConfig  # noqa: E402

import fairseq_implicit  # noqa: E402, F401  (registers the models)
from fairseq_implicit.models.bert import ImplicitBertModel  # noqa: E402
from fairseq_implicit.models.hub_interface import find_checkpoint  # noqa: E402


def of_the_run(name: str) -> bool:
    """Whether a field says how a model is trained, not what it computes."""
    return "dropout" in name or name.endswith(("drop_path", "layerdrop", "save_on_signal"))


def model_flags(path: str) -> list[str]:
    """The flags, as a list of arguments.

    Raises ValueError when it is no checkpoint of this package.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    stored = (state.get("cfg") or {}).get("model")
    name = stored.get("_name") if isinstance(stored, DictConfig) else None
    model = MODEL_REGISTRY.get(name)
    if model is None or not issubclass(model, ImplicitBertModel):
        raise ValueError(f"{path} was trained as the model {name!r}, which this package does not register")
    if stored.get("max_positions") is None:  # the task chose it
        stored = {**stored, "max_positions": (state["cfg"].get("task") or {}).get("tokens_per_sample")}
    flags = ["--arch", name]
    for field in dataclasses.fields(model.config_class()):
        value = stored.get(field.name)
        if field.name == "_name" or of_the_run(field.name) or value is None or value == field.default:
            continue
        flags.append("--" + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            flags.append(",".join(map(str, value)) if isinstance(value, ListConfig) else str(value))
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file, or a folder of which checkpoint_best.pt, model.pt or checkpoint_last.pt is taken",
    )
    parser.add_argument("--finetune", action="store_true", help="--finetune-from-model with the checkpoint, too")
    arguments = parser.parse_args()
    try:
        path = arguments.checkpoint
        if not os.path.isfile(path):
            path = find_checkpoint(path)
        flags = model_flags(path)
        if arguments.finetune:
            flags += ["--finetune-from-model", os.path.abspath(path)]
        print(shlex.join(flags))
    except (OSError, ValueError) as error:
        sys.exit(f"checkpoint_flags: {error}")


if __name__ == "__main__":
    main()
