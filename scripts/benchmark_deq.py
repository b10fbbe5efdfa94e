"""What an equilibrium costs and how good its gradients are. Four tables, each also alone:

overhead    time per solver iteration over the bare cell
step        a whole training step against torchdeq: same cell, input, solver and tolerances
gradients   cosine of every approximate gradient to the exact one, on cells from easy to hard
initial     evaluations to a relative residual of 1e-3 at initialisation

What is compared takes turns, one call each per round, so that whatever else the machine does hits all alike; the
ratio of the medians is what counts, and on a busy machine that of the minima, in CPU time.

    python -m scripts.benchmark_deq --part overhead step
    python -m scripts.benchmark_deq --part step --threads 1 --cpu-time
"""

import argparse
import importlib.util
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable

warnings.filterwarnings("ignore")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

logging.disable(logging.INFO)

from fairseq_implicit.commands.checkpoint_arguments import device  # noqa: E402
from fairseq_implicit.commands.wording import conditions, counted  # noqa: E402
from fairseq_implicit.families.bert import SIZES  # noqa: E402
from fairseq_implicit.families.deq_bert import MATCHED_SIZES  # noqa: E402
from fairseq_implicit.fields.equilibrium_cell import CellConfig, EquilibriumCell  # noqa: E402
from fairseq_implicit.fields.injection import InjectionConfig  # noqa: E402
from fairseq_implicit.fields.mixers.attention import AttentionConfig  # noqa: E402
from fairseq_implicit.fields.transformer import TransformerFieldConfig  # noqa: E402
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig, solve  # noqa: E402
from fairseq_implicit.solvers.gradients.equilibrium import Equilibrium, EquilibriumGradient  # noqa: E402
from fairseq_implicit.solvers.gradients.implicit import Implicit  # noqa: E402
from fairseq_implicit.solvers.gradients.names import parse_gradient  # noqa: E402
from fairseq_implicit.solvers.gradients.record import AdjointRecord  # noqa: E402
from fairseq_implicit.solvers.jacobian import spectral_radius  # noqa: E402
from scripts.side_by_side import all_seconds, median_seconds  # noqa: E402

PARTS = ("overhead", "step", "gradients", "initial")
SMALL = dict(batch=8, length=128, dim=256, ffn_dim=1024, heads=4)
GOALS = {"picard": 1.3, "anderson": 1.6, "broyden": 2.5}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--base-batch", type=int, default=2, help="sequences of 128 tokens at base size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true", help="part step: CPU time of the process, not the wall's")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


class Bench:
    """Seeds, device and the clock."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)

    def cell(self, dim: int, ffn_dim: int, heads: int, kind: str = "post-norm", gain: float = 1.0, std: float = 0.02):
        torch.manual_seed(self.options.seed)
        layer = TransformerFieldConfig(dim, ffn_dim, AttentionConfig(heads), kind)
        return EquilibriumCell(CellConfig(layer, injection=InjectionConfig(gain=gain), initial_std=std)).to(self.device)

    def input(self, batch: int, length: int, dim: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randn(batch, length, dim, generator=generator).to(self.device)

    def medians(self, calls: dict[str, Callable[[], None]]) -> dict[str, float]:
        return median_seconds(calls, self.options.rounds, warm_up=1)


def solvers_and_bare_cell(f: Callable[[Tensor], Tensor], x: Tensor, budget: int) -> dict[str, Callable[[], None]]:
    """So many evaluations of a prepared cell, by each solver and alone."""

    def bare() -> None:
        z = torch.zeros_like(x)
        for _ in range(budget):
            z = f(z)

    def solved(method: str) -> Callable[[], None]:
        # An absolute tolerance that nothing meets: every solver spends the whole budget.
        config = FixedPointConfig(method, budget, 1e-30, "absolute")
        return lambda: solve(f, torch.zeros_like(x), config)

    return {"bare": bare, **{method: solved(method) for method in METHODS}}


def overhead(bench: Bench) -> None:
    """Twenty evaluations inside each solver against twenty evaluations of the bare cell."""
    budget = 20
    base = SIZES["base"]
    shapes = {
        "(8, 128, 256)": SMALL,
        f"base ({bench.options.base_batch}, 128, 768)": dict(
            batch=bench.options.base_batch,
            length=128,
            dim=base["encoder_embed_dim"],
            ffn_dim=base["encoder_ffn_embed_dim"],
            heads=base["encoder_attention_heads"],
        ),
    }
    print(f"\n{'time per iteration / bare cell':<32}" + "".join(f"{method:>12}" for method in METHODS))
    for name, shape in shapes.items():
        cell = bench.cell(shape["dim"], shape["ffn_dim"], shape["heads"])
        x = bench.input(shape["batch"], shape["length"], shape["dim"])
        with torch.no_grad():
            found = bench.medians(solvers_and_bare_cell(cell.prepare(x), x, budget))
        print(f"{name:<32}" + "".join(f"{found[method] / found['bare']:>11.2f}x" for method in METHODS))
    print(f"{'goal at (8, 128, 256)':<32}" + "".join(f"{GOALS[method]:>11.2f}x" for method in METHODS))


class Counted:
    """A cell's map that counts its evaluations."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f, self.evaluations = f, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.evaluations += 1
        return self.f(z)


def training_steps(
    cell: EquilibriumCell, x: Tensor, tol: float, spent: dict[str, tuple[int, int]]
) -> dict[str, Callable[[], None]]:
    """A training step of torchdeq, ours, and the cell's share of ours.

    The first two note in ``spent`` how often they evaluated the cell and how many products with its Jacobian the
    adjoint took; ``bare`` does as many as ours, with the backward pass at the end, and nothing besides.
    """
    from torchdeq import get_deq

    budget = 40
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.device)
    deq = get_deq(
        core="indexing", ift=True, f_solver="anderson", b_solver="anderson", f_max_iter=budget, b_max_iter=budget,
        f_tol=tol, b_tol=tol, f_stop_mode="rel", b_stop_mode="rel",
    )  # fmt: skip
    config = FixedPointConfig("anderson", budget, tol)
    gradient = Implicit(adjoint=FixedPointConfig("anderson", budget, tol))

    def theirs() -> None:
        cell.zero_grad()
        f, products = Counted(cell.prepare(x)), []
        states, _ = deq(f, torch.zeros_like(x), backward_writer=lambda info: products.append(int(info["nstep"].max())))
        (states[-1] * target).sum().backward()
        spent["theirs"] = f.evaluations, products[0]

    def ours() -> None:
        cell.zero_grad()
        f, record = Counted(cell.prepare(x)), AdjointRecord()
        found = gradient.equilibrium(f, torch.zeros_like(x), config, record=record)
        (found.state * target).sum().backward()
        spent["ours"] = f.evaluations, int(torch.as_tensor(record.evaluations).max())

    def bare() -> None:
        evaluations, products = spent["ours"]
        cell.zero_grad()
        f, z = cell.prepare(x), torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(evaluations - 1):
                z = f(z)
        anchor = z.requires_grad_()
        state = f(anchor)
        for _ in range(products):
            torch.autograd.grad(state, anchor, target, retain_graph=True)
        (state * target).sum().backward()

    return {"theirs": theirs, "ours": ours, "bare": bare}


def step(bench: Bench) -> None:
    """Forward and backward to the same tolerances, exact gradient, Anderson both ways."""
    if importlib.util.find_spec("torchdeq") is None:
        print("\ntraining step: torchdeq is not installed, nothing to compare with")
        return
    clock = time.process_time if bench.options.cpu_time else time.perf_counter
    heads = ("medians", "minima", "at most", "evaluations, products (theirs; ours)", "our solver's share")
    widths = (10, 10, 10, 40, 22)
    print(
        f"\n{'training step: torchdeq / ours':<32}"
        + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    )
    x = bench.input(SMALL["batch"], SMALL["length"], SMALL["dim"])
    for std, tol in ((0.02, 1e-3), (0.05, 1e-3), (0.02, 1e-4), (0.05, 1e-4), (0.02, 1e-5), (0.05, 1e-5)):
        cell = bench.cell(SMALL["dim"], SMALL["ffn_dim"], SMALL["heads"], std=std)
        spent: dict[str, tuple[int, int]] = {}
        times = all_seconds(training_steps(cell, x, tol, spent), bench.options.rounds, warm_up=1, clock=clock)
        median = {name: statistics.median(found) for name, found in times.items()}
        least = {name: min(found) for name, found in times.items()}
        counts = "; ".join(f"{spent[name][0]}, {spent[name][1]}" for name in ("theirs", "ours"))
        print(
            f"{f'weights {std:g}, tolerance {tol:.0e}':<32}"
            f"{median['theirs'] / median['ours']:>9.2f}x{least['theirs'] / least['ours']:>9.2f}x"
            f"{least['theirs'] / least['bare']:>9.2f}x{counts:>40}{1 - least['bare'] / least['ours']:>22.1%}",
            flush=True,
        )
    print("goal: 1.30x; at most: what a solver of no cost would reach with our evaluations and products (minima)")


def gradient_of(
    cell: EquilibriumCell, x: Tensor, gradient: EquilibriumGradient, solver: FixedPointConfig
) -> tuple[Tensor, Equilibrium]:
    """The gradient in all parameters and the input, flat, and the equilibrium that it was taken at."""
    cell.zero_grad()
    leaf = x.clone().requires_grad_()
    f = cell.prepare(leaf)
    result = gradient.equilibrium(f, torch.zeros_like(x), solver, depends_on=f.depends_on)
    weight = torch.arange(x.numel(), dtype=x.dtype, device=x.device).view_as(x).sin()
    (result.state * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in cell.parameters()] + [leaf.grad.flatten()]), result


def gradients(bench: Bench) -> None:
    """Cosine of the gradient in all parameters and the input to the exact one, float64."""
    modes = ("jfb", "phantom-2", "phantom-4", "phantom-8", "neumann-4", "neumann-8", "reversible", "ift")
    print(f"\n{'cosine to the exact gradient':<30}{'radius':>8}" + "".join(f"{mode:>12}" for mode in modes))
    for std, gain in ((0.02, 1.0), (0.1, 1.0), (0.3, 0.3), (0.2, 0.5)):
        cell = bench.cell(64, 256, 4, gain=gain, std=std).double()
        x = bench.input(4, 16, 64).double()

        sharp = FixedPointConfig("broyden", 400, 1e-10)
        exact, solved = gradient_of(cell, x, Implicit(adjoint=FixedPointConfig("broyden", 600, 1e-10)), sharp)
        radius = float(spectral_radius(cell.prepare(x), solved.solve.state, 60).max())
        row = []
        for mode in modes:
            if mode == "ift":
                # As trained: tolerances of 1e-3 both ways and thirty evaluations.
                loose = FixedPointConfig("anderson", 30, 1e-3)
                candidate, _ = gradient_of(cell, x, Implicit(adjoint=loose), loose)
            elif mode == "reversible":
                candidate, _ = gradient_of(cell, x, parse_gradient(mode), FixedPointConfig(max_iter=24))
            else:
                candidate, _ = gradient_of(cell, x, parse_gradient(mode), sharp)
            row.append(torch.nn.functional.cosine_similarity(candidate, exact, dim=0).item())
        print(f"{f'std {std:g}, gain {gain:g}':<30}{radius:>8.2f}" + "".join(f"{cosine:>12.4f}" for cosine in row))
    print("ift: Anderson, tolerances 1e-3, at most 30 evaluations each way; reversible: 24 evaluations, β 0.5")


def initial(bench: Bench) -> None:
    """Fresh cells of the presets, and of base size with one ordinary layer."""
    print(f"\n{'evaluations to 1e-3':<32}{'radius':>8}" + "".join(f"{method:>12}" for method in METHODS))
    shapes = {f"deq_bert_{size}": MATCHED_SIZES[size] for size in ("tiny", "small", "base")}
    shapes["base, ffn 3072"] = SIZES["base"]
    for name, shape in shapes.items():
        for kind in ("post-norm", "pre-norm"):
            dim = shape["encoder_embed_dim"]
            cell = bench.cell(dim, shape["encoder_ffn_embed_dim"], shape["encoder_attention_heads"], kind)
            x = torch.nn.functional.layer_norm(bench.input(2, 64, dim), (dim,))
            with torch.no_grad():
                f = cell.prepare(x)
                results = [solve(f, torch.zeros_like(x), FixedPointConfig(method, 30, 1e-3)) for method in METHODS]
            radius = float(spectral_radius(f, results[1].state, 12).max())
            row = [int(result.evaluations.max()) if result.converged.all() else -1 for result in results]
            print(f"{f'{name}, {kind}':<32}{radius:>8.2f}" + "".join(f"{count:>12}" for count in row))
    print("goal at base size (768 wide, 12 heads): 12; -1: not within 30")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(
        f"{conditions(options.device, options.threads)}, {counted(os.cpu_count() or 1, 'core')}, seed {options.seed}, "
        f"{counted(options.rounds, 'round')}"
    )
    bench = Bench(options)
    for part in options.part:
        {"overhead": overhead, "step": step, "gradients": gradients, "initial": initial}[part](bench)


if __name__ == "__main__":
    main()
