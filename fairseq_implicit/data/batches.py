"""How sequences become a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_implicit.text.vocabulary import PAD


@dataclass(frozen=True)
class Collater:
    """Pads samples on the right and joins them.

    Attributes:
        multiple: pad the length of a batch to a multiple of this …
        longest: … never beyond this.

    Raises:
        ValueError: a multiple below 1.
    """

    multiple: int = 1
    longest: float = math.inf

    def __post_init__(self):
        if self.multiple < 1:
            raise ValueError(f"--pad-to-multiple must be at least 1, not {self.multiple}.")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Joins samples ``{"id": int, "source": (length,)}``, with or without ``"target"`` and ``"segments"``.

        Returns:
            ``{"id": (batch,), "net_input": {"src_tokens": (batch, time), "src_lengths": (batch,), "has_padding": bool,
            "segments": (batch, time)}, "target": (batch, time), "predicted": (targets,), "nsentences": int,
            "ntokens": int}``, without what the samples do not have. ``has_padding`` and the places of the targets among
            all tokens, row by row, are known here on the CPU, so that nobody has to ask the device.
        """
        if not samples:
            return {}
        lengths = [len(sample["source"]) for sample in samples]
        most = max(lengths)
        width = max(most, min(-(-most // self.multiple) * self.multiple, self.longest))

        def rows(name: str, filling: int) -> Tensor:
            return _padded([sample[name] for sample in samples], width, filling)

        batch = {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {
                "src_tokens": rows("source", PAD),
                "src_lengths": torch.tensor(lengths),
                "has_padding": min(lengths) < width,
            },
            "nsentences": len(samples),
            "ntokens": sum(lengths),
        }
        if "segments" in samples[0]:
            batch["net_input"]["segments"] = rows("segments", 0)
        if "target" in samples[0]:
            batch["target"] = rows("target", PAD)
            batch["predicted"] = batch["target"].flatten().ne(PAD).nonzero().squeeze(1)
        return batch


def _padded(sequences: Sequence[Tensor], width: int, filling: int) -> Tensor:
    rows = torch.full((len(sequences), width), filling, dtype=torch.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows
