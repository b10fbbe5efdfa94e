"""How the input of an equilibrium enters its cell at every evaluation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.residual import NOTHING, Injected


@dataclass(frozen=True)
class InjectionConfig:
    """What is injected.

    Attributes:
        residual: add the normalised input, times a learnable gain, to the state's residual stream. In a cell that
            ends in a norm this alone makes the map contract: with small weights its spectral radius is about
            1 / (1 + gain).
        gain: the gain's start.
        gain_floor: the gain stays above this.
        qkv: add an untied projection of the normalised input to what the mixer of the first layer projects: queries,
            keys and values.

    Raises:
        ValueError: the gain does not start above its floor.
    """

    residual: bool = True
    gain: float = 1.0
    gain_floor: float = 0.0
    qkv: bool = False

    def __post_init__(self):
        if not 0.0 <= self.gain_floor < self.gain < math.inf:
            raise ValueError(
                f"the injection gain starts at {self.gain:g} with the floor {self.gain_floor:g}; "
                "it must be finite and start above its floor, and the floor must not be negative"
            )


class Injection(nn.Module):
    """The constants that an input adds to a cell.

    The gain is ``floor + softplus(parameter)``: it cannot change sign or fall to the floor, and never loses its
    gradient as a clamp would.

    Args:
        dim: width of the state.
        config: see :class:`InjectionConfig`.
        added_width: how many numbers per token the mixer takes.
        norm: of the input.
    """

    def __init__(self, dim: int, config: InjectionConfig, added_width: int, norm: NormConfig):
        super().__init__()
        self.config = config
        self.norm = norm.build(dim) if config.residual or config.qkv else None
        self.raw_gain = nn.Parameter(torch.zeros(())) if config.residual else None
        self.qkv = nn.Linear(dim, added_width, bias=False) if config.qkv else None
        self.initialise()

    def initialise(self) -> None:
        """Set the gain to its start."""
        if self.raw_gain is not None:
            above = self.config.gain - self.config.gain_floor
            with torch.no_grad():
                self.raw_gain.fill_(above + math.log(-math.expm1(-above)))

    @property
    def gain(self) -> Tensor | None:
        """The gain, 0-dim; ``None`` without residual injection."""
        if self.raw_gain is None:
            return None
        return self.config.gain_floor + functional.softplus(self.raw_gain)

    def forward(self, x: Tensor) -> Injected:
        """What enters the residual stream, ``(batch, time, dim)``, and the mixer, ``(batch, time, added_width)``."""
        if self.norm is None:
            return NOTHING
        normalised, gain = self.norm(x), self.gain
        residual = None if gain is None else gain.to(normalised.dtype) * normalised
        return residual, None if self.qkv is None else self.qkv(normalised)
