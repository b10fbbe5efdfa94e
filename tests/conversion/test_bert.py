"""BERT of transformers and its import: one function, gradients included, and a round trip to the last bit."""

import dataclasses

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from fairseq_implicit.conversion import bert as bert_names
from fairseq_implicit.conversion.bert import from_transformers, to_transformers
from fairseq_implicit.models.ode_bert import OdeBertConfig
from fairseq_implicit.networks.encoder import Encoder
from fairseq_implicit.networks.heads import ClassificationHead, ClassificationHeadConfig, Pooler
from tests.conversion.agreement import assert_one_function

HEAD = "classification_heads.sentence_classification_head."
TOKENS = torch.tensor([[2, 11, 12, 3, 13, 14, 15, 3], [2, 16, 3, 17, 3, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]])
REAL = TOKENS.ne(0)


def bert(kind, **settings):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=20)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = kind(BertConfig(**shape, max_position_embeddings=12, **quiet, **settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def imported(model):
    """Network and settings, weights and the rest of them: what is not below the masked-LM head."""
    settings, weights = from_transformers(model.config.to_dict(), model.state_dict())
    config = OdeBertConfig(**{name: value for name, value in settings.items() if name != "_name"})
    config.check()
    around = config.network(model.config.vocab_size, model.config.pad_token_id)
    if "encoder.lm_head.weight" not in weights:
        around = dataclasses.replace(around, head=None)
    network = Encoder(around, config.build_depth()).double()
    network.load_state_dict(
        {name[len("encoder.") :]: weight for name, weight in weights.items() if name.startswith("encoder.")}
    )
    return network, {name[len(HEAD) :]: weight for name, weight in weights.items() if name.startswith(HEAD)}


def close(ours, theirs, message=None):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=message)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_features_pooler_and_every_gradient_agree(activation):
    theirs = bert(BertModel, hidden_act=activation)
    assert theirs.config.layer_norm_eps == 1e-12
    ours, pooled = imported(theirs)
    pooler = Pooler(16).double()
    pooler.load_state_dict(pooled)
    expected = theirs(TOKENS, attention_mask=REAL, token_type_ids=SEGMENTS)
    found = ours(TOKENS, segments=SEGMENTS, features_only=True)
    close(found.values[REAL], expected.last_hidden_state[REAL])
    close(pooler(found.values), expected.pooler_output)
    weights = torch.randn(2, 8, 16, dtype=torch.float64)
    (pooler(found.values).sum() + (found.values * weights)[REAL].sum()).backward()
    (expected.pooler_output.sum() + (expected.last_hidden_state * weights)[REAL].sum()).backward()
    _, gradients = from_transformers(
        theirs.config.to_dict(), {name: parameter.grad for name, parameter in theirs.named_parameters()}
    )
    named = [(f"encoder.{name}", parameter) for name, parameter in ours.named_parameters()]
    named += [(HEAD + name, parameter) for name, parameter in pooler.named_parameters()]
    for name, parameter in named:
        close(parameter.grad, gradients.pop(name), name)
    assert not gradients
    assert not torch.allclose(ours(TOKENS, features_only=True).values, found.values, atol=1e-3)  # segments matter


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu_new", "type_vocab_size": 3}], ids=str)
def test_the_masked_lm_and_every_gradient_agree(settings):
    assert_one_function(bert(BertForMaskedLM, **settings), bert_names, SEGMENTS)


def test_hidden_states_agree():
    theirs = bert(BertModel)
    ours, _ = imported(theirs)
    expected = theirs(TOKENS, attention_mask=REAL, token_type_ids=SEGMENTS, output_hidden_states=True).hidden_states
    found = ours(TOKENS, segments=SEGMENTS, features_only=True, return_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        close(one[REAL], other[REAL])


def test_the_heads_of_pretraining_agree():
    theirs = bert(BertForPreTraining)
    ours, weights = imported(theirs)
    head = ClassificationHead(16, ClassificationHeadConfig(classes=2)).double()
    head.load_state_dict(weights)
    expected = theirs(TOKENS, attention_mask=REAL, token_type_ids=SEGMENTS)
    close(ours(TOKENS, segments=SEGMENTS).values[REAL], expected.prediction_logits[REAL])
    close(head(ours(TOKENS, segments=SEGMENTS, features_only=True).values), expected.seq_relationship_logits)


@pytest.mark.parametrize(
    "kind, classifier",
    [
        (BertModel, "classifier"),
        (BertForMaskedLM, "classifier"),
        (BertForPreTraining, "cls.seq_relationship"),
        (BertForSequenceClassification, "classifier"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_there_and_back_to_the_last_bit(kind, classifier):
    theirs = bert(kind)
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    config, back = to_transformers(settings, weights, classifier=classifier)
    if kind is BertModel:
        back = {name.removeprefix("bert."): weight for name, weight in back.items()}
    expected = theirs.state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    assert config == {name: theirs.config.to_dict()[name] for name in config} and "layer_norm_eps" in config
    again = from_transformers(config, back)
    assert again[0] == settings and all(torch.equal(again[1][name], weights[name]) for name in weights)


def test_files_without_the_tied_matrix_and_with_the_first_names():
    theirs = bert(BertForMaskedLM)
    _, expected = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in theirs.state_dict().items()
        if not name.startswith("cls.predictions.decoder.")
    }
    older["bert.embeddings.position_ids"] = torch.arange(12)[None]
    _, found = from_transformers(theirs.config.to_dict(), older)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_an_output_matrix_of_its_own_stays_one():
    theirs = bert(BertForMaskedLM, tie_word_embeddings=False)
    ours, _ = imported(theirs)
    assert not torch.equal(ours.lm_head.weight, ours.embed_tokens.weight)
    close(ours(TOKENS).values[REAL], theirs(TOKENS, attention_mask=REAL).logits[REAL])


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("is_decoder", True, "is_decoder is True, and only of False"),
        ("position_embedding_type", "relative_key", "position_embedding_type is relative_key"),
        ("hidden_act", "silu", "hidden_act is silu: an ode_bert has gelu"),
    ],
)
def test_other_functions_are_refused(field, value, sentence):
    theirs = bert(BertModel)
    with pytest.raises(ValueError, match=sentence):
        from_transformers({**theirs.config.to_dict(), field: value}, theirs.state_dict())


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(ode_scheme="rk2"), "ode_scheme is rk2: only euler"),
        (dict(ode_field="pre-norm"), "ode_field is pre-norm, and only post-norm"),
        (dict(ode_tied=True), "ode_tied is True, and only False"),
        (dict(ode_steps=2), "ode_steps is 2"),
        (dict(mixer="mean"), "mixer is mean"),
        (dict(activation_fn="tanh"), "activation_fn is tanh"),
    ],
)
def test_what_is_no_bert_is_not_exported(settings, sentence):
    theirs = bert(BertModel)
    own, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match=sentence):
        to_transformers({**own, **settings}, weights)


def test_weights_that_have_no_place_are_refused():
    theirs = bert(BertModel)
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="encoder.layer.0.adapter.weight is not a weight of a BERT"):
        from_transformers(
            theirs.config.to_dict(), {**theirs.state_dict(), "encoder.layer.0.adapter.weight": torch.zeros(1)}
        )
    weights["encoder.depth.final_norm.weight"] = torch.ones(16)
    with pytest.raises(ValueError, match="encoder.depth.final_norm.weight has no place in a BERT"):
        to_transformers(settings, weights)
    missing = {
        name: weight for name, weight in theirs.state_dict().items() if "layer.1.attention.self.key.b" not in name
    }
    with pytest.raises(ValueError, match=r"fields.1.attention.qkv.bias needs 3 weights .* one of them is missing"):
        from_transformers(theirs.config.to_dict(), missing)
