"""Loss curves of a fairseq run as a PNG, from the folder given to `--tensorboard-logdir`.

    fairseq-implicit plot-losses TENSORBOARD_FOLDER --out losses.png [--data DATA] [--title TEXT]

fairseq logs losses in bits; the picture shows nats per masked token.
"""

import argparse
import math
import os
import sys

from fairseq_implicit.commands import pictures
from fairseq_implicit.evaluation.entropies import Entropies, folder_entropies

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


def plot(curves: dict[str, Curve], reference: Entropies | None = None, title: str = "") -> pictures.Figure:
    """The picture; the entropies of `reference` become horizontal lines."""
    figure, axes = pictures.figure()
    for number, (name, (updates, nats)) in enumerate(curves.items()):
        pictures.line(axes, updates, nats, number, CURVES[name], linestyle="-")
    if reference is not None:
        for name, nats, line in zip(reference._fields, reference, ("--", ":"), strict=True):
            axes.axhline(nats, color="grey", linestyle=line, linewidth=1, label=f"{name} entropy")
    axes.set_xlabel("updates")
    axes.set_ylabel("loss (nats per masked token)")
    axes.set_title(title)
    axes.legend()
    pictures.whole_numbers(axes.xaxis)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="TENSORBOARD_FOLDER")
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--data", metavar="DATA", help="data folder whose entropies are drawn as lines")
    parser.add_argument("--title", default="", metavar="TEXT")


def run(arguments: argparse.Namespace) -> None:
    pictures.check(arguments.out)
    reference = folder_entropies(arguments.data) if arguments.data else None
    pictures.save(plot(read_curves(arguments.folder), reference, arguments.title), arguments.out)
    sys.stdout.write(f"  {arguments.out}\n")
