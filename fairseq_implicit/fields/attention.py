"""Multi-head self-attention with one fused projection, batch first."""

from typing import Callable, Optional

from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.shared_dropout import ReplayedGenerator, check_policy, check_rate

#: ``attend(z, injection=None) -> (batch, time, dim)``
Attend = Callable[..., Tensor]


class MultiHeadAttention(nn.Module):
    """Self-attention (Vaswani et al. 2017, §3.2) through torch's scaled_dot_product_attention.

    Args:
        dim: width of the state; must be a multiple of ``heads``.
        heads: number of heads.
        dropout: rate on the attention probabilities.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).

    Raises:
        ValueError: ``heads`` does not divide ``dim``, or a rate or policy is impossible.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, dropout_policy: str = "shared"):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"the number of attention heads must divide the width: {heads} heads, width {dim}")
        self.heads = heads
        self.dropout = check_rate("attention dropout", dropout)
        self.dropout_policy = check_policy(dropout_policy)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def prepare(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Attend:
        """Fix one solve's key mask and noise.

        Args:
            x: ``(batch, time, dim)``.
            padding_mask: ``(batch, time)`` bool, True at padding, or ``None``.

        Returns:
            ``attend(z, injection=None)``; ``injection``, ``(batch, time, 3 dim)``, is added to the projected q, k, v.
        """
        visible = None if padding_mask is None else padding_mask.logical_not()[:, None, None, :]
        rate = self.dropout if self.training else 0.0
        replay = ReplayedGenerator(x.device) if rate > 0.0 and self.dropout_policy == "shared" else None

        def attend(z: Tensor, injection: Optional[Tensor] = None) -> Tensor:
            batch, time, dim = z.shape
            projected = self.qkv(z)
            if injection is not None:
                projected = projected + injection
            q, k, v = projected.view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            if replay is None:
                mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=rate)
            else:
                with replay:
                    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=rate)
            return self.out(mixed.transpose(1, 2).reshape(batch, time, dim))

        return attend
