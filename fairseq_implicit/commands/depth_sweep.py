"""Depth as a dial: one checkpoint under other schemes, step counts and tolerances.

    fairseq-implicit depth-sweep checkpoint_best.pt DATA --out dial.png
    fairseq-implicit depth-sweep checkpoint_best.pt DATA --all --out dial.png
    fairseq-implicit depth-sweep checkpoint_best.pt DATA --schemes euler,rk4 --steps 1,2,4 --tolerances 1e-1,1e-2

Evaluates a few batches under a few settings, none of which changes a weight; with --all the whole validation set under
more of them. Prints loss, accuracy, evaluations of the field per sample, and time relative to the first setting; the
picture shows loss against evaluations. Step counts are per block for ode_bert and over the whole depth for
neural_ode_bert. With --splits an ode_bert is also opened with each layer cut into that many blocks (progressive depth).
"""

import argparse
import math
import sys

import torch

from fairseq_implicit.commands import pictures
from fairseq_implicit.commands.checkpoint_arguments import add_dial_arguments, dial_blocks
from fairseq_implicit.commands.wording import conditions, counted
from fairseq_implicit.evaluation.checkpoints import model_name, stored
from fairseq_implicit.evaluation.depth_dials import Dial, Setting, depth_rows, family, settings
from fairseq_implicit.evaluation.masked_lm import Averages
from fairseq_implicit.solvers.adaptive import PAIRS

Rows = list[tuple[Setting, Averages]]

# By --all.
SCHEMES = {False: "euler,rk4", True: "euler,rk2,rk4"}
STEPS = {
    "ode_bert": {False: "1,2", True: "1,2,3,4"},  # of each block
    "neural_ode_bert": {False: "1,4,12", True: "1,2,3,4,6,8,12"},  # of the whole depth
}
TOLERANCES = {False: "1e-1,1e-2", True: "1e-1,1e-2,1e-3"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dial_arguments(parser)
    parser.add_argument("--schemes", help=f"of fixed steps (default: {SCHEMES[False]}; with --all {SCHEMES[True]})")
    defaults = {model: f"(default: {steps[False]}; with --all {steps[True]})" for model, steps in STEPS.items()}
    parser.add_argument(
        "--steps",
        help=f"per block {defaults['ode_bert']}, or over the depth of a neural_ode_bert {defaults['neural_ode_bert']}",
    )
    parser.add_argument("--splits", default="1", help="blocks per layer of an ode_bert (default: 1)")
    parser.add_argument("--pairs", default="bosh3", help=f"of adaptive steps: {','.join(PAIRS)}; empty: none")
    parser.add_argument("--tolerances", help=f"(default: {TOLERANCES[False]}; with --all {TOLERANCES[True]})")
    parser.add_argument("--out", metavar="PNG", help="picture of loss against evaluations")


def dial(model: str, options: argparse.Namespace) -> Dial:
    """The positions that the flags ask for. Raises ValueError for a model without a dial."""
    steps = options.steps or STEPS[family(model)][options.all]
    return Dial(
        (options.schemes or SCHEMES[options.all]).split(","),
        [int(number) for number in steps.split(",")],
        [int(number) for number in options.splits.split(",")],
        [pair for pair in options.pairs.split(",") if pair],
        (options.tolerances or TOLERANCES[options.all]).split(","),
    )


def table(rows: Rows) -> str:
    first = rows[0][1]
    width = max(len(setting.label) for setting, _ in rows) + 2
    lines = [f"{'setting':<{width}}{'loss':>9}{'change':>9}{'accuracy':>10}{'evaluations':>13}{'time':>8}"]
    for setting, found in rows:
        lines.append(
            f"{setting.label:<{width}}{found.loss:>9.4f}{found.loss - first.loss:>+9.4f}{found.accuracy:>9.2f}%"
            f"{found.statistics['evaluations']:>13.1f}{found.seconds / first.seconds:>8.2f}"
        )
    return "\n".join(lines)


def plot(rows: Rows, title: str) -> pictures.Figure:
    figure, axes = pictures.figure()
    for number, line in enumerate(dict.fromkeys(setting.line for setting, _ in rows[1:])):
        points = sorted((f.statistics["evaluations"], f.loss) for setting, f in rows[1:] if setting.line == line)
        pictures.line(axes, *zip(*points, strict=True), number, line)
    trained = rows[0][1]
    axes.plot([trained.statistics["evaluations"]], [trained.loss], "k*", markersize=11, label="as trained")
    axes.set_xlabel("evaluations of the field per sample")
    axes.set_ylabel("loss (nats per masked token)")
    axes.set_title(title)
    axes.legend()
    pictures.logarithmic(axes.xaxis, counts=True)
    return figure


def run(options: argparse.Namespace) -> None:
    if options.out:
        pictures.check(options.out)
    checkpoint = stored(options.checkpoint)
    name, trained = model_name(checkpoint), checkpoint["cfg"]["model"]
    positions = settings(trained, dial(name, options))
    rows: Rows = []
    for row in depth_rows(options.checkpoint, dial_blocks(options), positions):
        rows.append(row)
        if not math.isfinite(row[1].loss):
            sys.stderr.write(f"{row[0].label}: the loss is not finite\n")
    sys.stdout.write(
        f"{options.checkpoint}: {name}, {counted(rows[0][1].blocks, 'block')} of {options.subset} in "
        f"{options.data}; {conditions(options.device, torch.get_num_threads())}\n{table(rows)}\n"
    )
    if options.out:
        pictures.save(plot(rows, name), options.out)
        sys.stdout.write(f"  {options.out}\n")
