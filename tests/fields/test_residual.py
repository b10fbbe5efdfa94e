"""The residual formulas on numbers, and the layer norms around them."""

import pytest
import torch
from torch import nn

from fairseq_implicit.depth.equilibrium import EquilibriumConfig, EquilibriumDepth
from fairseq_implicit.depth.stack import BlockStack, StackConfig
from fairseq_implicit.fields.equilibrium_cell import CellConfig
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.residual import RESIDUALS
from fairseq_implicit.fields.time_conditioned import DepthEmbeddedField
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.solvers.runge_kutta import RungeKutta

DIM = 8


def numbers(kind):
    """A residual whose sub-layers and norms are affine, on which every formula is a number."""
    norms = (lambda y: 2 * y, lambda y: 3 * y, lambda y: 5 * y)[: RESIDUALS[kind].norm_count]
    onto_it = lambda branch: lambda y, *added, onto=None: branch(y, *added) + (0 if onto is None else onto)  # noqa: E731
    mix = onto_it(lambda y, added=None: 10 * y + (0 if added is None else added))
    feeds = (onto_it(lambda y: 4 * y), onto_it(lambda y: 7 * y))[-RESIDUALS[kind].feed_count :]
    return RESIDUALS[kind](mix, feeds, norms)


def by_hand(kind, y, stream=0.0, added=0.0):
    if kind == "pre-norm":
        y = y + stream
        y = y + 10 * (2 * y) + added
        return y + 7 * (3 * y)
    if kind == "post-norm":
        y = 2 * (y + stream + 10 * y + added)
        return 3 * (y + 7 * y)
    if kind == "parallel":
        y = y + stream
        return y + (10 * (2 * y) + added) + 7 * (2 * y)
    y = y + stream
    y = y + 4 * (2 * y) / 2
    y = y + 10 * (3 * y) + added
    return y + 7 * (5 * y) / 2


@pytest.mark.parametrize("kind", RESIDUALS)
def test_layer_increment_and_injection_are_one_formula(kind):
    residual, y = numbers(kind), torch.tensor([[[1.0, -0.5]]], dtype=torch.float64)
    torch.testing.assert_close(residual.layer(y), by_hand(kind, y))
    torch.testing.assert_close(residual.increment(y), by_hand(kind, y) - y)
    stream, added = torch.full_like(y, 0.25), torch.full_like(y, 0.5)
    torch.testing.assert_close(residual.layer(y, (stream, None)), by_hand(kind, y, stream))
    torch.testing.assert_close(residual.layer(y, (stream, added)), by_hand(kind, y, stream, added))


def config(norm, **options):
    return TransformerFieldConfig(DIM, 16, AttentionConfig(2), norm=norm, **options)


MAKERS = {
    "stack": lambda norm: BlockStack(
        StackConfig(2, DIM, RungeKutta("rk2", stage_norm=True), history="dlcl", final_norm=True, norm=norm),
        lambda layer: TransformerField(config(norm, kind="macaron")),
    ),
    "embedded": lambda norm: DepthEmbeddedField(config(norm), 2.0),
    "equilibrium": lambda norm: EquilibriumDepth(EquilibriumConfig(CellConfig(config(norm)), coda_layers=1)),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "options, parameters", [(dict(eps=1e-12), 2), (dict(bias=False), 1), (dict(affine=False), 0)], ids=str
)
def test_one_configuration_reaches_every_norm(make, options, parameters):
    torch.manual_seed(0)
    norm = NormConfig(**options)
    module = MAKERS[make](norm)
    norms = [each for each in module.modules() if isinstance(each, nn.LayerNorm)]
    assert len(norms) > 1 and {each.eps for each in norms} == {norm.eps}
    assert {len(list(each.parameters())) for each in norms} == {parameters}
    x = torch.randn(2, 3, DIM)
    state = module.prepare(x)(0.5, x) if make == "embedded" else module(x).state
    state.square().sum().backward()
    assert state.isfinite().all() and all(each.grad.isfinite().all() for each in module.parameters())


def test_bert_s_eps_is_that_of_torchs_layer():
    torch.manual_seed(0)
    small = 1e-4 * torch.randn(2, 3, DIM, dtype=torch.float64)  # a state that 1e-5 would swallow
    layer = nn.TransformerEncoderLayer(
        DIM, 2, 16, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True, dtype=torch.float64
    )
    field = TransformerField(config(NormConfig(eps=1e-12), kind="post-norm")).double()
    names = {
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias",
        "attention.out": "self_attn.out_proj",
        "feed_forward.fc1": "linear1",
        "feed_forward.fc2": "linear2",
        "attention_norm": "norm1",
        "feed_forward_norm": "norm2",
    }
    theirs, ours = layer.state_dict(), {}
    for name in field.state_dict():
        part = name if name in names else name.rpartition(".")[0]
        ours[name] = theirs[name.replace(part, names[part])]
    field.load_state_dict(ours)
    torch.testing.assert_close(field.prepare(small).layer(0.0, small), layer.train()(small), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
def test_an_impossible_eps_is_refused(eps):
    with pytest.raises(ValueError, match="needs a positive eps"):
        NormConfig(eps=eps)
