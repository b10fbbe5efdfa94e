"""The command line of the ODE-Transformer's own code (arXiv 2203.09176), in this project's terms."""

from collections.abc import Sequence
from typing import NamedTuple, Optional


class OriginalFlags(NamedTuple):
    """What the ODE-Transformer's flags say, in this project's terms."""

    scheme: str
    coefficients: str
    start: str
    scope: str


def from_original_flags(
    enc_calculate_num: int,
    rk_type: str = "standard",
    enc_learnable_type: Optional[str] = None,
    alpha_type: Optional[str] = None,
) -> OriginalFlags:
    """Map ``--enc-calculate-num``, ``--rk-type``, ``--enc-learnable-type`` and ``--alpha-type``.

    As in the ODE-Transformer's code, one set of coefficients or one gate serves the whole encoder. The third stage of
    order 3 is Kutta's, not the original's (whose wrong index leaves order 2).

    Raises:
        ValueError: an unknown value or a contradiction, in one sentence.
    """
    schemes = {1: "euler", 2: "heun2", 3: "kutta3", 4: "rk4"}
    if enc_calculate_num not in schemes:
        raise ValueError(f"--enc-calculate-num {enc_calculate_num} has no scheme; choose 1, 2, 3 or 4")
    _check_choice("--rk-type", rk_type, ("standard", "learnable", "initialization"))
    _check_choice("--enc-learnable-type", enc_learnable_type, (None, "gated", "ema"))
    _check_choice("--alpha-type", alpha_type, (None, "scalar", "vector"))
    if enc_learnable_type is not None and rk_type != "learnable":
        raise ValueError(
            f"--enc-learnable-type {enc_learnable_type} contradicts --rk-type {rk_type}; it needs --rk-type learnable"
        )
    if alpha_type is not None and enc_learnable_type != "ema":
        raise ValueError(f"--alpha-type {alpha_type} is the shape of the EMA's α; it needs --enc-learnable-type ema")
    if enc_calculate_num == 1 and rk_type != "standard":
        raise ValueError(f"--rk-type {rk_type} combines several evaluations; it needs --enc-calculate-num 2, 3 or 4")
    scheme = schemes[enc_calculate_num]
    if rk_type == "standard":
        return OriginalFlags(scheme, "fixed", "tableau", "block")
    if rk_type == "initialization":
        return OriginalFlags(scheme, "learned", "ones", "model")
    if enc_learnable_type == "ema":
        return OriginalFlags(scheme, "ema", "tableau", "channel" if alpha_type == "vector" else "model")
    return OriginalFlags(scheme, "gated", "tableau", "model")


def _check_choice(flag: str, value: Optional[str], choices: Sequence[Optional[str]]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} {value} is not one of {', '.join(choice for choice in choices if choice)}")
