"""Continuous depth: time-conditioned fields, the solve of the whole depth, its gradients and penalties."""

import copy

import pytest
import torch

from fairseq_implicit.depth.continuous import ContinuousDepth
from fairseq_implicit.depth.random_steps import RandomSteps
from fairseq_implicit.depth.stack import BlockStack, StackConfig
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.time_conditioned import DepthEmbeddedField, InterpolatedField
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from tests.depth.configs import continuous_config

DIM = 16


def shape(dropout=0.0, kind="pre-norm"):
    return TransformerFieldConfig(
        DIM, 2 * DIM, AttentionConfig(2, dropout), kind, dropout=dropout, activation_dropout=dropout
    )


def embedded(duration=3.0, dropout=0.0, kind="pre-norm", strength=0.3):
    """A field whose norms really move with the time, in float64."""
    torch.manual_seed(0)
    field = DepthEmbeddedField(shape(dropout, kind), duration).double()
    with torch.no_grad():
        field.depth_embedding.coefficients.weight.normal_(std=strength)
    return field


def interpolated(knots=3, duration=3.0, interpolation="linear", kind="pre-norm", dropout=0.0):
    torch.manual_seed(0)
    return InterpolatedField(shape(dropout, kind), duration, knots, interpolation).double()


def states(batch=3, time=5):
    torch.manual_seed(1)
    return torch.randn(batch, time, DIM, dtype=torch.float64)


def depth(field, **settings):
    settings = {"tolerance": 1e-6, "max_evaluations": 5000, **settings}
    return ContinuousDepth(continuous_config(DIM, 3.0, **settings), field).double()


@pytest.mark.parametrize("kind", ("pre-norm", "parallel"))
def test_depth_embedding_starts_as_the_autonomous_field(kind):
    torch.manual_seed(0)
    field = DepthEmbeddedField(shape(kind=kind), 3.0).double().eval()
    plain = TransformerField(shape(kind=kind)).double().eval()
    plain.load_state_dict({k: v for k, v in field.state_dict().items() if not k.startswith("depth_embedding")})
    y = states()
    for t in (0.0, 1.7):
        torch.testing.assert_close(field.prepare(y)(t, y), plain.prepare(y)(t, y), rtol=0, atol=1e-14)


def test_depth_embedding_moves_by_a_few_learning_rates_per_update():
    """All tokens share its inputs, so an optimiser such as Adam moves all its weights in step: the norms must not run
    away, and their speed in time must not grow with the frequency."""
    embedding = DepthEmbeddedField(shape(), 3.0).double().depth_embedding
    with torch.no_grad():
        embedding.coefficients.weight.fill_(1.0)
        times = torch.linspace(0, 3, 301, dtype=torch.float64)
        moved = embedding(times, embedding.coefficients.weight)
    assert moved.abs().max() < 4
    assert (moved.diff(dim=0) / 0.01).abs().max() < 2 * 8 * torch.pi / 3


@pytest.mark.parametrize("kind", ("pre-norm", "parallel"))
def test_depth_embedding_takes_one_time_per_sample(kind):
    field = embedded(kind=kind).eval()
    y = states()
    f = field.prepare(y)
    times = torch.tensor([0.0, 1.3, 2.9], dtype=torch.float64)
    together = f(times, y)
    for row, t in enumerate(times.tolist()):
        torch.testing.assert_close(together[row], f(t, y)[row], rtol=0, atol=1e-12)
    assert (f(0.0, y) - f(1.3, y)).abs().max() > 1e-2
    torch.testing.assert_close(f(1.3, y), f(torch.tensor(1.3, dtype=torch.float64), y), rtol=0, atol=1e-12)


def test_depth_embedding_refuses_fields_without_free_norms():
    with pytest.raises(ValueError, match="not of a post-norm one.*`depth_weights` linear"):
        DepthEmbeddedField(shape(kind="post-norm"), 3.0)


@pytest.mark.parametrize("kind", ("pre-norm", "post-norm", "macaron"))
@pytest.mark.parametrize("interpolation", ("linear", "constant"))
def test_knots_under_unit_euler_steps_are_the_ordinary_model(kind, interpolation):
    """With as many knots as layers, bit for bit for increments."""
    continuous = depth(
        interpolated(kind=kind, interpolation=interpolation), scheme="euler", tolerance=0.0, steps=3
    ).eval()
    stack = BlockStack(StackConfig(3, DIM, final_norm=True), lambda layer: TransformerField(shape(kind=kind)))
    stack.double().eval()
    for block, knot in zip(stack.fields, continuous.field.knots, strict=True):
        block.load_state_dict(knot.state_dict())
    y = states()
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None]
    ours, theirs = continuous(y, Layout(~padding)), stack(y, Layout(~padding))
    torch.testing.assert_close(ours.state, theirs.state, rtol=0, atol=0 if kind != "post-norm" else 1e-13)


def test_weights_between_knots():
    field = interpolated(knots=3, duration=6.0)
    name = "attention.qkv.weight"
    knots = [dict(knot.named_parameters())[name] for knot in field.knots]
    for t, expected in ((0.0, knots[0]), (2.0, knots[1]), (1.0, (knots[0] + knots[1]) / 2), (5.9, knots[2])):
        torch.testing.assert_close(field.weights(t)[name], expected)
    assert field.weights(0.1 + 0.2 + 1.7)[name] is knots[1], "a knot missed by rounding is still the knot"
    constant = interpolated(knots=3, duration=6.0, interpolation="constant")
    assert constant.position(3.9) == (1, 0.0)


def test_interpolated_field_reaches_the_gradients_of_both_knots():
    field = interpolated()
    y = states()
    field.prepare(y)(1.25, y).square().sum().backward()
    reached = [knot.attention.qkv.weight.grad is not None for knot in field.knots]
    assert reached == [False, True, True]
    ratio = field.knots[2].attention.qkv.weight.grad / field.knots[1].attention.qkv.weight.grad
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25 / 0.75))


@pytest.mark.parametrize("interpolation", ("linear", "constant"))
def test_interpolated_field_takes_one_time_per_sample_in_evaluation(interpolation):
    field = interpolated(interpolation=interpolation).eval()
    y = torch.cat([states(), states()[1:]])
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 4, 5, 1])[:, None]
    f = field.prepare(y, Layout(~padding))
    times = torch.tensor([0.25, 2.5, 1.0, 0.25, 3.0], dtype=torch.float64)
    together = f(times, y)
    assert not together[padding].any()
    for row, t in enumerate(times.tolist()):
        torch.testing.assert_close(together[row], f(t, y)[row], rtol=0, atol=1e-12)


def test_interpolated_field_needs_one_time_in_training():
    y = states()
    with pytest.raises(ValueError, match="step_control: .*use batch"):
        interpolated().prepare(y)(torch.tensor([0.0, 1.0, 2.0]), y)
    with pytest.raises(ValueError, match="need one for the batch in training"):
        depth(interpolated(), step_control="sample")


def test_step_control_follows_the_mode_unless_it_is_chosen():
    pytest.importorskip("torchdiffeq")
    for field, settings, training in (
        (embedded(), {}, "sample"),
        (interpolated(), {}, "batch"),
        (embedded(), {"backend": "torchdiffeq"}, "batch"),
    ):
        module = depth(field, **settings)
        assert module.step_control == training and module.eval().step_control == "sample"
        assert depth(field, **settings, step_control="batch").eval().step_control == "batch"


@pytest.mark.parametrize("interpolation", ("linear", "constant"))
def test_pieces_are_the_field_from_knot_to_knot(interpolation):
    field = interpolated(interpolation=interpolation).eval()
    y = states()
    f = field.prepare(y)
    pieces = f.pieces(3.0)
    assert [piece.end for piece in pieces] == [1.0, 2.0, 3.0]
    for start, piece in enumerate(pieces):
        for t in (start, start + 0.3):
            assert torch.equal(piece.field(float(t), y), f(float(t), y))
        before = start if interpolation == "constant" else piece.end
        assert torch.equal(piece.field(piece.end, y), f(float(before), y)), "an end belongs to both of its pieces"
    assert all(piece.continues == (interpolation == "linear") for piece in pieces)
    assert len(embedded().prepare(y).pieces(3.0)) == 1


@pytest.mark.parametrize("gradient", ("autograd", "checkpoint-step", "adjoint", "torchdyn", "torchdiffeq"))
@pytest.mark.parametrize("interpolation", ("linear", "constant"))
def test_every_knot_is_trained_from_the_start(interpolation, gradient):
    """However loose the tolerance: weights that no step reads would get no gradient, and with DDP end the training."""
    settings = {"gradient": gradient}
    if gradient.startswith("torch"):
        pytest.importorskip("torchdyn.numerics" if gradient == "torchdyn" else gradient)
        settings = {"backend": gradient}
    field = interpolated(knots=9, interpolation=interpolation)
    module = depth(field, tolerance=0.5, **settings).train()
    module(states()).state.square().sum().backward()
    for knot, one in enumerate(field.knots):
        missing = [name for name, p in one.named_parameters() if p.grad is None or not p.grad.any()]
        # A key's bias has no influence in itself.
        assert not missing, (knot, missing)


@pytest.mark.parametrize("scheme", ("bosh3", "dopri5", "tsit5"))
@pytest.mark.parametrize("interpolation", ("linear", "constant"))
def test_knots_keep_the_tolerance_as_well_as_a_smooth_field(interpolation, scheme):
    field, y = interpolated(interpolation=interpolation).eval(), states()
    with torch.no_grad():
        for parameter in field.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        exact = depth(field, tolerance=0.0, scheme="rk4", steps=240, final_norm=False)(y).state
        for tolerance in (1e-3, 1e-5):
            found = depth(field, tolerance=tolerance, scheme=scheme, final_norm=False).eval()(y)
            assert (found.state - exact).abs().max() < 25 * tolerance
            assert found.statistics["steps"] >= 3


def test_fine_fixed_steps_do_not_step_over_a_jump():
    """A step that ends at a jump keeps the weights before it however small it is."""
    field, y = interpolated(interpolation="constant").eval(), states(1, 1)
    with torch.no_grad():
        reference = depth(field, tolerance=1e-9, scheme="dopri5", final_norm=False).eval()(y).state
        fine = depth(field, tolerance=0.0, scheme="heun2", steps=1050, final_norm=False)(y).state
    torch.testing.assert_close(fine, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", ({}, {"backend": "torchdyn"}, {"backend": "torchdiffeq"}))
@pytest.mark.parametrize("make", (embedded, interpolated, lambda: interpolated(interpolation="constant")))
def test_batch_mates_and_padding_change_no_answer_in_evaluation(make, settings):
    if settings:
        pytest.importorskip("torchdyn.numerics" if settings["backend"] == "torchdyn" else "torchdiffeq")
    field = make()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(2.0)
    module = depth(field, tolerance=1e-2, **settings).eval()
    y = states(batch=4) * torch.tensor([0.2, 1.0, 4.0, 1.0]).double().view(-1, 1, 1)
    lengths = (5, 2, 4, 0)
    padding = torch.arange(5)[None] >= torch.tensor(lengths)[:, None]
    y = y.masked_fill(padding.unsqueeze(-1), 0.0)
    with torch.no_grad():
        together = module(y[:3], Layout(~padding[:3])).state
        if settings:
            assert torch.equal(module(y, Layout(~padding)).state[:3], together), "a row of padding is no sample"
        for row, length in enumerate(lengths[:3]):
            alone = module(y[row : row + 1, :length]).state[0]
            torch.testing.assert_close(together[row, :length], alone, rtol=0, atol=1e-9)
        for_all = depth(field, tolerance=1e-2, step_control="batch", **settings).eval()
        shared = for_all(y[:3], Layout(~padding[:3])).state
    assert (shared - together).abs().max() > 1e-5, "one step for all is another answer, and stays to be asked for"


def test_first_step_is_one_layer():
    """Over the whole depth an error estimate of high order is far too small: 20 to 40 times the tolerance."""
    torch.manual_seed(0)
    field = DepthEmbeddedField(shape(), 12.0).double().eval()
    with torch.no_grad():
        for parameter in field.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        y = states()

        def solve(**settings):
            return ContinuousDepth(continuous_config(DIM, 12.0, final_norm=False, **settings), field).eval()(y).state

        exact = solve(tolerance=1e-9, max_evaluations=5000)
        for scheme in ("bosh3", "dopri5", "tsit5"):
            error = (solve(scheme=scheme, tolerance=1e-2) - exact).square().mean((1, 2)).sqrt().max()
            assert error < 4e-2
        whole = solve(scheme="dopri5", tolerance=1e-2, first_step=12.0)
        assert (whole - exact).square().mean((1, 2)).sqrt().max() > 1e-1, "as it was, for those who ask for it"


@pytest.mark.parametrize("make", (embedded, interpolated))
def test_every_gradient_agrees(make):
    """All modes, dropout on, padding present, weights that depend on time: relative to autograd in float64."""
    field = make(dropout=0.1)
    y = states()
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None]
    weight = torch.randn_like(y)

    tight = {"tolerance": 1e-6}
    settings = {
        "autograd": {**tight, "gradient": "autograd"},
        "checkpoint-step": {**tight, "gradient": "checkpoint-step"},
        "batch": {**tight, "step_control": "batch"},
        "adjoint": {**tight, "gradient": "adjoint"},
        "rk4": {"tolerance": 0.0, "scheme": "rk4", "steps": 24, "gradient": "autograd"},
        "rk4 checkpoint-step": {"tolerance": 0.0, "scheme": "rk4", "steps": 24, "gradient": "checkpoint-step"},
        "rk4 checkpoint-stage": {"tolerance": 0.0, "scheme": "rk4", "steps": 24, "gradient": "checkpoint-stage"},
    }
    gradients = {}
    for name, chosen in settings.items():
        module = depth(copy.deepcopy(field), **chosen).train()
        torch.manual_seed(5)
        x = y.clone().requires_grad_()
        (module(x, Layout(~padding)).state * weight).sum().backward()
        gradients[name] = torch.cat([x.grad.flatten()] + [p.grad.flatten() for p in module.field.parameters()])
    scale = gradients["autograd"].norm()
    for name, gradient in gradients.items():
        assert (gradient - gradients["autograd"]).norm() < 1e-4 * scale, name
    assert torch.equal(gradients["autograd"], gradients["checkpoint-step"])
    for name in ("rk4 checkpoint-step", "rk4 checkpoint-stage"):
        torch.testing.assert_close(gradients[name], gradients["rk4"], rtol=1e-12, atol=1e-13)


def test_reversible_depth_is_of_order_two():
    field = embedded().eval()
    y = states()
    exact = depth(field, tolerance=1e-9).eval()(y).state

    def error(steps):
        module = depth(field, scheme="reversible-heun", gradient="reversible", tolerance=0.0, steps=steps).eval()
        return (module(y).state - exact).norm().item()

    assert error(64) / error(128) == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize("backend", ("torchdyn", "torchdiffeq"))
def test_libraries_solve_the_time_conditioned_depth(backend):
    pytest.importorskip("torchdyn.numerics" if backend == "torchdyn" else "torchdiffeq")
    field, y = embedded().eval(), states()
    own = depth(field, tolerance=1e-7).eval()(y).state
    other = depth(field, tolerance=1e-7, backend=backend).eval()(y).state
    torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def test_torchdyn_adjoint_of_the_depth():
    pytest.importorskip("torchdyn.numerics")
    gradients = []
    for settings in ({"gradient": "autograd"}, {"gradient": "torchdyn-adjoint", "backend": "torchdyn"}):
        module, x = depth(embedded(), **settings).eval(), states().requires_grad_()
        output = module(x)
        output.state.square().sum().backward()
        gradients.append(torch.cat([x.grad.flatten()] + [p.grad.flatten() for p in module.field.parameters()]))
        assert output.statistics["steps"] > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    assert module(x).statistics["evaluations_backward"] > 0


def test_padding_and_batch_mates_do_not_change_a_sample():
    module = depth(embedded(), tolerance=1e-4).eval()
    y = states() * torch.tensor([0.2, 1.0, 4.0]).double().view(-1, 1, 1)
    lengths = (5, 2, 4)
    padding = torch.arange(5)[None] >= torch.tensor(lengths)[:, None]
    y = y.masked_fill(padding.unsqueeze(-1), 0.0)
    together = module(y, Layout(~padding))
    evaluations = []
    for row, length in enumerate(lengths):
        alone = module(y[row : row + 1, :length])
        torch.testing.assert_close(together.state[row, :length], alone.state[0], rtol=0, atol=1e-9)
        evaluations.append(float(alone.statistics["evaluations"]))
    assert len(set(evaluations)) > 1
    assert float(together.statistics["evaluations"]) == pytest.approx(sum(evaluations) / 3)
    assert float(together.statistics["evaluations_max"]) == max(evaluations)


def test_hidden_states_run_from_the_embedding_to_the_end():
    y = states()
    for settings in ({}, {"tolerance": 0.0, "scheme": "rk4", "steps": 4}):
        module = depth(embedded(), **settings).eval()
        output = module(y, return_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[0], y)
        torch.testing.assert_close(module.final_norm(output.hidden_states[-1]), output.state)
        assert len(output.hidden_states) == 5 if settings else len(output.hidden_states) > 2


def test_statistics_have_the_same_names_whatever_happens():
    names = set()
    for settings in ({}, {"tolerance": 0.0, "scheme": "rk4"}, {"gradient": "adjoint"}, {"max_evaluations": 8}):
        module = depth(embedded(), **settings)
        for mode in (True, False):
            names.add(frozenset(module.train(mode)(states()).statistics))
    assert len(names) == 1


@pytest.mark.parametrize("settings", ({}, {"tolerance": 0.0, "scheme": "rk4", "steps": 6}))
def test_penalties_fall_under_training_and_are_silent_in_evaluation(settings):
    weights = {"kinetic_energy": 1.0, "jacobian": 1.0}
    if not settings:
        weights["local_error"] = 1.0
    module = depth(embedded(), **{"tolerance": 1e-3, **settings}, **weights)
    y = states()
    with torch.no_grad():
        assert module.eval()(y).penalties == {}
    module.train()
    optimiser = torch.optim.SGD(module.field.parameters(), lr=0.01)
    seen = []
    for _ in range(6):
        torch.manual_seed(7)
        penalties = module(y).penalties
        assert set(penalties) == set(weights)
        seen.append({name: penalty.item() for name, penalty in penalties.items()})
        optimiser.zero_grad()
        sum(penalties.values()).backward()
        optimiser.step()
    assert sum(seen[-1].values()) < 0.8 * sum(seen[0].values())
    assert all(value > 0 for value in seen[0].values())


def test_kinetic_energy_of_fine_fixed_steps_is_that_of_the_adaptive_solve():
    field, y = embedded(), states()
    energies = [
        depth(field, kinetic_energy=1.0, **settings).eval()(y).penalties["kinetic_energy"].item()
        for settings in ({"tolerance": 1e-7}, {"tolerance": 0.0, "scheme": "rk4", "steps": 64})
    ]
    assert energies[0] == pytest.approx(energies[1], rel=5e-3)


def test_random_steps_depend_on_seed_and_update_alone():
    def draws(seed, updates):
        steps = RandomSteps((2, 6), seed)
        drawn = []
        for update in updates:
            steps.set_num_updates(update)
            drawn.append(steps.draw())
            torch.rand(3)
        return drawn

    first = draws(1, range(200))
    assert set(first) == {2, 3, 4, 5, 6}
    assert first == draws(1, range(200)) and first[100:] == draws(1, range(100, 200)) != draws(2, range(100, 200))
    with pytest.raises(ValueError, match="random_steps: 3,1"):
        RandomSteps((3, 1), 1)


def test_random_steps_act_in_training_only():
    module = depth(embedded(), tolerance=0.0, scheme="rk4", steps=5, random_steps=(1, 3))
    taken = set()
    for update in range(12):
        module.random_steps.set_num_updates(update)
        taken.add(module.train()(states()).statistics["steps"])
        assert module.eval()(states()).statistics["steps"] == 5
    assert taken == {1, 2, 3}


def test_limit_of_evaluations_is_counted_and_reported_once(caplog):
    module = depth(embedded(), max_evaluations=8).eval()
    assert module(states()).statistics["stopped"] == 1.0
    assert "raise max_evaluations" in caplog.text
    caplog.clear()
    module(states())
    assert not caplog.text


def test_non_finite_field_is_an_error():
    field = embedded()
    with torch.no_grad():
        field.attention.out.bias.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="at depth 0 of 3, failed .*finite numbers.*lower the learning rate"):
        depth(field)(states())
    reversible = depth(field, scheme="reversible-heun", gradient="reversible", tolerance=0.0, steps=3)
    for mode in (True, False):
        with torch.set_grad_enabled(mode), pytest.raises(ArithmeticError, match="finite numbers.*more steps"):
            reversible.train(mode)(states())


@pytest.mark.parametrize(
    "settings, sentence",
    (
        ({"duration": 0.0}, "duration: 0.0"),
        ({"tolerance": -1.0}, "tolerance: -1.0"),
        ({"scheme": "rk4"}, "'rk4' has no embedded error estimate.*or take fixed steps with `tolerance` 0"),
        ({"scheme": "rk5", "tolerance": 0.0}, "unknown scheme 'rk5'"),
        ({"scheme": "reversible-heun", "tolerance": 0.0}, "belong together"),
        ({"scheme": "rk4", "tolerance": 0.0, "gradient": "reversible"}, "belong together"),
        ({"scheme": "rk4", "tolerance": 0.0, "gradient": "adjoint"}, "is for adaptive solves"),
        ({"gradient": "checkpoint-stage"}, "takes fixed steps: set `tolerance` 0"),
        ({"gradient": "interpolated-adjoint"}, "is unknown"),
        ({"backend": "torchdiffeq", "scheme": "tsit5"}, "has no sound adaptive 'tsit5'"),
        ({"backend": "torchdyn", "scheme": "rk4", "tolerance": 0.0}, "is for adaptive solves"),
        ({"backend": "torchdyn", "gradient": "adjoint"}, "needs `backend` own"),
        ({"backend": "torchdyn", "step_control": "sample"}, "one step for all"),
        ({"gradient": "torchdyn-adjoint"}, "needs `backend` torchdyn"),
        ({"noise": True, "independent_noise": True}, "stage_dropout: independent .* use shared"),
        ({"random_steps": (1, 2)}, "random_steps: .*set `tolerance` 0"),
        ({"kinetic_energy": -1.0}, "kinetic_energy: -1.0"),
        ({"jacobian": 1.0, "gradient": "adjoint"}, "not that of the penalties"),
        ({"kinetic_energy": 1.0, "backend": "torchdyn"}, "backend: penalties along the depth need own"),
        ({"local_error": 1.0, "tolerance": 0.0, "scheme": "rk4"}, "needs the error estimate"),
        ({"steps": 0, "tolerance": 0.0, "scheme": "rk4"}, "steps: 0"),
        ({"max_evaluations": 3}, "at least 7"),
    ),
)
def test_impossible_combinations(settings, sentence):
    if settings.get("backend") == "torchdyn":
        pytest.importorskip("torchdyn.numerics")
    with pytest.raises(ValueError, match=sentence):
        continuous_config(**{"dim": DIM, "duration": 3.0, **settings})
