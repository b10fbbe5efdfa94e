"""Euler on the post-norm field is fairseq's RoBERTa: outputs and every gradient."""

import argparse

import pytest
import torch
from fairseq.models.roberta import RobertaModel
from torch.nn import functional

from fairseq_implicit.conversion.roberta import checkpoint_from_fairseq, from_fairseq, to_fairseq
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

SHAPE = dict(encoder_layers=3, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)


def roberta_arguments(pre_norm: bool) -> argparse.Namespace:
    return argparse.Namespace(
        **SHAPE,
        max_positions=24,
        dropout=0.0,
        attention_dropout=0.0,
        encoder_normalize_before=pre_norm,
        # fairseq leaves the embedding's norm out in its pre-norm preset
        layernorm_embedding=not pre_norm,
    )


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def pair(request, task):
    torch.manual_seed(0)
    theirs = RobertaModel.build_model(roberta_arguments(request.param), task).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    config = OdeBertConfig(
        **SHAPE,
        max_positions=24,
        dropout=0.0,
        attention_dropout=0.0,
        ode_scheme="euler",
        ode_field="pre-norm" if request.param else "post-norm",
        no_layernorm_embedding=request.param,
    )
    ours = OdeBertModel.build_model(config, task).double()
    ours.load_state_dict(from_fairseq(theirs.state_dict()))
    # fairseq computes gelu in float32 whatever the input, which would hide anything below 1e-8.
    for module in [*theirs.encoder.sentence_encoder.layers, theirs.encoder.lm_head, ours.encoder.lm_head]:
        module.activation_fn = functional.gelu
    return ours.train(), theirs.train()


def test_outputs_and_every_parameter_gradient_agree(pair, tokens):
    ours, theirs = pair
    masked = tokens.ne(1) & (torch.arange(12) % 3 == 1)
    weights = torch.randn(int(masked.sum()), len(ours.encoder.dictionary), dtype=torch.float64)
    our_logits, _ = ours(tokens, masked_tokens=masked)
    their_logits, _ = theirs(tokens, masked_tokens=masked)
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-10)
    (our_logits * weights).sum().backward()
    (their_logits * weights).sum().backward()
    # A gradient is a tensor of the parameter's shape: the same renaming brings the two sets side by side.
    their_gradients = from_fairseq({name: parameter.grad for name, parameter in theirs.named_parameters()})
    compared = 0
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients.pop(name), rtol=0, atol=1e-10, msg=name)
        compared += 1
    assert not their_gradients and compared == len(list(ours.parameters()))


def test_hidden_states_agree(pair, tokens):
    ours, theirs = pair
    _, our_extra = ours.eval()(tokens, features_only=True, return_all_hiddens=True)
    _, their_extra = theirs.eval()(tokens, features_only=True, return_all_hiddens=True)
    real = tokens.ne(1).t()
    assert len(our_extra["inner_states"]) == len(their_extra["inner_states"]) == 1 + SHAPE["encoder_layers"]
    for our_state, their_state in zip(our_extra["inner_states"], their_extra["inner_states"], strict=True):
        torch.testing.assert_close(our_state[real], their_state[real], rtol=0, atol=1e-10)


def test_published_checkpoints_with_older_names_convert(pair):
    _, theirs = pair
    new = theirs.state_dict()
    old = {}
    for key, value in new.items():
        key = key.replace("encoder.", "decoder.", 1).replace("layernorm_embedding", "emb_layer_norm")
        if ".q_proj." in key:
            names = [key.replace(".q_proj.", f".{part}_proj.").replace("decoder.", "encoder.", 1) for part in "qkv"]
            old[key.replace(".q_proj.", ".in_proj_")] = torch.cat([new[name] for name in names])
        elif "_proj." not in key or "out_proj" in key:
            old[key] = value
    renamed, expected = from_fairseq(old), from_fairseq(new)
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[key], expected[key]) for key in expected)


def test_there_and_back_to_the_last_bit(pair):
    _, theirs = pair
    expected = theirs.state_dict()
    back = to_fairseq(from_fairseq(expected))
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)


def test_foreign_weights_are_refused(pair):
    _, theirs = pair
    state = dict(theirs.state_dict())
    state["encoder.sentence_encoder.layers.0.adapter.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="layers.0.adapter.weight is not a weight of a RoBERTa"):
        from_fairseq(state)


def test_converted_checkpoint_rebuilds_the_model(task, tokens):
    torch.manual_seed(0)
    arguments = roberta_arguments(pre_norm=False)
    theirs = RobertaModel.build_model(arguments, task).eval()
    converted = checkpoint_from_fairseq({"cfg": {"model": arguments, "task": None}, "model": theirs.state_dict()})
    settings = dict(converted["cfg"]["model"])
    assert settings.pop("_name") == "ode_bert"
    ours = OdeBertModel.build_model(OdeBertConfig(**settings), task).eval()
    ours.load_state_dict(converted["model"])
    real = tokens.ne(1)
    torch.testing.assert_close(ours(tokens)[0][real], theirs(tokens)[0][real], rtol=0, atol=1e-5)
