"""Any encoder of transformers under the solvers: the plain model to the last bit, and what a hand loop gives."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from fairseq_implicit.huggingface import depth_statistics, load_solved, restore_depth, solve_depth  # noqa: E402
from fairseq_implicit.options import OptionError  # noqa: E402

SHAPE = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, vocab_size=30)
SHAPE.update(max_position_embeddings=24, initializer_range=0.3)
DEBERTA = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, norm_rel_ebd="layer_norm")
DISTILBERT = dict(dim=16, n_layers=3, n_heads=4, hidden_dim=32, vocab_size=30, max_position_embeddings=24)
FAMILIES = {
    "Bert": SHAPE,
    "Roberta": SHAPE,
    "XLMRoberta": SHAPE,
    "Camembert": SHAPE,
    "Electra": dict(SHAPE, embedding_size=12),
    "Albert": dict(SHAPE, embedding_size=12, num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2),
    "DistilBert": dict(DISTILBERT, initializer_range=0.3),
    "DebertaV2": dict(SHAPE, **DEBERTA, conv_kernel_size=3, share_att_key=True),
    "ModernBert": dict(SHAPE, local_attention=4, global_attn_every_n_layers=2, pad_token_id=0),
}
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0]])
REAL = TOKENS.ne(0)
DROPOUT = {
    "Albert": dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2),
    "DistilBert": dict(dropout=0.2, attention_dropout=0.2),
    "ModernBert": dict(embedding_dropout=0.2, attention_dropout=0.2, mlp_dropout=0.2),
}
families = pytest.mark.parametrize("family", FAMILIES)


def configuration(family, dropout=False, **more):
    noisy = DROPOUT.get(family, DROPOUT["Albert"])
    noise = noisy if dropout else {name: 0.0 for name in noisy}
    return getattr(transformers, f"{family}Config")(**FAMILIES[family], **noise, **more)


def encoder(family="Bert", head="Model", dropout=False, **more):
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{head}")(configuration(family, dropout, **more)).eval()


def states(model, tokens=TOKENS, real=REAL, **options):
    return model(tokens, attention_mask=real.long(), output_hidden_states=True, **options).hidden_states


def last(model, tokens=TOKENS, real=REAL):
    return model(tokens, attention_mask=real.long()).last_hidden_state


def real_tokens(state):
    return state[REAL]


def gradients(model):
    """Of a loss that reads the real tokens, after a pass with seeded noise."""
    model.zero_grad()
    torch.manual_seed(3)
    weights = torch.linspace(-1, 1, 16, dtype=model.dtype)
    (last(model)[REAL] * weights).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@families
@pytest.mark.parametrize("over", ["layer", "stack"])
def test_euler_is_the_plain_model_to_the_last_bit(family, over):
    model = encoder(family)
    plain, keys = states(model), list(model.state_dict())
    solve_depth(model, "euler", over=over)
    solved = states(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(solved[-1], plain[-1])
    if over == "layer":
        assert len(solved) == len(plain) and all(map(torch.equal, solved, plain))
    else:
        assert len(solved) == 2 and torch.equal(solved[0], plain[0])


@families
def test_training_with_euler_is_training_the_plain_model_dropout_included(family):
    model = encoder(family, dropout=True).train()
    plain = gradients(model)
    assert same(gradients(solve_depth(model, "euler")), plain)


def hand_loop(model, layer_calls, x, steps):
    """RK4 over each layer, written out, on the calls that the plain model made."""
    for call in layer_calls:
        for _ in range(steps):
            h = 1 / steps
            k1 = call(x) - x
            k2 = call(x + h / 2 * k1) - x - h / 2 * k1
            k3 = call(x + h / 2 * k2) - x - h / 2 * k2
            k4 = call(x + h * k3) - x - h * k3
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def recorded_calls(model, kinds):
    """What the plain model's layers are called with, as functions of the state; and the first state."""
    calls, first = [], []

    def hook(layer, args, kwargs):
        first.append(args[0])

        def call(z):
            found = layer.forward(z, *args[1:], **kwargs)
            return found[0] if isinstance(found, tuple) else found

        calls.append(call)

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__ in kinds
    ]
    last(model)
    for handle in handles:
        handle.remove()
    return calls, first[0]


@families
def test_rk4_with_substeps_is_a_hand_loop(family):
    model = encoder(family).double()
    kinds = ("TransformerBlock", f"{family}Layer", "ModernBertEncoderLayer")
    calls, x = recorded_calls(model, kinds)
    if family == "DebertaV2":
        conv, mask = model.encoder.conv, REAL.long()
        first = x
        calls[0:1] = [calls[0], lambda z: conv(first, z, mask)]
        x = hand_loop(model, calls[:1], x, 2)
        x = hand_loop(model, calls[2:], calls[1](x), 2)
    else:
        x = hand_loop(model, calls, x, 2)
        if family == "ModernBert":
            x = model.final_norm(x)
    solved = last(solve_depth(model, "rk4", steps=2))
    torch.testing.assert_close(real_tokens(solved), real_tokens(x), rtol=0, atol=1e-12)
    assert depth_statistics(model)["evaluations"] == 8 * (8 if family == "Albert" else 3)


@families
@pytest.mark.parametrize("over", ["layer", "stack"])
def test_recomputation_gives_the_same_bits_of_the_gradient_with_dropout_shared_along_the_solve(family, over):
    model = encoder(family, dropout=True).train()
    kept = gradients(solve_depth(model, "rk2", steps=2, over=over))
    assert all(gradient.isfinite().all() for gradient in kept.values())
    for gradient in ("checkpoint-step", "checkpoint-stage"):
        assert same(gradients(solve_depth(model, "rk2", steps=2, over=over, gradient=gradient)), kept)


def test_gradient_checkpointing_recomputes_each_step():
    model = encoder(dropout=True).train()
    kept = gradients(solve_depth(model, "rk4"))
    calls = []
    model.encoder.layer[1].intermediate.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    assert same(gradients(model), kept)
    assert len(calls) == 8  # four stages, twice
    solve_depth(model, "euler")
    recomputed = gradients(model)
    model.gradient_checkpointing_disable()
    assert same(gradients(model), recomputed)


def test_dropout_is_one_function_along_a_solve_and_another_one_in_the_next():
    model = encoder(dropout=True).train()
    solve_depth(model, "euler", steps=2)
    seen = []
    model.encoder.layer[0].output.dropout.register_forward_hook(lambda module, args, output: seen.append(output.eq(0)))
    last(model)
    last(model)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])


@families
@pytest.mark.parametrize(
    "options",
    [
        dict(scheme="rk4", over="stack"),
        dict(scheme="implicit-midpoint", tol=1e-10, max_iter=200),
        dict(scheme="bosh3", tolerance=1e-4),
        dict(scheme="equilibrium", gain=4.0, tol=1e-10, max_iter=300),
        dict(scheme="equilibrium", gain=4.0, tol=1e-10, max_iter=300, over="layer"),
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_padding_and_batch_mates_do_not_change_an_answer(family, options):
    model = solve_depth(encoder(family).double(), **options)
    together = last(model)
    for row in range(2):
        tokens = TOKENS[row : row + 1, REAL[row]]
        alone = last(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
        torch.testing.assert_close(together[row : row + 1, REAL[row]], alone, rtol=0, atol=1e-8)


@families
def test_an_equilibrium_with_injected_input_converges_and_its_implicit_gradient_is_that_of_a_long_unroll(family):
    model = encoder(family).double()
    options = dict(scheme="equilibrium", gain=8.0, tol=1e-12, max_iter=300)
    exact = gradients(solve_depth(model, **options))
    found = depth_statistics(model)
    assert found["converged_share"] == 1.0 and found["residual"] < 1e-12 and found["evaluations_backward"] > 1
    unrolled = gradients(solve_depth(model, **options, gradient="bptt-40"))
    for name, gradient in exact.items():
        scale = unrolled[name].abs().max() + 1e-6
        assert ((gradient - unrolled[name]).abs().max() / scale) < 1e-6, name


def test_one_evaluation_without_injection_is_the_plain_model():
    model = encoder()
    plain = last(model)
    solved = last(solve_depth(model, "equilibrium", gain=0.0, gradient="bptt-1"))
    assert torch.equal(solved[REAL], plain[REAL])


def test_an_equilibrium_injects_into_the_first_sum():
    model = encoder().double()
    x = states(model)[0]
    solve_depth(model, "equilibrium", gain=2.0, gradient="bptt-1")
    solved = last(model)
    restore_depth(model)
    norm = model.encoder.layer[0].attention.output.LayerNorm
    injected = 2.0 * functional.layer_norm(x, (16,))
    handle = norm.register_forward_pre_hook(lambda module, args: (args[0] + injected,))
    torch.testing.assert_close(solved[REAL], last(model)[REAL], rtol=0, atol=1e-12)
    handle.remove()


def test_an_equilibrium_that_is_not_reached_is_warned_of_and_counted(caplog):
    model = solve_depth(encoder(), "equilibrium", max_iter=2, tol=1e-5)
    last(model)
    last(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "raise max_iter (2)" in caplog.text and depth_statistics(model)["converged_share"] == 0.0


def test_phantom_gradients_recompute_and_exact_ones_refuse_to():
    model = encoder(dropout=True).train()
    kept = gradients(solve_depth(model, "equilibrium", gain=4.0, gradient="phantom-2"))
    model.gradient_checkpointing_enable()
    assert same(gradients(model), kept)
    with pytest.raises(OptionError, match="gradient_checkpointing_disable"):
        last(solve_depth(model, "equilibrium"))


def test_non_finite_weights_end_an_equilibrium_in_an_error_and_leave_the_model_usable():
    model = encoder()
    plain = last(model)
    weight = model.encoder.layer[1].output.dense.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="the solve of the stack failed"):
        last(solve_depth(model, "equilibrium"))
    with pytest.raises(ArithmeticError, match="layer 1"):
        last(solve_depth(model, "theta"))
    weight.data[0, 0] = kept
    assert torch.equal(last(solve_depth(model, "euler")), plain)


@pytest.mark.parametrize("family", ["Bert", "DebertaV2", "Albert"])
@pytest.mark.parametrize("options", [dict(scheme="rk4"), dict(scheme="rk2", over="stack"), dict(scheme="equilibrium")])
def test_copies_and_pickles_are_solved_too_and_by_themselves(family, options):
    model = solve_depth(encoder(family), **options)
    gradients(model)  # what a backward pass leaves behind is copied, too
    found, solved, plain = depth_statistics(model), last(model), last(encoder(family))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert depth_statistics(other)["evaluations"] == found["evaluations"]
        assert torch.equal(last(other), solved)
        restore_depth(other)
        assert torch.equal(last(other), plain) and torch.equal(last(model), solved)


@families
def test_restored_without_a_trace(family):
    model, untouched = encoder(family), encoder(family)
    classes = [type(module) for module in model.modules()]
    for over in ("layer", "stack"):
        last(solve_depth(model, "rk4", over=over))
        restore_depth(model)
    restore_depth(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == untouched.config.to_dict()
    assert [sorted(vars(module)) for module in model.modules()] == [sorted(vars(m)) for m in untouched.modules()]
    assert not model._forward_hooks and not model._forward_pre_hooks and torch.equal(last(model), last(untouched))


@pytest.mark.parametrize("family, head", [("Bert", "ForMaskedLM"), ("Albert", "ForSequenceClassification")])
def test_saved_and_loaded_with_its_settings(tmp_path, family, head):
    model = encoder(family, head)
    inputs = dict(input_ids=TOKENS, attention_mask=REAL.long())
    plain = model(**inputs).logits
    solved = solve_depth(model, "rk4", steps=2, total_time=0.5)(**inputs).logits
    assert not torch.equal(solved, plain)
    model.save_pretrained(tmp_path)
    loaded = load_solved(tmp_path).eval()
    assert type(loaded) is type(model) and torch.equal(loaded(**inputs).logits, solved)
    assert loaded.config.solved_depth == dict(scheme="rk4", steps=2, total_time=0.5)
    alone = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(alone(**inputs).logits, plain)
    assert torch.equal(solve_depth(alone)(**inputs).logits, solved)
    unsolved = restore_depth(type(model).from_pretrained(tmp_path))
    assert "solved_depth" not in unsolved.config.to_dict()
    restore_depth(loaded).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="does not say how its depth is solved"):
        load_solved(tmp_path)


def test_an_encoder_named_by_hand(tmp_path):
    named = transformers.MPNetConfig(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    model = transformers.MPNetModel(named).eval()
    with pytest.raises(OptionError, match="layers='encoder.layer'"):
        solve_depth(model, "rk4")
    plain = last(model)
    assert torch.equal(last(solve_depth(model, "euler", layers="encoder.layer")), plain)
    assert not torch.allclose(last(solve_depth(model, "rk4", layers="encoder.layer")), plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(last(load_solved(tmp_path).eval()), last(model))
    assert torch.equal(last(restore_depth(model)), plain)


def test_a_layer_that_stands_in_the_list_twice_is_passed_twice():
    model = encoder()
    model.encoder.layer[2] = model.encoder.layer[0]
    plain = last(model)
    for over in ("layer", "stack"):
        assert torch.equal(last(solve_depth(model, "euler", over=over, layers="encoder.layer")), plain)


def test_layers_that_do_not_pass_their_state_straight_on_are_no_stack():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.layer:
                x = 2 * layer(x)
            return x

    model, x = Scaled(), torch.ones(1, 2, 4)
    plain = model(x)
    assert torch.equal(solve_depth(model, "euler", layers="layer")(x), plain)
    with pytest.raises(OptionError, match="something of its own between its layers"):
        solve_depth(model, "euler", layers="layer", over="stack")(x)


def test_the_states_of_a_solve_over_the_stack():
    model = encoder()
    x = states(model)[0]
    solved = states(solve_depth(model, "rk2", over="stack", steps=4))
    assert len(solved) == 5 and torch.equal(solved[0], x) and torch.equal(solved[-1], last(model))
    with pytest.raises(OptionError, match="return_dict"):
        states(model, return_dict=False)
    assert len(model(TOKENS, return_dict=False)) == 2


def test_attention_maps_of_one_evaluation_only():
    model = encoder(attn_implementation="eager")
    assert len(solve_depth(model, "euler")(TOKENS, output_attentions=True).attentions) == 3
    for name in ("Bert", "DebertaV2"):
        model = solve_depth(encoder(name), "rk4")
        with pytest.raises(OptionError, match="restore_depth first"):
            model(TOKENS, output_attentions=True)
        last(model)


def test_masks_that_do_not_say_which_tokens_are_real():
    model, mask = encoder(), torch.ones(2, 7, 7, dtype=torch.long)[:, None].bool()
    solve_depth(model, "rk4")(TOKENS, attention_mask=mask)
    with pytest.raises(OptionError, match="give it as"):
        solve_depth(model, "equilibrium")(TOKENS, attention_mask=mask)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(scheme="rk5"), "unknown scheme 'rk5'"),
        (dict(scheme="rk4", steps=0), "at least 1"),
        (dict(scheme="rk4", steps=2.5), "whole number"),
        (dict(scheme="rk4", total_time=float("nan")), "not positive and finite"),
        (dict(scheme="rk4", total_time="1"), "total_time: '1' is not a number"),
        (dict(scheme="bosh3", tolerance="x"), "tolerance: 'x' is not a number"),
        (dict(scheme="equilibrium", max_iter="9"), "max_iter: '9' is not a whole number"),
        (dict(scheme="rk4", layers=3), "layers: 3 is not a name"),
        (dict(scheme="rk4", gain=2.0), "gain: 2.0 would have no effect on rk4"),
        (dict(scheme="equilibrium", steps=2), "steps: 2 would have no effect"),
        (dict(scheme="bosh3", tolerance=1e-3, steps=2), "with a `tolerance`"),
        (dict(scheme="rk4", tolerance=1e-3), "no embedded error estimate"),
        (dict(scheme="implicit-midpoint", theta=0.5), "theta: 0.5 would have no effect"),
        (dict(scheme="theta", theta=2.0), "outside"),
        (dict(scheme="rk4", gradient="ift"), "gradient: 'ift' is unknown"),
        (dict(scheme="equilibrium", gradient="reversible"), "must be told all"),
        (dict(scheme="equilibrium", gradient="checkpoint-step"), "is unknown"),
        (dict(scheme="equilibrium", gain=float("inf")), "not finite"),
        (dict(scheme="rk4", over="group"), "'group' is unknown"),
        (dict(scheme="rk4", stpes=2), "'stpes' is unknown"),
        (dict(steps=2), "say which one steps belongs to"),
        (dict(scheme="rk4", layers="encoder"), "no list of layers"),
        (dict(), "name one"),
    ],
)
def test_refused_options(options, sentence):
    model = encoder()
    plain = last(model)
    with pytest.raises(OptionError, match=sentence):
        solve_depth(model, **options)
    assert torch.equal(last(model), plain) and "solved_depth" not in model.config.to_dict()


def test_refused_models():
    with pytest.raises(OptionError, match="is a decoder"):
        solve_depth(encoder("Bert", is_decoder=True), "rk4")
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(configuration("Bert"), configuration("Bert"))
    with pytest.raises(OptionError, match="encoder-decoder"):
        solve_depth(transformers.EncoderDecoderModel(both), "rk4")
    with pytest.raises(OptionError, match="holds 2 encoders"):
        solve_depth(torch.nn.ModuleList([encoder(), encoder()]), "rk4")
    gpt = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=30, n_positions=24)
    model = solve_depth(transformers.GPT2Model(gpt).eval(), "rk4", layers="h")
    with pytest.raises(OptionError, match="past_key_values"):
        model(TOKENS)
    assert model(TOKENS, use_cache=False).last_hidden_state.isfinite().all()
    with pytest.raises(OptionError, match="not solved"):
        depth_statistics(encoder())
    moved = encoder()
    moved.encoder.layer[0].forward = moved.encoder.layer[0].forward
    with pytest.raises(OptionError, match="was replaced"):
        solve_depth(moved, "rk4")


def test_half_precision_keeps_its_dtype_and_its_plain_model():
    model = encoder().bfloat16()
    plain = last(model)
    assert torch.equal(last(solve_depth(model, "euler")), plain)
    for options in (
        dict(scheme="rk4"),
        dict(scheme="theta"),
        dict(scheme="equilibrium"),
        dict(scheme="heun2", steps=3),
    ):
        solved = last(solve_depth(model, **options))
        assert solved.dtype is torch.bfloat16 and solved.isfinite().all()
