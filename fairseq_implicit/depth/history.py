"""Mixtures of earlier layers' outputs along the depth.

The history is a list that travels with the state: nothing is kept on a module between calls, so a forward pass can be
recomputed, exported or run twice at once.

    x_l = Σ_{k ≤ l} W[l, k] LN_k(out_k),     out_0 = the embedding, out_k = output of block k

Sources: DLCL, arXiv 1906.01787; PCformer, arXiv 2411.03042.
"""

import torch
from torch import Tensor, nn

from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.solvers.coefficients import normalise


class LayerHistory(nn.Module):
    """Dynamic linear combination of layers.

    Every row of the lower-triangular ``W`` starts as the plain mean of what it mixes.

    Args:
        blocks: number of blocks; the history grows to ``blocks + 1`` entries.
        dim: width of the state.
        norm: of the entries.
        normalise_embedding: give entry 0 a norm as well.
    """

    def __init__(self, blocks: int, dim: int, norm: NormConfig, normalise_embedding: bool = True):
        super().__init__()
        entries = blocks + 1
        rows = torch.arange(1, entries + 1, dtype=torch.float32).unsqueeze(1)
        self.mixture = nn.Parameter(torch.ones(entries, entries).tril() / rows)
        self.norms = nn.ModuleList(
            norm.build(dim) if k > 0 or normalise_embedding else nn.Identity() for k in range(entries)
        )

    def entry(self, k: int, output: Tensor) -> Tensor:
        """What the history keeps of block ``k``'s output (0: the embedding) ``(batch, time, dim)``."""
        norm = self.norms[k]
        return normalise(norm, output) if isinstance(norm, nn.LayerNorm) else output

    def mix(self, entries: list[Tensor]) -> Tensor:
        """The state after the last of ``entries``, each ``(batch, time, dim)``."""
        row = self.mixture[len(entries) - 1].to(entries[0].dtype)
        mixed = row[0] * entries[0]
        for k in range(1, len(entries)):
            mixed = torch.addcmul(mixed, entries[k], row[k])
        return mixed
