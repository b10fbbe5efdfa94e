"""Heads are fairseq's: weights, random stream and output."""

import pytest
import torch
from fairseq.models.roberta.model import RobertaClassificationHead, RobertaLMHead
from torch import nn

from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.networks.heads import (
    ClassificationHead,
    ClassificationHeadConfig,
    MaskedLMHead,
    MaskedLMHeadConfig,
)


def same_weights(ours, theirs):
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_head(tied):
    embedding, features = nn.Embedding(11, 8), torch.randn(2, 5, 8)
    torch.manual_seed(0)
    ours = MaskedLMHead(embedding, MaskedLMHeadConfig(tied=tied))
    torch.manual_seed(0)
    theirs = RobertaLMHead(8, 11, "gelu", embedding.weight if tied else None)
    same_weights(ours, theirs)
    assert torch.equal(ours(features), theirs(features))
    assert (ours.weight is embedding.weight) == tied


@pytest.mark.parametrize("activation", ["gelu", "gelu_accurate", "relu", "tanh", "linear"])
def test_activations_are_fairseqs(activation):
    embedding, features = nn.Embedding(11, 8), torch.randn(2, 5, 8)
    torch.manual_seed(0)
    ours = MaskedLMHead(embedding, MaskedLMHeadConfig(activation))
    theirs = RobertaLMHead(8, 11, activation, embedding.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=1e-6)


def test_norm_options_reach_the_head():
    head = MaskedLMHead(nn.Embedding(11, 8), MaskedLMHeadConfig(norm=NormConfig(eps=1e-12, bias=False)))
    assert head.layer_norm.eps == 1e-12 and head.layer_norm.bias is None
    assert head(torch.randn(2, 8)).shape == (2, 11)


@pytest.mark.parametrize("spectral", [False, True])
def test_classification_head(spectral):
    features = torch.randn(3, 5, 8)
    torch.manual_seed(0)
    ours = ClassificationHead(8, ClassificationHeadConfig(4, inner_dim=6, dropout=0.3, spectral_norm=spectral))
    torch.manual_seed(0)
    theirs = RobertaClassificationHead(8, 6, 4, "tanh", 0.3, do_spectral_norm=spectral)
    same_weights(ours, theirs)
    for training in (True, False):
        torch.manual_seed(1)
        found = ours.train(training)(features)
        torch.manual_seed(1)
        assert torch.equal(found, theirs.train(training)(features))


def test_an_unknown_activation_is_refused():
    for make in (
        lambda: MaskedLMHeadConfig("swish"),
        lambda: ClassificationHead(8, ClassificationHeadConfig(2, 8, "swish")),
    ):
        with pytest.raises(ValueError, match="activation: 'swish' is unknown: choose one of gelu"):
            make()
