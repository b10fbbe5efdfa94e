"""Attention's options against loops and formulas: rotary positions, windows, norms of queries and keys, gates."""

import math

import pytest
import torch
from torch.nn import functional

from fairseq_implicit.fields.feed_forward import ACTIVATIONS, FeedForward
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.mixers.rotary import rotation
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout

DIM, HEADS, TIME = 16, 2, 9
WIDTH = DIM // HEADS
REAL = torch.ones(3, TIME, dtype=torch.bool)
REAL[1, 6:] = False
REAL[2, :3] = False  # padding may come first
EVERYTHING = dict(rotary_base=50.0, qk_norm=True, window=2, no_biases=True)


def attention(dropout=0.0, **options):
    torch.manual_seed(0)
    built = AttentionConfig(HEADS, dropout, **options).build(DIM, "shared").double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def states(batch=3, time=TIME):
    return torch.randn(batch, time, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def looped(mixer, x, real):
    """Each query with each key, one number after the other."""
    config, places = mixer.config, (real.cumsum(1) - 1).clamp(min=0)
    out = torch.zeros_like(x)
    for row, length in enumerate(real.sum(1).tolist()):
        tokens = real[row].nonzero().squeeze(1).tolist()
        assert len(tokens) == length
        projected = mixer.qkv(x[row])
        for head in range(HEADS):
            columns = slice(head * WIDTH, (head + 1) * WIDTH)
            q, k, v = (part[:, columns] for part in projected.chunk(3, dim=1))
            if config.qk_norm:
                q, k = (normed(part) for part, normed in ((q, by(mixer.query_norm)), (k, by(mixer.key_norm))))
            for one in tokens:
                scores = []
                seen = [
                    o
                    for o in tokens
                    if config.window is None or abs(places[row, one] - places[row, o]) <= config.window
                ]
                for other in seen:
                    distance = float(places[row, one] - places[row, other])
                    scores.append(score(q[one], k[other], distance, config.rotary_base) / math.sqrt(WIDTH))
                shares = torch.stack(scores).softmax(0)
                out[row, one, columns] = sum(share * v[other] for share, other in zip(shares, seen, strict=True))
    return mixer.out(out)


def by(norm):
    """Mean 0 and variance 1 of the last axis, times the norm's weight."""
    assert norm.bias is None

    def normed(part):
        centred = part - part.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    return normed


def score(q, k, distance, base):
    """The product of q and k after q was turned by the angles of a distance, each plane as one complex number."""
    if base is None:
        return q @ k
    total = 0.0
    for plane in range(WIDTH // 2):
        one, other = (torch.complex(each[plane], each[plane + WIDTH // 2]) for each in (q, k))
        angle = distance * base ** (-2 * plane / WIDTH)
        total = total + (one * complex(math.cos(angle), math.sin(angle)) * other.conj()).real
    return total


@pytest.mark.parametrize(
    "options",
    [{}, dict(rotary_base=50.0), dict(window=1), dict(window=3), dict(qk_norm=True), dict(no_biases=True), EVERYTHING],
    ids=str,
)
def test_against_a_loop_with_padding_before_and_behind(options):
    mixer, x = attention(**options).eval(), states()
    with torch.no_grad():
        close(mixer.prepare(x, Layout(REAL))(x)[REAL], looped(mixer, x, REAL)[REAL])
        whole = torch.ones_like(REAL)
        close(mixer.prepare(x)(x), looped(mixer, x, whole))
    assert (mixer.qkv.bias is None) == (mixer.out.bias is None) == options.get("no_biases", False)


def test_dropped_attention_without_drops_is_the_same():
    """At a rate below the masks' resolution the path that draws must give what the fused kernel gives."""
    x = states()
    noisy, plain = attention(1e-9, **EVERYTHING).train(), attention(**EVERYTHING)
    close(noisy.prepare(x, Layout(REAL))(x)[REAL], plain.prepare(x, Layout(REAL))(x)[REAL])


def test_rotary_positions_know_distances_alone():
    mixer, x = attention(rotary_base=50.0, window=3), states()
    places = torch.arange(TIME).expand(3, TIME)
    here = mixer.prepare(x, Layout(positions=places))(x)
    close(mixer.prepare(x)(x), here)
    close(mixer.prepare(x, Layout(positions=places + 1000))(x), here, atol=1e-10)
    assert not torch.allclose(mixer.prepare(x, Layout(positions=2 * places))(x), here, atol=1e-3)
    flipped = mixer.prepare(x.flip(1))(x.flip(1)).flip(1)
    assert not torch.allclose(flipped, here, atol=1e-3)  # before is not behind
    plain = attention()
    close(plain.prepare(x.flip(1))(x.flip(1)).flip(1), plain.prepare(x)(x))


def test_a_rotation_keeps_lengths_and_halves_take_wider_angles():
    q = torch.randn(3, HEADS, TIME, WIDTH, dtype=torch.float64)
    turned = rotation(states(), WIDTH, 50.0, Layout(REAL))(q)
    close(turned.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], q[:, :, 0]) and torch.equal(turned[2, :, :4], q[2, :, :4])  # the first place
    half = torch.randn(1, HEADS, 4000, WIDTH, dtype=torch.bfloat16)
    far = rotation(torch.zeros(1, 4000, DIM, dtype=torch.bfloat16), WIDTH, 1e4)(half)
    exact = rotation(torch.zeros(1, 4000, DIM, dtype=torch.float64), WIDTH, 1e4)(half.double())
    assert far.dtype is torch.bfloat16
    torch.testing.assert_close(far.double(), exact, rtol=0, atol=0.02)


def test_padding_and_batch_mates_are_without_influence():
    mixer, x, layout = attention(**EVERYTHING), states(), Layout(REAL)
    other = x.clone()
    other[~REAL] = 1e3
    assert torch.equal(mixer.prepare(x, layout)(x)[REAL], mixer.prepare(other, layout)(other)[REAL])
    for row in range(3):
        alone = x[row : row + 1, REAL[row]]
        close(mixer.prepare(x, layout)(x)[row, REAL[row]], mixer.prepare(alone)(alone)[0])
    nothing = Layout(REAL & torch.tensor([[True], [True], [False]]))
    assert mixer.prepare(x, nothing)(x).isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("real", [None, REAL], ids=["whole", "padded"])
def test_what_a_window_lets_through(causal, real):
    x, window = states(), 2
    mask = Layout(real, causal=causal).mask(x, window).expand(3, 1, TIME, TIME)[:, 0]
    places = torch.arange(TIME).expand(3, TIME) if real is None else (real.cumsum(1) - 1).clamp(min=0)
    for row in range(3):
        for query in range(TIME):
            for key in range(TIME):
                if real is not None and not real[row, query]:
                    continue
                sees = (real is None or real[row, key]) and abs(places[row, query] - places[row, key]) <= window
                assert mask[row, query, key] == (sees and (not causal or key <= query))
    if real is not None:
        assert mask[:2].any(-1).all()  # a row of nothing has no softmax


def test_a_window_as_wide_as_the_sequence_costs_no_mask():
    x = states()
    assert Layout().visibility(x, TIME - 1) == (None, False) and Layout(causal=True).visibility(x, 99) == (None, True)
    assert Layout().visibility(x, TIME - 2)[0] is not None
    mask, causal = Layout(causal=True).visibility(x, 2)
    assert not causal and not mask[..., 0, 1] and mask[..., 1, 0]


def test_which_layers_see_what():
    config = AttentionConfig(HEADS, rotary_base=1e5, window=4, global_every=3, local_rotary_base=1e3)
    found = [(config.at(layer).window, config.at(layer).rotary_base) for layer in range(7)]
    everything, near = (None, 1e5), (4, 1e3)
    assert found == [everything, near, near, everything, near, near, everything]
    assert all(config.at(layer).differs_by is None for layer in range(7)) and config.differs_by == "global_every"
    alike = AttentionConfig(HEADS, rotary_base=1e5, window=4)
    assert alike.at(0) is alike.at(1) is alike and alike.differs_by is None


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_a_gated_feed_forward_network_is_its_formula(activation):
    torch.manual_seed(0)
    feed, z = FeedForward(DIM, 20, activation, gated=True).double(), states()
    inner, gate = functional.linear(z, feed.fc1.weight[:20]), functional.linear(z, feed.fc1.weight[20:])
    inner, gate = inner + feed.fc1.bias[:20], gate + feed.fc1.bias[20:]
    expected = functional.linear(ACTIVATIONS[activation](inner) * gate, feed.fc2.weight, feed.fc2.bias)
    close(feed.prepare(z)(z), expected)
    bare = FeedForward(DIM, 20, activation, gated=True, biases=False)
    assert [parameter.shape for parameter in bare.parameters()] == [(40, DIM), (DIM, 20)]
    assert feed.operations(5) == 2 * DIM * 60


def test_silu_is_a_product_with_a_sigmoid():
    z = states()
    close(ACTIVATIONS["silu"](z), z / (1 + (-z).exp()))


def test_dropouts_of_the_branches_are_apart():
    """With one branch silenced the noise of the other is all there is."""
    mixer = AttentionConfig(HEADS)
    config = TransformerFieldConfig(DIM, 32, mixer, dropout=0.5, feed_forward_dropout=0.0)
    torch.manual_seed(0)
    field, x = TransformerField(config).double().train(), states()
    assert config.is_noisy and not torch.equal(field.prepare(x)(0.0, x), field.prepare(x)(0.0, x))
    with torch.no_grad():
        field.attention.out.weight.zero_()
        field.attention.out.bias.zero_()
    assert torch.equal(field.prepare(x)(0.0, x), field.prepare(x)(0.0, x))
    assert TransformerFieldConfig(DIM, 32, mixer, feed_forward_dropout=0.1).is_noisy


def test_a_first_layer_without_its_norm():
    config = TransformerFieldConfig(DIM, 32, AttentionConfig(HEADS), first_norm=False)
    torch.manual_seed(0)
    field, x = TransformerField(config.at(0)).double(), states()
    u = x + field.attention.prepare(x)(x)
    close(field.prepare(x)(0.0, x), u + field.feed_forward.prepare(x)(field.feed_forward_norm(u)) - x)
    assert not [name for name in field.state_dict() if name.startswith("attention_norm")]
    assert "attention_norm.weight" in TransformerField(config.at(1)).state_dict()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(rotary_base=1.0), "rotary_base: a base of 1 makes no angles"),
        (dict(rotary_base=math.nan), "rotary_base: a base of nan makes no angles"),
        (dict(window=0), "window: it must be at least 1, not 0"),
        (dict(window=2, global_every=1), "global_every: it must be at least 2, not 1"),
        (dict(global_every=3), "global_every: all layers see all tokens: set `window`"),
        (dict(rotary_base=10.0, local_rotary_base=10.0), "local_rotary_base: .*needs `rotary_base` and `global_every`"),
        (dict(window=2, global_every=2, local_rotary_base=10.0), "local_rotary_base: .*needs `rotary_base`"),
    ],
    ids=str,
)
def test_impossible_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionConfig(HEADS, **options)


def test_heads_without_pairs_are_refused():
    with pytest.raises(ValueError, match="turn pairs of numbers: 2 attention heads make ones of width 3"):
        AttentionConfig(2, rotary_base=10.0).build(6, "shared")
