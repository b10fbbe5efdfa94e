"""Whether an ode_bert's blocks are its layers: only then is it a model of others, or one iterated layer."""

from collections.abc import Mapping
from typing import Any

from fairseq_implicit.conversion.misfits import refuse

#: What makes a block one application of its layer. What a checkpoint does not say has these values.
PLAIN: dict[str, Any] = dict(
    ode_tied=False, ode_steps=1, ode_time=1.0, ode_split=1, ode_tolerance=0.0, ode_corrector="none", ode_history="none",
    rk_norm=False, ode_residual_in_field=False, ode_random_steps=None, ode_linear_part="none",
)  # fmt: skip


def misfits(settings: Mapping[str, Any], **required: Any) -> list[str]:
    """What in the settings of an ode_bert makes a block more than its layer, or another layer: a sentence each.

    Args:
        settings: of the checkpoint's model.
        required: further settings, or other values than :data:`PLAIN` has. What is not said has the required value.
    """
    found = []
    for name, value in {**PLAIN, **required}.items():
        given = settings.get(name, PLAIN.get(name, value))
        if given != value:
            found.append(f"{name} is {given}, and only {value} makes each block one application of its layer")
    if settings.get("ode_scheme") not in ("euler", "rk1"):
        found.append(f"ode_scheme is {settings.get('ode_scheme')}: only euler applies the layer itself")
    return found


def check(settings: Mapping[str, Any], **required: Any) -> None:
    """Refuse such settings.

    Raises:
        ValueError: naming every setting, its value and the only one possible.
    """
    refuse(misfits(settings, **required))
