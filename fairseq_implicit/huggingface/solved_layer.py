"""A layer of transformers that hands its calls to whoever solves the depth, and the calls themselves.

The layer keeps its place, its name, its weights and its hooks; only its class is another while it is solved, a
subclass whose ``forward`` asks the pass that is under way. So state dicts, copies, pickles and replicas of the model
are those of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Cache

from fairseq_implicit.options import OptionError

ONE_MAP = "a solve has as many attention maps as evaluations, not one per layer"


@dataclass
class Call:
    """A call of a layer whose state is left open: ``z -> layer(z)``, all other arguments as they were.

    Attributes:
        layer: a solved layer.
        args, kwargs: the arguments; the state stands among them at ``place``.
        width: how many things it returns as a tuple, the state first; 0: the state alone. Once it was evaluated, what
            it did return.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    width: int = 0

    @property
    def state(self) -> Tensor:
        """That the layer was called with, ``(batch, time, dim)``."""
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    @property
    def checkpointed(self) -> bool:
        """Whether ``model.gradient_checkpointing_enable()`` asks for recomputation in the backward pass."""
        return self.layer.training and vars(self.layer).get("gradient_checkpointing", False)

    def evaluate(self, z: Tensor) -> Any:
        """What the layer itself returns for the state ``z``."""
        if isinstance(self.place, int):
            args = (*self.args[: self.place], z, *self.args[self.place + 1 :])
            return _plain_class(self.layer).forward(self.layer, *args, **self.kwargs)
        return _plain_class(self.layer).forward(self.layer, *self.args, **{**self.kwargs, self.place: z})

    def __call__(self, z: Tensor) -> Tensor:
        found = self.evaluate(z)
        if not isinstance(found, tuple):
            return found
        state, *others = found
        self.width = len(found)
        if any(other is not None for other in others):
            raise OptionError(
                "layers", f"{type(self.layer).__name__} returns more than its state, which depends on the evaluation."
            )
        return state

    def shaped(self, state: Tensor) -> Any:
        """``state`` as the layer would return it."""
        return (state, *(None,) * (self.width - 1)) if self.width else state

    def refuse_arguments(self) -> None:
        """Raises:
        OptionError: the layer was given something that only one evaluation can have.
        """
        if self.kwargs.get("output_attentions"):
            raise OptionError("output_attentions", f"{ONE_MAP}: leave it out.")
        if any(isinstance(given, Cache) for given in (*self.args, *self.kwargs.values())):
            raise OptionError(
                "past_key_values", "a cache holds one key and value per layer, not one per evaluation: use_cache=False."
            )


class Pass(Protocol):
    """One forward pass of an encoder, as its layers see it.

    Attributes:
        module: the encoder.
        outer: the pass within which this one runs.
    """

    module: nn.Module
    outer: Pass | None

    def receive(self, call: Call) -> Any:
        """What the layer returns in place of its own result."""


#: The pass that is under way in this thread.
CURRENT: ContextVar[Pass | None] = ContextVar("pass", default=None)


def solve_layer(layer: nn.Module, width: int = 0, place: int = 0) -> None:
    """Give ``layer`` the class that hands over its calls.

    Args:
        width: see :class:`Call`.
        place: of the state among its positional arguments.
    """
    plain: Any = type(layer)
    layer.__class__ = _solved_class(plain, width, place)


def restore_layer(layer: nn.Module) -> None:
    """Give ``layer`` its own class back."""
    layer.__class__ = _plain_class(layer)


def _plain_class(layer: nn.Module) -> Any:
    return type(layer).__mro__[1]


def _rebuilt(plain: Any, width: int, place: int) -> nn.Module:
    solved = _solved_class(plain, width, place)
    return solved.__new__(solved)


@cache
def _solved_class(plain: Any, width: int, place: int) -> Any:
    def forward(self, *args, **kwargs):
        current = CURRENT.get()
        if current is None:  # called by itself, outside its encoder
            return plain.forward(self, *args, **kwargs)
        where: int | str = place if len(args) > place else "hidden_states"
        return current.receive(Call(self, args, kwargs, where, width))

    def reduce(self, protocol):
        # A class that was made here has no name by which it could be pickled.
        return _rebuilt, (plain, width, place), self.__getstate__()

    # Under its own name: transformers and FSDP find layers by it.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__reduce_ex__": reduce}
    solved: Any = type(plain.__name__, (plain,), names)
    # Set afterwards: what transformers wraps around a new layer's forward would recompute it outside its pass.
    solved.forward = forward
    return solved


def chained(calls: Sequence[Call], around_first: Callable | None = None) -> Callable[[Tensor], Tensor]:
    """``z -> calls[-1](… calls[0](z))``.

    Args:
        around_first: gives a context for the first call.
    """
    first, *others = calls

    def layers(z: Tensor) -> Tensor:
        if around_first is None:
            z = first(z)
        else:
            with around_first():
                z = first(z)
        for call in others:
            z = call(z)
        return z

    return layers
