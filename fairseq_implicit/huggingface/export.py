"""Folders that transformers opens, written from trained models and read back."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fairseq_implicit.conversion.table import Table
from fairseq_implicit.huggingface import CONFIGURATIONS
from fairseq_implicit.huggingface.bundle import auto_map, bundle
from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.model_card import model_card
from fairseq_implicit.huggingface.modeling import auto_classes, family_class
from fairseq_implicit.huggingface.tokenization import CONVERSIONS

WEIGHTS = "model.safetensors"
_LM_HEAD, _TOKENS = "encoder.lm_head.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class TrainedModel:
    """A model as fairseq has it, without fairseq.

    Attributes:
        config: of the model, the name of its classification head included.
        weights: under fairseq's names, of at most that one head.
        files: what the vocabulary was made from (``dict.txt`` and a tokenizer's files): name -> contents.
        tokenizer: of the vocabulary; ``None``: the folder gets none.
        facts: of its training and cost, in words, for the model card.
    """

    config: ImplicitBertConfig
    weights: Mapping[str, Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerFast | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def _names(head: str) -> Table:
    return Table(
        "model of transformers",
        {"encoder.{rest}": "model.encoder.{rest}", f"classification_heads.{head}.{{rest}}": "classifier.{rest}"},
    )


def write_folder(model: TrainedModel, folder: str | Path, bundled: bool = True) -> None:
    """Write a folder that ``from_pretrained`` opens. It is whole under its name, or not there.

    Args:
        model: what to write.
        folder: must not exist.
        bundled: put the code of the family beside the weights, so that neither this package nor fairseq is needed
            (``trust_remote_code=True``).

    Raises:
        FileExistsError: the folder is there.
        ValueError: the weights are not those of the configuration.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it or choose another name")
    config, kind = model.config, type(model.config)
    weights = {name: weight.detach().contiguous().clone() for name, weight in _exported(model).items()}
    classifies = any(name.startswith("classifier.") for name in weights)
    auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForMaskedLM"
    _check(config, auto, weights)
    config.architectures = [auto_classes(kind)[auto]]
    vars(config).pop("auto_map", None)
    if bundled:
        config.auto_map = auto_map(kind)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        config.save_pretrained(part)
        save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
        for name, contents in model.files.items():
            (part / name).write_bytes(contents)
        if model.tokenizer is not None:
            # After the files, of which a tokenizer.json may be one, whose ids are not those of the rows.
            model.tokenizer.save_pretrained(part)
        for name, text in (bundle(kind) if bundled else {}).items():
            (part / name).write_text(text, encoding="utf-8")
        card = model_card(config, model.facts, bundled, classifies)
        (part / "README.md").write_text(card, encoding="utf-8")
        os.rename(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _shared(config: ImplicitBertConfig) -> dict[str, str]:
    """The further names of weights that layers have in common, with the first: a file holds them once."""
    with torch.device("meta"):
        shared = config.encoder(head=False).shared_weights()
    return {f"encoder.{name}": f"encoder.{first}" for name, first in shared.items()}


def _exported(model: TrainedModel) -> dict[str, Tensor]:
    weights = dict(model.weights)
    if model.config.tie_word_embeddings:
        weights.pop(_LM_HEAD, None)
    for name in _shared(model.config):
        weights.pop(name, None)
    return _names(model.config.classification_head).exported(weights)


def _check(config: ImplicitBertConfig, auto: str, weights: Mapping[str, Tensor]) -> None:
    """ValueError where a model of that configuration has other weights."""
    with torch.device("meta"):
        network = family_class(type(config), auto)(config)
        # A classifier has no head of masked tokens, but the file keeps it for whoever asks for that.
        known = network.state_dict() | family_class(type(config), "AutoModelForMaskedLM")(config).state_dict()
    if config.tie_word_embeddings:
        del known[f"model.{_LM_HEAD}"]
    for name in _shared(config):
        del known[f"model.{name}"]
    for name in sorted(known.keys() | weights.keys()):
        shapes = [tuple(some[name].shape) if name in some else None for some in (weights, known)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the weight {name} has the shape {shapes[0]}, and the model of these options {shapes[1]}")


def read_folder(folder: str | Path) -> TrainedModel:
    """Read such a folder, also one that transformers has saved anew.

    Raises:
        FileNotFoundError: no configuration or no weights in safetensors' format.
        ValueError: another model, or one without the head of masked tokens, which every model of fairseq's has.
    """
    source = Path(folder)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {source}")
    found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found not in CONFIGURATIONS:
        raise ValueError(f"{source} holds a model of the type {found!r}: choose one of {', '.join(CONFIGURATIONS)}")
    config = CONFIGURATIONS[found].from_pretrained(source)
    theirs = _stored(source)
    if "model.encoder.lm_head.dense.weight" not in theirs:
        raise ValueError(f"{source} has no head of masked tokens, which fairseq's {found} needs: save it with its head")
    weights = _names(config.classification_head).imported(theirs)
    if config.tie_word_embeddings:
        weights.setdefault(_LM_HEAD, weights[_TOKENS])
    weights.update({name: weights[first] for name, first in _shared(config).items()})
    names = ["dict.txt", *itertools.chain.from_iterable(CONVERSIONS)]
    files = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source) if (source / "tokenizer.json").is_file() else None
    return TrainedModel(config, weights, files, tokenizer)


def _stored(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {folder}")
        weights.update(load_file(folder / name))
    return weights
