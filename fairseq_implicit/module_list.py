"""A list of modules that knows of which kind they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast, overload

from torch import nn

M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """torch's list, whose annotations forget what is in it."""

    def __init__(self, modules: Iterable[M] = ()):
        super().__init__(modules)

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())

    @overload
    def __getitem__(self, index: slice) -> ModuleList[M]: ...
    @overload
    def __getitem__(self, index: int) -> M: ...
    def __getitem__(self, index):
        return super().__getitem__(index)
