"""Norms and spectral radii of Jacobians that are known in closed form."""

import math

import pytest
import torch

from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.jacobian import frobenius_double_backward, frobenius_finite_difference, spectral_radius
from tests.solvers.cells import ToyCell, toy_input


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rotation(radius, angle):
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return radius * turn


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi / 2])
def test_spectral_radius_of_a_scaled_rotation_is_its_scale(angle):
    # A Rayleigh quotient gives 0.9 |cos| here: 0.326 at 1.2 rad.
    matrix = rotation(0.9, angle)
    found = spectral_radius(lambda z: z @ matrix, torch.zeros(3, 4, 2, dtype=torch.float64), 20, generator=seeded())
    assert torch.allclose(found, torch.full((3,), 0.9, dtype=torch.float64), atol=1e-12)


def test_spectral_radius_of_a_general_matrix_is_that_of_its_eigenvalues():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=seeded(3))
    found = spectral_radius(lambda z: z @ matrix, torch.zeros(2, 1, 6, dtype=torch.float64), 400, generator=seeded())
    assert torch.allclose(found, torch.linalg.eigvals(matrix).abs().max().expand(2), rtol=0.02)


def test_spectral_radius_is_per_sample_and_blind_to_padding():
    scale = torch.tensor([0.2, 0.7], dtype=torch.float64)[:, None, None]
    layout = Layout(torch.tensor([[True, True, False]] * 2))
    amplify = torch.tensor([1.0, 1.0, 50.0], dtype=torch.float64)[None, :, None]
    found = spectral_radius(
        lambda z: scale * amplify * z, torch.ones(2, 3, 4, dtype=torch.float64), 10, layout, seeded()
    )
    assert torch.allclose(found, scale.flatten(), atol=1e-12)


def test_a_nilpotent_map_has_radius_zero_and_no_nan():
    matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = spectral_radius(lambda z: z @ matrix, torch.zeros(1, 1, 2, dtype=torch.float64), 10, generator=seeded())
    assert found.item() < 1e-100


def exact_frobenius(f, z):
    jacobian = torch.autograd.functional.jacobian(f, z)
    return jacobian.square().sum() / z.numel()


@pytest.mark.parametrize("estimator", ["finite-difference", "double-backward"])
def test_both_estimators_agree_with_the_full_jacobian(estimator):
    cell, u = ToyCell(), toy_input(2, 3)
    f, z = cell.map(u), toy_input(2, 3, seed=9)
    expected = exact_frobenius(f, z)
    if estimator == "finite-difference":
        found = frobenius_finite_difference(f, z, f(z), torch.float64, 600, generator=seeded())
    else:
        found = frobenius_double_backward(f, z, 600, generator=seeded())
    assert torch.allclose(found, expected, rtol=0.1)


def test_both_estimators_agree_on_the_same_linear_map_and_its_gradient():
    # For f(z) = a z both are a² exactly when averaged over ‖ε‖² = N; per probe they share that factor.
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    z = toy_input(4, 16, 32)

    def f(x):
        return gain * x

    finite = frobenius_finite_difference(f, z, f(z), torch.float64, 8, generator=seeded())
    double = frobenius_double_backward(f, z, 8, generator=seeded())
    assert finite.item() == pytest.approx(double.item(), rel=1e-9)
    for estimate in (finite, double):
        (slope,) = torch.autograd.grad(estimate, gain)
        assert slope.item() == pytest.approx(2 * estimate.item() / 0.7, rel=1e-9)


def test_finite_differences_train_a_cell_through_fused_attention():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    z = toy_input(2, 4, 16).float()
    penalty = frobenius_finite_difference(layer, z, layer(z), torch.float32, 1, generator=seeded())
    penalty.backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.linear1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_step_suits_the_precision(dtype):
    cell, u = ToyCell(dim=32, hidden=32, std=0.1), toy_input(2, 16, 32)
    f, z = cell.map(u), toy_input(2, 16, 32, seed=9)
    reference = frobenius_finite_difference(f, z, f(z), torch.float64, 4, generator=seeded())
    cell = cell.to(dtype)
    f, z = cell.map(u.to(dtype)), z.to(dtype)
    rough = frobenius_finite_difference(f, z, f(z), dtype, 4, generator=seeded())
    assert rough.item() == pytest.approx(reference.item(), rel=0.1)


def test_padding_does_not_enter_the_estimate():
    layout = Layout(torch.tensor([[True, True, False]] * 2))
    z = toy_input(2, 3)
    weight = torch.tensor([0.5, 0.5, 30.0], dtype=torch.float64)[None, :, None]
    found = frobenius_finite_difference(lambda x: weight * x, z, weight * z, torch.float64, 400, layout, seeded())
    assert found.item() == pytest.approx(0.25, rel=0.1)


def test_a_cell_without_second_derivative_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    estimate = frobenius_double_backward(Once.apply, toy_input(1, 2), generator=seeded())
    with pytest.raises(RuntimeError):
        estimate.backward()
