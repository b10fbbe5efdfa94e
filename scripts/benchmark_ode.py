"""Time of the own fixed-step RK4 against torchdyn, torchdiffeq and a loop written by hand, and what compiling gains.

All solve the same prepared transformer field over the same steps. They take turns, one solve each per round in an order
that rotates, so that whatever else the machine does hits all alike; the ratios of the medians are what counts. With
--memory the peak memory of the gradients is printed as well: reversible Heun, recomputation, plain autograd.

    python -m scripts.benchmark_ode --rounds 30
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

warnings.filterwarnings("ignore")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

logging.disable(logging.WARNING)  # fairseq announces optional packages, the compiler its locks

from fairseq_implicit.commands.checkpoint_arguments import device  # noqa: E402
from fairseq_implicit.commands.wording import conditions, counted  # noqa: E402
from fairseq_implicit.fields.mixers.attention import AttentionConfig  # noqa: E402
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig  # noqa: E402
from fairseq_implicit.layout import UNPADDED  # noqa: E402
from fairseq_implicit.machine import synchronise  # noqa: E402
from fairseq_implicit.solvers.names import GRADIENTS  # noqa: E402
from fairseq_implicit.solvers.reversible import ReversibleHeun  # noqa: E402
from fairseq_implicit.solvers.runge_kutta import RungeKutta  # noqa: E402
from fairseq_implicit.solvers.solver import Span  # noqa: E402
from scripts.side_by_side import peak_bytes  # noqa: E402

Solve = Callable[[Tensor], Tensor]

# batch, time, dim, heads
SHAPES = {"small": (8, 64, 128, 2), "base": (4, 128, 768, 12)}


def by_hand(f, y: Tensor, steps: int) -> Tensor:
    """The shortest RK4 there is, with the same fused multiply-and-add."""
    h = 1.0 / steps
    for n in range(steps):
        t = n * h
        k1 = f(t, y)
        k2 = f(t + h / 2, torch.add(y, k1, alpha=h / 2))
        k3 = f(t + h / 2, torch.add(y, k2, alpha=h / 2))
        k4 = f(t + h, torch.add(y, k3, alpha=h))
        y = torch.add(y, k1, alpha=h / 6)
        y = torch.add(y, k2, alpha=h / 3)
        y = torch.add(y, k3, alpha=h / 3)
        y = torch.add(y, k4, alpha=h / 6)
    return y


def solvers(field: TransformerField, steps: int, like: Tensor) -> dict[str, Solve]:
    """Solvers of the same problem by name; the libraries where they are installed."""
    solver = RungeKutta("rk4", steps)
    found: dict[str, Solve] = {
        "hand loop": lambda y: by_hand(field.prepare(y), y, steps),
        "own rk4": lambda y: solver.solve(field.prepare(y), y, Span(), UNPADDED).state,
    }
    span = torch.linspace(0, 1, steps + 1, device=like.device)
    try:
        from torchdyn.numerics import odeint as torchdyn_odeint

        def torchdyn(y: Tensor) -> Tensor:
            f = field.prepare(y)
            return torchdyn_odeint(lambda t, z: f(t, z), y, span, solver="rk4")[1][-1]

        found["torchdyn rk4"] = torchdyn
    except ImportError:
        sys.stdout.write("torchdyn is not installed and is left out\n")
    try:
        from torchdiffeq import odeint as torchdiffeq_odeint

        # Its "rk4" is the 3/8 rule: as many stages of the same cost.
        found["torchdiffeq rk4"] = lambda y: torchdiffeq_odeint(field.prepare(y), y, span, method="rk4")[-1]
    except ImportError:
        sys.stdout.write("torchdiffeq is not installed and is left out\n")
    return found


def alternate(solves: dict[str, Solve], y: Tensor, rounds: int, backward: bool) -> dict[str, list[float]]:
    """Seconds of each solve in every round."""
    times: dict[str, list[float]] = {name: [] for name in solves}
    names = list(solves)
    for turn in range(rounds + 3):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            y.grad = None
            synchronise(y.device)
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                state = solves[name](y)
                if backward:
                    state.square().sum().backward()
            synchronise(y.device)
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of the ratio within a round: slow moments of the machine cancel."""
    return statistics.median(one / other for one, other in zip(times[name], times[reference], strict=True))


def backward(solve: Callable[[int], Tensor], steps: int) -> None:
    solve(steps).square().sum().backward()


def report_memory(field: TransformerField, y: Tensor) -> None:
    parameters = list(field.parameters())
    f = field.prepare(y)
    ways: dict[str, Callable[[int], Tensor]] = {
        "reversible heun": lambda n: ReversibleHeun(n).solve(f, y, Span(), parameters=parameters).state,
        "heun2, checkpoint-step": lambda n: (
            RungeKutta("heun2", n, GRADIENTS["checkpoint-step"]).solve(f, y, Span()).state
        ),
        "heun2, autograd": lambda n: RungeKutta("heun2", n).solve(f, y, Span()).state,
    }
    sys.stdout.write("\npeak memory of forward and backward, MiB    4 steps   16 steps   64 steps\n")
    for name, solve in ways.items():
        sizes = [peak_bytes(partial(backward, solve, n)) / 2**20 for n in (4, 16, 64)]
        sys.stdout.write(f"  {name:<40} " + "".join(f"{size:>9.1f}  " for size in sizes) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SHAPES), default=["small", "base"])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled solve (it needs a compiler)")
    parser.add_argument("--memory", action="store_true", help="also print the peak memory of the gradients (CPU)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.stdout.write(
        f"{conditions(options.device, options.threads)}, float32, "
        f"seed {options.seed}, {counted(options.rounds, 'round')}; time over that of the hand loop\n"
    )
    for size in options.sizes:
        batch, length, dim, heads = SHAPES[size]
        torch.manual_seed(options.seed)
        field = TransformerField(TransformerFieldConfig(dim, 4 * dim, AttentionConfig(heads))).to(options.device)
        y = torch.randn(batch, length, dim, device=options.device, requires_grad=True)
        for steps in options.steps:
            found = solvers(field, steps, y)
            if not options.no_compile:
                found["own rk4, compiled"] = torch.compile(found["own rk4"], fullgraph=True)
            title = f"{size} ({batch} x {length} x {dim}), {counted(steps, 'step')}"
            sys.stdout.write(f"\n{title:<34}forward  both passes\n")
            results = [alternate(found, y, options.rounds, backward) for backward in (False, True)]
            for name in found:
                ratios = [ratio(times, name, "hand loop") for times in results]
                sys.stdout.write(f"  {name:<28} {ratios[0]:>12.3f} {ratios[1]:>12.3f}\n")
        if options.memory:
            report_memory(field, y)


if __name__ == "__main__":
    main()
