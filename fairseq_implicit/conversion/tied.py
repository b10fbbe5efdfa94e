"""Weight-tied ode_bert and deq_bert are one cell read two ways: L steps of it, or its fixed point.

The bridge is exact where the cell is the same: one post-norm or pre-norm layer, Euler steps of size 1, the embedding
as the start and no injection. The converted model takes the same L steps (``bptt-L``) and so has the same loss; whether
those steps have an equilibrium is another question, which ``--model-overrides "{'deq_gradient': 'ift'}"`` asks.

With a linear part the bridge leads from any scheme and step to the equilibrium: all of them have the same fixed point.
Back, steps of etd1 with h = 1 are the cell itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion import plain_stack
from fairseq_implicit.conversion.table import Table
from fairseq_implicit.solvers.gradients.names import parse_gradient

#: How the names of a family's own settings begin; all others have one meaning in both.
_OWN = {"ode_bert": ("ode_", "rk_", "enc_", "alpha_", "encoder_layerdrop"), "deq_bert": ("deq_",)}
_NAMES = Table(
    "cell",
    {
        "encoder.depth.fields.0.{rest}": "encoder.depth.cell.layers.0.{rest}",
        "encoder.depth.final_norm.{part}": "encoder.depth.output_norm.{part}",
        "{outside}": "{outside}",
    },
)
#: The same of a cell with a linear part.
_LINEAR_NAMES = Table(
    "cell with a linear part",
    {
        "encoder.depth.fields.0.field.{rest}": "encoder.depth.cell.layers.0.{rest}",
        "encoder.depth.fields.0.linear.{rest}": "encoder.depth.cell.linear.{rest}",
        "encoder.depth.fields.0.injection.{rest}": "encoder.depth.cell.injection.{rest}",
        "encoder.depth.final_norm.{part}": "encoder.depth.output_norm.{part}",
        "{outside}": "{outside}",
    },
)
#: What belongs to one of the two only: a scheme's coefficients, and the count of updates of a schedule.
_LEFT_OUT = ("encoder.depth.combinations.", "encoder.depth.updates.")

_ONE_LAYER: dict[str, Any] = dict(
    deq_qkv_injection=False, deq_cell_layers=1, deq_prelude_layers=0, deq_coda_layers=0, deq_weight_norm=False,
)  # fmt: skip
_PLAIN_CELL: dict[str, Any] = dict(deq_injection="none", deq_initial_state="input", **_ONE_LAYER)
_LINEAR_CELL: dict[str, Any] = dict(deq_injection_gain_floor=0.0, **_ONE_LAYER)
#: Under what a fixed point of an ode_bert's block is one of its field.
_AUTONOMOUS: dict[str, Any] = dict(rk_norm=False, ode_residual_in_field=False, ode_history="none")


def _settings(checkpoint: Mapping[str, Any], family: str) -> dict[str, Any]:
    stored = checkpoint["cfg"]["model"]
    if not stored["_name"].startswith(family):
        raise ValueError(f"the checkpoint holds {stored['_name']}, not {family}")
    return dict(stored)


def _shared(settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith(_OWN[family])}


def _converted(checkpoint: Mapping[str, Any], weights: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Any]:
    # The optimiser's state goes by the order of the parameters, which is another one.
    cfg = {**checkpoint["cfg"], "model": model}
    return {**checkpoint, "model": weights, "cfg": cfg, "last_optimizer_state": None}


def _kept(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: weight for name, weight in checkpoint["model"].items() if not name.startswith(_LEFT_OUT)}


def _names(linear_part: str) -> Table:
    return _NAMES if linear_part == "none" else _LINEAR_NAMES


def _require(settings: Mapping[str, Any], values: Mapping[str, Any], because: str) -> None:
    for name, value in values.items():
        # A model older than one of them had none.
        if settings.get(name, value) != value:
            raise ValueError(f"{name} is {settings[name]}, and only {value} {because}")


def deq_from_tied(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A weight-tied ode_bert as the deq_bert that takes the same Euler steps, or solves for the fixed point that a
    field with a linear part has under every scheme.

    Args:
        checkpoint: as fairseq's ``load_checkpoint_to_cpu`` returns it.

    Raises:
        ValueError: its cell is not that of any deq_bert; the sentence says why.
    """
    settings = _settings(checkpoint, "ode_bert")
    linear_part = settings.get("ode_linear_part", "none")
    field = settings.get("ode_field", "pre-norm")
    own: dict[str, Any]
    if linear_part == "none":
        plain_stack.check(settings, ode_tied=True)
        own = dict(deq_no_final_norm=field == "pre-norm", deq_injection="none", deq_initial_state="input")
        own["deq_gradient"] = f"bptt-{settings['encoder_layers']}"
    else:
        if settings["encoder_layers"] > 1 and not settings.get("ode_tied"):
            raise ValueError("ode_tied is False, and blocks with weights of their own have no fixed point in common")
        _require(settings, _AUTONOMOUS, "lets the blocks stand still at the fixed point of their field")
        own = dict(deq_linear_part=linear_part, deq_initial_state="input")
    if field not in ("post-norm", "pre-norm"):
        raise ValueError(f"ode_field is {field}, and an equilibrium cell is post-norm or pre-norm")
    # A cell has no drop path, which only training knows.
    shared = {**_shared(settings, "ode_bert"), "drop_path": 0.0}
    model = {**shared, "_name": "deq_bert", "deq_cell_norm": field, **own}
    return _converted(checkpoint, _names(linear_part).exported(_kept(checkpoint)), model)


def tied_from_deq(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A deq_bert without injection as the weight-tied Euler ode_bert of as many layers as it takes steps.

    A model that solves for its equilibrium becomes ``encoder_layers`` steps towards it.

    Raises:
        ValueError: its cell is not a plain layer; the sentence says why.
    """
    settings = _settings(checkpoint, "deq_bert")
    linear_part = settings.get("deq_linear_part", "none")
    linear = linear_part != "none"
    if linear:
        _require(settings, _LINEAR_CELL, "makes the cell a step of one block")
    else:
        _require(settings, _PLAIN_CELL, "makes the cell a plain layer")
        if settings["deq_cell_norm"] == "pre-norm" and not settings.get("deq_no_final_norm"):
            raise ValueError("the cell ends in a norm inside the map, which a pre-norm block does not have")
    gradient = parse_gradient(settings["deq_gradient"], settings.get("deq_gradient_damping"))
    unrolled = not gradient.needs_equilibrium
    if unrolled and gradient.damping != 1.0:
        raise ValueError(f"deq_gradient_damping is {gradient.damping}: blocks take whole steps")
    if unrolled:
        _require(settings, {"deq_initial_state": "input"}, "is where a block starts")
    model = {
        **_shared(settings, "deq_bert"),
        "_name": "ode_bert",
        "encoder_layers": gradient.steps if unrolled else settings["encoder_layers"],
        "ode_field": settings["deq_cell_norm"],
        "ode_linear_part": linear_part,
        "ode_scheme": "etd1" if linear else "euler",
        "ode_tied": True,
    }
    return _converted(checkpoint, _names(linear_part).imported(_kept(checkpoint)), model)
