"""Weights in the files of transformers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
_PICKLED = "pytorch_model.bin"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Of ``model.safetensors``, of its parts, or of ``pytorch_model.bin``.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: one of them is damaged.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif index.is_file():
        names = _parts(index)
    elif (folder / _PICKLED).is_file():
        names = [_PICKLED]
    else:
        raise FileNotFoundError(f"there is no {WEIGHTS} or {_PICKLED} in {folder}")
    found: dict[str, Tensor] = {}
    for name in names:
        found.update(_read(needed(folder / name)))
    return found


def needed(path: Path) -> Path:
    """The path of a file that must be there.

    Raises:
        FileNotFoundError: it is not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or something else in it.
    """
    try:
        found = json.loads(needed(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it holds no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found


def _parts(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} is damaged: it names no files of weights (weight_map)")
    return sorted(set(files.values()))


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.name == _PICKLED:
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # safetensors, zip and pickle have exceptions of their own
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split()[:20])}): copy it anew") from None


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``model.safetensors``.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:  # of the disk, such as one that is full
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from None
