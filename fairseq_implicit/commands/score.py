"""How well a checkpoint fills masks, beside what it must beat.

    fairseq-implicit score checkpoint_best.pt DATA

Masks a fixed share of the validation text, the same tokens each time, whatever share the training masked. Prints the
loss over all of them, how often the right token is the first candidate and how often it is among the first five: once
as in training, which by default leaves a tenth of them visible and makes another tenth random, and once with <mask> in
the place of each. Below stand the entropies of single tokens (see `fairseq-implicit entropy`).
"""

import argparse
import sys

from fairseq_implicit.commands import checkpoint_arguments
from fairseq_implicit.commands.values import positive
from fairseq_implicit.evaluation.entropies import folder_entropies
from fairseq_implicit.evaluation.masked_lm import Blocks, score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments.add_arguments(parser, batch_size=128)
    parser.add_argument("--mask-prob", type=float, default=0.15, help="share of the tokens to mask (default: 0.15)")
    parser.add_argument("--candidates", type=positive, default=5, help="that count beside the first (default: 5)")
    checkpoint_arguments.add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    blocks = Blocks(arguments.data, arguments.subset, arguments.batch_size, None, arguments.device)
    lines = []
    for name, hidden in (("masked as in training", False), ("all of them hidden", True)):
        found = score(arguments.checkpoint, blocks, arguments.mask_prob, arguments.candidates, hidden)
        lines.append(
            f"  {name:<22}{found.loss:6.3f} nats per token; {found.first:.1%} are the first candidate, "
            f"{found.among:.1%} among the first {arguments.candidates}"
        )
    reference = folder_entropies(arguments.data)
    sys.stdout.write(
        f"  {arguments.mask_prob:.0%} of {arguments.subset}, {found.masks:,} tokens:\n"
        + "\n".join(lines)
        + f"\n  bigram entropy        {reference.bigram:6.3f} nats per token: with the token before known"
        f"\n  unigram entropy       {reference.unigram:6.3f} nats per token: what a model without context reaches\n"
    )
