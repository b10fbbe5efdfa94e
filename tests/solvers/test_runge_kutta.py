"""The explicit engine: orders by slope, gradients against a written-out loop, memory modes, precision, compilation."""

import math

import pytest
import torch
from torch import nn

from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.coefficients import Combination
from fairseq_implicit.solvers.names import FIXED_GRADIENTS
from fairseq_implicit.solvers.runge_kutta import (
    embedded_error,
    explicit_stages,
)
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.tableau import TABLEAUS, get_tableau
from tests.solvers.solving import Explicit, solve_explicit

SPAN = 1.5
SCHEMES = list(TABLEAUS)


def slope(step_counts, errors, floor=1e-13):
    """Convergence order on the finest pair of grids whose errors are above rounding."""
    usable = [(n, error) for n, error in zip(step_counts, errors, strict=True) if error > floor]
    (n1, e1), (n2, e2) = usable[-2:]
    return math.log(e1 / e2) / math.log(n2 / n1)


def solved(f, x, scheme, steps, total_time=SPAN, **options):
    return solve_explicit(f, x, Explicit(scheme, steps, total_time, **options)).state


def turning(t, z):
    """x' = (1 + sin 2t) J x: time-dependent and coupled. Solution: rotation by t + (1 − cos 2t) / 2."""
    return (1 + math.sin(2 * t)) * torch.stack([-z[..., 1], z[..., 0]], dim=-1)


class Network(nn.Module):
    """A small time-dependent field with dropout drawn in each evaluation."""

    def __init__(self, dim=6, dropout=0.0):
        super().__init__()
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, t, z):
        return self.dropout(self.outer(torch.tanh(self.inner(z) + math.cos(t))))


class Counting:
    def __init__(self, f):
        self.f = f
        self.times = []

    def __call__(self, t, z):
        self.times.append(t)
        return self.f(t, z)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return Network().double()


@pytest.fixture
def state():
    torch.manual_seed(2)
    return torch.randn(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slope_on_a_time_dependent_coupled_problem(scheme):
    """The error has a part along the solution and one across it. The worse of the two has the scheme's order; their
    sum can look better for long: Tsitouras 5 has a tiny leading coefficient and shows 5.5 on these grids."""
    x = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    angle = SPAN + (1 - math.cos(2 * SPAN)) / 2
    along = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    across = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)
    counts = (16, 32, 64, 128)
    ends = [solved(turning, x, scheme, n)[0, 0] for n in counts]
    amplitude = slope(counts, [abs((end @ along).item() - 1) for end in ends])
    phase = slope(counts, [abs((end @ across).item()) for end in ends])
    assert min(amplitude, phase) == pytest.approx(get_tableau(scheme).order, abs=0.15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nodes_on_a_pure_quadrature(scheme):
    """x' = cos 3t sees nothing but the nodes; schemes may do better here, never worse."""
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    counts = (8, 16, 32, 64)
    errors = [
        abs(solved(lambda t, z: torch.full_like(z, math.cos(3 * t)), x, scheme, n).item() - math.sin(3 * SPAN) / 3)
        for n in counts
    ]
    assert slope(counts, errors) > get_tableau(scheme).order - 0.15


@pytest.mark.parametrize("scheme", [name for name, tableau in TABLEAUS.items() if tableau.b_hat])
def test_embedded_estimate_scales_with_its_order(scheme):
    tableau = get_tableau(scheme)
    x = torch.tensor([[[1.0, 0.3]]], dtype=torch.float64)
    counts = (4, 8, 16)
    errors = [
        embedded_error(tableau, explicit_stages(turning, tableau, 0.2, x, 1 / n, (True,) * tableau.stages), 1 / n)
        for n in counts
    ]
    sizes = [error.abs().max().item() for error in errors]
    # heun2 and ralston2 share b̂ = Euler; their estimates are O(h²) and so on: local error h^(p̂+1).
    assert slope(counts, sizes) == pytest.approx(tableau.embedded_order + 1, abs=0.25)


def test_a_scheme_without_embedded_weights_has_no_estimate():
    with pytest.raises(ValueError, match="'rk4' has no embedded weights"):
        embedded_error(get_tableau("rk4"), [torch.zeros(1, 1, 1)], 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_euler_step_is_bit_equal_to_the_residual_layer(network, state, dtype):
    network, state = network.to(dtype), state.to(dtype)
    for t0 in (0.0, 5.0):
        result = solve_explicit(network, state, Explicit("euler"), t0=t0)
        assert torch.equal(result.state, state + network(t0, state))
        assert (result.evaluations, result.status, result.residual) == (1, Status.COMPLETED, None)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluations_are_counted_and_none_is_superfluous(network, state, scheme, steps):
    tableau, counting = get_tableau(scheme), Counting(network)
    result = solve_explicit(counting, state, Explicit(scheme, steps, SPAN), t0=2.0)
    expected = steps * (tableau.stages - tableau.first_same_as_last)
    assert result.evaluations == len(counting.times) == expected
    h = SPAN / steps
    nodes = tableau.c_values[: expected // steps]
    assert counting.times == pytest.approx([2.0 + n * h + c * h for n in range(steps) for c in nodes])


def test_learned_weights_use_the_stage_that_the_tableau_ignores(network, state):
    combination = Combination(get_tableau("dopri5"), "learned")
    counting = Counting(network)
    result = solve_explicit(counting, state, Explicit("dopri5"), combination)
    assert result.evaluations == len(counting.times) == 7


def rk4_by_hand(f, y, steps, span):
    h = span / steps
    for n in range(steps):
        t = n * h
        k1 = f(t, y)
        k2 = f(t + h / 2, y + h / 2 * k1)
        k3 = f(t + h / 2, y + h / 2 * k2)
        k4 = f(t + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def gradients(output, network, x):
    return torch.autograd.grad(output.square().sum(), [x, *network.parameters()])


def test_gradient_equals_that_of_a_written_out_loop(network, state):
    x = state.requires_grad_()
    ours, reference = solved(network, x, "rk4", 4), rk4_by_hand(network, x, 4, SPAN)
    assert (ours - reference).abs().max() < 1e-14
    for mine, theirs in zip(gradients(ours, network, x), gradients(reference, network, x), strict=True):
        assert (mine - theirs).abs().max() <= 1e-14 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("mode", ["fixed", "learned", "softmax", "gated", "ema-normalised"])
def test_gradcheck(mode):
    torch.manual_seed(3)
    network = Network(dim=2).double()
    combination = Combination(get_tableau("kutta3"), mode, dim=2).double()
    names = [name for name, _ in combination.named_parameters()]

    def solution(x, *parameters):
        def run(f, y):
            return solve_explicit(f, y, Explicit("kutta3", 2), combination).state

        return torch.func.functional_call(
            _Call(combination, run), dict(zip(["it." + n for n in names], parameters, strict=True)), (network, x)
        )

    x = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solution, (x, *combination.parameters()))


class _Call(nn.Module):
    """Lets functional_call replace the parameters of a combination inside a solve."""

    def __init__(self, it, run):
        super().__init__()
        self.it = it
        self.run = run

    def forward(self, f, y):
        return self.run(f, y)


@pytest.mark.parametrize("mode", ["fixed", "gated", "ema"])
@pytest.mark.parametrize("gradient", FIXED_GRADIENTS[1:])
def test_recomputation_changes_no_bit_with_dropout_in_every_evaluation(state, gradient, mode):
    torch.manual_seed(4)
    network = Network(dropout=0.3).double()
    combination = Combination(get_tableau("rk4"), mode, dim=6).double()
    found = []
    for way in ("autograd", gradient):
        x = state.clone().requires_grad_()
        torch.manual_seed(5)
        result = solve_explicit(network, x, Explicit("rk4", 2, gradient=way), combination)
        torch.rand(7)  # something else draws between forward and backward
        grads = torch.autograd.grad(result.state.square().sum(), [x, *network.parameters(), *combination.parameters()])
        found.append([result.state, *grads])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("gradient, kept", [("checkpoint-step", 3), ("checkpoint-stage", 12)])
def test_recomputation_keeps_one_state_per_step_or_stage(network, state, gradient, kept):
    def saved_elements(way):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.update({tensor.data_ptr(): tensor.numel()}), tensor)[1], lambda tensor: tensor
        ):
            output = solve_explicit(network, state.clone().requires_grad_(), Explicit("rk4", 3, gradient=way)).state
        assert output.requires_grad  # and with it what was saved is still alive, so no address is used twice
        parameters = {parameter.data_ptr() for parameter in network.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    assert saved_elements("autograd") > 2 * 12 * state.numel()
    assert saved_elements(gradient) == kept * state.numel()

    counting = Counting(network)
    x = state.clone().requires_grad_()
    solve_explicit(counting, x, Explicit("rk4", 3, gradient=gradient)).state.sum().backward()
    assert len(counting.times) == 24


@pytest.mark.parametrize("gradient", FIXED_GRADIENTS[1:])
def test_no_recomputation_is_set_up_without_gradients(network, state, gradient, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr("fairseq_implicit.solvers.recomputation.checkpoint", refuse)
    config = Explicit("rk4", 2, gradient=gradient)
    with torch.no_grad():
        solve_explicit(network, state, config)
    with pytest.raises(AssertionError, match="checkpoint was called"):
        solve_explicit(network, state, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_state_under_a_half_precision_field(network, state, dtype):
    """Sixty-four small steps: rounding the state at each one costs far more than a half-precision field."""
    half = Network().to(dtype)
    half.load_state_dict({name: value.to(dtype) for name, value in network.state_dict().items()})
    wide = Network().double()
    wide.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    x = (8 * state).to(dtype)
    exact = solved(wide, x.double(), "rk4", 64)
    seen = []

    def field(t, z):
        seen.append(z.dtype)
        return half(t, z)

    kept = solved(field, x, "rk4", 64, state_float32=True)
    rounded = solved(half, x, "rk4", 64)
    assert kept.dtype == torch.float32 and rounded.dtype == dtype and set(seen) == {dtype}
    assert (kept - exact).abs().max() < 0.2 * (rounded - exact).abs().max()


def test_float32_state_leaves_float64_alone(network, state):
    assert torch.equal(solved(network, state, "rk4", 2, state_float32=True), solved(network, state, "rk4", 2))


def test_autocast_field_with_a_float32_state(network, state):
    network, x = network.float(), state.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = solved(network, x, "rk4", 2, gradient="checkpoint-step", state_float32=True)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.isfinite().all()


def test_a_half_precision_solve_leaves_the_tableau_alone(network, state):
    before = solved(network, state, "dopri5", 2)
    solved(Network().bfloat16(), state.bfloat16(), "dopri5", 2)
    assert torch.equal(solved(network, state, "dopri5", 2), before)


@pytest.mark.parametrize(
    "scheme, factor", [("euler", 2.0), ("heun2", 2.5), ("kutta3", 8 / 3), ("rk4", 65 / 24), ("rk4_38", 65 / 24)]
)
def test_residual_in_the_field_multiplies_the_state(state, scheme, factor):
    """With a zero field the original code's dy/dt = y + F(y) is dy/dt = y: the scheme's stability polynomial at 1."""
    config = Explicit(scheme, residual_in_field=True)
    result = solve_explicit(lambda t, z: torch.zeros_like(z), state, config)
    torch.testing.assert_close(result.state, factor * state, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["fixed", "gated"])
@pytest.mark.parametrize("gradient", ["autograd", "checkpoint-step"])
def test_a_solve_compiles_into_one_graph(gradient, mode):
    torch.manual_seed(6)
    network, x = Network(), torch.randn(2, 3, 6, requires_grad=True)
    combination = Combination(get_tableau("kutta3"), mode, dim=6)
    config = Explicit("kutta3", 2, gradient=gradient)

    def run(y):
        return solve_explicit(network, y, config, combination).state

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    plain = run(x)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(gradients(compiled, network, x), gradients(plain, network, x))


@pytest.mark.parametrize("mode", ["fixed", "learned", "softmax", "gated", "ema"])
def test_nothing_is_read_back_from_the_device(mode):
    """A meta tensor has no data: whatever asks for a value fails."""
    network, combination = Network().to("meta"), Combination(get_tableau("rk4"), mode, dim=6).to("meta")
    x = torch.empty(2, 3, 6, device="meta")
    layout = Layout(torch.empty(2, 3, dtype=torch.bool, device="meta"))
    result = solve_explicit(network, x, Explicit("rk4", 3), combination)
    assert result.state.shape == x.shape
    statistics = combination.statistics(result.weights[0], layout)
    assert all(not isinstance(value, torch.Tensor) or value.dim() == 0 for value in statistics.values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"scheme": "rk7"}, "unknown scheme 'rk7'"),
        ({"steps": 0}, "0 steps per solve"),
        ({"steps": 1.5}, "1.5 steps per solve"),
        ({"gradient": "adjoint"}, "gradient: adjoint is for adaptive solves"),
    ],
)
def test_a_wrong_configuration_is_refused(options, sentence):
    explicit = Explicit(**options)
    with pytest.raises(ValueError, match=sentence):
        assert explicit.solver


def test_coefficients_of_another_scheme_are_refused(network, state):
    with pytest.raises(ValueError, match="made for scheme 'heun2', the solve uses 'rk4'"):
        solve_explicit(network, state, Explicit("rk4"), Combination(get_tableau("rk2")))
