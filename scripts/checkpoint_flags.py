"""The fairseq-train flags that rebuild a checkpoint's model, for fine-tuning it.

    fairseq-train ... $(python scripts/checkpoint_flags.py checkpoint_best.pt)

Prints `--arch`, `--max-positions` and every model field that differs from the preset's default. Dropout and drop-path
rates are left out: they belong to the run, not to the weights.
"""

import argparse
import dataclasses
import logging
import os
import shlex
import sys
from typing import List

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq.models import MODEL_REGISTRY  # noqa: E402

import fairseq_implicit  # noqa: E402, F401  (registers the models)

RATES = ("drop_path", "layerdrop")


def is_rate(name: str) -> bool:
    return "dropout" in name or name.endswith(RATES)


def model_flags(path: str) -> List[str]:
    """The flags, as a list of arguments.

    Raises FileNotFoundError when there is no such file and ValueError when it is no checkpoint of this package.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    stored = (state.get("cfg") or {}).get("model") or {}
    name = stored.get("_name")
    model = MODEL_REGISTRY.get(name)
    if not hasattr(model, "config_class"):
        raise ValueError(f"{path} was trained as the model {name!r}, which this package does not register")
    if stored.get("max_positions") is None:  # the task chose it
        stored = {**stored, "max_positions": (state["cfg"].get("task") or {}).get("tokens_per_sample")}
    flags = ["--arch", name]
    for field in dataclasses.fields(model.config_class()):
        value = stored.get(field.name)
        if field.name == "_name" or is_rate(field.name) or value is None or value == field.default:
            continue
        flags.append("--" + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            flags.append(str(value))
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    arguments = parser.parse_args()
    try:
        print(shlex.join(model_flags(arguments.checkpoint)))
    except (OSError, ValueError) as error:
        sys.exit(f"checkpoint_flags: {error}")


if __name__ == "__main__":
    main()
