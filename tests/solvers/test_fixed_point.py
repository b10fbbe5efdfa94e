"""Fixed points: closed forms, independence of the samples, safeguards, precision, options."""

import math

import pytest
import torch

from fairseq_implicit.layout import UNPADDED, Layout, token_sum
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.broyden import columns_within
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig, solve
from fairseq_implicit.solvers.status import Status

BATCH, TIME, DIM = 4, 6, 8


def contraction(norm: float, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """A matrix of the given 2-norm, float64."""
    matrix = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


def offsets(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TokenMixing:
    """A map whose every operation gives each sample the same bits in any batch and with any padding."""

    def __init__(self, bias, layout=UNPADDED, gain=0.9):
        self.bias, self.layout, self.gain = bias, layout, gain
        self.scale = torch.linspace(-0.7, 0.7, bias.shape[-1], dtype=bias.dtype)

    def __call__(self, z):
        z = self.layout.keep(z)
        mean = (token_sum(z) * z.shape[2] / self.layout.sizes(z)[:, None]).to(z.dtype)[:, None]
        out = self.gain * torch.tanh(z * self.scale + 0.5 * mean.roll(1, -1) + self.bias)
        return self.layout.keep(out)

    def rows(self, index):
        return TokenMixing(self.bias[index], self.layout.rows(index), self.gain)


@pytest.mark.parametrize("method", METHODS)
def test_reaches_the_closed_form_of_an_affine_map(method):
    matrix, bias = contraction(0.8), offsets(BATCH, TIME, DIM)
    exact = torch.linalg.solve(torch.eye(DIM, dtype=torch.float64) - matrix.T, bias.transpose(1, 2)).transpose(1, 2)
    result = solve(lambda z: z @ matrix + bias, torch.zeros_like(bias), FixedPointConfig(method, 200, 1e-12))
    assert result.status is Status.CONVERGED
    assert torch.allclose(result.state, exact, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("criterion", ["relative", "rms", "absolute"])
def test_residual_is_that_of_the_returned_state(method, criterion):
    matrix, bias = contraction(0.9), offsets(BATCH, TIME, DIM)

    def f(z):
        return torch.tanh(z @ matrix + bias)

    result = solve(f, torch.zeros_like(bias), FixedPointConfig(method, 6, 1e-9, criterion))
    assert result.status is Status.BUDGET_SPENT
    f_z = f(result.state)
    norm = (f_z - result.state).flatten(1).norm(dim=1)
    expected = {"relative": norm / f_z.flatten(1).norm(dim=1), "rms": norm / math.sqrt(TIME * DIM), "absolute": norm}
    assert torch.allclose(result.residual, expected[criterion], rtol=1e-10)
    assert result.evaluations.tolist() == [6] * BATCH


def test_picard_spends_what_the_contraction_rate_predicts():
    bias = torch.ones(1, 1, 1, dtype=torch.float64)
    # z_k = 2 (1 - 2**-k): the residual of z_k is 2**-k, relative to f(z_k) = z_{k+1}, about 2**-(k+1).
    result = solve(lambda z: 0.5 * z + bias, torch.zeros_like(bias), FixedPointConfig("picard", 50, 1e-3))
    expected = next(k for k in range(50) if 2.0**-k / (2 * (1 - 2.0 ** -(k + 1))) < 1e-3) + 1
    assert result.evaluations.item() == expected


def test_anderson_with_a_full_window_ends_in_finitely_many_steps():
    # On an affine map Anderson is GMRES: four unknowns per sample, so the sixth residual is rounding.
    matrix, bias = contraction(0.99, 4), offsets(3, 1, 4)
    config = FixedPointConfig("anderson", 12, 1e-9, window=6, ridge=0.0)
    assert solve(lambda z: z @ matrix + bias, torch.zeros_like(bias), config).evaluations.max() <= 7
    assert (
        solve(lambda z: z @ matrix + bias, torch.zeros_like(bias), FixedPointConfig("picard", 12, 1e-9)).residual.max()
        > 1e-3
    )


def test_broyden_ends_in_twice_the_dimension_and_solves_what_picard_cannot():
    # Gay 1979: at most 2n steps on an affine map, expanding or not.
    matrix, bias = -3.0 * contraction(1.0, 4), offsets(3, 1, 4)
    result = solve(lambda z: z @ matrix + bias, torch.zeros_like(bias), FixedPointConfig("broyden", 12, 1e-9))
    assert result.converged.all() and result.evaluations.max() <= 10


@pytest.mark.parametrize("columns", [3, 5])
def test_broyden_restarts_within_its_cap(columns):
    matrix, bias = contraction(0.9), offsets(BATCH, TIME, DIM)
    cap = columns * 2 * bias.numel() * 8 / 2**20
    assert columns_within(cap, bias) == columns
    result = solve(
        lambda z: torch.tanh(z @ matrix + bias),
        torch.zeros_like(bias),
        FixedPointConfig("broyden", 80, 1e-10, memory=cap),
    )
    assert result.converged.all()


def test_relative_ridge_keeps_anderson_fast_at_small_residuals():
    # With an absolute ridge of 1e-4 the residuals of the last digits drown and mixing becomes averaging.
    matrix = contraction(0.97, 32).float()
    bias = offsets(2, 8, 32).float()
    config = FixedPointConfig("anderson", 60, 2e-6)
    result = solve(lambda z: torch.tanh(z @ matrix + bias), torch.zeros_like(bias), config)
    assert result.converged.all() and result.evaluations.max() <= 25


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compact", [False, True])
def test_alone_equals_batched_to_the_last_bit_when_rows_freeze(method, compact):
    bias = offsets(BATCH, TIME, DIM) * torch.tensor([0.01, 0.3, 1.0, 3.0], dtype=torch.float64)[:, None, None]
    config = FixedPointConfig(method, 40, 1e-7, compact=compact)
    together = solve(TokenMixing(bias), torch.zeros_like(bias), config)
    assert together.evaluations.unique().numel() > 1, "the samples should differ in difficulty"
    for sample in range(BATCH):
        part = bias[sample : sample + 1]
        alone = solve(TokenMixing(part), torch.zeros_like(part), config)
        assert torch.equal(alone.state, together.state[sample : sample + 1])
        assert alone.evaluations.item() == together.evaluations[sample].item()
        assert alone.residual.item() == together.residual[sample].item()


@pytest.mark.parametrize("method", METHODS)
def test_alone_equals_batched_to_the_tolerance_without_freezing(method):
    bias = offsets(BATCH, TIME, DIM) * torch.tensor([0.01, 0.3, 1.0, 3.0], dtype=torch.float64)[:, None, None]
    config = FixedPointConfig(method, 60, 1e-8, freeze=False)
    together = solve(TokenMixing(bias), torch.zeros_like(bias), config)
    assert together.evaluations.unique().numel() == 1
    for sample in range(BATCH):
        part = bias[sample : sample + 1]
        alone = solve(TokenMixing(part), torch.zeros_like(part), config)
        assert torch.allclose(alone.state, together.state[sample : sample + 1], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("junk", [7.0, math.nan])
def test_padded_equals_unpadded_to_the_last_bit(method, junk):
    bias = offsets(2, TIME, DIM)
    config = FixedPointConfig(method, 40, 1e-8)
    plain = solve(TokenMixing(bias), torch.zeros_like(bias), config)
    padding = torch.full((2, 3, DIM), junk, dtype=torch.float64)
    layout = Layout(torch.cat([torch.ones(2, TIME), torch.zeros(2, 3)], 1).bool())
    padded = solve(
        TokenMixing(torch.cat([bias, padding], 1), layout),
        torch.cat([torch.zeros_like(bias), padding], 1),
        config,
        layout,
    )
    assert torch.equal(padded.state[:, :TIME], plain.state)
    assert padded.state[:, TIME:].eq(0).all()
    assert torch.equal(padded.residual, plain.residual)
    assert torch.equal(padded.evaluations, plain.evaluations)


class _Poisoned(TokenMixing):
    """Sample 1 returns NaN from its fifth evaluation on."""

    def __init__(self, *args, start=5):
        super().__init__(*args)
        self.calls, self.start = 0, start

    def __call__(self, z):
        out = super().__call__(z)
        self.calls += 1
        if self.calls >= self.start:
            out = out.clone()
            out[1] = math.nan
        return out


@pytest.mark.parametrize("method", METHODS)
def test_one_broken_sample_keeps_its_best_iterate_and_leaves_the_others_alone(method):
    bias = offsets(3, TIME, DIM)
    config = FixedPointConfig(method, 80, 1e-9)
    sound = solve(TokenMixing(bias), torch.zeros_like(bias), config)
    broken = solve(_Poisoned(bias), torch.zeros_like(bias), config)
    assert broken.status is Status.NON_FINITE
    for sample in (0, 2):
        assert torch.equal(broken.state[sample], sound.state[sample])
    assert broken.state[1].isfinite().all()
    after_four = solve(TokenMixing(bias), torch.zeros_like(bias), FixedPointConfig(method, 4, 1e-9))
    assert torch.equal(broken.state[1], after_four.state[1])
    assert broken.converged.tolist() == [True, False, True]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_broken_from_the_start_keeps_its_start_and_stops(method):
    bias = offsets(3, TIME, DIM)
    start = torch.full_like(bias, 0.25)
    result = solve(_Poisoned(bias, start=1), start, FixedPointConfig(method, 30, 1e-9))
    assert result.status is Status.NON_FINITE
    assert torch.equal(result.state[1], start[1])
    assert result.evaluations[1] == 1
    assert result.residual[1].isinf()


@pytest.mark.parametrize("budget", [5, 6])
@pytest.mark.parametrize("criterion", ["relative", "absolute"])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_the_status_does_not_depend_on_which_evaluation_was_the_last(method, fault, criterion, budget):
    def finite_at_its_start_only(z):
        return torch.where((z == 0).flatten(1).all(1)[:, None, None], z + 1, fault)

    start = offsets(2, TIME, DIM) * 0
    result = solve(finite_at_its_start_only, start, FixedPointConfig(method, budget, 1e-6, criterion))
    assert result.status is Status.NON_FINITE
    assert torch.equal(result.state, start)


def test_a_divergence_restarts_picard_with_halved_damping():
    # f(z) = b - 2z: Picard multiplies the error by -2, half damping by -1/2.
    bias = offsets(2, 1, 2)
    config = FixedPointConfig("picard", 60, 1e-9, "absolute")
    result = solve(lambda z: bias - 2 * z, torch.zeros_like(bias) + 0.1, config)
    assert result.converged.all()
    assert torch.allclose(result.state, bias / 3, atol=1e-9)


def test_stagnation_near_the_tolerance_ends_the_solve():
    bias = offsets(2, TIME, DIM).float()

    def noisy(z):
        # A field whose evaluations differ by 3e-3 whatever the state: rounding in the extreme.
        noisy.calls += 1
        wobble = 1.5e-3 * (1 if noisy.calls % 2 else -1)
        return 0.3 * torch.tanh(z) + bias * (1 + wobble)

    noisy.calls = 0
    result = solve(noisy, torch.zeros_like(bias), FixedPointConfig("picard", 60, 2e-3))
    assert result.status is Status.STAGNATED
    assert result.evaluations.max() < 30


@pytest.mark.parametrize("method", METHODS)
def test_redrawn_noise_is_reported_as_not_converged(method):
    # Masks redrawn at every call leave a residual floor that no solver passes.
    bias = offsets(2, 16, 32).float()
    torch.manual_seed(0)
    result = solve(
        lambda z: torch.nn.functional.dropout(torch.tanh(0.5 * z + bias), 0.1),
        torch.zeros_like(bias),
        FixedPointConfig(method, 40, 1e-3),
    )
    assert not result.converged.any()
    assert result.residual.min() > 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cells_are_solved_in_float32(method, dtype):
    matrix, bias = contraction(0.8, 64).to(dtype), (3 * offsets(2, 128, 64)).to(dtype)
    seen = set()

    def f(z):
        seen.add(z.dtype)
        return torch.tanh(z @ matrix + bias)

    result = solve(f, torch.zeros_like(bias), FixedPointConfig(method))
    assert seen == {dtype} and result.state.dtype is dtype
    assert result.residual.dtype is torch.float32
    assert result.converged.all(), result.sentence()


def test_autocast_reaches_the_field_and_not_the_algebra():
    matrix, bias = contraction(0.8, 64).float(), offsets(2, 16, 64).float()
    seen = []

    def f(z):
        out = z @ matrix
        seen.append((torch.is_autocast_enabled("cpu"), out.dtype))
        return torch.tanh(out.float() + bias)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = solve(f, torch.zeros_like(bias), FixedPointConfig("anderson"))
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(True, torch.bfloat16)}
    assert result.state.dtype is torch.float32
    assert result.tolerance == 1e-2, "the default follows the precision of the field"


def test_compaction_spends_fewer_rows():
    bias = offsets(8, TIME, DIM) * torch.tensor([0.001] * 6 + [3.0] * 2, dtype=torch.float64)[:, None, None]
    rows = []

    class Counting(TokenMixing):
        def __call__(self, z):
            rows.append(z.shape[0])
            return super().__call__(z)

        def rows(self, index):
            return Counting(self.bias[index])

    solve(Counting(bias), torch.zeros_like(bias), FixedPointConfig("anderson", 40, 1e-9, compact=True))
    assert rows[0] == 8 and rows[-1] == 2


def test_a_field_that_cannot_drop_rows_is_left_whole():
    bias = offsets(4, TIME, DIM) * torch.tensor([0.001, 0.001, 0.001, 3.0], dtype=torch.float64)[:, None, None]

    class Whole(TokenMixing):
        def rows(self, index):
            return None

    config = FixedPointConfig("anderson", 40, 1e-9, compact=True)
    assert torch.equal(
        solve(Whole(bias), torch.zeros_like(bias), config).state,
        solve(TokenMixing(bias), torch.zeros_like(bias), FixedPointConfig("anderson", 40, 1e-9)).state,
    )


def test_captured_iterates_are_the_states_that_were_evaluated():
    bias = offsets(2, TIME, DIM)
    f = TokenMixing(bias)
    result = solve(f, torch.zeros_like(bias), FixedPointConfig("picard", 20, 1e-12), capture=(1, 3, 99))
    assert torch.equal(result.iterates[1], torch.zeros_like(bias))
    assert torch.equal(result.iterates[3], f(f(torch.zeros_like(bias))))
    assert torch.equal(result.iterates[99], result.state)


@pytest.mark.parametrize(
    "options, option",
    [
        ({"method": "newton"}, "solver"),
        ({"criterion": "max"}, "criterion"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": 0.0}, "tol"),
        ({"tol": math.nan}, "tol"),
        ({"damping": 0.0}, "damping"),
        ({"damping": 1.5}, "damping"),
        ({"window": 0}, "window"),
        ({"ridge": -1.0}, "ridge"),
        ({"memory": 0.0}, "memory"),
        ({"compact": True, "freeze": False}, "compact"),
        ({"stagnation_window": 1}, "stagnation_window"),
    ],
)
def test_impossible_options_are_named(options, option):
    with pytest.raises(OptionError, match=option) as caught:
        FixedPointConfig(**options)
    assert caught.value.option == option


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-8), (torch.bfloat16, 1e-3), (torch.float16, 1e-5)])
def test_a_tolerance_below_the_floor_of_the_dtype_is_refused(dtype, tol):
    with pytest.raises(OptionError, match="below the residual"):
        solve(torch.tanh, torch.zeros(1, 2, 3, dtype=dtype), FixedPointConfig(tol=tol))


def test_a_cap_below_one_update_is_refused_with_its_size():
    with pytest.raises(OptionError, match=r"takes 2\.0 MiB and the cap is 1 MiB"):
        solve(torch.tanh, torch.zeros(8, 128, 128, dtype=torch.float64), FixedPointConfig("broyden", memory=1.0))


def test_the_sentence_carries_the_numbers():
    bias = offsets(2, TIME, DIM)
    result = solve(TokenMixing(bias), torch.zeros_like(bias), FixedPointConfig("picard", 3, 1e-9))
    assert "0 of 2 samples converged to 1e-09" in result.sentence() and "after 3 evaluations" in result.sentence()


@pytest.mark.parametrize(
    "solver, method", [("anderson", "anderson"), ("broyden", "broyden"), ("fixed_point_iter", "picard")]
)
def test_torchdeq_finds_the_same_points(solver, method):
    torchdeq = pytest.importorskip("torchdeq")
    matrix, bias = contraction(0.8), offsets(BATCH, TIME, DIM)

    def f(z):
        return torch.tanh(z @ matrix + bias)

    reference, _, _ = torchdeq.solver.get_solver(solver)(
        f, torch.zeros_like(bias), max_iter=100, tol=1e-9, stop_mode="rel"
    )[:3]
    ours = solve(f, torch.zeros_like(bias), FixedPointConfig(method, 100, 1e-10))
    assert torch.allclose(ours.state, reference.view_as(bias), atol=1e-7)


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_a_foreseen_end_of_an_affine_solve_is_a_true_one(seed):
    # Two eigenvalues: after two residuals the least squares problem is solved exactly, and rounding in the Gram matrix,
    # times weights of a hundred, is all that is left of its minimum.
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64))[0]
    matrix = (basis * torch.tensor([0.99, 0.0], dtype=torch.float64).repeat(64)) @ basis.T
    g = torch.randn(1, 8, 16)

    def f(w):
        return (w.reshape(1, 128) @ matrix.T.to(w.dtype)).reshape(1, 8, 16) + g.to(w.dtype)

    result = solve(f, g, FixedPointConfig("anderson", 60, 1e-3), scale=UNPADDED.norm(g), linear=True)
    state = result.state.double()
    true = UNPADDED.norm(f(state) - state) / UNPADDED.norm(g)
    assert result.converged.all() and true < 1.1e-3
    torch.testing.assert_close(result.residual.double(), true, rtol=0.1, atol=1e-6)


class AffineMixing(TokenMixing):
    """The affine part of that map."""

    def __call__(self, z):
        z = self.layout.keep(z)
        mean = (token_sum(z) * z.shape[2] / self.layout.sizes(z)[:, None]).to(z.dtype)[:, None]
        return self.layout.keep(self.gain * (z * self.scale + 0.4 * mean.roll(1, -1)) + self.bias)


def adjoint_like(f, layout=UNPADDED, **options):
    return solve(
        f,
        f.bias,
        FixedPointConfig(**options),
        layout,
        scale=layout.norm(layout.keep(f.bias)).clamp(min=1.0),
        linear=True,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_foreseen_end_depends_on_neither_batch_mates_nor_padding(method):
    bias = offsets(BATCH, TIME, DIM) * torch.tensor([0.01, 0.3, 1.0, 300.0], dtype=torch.float64)[:, None, None]
    options = dict(method=method, max_iter=40, tol=1e-6)
    together = adjoint_like(AffineMixing(bias), **options)
    assert together.converged.all() and together.evaluations.unique().numel() > 1
    for sample in range(BATCH):
        alone = adjoint_like(AffineMixing(bias[sample : sample + 1]), **options)
        assert torch.equal(alone.state[0], together.state[sample])
        assert torch.equal(alone.residual[0], together.residual[sample])
        assert torch.equal(alone.evaluations[0], together.evaluations[sample])
    layout = Layout(torch.cat([torch.ones(BATCH, TIME), torch.zeros(BATCH, 3)], 1).bool())
    junk = torch.full((BATCH, 3, DIM), math.nan, dtype=torch.float64)
    padded = adjoint_like(AffineMixing(torch.cat([bias, junk], 1), layout), layout, **options)
    assert torch.equal(padded.state[:, :TIME], together.state)
    assert torch.equal(padded.evaluations, together.evaluations)


@pytest.mark.parametrize("start", [1, 3])
def test_a_broken_sample_of_an_affine_solve_leaves_the_others_alone(start):
    bias = offsets(3, TIME, DIM)

    class Poisoned(_Poisoned, AffineMixing):
        pass

    options = dict(max_iter=40, tol=1e-9)
    sound, broken = adjoint_like(AffineMixing(bias), **options), adjoint_like(Poisoned(bias, start=start), **options)
    assert broken.status is Status.NON_FINITE and broken.converged.tolist() == [True, False, True]
    assert broken.state[1].isfinite().all()
    for sample in (0, 2):
        assert torch.equal(broken.state[sample], sound.state[sample])
        assert torch.equal(broken.evaluations[sample], sound.evaluations[sample])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", [None, 4])
def test_nothing_that_was_not_stored_is_read(method, fault):
    # Deterministic algorithms fill memory that nobody has written with NaN.
    bias = offsets(3, TIME, DIM)
    config = FixedPointConfig(method, 30, 1e-9, damping=0.9)

    def f():
        return TokenMixing(bias) if fault is None else _Poisoned(bias, start=fault)

    expected = solve(f(), torch.zeros_like(bias), config)
    try:
        torch.use_deterministic_algorithms(True)
        assert bias.new_empty(1).isnan()
        found = solve(f(), torch.zeros_like(bias), config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.state, expected.state) and torch.equal(found.residual, expected.residual)


def test_a_sample_that_starts_at_its_fixed_point_does_not_hide_the_end_of_the_others():
    # Its residual is 0 time after time: a rate of 0 / 0 predicts nothing.
    bias = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, TIME, DIM)
    config = FixedPointConfig("picard", 60, 1e-9, freeze=False)
    found = solve(lambda z: 0.5 * z + bias, torch.zeros_like(bias), config, track=True)
    assert found.converged.all() and found.tracked is not None
    assert torch.equal(found.tracked[0], found.state)
