"""The equilibrium as a depth: cell, padding, dropout, statistics, penalties, start-up check, precision."""

import copy
import logging
import math

import pytest
import torch

from fairseq_implicit.depth.equilibrium import EquilibriumConfig, EquilibriumDepth, NonConvergentCellError
from fairseq_implicit.depth.schedule import PhaseConfig
from fairseq_implicit.fields.equilibrium_cell import CellConfig, EquilibriumCell
from fairseq_implicit.fields.injection import InjectionConfig
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.transformer import TransformerFieldConfig
from fairseq_implicit.layout import Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig, solve
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.names import parse_gradient
from fairseq_implicit.solvers.gradients.reversible_iteration import ReversibleIteration
from fairseq_implicit.solvers.gradients.unrolled import Unrolled
from fairseq_implicit.solvers.jacobian import spectral_radius

DIM = 16
SHARP = FixedPointConfig("anderson", 100, 1e-12)


def layer(kind="post-norm", **options):
    return TransformerFieldConfig(**{**dict(dim=DIM, ffn_dim=32, mixer=AttentionConfig(4), kind=kind), **options})


def cell(kind="post-norm", layers=1, noise=None, **options):
    return CellConfig(layer(kind, **(noise or {})), layers, **options)


def depth(seed=0, double=True, **options):
    torch.manual_seed(seed)
    options.setdefault("cell", cell())
    options.setdefault("solver", SHARP)
    options.setdefault("gradient", Implicit(adjoint=SHARP))
    module = EquilibriumDepth(EquilibriumConfig(**options))
    return module.double() if double else module


def embedding(batch=3, time=7, seed=5, dim=DIM):
    return torch.randn(batch, time, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 2 + [True] * 5])
LAYOUT = Layout(~PADDING)
KINDS = [("post-norm", 1), ("post-norm", 3), ("pre-norm", 1), ("pre-norm", 3)]


@pytest.mark.parametrize("kind, layers", KINDS)
@pytest.mark.parametrize("qkv", [False, True])
def test_the_state_is_a_fixed_point_of_the_cell(kind, layers, qkv):
    module = depth(cell=cell(kind, layers, injection=InjectionConfig(qkv=qkv))).eval()
    x = embedding()
    with torch.no_grad():
        out = module(x)
        again = module.cell.prepare(x)(out.state)
    assert float(out.statistics["converged_share"]) == 1.0
    assert torch.allclose(again, out.state, atol=1e-9)


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
def test_small_weights_contract_like_one_over_one_plus_the_gain(kind):
    for gain in (0.3, 1.0, 2.0):
        torch.manual_seed(0)
        small = EquilibriumCell(cell(kind, injection=InjectionConfig(gain=gain), initial_std=1e-4)).double()
        f, x = small.prepare(embedding()), embedding()
        with torch.no_grad():
            point = solve(f, torch.zeros_like(x), FixedPointConfig("anderson", 200, 1e-12)).state
        radius = spectral_radius(f, point, 40).mean().item()
        assert radius == pytest.approx(1 / (1 + gain), rel=0.02)


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
def test_a_cell_that_starts_as_its_injection_contracts_whatever_the_scale_of_its_weights(kind):
    torch.manual_seed(0)
    start = EquilibriumCell(cell(kind, injection=InjectionConfig(gain=0.5), initial_std=1.0, start="identity"))
    f, x = start.double().prepare(embedding()), embedding()
    with torch.no_grad():
        result = solve(f, torch.zeros_like(x), FixedPointConfig("anderson", 50, 1e-12))
    assert result.converged.all()
    assert spectral_radius(f, result.state, 40).mean().item() == pytest.approx(1 / 1.5, rel=1e-3)


def test_a_map_without_its_final_norm_has_spectral_radius_one():
    torch.manual_seed(0)
    bare = EquilibriumCell(cell("pre-norm", final_norm=False, initial_std=1e-4)).double()
    x = embedding()
    assert spectral_radius(bare.prepare(x), x, 40).mean().item() == pytest.approx(1.0, abs=1e-3)
    with torch.no_grad():
        result = solve(bare.prepare(x), torch.zeros_like(x), FixedPointConfig("picard", 60, 1e-3))
    assert not result.converged.any()


@pytest.mark.parametrize("method", METHODS)
def test_base_size_converges_within_twelve_evaluations_at_initialisation(method):
    torch.manual_seed(0)
    base = EquilibriumCell(CellConfig(TransformerFieldConfig(768, 3072, AttentionConfig(12), "post-norm")))
    x = torch.nn.functional.layer_norm(torch.randn(1, 32, 768), (768,))
    with torch.no_grad():
        result = solve(base.prepare(x), torch.zeros_like(x), FixedPointConfig(method, 12, 1e-3))
    assert result.converged.all(), result.sentence()


def test_widening_the_feed_forward_network_keeps_the_contraction():
    found = []
    for ffn_dim in (32, 512):
        torch.manual_seed(0)
        wide = EquilibriumCell(cell(noise=dict(ffn_dim=ffn_dim), initial_std=0.1)).double()
        x = embedding()
        with torch.no_grad():
            point = solve(wide.prepare(x), torch.zeros_like(x), FixedPointConfig("anderson", 200, 1e-10)).state
        found.append(spectral_radius(wide.prepare(x), point, 40).mean().item())
    assert found[1] == pytest.approx(found[0], rel=0.15)


@pytest.mark.parametrize("kind, layers", KINDS)
@pytest.mark.parametrize("extra", [dict(), dict(prelude_layers=1, coda_layers=1)])
def test_padding_and_batch_mates_change_no_answer(kind, layers, extra):
    module = depth(cell=cell(kind, layers), **extra).eval()
    x = LAYOUT.keep(embedding())
    with torch.no_grad():
        together = module(x, LAYOUT).state
        assert together[PADDING].eq(0).all()
        for row in range(3):
            length = int((~PADDING[row]).sum())
            alone = module(x[row : row + 1, :length]).state
            assert torch.allclose(together[row, :length], alone[0], atol=1e-10)


@pytest.mark.parametrize("name", ["ift", "neumann-4", "phantom-4", "jfb", "bptt-4", "reversible"])
def test_every_gradient_reaches_every_parameter_and_the_input(name):
    module = depth(
        gradient=parse_gradient(name, adjoint=SHARP),
        solver=FixedPointConfig("anderson", 16, 1e-8),
        cell=cell(injection=InjectionConfig(qkv=True)),
        prelude_layers=1,
        coda_layers=1,
        allow_nonconvergent=True,
    ).train()
    x = LAYOUT.keep(embedding()).requires_grad_()
    out = module(x, LAYOUT)
    (out.state * embedding(seed=9)).sum().backward()
    for label, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label
    assert x.grad[~PADDING].ne(0).any() and x.grad[PADDING].eq(0).all()


@pytest.mark.parametrize("weight_norm", [False, True])
def test_exact_gradient_equals_a_long_unroll_through_the_real_cell(weight_norm):
    noise = dict(dropout=0.2, mixer=AttentionConfig(4, 0.2), activation_dropout=0.1)
    module = depth(cell=cell(noise=noise, weight_norm=weight_norm), gradient=Implicit(adjoint=SHARP)).train()
    target = embedding(seed=9)

    def grads(gradient):
        module.config = EquilibriumConfig(module.config.cell, SHARP, gradient=gradient)
        module.zero_grad()
        torch.manual_seed(11)
        (module(embedding(), LAYOUT).state * target).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])

    implicit, unrolled = grads(Implicit(adjoint=SHARP)), grads(Unrolled(120))
    assert (implicit - unrolled).norm() / unrolled.norm() < 1e-8


def test_all_dropout_is_shared_along_the_solve_and_fresh_for_the_next():
    noise = dict(dropout=0.3, mixer=AttentionConfig(4, 0.3), activation_dropout=0.3)
    module = depth(cell=cell(noise=noise)).train()
    x = embedding()
    one, other = module(x), module(x)
    assert float(one.statistics["converged_share"]) == 1.0
    assert not torch.allclose(one.state, other.state, atol=1e-3)
    f = module.cell.prepare(x)
    assert torch.equal(f(x), f(x))


def test_independent_dropout_is_refused_because_it_has_no_fixed_point():
    with pytest.raises(OptionError, match="attention dropout with a new mask") as caught:
        depth(cell=cell(noise=dict(mixer=AttentionConfig(4, 0.1), dropout_policy="independent")))
    assert caught.value.option == "stage_dropout"
    depth(cell=cell(noise=dict(dropout_policy="independent")))
    depth(cell=cell(noise=dict(dropout=0.1, dropout_policy="independent")), gradient=Unrolled(3))


@pytest.mark.parametrize("weight_norm", [False, True])
def test_weight_norm_is_exact_loads_copies_and_keeps_the_initial_scale(weight_norm):
    module = depth(cell=cell(weight_norm=weight_norm)).eval()
    weight = module.cell.layers[0].attention.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    twin = depth(seed=1, cell=cell(weight_norm=weight_norm)).eval()
    twin.load_state_dict(module.state_dict())
    x = embedding()
    assert torch.equal(twin(x).state, module(x).state)
    assert torch.equal(copy.deepcopy(module)(x).state, module(x).state)


def test_compaction_gives_the_same_answer_and_steps_aside_for_dropout():
    # A long padded batch: rows of different length settle at different times.
    x = LAYOUT.keep(embedding()) * torch.tensor([1.0, 0.02, 5.0])[:, None, None]
    compact = FixedPointConfig("anderson", 100, 1e-12, compact=True)
    plain, packed = depth(), depth(solver=compact)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x, LAYOUT).state, packed.eval()(x, LAYOUT).state, atol=1e-10)
    noisy = depth(cell=cell(noise=dict(dropout=0.1)), solver=compact).train()
    assert float(noisy(x, LAYOUT).statistics["converged_share"]) == 1.0


def test_explicit_and_tied_baselines_are_the_written_out_loops():
    x = embedding()
    explicit = depth(cell=cell("pre-norm", 3, final_norm=False), gradient=Unrolled(1)).eval()
    f = explicit.cell.prepare(x)
    assert torch.equal(explicit(x).state, explicit.output_norm(f(torch.zeros_like(x))))
    tied = depth(gradient=Unrolled(4), initial_state="input").eval()
    f, z = tied.cell.prepare(x), x
    for _ in range(4):
        z = f(z)
    assert torch.equal(tied(x).state, z)


def test_hidden_states_start_with_the_input_and_follow_the_depth():
    module = depth(prelude_layers=1, coda_layers=2).eval()
    x = embedding()
    out = module(x, return_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], x) and torch.equal(out.hidden_states[-1], out.state)
    assert module(x).hidden_states is None


def test_statistics_have_the_same_names_in_every_phase_and_mode():
    phases = PhaseConfig(warmup_updates=2, phantom_updates=2, jacobian_weight=0.1, jacobian_frequency=0.5)
    module = depth(phases=phases, correction=(2, 4))
    names, penalties = set(), set()
    for update in range(8):
        module.train().updates.set_num_updates(update)
        out = module(embedding())
        out.state.sum().backward()
        names.add(tuple(out.statistics))
        penalties.add(tuple(out.penalties))
    out = module.eval()(embedding())
    assert names == {tuple(out.statistics)} and penalties == {tuple(out.penalties)}
    assert all(math.isfinite(float(value)) for value in out.statistics.values())


def test_the_phases_follow_the_update_number_and_evaluation_uses_the_full_solve():
    module = depth(phases=PhaseConfig(warmup_updates=2, warmup_steps=3))
    module.train().updates.set_num_updates(1)
    assert float(module(embedding()).statistics["evaluations"]) == 3
    module.eval()
    assert float(module(embedding()).statistics["converged_share"]) == 1.0
    module.train().updates.set_num_updates(2)
    assert float(module(embedding()).statistics["evaluations"]) > 5


def test_backward_statistics_are_those_of_the_previous_pass():
    module = depth().train()
    first = module(embedding())
    assert float(first.statistics["evaluations_backward"]) == 0
    (first.state * embedding(seed=9)).sum().backward()
    second = module(embedding())
    assert float(second.statistics["evaluations_backward"]) > 4
    assert 0 < float(second.statistics["adjoint_residual"]) < 1e-12
    assert float(second.statistics["evaluations_backward_max"]) >= float(second.statistics["evaluations_backward_p95"])


def test_the_monitor_measures_at_its_interval_and_leaves_training_alone():
    noise = dict(dropout=0.1, mixer=AttentionConfig(4, 0.1))

    def run(interval):
        module = depth(cell=cell(noise=noise), monitor_interval=interval).train()
        module.checked = True
        torch.manual_seed(3)
        states, radii = [], []
        for update in range(1, 5):
            module.updates.set_num_updates(update)
            out = module(embedding())
            states.append(out.state.detach())
            radii.append(float(out.statistics["spectral_radius"]))
        return states, radii

    silent, measured = run(0), run(2)
    assert all(torch.equal(one, other) for one, other in zip(silent[0], measured[0], strict=True))
    assert silent[1] == [0.0] * 4
    assert measured[1][0] == 0.0 and 0.3 < measured[1][1] < 0.8 and measured[1][2] == measured[1][1]


@pytest.mark.parametrize("estimator", ["finite-difference", "double-backward"])
def test_the_jacobian_penalty_trains_the_cell_to_contract(estimator):
    phases = PhaseConfig(jacobian_weight=1.0)
    module = depth(phases=phases, jacobian_estimator=estimator, solver=FixedPointConfig("anderson", 40, 1e-8)).train()
    optimiser = torch.optim.Adam(module.parameters(), 0.02)
    found = []
    for _ in range(12):
        optimiser.zero_grad()
        penalty = module(embedding()).penalties["jacobian_penalty"]
        penalty.backward()
        optimiser.step()
        found.append(penalty.item())
    assert found[-1] < 0.7 * found[0]


def test_correction_returns_tracked_iterates_with_decaying_weights():
    module = depth(correction=(2, 4), correction_weight=0.5, correction_decay=0.8).train()
    x = embedding()
    out = module(x)
    assert [weight for weight, _ in out.auxiliary_states] == pytest.approx([0.4, 0.5])
    errors = [(state - out.state).norm().item() for _, state in out.auxiliary_states]
    assert errors[0] > errors[1] > 0
    module.zero_grad()
    out.auxiliary_states[0][1].square().mul(embedding(seed=9)).sum().backward()
    assert module.cell.layers[0].feed_forward.fc1.weight.grad.ne(0).any()
    assert module.eval()(x).auxiliary_states == []


def test_a_cell_that_does_not_converge_is_refused_at_update_zero(caplog):
    options = dict(
        cell=cell(injection=InjectionConfig(gain=0.05), initial_std=0.2), solver=FixedPointConfig("picard", 12, 1e-4)
    )
    module = depth(**options).train()
    with pytest.raises(
        NonConvergentCellError,
        match=r"allow_nonconvergent: the cell does not converge.*`injection_gain`.*set this to train it",
    ):
        module(embedding())
    with caplog.at_level(logging.WARNING):
        allowed = depth(allow_nonconvergent=True, **options).train()
        allowed(embedding())
    assert "mean residual" in caplog.text
    resumed = depth(**options).train()
    resumed.updates.set_num_updates(5)
    resumed(embedding())


def test_a_cell_with_projected_injection_alone_is_told_why():
    alone = cell(injection=InjectionConfig(residual=False, qkv=True))
    with pytest.raises(NonConvergentCellError, match="spectral radius 1.00.*`injection` residual"):
        depth(cell=alone, solver=FixedPointConfig("anderson", 12, 1e-4)).train()(embedding())


def test_a_contracting_cell_short_of_budget_is_told_to_raise_it():
    module = depth(solver=FixedPointConfig("picard", 3, 1e-6)).train()
    with pytest.raises(NonConvergentCellError, match="raise `max_iter`"):
        module(embedding())


def test_the_start_up_check_prints_its_numbers_once(caplog):
    module = depth().train()
    with caplog.at_level(logging.INFO):
        module(embedding())
        module(embedding())
    lines = [record.message for record in caplog.records if "at update 0" in record.message]
    assert len(lines) == 1
    assert "spectral radius 0.5" in lines[0] and "100 % of the samples" in lines[0]


def test_recomputation_gives_the_same_gradient_and_is_refused_with_ift():
    def grads(recompute):
        noise = dict(dropout=0.1, mixer=AttentionConfig(4, 0.1))
        module = depth(cell=cell(noise=noise), gradient=parse_gradient("phantom-3"), recompute=recompute).train()
        torch.manual_seed(2)
        (module(embedding()).state * embedding(seed=9)).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])

    assert torch.equal(grads(True), grads(False))
    with pytest.raises(OptionError) as caught:
        depth(recompute=True)
    assert caught.value.option == "checkpoint_activations"


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
def test_bfloat16_autocast_trains_close_to_float32(kind):
    def grads(autocast):
        module = depth(double=False, cell=cell(kind), solver=FixedPointConfig(), gradient=Implicit()).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = module(embedding().float(), LAYOUT)
        assert float(out.statistics["converged_share"]) == 1.0
        (out.state.float() * embedding(seed=9).float()).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])

    assert torch.nn.functional.cosine_similarity(grads(True), grads(False), dim=0) > 0.99


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(solver=FixedPointConfig(tol=1e-3), gradient=Implicit()), "^tol: 0.001 lies below"),
        (
            dict(solver=FixedPointConfig(), gradient=Implicit(adjoint=FixedPointConfig(tol=1e-4))),
            "^adjoint_tol: 0.0001 lies below",
        ),
        (dict(solver=FixedPointConfig("broyden", memory=1e-4), gradient=Implicit()), "^memory: one Broyden"),
    ],
)
def test_what_does_not_suit_the_precision_or_the_batch_names_its_option(options, match):
    with pytest.raises(ValueError, match=match):
        depth(double=False, **options).train().bfloat16()(embedding().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_converge(dtype):
    module = depth(double=False, solver=FixedPointConfig(), gradient=Implicit()).to(dtype).train()
    out = module(embedding().to(dtype), LAYOUT)
    assert out.state.dtype is dtype and float(out.statistics["converged_share"]) == 1.0
    out.state.float().square().mul(embedding(seed=9).float()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_the_gain_starts_where_asked_and_stays_above_its_floor():
    module = depth(cell=cell(injection=InjectionConfig(gain=1.5, gain_floor=0.5)))
    assert module.cell.injection.gain.item() == pytest.approx(1.5, rel=1e-6)
    with torch.no_grad():
        module.cell.injection.raw_gain.fill_(-30.0)
    assert module.cell.injection.gain.item() == pytest.approx(0.5, abs=1e-9)
    module.cell.injection.raw_gain.data.fill_(-3.0)
    module.cell.injection.gain.backward()
    assert module.cell.injection.raw_gain.grad > 0


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: InjectionConfig(gain=0.5, gain_floor=0.5), "start above its floor"),
        (lambda: InjectionConfig(gain=math.inf), "finite"),
        (lambda: cell("parallel"), "one of post-norm, pre-norm"),
        (lambda: cell(layers=0), "at least 1"),
        (lambda: cell(final_norm=False), "cannot be left out"),
        (lambda: cell(noise=dict(drop_path=0.1)), "no equilibrium"),
        (lambda: EquilibriumConfig(cell("pre-norm", final_norm=False)), "spectral radius 1"),
        (lambda: EquilibriumConfig(cell(injection=InjectionConfig(residual=False))), "nothing of the input"),
        (lambda: EquilibriumConfig(cell(), initial_state="random"), "initial_state"),
        (lambda: EquilibriumConfig(cell(), prelude_layers=-1), "negative"),
        (lambda: EquilibriumConfig(cell(), correction=(40,)), "outside the budget"),
        (lambda: EquilibriumConfig(cell(), correction=(5, 3)), "must rise"),
        (lambda: EquilibriumConfig(cell(), correction=(5,), correction_decay=0.0), "decay"),
        (lambda: EquilibriumConfig(cell(), jacobian_estimator="trace"), "jacobian_estimator"),
        (lambda: EquilibriumConfig(cell(), jacobian_probes=0), "jacobian_probes"),
        (
            lambda: EquilibriumConfig(cell(), gradient=ReversibleIteration(damping=0.5), correction=(2,)),
            "keeps no iterates",
        ),
    ],
)
def test_impossible_configurations_are_refused_in_a_sentence(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("training", [True, False])
def test_a_cell_that_returns_non_finite_values_is_an_error(training):
    module = depth(solver=FixedPointConfig("anderson", 20, 1e-6), monitor_interval=0)
    module.updates.set_num_updates(5)
    with torch.no_grad():
        module.cell.layers[0].feed_forward.fc1.weight[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match="the equilibrium failed .*finite numbers.* has diverged"):
        module.train(training)(embedding())


@pytest.mark.parametrize("name", ["ift", "reversible"])
@pytest.mark.parametrize("qkv", [False, True])
def test_a_depth_applied_twice_in_series_has_the_gradient_of_both_passes(name, qkv):
    solver = FixedPointConfig("anderson", 60, 1e-12) if name == "reversible" else SHARP

    def grads(gradient, solver):
        module = depth(cell=cell(injection=InjectionConfig(qkv=qkv)), gradient=gradient, solver=solver)
        x = embedding().requires_grad_()
        (module.eval()(module(x).state).state * embedding(seed=9)).sum().backward()
        return torch.cat([x.grad.flatten(), *(parameter.grad.flatten() for parameter in module.parameters())])

    ours = grads(parse_gradient(name, adjoint=SHARP), solver)
    unrolled = grads(parse_gradient("bptt-60"), SHARP)
    assert (ours - unrolled).norm() / unrolled.norm() < 1e-4, "what 60 evaluations leave; a way counted twice is half"


def test_a_wrong_reversible_gradient_is_warned_of(caplog):
    gradient = ReversibleIteration(damping=0.5)
    hard = cell(injection=InjectionConfig(gain=0.1))
    sloppy = depth(cell=hard, gradient=gradient, solver=FixedPointConfig(max_iter=60))
    sound = depth(gradient=gradient, solver=FixedPointConfig(max_iter=30))
    for module in (sound, sloppy):
        caplog.clear()
        for update in range(3):
            module.updates.set_num_updates(update)
            out = module.train()(embedding())
            (out.state * embedding(seed=9)).sum().backward()
        found = [record.getMessage() for record in caplog.records if "reversible" in record.getMessage()]
        wrong = float(out.statistics["adjoint_residual"])
        if module is sound:
            assert 0 < wrong < 1e-6 and not found
        else:
            assert wrong > 0.01 and len(found) == 1 and found[0].startswith("update 1: the reversible iteration")


def test_a_reversible_budget_that_cannot_be_inverted_names_its_option():
    gradient = ReversibleIteration(damping=0.9)
    module = depth(gradient=gradient, solver=FixedPointConfig(max_iter=40), phases=PhaseConfig(warmup_updates=5))
    with pytest.raises(ValueError, match="max_iter: 40 evaluations .* damping 0.9 cannot be inverted"):
        module.train()(embedding())
    assert module.eval()(embedding()).state.isfinite().all()


@pytest.mark.parametrize("kind, layers", KINDS)
def test_the_double_backward_penalty_has_finite_gradients_in_float16_beside_padding(kind, layers):
    phases = PhaseConfig(jacobian_weight=1.0)
    module = depth(
        cell=cell(kind, layers), double=False, solver=FixedPointConfig(), gradient=Implicit(), phases=phases,
        jacobian_estimator="double-backward", monitor_interval=0,
    ).half()  # fmt: skip
    module.updates.set_num_updates(1)
    x = LAYOUT.keep(embedding().half()).requires_grad_()
    penalty = module.train()(x, LAYOUT).penalties["jacobian_penalty"]
    penalty.backward()
    assert 0 < penalty < 10 and x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
