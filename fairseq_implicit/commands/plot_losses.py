"""Loss curves of a fairseq run as a PNG, from the folder given to `--tensorboard-logdir`.

    fairseq-implicit plot-losses TENSORBOARD_FOLDER --out losses.png [--data DATA] [--title TEXT]

fairseq logs losses in bits; the picture shows nats per masked token.
"""

import argparse
import math
import os
import sys

from fairseq_implicit.commands import pictures
from fairseq_implicit.evaluation.entropies import folder_entropies

Curve = tuple[list, list]  # updates, nats

CURVES = {"train_inner": "training", "valid": "validation"}


def read_curves(folder: str) -> dict[str, Curve]:
    """{curve: (updates, nats)} of the losses below `folder`. Where a run was interrupted and resumed, the later record
    of an update counts.

    Raises FileNotFoundError when there is no folder or no loss in it, ValueError without tensorboard.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError:
        raise ValueError(
            "reading losses needs tensorboard: pip install 'fairseq_implicit[tensorboard]', or pip install tensorboard"
        ) from None
    curves = {}
    for name in CURVES:
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            continue
        events = EventAccumulator(path, size_guidance={"scalars": 0}).Reload()
        if "loss" in events.Tags()["scalars"]:
            records = sorted(events.Scalars("loss"), key=lambda record: record.wall_time)
            by_update = {record.step: record.value * math.log(2) for record in records}
            updates = sorted(by_update)
            curves[name] = (updates, [by_update[update] for update in updates])
    if not curves:
        raise FileNotFoundError(f"{folder} holds no losses: name the folder that --tensorboard-logdir was given")
    return curves


def plot(curves: dict[str, Curve], unigram: float | None = None, title: str = "") -> pictures.Figure:
    """The picture; `unigram` (nats) becomes a horizontal line."""
    figure, axes = pictures.figure()
    for number, (name, (updates, nats)) in enumerate(curves.items()):
        pictures.line(axes, updates, nats, number, CURVES[name], linestyle="-")
    if unigram is not None:
        axes.axhline(unigram, color="grey", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set_xlabel("updates")
    axes.set_ylabel("loss (nats per masked token)")
    axes.set_title(title)
    axes.legend()
    pictures.whole_numbers(axes.xaxis)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="TENSORBOARD_FOLDER")
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--data", metavar="DATA", help="data folder whose unigram entropy is drawn as a line")
    parser.add_argument("--title", default="", metavar="TEXT")


def run(arguments: argparse.Namespace) -> None:
    pictures.check(arguments.out)
    unigram = folder_entropies(arguments.data).unigram if arguments.data else None
    pictures.save(plot(read_curves(arguments.folder), unigram, arguments.title), arguments.out)
    sys.stdout.write(f"  {arguments.out}\n")
