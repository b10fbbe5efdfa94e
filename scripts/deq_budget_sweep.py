"""An equilibrium as a dial: loss, accuracy and time of one checkpoint against the evaluation budget.

    python scripts/deq_budget_sweep.py checkpoint_best.pt DATA --out budget.png
    python scripts/deq_budget_sweep.py checkpoint_best.pt DATA --all --out budget.png
    python scripts/deq_budget_sweep.py checkpoint_best.pt DATA --solvers picard,anderson --budgets 1,2,4,8 --tol 1e-4

Evaluates a few batches, always with the same masks, under every solver and a few budgets, none of which changes a
weight; with --all the whole validation set under more budgets. The first row is the checkpoint as trained; times are
relative to it.
"""

import argparse
import dataclasses
import logging
import math
import os
import sys
from typing import NamedTuple

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import

from fairseq_implicit.depth.equilibrium import EquilibriumDepth  # noqa: E402
from fairseq_implicit.options import OptionError  # noqa: E402
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig  # noqa: E402
from fairseq_implicit.solvers.gradients.implicit import Implicit  # noqa: E402
from scripts import pictures, validation  # noqa: E402
from scripts.side_by_side import conditions, counted  # noqa: E402

NAMES = ("loss", "correct", "sample_size", "evaluations", "residual", "converged_share", "batches")
BUDGETS = {False: "2,4,8", True: "1,2,3,4,6,8,12,16,24"}  # by --all


class Row(NamedTuple):
    """Averages over the subset: loss in nats and accuracy in percent per masked token."""

    solver: str
    budget: int
    loss: float
    accuracy: float
    evaluations: float
    residual: float
    converged: float
    seconds: float


def measure(model, criterion, samples, solver: FixedPointConfig | None, label: str, device: str) -> Row:
    """Evaluate one position of the dial; ``None`` leaves the checkpoint as trained."""
    depth: EquilibriumDepth = model.encoder.depth
    trained = depth.config
    if solver is not None:
        # An unrolled model is read at its equilibrium here.
        gradient = trained.gradient if trained.gradient.uses_solver else Implicit(adjoint=trained.gradient.adjoint)
        depth.config = dataclasses.replace(trained, gradient=gradient, evaluation=solver)
    try:
        totals = validation.totals(model, criterion, samples, NAMES, device)
    finally:
        depth.config = trained
    tokens, batches = max(totals["sample_size"], 1.0), max(totals["batches"], 1.0)
    return Row(
        label,
        solver.max_iter if solver is not None else trained.solver.max_iter,
        totals["loss"] / tokens,
        100.0 * totals["correct"] / tokens,
        totals["evaluations"] / batches,
        totals["residual"] / batches,
        100.0 * totals["converged_share"] / batches,
        totals["seconds"],
    )


def table(rows: list[Row]) -> str:
    lines = [
        f"{'solver':<12}{'budget':>7}{'loss':>9}{'change':>9}{'accuracy':>10}{'evaluations':>13}{'residual':>10}"
        f"{'converged':>11}{'time':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row.solver:<12}{row.budget:>7}{row.loss:>9.4f}{row.loss - rows[0].loss:>+9.4f}{row.accuracy:>9.2f}%"
            f"{row.evaluations:>13.1f}{row.residual:>10.1e}{row.converged:>10.0f}%{row.seconds / rows[0].seconds:>7.2f}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], title: str) -> pictures.Figure:
    figure, panels = pictures.figure(1, 2, size=(9, 4))
    for panel, name in zip(panels, ("loss", "accuracy")):
        for number, solver in enumerate(dict.fromkeys(row.solver for row in rows[1:])):
            points = sorted((row.evaluations, getattr(row, name)) for row in rows[1:] if row.solver == solver)
            pictures.line(panel, *zip(*points), number, solver)
        panel.plot([rows[0].evaluations], [getattr(rows[0], name)], "k*", markersize=11, label="as trained")
        panel.set_xlabel("evaluations of the cell per sample")
        pictures.logarithmic(panel.xaxis, counts=True)
    panels[0].set_ylabel("loss (nats per masked token)")
    panels[1].set_ylabel("accuracy (% of masked tokens)")
    panels[0].legend()
    figure.suptitle(title)
    return figure


def sweep(options: argparse.Namespace) -> tuple[list[Row], int]:
    """All rows, that of the training first, and the number of blocks that they were measured on.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a deq_bert, or an impossible solver, budget or tolerance.
    """
    solvers = [
        FixedPointConfig(solver, int(budget), options.tol)
        for solver in options.solvers.split(",")
        for budget in (options.budgets or BUDGETS[options.all]).split(",")
    ]
    for config in solvers:
        config.tolerance_for(torch.float32)
    model, cfg, task = validation.open_checkpoint(options.checkpoint, options.data, options.device)
    if not isinstance(model.encoder.depth, EquilibriumDepth):
        raise ValueError(
            f"the checkpoint holds {cfg.model._name}, which has no equilibrium: take scripts/depth_sweep.py"
        )
    samples = validation.batches(task, options.subset, options.batch_size, validation.batch_limit(options))
    criterion = task.build_criterion(cfg.criterion).eval()
    rows = [measure(model, criterion, samples, None, "as trained", options.device)]
    rows += [measure(model, criterion, samples, config, config.method, options.device) for config in solvers]
    return rows, sum(len(sample["id"]) for sample in samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    validation.add_dial_arguments(parser)
    parser.add_argument("--solvers", default=",".join(METHODS), help=f"(default: {','.join(METHODS)})")
    parser.add_argument("--budgets", help=f"(default: {BUDGETS[False]}; with --all {BUDGETS[True]})")
    parser.add_argument("--tol", type=float, default=1e-4, help="relative tolerance that ends a solve early")
    parser.add_argument("--out", metavar="PNG", help="picture of loss and accuracy against evaluations")
    options = parser.parse_args()
    try:
        if options.out:
            pictures.check(options.out)
        rows, blocks = sweep(options)
        sys.stdout.write(
            f"{options.checkpoint}: {counted(blocks, 'block')} of {options.subset} in {options.data}; "
            f"{conditions(options.device, torch.get_num_threads())}\n{table(rows)}\n"
        )
        for row in rows:
            if not math.isfinite(row.loss):
                sys.stderr.write(f"{row.solver}, budget {row.budget}: the loss is not finite\n")
        if options.out:
            title = os.path.basename(os.path.dirname(os.path.abspath(options.checkpoint)))
            pictures.save(plot(rows, title), options.out)
            sys.stdout.write(f"  {options.out}\n")
    except OptionError as error:
        flag = {"solver": "--solvers", "max_iter": "--budgets", "tol": "--tol"}.get(error.option, error.option)
        sys.exit(f"deq_budget_sweep: {flag}: {error.sentence}")
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"deq_budget_sweep: {error}")


if __name__ == "__main__":
    main()
