"""Weights that no weight decay should pull towards zero; fairseq's optimisers are told of no parameter what it is."""

from collections.abc import Iterable

import torch
from fairseq.optim import fp16_optimizer
from torch import nn

from fairseq_implicit.compat.wrapping import wrap

_MARK = "undecayed"  # a Python attribute of a parameter, as fairseq's own ``param_group``


def register() -> None:
    wrap(fp16_optimizer._FP16OptimizerMixin, "build_fp32_params", _build_fp32_params)


def leave_undecayed(parameters: Iterable[nn.Parameter]) -> None:
    """Marks matrices that are no weights of a layer: coefficients per channel, gates, mixtures."""
    for parameter in parameters:
        setattr(parameter, _MARK, True)


def decays(parameter: torch.Tensor) -> bool:
    """Whether weight decay is meant for it: for matrices that are not marked, not for norms, biases and numbers."""
    return parameter.ndim > 1 and _MARK not in vars(parameter)


def _build_fp32_params(original, args, params, flatten=True):
    """The float32 copies of half precision are new parameters: they are of the kind of what they copy."""
    params = list(params)
    copies = original(args, params, flatten)
    if not flatten:
        for parameter, copy in zip(params, copies, strict=True):
            if _MARK in vars(parameter):
                leave_undecayed([copy])
    return copies
