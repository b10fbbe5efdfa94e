"""Open a weight-tied ode_bert as deq_bert, or the other way, and print what that does to the loss.

    python scripts/convert_tied.py ode/checkpoint_best.pt deq.pt --data DATA

The direction follows from the checkpoint. With --data both models are evaluated, and the deq_bert of the two also at
its equilibrium.
"""

import argparse
import logging
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import

from fairseq_implicit.models.tied_bridge import deq_from_tied, tied_from_deq  # noqa: E402
from scripts import validation  # noqa: E402


def loss(path: str, options: argparse.Namespace, **overrides: Any) -> float:
    """Nats per masked token; the masks are the same for every model."""
    model, cfg, task = validation.open_checkpoint(path, options.data, **overrides)
    samples = validation.batches(task, options.subset, options.batch_size)
    totals = validation.totals(model, task.build_criterion(cfg.criterion).eval(), samples, ("loss", "sample_size"))
    return totals["loss"] / max(totals["sample_size"], 1.0)


def convert(path: str, output: str) -> Any:
    """Writes the other model and returns its settings.

    Raises:
        OSError, ValueError: the checkpoint cannot be read or has no counterpart, or the file cannot be written.
    """
    checkpoint = validation.stored(path)
    to_deq = checkpoint["cfg"]["model"]["_name"].startswith("ode_bert")
    try:
        converted = (deq_from_tied if to_deq else tied_from_deq)(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    validation.write(converted, output)
    return converted["cfg"]["model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="checkpoint of a weight-tied ode_bert (Euler) or of a deq_bert without injection")
    parser.add_argument("output", help="file to write; must not exist")
    parser.add_argument("--data", help="data folder, as for fairseq-validate")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    if not os.path.isfile(options.input):
        parser.error(f"there is no checkpoint {options.input}")
    if os.path.exists(options.output):
        parser.error(f"{options.output} exists: remove it or choose another name")
    try:
        model = convert(options.input, options.output)
        sys.stdout.write(f"wrote {options.output}: {model['_name']}\n")
        if options.data:
            compare(options, model)
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"convert_tied: {error}")


def compare(options: argparse.Namespace, converted: Any) -> None:
    """Prints the losses of both models, and that of the deq_bert of the two at its equilibrium."""
    before, after = loss(options.input, options), loss(options.output, options)
    sys.stdout.write(f"loss {before:.4f} -> {after:.4f} ({after - before:+.4f} nats per masked token)\n")
    to_deq = converted["_name"].startswith("deq_bert")
    if to_deq and converted["deq_no_final_norm"]:
        sys.stdout.write("a pre-norm cell without a norm inside the map has no equilibrium to compare with\n")
        return
    solved = loss(options.output if to_deq else options.input, options, deq_gradient="ift", deq_gradient_damping=None)
    sys.stdout.write(f"at the equilibrium of the same cell {solved:.4f} ({solved - before:+.4f})\n")


if __name__ == "__main__":
    main()
