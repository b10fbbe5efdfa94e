"""The weights in which a network starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_implicit.fields.sub_layer import SubLayer
from fairseq_implicit.networks.encoder import Encoder
from fairseq_implicit.options import OptionError, check_choice

INITIALISATIONS = ("depth-scaled", "identity", "plain")


@dataclass(frozen=True)
class InitialisationConfig:
    """How a network starts.

    Attributes:
        scheme: ``plain``: N(0, ``std``) everywhere; ``depth-scaled``: residual projections divided by the root of
            their number along the depth; ``identity``: residual projections 0.
        std: standard deviation of the weights.
        positions: ``normal``; ``sinusoidal``: sines and cosines of the same scale; ``neighbours``: those of a Fourier
            basis, and mixers that start by reading the tokens beside each.
        layers_in_series: how many layers a token passes, sub-steps and iterations not counted; ``None``: as many as
            the depth has. With tied blocks the same weights act in every one.

    Raises:
        OptionError: an unknown name, or a scale that is none.
    """

    scheme: str = "depth-scaled"
    std: float = 0.02
    positions: str = "normal"
    layers_in_series: int | None = None

    def __post_init__(self):
        check_choice("scheme", self.scheme, INITIALISATIONS)
        check_choice("positions", self.positions, POSITION_STARTS)
        if not 0.0 < self.std < math.inf:
            raise OptionError("std", f"initial weights need a positive standard deviation, not {self.std}.")


@torch.no_grad()
def initialise(network: Encoder, config: InitialisationConfig) -> None:
    """Draw all weights anew, biases 0. What in the depth needs another start has the last word."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.std)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    spectrum = FREQUENCIES[config.positions]
    if spectrum is not None:
        if network.embed_positions is None:
            raise OptionError("positions", f"{config.positions} is a start of learned positions, and there are none.")
        positions = network.embed_positions.weight
        frequencies = spectrum(positions.shape[1])
        positions.copy_(math.sqrt(2.0) * config.std * sinusoids(positions, frequencies))
        positions[network.embeddings.padding].zero_()
    layers = list(network.depth.layers())
    projections = [projection for layer in layers for projection in layer.residual_projections()]
    if config.scheme != "plain":
        repeats = 1.0 if config.layers_in_series is None else config.layers_in_series / len(layers)
        divisor = math.sqrt(max(1.0, len(projections) * repeats)) if config.scheme == "depth-scaled" else math.inf
        for projection in projections:
            projection.weight.div_(divisor)
    network.depth.initialise()
    if config.positions == "neighbours":
        for module in network.modules():
            if isinstance(module, SubLayer):
                module.start_at_neighbours(lambda weight, distance: moved(weight, distance, frequencies))


def geometric(dim: int) -> Tensor:
    """Radians per position of ``dim / 2`` sinusoids as in arXiv 1706.03762 §3.5: near positions are alike."""
    half = (dim + 1) // 2
    return torch.exp(-math.log(10000.0) / half * torch.arange(half))


def linear(dim: int) -> Tensor:
    """Radians per position of ``dim / 2`` sinusoids from 0 to pi: ``dim`` positions are orthogonal to each other."""
    half = (dim + 1) // 2
    return math.pi / half * (torch.arange(half) + 0.5)


def sinusoids(like: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines of the positions, in the shape ``(positions, dim)`` of ``like``.

    A head finds a neighbour by one rotation then, instead of learning it place by place.
    """
    positions, dim = like.shape
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


def moved(weight: Tensor, distance: int, frequencies: Tensor) -> Tensor:
    """The map that finds at a position what ``weight``, ``(rows, dim)``, finds ``distance`` places on.

    By the addition theorem the sinusoids there are those here, rotated by the angle ``distance * frequency``.
    """
    pairs = weight.shape[1] // 2
    sines, rest, cosines = weight.split([pairs, weight.shape[1] - 2 * pairs, pairs], dim=1)  # rest: a sine alone
    cos, sin = (distance * frequencies[:pairs]).cos(), (distance * frequencies[:pairs]).sin()
    return torch.cat([sines * cos - cosines * sin, rest, sines * sin + cosines * cos], dim=1)


#: The frequencies of each start of the positions; ``None``: they are random.
FREQUENCIES: dict[str, Callable[[int], Tensor] | None] = {
    "normal": None,
    "sinusoidal": geometric,
    "neighbours": linear,
}
POSITION_STARTS = tuple(FREQUENCIES)
