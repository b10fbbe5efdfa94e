"""A list of modules that knows of which kind they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from torch import nn

M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """torch's list, whose own annotations forget what is in it."""

    if TYPE_CHECKING:

        def __init__(self, modules: Iterable[M] = ()): ...
        def __iter__(self) -> Iterator[M]: ...
        @overload
        def __getitem__(self, index: slice) -> ModuleList[M]: ...
        @overload
        def __getitem__(self, index: int) -> M: ...
        def __getitem__(self, index): ...
