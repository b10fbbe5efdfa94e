"""Weights under two sets of names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

#: What the placeholders of a name stand for.
_PLACEHOLDERS = {"layer": r"\d+", "part": "weight|bias", "rest": ".+", "outside": r"(?!encoder\.depth\.).+"}


class Table:
    """This package's names of a model's weights, and those of others.

    Args:
        model: the other side, as errors name it.
        names: ours to theirs. ``{layer}`` stands for a number, ``{part}`` for weight or bias, ``{rest}`` for anything,
            ``{outside}`` for whatever lies outside the depth. Several of theirs are stacked in ours along the first
            axis.
    """

    def __init__(self, model: str, names: Mapping[str, str | Sequence[str]]):
        self.model = model
        self._rows = [(ours, (theirs,) if isinstance(theirs, str) else tuple(theirs)) for ours, theirs in names.items()]
        self._ours = [(re.compile(_pattern(ours)), theirs) for ours, theirs in self._rows]
        self._theirs = [
            (re.compile(_pattern(name)), ours, place, len(theirs))
            for ours, theirs in self._rows
            for place, name in enumerate(theirs)
        ]

    def imported(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights under our names.

        Raises:
            ValueError: a weight that such a model does not have, so that nothing is dropped unseen, or a part missing.
        """
        found: dict[str, list[Tensor | None]] = {}
        for name, weight in weights.items():
            ours, place, parts = self._look_up(name)
            found.setdefault(ours, [None] * parts)[place] = weight
        return dict(_joined(found, self.model))

    def _look_up(self, name: str) -> tuple[str, int, int]:
        for pattern, ours, place, parts in self._theirs:
            if match := pattern.fullmatch(name):
                return ours.format(**match.groupdict()), place, parts
        raise ValueError(f"{name} is not a weight of a {self.model}: these weights cannot become an ode_bert")

    def exported(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names.

        Raises:
            ValueError: a weight that has no place there.
        """
        found = {}
        for name, weight in weights.items():
            for pattern, theirs in self._ours:
                if match := pattern.fullmatch(name):
                    parts = weight.chunk(len(theirs)) if len(theirs) > 1 else (weight,)
                    for template, part in zip(theirs, parts, strict=True):
                        # A copy of its own: a file would hold the whole of what it is a part of.
                        found[template.format(**match.groupdict())] = part.clone() if len(theirs) > 1 else part
                    break
            else:
                raise ValueError(f"{name} has no place in a {self.model}: these weights cannot become one")
        return found


def _pattern(name: str) -> str:
    return re.sub(r"\\{(\w+)\\}", lambda found: f"(?P<{found[1]}>{_PLACEHOLDERS[found[1]]})", re.escape(name))


def _joined(found: Mapping[str, list[Tensor | None]], model: str) -> Iterator[tuple[str, Tensor]]:
    for name, parts in found.items():
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            raise ValueError(f"{name} needs {len(parts)} weights of the {model}, and one of them is missing")
        yield name, whole[0] if len(parts) == 1 else torch.cat(whole)
