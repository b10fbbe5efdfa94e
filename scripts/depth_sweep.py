"""Depth as a dial: one checkpoint under other schemes, step counts and tolerances.

    python scripts/depth_sweep.py checkpoint_best.pt DATA --out dial.png
    python scripts/depth_sweep.py checkpoint_best.pt DATA --all --out dial.png
    python scripts/depth_sweep.py checkpoint_best.pt DATA --schemes euler,rk4 --steps 1,2,4 --tolerances 1e-1,1e-2

Evaluates a few batches under a few settings, none of which changes a weight; with --all the whole validation set under
more of them. Prints loss, accuracy, evaluations of the field per sample, and time relative to the first setting; the
picture shows loss against evaluations. Step counts are per block for ode_bert and over the whole depth for
neural_ode_bert. With --splits an ode_bert is also opened with each layer cut into that many blocks (progressive depth).
"""

import argparse
import logging
import math
import os
import sys
from typing import Any, NamedTuple

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import

from fairseq_implicit.solvers.adaptive import PAIRS  # noqa: E402
from scripts import pictures, validation  # noqa: E402
from scripts.side_by_side import conditions, counted  # noqa: E402

NAMES = ("loss", "correct", "sample_size", "evaluations", "batches")
# By --all.
SCHEMES = {False: "euler,rk4", True: "euler,rk2,rk4"}
STEPS = {
    "ode_bert": {False: "1,2", True: "1,2,3,4"},  # of each block
    "neural_ode_bert": {False: "1,4,12", True: "1,2,3,4,6,8,12"},  # of the whole depth
}
TOLERANCES = {False: "1e-1,1e-2", True: "1e-1,1e-2,1e-3"}


class Setting(NamedTuple):
    """One position of the dial. ``line`` groups the settings of one curve."""

    line: str
    label: str
    overrides: dict[str, Any]


class Measured(NamedTuple):
    """Averages over ``blocks``: loss in nats and accuracy in percent per masked token, evaluations per sample."""

    setting: Setting
    loss: float
    accuracy: float
    evaluations: float
    seconds: float
    blocks: int


def settings(model: str, trained: dict[str, Any], options: argparse.Namespace) -> list[Setting]:
    """All positions of the dial, that of the training first.

    Raises ValueError for a model without a dial.
    """
    if model.startswith("neural_ode_bert"):
        # Whatever concerned training alone, or an adaptive solve alone, must not stand in the way of the others.
        plain = dict(
            ode_gradient="autograd", ode_backend="own", ode_random_steps=None, ode_kinetic_energy=0.0, ode_jacobian=0.0,
            ode_local_error=0.0, ode_step_control="auto",
        )  # fmt: skip
        steps_of = STEPS["neural_ode_bert"]
    elif model.startswith("ode_bert"):
        plain = dict(ode_gradient="autograd", ode_random_steps=None, ode_tolerance=0.0, enc_calculate_num=None)
        steps_of = STEPS["ode_bert"]
    else:
        raise ValueError(f"the checkpoint holds {model}: the dial turns ode_bert and neural_ode_bert only")
    found = []
    gradient = "reversible" if trained.get("ode_gradient") == "reversible" else "autograd"
    as_trained = {**plain, "ode_gradient": gradient, "ode_tolerance": trained.get("ode_tolerance", 0.0)}
    as_trained.pop("enc_calculate_num", None)
    found.append(Setting("as trained", "as trained", as_trained))
    splits = [int(value) for value in options.splits.split(",")] if model.startswith("ode_bert") else [None]
    for scheme in (options.schemes or SCHEMES[options.all]).split(","):
        for split in splits:
            name = scheme if split in (None, trained.get("ode_split", 1)) else f"{scheme}, layers cut in {split}"
            for steps in (options.steps or steps_of[options.all]).split(","):
                overrides = {**plain, "ode_scheme": scheme, "ode_steps": int(steps), "ode_tolerance": 0.0}
                if split is not None:
                    overrides["ode_split"] = split
                found.append(Setting(name, f"{name}, {counted(int(steps), 'step')}", overrides))
    for pair in [pair for pair in options.pairs.split(",") if pair]:
        for tolerance in (options.tolerances or TOLERANCES[options.all]).split(","):
            overrides = {**plain, "ode_scheme": pair, "ode_tolerance": float(tolerance)}
            found.append(Setting(f"{pair}, adaptive", f"{pair}, tolerance {tolerance}", overrides))
    return found


def measure(setting: Setting, options: argparse.Namespace) -> Measured:
    """Evaluates one setting, with masks that are the same for all."""
    model, cfg, task = validation.open_checkpoint(options.checkpoint, options.data, options.device, **setting.overrides)
    samples = validation.batches(task, options.subset, options.batch_size, validation.batch_limit(options))
    criterion = task.build_criterion(cfg.criterion).eval()
    totals = validation.totals(model, criterion, samples, NAMES, options.device)
    tokens = max(totals["sample_size"], 1.0)
    return Measured(
        setting,
        totals["loss"] / tokens,
        100.0 * totals["correct"] / tokens,
        totals["evaluations"] / max(totals["batches"], 1.0),
        totals["seconds"],
        sum(len(sample["id"]) for sample in samples),
    )


def table(results: list[Measured]) -> str:
    first = results[0]
    width = max(len(one.setting.label) for one in results) + 2
    lines = [f"{'setting':<{width}}{'loss':>9}{'change':>9}{'accuracy':>10}{'evaluations':>13}{'time':>8}"]
    for one in results:
        lines.append(
            f"{one.setting.label:<{width}}{one.loss:>9.4f}{one.loss - first.loss:>+9.4f}{one.accuracy:>9.2f}%"
            f"{one.evaluations:>13.1f}{one.seconds / first.seconds:>8.2f}"
        )
    return "\n".join(lines)


def plot(results: list[Measured], title: str) -> pictures.Figure:
    figure, axes = pictures.figure()
    for number, line in enumerate(dict.fromkeys(one.setting.line for one in results[1:])):
        points = sorted((one.evaluations, one.loss) for one in results[1:] if one.setting.line == line)
        pictures.line(axes, *zip(*points), number, line)
    axes.plot([results[0].evaluations], [results[0].loss], "k*", markersize=11, label="as trained")
    axes.set_xlabel("evaluations of the field per sample")
    axes.set_ylabel("loss (nats per masked token)")
    axes.set_title(title)
    axes.legend()
    pictures.logarithmic(axes.xaxis, counts=True)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    validation.add_dial_arguments(parser)
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
    options = parser.parse_args()
    try:
        if options.out:
            pictures.check(options.out)
        trained = validation.stored(options.checkpoint)["cfg"]["model"]
        results: list[Measured] = []
        for setting in settings(trained["_name"], trained, options):
            results.append(measure(setting, options))
            if not math.isfinite(results[-1].loss):
                sys.stderr.write(f"{setting.label}: the loss is not finite\n")
        sys.stdout.write(
            f"{options.checkpoint}: {trained['_name']}, {counted(results[0].blocks, 'block')} of {options.subset} in "
            f"{options.data}; {conditions(options.device, torch.get_num_threads())}\n{table(results)}\n"
        )
        if options.out:
            pictures.save(plot(results, trained["_name"]), options.out)
            sys.stdout.write(f"  {options.out}\n")
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"depth_sweep: {error}")


if __name__ == "__main__":
    main()
