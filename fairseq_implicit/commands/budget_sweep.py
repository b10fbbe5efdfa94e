"""An equilibrium as a dial: loss, accuracy and time of one checkpoint against the evaluation budget.

    fairseq-implicit budget-sweep checkpoint_best.pt DATA --out budget.png
    fairseq-implicit budget-sweep checkpoint_best.pt DATA --all --out budget.png
    fairseq-implicit budget-sweep checkpoint_best.pt DATA --solvers picard,anderson --budgets 1,2,4,8 --tol 1e-4

Evaluates a few batches, always with the same masks, under every solver and a few budgets, none of which changes a
weight; with --all the whole validation set under more budgets. The first row is the checkpoint as trained; times are
relative to it.
"""

import argparse
import math
import os
import sys

import torch

from fairseq_implicit.commands import pictures
from fairseq_implicit.commands.checkpoint_arguments import add_dial_arguments, dial_blocks
from fairseq_implicit.commands.wording import conditions, counted
from fairseq_implicit.evaluation.depth_dials import budget_rows
from fairseq_implicit.evaluation.masked_lm import Averages
from fairseq_implicit.options import named
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig

Rows = list[tuple[str, int, Averages]]  # solver, budget

BUDGETS = {False: "2,4,8", True: "1,2,3,4,6,8,12,16,24"}  # by --all
FLAGS = {"solver": "--solvers", "max_iter": "--budgets", "tol": "--tol"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dial_arguments(parser)
    parser.add_argument("--solvers", default=",".join(METHODS), help=f"(default: {','.join(METHODS)})")
    parser.add_argument("--budgets", help=f"(default: {BUDGETS[False]}; with --all {BUDGETS[True]})")
    parser.add_argument("--tol", type=float, default=1e-4, help="relative tolerance that ends a solve early")
    parser.add_argument("--out", metavar="PNG", help="picture of loss and accuracy against evaluations")


def table(rows: Rows) -> str:
    first = rows[0][2]
    lines = [
        f"{'solver':<12}{'budget':>7}{'loss':>9}{'change':>9}{'accuracy':>10}{'evaluations':>13}{'residual':>10}"
        f"{'converged':>11}{'time':>7}"
    ]
    for solver, budget, found in rows:
        statistics = found.statistics
        lines.append(
            f"{solver:<12}{budget:>7}{found.loss:>9.4f}{found.loss - first.loss:>+9.4f}{found.accuracy:>9.2f}%"
            f"{statistics['evaluations']:>13.1f}{statistics['residual']:>10.1e}"
            f"{100.0 * statistics['converged_share']:>10.0f}%{found.seconds / first.seconds:>7.2f}"
        )
    return "\n".join(lines)


def plot(rows: Rows, title: str) -> pictures.Figure:
    figure, panels = pictures.figure(1, 2, size=(9, 4))
    trained = rows[0][2]
    for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
        for number, solver in enumerate(dict.fromkeys(solver for solver, _, _ in rows[1:])):
            found = [row for name, _, row in rows[1:] if name == solver]
            points = sorted((row.statistics["evaluations"], getattr(row, name)) for row in found)
            pictures.line(panel, *zip(*points, strict=True), number, solver)
        panel.plot([trained.statistics["evaluations"]], [getattr(trained, name)], "k*", markersize=11,
                   label="as trained")  # fmt: skip
        panel.set_xlabel("evaluations of the cell per sample")
        pictures.logarithmic(panel.xaxis, counts=True)
    panels[0].set_ylabel("loss (nats per masked token)")
    panels[1].set_ylabel("accuracy (% of masked tokens)")
    panels[0].legend()
    figure.suptitle(title)
    return figure


def run(options: argparse.Namespace) -> None:
    if options.out:
        pictures.check(options.out)
    budgets = [int(budget) for budget in (options.budgets or BUDGETS[options.all]).split(",")]
    with named(lambda option: FLAGS.get(option, option)):
        solvers = [
            FixedPointConfig(solver, budget, options.tol) for solver in options.solvers.split(",") for budget in budgets
        ]
        rows: Rows = [
            ("as trained" if solver is None else solver.method, budget, found)
            for solver, budget, found in budget_rows(options.checkpoint, dial_blocks(options), solvers)
        ]
    sys.stdout.write(
        f"{options.checkpoint}: {counted(rows[0][2].blocks, 'block')} of {options.subset} in "
        f"{options.data}; {conditions(options.device, torch.get_num_threads())}\n{table(rows)}\n"
    )
    for solver, budget, found in rows:
        if not math.isfinite(found.loss):
            sys.stderr.write(f"{solver}, budget {budget}: the loss is not finite\n")
    if options.out:
        title = os.path.basename(os.path.dirname(os.path.abspath(options.checkpoint)))
        pictures.save(plot(rows, title), options.out)
        sys.stdout.write(f"  {options.out}\n")
