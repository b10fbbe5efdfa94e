"""The models: what goes in, what comes out, what is saved, refused and drawn."""

import copy
import pickle

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fairseq_implicit.huggingface.modeling import TASKS
from tests.huggingface.tiny import CONFIGS, MASK, SYMBOLS, batch, fairseq_model, labels_of, tiny_config

FIXED = {"neural_ode_bert": dict(ode_tolerance=0.0)}


def tiny(family, auto=AutoModelForMaskedLM, **options):
    torch.manual_seed(0)
    return auto.from_config(tiny_config(family, **{**FIXED.get(family, {}), **options})).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved masked-LM model of each family, and its folder."""
    folders = {}
    for family in CONFIGS:
        model = tiny(family)
        folders[family] = (model, tmp_path_factory.mktemp(family))
        model.save_pretrained(folders[family][1])
    return folders


@pytest.mark.parametrize("family", CONFIGS)
def test_a_fresh_model_starts_as_fairseqs_does(family):
    theirs = fairseq_model_at(0, family, **FIXED.get(family, {}))
    ours = tiny(family)
    assert_same_start(ours, theirs)
    ids = batch()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs.eval()(ids)[0])


def fairseq_model_at(seed, family, **options):
    torch.manual_seed(seed)
    return fairseq_model(family, **options)


def assert_same_start(ours, theirs):
    stored = theirs.state_dict()
    own = {name.removeprefix("model."): value for name, value in ours.state_dict().items()}
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in stored)


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_loaded_it_is_the_same_and_the_tied_matrix_is_there_once(family, saved):
    model, folder = saved[family]
    ids = batch()
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(loaded) is type(model) and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with safe_open(folder / "model.safetensors", "pt") as file:
        matrices = [name for name in file.keys() if list(file.get_slice(name).get_shape()) == [SYMBOLS, 16]]
    assert matrices == ["model.encoder.embed_tokens.weight"]
    assert loaded.model.encoder.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_layers_share_is_stored_once_and_shared_again(family, untied, tmp_path):
    options = dict(mixer="disentangled", disentangled_buckets=4, untie_weights_roberta=untied)
    depth = {"neural_ode_bert": dict(ode_depth_weights="linear"), "deq_bert": dict(deq_coda_layers=1)}
    model = tiny(family, **options, **depth.get(family, {}))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if ".table.embedding." in name]) == 1
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    tables = [weight for name, weight in loaded.named_parameters(remove_duplicate=False) if ".table.embedding." in name]
    assert len(tables) > 1 and all(table is tables[0] for table in tables)
    with torch.no_grad():
        assert torch.equal(loaded(batch()).logits, model(batch()).logits)


def test_an_untied_matrix_is_stored_and_loaded(tmp_path):
    model = tiny("ode_bert", untie_weights_roberta=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.model.encoder.lm_head.weight is not loaded.get_input_embeddings().weight
    assert torch.equal(loaded.model.encoder.lm_head.weight, model.model.encoder.lm_head.weight)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_task_opens_the_weights_and_draws_only_its_own_head(family, saved):
    model, folder = saved[family]
    ids = batch()
    with torch.no_grad():
        features = AutoModel.from_pretrained(folder)(ids).last_hidden_state
        assert torch.equal(model.model.encoder.logits(features), model(ids).logits)
        for auto, shape in (
            (AutoModelForSequenceClassification, (3, 4)),
            (AutoModelForTokenClassification, (3, 12, 4)),
        ):
            task = auto.from_pretrained(folder, num_labels=4)
            assert task(ids).logits.shape == shape
            assert torch.equal(task.model(ids).last_hidden_state, features)
            head = {name: value for name, value in task.state_dict().items() if not name.startswith("model.")}
            assert head and all(value.isfinite().all() and value.abs().max() < 2 for value in head.values())
            assert any(value.std() > 0.01 for name, value in head.items() if name.endswith("weight"))
        answers = AutoModelForQuestionAnswering.from_pretrained(folder)(ids)
        assert answers.start_logits.shape == answers.end_logits.shape == (3, 12)


def test_only_what_a_file_lacks_is_drawn_as_a_fresh_model_has_it(saved):
    model, folder = saved["ode_bert"]
    state = {name: value for name, value in model.state_dict().items() if ".fields.1." not in name}
    torch.manual_seed(5)
    loaded, info = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(state), output_loading_info=True
    )
    own = loaded.state_dict()
    assert {name for name in own if ".fields.1." in name} == set(info["missing_keys"])
    assert all(torch.equal(own[name], value) for name, value in state.items())
    fc2 = own["model.encoder.depth.fields.1.feed_forward.fc2.weight"]  # a residual projection: scaled by the depth
    assert 0.5 < fc2.std() / (0.02 / 4**0.5) < 1.5
    assert torch.equal(own["model.encoder.depth.fields.1.attention_norm.weight"], torch.ones(16))


def test_coefficients_that_a_file_lacks_start_from_the_tableau(saved):
    _, folder = saved["ode_bert"]
    learned = AutoModelForMaskedLM.from_pretrained(folder, ode_coefficients="learned", ode_scheme="rk4")
    values = [value for name, value in learned.state_dict().items() if ".combinations." in name]
    assert len(values) == 2
    assert all(torch.allclose(value, torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6])) for value in values)


def test_a_spectral_norm_that_a_file_lacks_is_made_anew(saved):
    _, folder = saved["ode_bert"]
    model = AutoModelForSequenceClassification.from_pretrained(folder, spectral_norm_classification_head=True)
    assert model(batch()).logits.isfinite().all()
    assert float(model.classifier.out_proj.weight_u.norm()) == pytest.approx(1.0, abs=1e-4)


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_what_the_mask_leaves_out_is_padding_whatever_its_id(family):
    model, ids = tiny(family), batch()
    mask = ids.ne(1).long()
    disguised = torch.where(ids.eq(1), 7, ids)
    with torch.no_grad():
        by_id, by_mask = model(ids).logits, model(disguised, attention_mask=mask).logits
        both = model(ids, attention_mask=mask).logits
        alone = model(ids[2:, :5]).logits
    real = mask.bool()
    assert torch.equal(by_id[real], by_mask[real]) and torch.equal(by_id, both)
    torch.testing.assert_close(by_mask[2, :5], alone[0], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("padding, width", [(0, None), (1, None), (1, 8)])
def test_embeddings_in_place_of_ids(padding, width):
    model = tiny("ode_bert", pad_token_id=padding, encoder_embedding_dim=width)
    ids, mask = batch(padded=False)[:, 1:], torch.ones(3, 11)
    mask[1, 8:] = 0
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected, found = model(ids, attention_mask=mask), model(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(found.logits[mask.bool()], expected.logits[mask.bool()])


def test_segments():
    plain, ids = tiny("ode_bert"), batch(padded=False)
    zeros = torch.zeros_like(ids)
    assert torch.equal(plain(ids, token_type_ids=zeros).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="token_type_ids"):
        plain(ids, token_type_ids=zeros + 1)
    model = tiny("ode_bert", segment_types=2)
    assert torch.equal(model(ids, token_type_ids=zeros).logits, model(ids).logits)
    assert not torch.allclose(model(ids, token_type_ids=zeros + 1).logits, model(ids).logits)


@pytest.mark.parametrize(
    "inputs, word",
    [
        (dict(position_ids=torch.zeros(3, 12)), "position_ids"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(attention_mask=torch.ones(3, 12, 12)), "attention_mask"),
        (dict(attention_mask=torch.ones(3, 11)), "attention_mask"),
        (dict(inputs_embeds=torch.zeros(3, 12, 16)), "either input_ids or inputs_embeds"),
    ],
)
def test_inputs_that_it_does_not_take_are_refused(inputs, word):
    with pytest.raises(ValueError, match=word):
        tiny("ode_bert")(batch(), **inputs)
    with pytest.raises(ValueError, match="24 positions"):
        tiny("ode_bert")(torch.full((1, 25), 5))


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention", "paged|eager"])
def test_other_attention_is_refused(implementation, saved):
    model, folder = saved["ode_bert"]
    with pytest.raises(ValueError, match="attn_implementation"):
        AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=implementation)
    with pytest.raises(ValueError, match="attn_implementation"):
        copy.deepcopy(model).set_attn_implementation(implementation)
    assert (
        AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    )


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_statistics_and_tuples(family):
    model, ids = tiny(family), batch()
    output = model(ids, output_hidden_states=True, labels=labels_of(ids))
    assert list(output)[:3] == ["loss", "logits", "hidden_states"] and "evaluations" in output.statistics
    assert all(state.shape == (3, 12, 16) for state in output.hidden_states) and len(output.hidden_states) >= 2
    loss, logits, *_ = model(ids, labels=labels_of(ids), return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert "hidden_states" not in model(ids)
    model.config.output_hidden_states = True
    assert "hidden_states" in model(ids)


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def test_penalties_and_corrected_states_enter_the_loss_of_training_only():
    options = dict(deq_jacobian_weight=0.5, deq_correction="2,4", deq_correction_weight=0.7, deq_monitor_interval=0)
    model, ids = tiny("deq_bert", **options).train(), batch()
    labels = labels_of(ids)
    features = model.model(ids)
    torch.manual_seed(1)
    features = model.model(ids)
    torch.manual_seed(1)
    output = model(ids, labels=labels)
    assert [weight for weight, _ in features.auxiliary] == [pytest.approx(0.7 * 0.8), 0.7]
    expected = cross_entropy(output.logits, labels) + features.penalties["jacobian_penalty"]
    for weight, state in features.auxiliary:
        expected = expected + weight * cross_entropy(model.model.encoder.logits(state), labels)
    assert float(features.penalties["jacobian_penalty"]) > 0
    torch.testing.assert_close(output.loss, expected)
    model.eval()
    torch.testing.assert_close(model(ids, labels=labels).loss, cross_entropy(model(ids).logits, labels))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_adds_what_the_depth_adds(task):
    options = dict(ode_coefficients="learned", ode_coefficient_start="ones", ode_consistency_weight=0.25)
    model = tiny("ode_bert", getattr(transformers, TASKS[task][0]), **options)
    ids = batch(padded=False)
    answers = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}
    labels = {
        "ForMaskedLM": {"labels": labels_of(ids)},
        "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
        "ForTokenClassification": {"labels": ids.remainder(2)},
        "ForQuestionAnswering": answers,
    }[task]
    evaluated = model(ids, **labels).loss
    trained = model.train()(ids, **labels).loss
    # Two stages of weight 1 each: (2 - 1)^2.
    assert float(trained - evaluated) == pytest.approx(0.25, abs=1e-5)
    trained.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "combinations" not in name)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, options",
    [
        ("ode_bert", {}),
        ("ode_bert", dict(ode_coefficients="gated")),
        ("neural_ode_bert", {}),
        ("deq_bert", dict(deq_gradient="phantom-3")),
    ],
)
def test_recomputation_changes_no_gradient(family, options):
    model, ids = tiny(family, dropout=0.1, **options).train(), batch()
    gradients = []
    for switch in (lambda: None, model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        gradients.append(gradient_of(model, ids))
        assert model.is_gradient_checkpointing == (len(gradients) == 2)
    for other in gradients[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in gradients[0].items())


def gradient_of(model, ids):
    model.zero_grad()
    torch.manual_seed(2)
    model(ids, labels=labels_of(ids)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def kept_for_the_backward_pass(model, ids):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        model(ids, labels=labels_of(ids))
    return sum(sizes)


def test_recomputation_saves_activations():
    model, ids = tiny("ode_bert", ode_scheme="rk4").train(), batch()
    before = kept_for_the_backward_pass(model, ids)
    model.gradient_checkpointing_enable()
    assert kept_for_the_backward_pass(model, ids) < before / 2


def test_what_cannot_be_recomputed_says_so():
    with pytest.raises(ValueError, match="checkpoint_activations: ift"):
        tiny("deq_bert").gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="every_n_layers"):
        tiny("ode_bert").activation_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision(family, dtype, saved):
    model, folder = saved[family]
    loaded = AutoModelForMaskedLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    with torch.no_grad():
        half, full = loaded(batch()).logits, model(batch()).logits
    assert half.dtype is dtype and (half.float() - full).abs().max() < 0.03 * full.abs().max()


@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("untied", [False, True])
def test_a_vocabulary_that_grows(untied, width, tmp_path):
    model, ids = tiny("ode_bert", untie_weights_roberta=untied, encoder_embedding_dim=width), batch()
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(SYMBOLS + 3)
        grown = model(ids).logits
    assert grown.shape[-1] == SYMBOLS + 3 and torch.equal(grown[..., :SYMBOLS], before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, grown)
    assert loaded.config.vocab_size == SYMBOLS + 3
    loss = loaded.train()(ids, labels=torch.where(ids == MASK - 1, SYMBOLS, labels_of(ids))).loss
    loss.backward()
    assert loaded.get_input_embeddings().weight.grad.shape[0] == SYMBOLS + 3


def test_models_copy_and_pickle():
    model, ids = tiny("deq_bert"), batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
