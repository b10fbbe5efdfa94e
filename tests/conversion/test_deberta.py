"""DeBERTa v2 of transformers and its import: one function, gradients included, and a round trip to the last bit."""

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2ForSequenceClassification, DebertaV2Model

from fairseq_implicit.conversion import deberta
from fairseq_implicit.networks.heads import ClassificationHead, ClassificationHeadConfig
from tests.conversion.agreement import REAL, SEGMENTS, TOKENS, assert_one_function, network_of, random_model

HEAD = "classification_heads.sentence_classification_head."
#: As DeBERTa v3 has it. transformers takes the root of the scale in float32: here it is a whole number.
V3 = dict(
    relative_attention=True,
    position_buckets=4,
    max_relative_positions=8,
    pos_att_type="p2c|c2p",
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    position_biased_input=False,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CONFIGURATIONS = {
    "v3": {},
    "published head": {"legacy": False},
    "own maps": {"share_att_key": False},
    "c2p alone": {"pos_att_type": "c2p", "hidden_size": 16, "share_att_key": False},
    "p2c alone": {"pos_att_type": ["p2c"], "hidden_size": 16},
    "positions, segments": {"position_biased_input": True, "type_vocab_size": 2},
    "plain table, no buckets": {"norm_rel_ebd": "none", "position_buckets": -1, "max_relative_positions": 5},
    "few positions": {"position_buckets": -1, "max_relative_positions": -1, "hidden_act": "gelu_new"},
}


def model_of(kind=DebertaV2ForMaskedLM, **settings):
    shape = dict(hidden_size=12, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, vocab_size=20)
    if settings.get("hidden_size") == 16:
        shape["num_attention_heads"] = 2  # of width 8: with two terms a root of 16
    return random_model(kind, DebertaV2Config(**{**shape, "max_position_embeddings": 12, **V3, **settings}))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_hidden_states_and_every_gradient_agree(name):
    settings = CONFIGURATIONS[name]
    segments = SEGMENTS if "type_vocab_size" in settings else None
    assert_one_function(model_of(**settings), deberta, segments, duplicates=[".attention.table."])


def test_the_head_of_classes_agrees():
    theirs = model_of(DebertaV2ForSequenceClassification, num_labels=3)
    settings, weights = deberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    assert settings["pooler_activation_fn"] == "gelu"
    body = DebertaV2ForMaskedLM(theirs.config).double()
    body.deberta.load_state_dict(theirs.deberta.state_dict())
    network = network_of(*deberta.from_transformers(theirs.config.to_dict(), body.state_dict()), theirs.config)
    head = ClassificationHead(12, ClassificationHeadConfig(classes=3, activation="gelu")).double()
    head.load_state_dict({name[len(HEAD) :]: weight for name, weight in weights.items() if name.startswith(HEAD)})
    features = network(TOKENS, features_only=True).values
    torch.testing.assert_close(head(features), theirs(TOKENS, attention_mask=REAL).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("kind", [DebertaV2ForMaskedLM, DebertaV2ForSequenceClassification, DebertaV2Model])
def test_there_and_back_to_the_last_bit(kind, name):
    theirs = model_of(kind, **CONFIGURATIONS[name])
    before = theirs.config.to_dict()
    settings, weights = deberta.from_transformers(before, theirs.state_dict())
    config, back = deberta.to_transformers(settings, weights, legacy=before["legacy"])
    if kind is DebertaV2Model:
        back = {name.removeprefix("deberta."): weight for name, weight in back.items()}
    expected = theirs.state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    if before["max_relative_positions"] == -1:
        before["max_relative_positions"] = 12  # as far as there are positions
    assert config == {name: before[name] for name in config} and ("legacy" in config) is (kind is DebertaV2ForMaskedLM)


def test_the_published_file_is_read_whatever_transformers_reads_of_it():
    """It has the head under the name that transformers' class does not look for, another head, and positions that its
    input does not have."""
    theirs = model_of(legacy=False)
    published = {
        **theirs.state_dict(),
        "mask_predictions.dense.weight": torch.ones(12, 12),
        "deberta.embeddings.position_embeddings.weight": torch.ones(12, 12),
    }
    config = {**theirs.config.to_dict(), "pos_att_type": "p2c|c2p"}
    del config["legacy"]
    settings, weights = deberta.from_transformers(config, published)
    ours = network_of(settings, weights, theirs.config)
    expected = theirs(TOKENS, attention_mask=REAL).logits
    torch.testing.assert_close(ours(TOKENS).values[REAL], expected[REAL], rtol=0, atol=1e-9)
    config, back = deberta.to_transformers(settings, weights)
    assert config["legacy"] is False and back.keys() == theirs.state_dict().keys()


def test_an_output_matrix_of_its_own_stays_one():
    theirs = model_of(tie_word_embeddings=False)
    settings, weights = deberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    ours = network_of(settings, weights, theirs.config)
    assert not torch.equal(ours.lm_head.weight, ours.embed_tokens.weight)
    expected = theirs(TOKENS, attention_mask=REAL).logits
    torch.testing.assert_close(ours(TOKENS).values[REAL], expected[REAL], rtol=0, atol=1e-9)
    config, back = deberta.to_transformers(settings, weights)
    assert config["legacy"] and torch.equal(back["cls.predictions.decoder.weight"], weights["encoder.lm_head.weight"])


def test_all_that_does_not_fit_is_said_at_once():
    theirs = model_of(conv_kernel_size=3, embedding_size=8, hidden_act="silu", norm_rel_ebd="rms", pos_att_type=[])
    with pytest.raises(ValueError) as refused:
        deberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    said = str(refused.value)
    for part in (
        "hidden_act is silu",
        "conv_kernel_size is 3, and a convolution",
        "embedding_size is 8 beside hidden_size 12",
        "norm_rel_ebd is rms",
        "pos_att_type is empty",
    ):
        assert part in said
    theirs = model_of(relative_attention=False)
    with pytest.raises(ValueError, match="^relative_attention is False, and disentangled attention is relative$"):
        deberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())


def test_what_is_no_deberta_is_not_exported():
    theirs = model_of()
    settings, weights = deberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    with pytest.raises(ValueError) as refused:
        deberta.to_transformers({**settings, "ode_scheme": "rk4", "mixer": "attention", "ode_steps": 2}, weights)
    for part in ("ode_scheme is rk4", "mixer is attention", "ode_steps is 2"):
        assert part in str(refused.value)
    weights["encoder.depth.fields.2.attention.table.norm.bias"] = torch.ones(12, dtype=torch.float64)
    with pytest.raises(ValueError, match="fields.2.attention.table.norm.bias is another table than the first layer's"):
        deberta.to_transformers(settings, weights)
