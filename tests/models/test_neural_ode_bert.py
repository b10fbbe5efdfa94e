"""neural_ode_bert as fairseq sees it, and depth as a dial on trained checkpoints."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from omegaconf import OmegaConf

from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertConfig, NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel

SHAPE = dict(encoder_layers=3, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=4)
QUIET = dict(dropout=0.0, attention_dropout=0.0)
TINY = "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --arch neural_ode_bert_tiny".split()


def build(task, **settings) -> NeuralOdeBertModel:
    torch.manual_seed(0)
    return NeuralOdeBertModel.build_model(NeuralOdeBertConfig(**{**SHAPE, **settings}), task)


def stack(task, **settings) -> OdeBertModel:
    torch.manual_seed(0)
    model = OdeBertModel.build_model(OdeBertConfig(**{**SHAPE, **QUIET, **settings}), task).double().eval()
    with torch.no_grad():
        for parameter in model.encoder.depth.parameters():
            if parameter.dim() > 1:
                # Away from the tiny initial increments, where every scheme agrees with every other.
                parameter.mul_(15.0)
    return model


def opened(model, task, **settings):
    """The weights of ``model`` in a model of other settings, as a checkpoint opened with ``--model-overrides``."""
    family = NeuralOdeBertModel if "ode_depth_weights" in settings else OdeBertModel
    config = NeuralOdeBertConfig if "ode_depth_weights" in settings else OdeBertConfig
    other = family.build_model(config(**{**SHAPE, **QUIET, **settings}), task).double()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other.eval()


def test_presets_have_the_published_widths():
    for size, width in (("tiny", 128), ("small", 512), ("base", 768), ("large", 1024)):
        for variant in ("", "knots_"):
            name = f"neural_ode_bert_{variant}{size}"
            assert name in MODEL_REGISTRY and MODEL_DATACLASS_REGISTRY[name]().encoder_embed_dim == width
    knots = MODEL_DATACLASS_REGISTRY["neural_ode_bert_knots_base"]()
    assert knots.ode_depth_weights == "linear" and knots.duration == 12.0


def test_one_field_costs_one_layer_and_knots_cost_one_each(task):
    one, three = build(task), build(task, ode_depth_weights="linear")
    layer = sum(p.numel() for p in three.encoder.depth.field.knots[0].parameters())
    depth = {model: sum(p.numel() for p in model.encoder.depth.field.parameters()) for model in (one, three)}
    assert depth[three] == 3 * layer
    embedding = sum(p.numel() for p in one.encoder.depth.field.depth_embedding.parameters())
    assert depth[one] == layer + embedding


def test_initialisation_starts_autonomous_and_scales_by_the_depth(task):
    wide = dict(encoder_embed_dim=128, encoder_ffn_embed_dim=256, encoder_layers=8)
    field = build(task, **wide).encoder.depth.field
    assert not field.depth_embedding.coefficients.weight.any()
    assert field.attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    knots = build(task, ode_depth_weights="linear", **wide).encoder.depth.field.knots
    assert knots[3].feed_forward.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)


@pytest.mark.parametrize("weights", ("embedding", "linear", "constant"))
def test_padding_and_batch_mates_change_no_answer(task, tokens, weights):
    model = build(task, ode_tolerance=1e-4, ode_depth_weights=weights).eval()
    with torch.no_grad():
        for parameter in model.encoder.depth.field.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
        together = model(tokens, features_only=True)[0]
        for row, length in enumerate((12, 9, 5)):
            alone = model(tokens[row : row + 1, :length], features_only=True)[0]
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=5e-6)


def test_every_weight_of_a_fresh_model_with_knots_has_a_gradient(task, tokens):
    model = build(task, ode_depth_weights="linear", encoder_layers=12).train()
    model(tokens)[0].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_contracting_field_in_the_reversible_scheme_is_said(task, tokens, caplog):
    reversible = dict(
        ode_depth_weights="linear", ode_tolerance=0.0, ode_scheme="reversible-heun", ode_gradient="reversible"
    )
    build(task, **reversible)
    assert "post-norm" not in caplog.text
    model = build(task, **reversible, ode_field="post-norm", encoder_layers=24).eval()
    assert "however many --ode-steps; use --ode-field pre-norm" in caplog.text
    with torch.no_grad(), pytest.raises(ArithmeticError, match="state beyond 100000"):
        model(tokens)


def test_model_pickles_deep_copies_and_builds_from_omegaconf(task, tokens):
    config = OmegaConf.structured(NeuralOdeBertConfig(**SHAPE, ode_random_steps=[1, 3], ode_tolerance=0.0))
    model = NeuralOdeBertModel.build_model(config, task).eval()
    expected = model(tokens)[0]
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(tokens)[0], expected)


def test_update_number_reaches_the_random_steps(task, tokens):
    model = build(task, ode_tolerance=0.0, ode_scheme="heun2", ode_random_steps=[1, 4], ode_steps=2)
    taken = []
    for update in range(8):
        model.set_num_updates(update)
        taken.append(model.train()(tokens)[1]["output"].statistics["steps"])
    assert len(set(taken)) > 1 and model.eval()(tokens)[1]["output"].statistics["steps"] == 2


@pytest.mark.parametrize("precision", (torch.bfloat16, torch.float16))
def test_half_precision(task, tokens, precision):
    for settings in ({"ode_tolerance": 1e-2}, {"ode_tolerance": 0.0, "ode_scheme": "rk4"}):
        exact = build(task, **settings).eval()
        model = copy.deepcopy(exact).to(precision)
        features = model(tokens, features_only=True)[0]
        assert features.dtype is precision and torch.isfinite(features).all()
        torch.testing.assert_close(features.float(), exact(tokens, features_only=True)[0], rtol=0, atol=0.15)


def test_blocks_of_an_euler_checkpoint_become_knots(task, tokens):
    """The same function at unit Euler steps; solved more finely, the model whose layers it discretises."""
    euler = stack(task, ode_scheme="euler")
    expected = euler(tokens)[0]
    fixed = dict(ode_depth_weights="linear", ode_tolerance=0.0)
    same = opened(euler, task, **fixed, ode_scheme="euler", ode_steps=3)
    torch.testing.assert_close(same(tokens)[0], expected, rtol=0, atol=1e-12)
    constant = opened(euler, task, ode_depth_weights="constant", ode_tolerance=0.0, ode_scheme="rk4", ode_steps=3)
    rk4 = opened(euler, task, ode_scheme="rk4")
    torch.testing.assert_close(constant(tokens)[0], rk4(tokens)[0], rtol=0, atol=1e-12)


def test_a_tied_euler_checkpoint_becomes_the_field(task, tokens):
    tied = stack(task, ode_scheme="euler", ode_tied=True)
    model = opened(tied, task, ode_depth_weights="embedding", ode_tolerance=0.0, ode_scheme="euler", ode_steps=3)
    torch.testing.assert_close(model(tokens)[0], tied(tokens)[0], rtol=0, atol=1e-12)


def test_different_blocks_cannot_become_one_field(task):
    with pytest.raises(ValueError, match="one field cannot be.*--ode-depth-weights linear"):
        opened(stack(task), task, ode_depth_weights="embedding")


@pytest.mark.parametrize("scheme, order", (("euler", 1), ("rk2", 2), ("rk3", 3), ("rk4", 4)))
def test_doubled_depth_keeps_the_function_to_the_order_of_the_scheme(task, tokens, scheme, order):
    """Twice the blocks at half the step: each doubling changes the function by what the scheme still gets wrong."""
    model = stack(task, ode_scheme=scheme)
    outputs = [opened(model, task, ode_scheme=scheme, ode_split=split)(tokens)[0] for split in (1, 2, 4, 8, 16)]
    changes = [(b - a).norm().item() for a, b in pairwise(outputs)]
    assert math.log2(changes[-2] / changes[-1]) == pytest.approx(order, abs=0.5)
    assert changes[0] > changes[1] > changes[2]
    torch.testing.assert_close(outputs[0], model(tokens)[0], rtol=0, atol=0)


def test_split_blocks_are_trained_apart_and_split_again(task, tokens):
    twice = opened(stack(task, ode_scheme="rk4"), task, ode_scheme="rk4", ode_split=2)
    first, second = twice.encoder.depth.fields[:2]
    assert torch.equal(first.attention.qkv.weight, second.attention.qkv.weight)
    assert first.attention.qkv.weight is not second.attention.qkv.weight
    with torch.no_grad():
        second.attention.qkv.weight.add_(0.1)
    again = opened(twice, task, ode_scheme="rk4", ode_split=4)
    steps = opened(twice, task, ode_scheme="rk4", ode_split=2, ode_steps=2)
    torch.testing.assert_close(again(tokens)[0], steps(tokens)[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="do not divide"):
        opened(twice, task, ode_scheme="rk4", ode_split=3)


@pytest.mark.parametrize("scheme", ("bosh3", "dopri5", "tsit5"))
def test_adaptive_blocks_agree_with_fine_fixed_steps(task, tokens, scheme):
    model = stack(task, ode_scheme="euler")
    exact = opened(model, task, ode_scheme="rk4", ode_steps=40)(tokens)[0]
    adaptive = opened(model, task, ode_scheme=scheme, ode_tolerance=1e-7, ode_max_evaluations=5000)
    logits, extra = adaptive(tokens)
    torch.testing.assert_close(logits, exact, rtol=0, atol=1e-4)
    coarse = opened(model, task, ode_scheme=scheme, ode_tolerance=1e-2)(tokens)[1]["output"].statistics
    assert float(coarse["evaluations"]) < float(extra["output"].statistics["evaluations"])
    assert coarse["stopped"] == 0


@pytest.mark.parametrize(
    "model, settings, sentence",
    (
        (
            OdeBertModel,
            dict(ode_tolerance=1e-3),
            "--ode-scheme: 'rk2' has no embedded error estimate.*--ode-tolerance 0",
        ),
        (OdeBertModel, dict(ode_tolerance=-1.0), "--ode-tolerance: a tolerance of -1.0"),
        (
            OdeBertModel,
            dict(ode_tolerance=1e-3, ode_scheme="bosh3", ode_coefficients="learned"),
            "set --ode-coefficients fixed, --ode-corrector none, and neither --rk-norm",
        ),
        (
            OdeBertModel,
            dict(ode_tolerance=1e-3, ode_scheme="bosh3", stage_dropout="independent"),
            "--stage-dropout: .*need 'shared'",
        ),
        (OdeBertModel, dict(ode_split=0), "--ode-split 0"),
        (OdeBertModel, dict(ode_split=2, ode_history="dlcl"), "cuts layers in time"),
        (OdeBertModel, dict(ode_split=2, rk_norm=True), "--ode-split 2 with --rk-norm normalises the state 2 times"),
        (OdeBertModel, dict(ode_scheme="theta", checkpoint_activations=True), "--checkpoint-activations True belongs"),
        (NeuralOdeBertModel, dict(ode_gradient="adjoint", checkpoint_activations=True), "adjoint keeps no activations"),
        (NeuralOdeBertModel, dict(ode_backend="torchdyn", checkpoint_activations=True), "needs --ode-backend own"),
        (OdeBertModel, dict(ode_random_steps=[2]), "--ode-random-steps: 2 is no range"),
        (NeuralOdeBertModel, dict(ode_depth_weights="cubic"), "--ode-depth-weights: 'cubic'"),
        (NeuralOdeBertModel, dict(ode_knots=3), "--ode-knots belongs to"),
        (NeuralOdeBertModel, dict(ode_depth_weights="linear", ode_knots=0), "at least one knot"),
        (NeuralOdeBertModel, dict(ode_field="post-norm"), "not of a post-norm one"),
        (NeuralOdeBertModel, dict(drop_path=0.1), "--drop-path 0.1"),
        (NeuralOdeBertModel, dict(stage_dropout="independent"), "--stage-dropout: independent .*use shared"),
        (NeuralOdeBertModel, dict(ode_random_steps=[3, 1], ode_tolerance=0.0), "--ode-random-steps: 3,1"),
    ),
)
def test_impossible_settings(task, model, settings, sentence):
    config = OdeBertConfig if model is OdeBertModel else NeuralOdeBertConfig
    with pytest.raises(ValueError, match=sentence):
        model.build_model(config(**{**SHAPE, **settings}), task)


@pytest.mark.parametrize(
    "model, settings",
    [
        (OdeBertModel, dict(ode_scheme="rk4")),
        (OdeBertModel, dict(ode_scheme="bosh3", ode_tolerance=1e-3)),
        (NeuralOdeBertModel, dict(ode_tolerance=1e-3)),
        (NeuralOdeBertModel, dict(ode_tolerance=0.0)),
    ],
)
def test_checkpoint_activations_is_the_gradient_checkpoint_step(task, tokens, model, settings):
    class Saved:
        """Bytes of what the forward pass keeps."""

        def __enter__(self):
            self.bytes = 0
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self.count, lambda kept: kept)
            self.hooks.__enter__()
            return self

        def count(self, tensor):
            self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        def __exit__(self, *error):
            self.hooks.__exit__(*error)

    def run(**more):
        torch.manual_seed(0)
        config = (OdeBertConfig if model is OdeBertModel else NeuralOdeBertConfig)(**{**SHAPE, **settings, **more})
        built = model.build_model(config, task).train()
        with Saved() as saved:
            loss = built(tokens)[0].square().sum()
        loss.backward()
        return saved.bytes, [parameter.grad for parameter in built.parameters()]

    plain, flag, named = run(), run(checkpoint_activations=True), run(ode_gradient="checkpoint-step")
    assert flag[0] == named[0] < plain[0]
    for one, other in zip(flag[1], named[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    "model, config",
    [(OdeBertModel, OdeBertConfig), (NeuralOdeBertModel, NeuralOdeBertConfig), (DeqBertModel, DeqBertConfig)],
)
def test_a_model_with_quantised_matrices_answers_nearly_the_same(task, tokens, model, config):
    torch.manual_seed(0)
    plain = model.build_model(config(**SHAPE), task).eval()
    plain.register_classification_head("sentences", 2)
    quantised = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, torch.qint8)
    with torch.no_grad():
        for options in ({}, dict(classification_head_name="sentences")):
            exact = plain(tokens, **options)[0]
            assert 0 < (quantised(tokens, **options)[0] - exact).norm() < 0.1 * exact.norm()


def test_tolerance_below_the_floor_of_the_state(task, tokens):
    with pytest.raises(ValueError, match="--ode-tolerance: 1e-08 is below the floor of a float32 state"):
        build(task, ode_tolerance=1e-8)(tokens)


def test_fairseq_trains_validates_and_turns_the_dial(toy_flags, toy_data, fairseq_train, fairseq_validate, tmp_path):
    """The own loop with all penalties; then one checkpoint under other schemes, steps and tolerances."""
    run = fairseq_train(
        *toy_flags, *TINY, "--save-dir", tmp_path, "--max-update", 40, "--lr", 4e-3, "--ode-kinetic-energy", 0.01,
        "--ode-jacobian", 0.01, "--ode-local-error", 0.01, "--ode-gradient", "checkpoint-step",
    )  # fmt: skip
    inner = run.metrics("train_inner")
    assert inner[-1]["loss"] < inner[0]["loss"] - 0.3
    logged = "evaluations steps rejected evaluations_backward stopped state_rms kinetic_energy jacobian local_error"
    assert set(logged.split()) <= set(inner[0])
    losses = {}
    for name, overrides in {
        "trained": {},
        "tight": {"ode_tolerance": 1e-4},
        "rk4": {"ode_tolerance": 0.0, "ode_scheme": "rk4", "ode_steps": 8},
        "one euler step": {"ode_tolerance": 0.0, "ode_scheme": "euler", "ode_steps": 1},
    }.items():
        metrics = fairseq_validate(
            *(toy_data, "--task", "implicit_masked_lm", "--path", tmp_path / "checkpoint_last.pt", "--batch-size", 4),
            *("--model-overrides", repr({**overrides, "ode_gradient": "autograd", "ode_local_error": 0.0})),
        )
        losses[name] = metrics["valid_loss"]
        if name == "one euler step":
            assert metrics["valid_evaluations"] == 1
    assert losses["tight"] == pytest.approx(losses["rk4"], abs=2e-3)
    assert losses["trained"] == pytest.approx(losses["rk4"], abs=0.05)


@pytest.mark.parametrize(
    "flags",
    (
        "--ode-backend torchdyn",
        "--ode-backend torchdyn --ode-gradient torchdyn-adjoint --dropout 0.1",
        "--ode-scheme reversible-heun --ode-gradient reversible --ode-tolerance 0 --ode-steps 4",
        "--ode-scheme rk4 --ode-tolerance 0 --ode-random-steps 1,3 --ode-depth-weights linear --ode-field post-norm",
    ),
)
def test_fairseq_trains_with(flags, toy_flags, fairseq_train, tmp_path):
    if "torchdyn" in flags:
        pytest.importorskip("torchdyn.numerics")
    run = fairseq_train(*toy_flags, *TINY, *flags.split(), "--no-save", "--save-dir", tmp_path, "--max-update", 12)
    losses = [metrics["loss"] for metrics in run.metrics("train_inner")]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(metrics["evaluations"] >= 2 for metrics in run.metrics("train_inner"))
