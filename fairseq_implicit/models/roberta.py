"""fairseq RoBERTa checkpoints as ode_bert: Euler on the post-norm field is the same function."""

import re
from typing import Any, Dict, List

import torch
from torch import Tensor

_EMBEDDINGS = {
    "embed_tokens": "embed_tokens",
    "embed_positions": "embed_positions",
    "layernorm_embedding": "layernorm_embedding",
    "emb_layer_norm": "layernorm_embedding",
    "layer_norm": "depth.final_norm",
}
_LAYER = {
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "attention_norm",
    "fc1": "feed_forward.fc1",
    "fc2": "feed_forward.fc2",
    "final_layer_norm": "feed_forward_norm",
}
_HEADS = re.compile(r"(?:encoder\.lm_head|classification_heads)\.")


def state_dict_from_roberta(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Rename a fairseq RoBERTa state dict, post-norm or pre-norm, to ode_bert's names.

    Separate query, key and value projections are stacked into the fused one.

    Raises:
        ValueError: a weight that a RoBERTa encoder does not have, so that nothing is dropped unseen.
    """
    converted: Dict[str, Tensor] = {}
    projections: Dict[str, List[Tensor]] = {}
    for key, value in state_dict.items():
        name = re.sub(r"^decoder\.", "encoder.", key)
        if _HEADS.match(name):
            converted[name] = value
            continue
        match = re.fullmatch(r"encoder\.sentence_encoder\.(.+)", name)
        rest = match.group(1) if match else ""
        if rest == "version":
            continue
        layer = re.fullmatch(r"layers\.(\d+)\.(.+?)\.?(weight|bias)", rest)
        if layer is not None:
            block, part, kind = layer.groups()
            target = f"encoder.depth.fields.{block}."
            fused = f"{target}attention.qkv.{kind}"
            if part == "self_attn.in_proj_":
                converted[fused] = value
                continue
            if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                slots = projections.setdefault(fused, [None, None, None])
                slots["qkv".index(part[len("self_attn.")])] = value
                continue
            if part in _LAYER:
                converted[f"{target}{_LAYER[part]}.{kind}"] = value
                continue
        plain = re.fullmatch(r"(\w+)\.(weight|bias)", rest)
        if plain is None or plain.group(1) not in _EMBEDDINGS:
            raise ValueError(f"{key} is not a weight of a RoBERTa encoder: this state dict cannot become an ode_bert")
        converted[f"encoder.{_EMBEDDINGS[plain.group(1)]}.{plain.group(2)}"] = value
    for fused, parts in projections.items():
        if any(part is None for part in parts):
            raise ValueError(f"{fused} needs the query, key and value projections, and one of them is missing")
        converted[fused] = torch.cat(parts)
    return converted


def checkpoint_from_roberta(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """Convert a whole checkpoint: weights, and the model's configuration for hub, validation and fine-tuning.

    The optimiser's state is left out (its parameters have other shapes): continue with ``--finetune-from-model`` or
    ``--restore-file … --reset-optimizer``.

    Args:
        checkpoint: as fairseq's ``load_checkpoint_to_cpu`` returns it.

    Raises:
        ValueError: not a RoBERTa checkpoint.
    """
    stored = checkpoint["cfg"]["model"]
    source = vars(stored) if not hasattr(stored, "keys") else {key: stored[key] for key in stored.keys()}
    if "encoder_layers" not in source:
        raise ValueError(
            f"the checkpoint holds a {source.get('_name') or source.get('arch')} model, not a RoBERTa encoder"
        )
    kept = (
        "encoder_layers",
        "encoder_embed_dim",
        "encoder_ffn_embed_dim",
        "encoder_attention_heads",
        "activation_fn",
        "pooler_activation_fn",
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "pooler_dropout",
        "max_positions",
        "untie_weights_roberta",
        "spectral_norm_classification_head",
    )
    model = {name: source[name] for name in kept if name in source}
    model.update(
        _name="ode_bert",
        ode_field="pre-norm" if source.get("encoder_normalize_before") else "post-norm",
        ode_scheme="euler",
        no_layernorm_embedding=not source.get("layernorm_embedding", True),
    )
    return {
        **checkpoint,
        "args": None,  # published checkpoints have these flags of RoBERTa, which fairseq would prefer to cfg
        "cfg": {**checkpoint["cfg"], "model": model},
        "model": state_dict_from_roberta(checkpoint["model"]),
        "last_optimizer_state": None,
    }
