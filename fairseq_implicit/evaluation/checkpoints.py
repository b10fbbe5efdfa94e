"""Checkpoint files: opened as a model on a data folder, and written whole."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

import fairseq_implicit.models  # noqa: F401  (registers models, task and criterion)


class Opened(NamedTuple):
    """A model in evaluation mode and on its device, its configuration and its task."""

    model: Any
    cfg: Any
    task: Any


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        yield
    except UnicodeError as error:
        raise _unopened(path, error) from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged or foreign file ends in whatever fairseq stumbles over first
        raise _unopened(path, error) from None


def _unopened(path: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).split(". ")[0]  # torch goes on with advice to load it unsafely
    return ValueError(
        f"checkpoint {path} cannot be opened ({type(error).__name__}: {reason}): is it whole, and of this project?"
    )


def write(checkpoint: dict[str, Any], path: str) -> None:
    """Writes a checkpoint that is whole under its name or not there.

    Raises:
        OSError: it cannot be written, in one sentence.
    """
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        if os.path.isfile(part):
            os.remove(part)
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def of_weights(
    model: Mapping[str, Any], weights: Mapping[str, torch.Tensor], folder: str, **extra_state: Any
) -> dict[str, Any]:
    """A checkpoint of weights that come from elsewhere; fairseq, the hub and fine-tuning open it.

    Args:
        model: the configuration, ``_name`` and ``max_positions`` included.
        weights: as the model's state dict names them.
        folder: where it will lie, beside the vocabulary's files.
        extra_state: what else it is to remember.
    """
    cfg = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), resolve=False, enum_to_str=True)
    cfg["model"] = dict(model)
    cfg["task"] = {
        "_name": "implicit_masked_lm",
        "data": folder,
        "tokens_per_sample": model["max_positions"],
        "seed": 1,
    }
    cfg["criterion"] = {"_name": "implicit_masked_lm"}
    history = {
        "criterion_name": "ImplicitMaskedLMCriterion",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    epoch = {"epoch": 1, "val_loss": None, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}
    return {
        "args": None,
        "cfg": cfg,
        "model": dict(weights),
        "optimizer_history": [history],
        "last_optimizer_state": None,
        "extra_state": {**epoch, **extra_state},
        "task_state": {},
    }


def stored(path: str) -> dict[str, Any]:
    """What a checkpoint file holds, the settings of its model included.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds no model of fairseq's.
    """
    with _opening(path):
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        model_name(state), state["model"]
        return state


def model_name(checkpoint: dict[str, Any]) -> str:
    """Which model a checkpoint holds: its registered name, or the --arch of a legacy one, which has nothing else."""
    model = checkpoint["cfg"]["model"]
    return model.arch if isinstance(model, argparse.Namespace) else model["_name"]


def open_checkpoint(path: str, data: str, device: str = "cpu", **overrides: Any) -> Opened:
    """The model of a checkpoint, with ``overrides`` of its settings, on data folder ``data``.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint or data, or it cannot be opened so.
    """
    with _opening(path):
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [path], arg_overrides={"data": data, **overrides}
        )
    return Opened(models[0].to(device).eval(), cfg, task)
