"""deq_bert: flags, presets, checkpoints, dials, precision."""

import copy
import dataclasses
import logging
import pickle

import pytest
import torch
from fairseq.dataclass.configs import EMAConfig
from fairseq.models import MODEL_REGISTRY
from fairseq.models.ema import build_ema

from fairseq_implicit.families.bert import SIZES
from fairseq_implicit.families.deq_bert import matched_ffn_dim
from fairseq_implicit.models.deq_bert import DeqBertConfig, DeqBertModel

SHAPE = dict(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=48, encoder_attention_heads=4)


def build(task, seed=0, **settings) -> DeqBertModel:
    torch.manual_seed(seed)
    return DeqBertModel.build_model(DeqBertConfig(**{**SHAPE, **settings}), task)


def test_presets_have_the_parameters_of_their_explicit_twins():
    for size, shape in SIZES.items():
        config = MODEL_REGISTRY[f"deq_bert_{size}"].config_class()()
        config.check()
        dim, layers, ffn = shape["encoder_embed_dim"], shape["encoder_layers"], shape["encoder_ffn_embed_dim"]
        twin = layers * (4 * dim * dim + 2 * dim * ffn + 9 * dim + ffn)
        own = 4 * dim * dim + 2 * dim * config.encoder_ffn_embed_dim + 9 * dim + config.encoder_ffn_embed_dim
        assert config.encoder_embed_dim == dim
        assert own == pytest.approx(twin, rel=0.02), size


def test_tiny_preset_is_matched_to_the_explicit_model_that_fairseq_builds(task):
    own = MODEL_REGISTRY["deq_bert_tiny"].build_model(MODEL_REGISTRY["deq_bert_tiny"].config_class()(), task)
    twin = MODEL_REGISTRY["ode_bert_euler_tiny"].build_model(
        MODEL_REGISTRY["ode_bert_euler_tiny"].config_class()(), task
    )
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (own, twin)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    assert matched_ffn_dim(1, 64, 256) == 256


def test_the_cost_report_states_parameters_and_the_model_of_cost(task, caplog):
    with caplog.at_level(logging.INFO):
        model = build(task, deq_max_iter=12, deq_adjoint_max_iter=12)
    cell = sum(parameter.numel() for parameter in model.encoder.depth.cell.layers.parameters())
    assert f"{cell / 1e6:.2f} M of them in the cell" in caplog.text
    assert "at most 27 evaluations of the cell (solve + 1 + adjoint + 2)" in caplog.text


@pytest.mark.parametrize("norm", ["post-norm", "pre-norm"])
def test_padding_and_batch_mates_change_no_answer(task, tokens, norm):
    model = build(task, deq_cell_norm=norm, deq_coda_layers=1, deq_tol=1e-9).double().eval()
    with torch.no_grad():
        together = model(tokens, features_only=True)[0]
        for row, length in enumerate((12, 9, 5)):
            alone = model(tokens[row : row + 1, :length], features_only=True)[0]
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["ift", "neumann-3", "phantom-3", "jfb", "bptt-3", "reversible"])
def test_every_gradient_trains_every_parameter(task, tokens, gradient):
    model = build(task, deq_gradient=gradient, deq_qkv_injection=True, deq_weight_norm=True).train()
    logits, extra = model(tokens)
    logits.log_softmax(-1)[..., 5].sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert extra["output"].statistics["evaluations"] > 0


def test_hidden_states_are_time_first_and_start_with_the_embedding(task, tokens):
    states = build(task, deq_coda_layers=1).eval()(tokens, return_all_hiddens=True)[1]["inner_states"]
    assert [tuple(state.shape) for state in states] == [(12, 3, 16)] * 3


def test_checkpoint_copies_pickles_and_reloads_with_weight_norm(task, tokens):
    model = build(task, deq_weight_norm=True, deq_prelude_layers=1, deq_qkv_injection=True).eval()
    twin = build(task, seed=1, deq_weight_norm=True, deq_prelude_layers=1, deq_qkv_injection=True).eval()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        reference = model(tokens)[0]
        assert torch.equal(twin(tokens)[0], reference)
        assert torch.equal(copy.deepcopy(model)(tokens)[0], reference)
    # A parametrised module has a class made at run time, which pickle cannot name; plain cells pickle whole.
    plain = build(task).eval()
    assert torch.equal(pickle.loads(pickle.dumps(plain))(tokens)[0], plain(tokens)[0])


def test_one_checkpoint_opens_under_every_solver_budget_and_tolerance(task, tokens):
    source = build(task).double().eval()
    states = {}
    for solver in ("picard", "anderson", "broyden"):
        model = build(task, deq_solver=solver, deq_max_iter=80, deq_tol=1e-10).double().eval()
        model.load_state_dict(source.state_dict())
        states[solver] = model(tokens, features_only=True)[0]
    torch.testing.assert_close(states["picard"], states["anderson"], rtol=0, atol=1e-8)
    torch.testing.assert_close(states["broyden"], states["anderson"], rtol=0, atol=1e-8)
    short = build(task, deq_eval_max_iter=2, deq_eval_tol=1e-10, deq_eval_solver="picard").double().eval()
    short.load_state_dict(source.state_dict())
    assert short.train()(tokens)[1]["output"].statistics["evaluation_budget"] == 30
    short.eval()
    residual = short(tokens)[1]["output"].statistics["residual"]
    assert residual > 1e-7


def test_bfloat16_autocast_and_half_weights_run(task, tokens):
    model = build(task).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, extra = model(tokens)
    assert float(extra["output"].statistics["converged_share"]) == 1.0
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    half = build(task).bfloat16().train()
    logits, extra = half(tokens)
    assert logits.dtype is torch.bfloat16 and float(extra["output"].statistics["converged_share"]) == 1.0


def test_the_depth_finds_its_updates_and_keeps_them_through_a_new_run(task, tokens):
    model = build(task, deq_warmup_updates=10, deq_warmup_steps=3).train()
    model.set_num_updates(12)
    tuned = build(task, deq_warmup_updates=10, deq_warmup_steps=3).train()
    tuned.load_state_dict(model.state_dict())
    model.set_num_updates(0)  # a new optimiser: the network is still past its warm-up
    tuned.load_state_dict(model.state_dict())
    tuned.set_num_updates(1)
    assert tuned.encoder.depth.updates.value == 13
    assert float(tuned(tokens)[1]["output"].statistics["evaluation_budget"]) == 30


def test_a_finetuning_head_sees_the_equilibrium(task, tokens):
    model = build(task).train()
    model.register_classification_head("pairs", 2)
    logits, _ = model(tokens, classification_head_name="pairs")
    assert logits.shape == (3, 2)
    logits.square().sum().backward()
    assert model.encoder.depth.cell.layers[0].attention.qkv.weight.grad.ne(0).any()


REFUSED = [
    (dict(deq_solver="newton"), "--deq-solver"),
    (dict(deq_solver="none"), "--deq-solver: none contradicts --deq-gradient ift"),
    (dict(deq_solver="picard", deq_gradient="bptt-4"), "--deq-solver: picard contradicts --deq-gradient bptt-4"),
    (dict(deq_solver="broyden", deq_gradient="reversible"), "--deq-solver: broyden contradicts"),
    (dict(deq_solver="picard", deq_window=4), "--deq-window: only --deq-solver anderson"),
    (dict(deq_memory=64.0), "--deq-memory: only --deq-solver broyden"),
    (dict(deq_max_iter=0), "--deq-max-iter: a budget of 0 evaluations"),
    (dict(deq_adjoint_max_iter=0), "--deq-adjoint-max-iter: a budget of 0"),
    (dict(deq_adjoint_solver="gmres"), "--deq-adjoint-solver"),
    (dict(deq_adjoint_tol=-1.0), "--deq-adjoint-tol"),
    (dict(deq_tol=0.0), "--deq-tol"),
    (dict(deq_eval_solver="newton"), "--deq-eval-solver"),
    (dict(deq_eval_max_iter=0), "--deq-eval-max-iter: a budget of 0"),
    (dict(deq_eval_tol=-1.0), "--deq-eval-tol"),
    (dict(deq_eval_tol=0.1, deq_gradient="bptt-4"), "--deq-eval-tol: bptt-4"),
    (dict(deq_criterion="max"), "--deq-criterion"),
    (dict(deq_damping=0.0), "--deq-damping"),
    (dict(deq_compact=True, deq_no_freeze=True), "--deq-compact"),
    (dict(deq_gradient="exact"), "--deq-gradient"),
    (dict(deq_gradient="phantom"), "--deq-gradient: 'phantom' needs its number"),
    (dict(deq_gradient="bptt-0"), "--deq-gradient"),
    (dict(deq_gradient_damping=0.5), "--deq-gradient-damping: ift has nothing to damp"),
    (dict(deq_gradient="reversible", deq_gradient_damping=1.0), "--deq-gradient-damping"),
    (dict(checkpoint_activations=True), "--checkpoint-activations: ift"),
    (dict(attention_dropout=0.1, stage_dropout="independent"), "--stage-dropout: attention dropout"),
    (dict(drop_path=0.1), "--drop-path"),
    (dict(deq_cell_norm="parallel"), "--deq-cell-norm"),
    (dict(deq_cell_norm="pre-norm", deq_no_final_norm=True), "--deq-no-final-norm: a pre-norm cell without a norm"),
    (dict(deq_cell_norm="post-norm", deq_no_final_norm=True), "--deq-no-final-norm: a post-norm cell"),
    (dict(deq_cell_layers=0), "--deq-cell-layers"),
    (dict(deq_prelude_layers=-1), "--deq-prelude-layers"),
    (dict(deq_injection="concat"), "--deq-injection"),
    (dict(deq_injection="none"), "--deq-injection: nothing of the input"),
    (dict(deq_injection_gain=0.0), "--deq-injection-gain"),
    (dict(deq_initial_state="noise"), "--deq-initial-state"),
    (dict(deq_warmup_updates=-1), "--deq-warmup-updates"),
    (dict(deq_ramp_updates=10), "--deq-ramp-updates"),
    (dict(deq_ramp_updates=10, deq_start_max_iter=40), "--deq-start-max-iter"),
    (dict(deq_budget_jitter=30), "--deq-budget-jitter"),
    (dict(deq_phantom_updates=5, deq_gradient="bptt-4"), "--deq-phantom-updates: bptt-4 has no solver"),
    (dict(deq_jacobian_weight=-1.0), "--deq-jacobian-weight"),
    (dict(deq_jacobian_estimator="trace"), "--deq-jacobian-estimator"),
    (dict(deq_correction="4;8"), "--deq-correction"),
    (dict(deq_correction="4,80"), "--deq-correction"),
]


@pytest.mark.parametrize(
    "settings, sentence", REFUSED, ids=[sentence.split(":")[0] + str(i) for i, (_, sentence) in enumerate(REFUSED)]
)
def test_impossible_flags_end_in_one_sentence_that_names_them(settings, sentence):
    with pytest.raises(ValueError) as caught:
        DeqBertConfig(**{**SHAPE, **settings}).check()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["deq_tol", "deq_adjoint_tol"])
def test_a_tolerance_below_the_floor_of_the_running_precision_is_refused_by_name(task, tokens, name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: 1e-08 lies below the residual that float32"):
        build(task, **{name: 1e-8}).train()(tokens)


def test_no_flag_is_dead():
    """Every flag of the family changes the depth's configuration, is refused, or is a dial of another component."""
    other = {
        int: lambda value: value + 1,
        float: lambda value: value / 2 if value else 0.25,
        bool: lambda value: not value,
    }
    settings = {
        "deq_cell_norm": "post-norm", "deq_injection": "none", "deq_initial_state": "input", "deq_solver": "picard",
        "deq_linear_part": "diagonal",
        "deq_criterion": "rms", "deq_gradient": "jfb", "deq_adjoint_solver": "picard", "deq_correction": "2,4",
        "deq_jacobian_estimator": "double-backward", "deq_tol": 0.01, "deq_adjoint_tol": 0.01, "deq_window": 3,
        "deq_memory": 8.0, "deq_gradient_damping": 0.5, "deq_start_max_iter": 3, "deq_start_tol": 0.5,
        "deq_eval_solver": "picard", "deq_eval_max_iter": 5, "deq_eval_tol": 0.1, "deq_linear_part": "diagonal",
    }  # fmt: skip
    reference = DeqBertConfig().equilibrium()
    for item in dataclasses.fields(DeqBertConfig):
        if not item.name.startswith("deq_"):
            continue
        value = settings.get(item.name) or other[type(item.default)](item.default)
        try:
            assert DeqBertConfig(**{item.name: value}).equilibrium() != reference, item.name
        except ValueError:
            pass  # it contradicts the defaults, so it is read


@pytest.mark.parametrize("fp32", [False, True])
def test_an_average_of_the_weights_keeps_the_clock_exactly(task, fp32):
    model = build(task)
    ema = build_ema(model, EMAConfig(store_ema=True, ema_decay=0.9, ema_fp32=fp32), None)
    updates = model.encoder.depth.updates
    updates.set_num_updates(2**24 + 1)  # beyond what float32 counts
    updates.set_num_updates(0)
    weight = model.encoder.depth.cell.layers[0].feed_forward.fc1.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    ema.step(model, 1)
    averaged = ema.get_model().encoder.depth
    assert averaged.updates.value == updates.value == 2**24 + 1
    torch.testing.assert_close(averaged.cell.layers[0].feed_forward.fc1.weight, before + 0.1)
    assert ema.get_model().state_dict()["encoder.depth.updates.earlier"].dtype == torch.int64


def scales(model):
    """Standard deviations of the attention's output and of fc2: of the first prelude layer and of the cell."""
    depth = model.encoder.depth
    return [
        linear.weight.std().item()
        for layer in (depth.prelude[0], depth.cell.layers[0])
        for linear in (layer.attention.out, layer.feed_forward.fc2)
    ]


WIDE = dict(encoder_embed_dim=64, encoder_ffn_embed_dim=1024, deq_prelude_layers=1, deq_coda_layers=2)


@pytest.mark.parametrize(
    "start, expected",
    [
        ("plain", [0.02] * 4),
        # Of eight residual branches two are the cell's, whose fc2 is also four times as wide as usual.
        ("depth-scaled", [0.02 / 8**0.5, 0.02 / 8**0.5, 0.02 / 2**0.5, 0.02 / 2**0.5 / 2]),
        ("identity", [0.0] * 4),
    ],
)
@pytest.mark.parametrize("weight_norm", [False, True])
def test_each_start_means_what_its_help_says_whatever_the_explicit_twin_has(task, start, expected, weight_norm):
    for layers in (1, 48):
        model = build(task, encoder_layers=layers, encoder_init=start, deq_weight_norm=weight_norm, **WIDE)
        assert scales(model) == pytest.approx(expected, rel=0.03)
        assert model.encoder.depth.cell.layers[0].feed_forward.fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
