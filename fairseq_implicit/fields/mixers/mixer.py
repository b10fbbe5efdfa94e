"""The contract of what mixes tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fairseq_implicit.fields.sub_layer import SubLayer
from fairseq_implicit.layout import UNPADDED, Layout

#: ``mix(z, added=None) -> (batch, time, dim)``; ``added``, ``(batch, time, added_width)``, is added to the projected z.
Mix = Callable[..., Tensor]


class Mixer(SubLayer):
    """A sub-layer in which each token reads those that its layout lets it see."""

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        """Fix what stays constant during one solve: noise, visibility, biases.

        Args:
            x: the state at the start of the solve, ``(batch, time, dim)``.
            layout: of the batch.
        """
        raise TypeError(f"{type(self).__name__} defines no prepare(): a mixer must return mix(z, added=None) there")


@dataclass(frozen=True)
class MixerConfig:
    """The options of one mixer: its fields; and what a layer must know before it is built."""

    @property
    def noise(self) -> float:
        """The largest rate of noise that the mixer draws in training."""
        return 0.0

    def added_width(self, dim: int) -> int:
        """How many numbers per token an injection adds to what is projected; 0 where it cannot."""
        return 0

    def build(self, dim: int, dropout_policy: str) -> Mixer:
        """The mixer of states of width ``dim``, its noise of one of the policies of shared_dropout.

        Raises:
            ValueError: options that do not suit the width.
        """
        raise TypeError(f"{type(self).__name__} defines no build(): a mixer's configuration must make the mixer there")
