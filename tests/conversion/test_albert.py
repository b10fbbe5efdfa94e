"""ALBERT of transformers and its import: one function, gradients included, and a round trip to the last bit."""

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM, AlbertForPreTraining, AlbertForSequenceClassification

from fairseq_implicit.conversion import albert
from fairseq_implicit.networks.heads import ClassificationHead, ClassificationHeadConfig
from tests.conversion.agreement import REAL, SEGMENTS, TOKENS, assert_one_function, network_of, random_model

HEAD = "classification_heads.sentence_classification_head."


def model_of(kind=AlbertForMaskedLM, **settings):
    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, vocab_size=20)
    return random_model(kind, AlbertConfig(**{**shape, "embedding_size": 8, "max_position_embeddings": 12, **settings}))


CONFIGURATIONS = [
    {},
    {"embedding_size": 16},
    {"num_hidden_groups": 3, "hidden_act": "gelu"},
    {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-5},
]


@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=str)
def test_logits_hidden_states_and_every_gradient_agree(settings):
    assert_one_function(model_of(**settings), albert, SEGMENTS)


def test_the_head_of_sentence_order_agrees():
    theirs = model_of(AlbertForPreTraining)
    settings, weights = albert.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    head = ClassificationHead(16, ClassificationHeadConfig(classes=2)).double()
    head.load_state_dict({name[len(HEAD) :]: weight for name, weight in weights.items() if name.startswith(HEAD)})
    features = network_of(settings, weights, theirs.config)(TOKENS, segments=SEGMENTS, features_only=True).values
    expected = theirs.eval()(TOKENS, attention_mask=REAL, token_type_ids=SEGMENTS).sop_logits
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("kind", [AlbertForMaskedLM, AlbertForPreTraining, AlbertForSequenceClassification])
def test_there_and_back_to_the_last_bit(kind, settings):
    theirs = model_of(kind, **settings)
    own, weights = albert.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    pairs = {"classifier": "sop_classifier.classifier"} if kind is AlbertForPreTraining else {}
    config, back = albert.to_transformers(own, weights, **pairs)
    expected = theirs.state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    assert config == {name: theirs.config.to_dict()[name] for name in config} and "num_hidden_groups" in config
    assert own["ode_tied"] is (settings.get("num_hidden_groups", 1) == 1)


def test_all_that_does_not_fit_is_said_at_once():
    theirs = model_of(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2, hidden_act="silu")
    with pytest.raises(ValueError) as refused:
        albert.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    assert str(refused.value) == (
        "hidden_act is silu: an ode_bert has gelu, gelu_new, gelu_pytorch_tanh, relu; num_hidden_groups is 2, and an "
        "ode_bert has 1 or one for each of its 4 layers; inner_group_num is 2, and a block of an ode_bert is 1 layer"
    )
    theirs = model_of()
    strange = {**theirs.state_dict(), "albert.adapter.weight": torch.ones(1), "albert.adapter.bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"adapter.weight is not a weight of a ALBERT, nor are albert.adapter.bias:"):
        albert.from_transformers(theirs.config.to_dict(), strange)


def test_what_is_no_albert_is_not_exported():
    theirs = model_of()
    settings, weights = albert.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    changes = dict(encoder_embedding_dim=None, ode_scheme="rk4", mixer="disentangled", encoder_positions="none")
    del weights["encoder.embed_positions.weight"]
    with pytest.raises(ValueError) as refused:
        albert.to_transformers({**settings, **changes}, weights)
    for part in (
        "ode_scheme is rk4",
        "mixer is disentangled",
        "encoder_embedding_dim is not",
        "encoder_positions is none",
    ):
        assert part in str(refused.value)
