"""``--optimizer stable_adam``: AdamW whose updates are clipped, tensor by tensor, where the gradient outruns v."""

import torch
from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam

from fairseq_implicit.optim.moments import Moments, MomentsConfig, MomentsOptimizer, Weights


class StableAdam(Moments):
    """StableAdamW, arXiv 2304.13013, algorithm 2, with the unbiased moments m and v:

    RMS = sqrt(mean(g^2 / max(v, eps^2)))        of each tensor
    eta = lr / max(1, RMS)
    theta <- theta - eta wd theta - eta m / (sqrt(v) + eps)

    A second moment that lags behind a sudden large gradient would give steps many times too long; Adafactor's clipping
    shortens them, which takes the place of a clipped norm of the gradient.
    """

    needs_shapes = True

    def update(self, weights: Weights, group, factor) -> None:
        values, gradients, means, squares, update, decay = weights
        first, second = group["betas"]
        if torch.is_tensor(factor) or factor != 1.0:
            torch._foreach_mul_(gradients, factor.to(means[0].device) if torch.is_tensor(factor) else factor)
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - second**update) ** 0.5)
        ratios = torch._foreach_norm(torch._foreach_div(gradients, torch._foreach_clamp_min(roots, group["eps"])))
        sizes = torch.stack([ratio / value.numel() ** 0.5 for ratio, value in zip(ratios, values, strict=True)])
        rates = (group["lr"] / sizes.clamp(min=1)).unbind()
        if decay:
            torch._foreach_mul_(values, [1 - decay * rate for rate in rates])
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(means, roots)
        torch._foreach_mul_(steps, list(rates))
        torch._foreach_add_(values, steps, alpha=-1 / (1 - first**update))


@register_optimizer("stable_adam", dataclass=MomentsConfig)
class StableAdamOptimizer(MomentsOptimizer):
    """Continues what ``adam`` or ``fused_adam`` has begun, and the other way round."""

    name = "stable_adam"
    moments = StableAdam


# By this name fairseq decides whether a checkpoint's optimiser is the one that goes on.
StableAdamOptimizer.__name__ = FairseqAdam.__name__
