"""How a mixer, a feed-forward network and norms make one layer: each formula, once.

=========  ============================================================================================
pre-norm   ``y += Mix(LN1 y)``, ``y += FFN(LN2 y)`` (GPT-2, ODE Transformer)
post-norm  ``y = LN1(y + Mix y)``, ``y = LN2(y + FFN y)`` (BERT, RoBERTa)
parallel   ``y += Mix(LN1 y) + FFN(LN1 y)`` (GPT-J)
macaron    ``y += ½ FFN0(LN0 y)``, ``y += Mix(LN1 y)``, ``y += ½ FFN(LN2 y)`` (arXiv 1906.02762)
=========  ============================================================================================

where Mix and FFN end in their dropout. What is injected into the stream joins the first sum: before the norm of a
pre-norm layer, beside the sub-layer of a post-norm one, whose mixer reads y alone.

Each is read in two ways: as the layer map, and as the increment ``Layer(y) - y``, which is summed from the sub-layers'
outputs. Forming ``Layer(y)`` first and subtracting would lose it to rounding (11 % error in bfloat16), and integrating
``Layer(y)`` itself adds a spurious exponential mode.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_implicit.fields.mixers.mixer import Mix

#: ``branch(y, onto=None)``: ``(batch, time, dim) -> (batch, time, dim)``, added to ``onto``, so that a branch that
#: ends in its dropout needs no pass of its own for the sum.
Branch = Callable[..., Tensor]

#: What enters a layer from outside: into the stream, ``(batch, time, dim)``, and into the mixer's projections.
Injected = tuple[Tensor | None, Tensor | None]
NOTHING: Injected = (None, None)


@dataclass(frozen=True)
class Residual:
    """One solve's layer.

    Attributes:
        mix: the mixer, with its noise.
        feeds: feed-forward networks, ``feed_count`` in the order in which a state meets them, with theirs.
        norms: ``norm_count`` in that order.
    """

    mix: Mix
    feeds: tuple[Branch, ...]
    norms: tuple[Callable[[Tensor], Tensor], ...]

    feed_count = 1
    norm_count = 2
    #: Whether the layer's last operation is a norm: then no stack of them needs another at its end, and only the layer
    #: map, not ``y + F(y)``, is the published layer to the last bit.
    ends_in_norm = False

    def branches(self, added: Tensor | None = None) -> tuple[Branch, ...]:
        """What is added to the state, one after the other; ``added`` goes into the mixer."""
        raise TypeError(f"{type(self).__name__} defines no branches(): a residual must name its sub-layers there")

    def increment(self, y: Tensor) -> Tensor:
        """``Layer(y) - y``, ``(batch, time, dim)``."""
        first, *others = self.branches()
        total = first(y)
        for branch in others:
            total = branch(y + total, onto=total)
        return total

    def layer(self, y: Tensor, injected: Injected = NOTHING) -> Tensor:
        """``Layer(y)``, ``(batch, time, dim)``."""
        stream, added = injected
        y = y if stream is None else y + stream
        for branch in self.branches(added):
            y = branch(y, onto=y)
        return y


class PreNorm(Residual):
    def branches(self, added: Tensor | None = None) -> tuple[Branch, ...]:
        (feed,), (mix_norm, feed_norm) = self.feeds, self.norms
        return (
            lambda y, onto=None: self.mix(mix_norm(y), added, onto=onto),
            lambda y, onto=None: feed(feed_norm(y), onto=onto),
        )


class PostNorm(Residual):
    ends_in_norm = True

    def branches(self, added: Tensor | None = None) -> tuple[Branch, ...]:
        return (lambda y, onto=None: self.mix(y, added, onto=onto)), *self.feeds

    def increment(self, y: Tensor) -> Tensor:
        return self.layer(y) - y

    def layer(self, y: Tensor, injected: Injected = NOTHING) -> Tensor:
        stream, added = injected
        total = y if stream is None else y + stream
        for branch, norm in zip(self.branches(added), self.norms, strict=True):
            y = total = norm(branch(y, onto=total))
        return y


class Parallel(Residual):
    norm_count = 1

    def branches(self, added: Tensor | None = None) -> tuple[Branch, ...]:
        (feed,), (norm,) = self.feeds, self.norms

        def both(y: Tensor, onto: Tensor | None = None) -> Tensor:
            normed = norm(y)
            total = feed(normed, onto=self.mix(normed, added))
            return total if onto is None else onto + total

        return (both,)


class Macaron(Residual):
    feed_count = 2
    norm_count = 3

    def branches(self, added: Tensor | None = None) -> tuple[Branch, ...]:
        (first_feed, feed), (first_norm, mix_norm, feed_norm) = self.feeds, self.norms

        def half(y: Tensor, onto: Tensor | None) -> Tensor:
            return y * 0.5 if onto is None else torch.add(onto, y, alpha=0.5)

        return (
            lambda y, onto=None: half(first_feed(first_norm(y)), onto),
            lambda y, onto=None: self.mix(mix_norm(y), added, onto=onto),
            lambda y, onto=None: half(feed(feed_norm(y)), onto),
        )


#: Residual formulas by the name of the field that they make.
RESIDUALS: dict[str, type[Residual]] = {
    "pre-norm": PreNorm,
    "post-norm": PostNorm,
    "parallel": Parallel,
    "macaron": Macaron,
}
