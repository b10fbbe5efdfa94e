"""Sequences as fairseq asks for them: by index, with their lengths, in an order, joined into batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_implicit.data.batches import Collater
from fairseq_implicit.data.blocks import Blocks
from fairseq_implicit.data.objectives.objective import Objective
from fairseq_implicit.text.vocabulary import BOS


class _Sequences(FairseqDataset):
    """What both datasets below have.

    Attributes:
        sizes: tokens of each sequence, ``(sequences,)``.
    """

    def __init__(self, sizes: np.ndarray, collater: Collater):
        super().__init__()
        self.sizes = sizes
        self._collater = collater

    def __len__(self) -> int:
        return len(self.sizes)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return self._collater(samples)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    num_tokens = size

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices].astype(np.int64)


class BlockDataset(_Sequences):
    """Blocks of text and what is to be predicted of them, anew in every epoch.

    Everything random depends on ``(seed, epoch, index)`` alone: on no worker, rank or order of access. The dataset
    holds arrays and paths only, so that it can be sent to worker processes by any start method.

    Args:
        blocks: the text.
        objective: what is to be predicted.
        collater: joins samples.
        seed: seed of the objective's draws and of the order.
        fixed: those of the first epoch in every epoch (validation and test).
        share_epoch: keep the epoch in shared memory, so that it reaches worker processes that outlive an epoch.
    """

    def __init__(
        self,
        blocks: Blocks,
        objective: Objective,
        collater: Collater,
        seed: int = 1,
        fixed: bool = False,
        share_epoch: bool = False,
    ):
        super().__init__(blocks.sizes, collater)
        self.blocks = blocks
        self.objective = objective
        self.seed = seed
        self.fixed = fixed
        self._epoch = torch.ones(1, dtype=torch.int64)
        if share_epoch:
            self._epoch.share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        if not self.fixed:
            self._epoch.fill_(epoch)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        # Training batches are composed anew in every epoch, so fairseq must ask for them again.
        return self.fixed

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"id": int}`` and the parts of the objective's sample, each ``(length,)`` int64."""
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, self.epoch, int(index)])
        parts = vars(self.objective(self.blocks[index], rng)).items()
        # An objective may return views, of negative strides even, which torch does not take.
        tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts if part is not None}
        return {"id": int(index), **tensors}

    def ordered_indices(self) -> np.ndarray:
        """All indices, shorter blocks first, in a random order among blocks of equal length, ``(blocks,)`` int64."""
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, self.epoch])
        shuffled = rng.permutation(len(self))
        return shuffled[np.argsort(self.sizes[shuffled], kind="stable")]


class InferenceDataset(_Sequences):
    """Encoded sequences as they are: what ``build_dataset_for_inference`` returns.

    Args:
        sequences: ids with ``</s>``, without ``<s>``, each ``(length,)``.
        sort: order by length.
    """

    def __init__(self, sequences: Sequence[torch.Tensor], sort: bool = True):
        self.sequences = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
        super().__init__(np.array([len(sequence) + 1 for sequence in self.sequences], dtype=np.int64), Collater())
        self.sort = sort

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence = self.sequences[index]
        return {"id": int(index), "source": torch.cat([sequence.new_tensor([BOS]), sequence])}

    def ordered_indices(self) -> np.ndarray:
        return np.argsort(self.sizes, kind="stable") if self.sort else np.arange(len(self))
