"""Loss curves of a fairseq run as a PNG, from the folder given to `--tensorboard-logdir`.

    python scripts/plot_losses.py TENSORBOARD_FOLDER --out losses.png [--data DATA] [--title TEXT]

fairseq logs losses in bits; the picture shows nats per masked token.
"""

import argparse
import math
import os
import sys
from typing import Dict, Optional, Tuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

Curve = Tuple[list, list]  # updates, nats

CURVES = {"train_inner": "training", "valid": "validation"}


def read_curves(folder: str) -> Dict[str, Curve]:
    """{curve: (updates, nats)} of the losses below `folder`. Where a run was interrupted and resumed, the later record
    of an update counts.

    Raises FileNotFoundError when there is no folder or no loss in it.
    """
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


def plot(curves: Dict[str, Curve], out: str, unigram: Optional[float] = None, title: str = "") -> None:
    """Writes the picture; `unigram` (nats) becomes a horizontal line."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150)
    for name, (updates, nats) in curves.items():
        few = "o" if len(updates) < 40 and name == "valid" else None
        axes.plot(updates, nats, label=CURVES[name], linewidth=1.5, marker=few, markersize=4)
    if unigram is not None:
        axes.axhline(unigram, color="grey", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set_xlabel("updates")
    axes.set_ylabel("loss (nats per masked token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="TENSORBOARD_FOLDER")
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--data", metavar="DATA", help="data folder whose unigram entropy is drawn as a line")
    parser.add_argument("--title", default="", metavar="TEXT")
    arguments = parser.parse_args()
    try:
        unigram = None
        if arguments.data:
            sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
            from corpus_entropy import folder_entropies

            unigram = folder_entropies(arguments.data).unigram
        plot(read_curves(arguments.folder), arguments.out, unigram, arguments.title)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_losses: {error}")
    print(f"  {arguments.out}")


if __name__ == "__main__":
    main()
