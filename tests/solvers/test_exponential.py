"""Exponential schemes: orders, limits, fixed points, gradients, memory modes, precision."""

import math
from fractions import Fraction

import pytest
import torch

from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.exponential import SCHEMES, Exponential, phi
from fairseq_implicit.solvers.names import FIXED_GRADIENTS, GRADIENTS, continuous_solver
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Keep, Piece, Span

RATE = torch.tensor([0.3, 1.7, 4.0], dtype=torch.float64)
LIMITS = {"etd1": "euler", "etd2": "heun2", "etd4": "rk4"}
COUPLING = torch.tensor([[0.1, -1.0, 0.4], [0.7, 0.2, -0.3], [-0.5, 0.6, 0.1]], dtype=torch.float64)
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def state(batch=2, time=3, seed=0):
    return torch.randn(batch, time, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def coupled(t, z):
    """N of a coupled, non-autonomous, nonlinear problem."""
    t = t.view(-1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=z.dtype)
    return torch.tanh(z @ COUPLING.to(z.dtype)) + torch.sin(2 * t) * z.flip(-1) + torch.cos(t)


def solved(scheme, steps, x, rate=RATE, f=coupled, time=1.5, gradient="autograd", **options):
    solver = Exponential(scheme, steps, GRADIENTS[gradient])
    return solver.solve(f, x, Span(0.2, time), rate=rate, **options).state


def series(z, k, terms=60):
    """φ_k by its series in exact rationals."""
    z = Fraction(z)
    return float(sum(z**n / math.factorial(n + k) for n in range(terms)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 3e-14), (torch.float32, 4e-6)])
def test_phi_has_the_digits_of_its_precision_on_both_sides_of_the_seam(dtype, tolerance):
    places = [0.0, -1e-300, -1e-9, -1e-3, -0.1, -0.29, -0.31, -0.999, -1.001, -1.5, -4.0, -9.0, 0.5, 2.0]
    for place in places:
        z = torch.tensor([place], dtype=dtype)
        for k, found in enumerate(phi(z), 1):
            assert found.item() == pytest.approx(series(z.item(), k), rel=tolerance), (place, k)
    far = phi(torch.tensor([-1e4], dtype=dtype))
    assert [each.item() for each in far] == pytest.approx([1e-4, 1e-4, 0.5e-4], rel=1e-3)


def test_phi_is_differentiable_everywhere():
    z = torch.tensor([0.0, -1e-12, -0.3, -0.99, -1.01, -7.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(phi, z)
    slopes = [torch.autograd.grad(each[0], z, retain_graph=True)[0][0].item() for each in phi(z)]
    assert slopes == pytest.approx([1 / 2, 1 / 6, 1 / 24], abs=1e-15)


@pytest.fixture(scope="module")
def reference():
    return RungeKutta("rk4", 1024).solve(lambda t, z: coupled(t, z) - RATE * z, state(), Span(0.2, 1.5)).state


@pytest.mark.parametrize("scheme, order", [("etd1", 1), ("etd2", 2), ("etd4", 4)])
def test_slope_on_a_coupled_non_autonomous_problem(scheme, order, reference):
    errors = [(solved(scheme, count, state()) - reference).norm().item() for count in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1 if order < 4 else 0.4)
    assert errors[1] > 1e-10


@schemes
def test_the_linear_part_is_solved_exactly_in_one_step(scheme):
    x, pull = state(), state(seed=1)
    found = solved(scheme, 1, x, f=lambda t, z: RATE * pull, time=7.0)
    torch.testing.assert_close(found, pull + torch.exp(-7.0 * RATE) * (x - pull), rtol=0, atol=1e-14)


@schemes
def test_without_rates_it_is_the_classical_scheme(scheme):
    x = state()
    expected = RungeKutta(LIMITS[scheme], 5).solve(coupled, x, Span(0.2, 1.5)).state
    torch.testing.assert_close(solved(scheme, 5, x, torch.zeros(3).double()), expected, rtol=0, atol=4e-15)
    near = solved(scheme, 5, x, torch.full((3,), 1e-13).double())
    torch.testing.assert_close(near, expected, rtol=0, atol=1e-11)


def test_the_fixed_point_depends_on_neither_scheme_nor_step():
    x = state(1, 1)
    drive = state(1, 1, seed=3)

    def f(t, z):
        return torch.tanh(0.2 * z @ COUPLING) + drive

    z = x
    for _ in range(300):
        z = f(0.0, z) / RATE
    for scheme in SCHEMES:
        for h in (0.1, 1.0, 3.0):
            assert (solved(scheme, 1, z, f=f, time=h) - z).abs().max() < 1e-14
            end = solved(scheme, round(150 / h), x, f=f, time=150.0)
            torch.testing.assert_close(end, z, rtol=0, atol=1e-13)


@schemes
def test_the_gradients_agree_with_finite_differences(scheme):
    x = state(1, 2).requires_grad_()
    rate = torch.tensor([1e-9, 0.4, 2.6], dtype=torch.float64, requires_grad=True)
    weight = COUPLING.clone().requires_grad_()

    def solve(x, rate, weight):
        return solved(scheme, 2, x, rate, lambda t, z: torch.tanh(z @ weight) + math.cos(t))

    torch.autograd.gradcheck(solve, (x, rate, weight))


@schemes
@pytest.mark.parametrize("gradient", FIXED_GRADIENTS)
def test_recomputation_changes_no_bit(scheme, gradient):
    found = []
    for mode in ("autograd", gradient):
        torch.manual_seed(0)
        x, rate = state().requires_grad_(), RATE.clone().requires_grad_()

        def noisy(t, z):
            return torch.nn.functional.dropout(coupled(t, z), 0.5)

        end = solved(scheme, 3, x, rate, noisy, gradient=mode)
        found.append((end, *torch.autograd.grad(end.square().sum(), (x, rate))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@schemes
def test_one_time_per_sample_is_each_sample_at_its_own(scheme):
    x, starts = state(), torch.tensor([0.0, 0.7], dtype=torch.float64)
    solver = Exponential(scheme, 2)
    together = solver.solve(coupled, x, Span(starts, 0.5), rate=RATE).state
    for row, start in enumerate(starts.tolist()):
        alone = solver.solve(coupled, x[row : row + 1], Span(start, 0.5), rate=RATE).state
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-15)


def test_costs_states_energy_and_jumps():
    x, calls = state(), []

    def counted(t, z):
        calls.append(t)
        return torch.zeros_like(z) + (1.0 if t < 0.5 else 5.0)

    pieces = (Piece(lambda t, z: torch.ones_like(z), 0.5), Piece(lambda t, z: 5.0 * torch.ones_like(z), 1.0))
    for scheme, evaluations in (("etd1", 1), ("etd2", 2), ("etd4", 4)):
        calls.clear()
        solver = Exponential(scheme, 2)
        plain = solver.solve(counted, x, Span(), rate=RATE)
        assert plain.evaluations == plain.field_calls == len(calls) == 2 * evaluations and plain.accepted == 2
        kept = solver.solve(counted, x, Span(), rate=RATE, pieces=pieces, keep=Keep(True, True))
        middle = 1 / RATE + torch.exp(-RATE / 2) * (x - 1 / RATE)
        torch.testing.assert_close(kept.states[1], middle, rtol=0, atol=1e-14)
        torch.testing.assert_close(kept.state, 5 / RATE + torch.exp(-RATE / 2) * (middle - 5 / RATE))
        steps = zip(kept.states[1:], kept.states, strict=False)
        expected = sum((later - earlier).square().mean((1, 2)) / 0.5 for later, earlier in steps)
        torch.testing.assert_close(kept.energy, expected)


@schemes
def test_a_float32_state_around_a_half_precision_field(scheme):
    x, seen = state().bfloat16(), []

    def f(t, z):
        seen.append(z.dtype)
        return coupled(float(t), z)

    wide = Exponential(scheme, 8, state_float32=True).solve(f, x, Span(0.2, 1.5), rate=RATE.float())
    narrow = Exponential(scheme, 8).solve(f, x, Span(0.2, 1.5), rate=RATE.float())
    exact = solved(scheme, 8, x.double())
    assert (wide.state.dtype, narrow.state.dtype, set(seen)) == (torch.float32, torch.bfloat16, {torch.bfloat16})
    assert (wide.state - exact).abs().max() < 0.03 and (narrow.state - exact).abs().max() < 0.1


@schemes
def test_a_thousand_steps_of_a_violent_bounded_field_stay_bounded(scheme):
    weight = 100.0 * COUPLING

    def f(t, z):
        return torch.tanh(z @ weight)

    found = Exponential(scheme, 1000).solve(f, 1e3 * state(), Span(0.0, 1000.0), rate=RATE, keep=Keep(states=True))
    # |e^{−hA} y| falls, and what comes in adds up to no more than a few times |F| / A.
    sizes = torch.stack([each.abs().amax() for each in found.states])
    assert sizes.isfinite().all() and sizes[100:].max() < 6 / RATE.min()


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Exponential("etd3"), "scheme: 'etd3' is unknown: choose one of etd1, etd2, etd4"),
        (lambda: Exponential("etd2", 0), "steps: 0 steps per solve"),
        (lambda: Exponential("etd2", gradient=GRADIENTS["adjoint"]), "gradient: adjoint is for adaptive solves"),
        (lambda: continuous_solver("etd4", 1e-2), "scheme: etd4 with `gradient` autograd takes fixed steps"),
        (lambda: continuous_solver("etd4", 0.0, gradient="reversible"), "gradient: reversible"),
        (lambda: Exponential("etd2").solve(coupled, state(), Span()), "so that it is heun2: take that"),
    ],
)
def test_what_has_no_meaning_is_refused(make, sentence):
    with pytest.raises(OptionError, match=sentence.replace("(", r"\(")):
        make()
