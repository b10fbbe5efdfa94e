"""A network's output as fairseq's criterions and hub take it, and back."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fairseq_implicit.networks.output import ModelOutput


def for_fairseq(output: ModelOutput) -> tuple[Tensor, dict[str, Any]]:
    """The values, and beside the ``output`` itself RoBERTa's ``inner_states``, each ``(time, batch, dim)``, and
    the content ``lambdas``."""
    states = output.hidden_states
    inner_states = None if states is None else [state.transpose(0, 1) for state in states]
    return output.values, {"inner_states": inner_states, "lambdas": output.lambdas, "output": output}


def output_of(returned: Any) -> ModelOutput | None:
    """The typed output in what a fairseq model returned; None when the model is none of this package."""
    match returned:
        # Data parallelism may have wrapped the values since, and the loss's gradient must pass there.
        case (values, {"output": ModelOutput() as output}):
            return replace(output, values=values)
    return None
