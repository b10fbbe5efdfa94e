"""A checkpoint on the blocks of a data folder: what the commands share that print rows of such numbers.

A module of the commands beside it.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from fairseq import checkpoint_utils, utils

import fairseq_implicit  # noqa: F401  (registers models, task and criterion)

SHORT = 4  # batches, without --all


class Opened(NamedTuple):
    """A model in evaluation mode and on its device, its configuration and its task."""

    model: Any
    cfg: Any
    task: Any


def add_arguments(parser: argparse.ArgumentParser, batch_size: int = 32) -> None:
    """What every command on a checkpoint takes."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DATA", help="data folder, as for fairseq-validate")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=int, default=batch_size)


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def batch_limit(options: argparse.Namespace) -> int | None:
    """How many batches the dial's arguments ask for, None for all."""
    return options.batches if options.batches or options.all else SHORT


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        yield
    except UnicodeError as error:
        raise _unopened(path, error) from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged or foreign file ends in whatever fairseq stumbles over first
        raise _unopened(path, error) from None


def _unopened(path: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).split(". ")[0]  # torch goes on with advice to load it unsafely
    return ValueError(
        f"checkpoint {path} cannot be opened ({type(error).__name__}: {reason}): is it whole, and of this project?"
    )


def write(checkpoint: dict[str, Any], path: str) -> None:
    """Writes a checkpoint that is whole under its name or not there.

    Raises:
        OSError: it cannot be written, in one sentence.
    """
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        if os.path.isfile(part):
            os.remove(part)
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def stored(path: str) -> dict[str, Any]:
    """What a checkpoint file holds, the settings of its model included.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds no model of fairseq's.
    """
    with _opening(path):
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        state["cfg"]["model"]["_name"], state["model"]
        return state


def open_checkpoint(path: str, data: str, device: str = "cpu", **overrides: Any) -> Opened:
    """The model of a checkpoint, with ``overrides`` of its settings, on data folder ``data``.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint or data, or it cannot be opened so.
    """
    with _opening(path):
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [path], arg_overrides={"data": data, **overrides}
        )
    return Opened(models[0].to(device).eval(), cfg, task)


def batches(task: Any, subset: str, batch_size: int, limit: int | None = None) -> list[dict[str, Any]]:
    """All batches of a subset, or ``limit`` of them at equal distances, as they go from the shortest to the longest
    blocks. The masks are the same each time.

    Raises:
        ValueError: the subset is empty.
    """
    task.load_dataset(subset)
    iterator = task.get_batch_iterator(
        task.dataset(subset), max_sentences=batch_size, max_positions=task.max_positions()
    ).next_epoch_itr(shuffle=False)
    count = len(iterator)
    if not count:
        raise ValueError(f"--subset {subset} is empty")
    limit = min(limit or count, count)
    kept = {count * (2 * place + 1) // (2 * limit) for place in range(limit)}  # the middles of as many equal parts
    return [sample for number, sample in enumerate(iterator) if number in kept]


def totals(
    model: Any, criterion: Any, samples: Iterable[dict[str, Any]], names: Sequence[str], device: str = "cpu"
) -> dict[str, float]:
    """Sums over ``samples`` of what the criterion logs under ``names``; ``seconds`` is the time that it took."""
    found = dict.fromkeys((*names, "seconds"), 0.0)
    with torch.no_grad():
        for sample in samples:
            sample = sample if device == "cpu" else utils.move_to_cuda(sample)
            start = time.perf_counter()
            _, _, logged = criterion(model, sample)
            counts = {name: float(logged[name]) for name in names}  # waits for the accelerator
            found["seconds"] += time.perf_counter() - start
            for name, value in counts.items():
                found[name] += value
    return found


if __name__ == "__main__":
    sys.exit("validation is a module of the commands beside it: depth_sweep, deq_budget_sweep, plot_trajectory")
