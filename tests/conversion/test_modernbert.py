"""ModernBERT of transformers and its import: one function, gradients included, and a round trip to the last bit."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
)

from fairseq_implicit.conversion import bert, roberta
from fairseq_implicit.conversion.modernbert import from_transformers, to_transformers
from fairseq_implicit.models.ode_bert import OdeBertConfig
from fairseq_implicit.networks.encoder import Encoder
from tests.conversion.exact_modernbert import exact

PAD = 3
SHAPE = dict(
    hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=24, vocab_size=30, pad_token_id=PAD,
    max_position_embeddings=24, local_attention=6, global_attn_every_n_layers=3, attn_implementation="sdpa",
)  # fmt: skip
SMALL_IDS = dict(bos_token_id=0, cls_token_id=0, eos_token_id=2, sep_token_id=2)


def batch():
    """``(3, 20)`` ids and which are real: 20, 13 and 4 of them, so that windows of 3 on each side cut the first two."""
    tokens = torch.randint(4, 30, (3, 20), generator=torch.Generator().manual_seed(1))
    tokens[1, 13:] = tokens[2, 4:] = PAD
    return tokens, tokens.ne(PAD)


def modernbert(kind=ModernBertForMaskedLM, **settings):
    torch.manual_seed(0)
    model = kind(ModernBertConfig(**{**SHAPE, **SMALL_IDS, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def imported(model):
    """The network that it is, and its settings."""
    settings, weights = from_transformers(model.config.to_dict(), model.state_dict())
    config = OdeBertConfig(**{name: value for name, value in settings.items() if name != "_name"})
    config.check()
    around = config.network(model.config.vocab_size, model.config.pad_token_id)
    if "encoder.lm_head.weight" not in weights:
        around = dataclasses.replace(around, head=None)
    network = Encoder(around, config.build_depth()).to(model.dtype).eval()
    network.load_state_dict({name.removeprefix("encoder."): weight for name, weight in weights.items()})
    return network, settings


def close(ours, theirs, message=None):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=message)


VARIANTS = {
    "as published": {},
    "every second": dict(global_attn_every_n_layers=2, local_attention=5),
    "two bases": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}),
    "all global": dict(layer_types=["full_attention"] * 5),
    "all local": dict(layer_types=["sliding_attention"] * 5),
    "with biases": dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True),
    "swiglu": dict(hidden_activation="silu", classifier_activation="silu"),
    "untied": dict(tie_word_embeddings=False),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_hidden_states_and_every_gradient_of_the_loss_agree(monkeypatch, variant):
    theirs = exact(modernbert(**VARIANTS[variant]), monkeypatch)
    ours, _ = imported(theirs)
    tokens, real = batch()
    expected = theirs(tokens, attention_mask=real, output_hidden_states=True)
    found = ours(tokens, return_hidden_states=True)
    close(found.values[real], expected.logits[real])
    *states, last = found.hidden_states
    for one, other in zip([*states, ours.depth.final_norm(last)], expected.hidden_states, strict=True):
        close(one[real], other[real])
    labels = torch.where(real & (torch.arange(20) % 3 == 1), tokens, -100)
    masked = labels.ne(-100)
    functional.cross_entropy(ours(tokens, masked_tokens=masked).values, labels[masked]).backward()
    functional.cross_entropy(expected.logits[masked], labels[masked]).backward()  # theirs is that of float32 logits
    named = dict(theirs.named_parameters())
    _, gradients = from_transformers(theirs.config.to_dict(), {name: each.grad for name, each in named.items()})
    for name, parameter in ours.named_parameters():
        close(parameter.grad, gradients.pop(f"encoder.{name}"), name)
    assert not gradients.keys() - {"encoder.lm_head.weight"}


def test_unpatched_float32_agrees_to_rounding():
    theirs = modernbert()
    ours, _ = imported(theirs)
    tokens, real = batch()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real).logits[real]
        torch.testing.assert_close(ours(tokens).values[real], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [ModernBertModel, ModernBertForMaskedLM], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_to_the_last_bit(kind, variant):
    theirs = modernbert(kind, **VARIANTS[variant])
    own = theirs.config.to_dict()
    settings, weights = from_transformers(own, theirs.state_dict())
    config, back = to_transformers(settings, weights)
    if kind is ModernBertModel:
        back = {name.removeprefix("model."): weight for name, weight in back.items()}
    expected = theirs.state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    if variant == "every second":
        own["local_attention"] -= 1  # two tokens on each side, as with 4
    if variant == "all local":
        own["rope_parameters"]["full_attention"] = own["rope_parameters"]["sliding_attention"]  # no layer has it
    if variant == "all global":
        own["rope_parameters"]["sliding_attention"] = own["rope_parameters"]["full_attention"]
    assert config == {name: own[name] for name in config} and "layer_types" in config
    again = from_transformers(config, back)
    assert again[0] == settings and all(torch.equal(again[1][name], weights[name]) for name in weights)


def test_the_published_configuration():
    with torch.device("meta"):
        theirs = ModernBertForMaskedLM(ModernBertConfig())
    own = theirs.config.to_dict()
    settings, weights = from_transformers(own, theirs.state_dict())
    assert settings["attention_window"] == 64 and settings["attention_global_every"] == 3
    assert (settings["attention_rotary_base"], settings["attention_local_rotary_base"]) == (160000.0, 10000.0)
    config = OdeBertConfig(**{name: value for name, value in settings.items() if name != "_name"})
    with torch.device("meta"):
        network = Encoder(config.network(own["vocab_size"], own["pad_token_id"]), config.build_depth())
    shapes = {f"encoder.{name}": weight.shape for name, weight in network.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in weights.items()}
    windows = [layer.attention.config.window for layer in network.depth.fields]
    assert windows == [None if layer % 3 == 0 else 64 for layer in range(22)]
    back, _ = to_transformers(settings, weights)
    assert back == {name: own[name] for name in back}


def test_older_files_say_the_same():
    theirs = modernbert()
    config = theirs.config.to_dict()
    expected, _ = from_transformers(config, theirs.state_dict())
    older = {name: value for name, value in config.items() if name not in ("layer_types", "rope_parameters")}
    older.update(global_attn_every_n_layers=3, global_rope_theta=160000.0, local_rope_theta=10000.0)
    weights = {name: weight for name, weight in theirs.state_dict().items() if name != "decoder.weight"}
    found, tied = from_transformers(older, weights)
    assert found == expected and torch.equal(tied["encoder.lm_head.weight"], tied["encoder.embed_tokens.weight"])
    found, _ = from_transformers({**older, "local_rope_theta": None}, weights)
    assert found == {**expected, "attention_local_rotary_base": 160000.0}


def test_rates_of_dropout_stand_where_theirs_do():
    theirs = modernbert(embedding_dropout=0.1, attention_dropout=0.2, mlp_dropout=0.3)
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    config = OdeBertConfig(**{name: value for name, value in settings.items() if name != "_name"})
    network = Encoder(config.network(30, PAD), config.build_depth())
    layer = network.depth.fields[0]
    sites = (network.dropout, layer.attention.dropout, layer.dropout, layer.feed_forward.dropout)
    assert [site.rate for site in (*sites, layer.feed_forward_dropout)] == [0.1, 0.2, 0.2, 0.3, 0.0]
    config, _ = to_transformers(settings, weights)
    assert [config[f"{name}_dropout"] for name in ("embedding", "attention", "mlp")] == [0.1, 0.2, 0.3]


def test_everything_that_makes_it_another_function_is_listed():
    theirs = modernbert()
    config = theirs.config.to_dict()
    config.update(mlp_bias=True, decoder_bias=False, classifier_activation="relu", local_attention=1)
    config.update(layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention", "linear"])
    config["rope_parameters"]["sliding_attention"]["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="^no ode_bert is such a ModernBERT: ") as raised:
        from_transformers(config, theirs.state_dict())
    said = str(raised.value)
    for part in (
        "classifier_activation is relu, and hidden_activation gelu",
        "norm_bias is False, attention_bias is False, mlp_bias is True, classifier_bias is False",
        "decoder_bias is False",
        "layer_types has linear",
        "the rope_type of sliding_attention is yarn",
        "local_attention is 1",
        "layer_types has not full_attention at every n-th layer, from the first on",
    ):
        assert part in said
    assert said.count(";") == 6 and len(said.splitlines()) == 1
    classes = modernbert(ModernBertForSequenceClassification)
    with pytest.raises(ValueError, match="it has a head of classes, with a norm that"):
        from_transformers(classes.config.to_dict(), classes.state_dict())
    with pytest.raises(ValueError, match="hidden_activation is tanh, and not one of gelu"):
        from_transformers({**theirs.config.to_dict(), "hidden_activation": "tanh"}, theirs.state_dict())
    weights = {**theirs.state_dict(), "model.layers.0.adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="model.layers.0.adapter.weight is not a weight of a ModernBERT"):
        from_transformers(theirs.config.to_dict(), weights)


def test_everything_that_modernbert_does_not_have_is_listed():
    theirs = modernbert()
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    other = dict(ode_scheme="rk4", ode_steps=2, gated_feed_forward=False, attention_qk_norm=True, activation_fn="tanh")
    other.update(encoder_embedding_dim=8)
    more = {f"{name}.weight": torch.zeros(1, 16) for name in ("encoder.embed_positions", "classification_heads.a.b")}
    with pytest.raises(ValueError, match="^no ModernBERT is such an ode_bert: ") as raised:
        to_transformers({**settings, **other, "attention_rotary_base": None}, {**weights, **more})
    said = str(raised.value)
    for part in (
        *("ode_steps is 2", "attention_qk_norm is True", "gated_feed_forward is False", "ode_scheme is rk4"),
        "encoder_embedding_dim is 8",
        *("activation_fn is tanh", "it has no rotary positions", "it has learned positions", "classification heads"),
    ):
        assert part in said
    assert said.count(";") == 8
    del settings["gated_feed_forward"], settings["no_first_norm"]  # of an older checkpoint
    with pytest.raises(ValueError, match="no_first_norm is False.*; gated_feed_forward is False"):
        to_transformers(settings, weights)


@pytest.mark.parametrize("conversion", [bert, roberta], ids=["bert", "roberta"])
@pytest.mark.parametrize(
    "option",
    [
        *(dict(gated_feed_forward=True), dict(no_biases=True), dict(attention_window=2), dict(attention_qk_norm=True)),
        *(dict(attention_rotary_base=10.0), dict(encoder_positions="none")),
    ],
    ids=lambda option: next(iter(option)),
)
def test_the_same_options_are_none_of_berts(conversion, option):
    """Their weights can have the names and shapes of a BERT's, and are those of another function."""
    settings = dict(ode_scheme="euler", ode_field="post-norm", max_positions=4)
    weights = {f"encoder.embed_{name}.weight": torch.zeros(6, 4) for name in ("tokens", "positions")}
    with pytest.raises(ValueError, match=next(iter(option))):
        conversion.to_transformers({**settings, **option}, weights)
