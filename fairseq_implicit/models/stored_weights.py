"""Weights of a checkpoint, fitted to the model that they are loaded into."""

import logging
from typing import Dict

from torch import Tensor, nn

from fairseq_implicit.networks.embeddings import Embeddings

logger = logging.getLogger(__name__)


def check_embeddings(network: Embeddings, state_dict: Dict[str, Tensor], prefix: str) -> None:
    """ValueError, one sentence, where a checkpoint has another number of positions, symbols or segments."""
    if f"{prefix}embed_tokens.weight" not in state_dict:
        return
    for table, own, flag, offset in (
        ("embed_positions", network.embed_positions, "--max-positions", network.embeddings.padding + 1),
        ("embed_tokens", network.embed_tokens, "the data's dict.txt", 0),
        ("embed_segments", network.embed_segments, "--segment-types", 0),
    ):
        stored, rows = len(state_dict.get(f"{prefix}{table}.weight", ())), 0 if own is None else len(own.weight)
        if stored != rows:
            if table == "embed_positions" and not (stored and rows):
                flag = "--mixer and --encoder-positions"
            raise ValueError(
                f"the checkpoint has {max(stored - offset, 0)} rows in its {table} and this model "
                f"{max(rows - offset, 0)}: they must agree, see {flag}"
            )


def check_depth(model: nn.Module, state_dict: Dict[str, Tensor]) -> None:
    """ValueError, one sentence, where a checkpoint lacks parameters of a model's depth or has other shapes of them."""
    part = "encoder.depth."
    if not any(name.startswith(part) for name in state_dict):
        return
    own = {name: tuple(weight.shape) for name, weight in model.named_parameters() if name.startswith(part)}
    stored = {name: tuple(state_dict[name].shape) for name in own if name in state_dict}
    other = [name for name in own if stored.get(name) != own[name]]
    if not other:
        return
    there = f"of shape {stored[other[0]]}" if other[0] in stored else "absent"
    raise ValueError(
        f"{other[0]} is {there} in the checkpoint and of shape {own[other[0]]} in this model, and so are "
        f"{len(other) - 1} more weights: it was trained with other layers; open it with its own --mixer, field and "
        "options of these"
    )


def fit_heads(model, state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Fit the classification heads of a checkpoint to a model's.

    Heads the model lacks are registered under ``--load-checkpoint-heads`` and dropped otherwise; heads the checkpoint
    lacks keep their fresh weights.
    """
    heads = model.classification_heads
    found = {key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)}
    for head in sorted(found):
        # A spectral norm stores the projection as ``weight_orig``; a pooler alone has none.
        names = (f"{prefix}{head}.out_proj.{name}" for name in ("weight", "weight_orig"))
        shape = next((tuple(state_dict[name].shape) for name in names if name in state_dict), None)
        if head not in heads and shape is not None and model.args.load_checkpoint_heads:
            model.register_classification_head(head, *shape)
        current = heads[head] if head in heads else None
        if current is None or tuple(current.out_proj.weight.shape) != shape:
            logger.warning("the checkpoint's classification head %s does not fit this model and is left out", head)
            for key in [key for key in state_dict if key.startswith(f"{prefix}{head}.")]:
                del state_dict[key]
    for key, value in heads.state_dict().items():
        state_dict.setdefault(prefix + key, value)
