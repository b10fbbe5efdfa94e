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

    def share(self, first: Mixer) -> None:
        """Take over what all layers have in common from the first layer's mixer, which is of the same class."""

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        """Fix what stays constant during one solve: noise, visibility, biases.

        Args:
            x: what the depth starts from, ``(batch, time, dim)``, for its shape, dtype and device.
            layout: of the batch.
        """
        raise TypeError(f"{type(self).__name__} defines no prepare(): a mixer must return mix(z, added=None) there")


@dataclass(frozen=True)
class MixerConfig:
    """The options of one mixer: its fields; and what a layer must know before it is built.

    The fields have a default and, as ``help`` in their metadata, a line for the command line; ``heads``, ``dropout``
    (of what is mixed with what), ``hidden_dropout`` and ``norm_eps`` are those of the family.
    """

    @property
    def noise(self) -> float:
        """The largest rate of noise that the mixer draws in training."""
        return 0.0

    @property
    def positional(self) -> bool:
        """Whether the mixer tells positions apart by itself, so that the state need not."""
        return False

    @property
    def changed_by(self) -> str | None:
        """The option by which each evaluation is another function of the state, so that no solve may have several;
        ``None``: the mixer is a function of the state."""
        return None

    @property
    def differs_by(self) -> str | None:
        """The option by which layers differ; ``None``: they are alike."""
        return None

    def at(self, layer: int) -> MixerConfig:
        """The options of layer ``layer``, counted from 0, where layers differ."""
        return self

    def added_width(self, dim: int) -> int:
        """How many numbers per token an injection adds to what is projected; 0 where it cannot."""
        return 0

    def build(self, dim: int, dropout_policy: str) -> Mixer:
        """The mixer of states of width ``dim``, its noise of one of the policies of shared_dropout.

        Raises:
            ValueError: options that do not suit the width.
        """
        raise TypeError(f"{type(self).__name__} defines no build(): a mixer's configuration must make the mixer there")
