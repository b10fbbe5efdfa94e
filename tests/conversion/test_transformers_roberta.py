"""RoBERTa of transformers and its import."""

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel

from fairseq_implicit.conversion import roberta
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel


def model_of(kind, **settings):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=45)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5)
    settings = {"type_vocab_size": 1, **settings}
    model = kind(RobertaConfig(**shape, max_position_embeddings=26, **quiet, **settings)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_type" in name and settings["type_vocab_size"] == 1:
                parameter.zero_()
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def imported(model, task):
    settings, weights = roberta.from_transformers(model.config.to_dict(), model.state_dict())
    ours = OdeBertModel.build_model(OdeBertConfig(**{k: v for k, v in settings.items() if k != "_name"}), task).double()
    if "classification_heads.sentence_classification_head.out_proj.weight" in weights:
        ours.register_classification_head("sentence_classification_head", 3)
        ours.double()
    return settings, ours, weights


@pytest.mark.parametrize("types", [1, 2])
def test_logits_and_every_gradient_agree(task, tokens, types):
    theirs = model_of(RobertaForMaskedLM, type_vocab_size=types)
    settings, ours, weights = imported(theirs, task)
    assert settings["max_positions"] == 24 and settings["segment_types"] == (0 if types == 1 else 2)
    ours.load_state_dict(weights)
    real = tokens.ne(1)
    segments = {} if types == 1 else {"segments": (torch.arange(12) > 3).long().expand(3, 12)}
    found = ours(tokens, **segments)[0]
    expected = theirs(tokens, attention_mask=real, token_type_ids=segments.get("segments")).logits
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)
    scale = torch.randn_like(found)
    (found * scale)[real].sum().backward()
    (expected * scale)[real].sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    if types == 1:
        gradients["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, 16)  # what it was imported as
    _, gradients = roberta.from_transformers(theirs.config.to_dict(), gradients)
    del gradients["encoder.lm_head.weight"]  # tied
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=0, atol=1e-10, msg=name)
    assert not gradients


def test_the_head_of_classes_agrees(task, tokens):
    theirs = model_of(RobertaForSequenceClassification, num_labels=3)
    _, ours, weights = imported(theirs, task)
    missing, unexpected = torch.nn.Module.load_state_dict(ours, weights, strict=False)
    assert not unexpected and all(name.startswith("encoder.lm_head.") for name in missing)
    found = ours(tokens, classification_head_name="sentence_classification_head")[0]
    torch.testing.assert_close(found, theirs(tokens, attention_mask=tokens.ne(1)).logits, rtol=0, atol=1e-10)


def test_the_pooler_in_the_published_file_is_left_out_with_a_word(task, tokens, caplog):
    theirs = model_of(RobertaForMaskedLM)
    pooler = {f"roberta.pooler.dense.{name}": torch.zeros(16, 16)[: len(name)] for name in ("weight", "bias")}
    _, weights = roberta.from_transformers(theirs.config.to_dict(), {**theirs.state_dict(), **pooler})
    _, ours, _ = imported(theirs, task)
    for load in (False, True):
        ours.args.load_checkpoint_heads = load
        caplog.clear()
        ours.load_state_dict(dict(weights))
        assert "the checkpoint's classification head pooler does not fit this model" in caplog.text
    with pytest.raises(ValueError, match="has 0 rows in its embed_segments and this model 2: .* --segment-types"):
        imported(model_of(RobertaForMaskedLM, type_vocab_size=2), task)[1].load_state_dict(weights)


@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("kind", [RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel])
def test_there_and_back_to_the_last_bit(kind, types):
    theirs = model_of(kind, type_vocab_size=types)
    settings, weights = roberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())
    config, back = roberta.to_transformers(settings, weights)
    if kind is RobertaModel:
        back = {name.removeprefix("roberta."): weight for name, weight in back.items()}
    expected = theirs.state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    assert config == {name: theirs.config.to_dict()[name] for name in config} and "layer_norm_eps" in config


def test_another_activation_than_its_heads_is_refused():
    theirs = model_of(RobertaModel, hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act is relu"):
        roberta.from_transformers(theirs.config.to_dict(), theirs.state_dict())
