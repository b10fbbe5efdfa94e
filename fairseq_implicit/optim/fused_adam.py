"""``--optimizer fused_adam``: Adam in one pass over the weights, on CPUs and GPUs."""

from dataclasses import dataclass, field

import torch
from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam

from fairseq_implicit.optim.moments import Moments, MomentsConfig, MomentsOptimizer, Weights


@dataclass
class FusedAdamConfig(MomentsConfig):
    coupled_weight_decay: bool = field(
        default=False, metadata={"help": "add the decay to the gradient, before the moments (L2), as Adam had it first"}
    )


class FusedAdam(Moments):
    """fairseq's Adam by torch's fused kernels: the same numbers up to rounding.

    theta <- theta - lr wd theta - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    Decoupled as in arXiv 1711.05101, or coupled, where ``wd theta`` is added to the gradient instead.

    Args:
        coupled: which of the two.
        **options: of :class:`Moments`.
    """

    def __init__(self, params, coupled: bool = False, **options):
        super().__init__(params, **options)
        self.kernel = torch._fused_adam_ if coupled else torch._fused_adamw_

    def update(self, weights: Weights, group, factor) -> None:
        like = weights.means[0]
        number = torch.full((), weights.update, dtype=torch.float32, device=like.device)
        divisor = None
        if torch.is_tensor(factor):
            divisor = factor.to(like.device, torch.float32).reciprocal()
        elif factor != 1.0:
            divisor = torch.full((), 1 / factor, dtype=torch.float32, device=like.device)
        self.kernel(
            *weights[:4],
            [],
            [number] * len(weights.values),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weights.decay,
            # torch adds it to the root of the unbiased moment.
            eps=group["eps"] / (1 - group["betas"][1] ** weights.update) ** 0.5,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )


@register_optimizer("fused_adam", dataclass=FusedAdamConfig)
class FusedAdamOptimizer(MomentsOptimizer):
    """Continues what ``adam`` has begun, and the other way round."""

    name = "fused_adam"
    moments = FusedAdam

    @property
    def optimizer_config(self):
        return dict(super().optimizer_config, coupled=self.cfg.coupled_weight_decay)


# By this name fairseq decides whether a checkpoint's optimiser is the one that goes on.
FusedAdamOptimizer.__name__ = FairseqAdam.__name__
