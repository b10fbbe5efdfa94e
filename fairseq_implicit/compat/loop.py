"""What fairseq's training loop does anew in every update, where a small model waits for it."""

import omegaconf
import torch
from fairseq.trainer import Trainer

from fairseq_implicit.compat.wrapping import wrap


def register() -> None:
    wrap(Trainer, "_set_seed", _set_seed)
    wrap(omegaconf.DictConfig, "__getattr__", _read)


def _set_seed(original, trainer: Trainer) -> None:
    """Seeds the generators of the devices in use.

    ``torch.manual_seed`` asks each kind of accelerator that is not there to remember the seed, with the stack of the
    call as text, in a list that grows with every update.
    """
    if trainer.tpu:
        original(trainer)
        return
    seed = trainer.cfg.common.seed + trainer.get_num_updates()
    torch.default_generator.manual_seed(seed)
    if trainer.cuda:
        torch.cuda.manual_seed(seed)


def _read(original, config: omegaconf.DictConfig, key: str):
    """A field that holds a plain value, without the rules for all others, which cost ten times as much.

    The loop reads some fifty fields in each update.
    """
    content = config.__dict__["_content"]
    if type(content) is dict:
        node = content.get(key)
        value = None if node is None else node.__dict__.get("_val")
        if type(value) in (bool, int, float):
            return value
        if type(node) is omegaconf.DictConfig and type(node.__dict__["_content"]) is dict:
            return node
    return original(config, key)
