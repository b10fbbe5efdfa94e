"""Checkpoints: read with torch's ``weights_only``, written whole, resumed exactly, changed only by names they have."""

import argparse
import collections
import dataclasses
import difflib
import logging
import math
import os
import pickle
import re
import typing
import zipfile

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.distributed.utils import _TensorPlaceholder
from fairseq.file_io import PathManager
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.optim import fp16_optimizer
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fairseq_implicit.compat.wrapping import wrap

logger = logging.getLogger(__name__)

#: Where the state of a half-precision optimiser keeps the float32 weights that it really updates.
MASTERS = "float32_masters"


def register() -> None:
    torch.serialization.add_safe_globals(safe_globals())
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", _load_checkpoint_to_cpu)
    wrap(checkpoint_utils, "save_checkpoint", _save_checkpoint)
    wrap(PathManager, "copy", _copy)
    wrap(fp16_optimizer._FP16OptimizerMixin, "state_dict", _state_with_masters)
    wrap(fp16_optimizer._FP16OptimizerMixin, "load_state_dict", _load_masters)


def safe_globals() -> list:
    """What a checkpoint of this plugin may hold besides tensors and plain containers; all of it is inert data.

    torch ≥ 2.6 refuses to unpickle anything else. Needed by: legacy fairseq components (``Namespace``), numpy scores
    as the best validation metric, and fairseq's broadcast of the loaded state to the other ranks, which is a second
    ``torch.load`` (``omegaconf`` containers, ``_TensorPlaceholder``).
    """
    from numpy._core import multiarray

    return [
        argparse.Namespace,
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        omegaconf.nodes.AnyNode,
        typing.Any,
        dict,
        list,
        int,
        collections.defaultdict,
        _TensorPlaceholder,
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
        np.dtypes.Int32DType,
        np.dtypes.BoolDType,
        multiarray.scalar,
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


def _load_checkpoint_to_cpu(original, path, arg_overrides=None, *args, **kwargs):
    try:
        state = original(path, None, *args, **kwargs)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not found and not zipfile.is_zipfile(path):
            raise _no_checkpoint(path, "it has another format") from None
        what = f"the type {found.group(1)}" if found else "objects"
        raise ValueError(
            f"checkpoint {path} holds {what} outside the safe list of fairseq_implicit.compat.checkpoints, which "
            "could run code on loading: if you trust the file, allow the type with "
            "torch.serialization.add_safe_globals before loading."
        ) from None
    except (AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError, UnicodeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, OmegaConfBaseException)) or "alloc" in str(error):
            raise
        raise _no_checkpoint(path, _reason(error)) from None
    except zipfile.BadZipFile as error:
        raise _no_checkpoint(path, str(error)) from None
    except OSError as error:  # of a file that is there torch's reader says no more than that an argument is invalid
        if error.filename is not None or not os.path.isfile(path):
            raise
        raise _no_checkpoint(path, "it ends too early") from None
    if arg_overrides:
        override(state, arg_overrides, path)
    return state


def _reason(error: Exception) -> str:
    sentence = (str(error) or "it ends too early").splitlines()[0]
    if "weights_only" in sentence:  # torch advises to do without its protection, which no unknown file deserves
        return "it has another format"
    if isinstance(error, EOFError) or re.search("archive|zip|corrupt|Invalid magic", sentence):
        return sentence
    return "it does not hold what fairseq saves"  # or bytes that happen to start like a pickle


def _no_checkpoint(path: str, reason: str) -> ValueError:
    return ValueError(
        f"checkpoint {path} is truncated or is no checkpoint ({reason}): take another one of its folder, in a "
        "training with --restore-file."
    )


# --- overrides --------------------------------------------------------------------------------------------------------


def override(state: dict[str, typing.Any], overrides: dict[str, typing.Any], path: str) -> None:
    """Change fields of a loaded checkpoint's configuration, in place.

    fairseq changes those that it finds by their name and drops the others in silence: misspelt ones, and ones that are
    younger than the checkpoint.

    Args:
        state: as :func:`fairseq.checkpoint_utils.load_checkpoint_to_cpu` returns it.
        overrides: field → value, from ``--model-overrides``, further flags or ``from_pretrained``.
        path: of the checkpoint, for the sentence.

    Raises:
        ValueError: a name that no part of fairseq or of this model has.
    """
    legacy, cfg = state.get("args"), state.get("cfg")
    if legacy is not None:
        for name, value in overrides.items():
            setattr(legacy, name, value)
    if cfg is None:
        return
    fields = {part: _fields_of(cfg, part) for part in ("model", "task", *REGISTRIES)}
    if fields["model"]:  # the configuration of a legacy model is a Namespace, which takes any name
        known = set().union(_names(cfg), *fields.values(), _names_of_fairseq())
        for name in sorted(set(overrides) - known):
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{name!r} is no field of the {cfg.model._name} in {path}, nor of its task or of fairseq, so that "
                f"overriding it would change nothing{f': {close[0]!r} is one' if close else ''}."
            )
    for part, names in fields.items():
        for name in names & set(overrides):
            if name not in cfg[part]:
                with open_dict(cfg[part]):
                    cfg[part][name] = overrides[name]
    overwrite_args_by_name(cfg, overrides)


def _fields_of(cfg: DictConfig, part: str) -> set[str]:
    """The fields that the component ``part`` of a configuration has today, or none where it is no dataclass."""
    registries = {"model": MODEL_DATACLASS_REGISTRY, "task": TASK_DATACLASS_REGISTRY}
    registry = registries[part] if part in registries else REGISTRIES[part]["dataclass_registry"]
    chosen = cfg.get(part)
    component = registry.get(chosen.get("_name")) if isinstance(chosen, DictConfig) else None
    return set() if component is None else {field.name for field in dataclasses.fields(component)}


def _names(cfg: DictConfig) -> set[str]:
    """All keys of a configuration and of the configurations in it."""
    inner = (OmegaConf.is_missing(cfg, key) or cfg._get_node(key) for key in cfg)
    return set(cfg).union(*(_names(node) for node in inner if isinstance(node, DictConfig) and not node._is_none()))


def _names_of_fairseq() -> set[str]:
    """What fairseq's commands and hub pass as overrides whether or not the checkpoint has a place for it."""
    names = {"arch", "generation_args", "is_vocoder"}
    for group in dataclasses.fields(FairseqConfig):
        names.add(group.name)
        if dataclasses.is_dataclass(group.type):
            names.update(field.name for field in dataclasses.fields(group.type))
    for registry in REGISTRIES.values():
        for component in registry["dataclass_registry"].values():
            names.update(field.name for field in dataclasses.fields(component))
    return names


# --- writing ----------------------------------------------------------------------------------------------------------


def _save_checkpoint(original, cfg, trainer, epoch_itr, val_loss):
    """A validation that gave no number, such as the correlation of constant predictions, is no candidate for the best.

    fairseq would remember it as the best, which every later one then beats, and overwrite the best checkpoint.
    """
    if val_loss is not None and math.isnan(val_loss):
        logger.warning(f"the validation {cfg.best_checkpoint_metric} is not a number: checkpoint_best.pt stays")
        val_loss = None
    return original(cfg, trainer, epoch_itr, val_loss)


def _copy(original, src_path, dst_path, overwrite=False):
    """Gives a checkpoint a second name, so that the destination is whole at every moment.

    fairseq writes one checkpoint and copies it to ``checkpoint_last.pt``. A process that is killed during that copy
    would leave a truncated file under the one name that a restart looks for, and a disk that is full by then would
    leave none. fairseq never writes into an existing file, so a second link to the same one serves, for no space.
    """
    if "://" in dst_path or not overwrite:
        return original(src_path, dst_path, overwrite)
    partial = dst_path + ".tmp"
    if os.path.lexists(partial):
        os.remove(partial)
    try:
        os.link(src_path, partial)
        copied = True
    except OSError:  # a file system without links
        copied = original(src_path, partial, True)
    os.replace(partial, dst_path)
    if os.path.lexists(partial):  # renaming a file to another link of itself does nothing
        os.remove(partial)
    return copied


# --- half precision ---------------------------------------------------------------------------------------------------


def _masters(optimizer) -> list[torch.Tensor]:
    """The float32 weights of fairseq's half-precision optimiser, flat or one by one."""
    weights = optimizer.fp32_params
    return list(weights.values()) if isinstance(weights, dict) else list(weights)


def _state_with_masters(original, optimizer):
    """fairseq saves the rounded weights only: a resumed run would start from other ones than the run had."""
    state = original(optimizer)
    state[MASTERS] = [weights.detach() for weights in _masters(optimizer)]
    return state


def _load_masters(original, optimizer, state, *args, **kwargs):
    state = dict(state)
    saved = state.pop(MASTERS, None)
    original(optimizer, state, *args, **kwargs)
    masters = _masters(optimizer)
    if saved is None:
        logger.warning(
            "the checkpoint holds no float32 weights, as older ones do not: training goes on from the rounded ones"
        )
        return
    stored, wanted = (sum(weights.numel() for weights in some) for some in (saved, masters))
    if stored != wanted:
        raise ValueError(
            f"the optimizer's state in the checkpoint has {stored:,} float32 weights and this model {wanted:,}: start "
            "it anew with --reset-optimizer"
        )
    # Flat or not may differ from the run that saved them: their order is that of the parameters in both.
    everything = torch.cat([weights.flatten().to(masters[0]) for weights in saved])
    with torch.no_grad():
        for weights, values in zip(masters, everything.split([weights.numel() for weights in masters]), strict=True):
            weights.copy_(values.view_as(weights))
