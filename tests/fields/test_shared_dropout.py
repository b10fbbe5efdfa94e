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
