"""Depth as a dial: one checkpoint under other schemes, step counts and tolerances.

    python scripts/depth_sweep.py checkpoint_best.pt DATA --out dial.png
    python scripts/depth_sweep.py checkpoint_best.pt DATA --schemes euler,rk4 --steps 1,2,4 --tolerances 1e-1,1e-2

Evaluates the validation set under every setting, none of which changes a weight, and prints loss, accuracy, evaluations
of the field per sample, and time relative to the first setting; the picture shows loss against evaluations. Step counts
are per block for ode_bert and over the whole depth for neural_ode_bert. With --splits an ode_bert is also opened with
each layer cut into that many blocks (progressive depth).
"""

import argparse
import logging
import math
import os
import platform
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import matplotlib

matplotlib.use("Agg")
import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq import checkpoint_utils, utils  # noqa: E402

import fairseq_implicit  # noqa: E402, F401  (registers models, task and criterion)
from fairseq_implicit.solvers.adaptive import PAIRS  # noqa: E402


class Setting(NamedTuple):
    """One position of the dial. ``line`` groups the settings of one curve."""

    line: str
    label: str
    overrides: Dict[str, Any]


class Measured(NamedTuple):
    """Averages over the subset: loss in nats and accuracy in percent per masked token, evaluations per sample."""

    setting: Setting
    loss: float
    accuracy: float
    evaluations: float
    seconds: float


def settings(model: str, trained: Dict[str, Any], options: argparse.Namespace) -> List[Setting]:
    """All positions of the dial, that of the training first.

    Raises ValueError for a model without a dial.
    """
    if model.startswith("neural_ode_bert"):
        # Whatever concerned training alone, or an adaptive solve alone, must not stand in the way of the others.
        plain = dict(
            ode_gradient="autograd", ode_backend="own", ode_random_steps=None, ode_kinetic_energy=0.0, ode_jacobian=0.0,
            ode_local_error=0.0, ode_step_control="auto",
        )  # fmt: skip
        default_steps = "1,2,3,4,6,8,12"
    elif model.startswith("ode_bert"):
        plain = dict(ode_gradient="autograd", ode_random_steps=None, ode_tolerance=0.0, enc_calculate_num=None)
        default_steps = "1,2,3,4"
    else:
        raise ValueError(f"the checkpoint holds {model}: the dial turns ode_bert and neural_ode_bert only")
    found = []
    gradient = "reversible" if trained.get("ode_gradient") == "reversible" else "autograd"
    as_trained = {**plain, "ode_gradient": gradient, "ode_tolerance": trained.get("ode_tolerance", 0.0)}
    as_trained.pop("enc_calculate_num", None)
    found.append(Setting("as trained", "as trained", as_trained))
    splits = [int(value) for value in options.splits.split(",")] if model.startswith("ode_bert") else [None]
    for scheme in options.schemes.split(","):
        for split in splits:
            name = scheme if split in (None, trained.get("ode_split", 1)) else f"{scheme}, layers cut in {split}"
            for steps in (options.steps or default_steps).split(","):
                overrides = {**plain, "ode_scheme": scheme, "ode_steps": int(steps), "ode_tolerance": 0.0}
                if split is not None:
                    overrides["ode_split"] = split
                found.append(Setting(name, f"{name}, {steps} steps", overrides))
    for pair in [pair for pair in options.pairs.split(",") if pair]:
        for tolerance in options.tolerances.split(","):
            overrides = {**plain, "ode_scheme": pair, "ode_tolerance": float(tolerance)}
            found.append(Setting(f"{pair}, adaptive", f"{pair}, tolerance {tolerance}", overrides))
    return found


def batches(task, subset: str, batch_size: int, limit: Optional[int]) -> Iterator[Dict[str, Any]]:
    iterator = task.get_batch_iterator(
        task.dataset(subset), max_sentences=batch_size, max_positions=task.max_positions(), ignore_invalid_inputs=True
    ).next_epoch_itr(shuffle=False)
    for number, sample in enumerate(iterator):
        if limit is not None and number >= limit:
            return
        yield sample


def measure(path: str, data: str, setting: Setting, options: argparse.Namespace) -> Measured:
    """Evaluates one setting, with masks that are the same for all."""
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [path], arg_overrides={"data": data, **setting.overrides}
    )
    model = models[0].to(options.device).eval()
    task.load_dataset(options.subset)
    criterion = task.build_criterion(cfg.criterion).eval()
    totals = dict.fromkeys(("loss", "correct", "sample_size", "evaluations", "batches", "seconds"), 0.0)
    with torch.no_grad():
        for sample in batches(task, options.subset, options.batch_size, options.batches):
            if options.device != "cpu":
                sample = utils.move_to_cuda(sample)
            start = time.perf_counter()
            _, _, logged = criterion(model, sample)
            counts = {name: float(logged[name]) for name in totals if name != "seconds"}
            totals["seconds"] += time.perf_counter() - start
            for name, value in counts.items():
                totals[name] += value
    tokens = max(totals["sample_size"], 1.0)
    return Measured(
        setting,
        totals["loss"] / tokens,
        100.0 * totals["correct"] / tokens,
        totals["evaluations"] / max(totals["batches"], 1.0),
        totals["seconds"],
    )


def table(results: List[Measured]) -> str:
    first = results[0]
    width = max(len(one.setting.label) for one in results) + 2
    lines = [f"{'setting':<{width}}{'loss':>9}{'change':>9}{'accuracy':>10}{'evaluations':>13}{'time':>8}"]
    for one in results:
        lines.append(
            f"{one.setting.label:<{width}}{one.loss:>9.4f}{one.loss - first.loss:>+9.4f}{one.accuracy:>9.2f}%"
            f"{one.evaluations:>13.1f}{one.seconds / first.seconds:>8.2f}"
        )
    return "\n".join(lines)


def plot(results: List[Measured], out: str, title: str) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150)
    for line in dict.fromkeys(one.setting.line for one in results[1:]):
        points = sorted((one.evaluations, one.loss) for one in results[1:] if one.setting.line == line)
        style = "--" if "adaptive" in line else "-"
        axes.plot(*zip(*points), marker="o", markersize=4, linewidth=1.5, linestyle=style, label=line)
    axes.plot([results[0].evaluations], [results[0].loss], "k*", markersize=11, label="as trained")
    axes.set_xscale("log")
    axes.set_xlabel("evaluations of the field per sample")
    axes.set_ylabel("loss (nats per masked token)")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DATA", help="data folder, as for fairseq-validate")
    parser.add_argument("--schemes", default="euler,rk2,rk4", help="of fixed steps (default: euler,rk2,rk4)")
    parser.add_argument("--steps", help="per block (default: 1,2,3,4), or over the depth (default: 1,2,3,4,6,8,12)")
    parser.add_argument("--splits", default="1", help="blocks per layer of an ode_bert (default: 1)")
    parser.add_argument("--pairs", default="bosh3", help=f"of adaptive steps: {','.join(PAIRS)}; empty: none")
    parser.add_argument("--tolerances", default="1e-1,1e-2,1e-3", help="(default: 1e-1,1e-2,1e-3)")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, help="evaluate only so many batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", metavar="PNG", help="picture of loss against evaluations")
    options = parser.parse_args()
    try:
        if not os.path.isfile(options.checkpoint):
            raise FileNotFoundError(f"there is no checkpoint {options.checkpoint}")
        state = checkpoint_utils.load_checkpoint_to_cpu(options.checkpoint)
        trained = state["cfg"]["model"]
        model = trained["_name"]
        results: List[Measured] = []
        for setting in settings(model, trained, options):
            results.append(measure(options.checkpoint, options.data, setting, options))
            if not math.isfinite(results[-1].loss):
                sys.stderr.write(f"{setting.label}: the loss is not finite\n")
        sys.stdout.write(
            f"{options.checkpoint}: {model}, {options.subset} of {options.data}; torch {torch.__version__}, "
            f"{options.device}, {torch.get_num_threads()} threads, {platform.machine()}\n{table(results)}\n"
        )
        if options.out:
            plot(results, options.out, model)
            sys.stdout.write(f"  {options.out}\n")
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"depth_sweep: {error}")


if __name__ == "__main__":
    main()
