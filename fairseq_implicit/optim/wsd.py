"""``--lr-scheduler wsd``: warm-up, a long stable stretch, and a short decay."""

import math
from dataclasses import dataclass, field
from typing import List, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II


@dataclass
class WsdConfig(FairseqDataclass):
    warmup_updates: int = field(default=0, metadata={"help": "updates in which the learning rate rises linearly"})
    decay_updates: Optional[int] = field(
        default=None, metadata={"help": "updates, the last ones, in which it falls (default: --decay-share of all)"}
    )
    decay_share: float = field(default=0.1, metadata={"help": "share of all updates in which it falls"})
    end_learning_rate: float = field(default=0.0, metadata={"help": "learning rate after the last update"})
    total_num_update: Optional[int] = field(
        default=None, metadata={"help": "number of the update at which the decay ends (default: --max-update)"}
    )
    max_update: int = II("optimization.max_update")
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("wsd", dataclass=WsdConfig)
class WarmupStableDecay(FairseqLRScheduler):
    """Hägele et al., arXiv 2405.18392, equation 1 and the form of decay "1-sqrt", after ``n`` of ``N`` updates:

    lr n / W                                      n < W, the warm-up
    lr                                            up to N - D
    end + (lr - end) (1 - sqrt((n - N + D) / D))  the decay, and ``end`` from N on

    Depends on ``n`` alone: a checkpoint of the stable stretch goes on with any other N.

    Raises:
        ValueError: there is no end, or warm-up and decay do not fit before it.
    """

    def __init__(self, cfg: WsdConfig, optimizer: FairseqOptimizer):
        super().__init__(cfg, optimizer)
        if len(cfg.lr) > 1:
            raise ValueError("--lr-scheduler wsd takes one --lr: several are for --lr-scheduler fixed.")
        self.total = total = cfg.max_update if cfg.total_num_update is None else cfg.total_num_update
        if total <= 0:
            raise ValueError("--lr-scheduler wsd ends with the training: give --max-update or --total-num-update.")
        if not 0 <= cfg.decay_share <= 1:
            raise ValueError(f"--decay-share must lie between 0 and 1, not {cfg.decay_share}.")
        if cfg.warmup_updates < 0 or (cfg.decay_updates or 0) < 0:
            raise ValueError("--warmup-updates and --decay-updates must not be negative.")
        self.decay = round(cfg.decay_share * total) if cfg.decay_updates is None else cfg.decay_updates
        if cfg.warmup_updates + self.decay > total:
            raise ValueError(
                f"--warmup-updates {cfg.warmup_updates} and {self.decay} updates of decay do not fit into {total} "
                "updates: shorten one of them, the decay with --decay-updates."
            )
        self.step_update(0)

    def step_update(self, num_updates: int) -> float:
        """Sets the learning rate of the update after ``num_updates``."""
        self.optimizer.set_lr(self._rate(num_updates))
        return self.optimizer.get_lr()

    def step_begin_epoch(self, epoch: int) -> float:
        return self.optimizer.get_lr()

    def _rate(self, n: int) -> float:
        cfg, peak = self.cfg, self.cfg.lr[0]
        if n >= self.total:
            return cfg.end_learning_rate
        if n < cfg.warmup_updates:
            return peak * n / cfg.warmup_updates
        elapsed = n - (self.total - self.decay)
        if elapsed <= 0:
            return peak
        return cfg.end_learning_rate + (peak - cfg.end_learning_rate) * (1 - math.sqrt(elapsed / self.decay))
