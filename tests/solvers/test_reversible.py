"""Reversible Heun: order, exact reconstruction, gradients, constant memory."""

import math

import pytest
import torch

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.status import Status
from scripts.side_by_side import peak_bytes
from tests.solvers.solving import solve_reversible

ROTATION = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def rotation(t, z):
    return (1 + math.sin(2 * t)) * (z @ ROTATION)


def written_out(f, y, duration, steps):
    """The same scheme in floating point, differentiated by autograd."""
    h, w, k = duration / steps, y, f(0.0, y)
    for n in range(1, steps + 1):
        w = 2 * y - w + h * k
        following = f(n * h, w)
        y, k = y + h / 2 * (k + following), following
    return y


def block(dtype, dim=16, dropout=0.1):
    torch.manual_seed(0)
    return TransformerField(
        TransformerFieldConfig(dim, 2 * dim, AttentionConfig(2, dropout), dropout=dropout, activation_dropout=dropout)
    ).to(dtype)


def test_order_two_on_a_non_autonomous_field():
    y = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    exact = y @ torch.matrix_exp(ROTATION * (1.5 + (1 - math.cos(3.0)) / 2))
    errors = [(solve_reversible(rotation, y, 1.5, n).state - exact).norm().item() for n in (32, 64, 128)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("steps", (1, 4, 64))
def test_gradient_is_that_of_autograd_in_float64(steps):
    field = block(torch.float64)
    y = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    f = field.prepare(y, Layout(torch.tensor([[True] * 5, [True] * 3 + [False] * 2])))
    tensors = [y, *field.parameters()]
    result = solve_reversible(f, y, 2.0, steps, list(field.parameters()))
    assert result.evaluations == steps + 1
    reference = written_out(f, y, 2.0, steps)
    torch.testing.assert_close(result.state, reference, rtol=0, atol=1e-10)
    weight = torch.randn_like(y)
    gradients = [torch.autograd.grad((s * weight).sum(), tensors) for s in (result.state, reference)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm() + 1e-12


@pytest.mark.parametrize("steps", (4, 64))
def test_gradient_within_1e_6_of_autograd_in_float32(steps):
    field = block(torch.float32, dim=32)
    y = torch.randn(2, 8, 32, requires_grad=True)
    f = field.prepare(y)
    tensors = [y, *field.parameters()]
    weight = torch.randn_like(y)
    mine = torch.autograd.grad(
        (solve_reversible(f, y, 1.0, steps, list(field.parameters())).state * weight).sum(), tensors
    )
    theirs = torch.autograd.grad((written_out(f, y, 1.0, steps) * weight).sum(), tensors)
    difference = torch.cat([(a - b).flatten() for a, b in zip(mine, theirs, strict=True)]).norm()
    assert difference < 1e-6 * torch.cat([b.flatten() for b in theirs]).norm()


def test_the_way_back_meets_the_states_of_the_way_out():
    """Bit for bit in float32 over 200 steps of a field that contracts, where rounding errors would be amplified."""
    seen = []

    def field(t, z):
        seen.append(z.detach().clone())
        return -torch.tanh(3 * z)

    y = torch.randn(2, 3, 4, requires_grad=True)
    solve_reversible(field, y, 2.0, 200).state.sum().backward()
    assert len(seen) == 402
    for out, back in zip(seen[:201], reversed(seen[201:]), strict=True):
        assert torch.equal(out, back)


def test_peak_memory_does_not_grow_with_the_steps():
    field = block(torch.float32, dim=64)
    y = torch.randn(4, 32, 64, requires_grad=True)
    f = field.prepare(y)

    def train(solve):
        solve().square().sum().backward()

    parameters = list(field.parameters())
    few, many = (
        peak_bytes(lambda n=n: train(lambda: solve_reversible(f, y, 1.0, n, parameters).state)) for n in (4, 64)
    )
    assert many <= 1.02 * few
    assert peak_bytes(lambda: train(lambda: written_out(f, y, 1.0, 64))) > 5 * many


def test_frozen_parameters_and_autocast():
    field = block(torch.float32, dropout=0.0)
    field.feed_forward.fc1.weight.requires_grad_(False)
    y = torch.randn(2, 5, 16, requires_grad=True)
    f = field.prepare(y)
    seen = set()

    def spy(t, z):
        dz = f(t, z)
        seen.add(dz.dtype)
        return dz

    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = solve_reversible(spy, y, 1.0, 3, list(field.parameters())).state
    assert state.dtype is torch.float32
    state.sum().backward()
    assert seen == {torch.bfloat16}, "the backward pass evaluates the field in the precision of the forward pass"
    assert field.feed_forward.fc1.weight.grad is None and field.feed_forward.fc2.weight.grad is not None


@pytest.mark.parametrize("where", ("start", "way", "end"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), 1e7))
def test_what_fixed_point_numbers_cannot_hold_is_not_finite(where, bad):
    """As an integer NaN would be a number like any other, and a large one would wrap around to a small one."""
    time = {"start": 0.0, "way": 0.5, "end": 1.0}[where]

    def field(t, z):
        dz = -z
        return torch.cat([dz[:1], dz[1:] + bad]) if t == time else dz

    y = torch.ones(2, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        result = solve_reversible(field, y, 1.0, 4)
    assert result.status is Status.NON_FINITE
    assert result.state[1].isnan().all(), "no finite number may stand for it"
    torch.testing.assert_close(result.state[:1], written_out(lambda t, z: -z, y[:1], 1.0, 4), rtol=0, atol=1e-10)


def test_a_state_that_outgrows_the_fixed_point_numbers():
    y = torch.ones(1, 1, 2, dtype=torch.float64)
    grown = solve_reversible(lambda t, z: 5 * z, y, 2.0, 40)
    assert grown.status is Status.COMPLETED
    torch.testing.assert_close(grown.state, written_out(lambda t, z: 5 * z, y, 2.0, 40), rtol=1e-9, atol=0)
    for duration in (3.0, 4.0, 8.0):
        lost = solve_reversible(lambda t, z: 5 * z, y, duration, 80)
        assert lost.status is Status.NON_FINITE and lost.state.isnan().all()


def test_no_steps():
    with pytest.raises(ValueError, match="at least one step"):
        solve_reversible(rotation, torch.zeros(1, 1, 2), 1.0, 0)
