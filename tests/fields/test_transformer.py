"""The fields against torch's own encoder layer, and their contract."""

import pytest
import torch
from torch import nn

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import KINDS, TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout

DIM, FFN, HEADS = 16, 32, 4


def build(kind: str, attention_dropout: float = 0.0, **rates) -> TransformerField:
    torch.manual_seed(0)
    return TransformerField(
        TransformerFieldConfig(DIM, FFN, AttentionConfig(HEADS, attention_dropout), kind, **rates)
    ).double()


def states(batch: int = 3, time: int = 7) -> torch.Tensor:
    return torch.randn(batch, time, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tail_padding(batch: int = 3, time: int = 7) -> torch.Tensor:
    mask = torch.zeros(batch, time, dtype=torch.bool)
    mask[1, 4:] = True
    mask[2, 6:] = True
    return mask


def reference_layer(field: TransformerField, norm_first: bool) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, FFN, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": field.attention.qkv.weight,
            "self_attn.in_proj_bias": field.attention.qkv.bias,
            "self_attn.out_proj.weight": field.attention.out.weight,
            "self_attn.out_proj.bias": field.attention.out.bias,
            "linear1.weight": field.feed_forward.fc1.weight,
            "linear1.bias": field.feed_forward.fc1.bias,
            "linear2.weight": field.feed_forward.fc2.weight,
            "linear2.bias": field.feed_forward.fc2.bias,
            "norm1.weight": field.attention_norm.weight,
            "norm1.bias": field.attention_norm.bias,
            "norm2.weight": field.feed_forward_norm.weight,
            "norm2.bias": field.feed_forward_norm.bias,
        }
    )
    return layer


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm"])
def test_state_plus_increment_is_torchs_encoder_layer(kind):
    field = build(kind)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x, padding = states(), tail_padding()
    layer = reference_layer(field, norm_first=kind == "pre-norm").train()
    expected = layer(x, src_key_padding_mask=padding)
    got = x + field.prepare(x, Layout(~padding))(0.0, x)
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=0, atol=1e-12)


def test_post_norm_layer_map_is_the_state_plus_the_increment():
    field, x = build("post-norm"), states()
    f = field.prepare(x)
    torch.testing.assert_close(f.layer(0.0, x), x + f(0.0, x), rtol=0, atol=1e-14)
    assert build("pre-norm").prepare(x).layer is None


@pytest.mark.parametrize("kind", ["parallel", "macaron"])
def test_other_kinds_are_their_written_out_sums(kind):
    field, x = build(kind), states()
    attend = field.attention.prepare(x)
    feed = field.feed_forward.prepare(x)
    if kind == "parallel":
        normed = field.attention_norm(x)
        expected = attend(normed) + feed(normed)
    else:
        u = x + field.first_feed_forward.prepare(x)(field.first_feed_forward_norm(x)) / 2
        v = u + attend(field.attention_norm(u))
        expected = v + feed(field.feed_forward_norm(v)) / 2 - x
    torch.testing.assert_close(field.prepare(x)(0.0, x), expected, rtol=0, atol=1e-12)


def test_all_kinds_have_the_same_number_of_weights():
    weights = {kind: sum(p.numel() for p in build(kind).parameters() if p.dim() > 1) for kind in KINDS}
    assert len(set(weights.values())) == 1


NOISE = dict(dropout=0.3, attention_dropout=0.3, activation_dropout=0.2, drop_path=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_solve_sees_one_noise_and_two_solves_two(kind):
    field, x = build(kind, **NOISE).train(), states()
    f, g = field.prepare(x), field.prepare(x)
    assert torch.equal(f(0.0, x), f(1.0, x))
    assert not torch.equal(f(0.0, x), g(0.0, x))
    field.eval()
    assert torch.equal(field.prepare(x)(0.0, x), field.prepare(x)(0.0, x))


def test_shared_attention_noise_leaves_the_global_generator_alone():
    field, x = build("pre-norm", attention_dropout=0.5).train(), states()
    f = field.prepare(x)
    before = torch.get_rng_state()
    f(0.0, x)
    assert torch.equal(before, torch.get_rng_state())


def test_dropped_attention_without_drops_is_torchs_attention():
    """At a rate below the masks' resolution the noisy path must give what the fused kernel gives."""
    noisy, plain, x, padding = (
        build("pre-norm", attention_dropout=1e-9).train(),
        build("pre-norm"),
        states(),
        tail_padding(),
    )
    got, expected = noisy.prepare(x, Layout(~padding))(0.0, x), plain.prepare(x, Layout(~padding))(0.0, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_independent_noise_differs_between_evaluations():
    field, x = build("pre-norm", dropout=0.3, dropout_policy="independent").train(), states()
    f = field.prepare(x)
    assert not torch.equal(f(0.0, x), f(0.0, x))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_still_and_its_content_changes_nothing(kind):
    field, x, padding = build(kind), states(), tail_padding()
    other = x.clone()
    other[padding] = 1e3
    dz, other_dz = field.prepare(x, Layout(~padding))(0.0, x), field.prepare(other, Layout(~padding))(0.0, other)
    assert torch.equal(dz, other_dz)
    assert (dz[padding] == 0).all()
    # A fully padded row is not a source of NaN either.
    padding[0] = True
    assert torch.isfinite(field.prepare(x, Layout(~padding))(0.0, x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind):
    field = build(kind, **NOISE).train()
    x = states(2, 3).requires_grad_()
    f = field.prepare(x)
    assert torch.autograd.gradcheck(lambda z: f(0.0, z), (x,), fast_mode=True)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(mixer=AttentionConfig(3)), "heads must divide the width"),
        (dict(kind="sandwich"), "unknown field 'sandwich'"),
        (dict(activation="softplus"), "unknown activation 'softplus'"),
        (dict(dropout=1.0), r"must lie in \[0, 1\)"),
        (dict(dropout_policy="sometimes"), "stage dropout must be one of"),
    ],
)
def test_impossible_configurations_are_refused(change, sentence):
    settings = dict(dim=DIM, ffn_dim=FFN, mixer=AttentionConfig(HEADS))
    settings.update(change)
    with pytest.raises(ValueError, match=sentence):
        TransformerField(TransformerFieldConfig(**settings))
