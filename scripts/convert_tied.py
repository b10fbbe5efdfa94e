"""Open a weight-tied ode_bert as deq_bert, or the other way, and print what that does to the loss.

    python scripts/convert_tied.py ode/checkpoint_best.pt deq.pt --data DATA

The direction follows from the checkpoint. With --data both models are evaluated, and the deq_bert of the two also at
its equilibrium.
"""

import argparse
import logging
import os
import sys
from typing import Any, Dict

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq import checkpoint_utils  # noqa: E402

import fairseq_implicit  # noqa: E402, F401  (registers models, task and criterion)
from fairseq_implicit.models.tied_bridge import deq_from_tied, tied_from_deq  # noqa: E402


def loss(path: str, options: argparse.Namespace, overrides: Dict[str, Any]) -> float:
    """Nats per masked token; the masks are the same for every model."""
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [path], arg_overrides={"data": options.data, **overrides}
    )
    task.load_dataset(options.subset)
    criterion = task.build_criterion(cfg.criterion).eval()
    model, total, tokens = models[0].eval(), 0.0, 0.0
    iterator = task.get_batch_iterator(
        task.dataset(options.subset), max_sentences=options.batch_size, max_positions=task.max_positions()
    ).next_epoch_itr(shuffle=False)
    with torch.no_grad():
        for sample in iterator:
            _, _, logged = criterion(model, sample)
            total += float(logged["loss"])
            tokens += float(logged["sample_size"])
    return total / max(tokens, 1.0)


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
    checkpoint = checkpoint_utils.load_checkpoint_to_cpu(options.input)
    to_deq = checkpoint["cfg"]["model"]["_name"].startswith("ode_bert")
    try:
        converted = (deq_from_tied if to_deq else tied_from_deq)(checkpoint)
    except ValueError as error:
        sys.exit(f"{options.input}: {error}")
    torch.save(converted, options.output + ".part")
    os.replace(options.output + ".part", options.output)
    model = converted["cfg"]["model"]
    sys.stdout.write(f"wrote {options.output}: {model['_name']}\n")
    if not options.data:
        return
    before, after = loss(options.input, options, {}), loss(options.output, options, {})
    sys.stdout.write(f"loss {before:.4f} -> {after:.4f} ({after - before:+.4f} nats per masked token)\n")
    equilibrium = options.output if to_deq else options.input
    if not (to_deq and model["deq_no_final_norm"]):
        solved = loss(equilibrium, options, {"deq_gradient": "ift", "deq_gradient_damping": None})
        sys.stdout.write(f"at the equilibrium of the same cell {solved:.4f} ({solved - before:+.4f})\n")
    else:
        sys.stdout.write("a pre-norm cell without a norm inside the map has no equilibrium to compare with\n")


if __name__ == "__main__":
    main()
