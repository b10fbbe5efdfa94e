"""Weights under two sets of names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fairseq_implicit.conversion.misfits import listed, refuse

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
            ValueError: weights that such a model does not have, so that nothing is dropped unseen, or parts missing.
        """
        found: dict[str, list[Tensor | None]] = {}
        strangers = []
        for name, weight in weights.items():
            place = self._look_up(name)
            if place is None:
                strangers.append(name)
            else:
                found.setdefault(place[0], [None] * place[2])[place[1]] = weight
        refuse(self._strange(strangers, f"is not a weight of a {self.model}", "are", "an ode_bert"))
        refuse(_lacking(found, self.model))
        return {name: _joined(parts) for name, parts in found.items()}

    def _look_up(self, name: str) -> tuple[str, int, int] | None:
        for pattern, ours, place, parts in self._theirs:
            if match := pattern.fullmatch(name):
                return ours.format(**match.groupdict()), place, parts
        return None

    def exported(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names.

        Raises:
            ValueError: weights that have no place there.
        """
        found, strangers = {}, []
        for name, weight in weights.items():
            for pattern, theirs in self._ours:
                if match := pattern.fullmatch(name):
                    parts = weight.chunk(len(theirs)) if len(theirs) > 1 else (weight,)
                    for template, part in zip(theirs, parts, strict=True):
                        # A copy of its own: a file would hold the whole of what it is a part of.
                        found[template.format(**match.groupdict())] = part.clone() if len(theirs) > 1 else part
                    break
            else:
                strangers.append(name)
        refuse(self._strange(strangers, f"has no place in a {self.model}", "have", "one"))
        return found

    @staticmethod
    def _strange(names: Sequence[str], reason: str, plural: str, target: str) -> Iterator[str]:
        if names:
            others = f", nor {plural} {listed(names[1:])}" if names[1:] else ""
            yield f"{names[0]} {reason}{others}: these weights cannot become {target}"


def _pattern(name: str) -> str:
    return re.sub(r"\\{(\w+)\\}", lambda found: f"(?P<{found[1]}>{_PLACEHOLDERS[found[1]]})", re.escape(name))


def _lacking(found: Mapping[str, Sequence[Tensor | None]], model: str) -> Iterator[str]:
    for name, parts in found.items():
        if any(part is None for part in parts):
            yield f"{name} needs {len(parts)} weights of the {model}, and one of them is missing"


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    whole = [part for part in parts if part is not None]
    return whole[0] if len(whole) == 1 else torch.cat(whole)
