"""A network without fairseq: what it takes, what it refuses, how it starts."""

import pytest
import torch

from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED
from fairseq_implicit.networks.embeddings import EmbeddingConfig
from fairseq_implicit.networks.encoder import Encoder, EncoderConfig
from fairseq_implicit.networks.heads import MaskedLMHeadConfig
from fairseq_implicit.networks.initialisation import InitialisationConfig, initialise

TOKENS = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])


class OneStep(Depth):
    """One Euler step, and beside its state a second one that the loss shall see, too."""

    def __init__(self, dim=8):
        super().__init__()
        self.field = TransformerField(TransformerFieldConfig(dim, 16, AttentionConfig(2)))

    def layers(self):
        yield self.field

    def forward(self, x, layout=UNPADDED, return_hidden_states=False, return_lambdas=False):
        state = x + self.field.prepare(x, layout)(0.0, x)
        states = [x, state] if return_hidden_states else None
        return DepthOutput(state, states, {"steps": 1}, auxiliary_states=[(0.5, x)])


def network(depth=None, head=True, **embeddings):
    torch.manual_seed(0)
    config = EmbeddingConfig(**{"symbols": 11, "dim": 8, "positions": 6, "padding": 1, **embeddings})
    made = Encoder(EncoderConfig(config) if head else EncoderConfig(config, head=None), depth or OneStep(config.dim))
    initialise(made, InitialisationConfig(std=0.2))
    return made.eval()


def test_logits_features_and_what_the_depth_adds():
    model = network()
    output = model(TOKENS, return_hidden_states=True)
    features = model(TOKENS, features_only=True)
    assert output.values.shape == (2, 5, 11) and features.values.shape == (2, 5, 8)
    assert torch.equal(model.logits(features.values), output.values)
    assert len(output.hidden_states) == 2 and output.statistics == {"steps": 1}
    ((weight, other),) = output.auxiliary
    assert weight == 0.5 and torch.equal(other, model.logits(output.hidden_states[0]))
    masked = TOKENS.eq(2)
    torch.testing.assert_close(model(TOKENS, masked_tokens=masked).values, output.values[masked], rtol=0, atol=1e-6)


def test_padding_changes_nothing_and_absence_may_be_told():
    model = network()
    together = model(TOKENS).values
    torch.testing.assert_close(model(TOKENS[1:, :3]).values[0], together[1, :3], rtol=0, atol=1e-6)
    assert torch.equal(model(TOKENS[:1], has_padding=False).values, model(TOKENS[:1]).values)
    assert model.layout(TOKENS[:1]) is UNPADDED


def test_segments_are_added_or_refused():
    segments = torch.tensor([[0, 0, 1, 1, 2], [2, 1, 0, 0, 0]])
    model = network(segments=3, norm=None)
    layout = model.layout(TOKENS, segments)
    plain = model.embed(TOKENS, model.layout(TOKENS))
    added = model.embed_segments.weight[segments] - model.embed_segments.weight[0]
    expected = plain + layout.keep(added)
    torch.testing.assert_close(model.embed(TOKENS, layout), expected, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="the batch has segments, and this network has no embeddings of them"):
        network()(TOKENS, segments=segments)
    with pytest.raises(TypeError, match="segment_ids"):
        network()(TOKENS, segment_ids=segments)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_narrower_than_the_state(tied):
    config = EmbeddingConfig(symbols=11, dim=8, positions=6, padding=1, segments=2, width=3)
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(config, MaskedLMHeadConfig(tied=tied)), OneStep(8))
    initialise(model, InitialisationConfig(std=0.2, positions="sinusoidal"))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes["embed_tokens.weight"] == (11, 3) and shapes["embed_positions.weight"] == (8, 3)
    assert shapes["embedding_map.weight"] == (8, 3) and shapes["lm_head.dense.weight"] == (3, 8)
    assert ("lm_head.weight" in shapes) is not tied and model.lm_head.weight.shape == (11, 3)
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    layout = model.layout(TOKENS, segments)
    places = torch.tensor([[2, 3, 4, 5, 6], [2, 3, 4, 1, 1]])
    summed = model.embed_tokens(TOKENS) + model.embed_positions(places) + model.embed_segments(segments)
    expected = layout.keep(model.embedding_map(model.layernorm_embedding(summed)))
    torch.testing.assert_close(model.embed(TOKENS, layout), expected, rtol=0, atol=1e-6)
    assert not model.embed(TOKENS, layout)[1, 3:].any()  # the map's bias is none of padding's
    output = model(TOKENS, segments=segments)
    assert output.values.shape == (2, 5, 11)
    output.values.square().mean().backward()
    assert all(weight.grad.any() for weight in model.parameters())


def test_what_it_has_no_place_for_is_refused():
    with pytest.raises(ValueError, match="an input of 7 tokens is longer than the model's 6 positions"):
        network()(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="no masked-LM head: ask it for features_only"):
        network(head=False)(TOKENS)
    assert network(head=False)(TOKENS, features_only=True).values.shape == (2, 5, 8)
    with pytest.raises(ValueError, match="positions: it must be at least 1, not 0"):
        network(positions=0)
    with pytest.raises(ValueError, match="width: it must be at least 1, not 0"):
        network(width=0)


def test_starts():
    wide = dict(dim=64, positions=40, symbols=50)
    model = network(OneStep(64), **wide)
    for scheme, std in (("plain", 0.1), ("depth-scaled", 0.1 / 4), ("identity", 0.0)):
        initialise(model, InitialisationConfig(scheme, std=0.1, layers_in_series=8))
        assert model.depth.field.attention.out.weight.std().item() == pytest.approx(std, rel=0.03)
        assert model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.05)
        assert not model.embed_tokens.weight[1].any() and not model.depth.field.attention.qkv.bias.any()
    with pytest.raises(ValueError, match="scheme: 'zero' is unknown: choose one of depth-scaled"):
        InitialisationConfig("zero")
    with pytest.raises(ValueError, match="std: .* a positive standard deviation, not 0"):
        InitialisationConfig(std=0.0)
