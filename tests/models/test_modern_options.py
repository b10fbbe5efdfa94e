"""What ModernBERT has, as options that any family can combine, and its presets."""

import pytest
import torch
from fairseq.models import MODEL_REGISTRY

from fairseq_implicit.models.presets import family_of

SHAPE = dict(encoder_layers=3, encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=2)
QUIET = dict(dropout=0.0, attention_dropout=0.0)
NOISY = dict(
    dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, feed_forward_dropout=0.2, embedding_dropout=0.1
)
OPTIONS = {
    "rotary": dict(attention_rotary_base=50.0),
    "norms of queries and keys": dict(attention_qk_norm=True),
    "window": dict(attention_window=2),
    "no biases": dict(no_biases=True),
    "geglu": dict(gated_feed_forward=True),
    "swiglu": dict(gated_feed_forward=True, activation_fn="silu"),
    "all": dict(attention_rotary_base=50.0, attention_qk_norm=True, attention_window=2, no_biases=True,
                gated_feed_forward=True),
}  # fmt: skip
BY_LAYER = dict(**OPTIONS["all"], attention_global_every=2, attention_local_rotary_base=9.0, no_first_norm=True)
FAMILIES = {
    "ode_bert": dict(ode_scheme="rk4"),
    "neural_ode_bert": dict(ode_scheme="rk4", ode_tolerance=0.0),
    "knots": dict(ode_scheme="rk4", ode_tolerance=0.0, ode_depth_weights="linear"),
    "deq_bert": dict(),
}


def build(task, family, **settings):
    torch.manual_seed(0)
    settings = {**FAMILIES.get(family, {}), **settings}
    model = MODEL_REGISTRY["neural_ode_bert" if family == "knots" else family]
    return model.build_model(model.config_class()(**{**SHAPE, **settings}), task)


def gradients(model, tokens):
    torch.manual_seed(1)
    logits, extra = model.train()(tokens)
    (logits[tokens.ne(1)].square().mean() + sum(extra["output"].penalties.values())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


CASES = [(family, option) for family in FAMILIES for option in OPTIONS]


@pytest.mark.parametrize("family, option", CASES, ids=str)
def test_every_option_in_every_family_with_gradients_under_recomputation_bit_equal(task, tokens, family, option):
    settings = {**NOISY, **OPTIONS[option]}
    if family == "deq_bert":  # what its budget unrolls can be recomputed
        settings["deq_gradient"] = "bptt-3"
    plain = gradients(build(task, family, **settings), tokens)
    again = gradients(build(task, family, **settings, checkpoint_activations=True), tokens)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert torch.equal(gradient, again[name]), name
    assert sum(bool(gradient.any()) for gradient in plain.values()) > 0.8 * len(plain)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_equilibrium_of_every_option_has_the_gradient_of_a_long_unroll(task, tokens, option):
    settings = {**QUIET, **OPTIONS[option], "encoder_init_std": 0.1}
    solve = dict(deq_tol=1e-12, deq_adjoint_tol=1e-12, deq_max_iter=80, deq_adjoint_max_iter=80)
    found = gradients(build(task, "deq_bert", **settings, **solve).double(), tokens)
    expected = gradients(build(task, "deq_bert", **settings, deq_gradient="bptt-80").double(), tokens)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("option", OPTIONS)
def test_runge_kutta_steps_of_every_option_have_their_order(task, tokens, option):
    """Halving the steps of rk4 divides the distance to the solution by 16."""
    model = build(task, "neural_ode_bert", **QUIET, **OPTIONS[option], encoder_init_std=0.15).double().eval()
    field, layout = model.encoder.depth.field, model.encoder.layout(tokens)
    with torch.no_grad():
        x = model.encoder.embed(tokens, layout)
        f, ends = field.prepare(x, layout), {}
        for steps in (4, 8, 64):
            y, h = x, 1.0 / steps
            for step in range(steps):
                one = f(step * h, y)
                two = f((step + 0.5) * h, y + h / 2 * one)
                three = f((step + 0.5) * h, y + h / 2 * two)
                y = y + h / 6 * (one + 2 * two + 2 * three + f((step + 1) * h, y + h * three))
            ends[steps] = y
    coarse, fine = ((ends[steps] - ends[64]).norm() for steps in (4, 8))
    assert 11 < coarse / fine < 22


@pytest.mark.parametrize(
    "family, settings",
    [
        ("ode_bert", dict(ode_scheme="rk4")),
        ("ode_bert", dict(ode_scheme="theta", ode_theta=0.5)),
        ("ode_bert", dict(ode_scheme="rk2", ode_split=2)),
        ("deq_bert", dict(deq_prelude_layers=1, deq_coda_layers=1)),
        ("deq_bert", dict(deq_cell_layers=2, no_first_norm=False)),
    ],
    ids=str,
)
def test_layers_that_differ(task, tokens, family, settings):
    model = build(task, family, **{**BY_LAYER, **QUIET, **settings})
    layers = list(model.encoder.depth.layers())
    places = [place // settings.get("ode_split", 1) for place in range(len(layers))]
    assert [layer.attention.config.window for layer in layers] == [2 if place % 2 else None for place in places]
    assert [layer.attention.config.rotary_base for layer in layers] == [9.0 if place % 2 else 50.0 for place in places]
    bare = [not list(layer.attention_norm.parameters()) for layer in layers]
    assert bare == [place == 0 and settings.get("no_first_norm", True) for place in places]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients(model, tokens).values())
    model.eval()
    with torch.no_grad():
        together = model(tokens, features_only=True)[0]
        for row, length in enumerate((12, 9, 5)):
            alone = model(tokens[row : row + 1, :length], features_only=True)[0]
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=2e-3)


def test_a_layer_cut_in_time_stays_its_layer(task, tokens):
    whole = build(task, "ode_bert", **BY_LAYER, **QUIET, ode_steps=2).eval()
    cut = build(task, "ode_bert", **BY_LAYER, **QUIET, ode_split=2).eval()
    state = whole.state_dict()
    cut.upgrade_state_dict_named(state, "")
    cut.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(cut(tokens)[0], whole(tokens)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bias_is_left_but_that_of_the_output(task, family):
    model = build(task, family, no_biases=True, segment_types=2)
    biases = [name for name, _ in model.named_parameters() if "bias" in name]
    assert biases == ["encoder.lm_head.bias"]
    model.register_classification_head("topics", 3)
    assert model.classification_heads["topics"].dense.bias is not None


def test_positions_have_no_embedding_where_attention_knows_them(task):
    assert build(task, "ode_bert", attention_rotary_base=10.0).encoder.embed_positions is None
    both = build(task, "ode_bert", attention_rotary_base=10.0, encoder_positions="learned")
    assert both.encoder.embed_positions is not None


def test_all_gated_fields_start_at_the_scale_of_their_depth(task):
    for family, std in (("ode_bert", 0.02 / 6**0.5), ("deq_bert", 0.02 / 2**0.5)):
        model = build(task, family, gated_feed_forward=True, encoder_embed_dim=64, encoder_ffn_embed_dim=128)
        (layer, *_) = model.encoder.depth.layers()
        assert layer.feed_forward.fc2.weight.std().item() == pytest.approx(std, rel=0.05)
        assert layer.feed_forward.fc1.weight.shape == (256, 64)


@pytest.mark.parametrize("size, layers, weights", [("tiny", 4, 0.6e6), ("small", 19, 43e6), ("base", 22, 111e6)])
def test_presets_have_the_shape_of_ettin(size, layers, weights):
    name = f"modern_ode_bert_{size}"
    assert family_of(name) == "ode_bert" and family_of("roberta") == "roberta"
    config = MODEL_REGISTRY[name].config_class()(max_positions=1024)
    with torch.device("meta"):
        depth = config.build_depth()
    fields = list(depth.layers())
    assert len(fields) == layers and depth.final_norm is not None and not config.learned_positions
    assert sum(parameter.numel() for parameter in depth.parameters()) == pytest.approx(weights, rel=0.12)
    assert [layer.attention.config.window for layer in fields[:4]] == [None, 64, 64, None]
    assert not [name for name, _ in depth.named_parameters() if "bias" in name]
    around = config.network(50368, 1)
    assert around.embeddings.norm is not None and not around.embeddings.norm.bias and not around.head.bias


WINDOWS = dict(attention_window=2, attention_global_every=2)
ALIKE = "makes layers differ, and here the weights of one are used at several depths: leave it out"


@pytest.mark.parametrize(
    "family, settings, sentence",
    [
        ("ode_bert", dict(ode_tied=True, **WINDOWS), f"--attention-global-every {ALIKE}"),
        ("ode_bert", dict(ode_tied=True, no_first_norm=True), f"--no-first-norm {ALIKE}"),
        ("neural_ode_bert", WINDOWS, f"--attention-global-every {ALIKE}"),
        ("knots", dict(no_first_norm=True), f"--no-first-norm {ALIKE}"),
        ("deq_bert", WINDOWS, f"--attention-global-every {ALIKE}"),
        ("deq_bert", dict(no_first_norm=True, deq_coda_layers=1), "--no-first-norm: the first layer is the equilib"),
        ("ode_bert", dict(no_first_norm=True, ode_field="post-norm"), "--no-first-norm: a post-norm field needs it"),
        ("ode_bert", dict(no_first_norm=True, no_layernorm_embedding=True), "nothing would norm what the first layer"),
        ("ode_bert", dict(attention_global_every=2), "--attention-global-every: all layers see all tokens: set --"),
        ("deq_bert", dict(attention_rotary_base=0.5), "--attention-rotary-base: a base of 0.5 makes no angles"),
        ("ode_bert", dict(attention_rotary_base=9.0, encoder_embed_dim=6), "heads make ones of width 3"),
        ("ode_bert", dict(embedding_dropout=1.0), r"--embedding-dropout must lie in \[0, 1\), got 1.0"),
        ("ode_bert", dict(feed_forward_dropout=float("nan")), "--feed-forward-dropout must lie in"),
        ("ode_bert", dict(activation_fn="swiglu"), "--activation-fn: 'swiglu' is unknown: choose one of gelu"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_sentence(task, family, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        build(task, family, **settings)
    assert len(str(raised.value).splitlines()) == 1


def test_on_the_command_line(fairseq_train, toy_flags, tmp_path):
    run = fairseq_train(
        *toy_flags, "--gated-feed-forward", "--no-biases", "--attention-rotary-base", 100, "--attention-window", 3,
        "--attention-global-every", 2, "--max-update", 2, "--save-dir", tmp_path,
    )  # fmt: skip
    assert len(run.losses()) == 2
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert stored["cfg"]["model"]["attention_rotary_base"] == 100.0 and stored["cfg"]["model"]["attention_window"] == 3
    assert not [name for name in stored["model"] if "embed_positions" in name]
