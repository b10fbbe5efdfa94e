"""transformers' ModernBERT in float64 throughout: its own rotary positions round queries and keys to float32."""

import torch
from torch import nn
from transformers import ModernBertConfig
from transformers.models.modernbert import modeling_modernbert


class Rotary(nn.Module):
    """The same angles in the precision of the state."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config

    def forward(self, x, positions, kind):
        base, width = self.config.rope_parameters[kind]["rope_theta"], x.shape[-1] // self.config.num_attention_heads
        planes = torch.arange(0, width, 2, dtype=x.dtype)
        angles = positions[..., None].to(x.dtype) / base ** (planes / width)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def turned(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(each * cos + modeling_modernbert.rotate_half(each) * sin for each in (q, k))


def exact(model, monkeypatch):
    """The model in float64, for as long as ``monkeypatch`` lasts."""
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", turned)
    for module in model.modules():
        if isinstance(module, modeling_modernbert.ModernBertModel):
            module.rotary_emb = Rotary(model.config)
    return model.double()
