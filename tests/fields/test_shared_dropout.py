"""Rates and scales of the masks, in every floating-point type."""

import math

import pytest
import torch

from fairseq_implicit.fields.shared_dropout import DropPath, ReplayedGenerator, SharedDropout, keep_mask


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.93])
def test_mask_rate_and_scale(rate):
    torch.manual_seed(0)
    count = 400_000
    mask, scale = keep_mask((count,), rate, torch.device("cpu"))
    spread = 4 * math.sqrt(max(rate * (1 - rate), 1e-9) / count)
    assert abs(mask.double().mean().item() - (1 - rate)) <= spread + 1e-5
    assert scale == pytest.approx(1 / (1 - rate), rel=2e-4)


def test_mask_elements_are_independent():
    """Four elements are cut from one 64-bit draw: no correlation at lags 1 to 4."""
    torch.manual_seed(0)
    mask, _ = keep_mask((400_000,), 0.5, torch.device("cpu"))
    centred = mask.double() - 0.5
    for lag in range(1, 5):
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < 4 * 0.25 / math.sqrt(400_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_elements_are_scaled_in_full_precision(dtype):
    torch.manual_seed(0)
    ones = torch.ones(8, 16, 32, dtype=dtype)
    dropped = SharedDropout(0.1).train().prepare(ones)(ones)
    assert dropped.dtype == dtype
    kept = dropped[dropped != 0].double()
    assert (kept == kept[0]).all()
    assert kept[0].item() == pytest.approx(1 / 0.9, rel=max(torch.finfo(dtype).eps, 2e-5))


def test_drop_path_keeps_or_drops_whole_samples():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = DropPath(0.25).train().prepare(x)(x)
    kept = dropped[:, 0, 0]
    assert torch.equal(dropped, kept.view(-1, 1, 1).expand_as(x))
    assert abs((kept != 0).double().mean().item() - 0.75) < 0.03
    assert kept.mean().item() == pytest.approx(1.0, abs=0.04)


def test_evaluation_mode_and_rate_zero_are_the_identity():
    x = torch.randn(2, 3, 4)
    assert SharedDropout(0.5).eval().prepare(x)(x) is x
    assert SharedDropout(0.0).train().prepare(x)(x) is x


def test_replayed_generator_repeats_noise_and_leaves_no_trace():
    torch.manual_seed(0)
    replay, other = ReplayedGenerator(torch.device("cpu")), ReplayedGenerator(torch.device("cpu"))
    before = torch.get_rng_state()
    draws = []
    for generator in (replay, replay, other):
        with generator:
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_a_seed_gives_the_same_mask_in_every_precision(dtype):
    """Zero and one exactly, cut from the same words: what half precision drops is what float32 drops."""
    torch.manual_seed(0)
    expected, scale = keep_mask((3, 7, 5), 0.3, torch.device("cpu"), torch.float64)
    torch.manual_seed(0)
    mask, same = keep_mask((3, 7, 5), 0.3, torch.device("cpu"), dtype)
    assert mask.dtype is dtype and same == scale
    assert torch.equal(mask.double(), expected) and set(expected.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_rounds_once_forward_and_backward(dtype):
    """The scale is never rounded itself: values, sums and gradients are those of float64, rounded to the nearest."""
    torch.manual_seed(0)
    x, onto, slope = (torch.randn(4, 9, 16, dtype=dtype) for _ in range(3))
    drop = SharedDropout(0.1).train().prepare(x)
    mask = drop(torch.ones_like(x)).ne(0).double()
    scale = 65536 / (65536 - round(0.1 * 65536))
    x.requires_grad_(), onto.requires_grad_()
    assert torch.equal(drop(x), (x.double() * mask * scale).to(dtype))
    total = drop(x, onto)
    # In float32 before it is rounded: of 576 sums a handful lies at the middle between two numbers.
    exact = onto.double() + x.double() * mask * scale
    assert (total.double() - exact).abs().le(torch.finfo(dtype).eps * 0.51 * exact.abs() + 1e-7).all()
    total.backward(slope)
    assert torch.equal(x.grad, (slope.double() * mask * scale).to(dtype)) and torch.equal(onto.grad, slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mean_is_preserved(dtype):
    """Within four standard errors of the mask, which a scale rounded to bfloat16 would leave by 0.15 %."""
    torch.manual_seed(0)
    ones = torch.ones(64, 256, 256, dtype=dtype)
    rate = 0.01
    dropped = SharedDropout(rate).train().prepare(ones, width=256)(ones.float(), torch.zeros(ones.shape))
    error = 4 * math.sqrt(rate / (1 - rate) / ones.numel())
    assert abs(dropped.double().mean().item() - 1.0) < error + 2**-17


def test_a_sum_in_one_pass_has_the_bits_of_two_in_float32():
    torch.manual_seed(0)
    x, onto = torch.randn(3, 5, 67), torch.randn(3, 5, 67)
    drop = SharedDropout(0.3).train().prepare(x)
    factor = drop(torch.ones_like(x))
    assert torch.equal(drop(x, onto), onto + x * factor) and torch.equal(drop(x), x * factor)


@pytest.mark.parametrize("site", [SharedDropout(0.4), DropPath(0.4), SharedDropout(0.4).eval()])
def test_first_and_second_derivatives(site):
    torch.manual_seed(0)
    x, onto = (torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    drop = site.prepare(x)
    assert torch.autograd.gradcheck(lambda x, onto: drop(x * x, onto), (x, onto))
    assert torch.autograd.gradgradcheck(lambda x, onto: drop(x * x, onto), (x, onto))


def test_inside_a_sub_layer_the_mask_has_autocasts_precision():
    x = torch.randn(2, 3, 4)
    site = SharedDropout(0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        inside, at_the_end = site.prepare(x, width=6), site.prepare(x)
    product = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    assert inside(product).dtype is torch.bfloat16
    branch = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    total = at_the_end(branch, x)
    assert total.dtype is torch.float32
    total.sum().backward()
    assert branch.grad.dtype is torch.bfloat16
