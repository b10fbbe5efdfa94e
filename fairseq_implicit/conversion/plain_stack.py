"""Whether an ode_bert's blocks are its layers: only then is it a model of others, or one iterated layer."""

from collections.abc import Mapping
from typing import Any

#: What makes a block one application of its layer. What a checkpoint does not say has these values.
PLAIN: dict[str, Any] = dict(
    ode_tied=False, ode_steps=1, ode_time=1.0, ode_split=1, ode_tolerance=0.0, ode_corrector="none", ode_history="none",
    rk_norm=False, ode_residual_in_field=False, ode_random_steps=None, ode_random_depth=None, ode_linear_part="none",
)  # fmt: skip


def check(settings: Mapping[str, Any], **required: Any) -> None:
    """Refuse settings of an ode_bert under which a block is more than its layer.

    Args:
        settings: of the checkpoint's model.
        required: further settings, or other values than :data:`PLAIN` has.

    Raises:
        ValueError: naming the setting, its value and the only one possible.
    """
    for name, value in {**PLAIN, **required}.items():
        given = settings.get(name, PLAIN.get(name, value))
        if given != value:
            raise ValueError(f"{name} is {given}, and only {value} makes each block one application of its layer")
    if settings.get("ode_scheme") not in ("euler", "rk1"):
        raise ValueError(f"ode_scheme is {settings.get('ode_scheme')}: only euler applies the layer itself")
