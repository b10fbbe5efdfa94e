"""Weight-tied ode_bert and deq_bert are one cell read two ways: L steps of it, or its fixed point.

The bridge is exact where the cell is the same: one post-norm or pre-norm layer, Euler steps of size 1, the embedding
as the start and no injection. The converted model takes the same L steps (``bptt-L``) and so has the same loss; whether
those steps have an equilibrium is another question, which ``--model-overrides "{'deq_gradient': 'ift'}"`` asks.
"""

import dataclasses
from typing import Any, Dict

from torch import Tensor

from fairseq_implicit.models.config import ImplicitBertConfig
from fairseq_implicit.models.deq_bert import DeqBertConfig
from fairseq_implicit.models.ode_bert import DEFAULT_SCHEME, OdeBertConfig
from fairseq_implicit.solvers.gradients.names import parse_gradient

_SHARED = tuple(field.name for field in dataclasses.fields(ImplicitBertConfig))
_LAYER = {"ode": "encoder.depth.fields.0.", "deq": "encoder.depth.cell.layers.0."}
_NORM = {"ode": "encoder.depth.final_norm.", "deq": "encoder.depth.output_norm."}


def _rename(weights: Dict[str, Tensor], source: str, target: str) -> Dict[str, Tensor]:
    renamed = {}
    for name, weight in weights.items():
        if name.startswith(("encoder.depth.combinations.", "encoder.depth.updates.")):
            continue
        for prefixes in (_LAYER, _NORM):
            if name.startswith(prefixes[source]):
                name = prefixes[target] + name[len(prefixes[source]) :]
        renamed[name] = weight
    return renamed


def _converted(checkpoint: Dict[str, Any], source: str, target: str, model: Dict[str, Any]) -> Dict[str, Any]:
    weights = _rename(checkpoint["model"], source, target)
    # The optimiser's state goes by the order of the parameters, which is another one.
    found = {**checkpoint, "model": weights, "last_optimizer_state": None}
    found["cfg"] = {**checkpoint["cfg"], "model": model}
    return found


def _settings(checkpoint: Dict[str, Any], family: str, config) -> Dict[str, Any]:
    stored = checkpoint["cfg"]["model"]
    name = stored["_name"]
    if not name.startswith(family):
        raise ValueError(f"the checkpoint holds {name}, not {family}")
    return {
        field.name: stored[field.name] if field.name in stored else field.default
        for field in dataclasses.fields(config)
        if field.name in stored or field.default is not dataclasses.MISSING
    }


def deq_from_tied(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """A weight-tied Euler ode_bert as the deq_bert that takes the same steps.

    Args:
        checkpoint: as fairseq's ``load_checkpoint_to_cpu`` returns it.

    Raises:
        ValueError: its cell is not that of any deq_bert; the sentence says why.
    """
    settings = _settings(checkpoint, "ode_bert", OdeBertConfig)
    required = dict(
        ode_tied=True, ode_steps=1, ode_time=1.0, ode_split=1, ode_tolerance=0.0, ode_corrector="none",
        ode_history="none", rk_norm=False, ode_residual_in_field=False, ode_random_steps=None,
    )  # fmt: skip
    for name, value in required.items():
        if settings[name] != value:
            raise ValueError(f"{name} is {settings[name]}, and only {value} makes the blocks one iterated layer")
    if (settings["ode_scheme"] or DEFAULT_SCHEME) not in ("euler", "rk1"):
        raise ValueError(
            f"ode_scheme is {settings['ode_scheme'] or DEFAULT_SCHEME}: only euler iterates the layer itself"
        )
    if settings["ode_field"] not in ("post-norm", "pre-norm"):
        raise ValueError(f"ode_field is {settings['ode_field']}, and an equilibrium cell is post-norm or pre-norm")
    model = {name: settings[name] for name in _SHARED if name in settings}
    model.update(
        _name="deq_bert",
        deq_cell_norm=settings["ode_field"],
        deq_no_final_norm=settings["ode_field"] == "pre-norm",
        deq_injection="none",
        deq_initial_state="input",
        deq_gradient=f"bptt-{settings['encoder_layers']}",
    )
    return _converted(checkpoint, "ode", "deq", model)


def tied_from_deq(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """A deq_bert without injection as the weight-tied Euler ode_bert of as many layers as it takes steps.

    A model that solves for its equilibrium becomes ``encoder_layers`` steps towards it.

    Raises:
        ValueError: its cell is not a plain layer; the sentence says why.
    """
    settings = _settings(checkpoint, "deq_bert", DeqBertConfig)
    required = dict(
        deq_injection="none", deq_qkv_injection=False, deq_initial_state="input", deq_cell_layers=1,
        deq_prelude_layers=0, deq_coda_layers=0, deq_weight_norm=False,
    )  # fmt: skip
    for name, value in required.items():
        if settings[name] != value:
            raise ValueError(f"{name} is {settings[name]}, and only {value} makes the cell a plain layer")
    if settings["deq_cell_norm"] == "pre-norm" and not settings["deq_no_final_norm"]:
        raise ValueError("the cell ends in a norm inside the map, which a pre-norm block does not have")
    gradient = parse_gradient(settings["deq_gradient"], settings["deq_gradient_damping"])
    unrolled = not gradient.needs_equilibrium
    if unrolled and gradient.damping != 1.0:
        raise ValueError(f"deq_gradient_damping is {settings['deq_gradient_damping']}: blocks take whole steps")
    model = {name: settings[name] for name in _SHARED if name in settings}
    model.update(
        _name="ode_bert",
        encoder_layers=gradient.steps if unrolled else settings["encoder_layers"],
        ode_field=settings["deq_cell_norm"],
        ode_scheme="euler",
        ode_tied=True,
    )
    return _converted(checkpoint, "deq", "ode", model)
