"""How strongly a map contracts at a point: Frobenius norm and spectral radius of its Jacobian.

Source: Bai et al. 2021, arXiv 2106.14342 (Jacobian regularisation). Their estimator differentiates twice, which fused
attention kernels, compiled cells and recomputation do not allow; the finite-difference form needs first derivatives.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_implicit.layout import UNPADDED, Layout

# Steps relative to the state's rms. Half precision rounds a smaller step away: bfloat16 is off by a factor 2 at 1e-2.
FINITE_STEP = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}


def _probe(z: Tensor, layout: Layout, generator: torch.Generator | None) -> Tensor:
    # Drawn on the generator's device: a seeded CPU generator gives every rank and device the same probe.
    device = z.device if generator is None else generator.device
    return layout.keep(torch.randn(z.shape, generator=generator, device=device).to(z.device, z.dtype))


def frobenius_finite_difference(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    f_z: Tensor,
    precision: torch.dtype,
    probes: int = 1,
    layout: Layout = UNPADDED,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``‖J‖²_F / N`` by ``‖f(z + hε) − f(z)‖² / (h² N)``, ε normal, N entries at real tokens; 0-dim, differentiable.

    Args:
        f: the map, ``(batch, time, dim)`` to the same.
        z: the point; no gradient flows to it.
        f_z: ``f(z)``, tracked if the estimate is to be differentiated in f's parameters.
        precision: what ``f`` computes in; it sets the step h relative to z's rms.
        probes: number of ε.
        layout: of the batch.
        generator: source of ε; the default generator when ``None``.
    """
    z = z.detach()
    size = layout.sizes(z).sum()
    rms = layout.keep(z).float().square().sum().div(size.clamp(min=1)).sqrt().clamp(min=1e-6).to(z.dtype)
    step = FINITE_STEP[precision] * rms
    total: float | Tensor = 0.0
    for _ in range(probes):
        moved = f(z + step * _probe(z, layout, generator))
        difference = layout.keep(moved.to(torch.promote_types(moved.dtype, torch.float32)) - f_z)
        total = total + (difference / step).square().sum()
    return total / (probes * size)


def frobenius_double_backward(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    probes: int = 1,
    layout: Layout = UNPADDED,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``‖J‖²_F / N`` by ``‖εᵀJ‖²``, differentiable through a second backward pass; 0-dim.

    Attention runs in its unfused form here, because the fused kernels have no second derivative. What ``f`` gives at
    real tokens must not depend on the others.

    Raises:
        RuntimeError: part of ``f`` (a compiled or recomputed cell) cannot be differentiated with a graph; some such
            cells only say so when the estimate itself is differentiated. The finite-difference estimator fits all.
    """
    point = z.detach()
    # A layer norm's second derivative at a zero state is past float16's range, and 0 times infinity is NaN: padding
    # stands at a point of variance 1, which no estimate sees.
    signs = torch.ones_like(point[0, 0])
    signs[1::2] = -1
    point = layout.keep(point, otherwise=signs)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        point = point.requires_grad_()
        value = f(point)
        total: float | Tensor = 0.0
        for _ in range(probes):
            try:
                (product,) = torch.autograd.grad(
                    value, point, _probe(value, layout, generator), create_graph=True, retain_graph=True
                )
            except RuntimeError as error:
                raise RuntimeError(
                    f"The double-backward Jacobian penalty cannot differentiate this cell twice ({error}); "
                    "take the finite-difference estimator."
                ) from error
            total = total + product.to(torch.promote_types(product.dtype, torch.float32)).square().sum()
    return total / (probes * layout.sizes(z).sum())


def spectral_radius(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    steps: int = 30,
    layout: Layout = UNPADDED,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spectral radius of the Jacobian of each sample, ``(batch,)``, by ``steps`` products ``Jᵀv``.

    The estimate is the geometric mean growth ‖Jᵀv‖/‖v‖ over the last half of the steps. Unlike a Rayleigh quotient
    it is right for complex pairs, which turn the vector as they stretch it.
    """
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = f(point)
    v = _probe(value, layout, generator)
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    tiny = torch.finfo(v.dtype).tiny
    v = v / (layout.norm(v)[:, None, None] + tiny).to(v.dtype)
    growth = []
    for step in range(steps):
        (product,) = torch.autograd.grad(value, point, v.to(value.dtype), retain_graph=step + 1 < steps)
        product = layout.keep(product.to(v.dtype))
        size = layout.norm(product)
        growth.append((size + tiny).log())
        v = product / (size + tiny)[:, None, None].to(v.dtype)
    return torch.stack(growth[steps // 2 :]).mean(0).exp().to(v.dtype)
