"""The loss of predicted tokens, with the statistics, penalties and auxiliary states that a depth reports."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from fairseq_implicit.compat.outputs import output_of
from fairseq_implicit.compat.reports import keep_out_of_text_bars
from fairseq_implicit.networks.cross_entropy import cross_entropy_and_correct
from fairseq_implicit.networks.output import ModelOutput

# Keys of the logging output with a meaning of their own. Every other key is a statistic or penalty: summed over
# batches, and divided by the number of batches when it is reported.
_RESERVED = ("loss", "ntokens", "nsentences", "sample_size", "correct", "batches", "auxiliary_loss", "operations")
#: Keys of losses at other depths than the model's own, which follow.
DEPTH_LOSS = "loss_depth_"
_SHOWN = 8  # statistics that a line of text has room for; all of them go to TensorBoard and JSON


@dataclass
class ImplicitMaskedLMCriterionConfig(FairseqDataclass):
    pass


@register_criterion("implicit_masked_lm", dataclass=ImplicitMaskedLMCriterionConfig)
class ImplicitMaskedLMCriterion(FairseqCriterion):
    """Cross entropy of the tokens to predict, as fairseq's ``masked_lm`` computes and logs it, and what a depth adds.

    Whatever the objective made a target is predicted. Of a :class:`ModelOutput` the penalties, per token to predict,
    and the auxiliary logits enter the loss that is minimised but not the logged ``loss`` and ``ppl``, which so stay
    comparable between models; statistics are only logged. Other models of fairseq have none of these.
    """

    def __init__(self, cfg: ImplicitMaskedLMCriterionConfig, task):
        super().__init__(task)

    def forward(self, model, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, Tensor, Dict[str, Any]]:
        """Loss of one batch.

        Args:
            model: fairseq model that takes ``masked_tokens`` (``(batch, time)`` bool, or None for all); where the batch
                knows them, their places as ``predicted``, too.
            sample: batch of the task.
            reduce: ignored, the loss is always summed.

        Returns:
            loss in nats, summed over masked tokens; their number; and the logging output.
        """
        target = sample["target"]
        masked = target.ne(self.padding_idx)
        sample_size = masked.sum()
        predicted = sample.get("predicted")
        if predicted is not None and len(predicted):
            returned = model(**sample["net_input"], masked_tokens=masked, predicted=predicted)
            target = target.flatten().index_select(0, predicted)
        else:
            read = self._read_positions(masked)
            returned = model(**sample["net_input"], masked_tokens=read)
            target = target.reshape(-1) if read is None else target[read]
        output = output_of(returned) or ModelOutput(returned[0])
        cross_entropy, correct = cross_entropy_and_correct(output.values, target, self.padding_idx)
        loss = cross_entropy
        logging_output = {
            "loss": cross_entropy.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["nsentences"],
            "sample_size": sample_size,
            "correct": correct,
            "batches": 1,
        }
        if self.training:
            logging_output["operations"] = output.operations
        if output.auxiliary:
            weighted = sum(
                weight * cross_entropy_and_correct(logits, target, self.padding_idx)[0]
                for weight, logits in output.auxiliary
            )
            loss = loss + weighted
            logging_output["auxiliary_loss"] = weighted.detach()
        for name, penalty in output.penalties.items():
            loss = loss + sample_size * penalty
            _log(logging_output, name, penalty)
        for name, statistic in output.statistics.items():
            _log(logging_output, name, statistic)
        return loss, sample_size, logging_output

    @staticmethod
    def _read_positions(masked: Tensor) -> Optional[Tensor]:
        """Positions for the LM head, ``(batch, time)`` bool; all of them when nothing in the batch is masked."""
        if masked.device.type == "cpu":
            return masked if masked.any() else None
        return masked | ~masked.any()  # the same without waiting for the device

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Logs the averages over all batches and workers, reading from the device once."""
        if not logging_outputs:
            return
        names = list(logging_outputs[0])
        totals = _to_numbers([sum(log.get(name, 0) for log in logging_outputs) for name in names])
        sums = dict(zip(names, totals, strict=True))
        sample_size = sums["sample_size"]
        tokens = max(sample_size, 1)
        metrics.log_scalar("loss", sums["loss"] / tokens / math.log(2), sample_size, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["loss"].avg))
        metrics.log_scalar("accuracy", 100.0 * sums["correct"] / tokens, sample_size, priority=21, round=2)
        if "auxiliary_loss" in sums:
            value = sums["auxiliary_loss"] / tokens / math.log(2)
            metrics.log_scalar("auxiliary_loss", value, sample_size, priority=22, round=3)
        at_depths = [name for name in names if name.startswith(DEPTH_LOSS)]
        for name in at_depths:
            metrics.log_scalar(name, sums[name] / tokens / math.log(2), sample_size, round=3)
        statistics = [name for name in names if name not in (*_RESERVED, *at_depths)]
        keep_out_of_text_bars(_details(statistics))
        batches = sums["batches"]
        for name in statistics:
            metrics.log_scalar(name, sums[name] / max(batches, 1), batches, priority=50, round=5)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _log(logging_output: Dict[str, Any], name: str, value) -> None:
    if name in logging_output or name in _RESERVED:
        raise ValueError(f"the depth reports a statistic or penalty named {name!r}, which is taken: rename it.")
    logging_output[name] = value.detach() if torch.is_tensor(value) else float(value)


def _details(statistics: List[str]) -> List[str]:
    """Statistics that a line of text leaves out: those of single blocks (``/`` in the name) and all beyond eight."""
    if len(statistics) <= _SHOWN:
        return []
    of_the_whole = [name for name in statistics if "/" not in name]
    return [name for name in statistics if name not in of_the_whole[:_SHOWN]]


def _to_numbers(values: List[Any]) -> List[float]:
    """Numbers and 0-dim tensors as floats, with one transfer for all tensors of a device."""
    numbers = [None if torch.is_tensor(value) else float(value) for value in values]
    for device in {value.device for value in values if torch.is_tensor(value)}:
        places = [i for i, value in enumerate(values) if torch.is_tensor(value) and value.device == device]
        for place, number in zip(
            places, torch.stack([values[i].detach().double() for i in places]).tolist(), strict=True
        ):
            numbers[place] = number
    return numbers
