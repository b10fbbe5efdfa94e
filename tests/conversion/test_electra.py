"""What an ELECTRA must be to be an ode_bert; that it is the same function stands in tests/commands."""

import pytest
import torch
from transformers import ElectraConfig, ElectraForPreTraining, ElectraForSequenceClassification

from fairseq_implicit.conversion import electra
from fairseq_implicit.conversion.rows import reordered, with_padding


def model_of(kind, **settings):
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=20)
    return kind(ElectraConfig(**{**shape, "embedding_size": 16, "max_position_embeddings": 12, **settings}))


@pytest.mark.parametrize(
    "kind, settings, sentence",
    [
        (ElectraForSequenceClassification, {"embedding_size": 8}, "embedding_size is 8, and only of hidden_size 16"),
        (ElectraForSequenceClassification, {"hidden_act": "relu"}, "hidden_act is relu, and ELECTRA's"),
        (ElectraForPreTraining, {}, "discriminator_predictions.dense.weight is not a weight of a ELECTRA"),
    ],
)
def test_other_functions_are_refused(kind, settings, sentence):
    theirs = model_of(kind, **settings)
    with pytest.raises(ValueError, match=sentence):
        electra.from_transformers(theirs.config.to_dict(), theirs.state_dict())


def test_a_head_with_another_activation_is_not_exported():
    theirs = model_of(ElectraForSequenceClassification)
    settings, weights = electra.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="pooler_activation_fn is tanh, and ELECTRA's head of classes has gelu"):
        electra.to_transformers({**settings, "pooler_activation_fn": "tanh"}, weights)


def test_rows_and_padding():
    weights = {
        "encoder.embed_tokens.weight": torch.arange(4)[:, None],
        "encoder.embed_positions.weight": torch.ones(6, 1),
    }
    order = torch.tensor([2, 0, 3, 1])
    moved = reordered(weights, order)
    assert moved["encoder.embed_tokens.weight"].flatten().tolist() == [2, 0, 3, 1]
    back = reordered(moved, order.argsort())
    assert torch.equal(back["encoder.embed_tokens.weight"], weights["encoder.embed_tokens.weight"])
    with pytest.raises(ValueError, match="the vocabulary's 3 tokens are not the model's 4"):
        reordered(weights, torch.tensor([2, 0, 1]))
    assert with_padding(weights, 5, 1)["encoder.embed_positions.weight"].flatten().tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert with_padding(weights, 4, 1)["encoder.embed_positions.weight"] is weights["encoder.embed_positions.weight"]
