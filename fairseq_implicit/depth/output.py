"""What every depth (stack, continuum, equilibrium) is to the model, and what it returns."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fairseq_implicit.fields.field import Field
from fairseq_implicit.layout import UNPADDED, Layout


@dataclass
class DepthOutput:
    """The encoder's state after its depth.

    Attributes:
        state: ``(batch, time, dim)``.
        hidden_states: the states along the depth when asked for, first the input, each ``(batch, time, dim)``.
        statistics: flat, name -> scalar (0-dim detached tensor, float or int): evaluations, residual, gate means …
            The criterion logs each under its own name. The names must be the same for every batch and rank.
        penalties: name -> 0-dim tensor **with** gradient, already weighted, per masked token: the criterion
            adds each to the loss, times the sample size.
        auxiliary_states: ``(weight, state)`` pairs whose masked-LM loss is added to the loss with that weight
            (fixed-point correction).
        operations: floating-point operations of the forward and backward pass per token: those of the matrix products
            of all evaluations, recomputation included. Of backward passes that solve something the last one that is
            known counts.
        lambdas: the content lambdas of the fields' lambda layers when asked for, each ``(batch, key, value)``: of every
            block at the state before it, of a continuum at the states of its trajectory, of an equilibrium there.
    """

    state: Tensor
    hidden_states: list[Tensor] | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)
    penalties: dict[str, Tensor] = field(default_factory=dict)
    auxiliary_states: list[tuple[float, Tensor]] = field(default_factory=list)
    operations: float | Tensor = 0.0
    lambdas: list[Tensor] | None = None


class Depth(nn.Module):
    """What lies between a network's embeddings and its heads: fields and how they are solved.

    Attributes:
        config: how it is solved, a frozen dataclass.
        around: what is put around the function of each solve, such as a compiler.
    """

    config: Any
    around: Callable[[Callable], Callable] = staticmethod(lambda function: function)

    def forward(
        self, x: Tensor, layout: Layout = UNPADDED, return_hidden_states: bool = False, return_lambdas: bool = False
    ) -> DepthOutput:
        """Solve.

        Args:
            x: embedding ``(batch, time, dim)``, zero at padding.
            layout: of the batch.
            return_hidden_states: collect the states along the depth.
            return_lambdas: collect content lambdas, which costs an evaluation more of each.
        """
        raise TypeError(f"{type(self).__name__} defines no forward(): a depth must solve its fields there")

    def config_at(self, depth: int) -> Any:
        """The configuration of evaluation at another depth than that of training, in steps or evaluations.

        Raises:
            OptionError: ``depth`` is none that this depth can have.
        """
        raise TypeError(f"{type(self).__name__} defines no config_at(): a depth must say there what its dial turns")

    @contextlib.contextmanager
    def at(self, depth: int) -> Iterator[None]:
        """Within it the depth is evaluated at ``depth``, see :meth:`config_at`."""
        config = self.config
        self.config = self.config_at(depth)
        try:
            yield
        finally:
            self.config = config

    @property
    def piecewise(self) -> bool:
        """Whether other weights act at other times of one solve."""
        return False

    def layers(self) -> Iterator[Field]:
        """The fields of one layer each, every one once."""
        raise TypeError(f"{type(self).__name__} defines no layers(): a depth must name its fields there")

    def initialise(self) -> None:
        """Called after the initialisation of all linear maps, for what must start otherwise."""
        for layer in self.layers():
            layer.initialise()

    @property
    def scheduled(self) -> bool:
        """Whether training must be told its updates, because something depends on their number."""
        return False

    def count_updates(self, updates: int) -> None:
        """Told by a training that keeps no number of its own through the weights' whole life, before each update.

        fairseq, which keeps one, tells the depth's parts through ``set_num_updates``.

        Args:
            updates: how many the weights have seen, those of earlier trainings included.
        """

    @property
    def updates_seen(self) -> int:
        """How many the weights have seen, where the state dict holds their number; otherwise 0."""
        return 0
