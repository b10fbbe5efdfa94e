"""Weight-tied ode_bert and deq_bert open each other's checkpoints with the same function."""

import copy
import dataclasses

import pytest
import torch

from fairseq_implicit.conversion.tied import deq_from_tied, tied_from_deq
from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

SHAPE = dict(encoder_layers=3, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)


def ode(task, **settings):
    torch.manual_seed(0)
    config = OdeBertConfig(**{**SHAPE, "ode_scheme": "euler", "ode_tied": True, **settings})
    return OdeBertModel.build_model(config, task).eval(), config


def checkpoint(model, config, name):
    stored = {**dataclasses.asdict(config), "_name": name}
    return {"model": model.state_dict(), "cfg": {"model": stored}, "last_optimizer_state": {}}


def opened(converted, task, **overrides):
    settings = dict(converted["cfg"]["model"])
    family, config = {"deq_bert": (DeqBertModel, DeqBertConfig), "ode_bert": (OdeBertModel, OdeBertConfig)}[
        settings.pop("_name")
    ]
    model = family.build_model(config(**{**settings, **overrides}), task)
    model.load_state_dict(copy.copy(converted["model"]))
    return model.eval()


@pytest.mark.parametrize("field", ["post-norm", "pre-norm"])
def test_there_and_back_is_the_same_function(task, tokens, field):
    source, config = ode(task, ode_field=field)
    there = deq_from_tied(checkpoint(source, config, "ode_bert"))
    with torch.no_grad():
        reference = source(tokens)[0]
        torch.testing.assert_close(opened(there, task)(tokens)[0], reference, rtol=0, atol=1e-6)
        back = opened(tied_from_deq(there), task)
        assert isinstance(back, OdeBertModel)
        assert torch.equal(back(tokens)[0], reference)


def test_the_same_cell_can_be_asked_for_its_equilibrium(task, tokens):
    source, config = ode(task, ode_field="post-norm")
    there = deq_from_tied(checkpoint(source, config, "ode_bert"))
    solved = opened(there, task, deq_gradient="ift", deq_eval_tol=1e-6)
    with torch.no_grad():
        logits, extra = solved(tokens)
    assert torch.isfinite(logits).all() and extra["output"].statistics["evaluations"] > 3


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(ode_tied=False), "ode_tied is False"),
        (dict(ode_scheme="rk4"), "ode_scheme is rk4"),
        (dict(ode_field="parallel"), "ode_field is parallel"),
        (dict(ode_steps=2), "ode_steps is 2"),
    ],
)
def test_a_stack_that_iterates_no_single_layer_is_refused(task, settings, sentence):
    source, config = ode(task, **settings)
    with pytest.raises(ValueError, match=sentence):
        deq_from_tied(checkpoint(source, config, "ode_bert"))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(), "deq_injection is residual"),
        (dict(deq_injection="none", deq_initial_state="input"), "a norm inside the map"),
        (dict(deq_injection="none", deq_initial_state="input", deq_cell_layers=2), "deq_cell_layers is 2"),
        (
            dict(
                deq_injection="none", deq_initial_state="input", deq_cell_norm="post-norm", deq_gradient="bptt-3",
                deq_gradient_damping=0.5,
            ),
            "whole steps",
        ),
    ],
)  # fmt: skip
def test_a_cell_that_is_no_plain_layer_is_refused(task, settings, sentence):
    config = DeqBertConfig(**{**SHAPE, **settings})
    with pytest.raises(ValueError, match=sentence):
        tied_from_deq(checkpoint(DeqBertModel.build_model(config, task), config, "deq_bert"))


def test_the_other_family_is_refused(task):
    source, config = ode(task)
    with pytest.raises(ValueError, match="holds ode_bert, not deq_bert"):
        tied_from_deq(checkpoint(source, config, "ode_bert"))
