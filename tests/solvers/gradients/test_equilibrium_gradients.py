"""Gradients of equilibria against unrolling, finite differences and each other."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fairseq_implicit.layout import Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.adjoint_equation import neumann_sum
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.names import EQUILIBRIUM, parse_gradient
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.gradients.reversible_iteration import ReversibleIteration
from fairseq_implicit.solvers.gradients.unrolled import Unrolled
from tests.solvers.cells import ToyCell, toy_input

SHARP = FixedPointConfig("anderson", 200, 1e-13)


def exact(name: str = "ift", **options) -> EquilibriumGradient:
    return parse_gradient(name, adjoint=SHARP, **options)


def cotangent(state: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, state.numel(), dtype=state.dtype).view_as(state).sin()


def gradients(cell, u, gradient, solver=SHARP, record=None):
    """Gradients of one scalar of the equilibrium in every parameter and in the input, by name."""
    u = u.clone().requires_grad_()
    cell.zero_grad()
    found = gradient.equilibrium(
        cell.map(u), torch.zeros_like(u), solver, record=record, depends_on=(u, *cell.parameters())
    )
    (found.state * cotangent(found.state)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in cell.named_parameters()} | {"input": u.grad}


def unrolled(cell, u, steps):
    u = u.clone().requires_grad_()
    cell.zero_grad()
    f, z = cell.map(u), torch.zeros_like(u)
    for _ in range(steps):
        z = f(z)
    (z * cotangent(z)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in cell.named_parameters()} | {"input": u.grad}


def flat(found):
    return torch.cat([gradient.flatten() for gradient in found.values()])


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(flat(one), flat(other), dim=0).item()


def test_ift_equals_a_300_step_unroll_in_every_parameter_and_the_input():
    cell, u = ToyCell(), toy_input()
    reference, ours = unrolled(cell, u, 300), gradients(cell, u, exact())
    assert ours.keys() == reference.keys()
    for name in reference:
        if name == "qkv.bias":
            # The keys' bias shifts every score of a query alike: its gradient is zero, so errors are absolute there.
            assert torch.allclose(ours[name], reference[name], rtol=1e-8, atol=1e-10)
            continue
        error = (ours[name] - reference[name]).norm() / reference[name].norm()
        assert error < 1e-8, f"{name}: {error}"


@pytest.mark.parametrize("method", ["picard", "anderson", "broyden"])
def test_every_adjoint_solver_gives_the_same_gradient(method):
    cell, u = ToyCell(), toy_input()
    adjoint = FixedPointConfig(method, 300, 1e-13)
    ours = gradients(cell, u, Implicit(adjoint=adjoint))
    reference = unrolled(cell, u, 300)
    assert (flat(ours) - flat(reference)).norm() / flat(reference).norm() < 1e-8


class _Solved(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, u):
        return exact().equilibrium(self.cell.map(u), torch.zeros_like(u), SHARP).state


def test_gradcheck_of_the_input_and_the_weights():
    solved, u = _Solved(ToyCell(dim=4, hidden=4)), toy_input(2, 3, 4).requires_grad_()
    names = ["cell.fc2.weight", "cell.qkv.weight", "cell.gain"]
    weights = [solved.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def of(x, *values):
        return torch.func.functional_call(solved, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (u, *weights), fast_mode=True)


def test_padding_carries_no_gradient_and_changes_none():
    cell, u = ToyCell(), toy_input()
    plain = gradients(cell, u, exact())
    padded = torch.cat([u, torch.full((3, 2, 6), 5.0, dtype=u.dtype)], 1)
    layout = Layout(torch.tensor([[True] * 4 + [False] * 2] * 3))
    u_padded = padded.clone().requires_grad_()
    cell.zero_grad()
    found = exact().equilibrium(cell.map(u_padded, layout), torch.zeros_like(padded), SHARP, layout)
    (found.state[:, :4] * cotangent(u)).sum().backward()
    assert torch.allclose(u_padded.grad[:, :4], plain["input"], atol=1e-11)
    assert u_padded.grad[:, 4:].eq(0).all()
    for name, parameter in cell.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], atol=1e-10)


def test_neumann_equals_phantom_at_the_equilibrium():
    cell, u = ToyCell(), toy_input()
    for steps, damping in ((1, 1.0), (4, 1.0), (5, 0.6)):
        neumann = gradients(cell, u, EQUILIBRIUM["neumann"](steps, damping))
        phantom = gradients(cell, u, EQUILIBRIUM["phantom"](steps, damping))
        assert (flat(neumann) - flat(phantom)).norm() / flat(phantom).norm() < 1e-10


def test_jfb_is_one_phantom_step():
    cell, u = ToyCell(), toy_input()
    assert torch.equal(flat(gradients(cell, u, exact("jfb"))), flat(gradients(cell, u, exact("phantom-1"))))


@pytest.mark.parametrize("kind", ["phantom", "neumann"])
def test_the_direction_improves_with_every_doubling_of_the_steps(kind):
    cell, u = ToyCell(gain=0.5, std=0.4), toy_input()
    reference = gradients(cell, u, exact())
    found = [cosine(gradients(cell, u, EQUILIBRIUM[kind](steps)), reference) for steps in (1, 2, 4, 8, 16)]
    assert found == sorted(found) and found[0] < 0.99 and found[-1] > 0.9999


def test_bptt_is_the_written_out_loop():
    cell, u = ToyCell(), toy_input()
    assert torch.equal(flat(gradients(cell, u, exact("bptt-5"))), flat(unrolled(cell, u, 5)))


@pytest.mark.parametrize("damping", [0.5, 0.8])
def test_reversible_gradient_is_that_of_the_same_iteration(damping):
    cell, u = ToyCell(), toy_input()
    ours = gradients(cell, u, exact("reversible", damping=damping), FixedPointConfig(max_iter=12))
    leaf = u.clone().requires_grad_()
    cell.zero_grad()
    f = cell.map(leaf)
    y = z = torch.zeros_like(u)
    for _ in range(6):
        y = (1 - damping) * y + damping * f(z)
        z = (1 - damping) * z + damping * f(y)
    (z * cotangent(z)).sum().backward()
    reference = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()] + [leaf.grad.flatten()])
    assert (flat(ours) - reference).norm() / reference.norm() < 1e-8


@pytest.mark.parametrize(
    "gain, std, damping, budget", [(1.0, 0.3, 0.5, 12), (0.1, 0.1, 0.9, 30), (0.02, 0.02, 0.5, 60)]
)
def test_the_reversible_way_back_estimates_its_own_error(gain, std, damping, budget):
    """Against the same iteration unrolled: where float64 has lost the start, the record says how much it matters."""
    cell, u = ToyCell(gain=gain, std=std), toy_input()
    record = AdjointRecord()
    gradient = exact("reversible", damping=damping)
    ours = gradients(cell, u, gradient, FixedPointConfig(max_iter=budget), record=record)
    u = u.clone().requires_grad_()
    cell.zero_grad()
    f, y = cell.map(u), torch.zeros_like(u)
    z = y
    for _ in range(budget // 2):
        y = (1 - damping) * y + damping * f(z)
        z = (1 - damping) * z + damping * f(y)
    (z * cotangent(z)).sum().backward()
    reference = torch.cat([*(parameter.grad.flatten() for parameter in cell.parameters()), u.grad.flatten()])
    error = ((flat(ours) - reference).norm() / reference.norm()).item()
    estimate = record.residual.max().item()
    assert record.residual.shape == (3,)
    assert error < 30 * estimate + 1e-12 and estimate < 100 * error + 1e-12
    assert (error > 0.05) == (budget > 12)


def test_a_reversible_iteration_that_comes_back_to_nothing_is_an_error():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def forgetful(z):
        # Exact on the way out; on the way back, with a graph, it answers for another state.
        return weight * (z + 1e300 if torch.is_grad_enabled() else 0.5 * z + 1)

    found = ReversibleIteration(damping=0.9).equilibrium(
        forgetful, torch.zeros(1, 1, 1, dtype=torch.float64), FixedPointConfig(max_iter=60), depends_on=(weight,)
    )
    with pytest.raises(ArithmeticError, match="60 evaluations at damping 0.9 .* not finite"):
        found.state.sum().backward()


@pytest.mark.parametrize("damping, most", [(0.5, 106), (0.9, 30)])
def test_a_budget_that_cannot_be_inverted_is_refused(damping, most):
    gradient = exact("reversible", damping=damping)
    gradient.check_budget(most)
    with pytest.raises(OptionError, match=f"give at most {most}") as caught:
        gradient.check_budget(most + 2)
    assert caught.value.option == "max_iter"


def test_reversible_gradient_tends_to_the_exact_one():
    cell, u = ToyCell(), toy_input()
    reference = gradients(cell, u, exact())
    found = [
        cosine(gradients(cell, u, exact("reversible", damping=0.5), FixedPointConfig(max_iter=budget)), reference)
        for budget in (8, 16, 60)
    ]
    assert found == sorted(found) and found[-1] > 0.9999


def test_two_forwards_before_one_backward_and_backward_twice():
    cell, u, other = ToyCell(), toy_input(), toy_input(seed=8)
    alone = flat(gradients(cell, u, exact())), flat(gradients(cell, other, exact()))
    cell.zero_grad()
    leaves = [u.clone().requires_grad_(), other.clone().requires_grad_()]
    states = [exact().equilibrium(cell.map(leaf), torch.zeros_like(leaf), SHARP).state for leaf in leaves]
    loss = sum((state * cotangent(state)).sum() for state in states)
    loss.backward(retain_graph=True)
    names = [name for name, _ in cell.named_parameters()]
    once = torch.cat([dict(cell.named_parameters())[name].grad.flatten() for name in names])
    sizes = once.numel()
    assert torch.allclose(once, alone[0][:sizes] + alone[1][:sizes], atol=1e-10)
    loss.backward()
    twice = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()])
    assert torch.allclose(twice, 2 * once, atol=1e-10)


def test_one_cell_in_two_places_equals_the_unrolled_composition():
    cell, u = ToyCell(), toy_input()

    def composed(inner):
        leaf = u.clone().requires_grad_()
        cell.zero_grad()
        state = inner(inner(leaf))
        (state * cotangent(state)).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in cell.parameters()] + [leaf.grad.flatten()])

    def implicit(x):
        return exact().equilibrium(cell.map(x), torch.zeros_like(x), SHARP).state

    def explicit(x):
        z = torch.zeros_like(x)
        for _ in range(150):
            z = cell.map(x)(z)
        return z

    ours, reference = composed(implicit), composed(explicit)
    assert (ours - reference).norm() / reference.norm() < 1e-8


@pytest.mark.parametrize("name", ["ift", "neumann-3", "jfb", "reversible"])
def test_hooks_on_parameters_fire_once(name):
    # Gradient reduction over ranks counts on this.
    cell, u = ToyCell(), toy_input()
    fired = []
    for label, parameter in cell.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, label=label: fired.append(label))
    gradients(cell, u, exact(name), FixedPointConfig(max_iter=20, tol=1e-6))
    assert sorted(fired) == sorted(label for label, _ in cell.named_parameters())


def test_a_deep_copy_is_independent():
    cell, u = ToyCell(), toy_input()
    reference = flat(gradients(cell, u, exact()))
    twin = copy.deepcopy(cell)
    with torch.no_grad():
        cell.fc1.weight.mul_(2)
    assert torch.equal(flat(gradients(twin, u, exact())), reference)


def test_the_record_carries_the_cost_of_the_last_backward():
    cell, u, record = ToyCell(), toy_input(), AdjointRecord()
    gradients(cell, u, Implicit(adjoint=FixedPointConfig("picard", 50, 1e-6)), record=record)
    assert record.evaluations.shape == (3,) and 3 < record.evaluations.max() < 50
    assert record.residual.max() < 1e-6
    assert int(record.fallbacks) == 0


def test_a_stalled_adjoint_falls_back_to_the_neumann_sum_and_is_counted():
    # z = b - 2z has an equilibrium that Broyden finds, but Picard on the adjoint w = g - 2w diverges at every damping
    # within three products.
    gain = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    bias = toy_input(2, 1, 3)
    record = AdjointRecord()
    gradient = Implicit(adjoint=FixedPointConfig("picard", 3, 1e-9), fallback_terms=2)
    solver = FixedPointConfig("broyden", 20, 1e-12)
    found = gradient.equilibrium(lambda z: bias + gain * z, torch.zeros_like(bias), solver, record=record)
    found.state.sum().backward()
    assert int(record.fallbacks) == 2
    assert torch.allclose(gain.grad, (1 - 2) * (bias / 3).sum())


def test_an_incoming_overflow_is_passed_on():
    cell, u = ToyCell(), toy_input()
    leaf, record = u.clone().requires_grad_(), AdjointRecord()
    found = exact().equilibrium(cell.map(leaf), torch.zeros_like(leaf), SHARP, record=record)
    (found.state * math.inf).sum().backward()
    assert not leaf.grad.isfinite().all()
    assert int(record.fallbacks) == 0


def test_samples_without_gradient_cost_nothing_and_stay_zero():
    cell, u = ToyCell(), toy_input()
    leaf, record = u.clone().requires_grad_(), AdjointRecord()
    found = exact().equilibrium(cell.map(leaf), torch.zeros_like(leaf), SHARP, record=record)
    found.state[1:].square().mul(cotangent(found.state[1:])).sum().backward()
    assert leaf.grad[0].eq(0).all() and leaf.grad[1:].ne(0).any()
    assert record.evaluations[0] == 1 and record.evaluations[1] > 5


@pytest.mark.parametrize("name", ["ift", "neumann-4", "phantom-2", "jfb", "bptt-4", "reversible"])
def test_bfloat16_autocast_gives_every_weight_its_gradient(name):
    # Weights cast to bfloat16 inside the solve must not hide the differentiable cast from the tracked call.
    cell, u = ToyCell(dim=32, hidden=32, std=0.1), toy_input(2, 8, 32)
    gradient = parse_gradient(name)
    solver = FixedPointConfig(max_iter=12)
    sharp = flat(gradients(cell, u, gradient, solver))
    cell, u = cell.float(), u.float().clone().requires_grad_()
    cell.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient.equilibrium(cell.map(u), torch.zeros_like(u), solver, depends_on=(u, *cell.parameters()))
    (found.state.double() * cotangent(found.state.double())).sum().backward()
    rough = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()] + [u.grad.flatten()]).double()
    assert torch.nn.functional.cosine_similarity(rough, sharp, dim=0) > 0.97


@pytest.mark.parametrize("name", ["ift", "neumann-3", "phantom-3", "reversible"])
def test_nothing_is_recorded_without_gradients(name):
    cell, u = ToyCell(), toy_input()
    with torch.no_grad():
        found = exact(name).equilibrium(cell.map(u), torch.zeros_like(u), SHARP)
    assert not found.state.requires_grad


def test_recomputed_cells_work_unless_recomputation_is_reentrant():
    cell, u = ToyCell(), toy_input()
    reference = flat(gradients(cell, u, exact()))
    leaf = u.clone().requires_grad_()
    cell.zero_grad()
    f = cell.map(leaf)
    found = exact().equilibrium(lambda z: checkpoint(f, z, use_reentrant=False), torch.zeros_like(u), SHARP)
    (found.state * cotangent(found.state)).sum().backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()] + [leaf.grad.flatten()])
    assert torch.allclose(ours, reference, atol=1e-11)
    found = exact().equilibrium(lambda z: checkpoint(f, z, use_reentrant=True), torch.zeros_like(u), SHARP)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        found.state.sum().backward()


class _PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensor storages that operations have produced and that are still alive."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def _peak(method, budget):
    cell, u = ToyCell(dim=32, hidden=64), toy_input(4, 16, 32)
    u.requires_grad_()
    solver = FixedPointConfig(method, budget, 1e-14)
    gradient = Implicit(adjoint=FixedPointConfig(method, budget, 1e-14), fallback_residual=10.0)
    with _PeakMemory() as memory:
        gradient.equilibrium(cell.map(u), torch.zeros_like(u), solver).state.sum().backward()
    return memory.peak


@pytest.mark.parametrize("method", ["picard", "anderson"])
def test_peak_memory_of_thirty_evaluations_is_that_of_four(method):
    assert _peak(method, 30) <= 1.05 * _peak(method, 4)


def test_the_memory_meter_sees_an_unrolled_graph_grow():
    def unroll(steps):
        cell, u = ToyCell(dim=32, hidden=64), toy_input(4, 16, 32)
        with _PeakMemory() as memory:
            Unrolled(steps).equilibrium(cell.map(u), torch.zeros_like(u), FixedPointConfig()).state.sum().backward()
        return memory.peak

    assert unroll(30) > 3 * unroll(4)


def test_neumann_sum_of_a_scalar_is_the_geometric_series():
    g = torch.ones(1, 1, 1, dtype=torch.float64)
    assert neumann_sum(lambda w: 0.5 * w, g, 4).item() == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert neumann_sum(lambda w: 0.5 * w, g, 60, 0.7).item() == pytest.approx(2.0)


@pytest.mark.parametrize("name, kind, steps", [("ift", "ift", 1), ("phantom-4", "phantom", 4), ("bptt-12", "bptt", 12)])
def test_names_are_read_and_spelled(name, kind, steps):
    found = parse_gradient(name)
    assert (found.kind, found.steps, found.name) == (kind, steps, name)


@pytest.mark.parametrize(
    "name", ["phantom", "phantom-0", "bptt-0", "ift-3", "jfb-2", "exact", "neumann-x", "", "reversible-4"]
)
def test_wrong_names_are_refused_in_a_sentence(name):
    damping = 0.5
    with pytest.raises(OptionError, match="gradient"):
        parse_gradient(name, damping=damping)


@pytest.mark.parametrize(
    "make, option",
    [
        (lambda: Implicit(damping=0.0), "gradient_damping"),
        (lambda: parse_gradient("ift", damping=0.5), "gradient_damping"),
        (lambda: ReversibleIteration(), "gradient_damping"),
        (lambda: Implicit(fallback_terms=0), "fallback_terms"),
        (lambda: Implicit(adjoint=FixedPointConfig(compact=True)), "compact"),
    ],
)
def test_impossible_options_are_named(make, option):
    with pytest.raises(OptionError) as caught:
        make()
    assert caught.value.option == option


def test_reversible_needs_its_dependencies_and_two_evaluations():
    cell, u = ToyCell(), toy_input()
    gradient = ReversibleIteration(damping=0.5)
    with pytest.raises(ValueError, match="depends_on"):
        gradient.equilibrium(cell.map(u), torch.zeros_like(u), FixedPointConfig())
    with pytest.raises(OptionError, match="max_iter"):
        gradient.equilibrium(cell.map(u), torch.zeros_like(u), FixedPointConfig(max_iter=1))


def test_torchdeq_gives_the_same_gradient():
    torchdeq = pytest.importorskip("torchdeq")
    cell, u = ToyCell(), toy_input()
    ours = gradients(cell, u, exact())
    deq = torchdeq.get_deq(
        core="indexing",
        ift=True,
        f_solver="anderson",
        b_solver="anderson",
        f_max_iter=150,
        b_max_iter=150,
        f_tol=1e-11,
        b_tol=1e-11,
    )
    leaf = u.clone().requires_grad_()
    cell.zero_grad()
    states, _ = deq(cell.map(leaf), torch.zeros_like(u))
    (states[-1] * cotangent(states[-1])).sum().backward()
    reference = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()] + [leaf.grad.flatten()])
    assert (flat(ours) - reference).norm() / reference.norm() < 1e-4
