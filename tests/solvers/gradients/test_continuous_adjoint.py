"""All ways to a gradient agree."""

import pytest
import torch

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.status import Status
from tests.solvers.solving import Explicit, solve_adaptive, solve_adjoint, solve_explicit, solve_reversible


@pytest.fixture
def block():
    torch.manual_seed(0)
    return TransformerField(
        TransformerFieldConfig(16, 32, AttentionConfig(2, 0.1), dropout=0.1, activation_dropout=0.1)
    ).double()


def relative(gradients, reference):
    difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, reference, strict=True)]).norm()
    return (difference / torch.cat([b.flatten() for b in reference]).norm()).item()


@pytest.mark.parametrize("scheme, tolerance", (("bosh3", 1e-6), ("dopri5", 1e-9), ("tsit5", 1e-9)))
def test_adjoint_within_tolerance_with_dropout_and_padding(block, scheme, tolerance):
    y = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    layout = Layout(torch.arange(5)[None] < torch.tensor([5, 2, 4])[:, None])
    f, config = block.prepare(y, layout), Adaptive(scheme, tolerance, tolerance)
    tensors = [y, *block.parameters()]
    weight = 1e-4 * torch.randn_like(y)
    exact = torch.autograd.grad((solve_adaptive(f, y, 1.5, config, layout).state * weight).sum(), tensors)
    record = AdjointRecord()
    result = solve_adjoint(f, y, 1.5, config, list(block.parameters()), layout, record=record)
    assert relative(torch.autograd.grad((result.state * weight).sum(), tensors), exact) < 100 * tolerance
    assert record.evaluations > 0 and result.status is Status.CONVERGED


def test_every_mode_agrees_in_float64(block):
    y = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    f, parameters = block.prepare(y), list(block.parameters())
    tight = Adaptive("dopri5", 1e-11, 1e-11)
    states = {
        "autograd": solve_adaptive(f, y, 1.0, tight).state,
        "recomputed": solve_adaptive(f, y, 1.0, tight, recompute=True).state,
        "batch control": solve_adaptive(f, y, 1.0, Adaptive("tsit5", 1e-11, 1e-11, step_control="batch")).state,
        "adjoint": solve_adjoint(f, y, 1.0, tight, parameters).state,
        "fixed": solve_explicit(f, y, Explicit("rk4", 64, gradient="checkpoint-step")).state,
    }
    reference = torch.autograd.grad(states["autograd"].square().sum(), [y, *parameters], retain_graph=True)
    for name, state in states.items():
        gradients = torch.autograd.grad(state.square().sum(), [y, *parameters])
        assert relative(gradients, reference) < 1e-8, name
    # Of order 2: extrapolated over two step sizes to compare at the same accuracy.
    coarse, fine = (
        torch.autograd.grad(solve_reversible(f, y, 1.0, n, parameters).state.square().sum(), [y, *parameters])
        for n in (64, 128)
    )
    extrapolated = [(4 * b - a) / 3 for a, b in zip(coarse, fine, strict=True)]
    assert relative(extrapolated, reference) < 1e-6


def test_adjoint_with_a_time_dependent_field():
    rate = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)

    def field(t, z):
        return rate * z * torch.cos(torch.as_tensor(t, dtype=z.dtype))

    y = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    result = solve_adjoint(field, y, 1.3, Adaptive("dopri5", 1e-10, 1e-10), [rate], start=0.2)
    angle = torch.sin(torch.tensor(1.5).double()) - torch.sin(torch.tensor(0.2).double())
    exact = y * torch.exp(rate * angle)
    torch.testing.assert_close(result.state, exact, rtol=0, atol=1e-8)
    for one, other in zip(
        torch.autograd.grad(result.state.sum(), [y, rate]), torch.autograd.grad(exact.sum(), [y, rate]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_adjoint_frozen_and_unused_parameters(block):
    block.attention.qkv.weight.requires_grad_(False)
    unused = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 3, 16, dtype=torch.float64)
    parameters = [*block.parameters(), unused]
    solve_adjoint(block.prepare(y), y, 1.0, Adaptive("bosh3"), parameters).state.sum().backward()
    assert block.attention.qkv.weight.grad is None and unused.grad is None
    assert block.attention.out.weight.grad.abs().sum() > 0


def test_adjoint_of_a_solve_that_stopped_is_refused():
    y = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    result = solve_adjoint(lambda t, z: -1e6 * (z - 2), y, 1.0, Adaptive("dopri5", 1e-6, 1e-6, 50), [])
    assert result.status is Status.BUDGET_SPENT
    with pytest.raises(ArithmeticError, match="raise max_evaluations"):
        result.state.sum().backward()


def test_adjoint_of_a_flow_that_cannot_be_run_backward_is_refused():
    y = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    config = Adaptive("dopri5", 1e-6, 1e-6, 2000)
    result = solve_adjoint(lambda t, z: -40 * z * z.abs().sqrt(), y, 60.0, config, [])
    with pytest.raises(ArithmeticError, match="adjoint solve failed.*checkpoint-step"):
        result.state.sum().backward()
