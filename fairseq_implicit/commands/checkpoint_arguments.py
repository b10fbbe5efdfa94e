"""The flags that the commands on a checkpoint share."""

import argparse

import torch

from fairseq_implicit.commands.values import positive
from fairseq_implicit.evaluation.masked_lm import Blocks

SHORT = 4  # batches, without --all


def add_arguments(parser: argparse.ArgumentParser, batch_size: int = 32) -> None:
    """What every command on a checkpoint and its data takes."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DATA", help="data folder, as for fairseq-validate")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=positive, default=batch_size)


def add_dial_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands take that evaluate one checkpoint under many settings."""
    add_arguments(parser)
    parser.add_argument("--all", action="store_true", help="more settings, and every block of the subset")
    parser.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help=f"evaluate so many batches, spread over the subset (default: {SHORT}, with --all every one)",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")


def device(name: str) -> str:
    """A device of torch that is there, for ``--device``."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"'{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return name


def dial_blocks(options: argparse.Namespace) -> Blocks:
    """The blocks that a dial's flags ask for."""
    limit = options.batches if options.batches or options.all else SHORT
    return Blocks(options.data, options.subset, options.batch_size, limit, options.device)
