"""How far a training has come and how well it uses its devices: tokens to date, and model FLOPs utilisation.

``mfu`` (Chowdhery et al., arXiv 2204.02311, appendix B) is the share, in percent, of the devices' peak that the
operations of the model make up: matrix products of all evaluations that were really spent, forward and backward, and of
the head on the predicted tokens. Unlike there, recomputed evaluations count, for they are a choice of solver here.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from torch import nn

from fairseq_implicit.machine import matrix_product_speed

logger = logging.getLogger(__name__)


class Progress:
    """What a training logs of itself.

    Args:
        peak_tflops: that of one device, 10¹² operations per second; ``None``: measured when the training begins.

    Attributes:
        tokens: seen since update 0; ``None`` where a checkpoint does not say how many came before it.
    """

    def __init__(self, peak_tflops: float | None):
        self._peak = None if peak_tflops is None else 1e12 * peak_tflops
        self.tokens: int | None = None

    def begin(self, model: nn.Module) -> None:
        """Before the first update: measures the peak of the model's device, in the precision of its weights."""
        if self._peak is None:
            weight = next(model.parameters())
            self._peak = matrix_product_speed(weight.device, weight.dtype)
            logger.info(
                f"peak of {weight.device.type} in {str(weight.dtype)[6:]}, of which mfu is the share: "
                f"{self._peak / 1e12:.3g} TFLOP/s measured (--peak-tflops)"
            )

    def log(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        """After an update: logs both.

        Args:
            outputs: what the criterion logged of its batches, or the sums over them and all devices.
        """
        operations = float(sum(output.get("operations", 0.0) for output in outputs))
        if operations and self._peak is not None:
            devices = distributed_utils.get_data_parallel_world_size()
            metrics.log_speed("mfu", 100.0 * operations / (self._peak * devices), priority=95, round=2)
        if self.tokens is not None:
            self.tokens += int(sum(output.get("ntokens", 0) for output in outputs))
            metrics.log_scalar("tokens", self.tokens, weight=0, priority=195)
