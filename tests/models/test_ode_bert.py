"""The model: configuration, initialisation, padding, schemes opened on one set of weights."""

import copy
import math
import pickle

import pytest
import torch
from fairseq.models import MODEL_REGISTRY
from fairseq.modules import PositionalEmbedding
from omegaconf import OmegaConf

from fairseq_implicit.layout import Layout
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)
QUIET = dict(dropout=0.0, attention_dropout=0.0)


def build(task, **settings) -> OdeBertModel:
    torch.manual_seed(0)
    return OdeBertModel.build_model(OdeBertConfig(**{**SHAPE, **settings}), task)


@pytest.mark.parametrize("field", ["pre-norm", "post-norm", "parallel", "macaron"])
@pytest.mark.parametrize("scheme", ["euler", "rk4"])
def test_padding_and_batch_mates_change_no_answer(task, tokens, field, scheme):
    model = build(task, ode_field=field, ode_scheme=scheme).eval()
    with torch.no_grad():
        together = model(tokens, features_only=True)[0]
        assert (together[tokens.eq(1)] == 0).all() or field != "post-norm"
        for row, length in enumerate((12, 9, 5)):
            alone = model(tokens[row : row + 1, :length], features_only=True)[0]
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-6)


def test_known_absence_of_padding_is_the_same_computation(task, tokens):
    model = build(task).eval()
    full = tokens[:1]
    assert torch.equal(model(full, has_padding=False)[0], model(full)[0])
    torch.testing.assert_close(model(full, has_padding=True)[0], model(full)[0], rtol=0, atol=1e-5)


def test_positions_are_fairseqs_until_the_layout_gives_others(task, tokens):
    encoder = build(task, no_layernorm_embedding=True, **QUIET).eval().encoder
    theirs = PositionalEmbedding(24, 16, encoder.dictionary.pad(), learned=True)
    theirs.load_state_dict(encoder.embed_positions.state_dict())
    shifted = torch.cat([torch.full_like(tokens[:, :3], 1), tokens], 1)
    for batch in (tokens, shifted, tokens[:1]):
        layout = encoder.layout(batch)
        found = encoder.embed(batch, layout)
        assert torch.equal(found, layout.keep(encoder.embed_tokens(batch) + theirs(batch)))
    torch.testing.assert_close(found[0], encoder.embed(shifted, encoder.layout(shifted))[0, 3:], rtol=0, atol=0)
    later = encoder.embed(tokens[:1], Layout(positions=torch.arange(5, 17)[None]))
    rows = encoder.embed_positions.weight[1 + 1 + 5 : 1 + 1 + 17]
    assert torch.equal(later[0], encoder.embed_tokens(tokens[0]) + rows)


@pytest.mark.parametrize("family", ["ode_bert", "neural_ode_bert", "deq_bert"])
def test_layernorm_eps_is_that_of_every_norm(task, tokens, family):
    model = MODEL_REGISTRY[family]
    found = []
    for options in ({}, {"layernorm_eps": 1e-12}):
        torch.manual_seed(0)
        built = model.build_model(model.config_class()(**{**SHAPE, **QUIET, **options}), task).eval()
        norms = [module for module in built.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert len(norms) > 3 and {norm.eps for norm in norms} == {options.get("layernorm_eps", 1e-5)}
        found.append(built(tokens)[0])
    assert not torch.equal(*found)
    with pytest.raises(ValueError, match="--layernorm-eps must be a positive number, got 0"):
        model.build_model(model.config_class()(**SHAPE, layernorm_eps=0.0), task)


def test_head_runs_on_masked_positions_only_and_agrees(task, tokens):
    model = build(task).eval()
    masked = tokens.gt(20)
    everywhere, selected = model(tokens)[0], model(tokens, masked_tokens=masked)[0]
    assert selected.shape == (int(masked.sum()), len(task.source_dictionary))
    torch.testing.assert_close(everywhere[masked], selected, rtol=0, atol=1e-6)


def test_tied_output_weights_and_untied(task):
    tied = build(task)
    assert tied.encoder.lm_head.weight is tied.encoder.embed_tokens.weight
    assert build(task, untie_weights_roberta=True).encoder.lm_head.weight.shape == tied.encoder.lm_head.weight.shape


def test_initialisation_scales_residual_projections_by_the_depth(task):
    wide = dict(encoder_embed_dim=256, encoder_ffn_embed_dim=512, encoder_attention_heads=4, encoder_layers=8)
    scaled, plain = build(task, **wide), build(task, encoder_init="plain", **wide)
    tied = build(task, ode_tied=True, **wide)
    for model, expected in ((scaled, 0.02 / math.sqrt(16)), (plain, 0.02), (tied, 0.02 / math.sqrt(16))):
        layer = model.encoder.depth.fields[0]
        assert layer.attention.out.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert layer.feed_forward.fc2.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert layer.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (layer.attention.qkv.bias == 0).all()
    assert (scaled.encoder.embed_tokens.weight[1] == 0).all()


def test_scale_of_the_initial_weights(task):
    wide = dict(encoder_embed_dim=256, encoder_ffn_embed_dim=512, encoder_attention_heads=4, encoder_init_std=0.1)
    layer = build(task, **wide).encoder.depth.fields[1]
    assert layer.attention.qkv.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert layer.feed_forward.fc2.weight.std().item() == pytest.approx(0.1 / math.sqrt(4), rel=0.02)


@pytest.mark.parametrize("field", ["pre-norm", "parallel", "macaron"])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_that_start_as_the_identity(task, tokens, field, tied):
    model = build(task, encoder_init="identity", ode_field=field, ode_scheme="rk4", ode_tied=tied)
    states = model(tokens, features_only=True, return_all_hiddens=True)[1]["inner_states"]
    assert len(states) == 3 and all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("dim", [16, 20])
def test_positions_that_start_from_sinusoids(task, dim):
    """The product of two positions depends on their distance alone, and their scale is that of the other weights."""
    model = build(task, encoder_embed_dim=dim, encoder_position_start="sinusoidal", encoder_init_std=0.1)
    weight = model.encoder.embed_positions.weight.detach().double()
    assert (weight[1] == 0).all()
    products = weight[2:] @ weight[2:].T
    for distance in (0, 1, 5):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-6)
    assert weight[2:].square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
    assert products[0, 0] > products[0, 1] > products[0, 5]


def test_gate_still_starts_at_the_tableau_after_initialisation(task, tokens):
    statistics = build(task, ode_scheme="rk2", ode_coefficients="gated").eval()(tokens)[1]["output"].statistics
    assert float(statistics["gate_mean"]) == pytest.approx(0.5, abs=0.1)
    assert float(statistics["evaluations"]) == 4


SCHEMES = ["euler", "midpoint", "rk2", "rk3", "rk4", "dopri5"]


def test_one_checkpoint_opens_under_every_scheme_and_refines_towards_one_flow(task, tokens):
    source = build(task, ode_scheme="rk4").double().eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    fine = build(task, ode_scheme="dopri5", ode_steps=8).double().eval()
    fine.load_state_dict(source.state_dict())
    flow = fine(tokens, features_only=True)[0]
    distance = {}
    for scheme in SCHEMES:
        model = build(task, ode_scheme=scheme).double().eval()
        model.load_state_dict(source.state_dict())
        distance[scheme] = (model(tokens, features_only=True)[0] - flow).norm().item()
    assert distance["dopri5"] < distance["rk4"] < distance["rk2"] < distance["euler"]


def test_checkpoint_with_learned_coefficients_opens_under_a_fixed_or_longer_scheme(task, tokens, caplog):
    learned = build(task, ode_scheme="rk2", ode_coefficients="learned")
    state = learned.state_dict()
    for settings in (dict(ode_scheme="rk4"), dict(ode_scheme="rk4", ode_coefficients="learned")):
        model = build(task, **settings)
        caplog.clear()
        model.load_state_dict(copy.copy(state))  # fairseq's load: upgrades, then strict
        assert "other combination coefficients" in caplog.text
        statistics = model.eval()(tokens)[1]["output"].statistics
        assert float(statistics["coefficient_sum"]) == pytest.approx(1.0)


def test_every_preset_builds_from_its_config_and_names_its_size(task):
    names = [name for name in MODEL_REGISTRY if name.startswith("ode_bert")]
    assert {
        f"ode_bert_{scheme}_{size}"
        for scheme in ("euler", "rk2", "rk3", "rk4", "learned", "rk4_learned", "gated", "ema")
        for size in ("tiny", "small", "base", "large")
    } <= set(names)
    for name in names:
        cls = MODEL_REGISTRY[name]
        config = cls.config_class()()
        config.check()
        size = name.rsplit("_", 1)[-1]
        width = dict(tiny=128, small=512, base=768, large=1024).get(size, 768)
        assert config.encoder_embed_dim == width, name
    model = MODEL_REGISTRY["ode_bert_ema_tiny"].build_model(MODEL_REGISTRY["ode_bert_ema_tiny"].config_class()(), task)
    assert model.encoder.depth.config.solver.coefficients == "ema" and len(model.encoder.depth.fields) == 2


def test_model_pickles_deep_copies_and_builds_from_omegaconf(task, tokens):
    config = OmegaConf.structured(OdeBertConfig(**SHAPE))
    OmegaConf.set_struct(config, True)
    model = OdeBertModel.build_model(config, task).eval()
    assert model.max_positions() == 24
    expected = model(tokens)[0]
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(tokens)[0], expected)


@pytest.mark.parametrize(
    "flags, scheme, mode, start, scope",
    [
        (dict(enc_calculate_num=1), "euler", "fixed", "tableau", "block"),
        (dict(enc_calculate_num=2, rk_type="standard"), "heun2", "fixed", "tableau", "block"),
        (dict(enc_calculate_num=2, rk_type="initialization"), "heun2", "learned", "ones", "model"),
        (
            dict(enc_calculate_num=2, rk_type="learnable", enc_learnable_type="gated"),
            "heun2",
            "gated",
            "tableau",
            "model",
        ),
        (
            dict(enc_calculate_num=4, rk_type="learnable", enc_learnable_type="ema", alpha_type="vector"),
            "rk4",
            "ema",
            "tableau",
            "channel",
        ),
        (dict(enc_calculate_num=4, ode_scheme="rk4"), "rk4", "fixed", "tableau", "block"),
    ],
)
def test_flags_of_the_original_codebase_are_mapped(flags, scheme, mode, start, scope):
    assert OdeBertConfig(**flags).coefficients() == (scheme, mode, start, scope)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(ode_scheme="rk7"), "rk7"),
        (dict(ode_field="sandwich"), "--ode-field: 'sandwich' is unknown"),
        (dict(ode_coefficients="magic"), "--ode-coefficients: 'magic' is unknown"),
        (dict(ode_coefficients="gated", ode_scheme="euler"), "one stage only"),
        (dict(ode_gradient="adjoint"), "--ode-gradient: 'adjoint' is unknown"),
        (dict(ode_corrector="midpoint"), "--ode-corrector: 'midpoint' is unknown"),
        (dict(ode_steps=0), "at least 1"),
        (dict(ode_time=-1.0), "positive"),
        (dict(stage_dropout="often"), "--stage-dropout: 'often' is unknown"),
        (dict(encoder_init="zero"), "--encoder-init: 'zero' is unknown: choose one of depth-scaled, identity, plain"),
        (dict(encoder_init_std=0.0), "--encoder-init-std must be a positive number, got 0.0"),
        (dict(encoder_position_start="fourier"), "--encoder-position-start: 'fourier' is unknown"),
        (dict(encoder_attention_heads=3), "--encoder-attention-heads 3 does not divide --encoder-embed-dim 16"),
        (dict(encoder_layers=0), "--encoder-layers must be at least 1"),
        (dict(dropout=1.5), r"--dropout must lie in \[0, 1\)"),
        (dict(activation_fn="softplus"), "--activation-fn: 'softplus' is unknown"),
        (dict(rk_type="learnable"), "needs --enc-calculate-num"),
        (dict(enc_calculate_num=5), "--enc-calculate-num 5 has no scheme"),
        (dict(enc_calculate_num=2, ode_scheme="rk4"), "--ode-scheme rk4 contradicts --enc-calculate-num 2"),
        (dict(enc_calculate_num=1, rk_type="learnable"), "needs --enc-calculate-num 2, 3 or 4"),
        (dict(ode_consistency_weight=0.1), "fixed"),
    ],
)
def test_wrong_flags_end_in_one_sentence(task, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build(task, **settings)
    assert "\n" not in str(caught.value)


def test_input_longer_than_the_positions_is_refused(task):
    with pytest.raises(ValueError, match="25 tokens is longer than the model's 24 positions"):
        build(task)(torch.full((1, 25), 5))


def test_classification_heads_follow_checkpoints(task, tokens):
    model = build(task)
    model.register_classification_head("topic", num_classes=3, inner_dim=8)
    logits, _ = model(tokens, classification_head_name="topic", features_only=True)
    assert logits.shape == (3, 3)
    state = model.state_dict()
    plain = build(task)
    plain.load_state_dict(dict(state))
    assert "topic" not in plain.classification_heads
    keeping = build(task, load_checkpoint_heads=True)
    keeping.load_state_dict(dict(state))
    assert torch.equal(
        keeping.eval()(tokens, classification_head_name="topic")[0],
        model.eval()(tokens, classification_head_name="topic")[0],
    )
    # A checkpoint without heads leaves a fresh head as it is; one of another size is left out.
    fresh = build(task)
    fresh.register_classification_head("topic", num_classes=5)
    before = fresh.classification_heads["topic"].out_proj.weight.clone()
    fresh.load_state_dict(dict(state))
    assert torch.equal(fresh.classification_heads["topic"].out_proj.weight, before)


def test_a_head_for_another_width_is_refused(task):
    model = build(task)
    width = model.args.encoder_embed_dim
    model.register_classification_head("topic", num_classes=3, embedding_size=width)
    with pytest.raises(ValueError, match=f"topic takes features of the model's width {width}, not of {width + 1}"):
        model.register_classification_head("topic", num_classes=3, embedding_size=width + 1)
    with pytest.raises(TypeError, match="inner_dims"):
        model.register_classification_head("topic", num_classes=3, inner_dims=8)


def test_unused_and_frozen_parameters_and_two_forwards_before_backward(task, tokens):
    model = build(task, **QUIET)
    model.encoder.embed_tokens.weight.requires_grad_(False)
    first, second = model(tokens)[0], model(tokens)[0]
    (first.sum() + second.sum()).backward()
    doubled = model.encoder.depth.fields[0].attention.qkv.weight.grad.clone()
    model.zero_grad()
    model(tokens)[0].sum().backward()
    torch.testing.assert_close(doubled, 2 * model.encoder.depth.fields[0].attention.qkv.weight.grad)


def test_checkpoints_of_other_lengths_and_dictionaries_say_so(task):
    state = build(task).state_dict()
    with pytest.raises(ValueError, match="24 rows in its embed_positions and this model 16: .* --max-positions"):
        build(task, max_positions=16).load_state_dict(dict(state))
    task.source_dictionary.add_symbol("one more")
    with pytest.raises(ValueError, match="45 rows in its embed_tokens and this model 46: .* dict.txt"):
        build(task).load_state_dict(dict(state))


def test_the_width_of_the_embeddings_is_a_flag(task, tokens):
    model = build(task, encoder_embedding_dim=4, ode_tied=True, encoder_position_start="sinusoidal")
    assert model.encoder.embed_tokens.weight.shape[1] == 4 and model.encoder.embedding_map.weight.shape == (16, 4)
    assert model(tokens)[0].shape == (3, 12, 45)
    plain = build(task).state_dict()
    assert not [name for name in plain if "embedding_map" in name]
    with pytest.raises(ValueError, match="--encoder-embedding-dim must be at least 1, got 0"):
        build(task, encoder_embedding_dim=0)
    with pytest.raises(ValueError, match="neighbours .* behind the map of --encoder-embedding-dim 4"):
        build(task, encoder_embedding_dim=4, encoder_position_start="neighbours")
