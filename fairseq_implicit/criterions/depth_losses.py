"""What a depth adds to the loss, under criterions that know nothing of it: fairseq's own, and those of others.

A model returns ``(values, extra)``. ``implicit_masked_lm`` reads the penalties and corrected states in ``extra``; every
other criterion takes the values and drops the rest, so that a weight that was set would have no effect.
"""

from typing import Any, Dict, List, Tuple

from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_implicit.compat.outputs import output_of
from fairseq_implicit.compat.wrapping import wrap
from fairseq_implicit.criterions.implicit_masked_lm import ImplicitMaskedLMCriterion


def register() -> None:
    """Every task of fairseq trains with what the depth adds; calling it again changes nothing."""
    wrap(FairseqTask, "train_step", _train_step)


def _train_step(original, task, sample, model, criterion, *args, **kwargs):
    if not isinstance(criterion, ImplicitMaskedLMCriterion):
        criterion = WithDepthLosses(criterion)
    return original(task, sample, model, criterion, *args, **kwargs)


class WithDepthLosses:
    """A criterion and what the depth of the model adds to its loss.

    Penalties are per unit of the criterion's sample size, so they are multiplied by it. A corrected state is judged by
    the criterion itself, which is called again with the state's output in place of the model's. The criterion's own
    log stays what it is, so that losses compare between models; penalties are logged beside it.

    Args:
        criterion: returns ``(loss, sample size, logging output)`` of a model and a batch.
    """

    def __init__(self, criterion):
        self.criterion = criterion

    def __call__(self, model: nn.Module, sample: Dict[str, Any]) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """The criterion's values with the enlarged loss.

        Raises:
            ValueError: corrected states, and a criterion that calls the model more than once.
        """
        returned: List[Any] = []
        hook = model.register_forward_hook(lambda module, inputs, output: returned.append(output))
        try:
            loss, sample_size, logging_output = self.criterion(model, sample)
        finally:
            hook.remove()
        outputs = [output for each in returned if (output := output_of(each)) is not None]
        for output in outputs:
            for name, penalty in output.penalties.items():
                # One that calls the model twice, on noisy inputs say, pays once.
                loss = loss + sample_size * penalty / len(outputs)
                metrics.log_scalar(name, penalty.detach(), priority=50, round=5)
            for weight, values in output.auxiliary:
                if len(outputs) > 1:
                    raise ValueError(
                        f"{type(self.criterion).__name__} calls the model {len(outputs)} times in an update, and which "
                        "of them the corrected evaluations belong to is not known: leave --deq-correction out"
                    )
                loss = loss + weight * self.criterion(_Replay(model, values), sample)[0]
        return loss, sample_size, logging_output


class _Replay:
    """A model that returns given values and is otherwise the model."""

    def __init__(self, model: nn.Module, values: Tensor):
        self._model = model
        self._values = values

    def __call__(self, *args, **kwargs):
        return self._values, {}

    def __getattr__(self, name: str):
        return getattr(self._model, name)
