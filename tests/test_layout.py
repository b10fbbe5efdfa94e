"""The layout of a batch: its means and norms against plain loops, padding, visibility, positions."""

import math

import pytest
import torch

from fairseq_implicit.depth.continuous import ContinuousConfig, ContinuousDepth
from fairseq_implicit.depth.equilibrium import EquilibriumConfig, EquilibriumDepth
from fairseq_implicit.depth.stack import BlockStack, StackConfig
from fairseq_implicit.fields.equilibrium_cell import CellConfig
from fairseq_implicit.fields.mixers.attention import AttentionConfig, MultiHeadAttention
from fairseq_implicit.fields.time_conditioned import DepthEmbeddedField
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout, token_sum
from fairseq_implicit.solvers.runge_kutta import RungeKutta

REAL = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, True, False]])
DIM = 6


def numbers(dtype=torch.float64):
    return torch.randn(3, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def of_sample(x, row, real=REAL):
    """The numbers of one sample's real tokens, as Python floats."""
    return [float(value) for token, kept in zip(x[row], real[row], strict=True) if kept for value in token]


@pytest.mark.parametrize("real", [REAL, torch.ones_like(REAL)], ids=["padded", "all real"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_and_norms_are_those_of_plain_loops(real, dtype):
    x, layout = numbers(dtype), Layout(real)
    samples = [of_sample(x, row, real) for row in range(3)]
    everything = [value for sample in samples for value in sample]
    near = dict(rel={torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype])
    assert layout.sizes(x).tolist() == [len(sample) for sample in samples]
    wide = x.double()  # a token's norm is rounded to the state's precision
    assert layout.norm(wide).tolist() == pytest.approx([math.hypot(*sample) for sample in samples], rel=1e-14)
    assert layout.sample_mean(x).tolist() == pytest.approx([math.fsum(s) / len(s) for s in samples], **near, abs=1e-2)
    assert layout.mean(x).item() == pytest.approx(math.fsum(everything) / len(everything), **near, abs=1e-2)
    assert layout.rms(x).item() == pytest.approx(math.hypot(*everything) / math.sqrt(len(everything)), rel=1e-6)


def test_a_layout_of_real_tokens_is_that_without_padding():
    x, marked = numbers(), Layout(torch.ones(3, 5, dtype=torch.bool))
    for of in ("norm", "sizes", "sample_mean", "mean", "rms", "keep"):
        torch.testing.assert_close(getattr(marked, of)(x), getattr(UNPADDED, of)(x), rtol=1e-15, atol=0)


def test_padding_changes_no_bit_of_a_norm_and_no_answer():
    x = numbers()
    beside = torch.cat([x, torch.full((3, 40, DIM), math.nan, dtype=x.dtype)], 1)
    layout = Layout(torch.arange(45).expand(3, 45) < 5)
    assert torch.equal(layout.norm(beside), UNPADDED.norm(x))
    assert torch.equal(token_sum(layout.keep(beside)), token_sum(x))
    assert torch.equal(layout.sizes(beside), UNPADDED.sizes(x))
    for of in ("mean", "rms"):
        torch.testing.assert_close(getattr(layout, of)(beside), getattr(UNPADDED, of)(x), rtol=1e-14, atol=0)
    finite = layout.keep(beside, otherwise=1e3)
    torch.testing.assert_close(layout.sample_mean(finite), UNPADDED.sample_mean(x), rtol=1e-13, atol=0)
    nobody = Layout(torch.zeros(3, 5, dtype=torch.bool))
    assert nobody.norm(x).eq(0).all() and nobody.sample_mean(x).eq(0).all()


def test_large_half_precision_states_have_a_finite_rms():
    x = torch.full((2, 3, 8), 1e4, dtype=torch.float16)
    assert UNPADDED.rms(x).item() == pytest.approx(1e4, rel=1e-3)
    assert UNPADDED.norm(x)[0].item() == pytest.approx(1e4 * math.sqrt(24), rel=1e-3)


def test_keep_selects_and_carries_no_gradient_at_padding():
    x, layout = numbers().requires_grad_(), Layout(REAL)
    kept = layout.keep(x, otherwise=7.0)
    assert kept[~REAL].eq(7).all() and torch.equal(kept[REAL], x[REAL])
    kept.sum().backward()
    assert torch.equal(x.grad, REAL[..., None].expand_as(x).double())
    assert UNPADDED.keep(x) is x


def test_the_layout_of_some_samples():
    segments = torch.tensor([[0, 0, 1, 1, 1]] * 3)
    layout = Layout(REAL, torch.arange(15).view(3, 5), segments, causal=True)
    chosen = layout.rows(torch.tensor([2, 0]))
    assert torch.equal(chosen.real, REAL[[2, 0]]) and chosen.positions[0, 0] == 10 and chosen.causal
    assert torch.equal(chosen.segments, segments[:2])
    real, alone = layout.alone(2, numbers())
    assert torch.equal(real, REAL[2]) and alone.real is None and alone.causal
    assert alone.positions.tolist() == [[11, 12, 13]] and alone.segments.tolist() == [[0, 1, 1]]
    assert UNPADDED.alone(1, numbers())[0].all()


def test_positions_are_places_among_real_tokens_unless_given():
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    assert UNPADDED.positions_of(tokens).tolist() == [[0, 1, 2, 3, 4]] * 3
    assert Layout(REAL).positions_of(tokens).tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0], [0, 0, 1, 2, 0]]
    given = torch.tensor([[3, 4, 5, 6, 7]] * 3)
    assert Layout(REAL, given).positions_of(tokens) is given


@pytest.mark.parametrize(
    "parts, sentence",
    [
        (dict(real=REAL.float()), "marked by bool, not by torch.float32"),
        (dict(real=REAL[0]), r"one shape \(batch, time\), not \[\(5,\)\]"),
        (dict(real=REAL, segments=torch.zeros(3, 4)), r"not \[\(3, 4\), \(3, 5\)\]"),
    ],
)
def test_impossible_layouts_are_refused(parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layout(**parts)


def by_hand(attention, x, seen):
    """Attention of each token over those that the explicit ``seen`` ``(batch, time, time)`` lets it see."""
    batch, time, dim = x.shape
    q, k, v = attention.qkv(x).view(batch, time, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None], -math.inf)
    return attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, dim))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["fused", "dropped"])
def test_attention_sees_what_the_layout_shows(causal, real, dropout):
    torch.manual_seed(1)
    attention, x = MultiHeadAttention(DIM, AttentionConfig(2, dropout)).double(), numbers()
    seen = torch.ones(3, 5, 5, dtype=torch.bool) if real is None else real[:, None, :].expand(3, 5, 5)
    if causal:
        seen = seen & torch.tensor([[key <= query for key in range(5)] for query in range(5)])
    found = attention.prepare(x, Layout(real, causal=causal))(x)
    somebody = seen.any(-1)
    assert found.isfinite().all()
    torch.testing.assert_close(found[somebody], by_hand(attention, x, seen)[somebody], rtol=0, atol=1e-12)


LAYER = dict(dim=DIM, ffn_dim=8, mixer=AttentionConfig(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockStack(
            StackConfig(2, DIM, RungeKutta("rk4"), final_norm=True),
            lambda _: TransformerField(TransformerFieldConfig(**LAYER)),
        ),
        lambda: ContinuousDepth(
            ContinuousConfig(DIM, 2.0, RungeKutta("rk4", 3)),
            DepthEmbeddedField(TransformerFieldConfig(**LAYER), 2.0),
        ),
        lambda: EquilibriumDepth(EquilibriumConfig(CellConfig(TransformerFieldConfig(**LAYER), initial_std=0.3))),
    ],
    ids=["stack", "continuum", "equilibrium"],
)
def test_in_every_depth_a_causal_layout_hides_what_comes_later(make):
    torch.manual_seed(0)
    depth, x = make().double().eval(), numbers()
    later = x.clone()
    later[:, 3:] = later[:, 3:].flip(-1)
    states = {}
    with torch.no_grad():
        for layout in (UNPADDED, Layout(causal=True), Layout(REAL, causal=True)):
            one, other = (depth(layout.keep(batch), layout).state for batch in (x, later))
            states[layout] = (one - other)[:, :3].abs().max().item()
    assert states.pop(UNPADDED) > 1e-4
    assert max(states.values()) < 1e-5
