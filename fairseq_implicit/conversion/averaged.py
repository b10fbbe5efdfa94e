"""A stack of layers as one cell: the mean of its blocks, or of its middle blocks between a prelude and a coda.

Where the averaged blocks are equal nothing changes: the cell is applied as often as there were blocks (``bptt-K``),
what stands before and after it keeps its own weights, and a pre-norm stack its one norm, at its end. With a gain g it
is a cell that has an equilibrium instead, ``z = Layer(z + g LN(x))``, x the state after the prelude, with a norm at its
end where the layer has none. That is another function, to be trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_implicit.conversion.tied import deq_from_tied

FAMILIES = ("deq_bert", "ode_bert")
_FIELD = re.compile(r"encoder\.depth\.fields\.(\d+)\.(.+)")
_FIRST, _DEPTH, _CELL = "encoder.depth.fields.0.", "encoder.depth.", "encoder.depth.cell."


def tied(
    checkpoint: Mapping[str, Any], family: str = "deq_bert", prelude: int = 0, coda: int = 0, gain: float = 0.0
) -> dict[str, Any]:
    """An ode_bert whose blocks have weights of their own, with one block in place of many.

    Args:
        checkpoint: as fairseq's ``load_checkpoint_to_cpu`` returns it.
        family: ``ode_bert``: all blocks share their mean, whatever their scheme; ``deq_bert``: the mean is its cell,
            which is a plain layer.
        prelude, coda: blocks at the beginning and at the end that stay as they are, of a deq_bert.
        gain: above 0, of the injection that gives the cell of a deq_bert an equilibrium.

    Raises:
        ValueError: another model, or one that cannot be tied so; the sentence says why.
    """
    settings = dict(checkpoint["cfg"]["model"])
    if not settings["_name"].startswith("ode_bert"):
        raise ValueError(f"the checkpoint holds {settings['_name']}, and only an ode_bert has blocks to tie")
    if settings.get("ode_tied"):
        raise ValueError("ode_tied is True: its blocks are one already")
    if settings.get("attention_global_every") is not None:
        raise ValueError("attention_global_every makes its layers differ, of which one cannot be the mean")
    if settings.get("ode_linear_part", "none") != "none" and (prelude or coda or gain):
        raise ValueError(
            f"ode_linear_part is {settings['ode_linear_part']}: its field has an equilibrium and an injection already, "
            "and the layers of a prelude or a coda have none: leave prelude, coda and gain out"
        )
    if not 0 <= gain < math.inf:
        raise ValueError(f"a gain of {gain} is negative or not finite")
    if family == "ode_bert" and (prelude or coda or gain):
        raise ValueError("an ode_bert ties all of its blocks and injects nothing: prelude, coda, gain are a deq_bert's")
    blocks, others = _blocks(checkpoint["model"])
    middle = blocks[prelude : len(blocks) - coda]
    if min(prelude, coda) < 0 or not middle:
        raise ValueError(f"a prelude of {prelude} and a coda of {coda} leave none of the {len(blocks)} blocks to tie")
    one = {**others, **{_FIRST + name: weight for name, weight in _mean(middle, prelude).items()}}
    settings.update(ode_tied=True)
    if family == "ode_bert":
        cfg = {**checkpoint["cfg"], "model": {**settings, "_name": "ode_bert"}}
        return {**checkpoint, "model": one, "cfg": cfg, "last_optimizer_state": None}
    cfg = {**checkpoint["cfg"], "model": {**settings, "encoder_layers": len(middle)}}
    found = deq_from_tied({**checkpoint, "model": one, "cfg": cfg})
    model, weights = found["cfg"]["model"], found["model"]
    model.update(encoder_layers=len(blocks), deq_prelude_layers=prelude, deq_coda_layers=coda)
    for part, kept in (("prelude", blocks[:prelude]), ("coda", blocks[len(blocks) - coda :])):
        for number, block in enumerate(kept):
            weights.update({f"{_DEPTH}{part}.{number}.{name}": weight for name, weight in block.items()})
    if gain:
        _open(model, weights, gain)
    return found


def _blocks(weights: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The weights of each block by their names in it, and all others."""
    found: dict[int, dict[str, Tensor]] = {}
    others = {}
    for name, weight in weights.items():
        if match := _FIELD.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = weight
        else:
            others[name] = weight
    return [found[number] for number in sorted(found)], others


def _mean(blocks: Sequence[Mapping[str, Tensor]], offset: int) -> dict[str, Tensor]:
    first = {name: weight.shape for name, weight in blocks[0].items()}
    for number, block in enumerate(blocks):
        if {name: weight.shape for name, weight in block.items()} != first:
            raise ValueError(
                f"block {offset + number} has other weights than block {offset}: leave it to the prelude or the coda"
            )
    # In float64 the mean of equal numbers is that number.
    return {
        name: torch.stack([block[name].double() for block in blocks]).mean(0).to(weight.dtype)
        for name, weight in blocks[0].items()
    }


def _open(model: dict[str, Any], weights: dict[str, Tensor], gain: float) -> None:
    """Give the cell what an equilibrium needs: its input at every evaluation, and a norm at its end."""
    norm = f"{_CELL}layers.0.feed_forward_norm."
    parts = {name.removeprefix(norm): weight for name, weight in weights.items() if name.startswith(norm)}
    fresh = {part: torch.full_like(weight, float(part == "weight")) for part, weight in parts.items()}
    weights[f"{_CELL}injection.raw_gain"] = torch.tensor(gain + math.log(-math.expm1(-gain)))
    weights.update({f"{_CELL}injection.norm.{part}": weight.clone() for part, weight in fresh.items()})
    if model["deq_cell_norm"] == "pre-norm":
        for part in parts:
            # The stack's norm ends the last part: the cell, or the coda.
            output = f"{_DEPTH}output_norm.{part}"
            weights[f"{_CELL}final_norm.{part}"] = (
                fresh[part].clone() if model["deq_coda_layers"] else weights.pop(output)
            )
        model["deq_no_final_norm"] = False
    model.update(deq_injection="residual", deq_injection_gain=gain, deq_gradient="ift")
