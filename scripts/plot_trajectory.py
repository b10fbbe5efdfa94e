"""What a trained model does along its depth: state size, turning, local error per block, evaluations per sample.

    python scripts/plot_trajectory.py checkpoint_best.pt DATA --out trajectory.png --tensorboard FOLDER

Takes ode_bert and neural_ode_bert checkpoints and the first batch of the validation set. The curves are means over the
batch, the bands run from the smallest to the largest sample. The local error is what one third-order step over a block
(or one unit of time) estimates that it gets wrong, relative to the state: where it is large, more steps would matter.
In TensorBoard the curves appear under trajectory/, with the block or time as step, and the picture as an image.
"""

import argparse
import logging
import os
import sys

import matplotlib

matplotlib.use("Agg")
import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq import checkpoint_utils, utils  # noqa: E402

import fairseq_implicit  # noqa: E402, F401  (registers models, task and criterion)
from fairseq_implicit.depth.diagnostics import Trajectory, trace  # noqa: E402


def first_batch(task, subset: str, batch_size: int) -> torch.Tensor:
    """Unmasked or masked as the task makes them: token ids ``(batch, time)`` of the subset's first batch."""
    task.load_dataset(subset)
    iterator = task.get_batch_iterator(
        task.dataset(subset), max_sentences=batch_size, max_positions=task.max_positions(), ignore_invalid_inputs=True
    ).next_epoch_itr(shuffle=False)
    return next(iter(iterator))


def _curve(axes, times, values: torch.Tensor, title: str, logarithmic: bool = False) -> None:
    mean = values.mean(1).tolist()
    axes.plot(times, mean, marker="o", markersize=3)
    axes.fill_between(times, values.amin(1).tolist(), values.amax(1).tolist(), alpha=0.2)
    if logarithmic and min(mean) > 0:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("depth (layers)")
    axes.grid(alpha=0.3)


def plot(trajectory: Trajectory, title: str) -> Figure:
    """Four panels."""
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), dpi=150)
    times = trajectory.times
    _curve(panels[0][0], times, trajectory.rms, "state: root mean square")
    _curve(panels[0][1], times[1:], trajectory.cosine, "cosine to the previous state")
    _curve(panels[1][0], times[1:], trajectory.local_error, "local error per block, relative", logarithmic=True)
    counts = trajectory.evaluations.sort(descending=True).values.tolist()
    panels[1][1].bar(range(len(counts)), counts)
    panels[1][1].set_title("evaluations per sample", fontsize=10)
    panels[1][1].set_xlabel("sample, the costliest first")
    panels[1][1].grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def write_tensorboard(trajectory: Trajectory, figure: Figure, folder: str) -> None:
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
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DATA", help="data folder, as for fairseq-validate")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", metavar="PNG")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="also write the curves and the picture there")
    options = parser.parse_args()
    try:
        if not os.path.isfile(options.checkpoint):
            raise FileNotFoundError(f"there is no checkpoint {options.checkpoint}")
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [options.checkpoint], arg_overrides={"data": options.data}
        )
        encoder = models[0].eval().encoder
        tokens = first_batch(task, options.subset, options.batch_size)["net_input"]["src_tokens"]
        with torch.no_grad(), utils.model_eval(models[0]):
            padding_mask = encoder.padding_mask(tokens)
            trajectory = trace(encoder.depth, encoder.embed(tokens, padding_mask), padding_mask)
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"plot_trajectory: {error}")
    sys.stdout.write(table(trajectory) + "\n")
    figure = plot(trajectory, cfg.model._name)
    if options.out:
        os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
        figure.savefig(options.out)
        sys.stdout.write(f"  {options.out}\n")
    if options.tensorboard:
        write_tensorboard(trajectory, figure, options.tensorboard)
        sys.stdout.write(f"  {options.tensorboard}\n")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
