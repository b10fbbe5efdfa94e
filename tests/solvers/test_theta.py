"""Implicit schemes: orders, identities, stability, gradients."""

import math

import pytest
import torch

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import FixedPointConfig, solve
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.gradients.reversible_iteration import ReversibleIteration
from fairseq_implicit.solvers.solver import Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.theta import Theta
from tests.solvers.cells import ToyCell, toy_input

SHARP = FixedPointConfig("anderson", 200, 1e-13)
EXACT = Implicit(adjoint=SHARP)
SWIRL = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def config(scheme="theta", theta=1.0, total_time=1.0, **options):
    return Theta(scheme, theta, solver=SHARP, gradient=EXACT, **options), total_time


def solve_theta(f, x, configured, layout=UNPADDED, records=None):
    solver, total_time = configured
    return solver.solve(f, x, Span(0.0, total_time), layout, records=records)


def rotation_field(t, z):
    """Rotates (1, 0) by t + (1 − cos 2t)/2: coupled and non-autonomous."""
    return (1 + math.sin(2 * t)) * (z @ SWIRL)


@pytest.mark.parametrize(
    "scheme, theta, order",
    [("theta", 0.0, 1), ("theta", 0.25, 1), ("theta", 0.5, 2), ("theta", 1.0, 1), ("implicit-midpoint", 1.0, 2)],
)
def test_order_of_convergence(scheme, theta, order):
    start = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    angle = 1.5 + (1 - math.cos(3.0)) / 2
    exact = torch.tensor([[[math.cos(angle), math.sin(angle)]]], dtype=torch.float64)
    errors = []
    with torch.no_grad():
        for steps in (32, 64):
            found = solve_theta(rotation_field, start, config(scheme, theta, steps=steps, total_time=1.5))
            errors.append((found.state - exact).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def increment(cell, u):
    f = cell.map(u)
    return lambda t, z: 0.5 * f(z)


def test_theta_zero_is_the_ordinary_residual_layer_to_the_last_bit():
    cell, x = ToyCell(), toy_input()
    f = increment(cell, toy_input(seed=3))
    found = solve_theta(f, x, (Theta(theta=0.0), 1.0))
    assert torch.equal(found.state, x + f(0.0, x))
    assert found.evaluations == 1 and found.residual is None


def test_backward_euler_with_a_unit_step_is_a_deep_equilibrium():
    cell, x = ToyCell(), toy_input()
    f = increment(cell, toy_input(seed=3))
    with torch.no_grad():
        implicit = solve_theta(f, x, config())
        deep = solve(lambda z: x + f(0.0, z), torch.zeros_like(x), SHARP)
    assert torch.allclose(implicit.state, deep.state, atol=1e-11)
    assert implicit.status is Status.CONVERGED


@pytest.mark.parametrize("scheme, theta", [("theta", 1.0), ("theta", 0.5), ("implicit-midpoint", 0.0)])
def test_the_step_satisfies_its_equation(scheme, theta):
    cell, x = ToyCell(), toy_input()
    f = increment(cell, toy_input(seed=3))
    with torch.no_grad():
        z = solve_theta(f, x, config(scheme, theta, total_time=0.7)).state
        if scheme == "theta":
            right = x + 0.7 * ((1 - theta) * f(0.0, x) + theta * f(0.7, z))
        else:
            right = x + 0.7 * f(0.35, (x + z) / 2)
    assert torch.allclose(z, right, atol=1e-11)


def test_stability_on_a_stiff_decay():
    # h λ = −30: Euler multiplies by −29, backward Euler divides by 31, the trapezoid by −14/16.
    def decay(t, z):
        return -30.0 * z

    start = torch.ones(1, 1, 1, dtype=torch.float64)
    solver = FixedPointConfig("broyden", 50, 1e-12)
    for theta, factor in ((0.0, -29.0), (0.5, -14 / 16), (1.0, 1 / 31)):
        found = solve_theta(decay, start, (Theta(theta=theta, solver=solver, gradient=EXACT), 1.0))
        assert found.state.item() == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("scheme, theta", [("theta", 1.0), ("theta", 0.5), ("implicit-midpoint", 0.0)])
def test_gradients_equal_those_of_the_unrolled_root(scheme, theta):
    cell = ToyCell()

    def all_gradients(x, state):
        cell.zero_grad()
        (state * torch.linspace(0, 3, state.numel(), dtype=state.dtype).view_as(state).sin()).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in cell.parameters()] + [x.grad.flatten()])

    u = toy_input(seed=3)
    x = toy_input().requires_grad_()
    ours = all_gradients(x, solve_theta(increment(cell, u), x, config(scheme, theta, steps=2, total_time=1.0)).state)
    x = toy_input().requires_grad_()
    f, z = increment(cell, u), x
    for _ in range(2):
        before, h = z, 0.5
        for _ in range(120):
            if scheme == "theta":
                z = before + h * ((1 - theta) * f(0.0, before) + theta * f(0.0, z))
            else:
                z = before + h * f(0.0, (before + z) / 2)
    reference = all_gradients(x, z)
    assert (ours - reference).norm() / reference.norm() < 1e-8


def test_theta_one_half_equals_the_mean_of_the_explicit_and_implicit_increment():
    matrix = torch.diag(torch.tensor([0.3, -0.4], dtype=torch.float64))
    x = toy_input(1, 2, 2)
    with torch.no_grad():
        found = solve_theta(lambda t, z: z @ matrix, x, config(theta=0.5)).state
    assert torch.allclose(found, x * torch.tensor([1.15 / 0.85, 0.8 / 1.2], dtype=torch.float64), atol=1e-11)


def test_padding_keeps_its_state_and_changes_nobody():
    cell, x, u = ToyCell(), toy_input(), toy_input(seed=3)
    layout = Layout(torch.tensor([[True] * 4 + [False] * 2] * 3))
    padding = torch.full((3, 2, 6), 9.0, dtype=x.dtype)
    f = cell.map(torch.cat([u, padding], 1), layout)
    with torch.no_grad():
        plain = solve_theta(increment(cell, u), x, config(theta=0.5)).state
        z = torch.cat([x, padding], 1)
        padded = solve_theta(lambda t, z: 0.5 * f(z), z, config(theta=0.5), layout=layout).state
    assert torch.allclose(padded[:, :4], plain, atol=1e-11)
    assert torch.equal(padded[:, 4:], padding)


def test_one_record_per_step_is_filled_by_the_backward_pass():
    cell, x, records = ToyCell(), toy_input().requires_grad_(), []
    result = solve_theta(increment(cell, toy_input(seed=3)), x, config(steps=3), records=records)
    result.state.square().mul(toy_input(seed=5)).sum().backward()
    assert len(records) == 3
    assert all(isinstance(record, AdjointRecord) and record.evaluations.min() > 2 for record in records)
    assert result.evaluations.shape == (3,) and result.residual.max() < 1e-12


@pytest.mark.parametrize(
    "options, option",
    [
        ({"scheme": "sdirk"}, "scheme"),
        ({"theta": 1.2}, "theta"),
        ({"theta": -0.1}, "theta"),
        ({"steps": 0}, "steps"),
        ({"gradient": ReversibleIteration(damping=0.5)}, "gradient"),
        ({"solver": FixedPointConfig(compact=True)}, "compact"),
    ],
)
def test_impossible_options_are_named(options, option):
    with pytest.raises(OptionError) as caught:
        Theta(**options)
    assert caught.value.option == option
