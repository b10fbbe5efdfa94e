"""The clock of schedules: how many updates a network has seen in its whole life."""

import torch
from torch import nn


class UpdateCount(nn.Module):
    """Updates since pretraining began, through resuming and into fine-tuning.

    fairseq tells every module its update with ``set_num_updates``. A run that starts from a checkpoint with a new
    optimiser (``--finetune-from-model``, ``--restore-file … --reset-optimizer``) starts again from 0, and a warm-up
    that is driven by that number (unrolled iterations before implicit gradients, say) would be entered a second time
    by a network that has long left it. Whoever owns such a schedule holds an ``UpdateCount`` and reads ``value``::

        self.updates = UpdateCount()          # fairseq finds it and sets it
        ...
        if self.updates.value < self.warmup_updates: ...

    The buffer ``earlier`` (int64, part of the state dict) holds the updates of earlier runs. A number that goes back
    marks the beginning of a new run. A state dict without the buffer loads as 0. The buffer may be copied into or
    replaced by whatever restores weights: it is read again when that has happened, and only then, because reading it
    waits for the device.
    """

    earlier: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("earlier", torch.zeros((), dtype=torch.int64))
        self._current = 0
        self._seen = None  # the buffer, its version and its number when it was last read

    @property
    def value(self) -> int:
        return self._read() + self._current

    def _read(self) -> int:
        buffer = self.earlier
        # Tensors made under inference mode count no versions.
        version = None if buffer.is_inference() else buffer._version
        if self._seen is None or self._seen[0] is not buffer or self._seen[1] != version or version is None:
            self._seen = buffer, version, int(buffer.item())
        return self._seen[2]

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every update, and with the checkpoint's number before weights are loaded."""
        if num_updates < self._current:
            self.earlier = torch.full_like(self.earlier, self.value - num_updates)
        self._current = num_updates

    @torch.no_grad()
    def reach(self, updates: int) -> None:
        """Set the count, and let the buffer hold all of it: for a training whose weights carry the number alone.

        No device is waited for.
        """
        self._current = 0
        if self._seen is None or self.value != updates:
            self.earlier.fill_(updates)
            self._seen = self.earlier, self.earlier._version, updates

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.setdefault(prefix + "earlier", torch.zeros((), dtype=torch.int64))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state):
        # A copy's buffer counts its versions anew.
        super().__setstate__({**state, "_seen": None})
