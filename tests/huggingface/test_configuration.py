"""The configurations: flat, JSON, checked, with the names that generic code asks for."""

import dataclasses
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from fairseq_implicit.huggingface import DeqBertConfig, OdeBertConfig
from tests.huggingface.tiny import CONFIGS, tiny_config


@pytest.mark.parametrize("family", CONFIGS)
def test_every_option_is_in_the_file_and_comes_back(family, tmp_path):
    option = {"ode_bert": "ode_scheme", "neural_ode_bert": "ode_scheme", "deq_bert": "deq_gradient"}[family]
    value = {"ode_bert": "rk4", "neural_ode_bert": "tsit5", "deq_bert": "phantom-3"}[family]
    config = tiny_config(family, **{option: value}, segment_types=2, num_labels=3)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    names = {option.name for option in dataclasses.fields(config.options_class)}
    assert names <= stored.keys()
    assert (stored["model_type"], stored[option], stored["encoder_embed_dim"]) == (family, value, 16)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CONFIGS[family]
    assert loaded.options() == config.options() and loaded.num_labels == 3


@pytest.mark.parametrize("family", CONFIGS)
def test_a_configuration_needs_no_argument(family):
    config = CONFIGS[family]()
    assert config.options().check() is not None
    assert (config.max_position_embeddings, config.pad_token_id) == (512, 1)


def test_generic_code_finds_its_names():
    config = OdeBertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    options = config.options()
    assert (options.encoder_embed_dim, options.encoder_layers) == (32, 3)
    assert (options.encoder_attention_heads, options.encoder_ffn_embed_dim) == (4, 64)
    assert (config.hidden_size, config.num_hidden_layers, config.type_vocab_size) == (32, 3, 0)
    config = OdeBertConfig(tie_word_embeddings=False)
    assert config.untie_weights_roberta and not config.tie_word_embeddings


@pytest.mark.parametrize(
    "config, options, words",
    [
        (OdeBertConfig, dict(ode_scheme="rk99"), ["ode_scheme", "rk99"]),
        (OdeBertConfig, dict(mixer="mlp"), ["mixer", "mlp"]),
        (OdeBertConfig, dict(encoder_layers=0), ["encoder_layers must be at least 1"]),
        (OdeBertConfig, dict(encoder_embed_dim=18), ["encoder_attention_heads 12 does not divide encoder_embed_dim"]),
        (OdeBertConfig, dict(ode_tolerance=1e-3, ode_corrector="adams"), ["ode_tolerance", "ode_corrector"]),
        (DeqBertConfig, dict(deq_gradient="bptt-4", deq_solver="anderson"), ["deq_solver", "deq_gradient bptt-4"]),
        (DeqBertConfig, dict(checkpoint_activations=True), ["checkpoint_activations"]),
        (DeqBertConfig, dict(pad_token_id=99, vocab_size=99), ["pad_token_id 99", "vocab_size 99"]),
    ],
)
def test_wrong_values_are_said_with_the_attributes_name(config, options, words):
    with pytest.raises(ValueError) as caught:
        config(**options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "--" not in str(caught.value)


@pytest.mark.parametrize("options", [dict(encoder_layers="two"), dict(encoder_layers=2.5), dict(pad_token_id=None)])
def test_values_of_another_type_are_refused(options):
    (name,) = options
    with pytest.raises(StrictDataclassError, match=name):
        OdeBertConfig(**options)


def test_whole_numbers_are_numbers():
    assert OdeBertConfig(ode_time=2, ode_theta_tol=None).options().ode_time == 2


def test_an_unknown_keyword_is_kept_as_transformers_keeps_it():
    assert OdeBertConfig(favourite="tea").favourite == "tea"
