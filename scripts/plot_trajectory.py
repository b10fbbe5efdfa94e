"""What a trained model does along its depth: state size, turning, local error per block, evaluations per sample.

    python scripts/plot_trajectory.py checkpoint_best.pt DATA --out trajectory.png --tensorboard FOLDER

Takes ode_bert and neural_ode_bert checkpoints and a batch of middling blocks of the validation set. The curves are
means over the batch, the bands run from the smallest to the largest sample. The local error is what one third-order
step over a block (or one unit of time) estimates that it gets wrong, relative to the state: where it is large, more
steps would matter. In TensorBoard the curves appear under trajectory/, with the block or time as step, and the picture
as an image.
"""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import

from fairseq_implicit.depth.diagnostics import Trajectory, trace  # noqa: E402
from scripts import pictures, validation  # noqa: E402


def refuse_non_finite(trajectory: Trajectory) -> None:
    """Raises ArithmeticError where a state on the way is no number: there is nothing to draw."""
    for place, time in enumerate(trajectory.times):
        error = trajectory.local_error[place - 1] if place else torch.zeros(())
        if not (trajectory.rms[place].isfinite().all() and error.isfinite().all()):
            raise ArithmeticError(
                f"the state is not finite at depth {time:g} of {trajectory.times[-1]:g}: the model has diverged; take "
                "an earlier checkpoint"
            )


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
        for step, values in enumerate(zip(trajectory.cosine.mean(1).tolist(), trajectory.local_error.mean(1).tolist())):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    validation.add_arguments(parser, batch_size=16)
    parser.add_argument("--out", metavar="PNG")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="also write the curves and the picture there")
    options = parser.parse_args()
    try:
        if options.out:
            pictures.check(options.out)
        if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs a package: pip install 'fairseq_implicit[tensorboard]'")
        model, cfg, task = validation.open_checkpoint(options.checkpoint, options.data)
        tokens = validation.batches(task, options.subset, options.batch_size, limit=1)[0]["net_input"]["src_tokens"]
        with torch.no_grad():
            layout = model.encoder.layout(tokens)
            trajectory = trace(model.encoder.depth, model.encoder.embed(tokens, layout), layout)
        refuse_non_finite(trajectory)
        sys.stdout.write(table(trajectory) + "\n")
        if not (options.out or options.tensorboard):
            return
        figure = plot(trajectory, cfg.model._name)
        if options.out:
            pictures.save(figure, options.out)
            sys.stdout.write(f"  {options.out}\n")
        if options.tensorboard:
            write_tensorboard(trajectory, figure, options.tensorboard)
            sys.stdout.write(f"  {options.tensorboard}\n")
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"plot_trajectory: {error}")


if __name__ == "__main__":
    main()
