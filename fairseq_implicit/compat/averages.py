"""``--store-ema``: whole numbers have no average."""

import torch
from fairseq.models.ema import EMA

from fairseq_implicit.compat.wrapping import wrap


def register() -> None:
    wrap(EMA, "__init__", _copy_counters)


def _copy_counters(original, ema, model, config, device=None, skip_keys=None):
    """Counters are copied, where fairseq would fail in the attempt to average them."""
    counters = {
        name
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not value.is_floating_point()
    }
    original(ema, model, config, device, counters.union(skip_keys or ()))
