"""The map whose fixed point is a deep-equilibrium encoder: transformer layers around an injected input.

=========  ==================================================================================================
post-norm  ``y = LN(z + g u + Drop(Attn z))``, ``f(z) = LN(y + Drop(FFN y))``
pre-norm   ``y = z + g u``, ``y += Drop(Attn(LN y))``, ``y += Drop(FFN(LN y))``, ``f(z) = LN(y)``
=========  ==================================================================================================

with ``u = LN(x)`` the normalised input and g a learnable gain. The norm at the end of the map is what bounds it: a
pre-norm cell without one has spectral radius 1 whatever its weights, and iterating it drifts instead of converging.
Norms are not moved outside the map for the same reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fairseq_implicit.fields.injection import Injection, InjectionConfig
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import UNPADDED, Layout

NORM_PLACEMENTS = ("post-norm", "pre-norm")
STARTS = ("depth-scaled", "identity", "plain")


@dataclass(frozen=True)
class CellConfig:
    """Shape of one cell.

    Attributes:
        layer: shape and noise of each layer; ``kind`` is ``post-norm`` or ``pre-norm``.
        layers: transformer layers in the map.
        injection: how the input enters the first layer.
        final_norm: end a pre-norm map with a norm. Only a map that is unrolled a fixed number of times may go without.
        weight_norm: learn direction and length of the rows of the layers' matrices apart.
        initial_std: standard deviation of the initial weights.
        start: ``plain``: that of all of them; ``depth-scaled``: that of the residual branches divided by the root of
            their number in the map, whose stream begins with the injection and ends in the norm, and fc2's also by the
            root of how much wider than 4 dim the feed-forward network is, so that widening it does not strengthen its
            branch; ``identity``: residual branches of 0, so that the map is its injection and norm alone.

    Raises:
        ValueError: a shape or combination that has no meaning.
    """

    layer: TransformerFieldConfig
    layers: int = 1
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    final_norm: bool = True
    weight_norm: bool = False
    initial_std: float = 0.02
    start: str = "depth-scaled"

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"an equilibrium cell starts {', '.join(STARTS)}, not {self.start!r}")
        if self.layer.kind not in NORM_PLACEMENTS:
            raise ValueError(f"an equilibrium cell is one of {', '.join(NORM_PLACEMENTS)}, not {self.layer.kind!r}")
        if self.layers < 1:
            raise ValueError(f"an equilibrium cell of {self.layers} layers: it needs at least 1")
        if self.layer.kind == "post-norm" and not self.final_norm:
            raise ValueError("a post-norm cell ends in its layer's own norm, which cannot be left out")
        if self.layer.drop_path > 0:
            raise ValueError(
                f"drop path {self.layer.drop_path} inside an equilibrium cell makes the map the identity for the "
                "samples it drops, which have no equilibrium"
            )


class CellLayer(TransformerField):
    """A transformer layer as a map ``z -> z'``, with an optional addition to q, k and v."""

    def prepare_map(self, x: Tensor, layout: Layout) -> Callable[..., Tensor]:
        """Fix one solve's noise; return ``layer(z, qkv=None)``, both states ``(batch, time, dim)``."""
        attend, feed = self.attention.prepare(x, layout), self.feed_forward.prepare(x)
        drop_attention, drop_feed = self.dropout.prepare(x), self.dropout.prepare(x)

        def post_norm(z: Tensor, added: Tensor | None = None, qkv: Tensor | None = None) -> Tensor:
            stream = z if added is None else z + added
            y = self.attention_norm(stream + drop_attention(attend(z, qkv)))
            return self.feed_forward_norm(y + drop_feed(feed(y)))

        def pre_norm(z: Tensor, added: Tensor | None = None, qkv: Tensor | None = None) -> Tensor:
            stream = z if added is None else z + added
            y = stream + drop_attention(attend(self.attention_norm(stream), qkv))
            return y + drop_feed(feed(self.feed_forward_norm(y)))

        return post_norm if self.config.kind == "post-norm" else pre_norm

    @property
    def is_noisy(self) -> bool:
        """Whether the prepared map holds masks of the batch's own."""
        rates = (self.config.dropout, self.config.attention_dropout, self.config.activation_dropout)
        return self.training and any(rate > 0 for rate in rates)


class CellMap:
    """One solve's map ``z -> f(z)``, ``(batch, time, dim)``, zero at padding.

    Args:
        cell: the cell it was prepared by.
        x: its input, ``(batch, time, dim)``.
        layout: of the batch.
    """

    def __init__(self, cell: EquilibriumCell, x: Tensor, layout: Layout):
        self.cell, self.x, self.layout = cell, x, layout
        self._layers: list[Callable[..., Tensor]] = [layer.prepare_map(x, layout) for layer in cell.layers]
        self._added, self._qkv = cell.injection(x)

    def __call__(self, z: Tensor) -> Tensor:
        first, *others = self._layers
        z = first(z, self._added, self._qkv)
        for layer in others:
            z = layer(z)
        if self.cell.final_norm is not None:
            z = self.cell.final_norm(z)
        return self.layout.keep(z)

    @property
    def depends_on(self) -> tuple[Tensor, ...]:
        """The tensors with a gradient that an evaluation uses; of a :meth:`severed` map none is computed from another.

        The injection's own parameters are not among them: they act through what was injected.
        """
        used = [self.cell.layers] if self.cell.final_norm is None else [self.cell.layers, self.cell.final_norm]
        injected = [tensor for tensor in (self._added, self._qkv) if tensor is not None]
        return (*injected, *(parameter for module in used for parameter in module.parameters()))

    def severed(self) -> CellMap:
        """The same map, its graph cut where the injection enters.

        The input may itself come from this cell's parameters (a depth applied twice): gradients in both the parameters
        and the injection would then count the way through the input twice.
        """
        twin = copy.copy(self)
        twin._added, twin._qkv = (
            None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
            for tensor in (self._added, self._qkv)
        )
        return twin

    def rows(self, index: Tensor) -> CellMap | None:
        """The same map for some samples; ``None`` where noise was drawn for the whole batch."""
        if any(layer.is_noisy for layer in self.cell.layers):
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
        self.layers = nn.ModuleList(CellLayer(config.layer) for _ in range(config.layers))
        self.injection = Injection(config.layer.dim, config.injection)
        ends_in_norm = config.layer.kind == "pre-norm" and config.final_norm
        self.final_norm = nn.LayerNorm(config.layer.dim) if ends_in_norm else None
        if config.weight_norm:
            for linear in self._matrices():
                parametrizations.weight_norm(linear, dim=0)
        self.initialise()

    def _matrices(self) -> list[nn.Linear]:
        return [
            linear
            for layer in self.layers
            for linear in (layer.attention.qkv, layer.attention.out, layer.feed_forward.fc1, layer.feed_forward.fc2)
        ]

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights of the configured scales, zero biases."""
        config = self.config
        attention = feed_forward = config.initial_std
        if config.start == "depth-scaled":
            attention = config.initial_std / math.sqrt(2 * config.layers)
            feed_forward = attention / math.sqrt(max(1.0, config.layer.ffn_dim / (4 * config.layer.dim)))
        elif config.start == "identity":
            attention = feed_forward = 0.0
        for layer in self.layers:
            for linear, std in (
                (layer.attention.qkv, config.initial_std),
                (layer.attention.out, attention),
                (layer.feed_forward.fc1, config.initial_std),
                (layer.feed_forward.fc2, feed_forward),
            ):
                if parametrize.is_parametrized(linear, "weight"):
                    # Assigned, not drawn in place: the weight is computed from its rows' directions and lengths, and
                    # rows of length 0 need a direction too.
                    linear.weight = torch.empty_like(linear.weight).normal_(std=std or config.initial_std)
                    if std == 0.0:
                        linear.parametrizations.weight.original0.zero_()
                else:
                    linear.weight.normal_(std=std)
                linear.bias.zero_()
        if self.injection.qkv is not None:
            self.injection.qkv.weight.normal_(std=config.initial_std)

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> CellMap:
        """Fix one solve's noise and injection.

        Args:
            x: the input, ``(batch, time, dim)``.
            layout: of the batch.
        """
        if self.config.weight_norm and torch.is_grad_enabled():
            # Under parametrize.cached() the weight must be computed with its graph before a solve without one asks.
            for linear in self._matrices():
                linear.weight
        return CellMap(self, x, layout)
