"""What a trained model does along its depth: state size, turning, local error per block, evaluations per sample.

    fairseq-implicit plot-trajectory checkpoint_best.pt DATA --out trajectory.png --tensorboard FOLDER

Takes ode_bert and neural_ode_bert checkpoints and a batch of middling blocks of the validation set. The curves are
means over the batch, the bands run from the smallest to the largest sample. The local error is what one third-order
step over a block (or one unit of time) estimates that it gets wrong, relative to the state: where it is large, more
steps would matter. In TensorBoard the curves appear under trajectory/, with the block or time as step, and the picture
as an image.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import torch

from fairseq_implicit.commands import checkpoint_arguments, pictures
from fairseq_implicit.depth.diagnostics import Trajectory
from fairseq_implicit.evaluation.masked_lm import Blocks
from fairseq_implicit.evaluation.trajectory import trajectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments.add_arguments(parser, batch_size=16)
    parser.add_argument("--out", metavar="PNG")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="also write the curves and the picture there")


def _curve(axes, times: Sequence[float], values: torch.Tensor, title: str, logarithmic: bool = False) -> None:
    pictures.line(axes, times, values.mean(1).tolist(), 0, "mean over the batch")
    low, high = values.amin(1).tolist(), values.amax(1).tolist()
    axes.fill_between(times, low, high, color=pictures.style(0)["color"], alpha=0.2, label="smallest to largest sample")
    if logarithmic:
        pictures.logarithmic(axes.yaxis)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("depth (layers)")


def plot(trajectory: Trajectory, title: str) -> pictures.Figure:
    """Four panels."""
    figure, panels = pictures.figure(2, 2, size=(9, 6.5))
    times = trajectory.times
    _curve(panels[0][0], times, trajectory.rms, "state: root mean square")
    _curve(panels[0][1], times[1:], trajectory.cosine, "cosine to the previous state")
    _curve(panels[1][0], times[1:], trajectory.local_error, "local error per block, relative", logarithmic=True)
    margin = 0.05 * times[-1]
    for panel in (panels[0][0], panels[0][1], panels[1][0]):
        panel.set_xlim(-margin, times[-1] + margin)
        pictures.ticks_at(panel.xaxis, times)
    counts = trajectory.evaluations.sort(descending=True).values.tolist()
    panels[1][1].bar(range(1, len(counts) + 1), counts, color=pictures.style(0)["color"])
    panels[1][1].set_title("evaluations per sample", fontsize=10)
    panels[1][1].set_xlabel("sample, the costliest first")
    pictures.whole_numbers(panels[1][1].xaxis)
    pictures.whole_numbers(panels[1][1].yaxis)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    pictures.fit_fonts(figure)
    return figure


def write_tensorboard(trajectory: Trajectory, figure: pictures.Figure, folder: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for step, value in enumerate(trajectory.rms.mean(1).tolist()):
            writer.add_scalar("trajectory/state_rms", value, step)
        pairs = zip(trajectory.cosine.mean(1).tolist(), trajectory.local_error.mean(1).tolist(), strict=True)
        for step, values in enumerate(pairs):
            writer.add_scalar("trajectory/cosine", values[0], step + 1)
            writer.add_scalar("trajectory/local_error", values[1], step + 1)
        writer.add_histogram("trajectory/evaluations", trajectory.evaluations)
        writer.add_figure("trajectory", figure, close=False)


def table(trajectory: Trajectory) -> str:
    lines = ["depth   state rms   cosine   local error"]
    lines.append(f"{trajectory.times[0]:>5.2f}{trajectory.rms[0].mean():>12.3f}")
    for place, time in enumerate(trajectory.times[1:]):
        lines.append(
            f"{time:>5.2f}{trajectory.rms[place + 1].mean():>12.3f}{trajectory.cosine[place].mean():>9.4f}"
            f"{trajectory.local_error[place].mean():>14.2e}"
        )
    found = trajectory.evaluations
    lines.append(f"evaluations per sample: mean {found.mean():.1f}, {found.min():.0f} to {found.max():.0f}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    if options.out:
        pictures.check(options.out)
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package: pip install 'fairseq_implicit[tensorboard]'")
    name, found = trajectory(options.checkpoint, Blocks(options.data, options.subset, options.batch_size))
    sys.stdout.write(table(found) + "\n")
    if not (options.out or options.tensorboard):
        return
    figure = plot(found, name)
    if options.out:
        pictures.save(figure, options.out)
        sys.stdout.write(f"  {options.out}\n")
    if options.tensorboard:
        write_tensorboard(found, figure, options.tensorboard)
        sys.stdout.write(f"  {options.tensorboard}\n")
