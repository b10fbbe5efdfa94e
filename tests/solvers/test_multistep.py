"""Predictor–corrector steps: orders, formulas, recomputation."""

import math
from dataclasses import replace

import pytest
import torch

from fairseq_implicit.solvers.multistep import AdamsPair, BackwardEulerCorrected
from fairseq_implicit.solvers.names import FIXED_GRADIENTS
from tests.solvers.solving import Explicit, solve_explicit


def solve_adams(f, x, config, increment=None, t0=0.0):
    return solve_explicit(f, x, replace(config, kind=AdamsPair), t0=t0, carried=increment)


def solve_backward_euler_corrected(f, x, config, t0=0.0):
    return solve_explicit(f, x, replace(config, kind=BackwardEulerCorrected), t0=t0)


SPAN = 1.5
COUNTS = (32, 64, 128)
ANGLE = SPAN + (1 - math.cos(2 * SPAN)) / 2


def turning(t, z):
    """x' = (1 + sin 2t) J x, solved by a rotation."""
    return (1 + math.sin(2 * t)) * torch.stack([-z[..., 1], z[..., 0]], dim=-1)


def order(chain):
    """Slope of the error of ``chain(number of blocks)`` on the turning problem."""
    exact = torch.tensor([[[math.cos(ANGLE), math.sin(ANGLE)]]], dtype=torch.float64)
    errors = [(chain(count) - exact).norm().item() for count in COUNTS]
    return math.log2(errors[-2] / errors[-1])


START = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)


def adams_chain(blocks, gradient="autograd", x=START, field=turning):
    config, increment = Explicit("heun2", total_time=SPAN / blocks, gradient=gradient), None
    for block in range(blocks):
        result = solve_adams(field, x, config, increment, t0=block * SPAN / blocks)
        x, increment = result.state, result.carried
        assert result.evaluations == 2
    return x


def corrected_chain(blocks, scheme="heun2", gradient="autograd", x=START, field=turning):
    config = Explicit(scheme, total_time=SPAN / blocks, gradient=gradient)
    for block in range(blocks):
        x = solve_backward_euler_corrected(field, x, config, t0=block * SPAN / blocks).state
    return x


def test_the_adams_pair_has_order_two():
    assert order(adams_chain) == pytest.approx(2, abs=0.15)


def test_the_adams_pair_needs_the_increment_of_the_previous_block():
    """Without it every block restarts with Heun: another second-order method, with other numbers."""
    config = Explicit("heun2", total_time=SPAN / 8)
    first = solve_adams(turning, START, config)
    torch.testing.assert_close(first.state, solve_explicit(turning, START, config).state, rtol=0, atol=1e-15)
    h, x, f1 = SPAN / 8, first.state, first.carried
    f2 = turning(h, x)
    predicted = x + h * (1.5 * f2 - 0.5 * f1)
    expected = x + h / 2 * (turning(2 * h, predicted) + f2)
    second = solve_adams(turning, x, config, f1, t0=h)
    torch.testing.assert_close(second.state, expected, rtol=0, atol=1e-15)
    assert torch.equal(second.carried, f2)


@pytest.mark.parametrize("scheme", ["euler", "heun2", "rk4"])
def test_the_backward_euler_corrector_has_order_one_whatever_predicts(scheme):
    assert order(lambda blocks: corrected_chain(blocks, scheme)) == pytest.approx(1, abs=0.15)


def test_the_backward_euler_corrector_is_one_sweep_from_the_predictor():
    config = Explicit("rk4", steps=2, total_time=0.5)
    predicted = solve_explicit(turning, START, config, t0=0.25)
    corrected = solve_backward_euler_corrected(turning, START, config, t0=0.25)
    torch.testing.assert_close(corrected.state, START + 0.5 * turning(0.75, predicted.state), rtol=0, atol=1e-15)
    assert corrected.evaluations == predicted.evaluations + 1 == 9


@pytest.mark.parametrize("gradient", FIXED_GRADIENTS[1:])
@pytest.mark.parametrize("chain", [adams_chain, corrected_chain])
def test_recomputation_changes_no_bit(chain, gradient):
    torch.manual_seed(0)
    matrix = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for way in ("autograd", gradient):
        x = START.clone().requires_grad_()
        end = chain(4, gradient=way, x=x, field=lambda t, z: torch.tanh(z @ matrix + t))
        found.append([end, *torch.autograd.grad(end.square().sum(), [x, matrix])])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    "config, sentence",
    [
        (Explicit("heun2", steps=2), "set `scheme` heun2 and `steps` 1, not heun2 and 2"),
        (Explicit("rk4"), "started by Heun's method: set `scheme` heun2 and `steps` 1, not rk4"),
    ],
)
def test_an_adams_pair_on_another_grid_is_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve_adams(turning, START, config)
