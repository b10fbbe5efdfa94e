"""The pretraining dataset: blocks of text, masked anew in every epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_implicit.data.blocks import BlockIndex
from fairseq_implicit.data.masking import Masking
from fairseq_implicit.text.token_files import MappedTokens


def _padded(sequences: Sequence[torch.Tensor], width: int, pad: int) -> torch.Tensor:
    """Sequences as rows ``(batch, width)`` int64, padded on the right."""
    rows = torch.full((len(sequences), width), pad, dtype=torch.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows


def _batch(samples: list[dict[str, Any]], width: int, pad: int) -> dict[str, Any]:
    """What every batch holds of its samples' sources: see :meth:`MaskedBlockDataset.collater`."""
    lengths = [len(sample["source"]) for sample in samples]
    return {
        "id": torch.tensor([sample["id"] for sample in samples]),
        "net_input": {
            "src_tokens": _padded([sample["source"] for sample in samples], width, pad),
            "src_lengths": torch.tensor(lengths),
            "has_padding": min(lengths) < width,
        },
        "nsentences": len(samples),
        "ntokens": sum(lengths),
    }


class MaskedBlockDataset(FairseqDataset):
    """Blocks of one or more binarised files, each preceded by ``<s>`` and masked.

    Everything random depends on ``(seed, epoch, index)`` alone: on no worker, rank or order of access. The dataset
    holds arrays and paths only, so that it can be sent to worker processes by any start method.

    Args:
        files: the token files of the split.
        indices: the blocks of each file.
        masking: how to mask.
        max_length: longest sequence with its ``<s>``.
        seed: seed of masks and order.
        fixed: masks and order of the first epoch in every epoch (validation and test).
        pad_to_multiple: pad the length of a batch to a multiple of this (never beyond ``max_length``).
        share_epoch: keep the epoch in shared memory, so that it reaches worker processes that outlive an epoch.
    """

    def __init__(
        self,
        files: Sequence[MappedTokens],
        indices: Sequence[BlockIndex],
        masking: Masking,
        max_length: int,
        seed: int = 1,
        fixed: bool = False,
        pad_to_multiple: int = 1,
        share_epoch: bool = False,
    ):
        super().__init__()
        if pad_to_multiple < 1:
            raise ValueError(f"--pad-to-multiple must be at least 1, not {pad_to_multiple}.")
        self.files = list(files)
        self.starts = np.concatenate([index.starts for index in indices])
        lengths = np.concatenate([index.lengths for index in indices])
        self.sizes = lengths.astype(np.int32) + 1
        self.first_of_file = np.cumsum([0] + [len(index) for index in indices])
        self.masking = masking
        self.max_length = max_length
        self.seed = seed
        self.fixed = fixed
        self.pad_to_multiple = pad_to_multiple
        self._epoch = torch.ones(1, dtype=torch.int64)
        if share_epoch:
            self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.starts)

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

    def tokens(self, index: int) -> np.ndarray:
        """The unmasked sequence of a block with its ``<s>``, ``(length,)`` int64.

        Raises:
            ValueError: it holds an id that the dictionary does not have.
        """
        file = int(np.searchsorted(self.first_of_file, index, side="right")) - 1
        text = self.files[file].slice(int(self.starts[index]), int(self.sizes[index]) - 1)
        largest = int(text.max())
        if largest >= self.masking.vocabulary or (text == self.masking.mask).any():
            raise ValueError(
                f"{self.files[file].prefix}.bin holds the id {max(largest, self.masking.mask)}, which is no token of "
                f"the dictionary ({self.masking.vocabulary} symbols with <mask>): the data was binarised with "
                "another dict.txt."
            )
        return np.append(self.masking.bos, text)

    def pieces_per_word(self, blocks: int = 64) -> float:
        """Mean number of pieces of a word in blocks drawn evenly from all; the masking selects words."""
        counts = [self.masking.words(self.tokens(i)) for i in range(0, len(self), max(1, len(self) // blocks))]
        tokens, words = np.sum(counts, axis=0)
        return float(tokens / max(words, 1))

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, self.epoch, int(index)])
        source, target = self.masking.apply(self.tokens(index), rng)
        return {"id": int(index), "source": torch.from_numpy(source), "target": torch.from_numpy(target)}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Joins samples into a batch.

        Returns:
            ``{"id": (batch,), "net_input": {"src_tokens": (batch, time), "src_lengths": (batch,), "has_padding":
            bool}, "target": (batch, time), "nsentences": int, "ntokens": int}``. ``has_padding`` is known here on the
            CPU, so that no model has to ask the device.
        """
        if not samples:
            return {}
        longest = max(len(sample["source"]) for sample in samples)
        multiple = self.pad_to_multiple
        width = max(longest, min(-(-longest // multiple) * multiple, self.max_length))
        batch = _batch(samples, width, self.masking.pad)
        batch["target"] = _padded([sample["target"] for sample in samples], width, self.masking.pad)
        return batch

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices].astype(np.int64)

    def ordered_indices(self) -> np.ndarray:
        """All indices, shorter blocks first, in a random order among blocks of equal length, ``(blocks,)`` int64."""
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, self.epoch])
        shuffled = rng.permutation(len(self))
        return shuffled[np.argsort(self.sizes[shuffled], kind="stable")]


class InferenceDataset(FairseqDataset):
    """Encoded sequences, unmasked: what ``build_dataset_for_inference`` returns.

    Args:
        sequences: ids with ``</s>``, without ``<s>``, each ``(length,)``.
        pad, bos: ids.
        sort: order by length.
    """

    def __init__(self, sequences: Sequence[torch.Tensor], pad: int, bos: int, sort: bool = True):
        super().__init__()
        self.sequences = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
        self.sizes = np.array([len(sequence) + 1 for sequence in self.sequences], dtype=np.int64)
        self.pad = pad
        self.bos = bos
        self.sort = sort

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence = self.sequences[index]
        return {"id": int(index), "source": torch.cat([sequence.new_tensor([self.bos]), sequence])}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        if not samples:
            return {}
        return _batch(samples, max(len(sample["source"]) for sample in samples), self.pad)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def ordered_indices(self) -> np.ndarray:
        return np.argsort(self.sizes, kind="stable") if self.sort else np.arange(len(self))
