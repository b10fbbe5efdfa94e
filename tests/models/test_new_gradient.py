"""A gradient of an equilibrium is one class and one entry."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient
from fairseq_implicit.solvers.gradients.names import EQUILIBRIUM

SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=48, encoder_attention_heads=4)


@dataclass(frozen=True)
class Halved(EquilibriumGradient):
    """One tracked step whose gradient is divided by 2^K."""

    kind: ClassVar[str] = "halved"
    counted: ClassVar[bool] = True

    def update_cost(self, forward, adjoint):
        return forward + 3, "solve + 3"

    def attach(self, f, anchor, state, layout, precision, record):
        share = 0.5**self.steps
        return state * share + state.detach() * (1 - share)


def gradient(task, tokens, name):
    torch.manual_seed(0)
    model = DeqBertModel.build_model(DeqBertConfig(**SHAPE, dropout=0.0, deq_gradient=name), task).double().train()
    model(tokens)[0].square().sum().backward()
    return model.encoder.depth.cell.layers[0].feed_forward.fc1.weight.grad


def test_a_new_gradient_trains_a_model_by_its_name(task, tokens, monkeypatch, caplog):
    monkeypatch.setitem(EQUILIBRIUM, "halved", Halved)
    torch.testing.assert_close(gradient(task, tokens, "halved-2"), gradient(task, tokens, "jfb") / 4)
    with pytest.raises(ValueError, match="--deq-gradient: 'halved' needs its number"):
        DeqBertConfig(**SHAPE, deq_gradient="halved").check()
