"""The cross entropy in pieces is the whole one: against float64, and in memory."""

import math

import pytest
import torch
from torch.nn import functional

from fairseq_implicit.networks import cross_entropy
from fairseq_implicit.networks.cross_entropy import cross_entropy_and_correct
from scripts.side_by_side import peak_bytes

IGNORED = 1


def batch(rows=37, classes=203, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(2, classes, (rows,), generator=generator)
    target[3] = IGNORED
    return logits.requires_grad_(), target


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_PIECE", {"cpu": 5 * 203 + 7})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_logits_give_torchs_digits(dtype):
    logits, target = batch(dtype=dtype)
    expected = functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
    (slope,) = torch.autograd.grad(expected, logits)
    loss, correct = cross_entropy_and_correct(logits, target, IGNORED)
    loss.backward()
    assert torch.equal(loss, expected) and loss.dtype is dtype
    assert torch.equal(logits.grad, slope)
    assert correct == ((logits.argmax(-1) == target) & target.ne(IGNORED)).sum() and not correct.requires_grad


@pytest.mark.parametrize("dtype, epsilon", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("loss_scale", [1.0, 128.0])
def test_half_precision_is_rounded_at_the_end_only(small_pieces, dtype, epsilon, loss_scale):
    """Against float64: the loss as exact as float32 is, each slope off by its own two roundings."""
    logits, target = batch(dtype=dtype)
    wide = logits.detach().double().requires_grad_()
    exact = functional.cross_entropy(wide, target, ignore_index=IGNORED, reduction="sum")
    exact.backward()
    loss, _ = cross_entropy_and_correct(logits, target, IGNORED)
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    (loss_scale * loss).backward()
    assert logits.grad.dtype is dtype
    error = (logits.grad.double() - loss_scale * wide.grad).abs()
    assert error.le(2 * epsilon * loss_scale * wide.grad.abs() + 2**-24).all()


def test_slopes_of_rare_words_survive_float16():
    """1e-8 is below what float16 holds, and what the scale of the loss is there to save."""
    logits = torch.zeros(1, 50, dtype=torch.float16)
    logits[0, 2], logits[0, 3] = 10.0, -8.4
    logits.requires_grad_()
    (4096.0 * cross_entropy_and_correct(logits, torch.tensor([2]), IGNORED)[0]).backward()
    exact = 4096 * torch.tensor(math.exp(-8.4 - 10)) / (1 + 48 * math.exp(-10))
    assert logits.grad[0, 3].item() == pytest.approx(exact.item(), rel=5e-3)


def test_no_second_copy_of_the_logits_but_their_gradient(small_pieces):
    """In the forward pass the slopes, in the backward pass these and what is returned."""
    logits, target = batch(rows=400, dtype=torch.bfloat16)
    held = logits.numel() * logits.element_size()
    forward = peak_bytes(lambda: cross_entropy_and_correct(logits, target, IGNORED))
    both = peak_bytes(lambda: cross_entropy_and_correct(logits, target, IGNORED)[0].backward())
    assert forward < 1.3 * held and both < 2.3 * held
    with torch.no_grad():
        assert peak_bytes(lambda: cross_entropy_and_correct(logits, target, IGNORED)) < 0.3 * held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_count_for_nothing(dtype):
    logits, _ = batch(rows=4, dtype=dtype)
    loss, correct = cross_entropy_and_correct(logits.view(2, 2, -1), torch.full((2, 2), IGNORED), IGNORED)
    loss.backward()
    assert loss == 0 and correct == 0 and not logits.grad.any()
    loss, correct = cross_entropy_and_correct(logits[:0], torch.zeros(0, dtype=torch.long), IGNORED)
    assert loss == 0 and correct == 0


def test_a_graph_that_is_kept_gives_its_gradient_twice_and_a_second_derivative_is_refused():
    logits, target = batch(dtype=torch.bfloat16)
    loss, _ = cross_entropy_and_correct(logits, target, IGNORED)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_several_largest_logits_the_first_is_the_guess(dtype):
    logits = torch.randint(0, 4, (500, 23), generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[::7, 5] = math.nan
    target = torch.arange(500) % 8 + 2
    _, correct = cross_entropy_and_correct(logits, target, IGNORED)
    assert correct == (logits.argmax(-1) == target).sum() > 20
