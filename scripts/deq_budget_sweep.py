"""An equilibrium as a dial: loss, accuracy and time of one checkpoint against the evaluation budget.

    python scripts/deq_budget_sweep.py checkpoint_best.pt DATA --out budget.png
    python scripts/deq_budget_sweep.py checkpoint_best.pt DATA --solvers picard,anderson --budgets 1,2,4,8 --tol 1e-4

Evaluates the validation set, always with the same masks, under every solver and budget, none of which changes a weight.
The first row is the checkpoint as trained; times are relative to it.
"""

import argparse
import dataclasses
import logging
import os
import platform
import sys
import time
from typing import List, NamedTuple, Optional

import matplotlib

matplotlib.use("Agg")
import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq import checkpoint_utils, utils  # noqa: E402

import fairseq_implicit  # noqa: E402, F401  (registers models, task and criterion)
from fairseq_implicit.depth.equilibrium import EquilibriumDepth  # noqa: E402
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig, OptionError  # noqa: E402

NAMES = ("loss", "correct", "sample_size", "evaluations", "residual", "converged_share", "batches")


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


def measure(model, criterion, samples, solver: Optional[FixedPointConfig], label: str, device: str) -> Row:
    """Evaluate one position of the dial; ``None`` leaves the checkpoint as trained."""
    depth: EquilibriumDepth = model.encoder.depth
    trained = depth.config
    if solver is not None:
        # An unrolled model is read at its equilibrium here.
        gradient = (
            trained.gradient if trained.gradient.uses_solver else dataclasses.replace(trained.gradient, kind="ift")
        )
        depth.config = dataclasses.replace(trained, gradient=gradient, evaluation=solver)
    totals, seconds = dict.fromkeys(NAMES, 0.0), 0.0
    try:
        with torch.no_grad():
            for sample in samples:
                sample = sample if device == "cpu" else utils.move_to_cuda(sample)
                start = time.perf_counter()
                _, _, logged = criterion(model, sample)
                counts = {name: float(logged[name]) for name in NAMES}
                seconds += time.perf_counter() - start
                for name, value in counts.items():
                    totals[name] += value
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
        seconds,
    )


def table(rows: List[Row]) -> str:
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


def plot(rows: List[Row], out: str, title: str) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), dpi=150)
    for panel, name in zip(panels, ("loss", "accuracy")):
        for solver in dict.fromkeys(row.solver for row in rows[1:]):
            points = [(row.evaluations, getattr(row, name)) for row in rows[1:] if row.solver == solver]
            panel.plot(*zip(*sorted(points)), marker="o", markersize=4, linewidth=1.5, label=solver)
        panel.plot([rows[0].evaluations], [getattr(rows[0], name)], "k*", markersize=11, label="as trained")
        panel.set_xscale("log")
        panel.set_xlabel("evaluations of the cell per sample")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("loss (nats per masked token)")
    panels[1].set_ylabel("accuracy (% of masked tokens)")
    panels[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)


def sweep(options: argparse.Namespace) -> List[Row]:
    """All rows, that of the training first.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a deq_bert, or an impossible solver, budget or tolerance.
    """
    if not os.path.isfile(options.checkpoint):
        raise FileNotFoundError(f"there is no checkpoint {options.checkpoint}")
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [options.checkpoint], arg_overrides={"data": options.data}
    )
    model = models[0].to(options.device).eval()
    if not isinstance(model.encoder.depth, EquilibriumDepth):
        raise ValueError(
            f"the checkpoint holds {cfg.model._name}, which has no equilibrium: take scripts/depth_sweep.py"
        )
    task.load_dataset(options.subset)
    criterion = task.build_criterion(cfg.criterion).eval()
    iterator = task.get_batch_iterator(
        task.dataset(options.subset), max_sentences=options.batch_size, max_positions=task.max_positions()
    ).next_epoch_itr(shuffle=False)
    samples = [sample for number, sample in enumerate(iterator) if options.batches is None or number < options.batches]
    rows = [measure(model, criterion, samples, None, "as trained", options.device)]
    for solver in options.solvers.split(","):
        for budget in options.budgets.split(","):
            config = FixedPointConfig(solver, int(budget), options.tol)
            config.tolerance_for(torch.float32)
            rows.append(measure(model, criterion, samples, config, solver, options.device))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DATA", help="data folder, as for fairseq-validate")
    parser.add_argument("--solvers", default=",".join(METHODS), help=f"(default: {','.join(METHODS)})")
    parser.add_argument("--budgets", default="1,2,3,4,6,8,12,16,24", help="(default: 1,2,3,4,6,8,12,16,24)")
    parser.add_argument("--tol", type=float, default=1e-4, help="relative tolerance that ends a solve early")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, help="evaluate only so many batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", metavar="PNG", help="picture of loss and accuracy against evaluations")
    options = parser.parse_args()
    try:
        rows = sweep(options)
    except OptionError as error:
        flag = {"solver": "--solvers", "max_iter": "--budgets", "tol": "--tol"}.get(error.option, error.option)
        sys.exit(f"deq_budget_sweep: {flag}: {error.sentence}")
    except (OSError, ValueError) as error:
        sys.exit(f"deq_budget_sweep: {error}")
    sys.stdout.write(
        f"{options.checkpoint}: {options.subset} of {options.data}; torch {torch.__version__}, {options.device}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}\n{table(rows)}\n"
    )
    if options.out:
        plot(rows, options.out, os.path.basename(os.path.dirname(os.path.abspath(options.checkpoint))))
        sys.stdout.write(f"  {options.out}\n")


if __name__ == "__main__":
    main()
