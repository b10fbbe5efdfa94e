"""The map whose fixed point is a deep-equilibrium encoder: transformer layers around an injected input.

===============  ==========================================================================================
post-norm        ``f(z) = Layer(z)``, in whose first sum stands ``z + g u``: ``LN1(z + g u + Mix z)``
pre-norm         ``f(z) = LN(Layer(z + g u))``
of a linear part ``f(z) = e^{−A} z + (1 − e^{−A}) g u + φ₁(−A) (Layer(z) − z)``
===============  ==========================================================================================

with ``u = LN(x)`` the normalised input, g a learnable gain and the layers of :mod:`fairseq_implicit.fields.residual`.
The last is one exponential Euler step of :mod:`fairseq_implicit.fields.semilinear`; its fixed point is that of every
scheme and step there. The norm at the end of the others is what bounds them: a pre-norm cell without one has spectral
radius 1 whatever its weights, and iterating it drifts instead of converging. Norms are not moved outside the map for
the same reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fairseq_implicit.fields.injection import Injection, InjectionConfig
from fairseq_implicit.fields.residual import Residual
from fairseq_implicit.fields.semilinear import LINEAR_PARTS, Rate
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.module_list import ModuleList
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.exponential import phi
from fairseq_implicit.solvers.vector_field import StateMap

NORM_PLACEMENTS = ("post-norm", "pre-norm")
STARTS = ("depth-scaled", "identity", "plain")


@dataclass(frozen=True)
class CellConfig:
    """Shape of one cell.

    Attributes:
        layer: shape and noise of each layer; ``kind`` is ``post-norm`` or ``pre-norm``.
        layers: transformer layers in the map.
        injection: how the input enters the first layer.
        linear_part: ``none`` or ``diagonal``.
        final_norm: end a pre-norm map without a linear part with a norm. Only a map that is unrolled a fixed number of
            times may go without.
        weight_norm: learn direction and length of the rows of the layers' matrices apart.
        initial_std: standard deviation of the initial weights.
        start: ``plain``: that of all of them; ``depth-scaled``: that of the residual branches divided by the root of
            their number in the map, whose stream begins with the injection and ends in the norm, and fc2's also by the
            root of how much wider than 4 dim the feed-forward network is, so that widening it does not strengthen its
            branch; ``identity``: residual branches of 0, so that the map is its injection and norm alone.
        before: how many layers the input has passed, where layers differ by their place.

    Raises:
        ValueError: a shape or combination that has no meaning (an ``OptionError`` where one option is at fault).
    """

    layer: TransformerFieldConfig
    layers: int = 1
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    linear_part: str = "none"
    final_norm: bool = True
    weight_norm: bool = False
    initial_std: float = 0.02
    start: str = "depth-scaled"
    before: int = 0

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"an equilibrium cell starts {', '.join(STARTS)}, not {self.start!r}")
        if self.layer.kind not in NORM_PLACEMENTS:
            raise ValueError(f"an equilibrium cell is one of {', '.join(NORM_PLACEMENTS)}, not {self.layer.kind!r}")
        if self.layers < 1:
            raise ValueError(f"an equilibrium cell of {self.layers} layers: it needs at least 1")
        if self.injection.qkv and not self.layer.mixer.added_width(self.layer.dim):
            raise OptionError("qkv_injection", "what mixes the tokens here takes nothing in; leave it out.")
        check_choice("linear_part", self.linear_part, LINEAR_PARTS)
        if self.has_linear_part and (self.injection.qkv or not self.injection.residual):
            option = "qkv_injection" if self.injection.qkv else "injection"
            raise OptionError(option, "a linear part pulls the state to the input, which enters there and only there.")
        if self.layer.residual.ends_in_norm and not self.final_norm:
            raise ValueError("a post-norm cell ends in its layer's own norm, which cannot be left out")
        if self.layer.drop_path > 0:
            raise ValueError(
                f"drop path {self.layer.drop_path} inside an equilibrium cell makes the map the identity for the "
                "samples it drops, which have no equilibrium"
            )

    @property
    def has_linear_part(self) -> bool:
        return self.linear_part != "none"

    @property
    def bounded(self) -> bool:
        """Whether something in the map bounds it, whatever its weights."""
        return self.has_linear_part or self.final_norm

    @property
    def ends_in_norm(self) -> bool:
        """Whether its fixed point is a normed state."""
        return self.final_norm and not self.has_linear_part


class CellLayer(TransformerField):
    """A transformer layer that is read as a map."""

    def residual(self, x: Tensor, layout: Layout = UNPADDED) -> Residual:
        # Not in the field's order: seeded runs of cells have always drawn both dropouts last.
        mix, feed = self.attention.prepare(x, layout), self.feed_forward.prepare(x)
        drop_mix, drop_feed = self.dropout.prepare(x), self.feed_forward_dropout.prepare(x)
        return self.config.residual(
            lambda y, added, onto=None: drop_mix(mix(y, added), onto),
            (lambda y, onto=None: drop_feed(feed(y), onto),),
            self.norms,
        )


class CellMap(StateMap):
    """One solve's map ``z -> f(z)``, ``(batch, time, dim)``, zero at padding.

    Args:
        cell: the cell it was prepared by.
        x: its input, ``(batch, time, dim)``.
        layout: of the batch.
    """

    def __init__(self, cell: EquilibriumCell, x: Tensor, layout: Layout):
        self.cell, self.x, self.layout = cell, x, layout
        self._layers = [layer.residual(x, layout) for layer in cell.layers]
        self._injected = cell.injection(x)
        self._decay: tuple[Tensor, ...] = ()
        if cell.linear is not None:
            stream, _ = self._injected
            assert stream is not None, "CellConfig refuses a linear part without injection"
            # As in the exponential Euler step of SemiLinearField, whose remainder is A g u + F.
            rate = cell.linear()
            decay, weight = (-rate).exp(), phi(-rate)[0]
            self._injected = (weight * rate * stream).to(stream.dtype), None
            self._decay = decay.to(stream.dtype), weight.to(stream.dtype)

    def __call__(self, z: Tensor) -> Tensor:
        first, *others = self._layers
        if self._decay:
            (decay, weight), (pull, _) = self._decay, self._injected
            increment = first.increment(z)
            for layer in others:
                increment = increment + layer.increment(z + increment)
            return self.layout.keep(torch.addcmul(torch.addcmul(pull, z, decay), increment, weight))
        z = first.layer(z, self._injected)
        for layer in others:
            z = layer.layer(z)
        if self.cell.final_norm is not None:
            z = self.cell.final_norm(z)
        return self.layout.keep(z)

    @property
    def depends_on(self) -> tuple[Tensor, ...]:
        """The tensors with a gradient that an evaluation uses; of a :meth:`severed` map none is computed from another.

        The injection's own parameters are not among them: they act through what was injected.
        """
        used = [self.cell.layers] if self.cell.final_norm is None else [self.cell.layers, self.cell.final_norm]
        injected = [tensor for tensor in self._injected if tensor is not None]
        return (*injected, *self._decay, *(parameter for module in used for parameter in module.parameters()))

    def severed(self) -> CellMap:
        """The same map, its graph cut where the injection enters.

        The input may itself come from this cell's parameters (a depth applied twice): gradients in both the parameters
        and the injection would then count the way through the input twice.
        """

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        twin = copy.copy(self)
        stream, added = (None if tensor is None else cut(tensor) for tensor in self._injected)
        twin._injected, twin._decay = (stream, added), tuple(map(cut, self._decay))
        return twin

    def rows(self, index: Tensor) -> CellMap | None:
        """The same map for some samples; ``None`` where noise was drawn for the whole batch."""
        if self.cell.training and self.cell.config.layer.is_noisy:
            return None
        return CellMap(self.cell, self.x[index], self.layout.rows(index))


class EquilibriumCell(nn.Module):
    """``layers`` transformer layers as one map, the input injected into the first.

    Args:
        config: see :class:`CellConfig`.
    """

    def __init__(self, config: CellConfig):
        super().__init__()
        self.config = config
        self.layers = ModuleList(CellLayer(config.layer.at(config.before + layer)) for layer in range(config.layers))
        layer = config.layer
        self.injection = Injection(layer.dim, config.injection, layer.mixer.added_width(layer.dim), layer.norm)
        self.linear = Rate(layer.dim) if config.has_linear_part else None
        own_end = config.ends_in_norm and not layer.residual.ends_in_norm
        self.final_norm = layer.norm.build(layer.dim) if own_end else None
        if config.weight_norm:
            for linear in self._matrices():
                parametrizations.weight_norm(linear, dim=0)
        self.initialise()

    def _matrices(self) -> Iterator[nn.Linear]:
        for layer in self.layers:
            for sub_layer in layer.sub_layers():
                yield from sub_layer.inner_projections()
                yield from sub_layer.residual_projections()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights of the configured scales, zero biases."""
        config = self.config
        mixer = feed_forward = config.initial_std
        if config.start == "depth-scaled":
            mixer = config.initial_std / math.sqrt(2 * config.layers)
            feed_forward = mixer / math.sqrt(max(1.0, config.layer.ffn_dim / (4 * config.layer.dim)))
        elif config.start == "identity":
            mixer = feed_forward = 0.0
        for layer in self.layers:
            for sub_layer in layer.sub_layers():
                residual_std = mixer if sub_layer is layer.attention else feed_forward
                for linear in sub_layer.inner_projections():
                    self._draw(linear, config.initial_std)
                for linear in sub_layer.residual_projections():
                    self._draw(linear, residual_std)
        if self.injection.qkv is not None:
            self._draw(self.injection.qkv, config.initial_std)
        self.injection.initialise()

    def _draw(self, linear: nn.Linear, std: float) -> None:
        if parametrize.is_parametrized(linear, "weight"):
            # Assigned, not drawn in place: the weight is computed from its rows' directions and lengths, and rows of
            # length 0 need a direction too.
            linear.weight = torch.empty_like(linear.weight).normal_(std=std or self.config.initial_std)
            if std == 0.0:
                linear.get_parameter("parametrizations.weight.original0").zero_()
        else:
            linear.weight.normal_(std=std)
        if linear.bias is not None:
            linear.bias.zero_()

    def operations(self, time: int) -> int:
        """Floating-point operations of one evaluation per token of a sequence of ``time``: those of matrix products."""
        return sum(layer.operations(time) for layer in self.layers)

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> CellMap:
        """Fix one solve's noise and injection.

        Args:
            x: the input, ``(batch, time, dim)``.
            layout: of the batch.
        """
        if self.config.weight_norm and torch.is_grad_enabled():
            # Under parametrize.cached() the weight must be computed with its graph before a solve without one asks.
            for linear in self._matrices():
                _ = linear.weight
        return CellMap(self, x, layout)
