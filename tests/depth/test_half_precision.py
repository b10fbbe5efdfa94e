"""Stacks of half-precision weights with all dropout on: recomputation, one noise per solve, and float32's answers."""

import pytest
import torch

from fairseq_implicit.depth.stack import BlockStack
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.residual import RESIDUALS
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from tests.depth.configs import stack_config

DIM = 16
NOISE = dict(dropout=0.1, activation_dropout=0.1, drop_path=0.2)


def solved(dtype, gradient="autograd", kind="pre-norm", scheme="rk2"):
    """State and gradients, of the same weights, input and seed in every precision."""
    torch.manual_seed(1)
    config = TransformerFieldConfig(DIM, 2 * DIM, AttentionConfig(2, 0.1), kind, **NOISE)
    module = BlockStack(stack_config(2, DIM, gradient=gradient, scheme=scheme), lambda layer: TransformerField(config))
    x = torch.randn(4, 7, DIM).to(dtype).requires_grad_()
    # Weights that bfloat16 holds exactly: what differs is the arithmetic.
    module = module.to(torch.bfloat16).to(dtype).train()
    real = torch.ones(4, 7, dtype=torch.bool)
    real[1, 5:] = False
    torch.manual_seed(3)
    state = module(x, Layout(real)).state
    torch.rand(5)  # something else draws between forward and backward
    state.float().square().mean().backward()
    return [state.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["checkpoint-step", "checkpoint-stage"])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_recomputation_changes_no_bit(dtype, gradient, kind):
    for plain, recomputed in zip(solved(dtype, kind=kind), solved(dtype, gradient, kind), strict=True):
        assert plain.dtype is dtype and torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_seed_gives_what_float32_gives(dtype, digits, kind):
    """The same masks, so only rounding differs: about the square root of the thirty roundings on the way."""
    exact, rounded = solved(torch.float32, kind=kind), solved(dtype, kind=kind)
    for index, (wide, half) in enumerate(zip(exact, rounded, strict=True)):
        bound = 4 * digits if index == 0 else 16 * digits
        # A gradient that is zero but for rounding (that of the keys' bias) has no digits to compare.
        assert (wide - half.float()).norm() < bound * wide.norm() + digits * exact[1].norm(), index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_solve_sees_one_noise_and_two_solves_two(dtype):
    config = TransformerFieldConfig(DIM, 2 * DIM, AttentionConfig(2, 0.3), "post-norm", **NOISE)
    field, x = TransformerField(config).to(dtype).train(), torch.randn(2, 5, DIM, dtype=dtype)
    f, g = field.prepare(x), field.prepare(x)
    assert f(0.0, x).dtype is dtype and torch.equal(f(0.0, x), f(1.0, x)) and not torch.equal(f(0.0, x), g(0.0, x))
