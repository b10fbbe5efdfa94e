"""Folders that transformers opens, written from trained models and read back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fairseq_implicit.conversion.table import Table
from fairseq_implicit.conversion.weight_files import read_json, read_weights, write_weights
from fairseq_implicit.huggingface import CONFIGURATIONS
from fairseq_implicit.huggingface.bundle import auto_map, bundle
from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.model_card import model_card
from fairseq_implicit.huggingface.modeling import auto_classes, family_class
from fairseq_implicit.huggingface.tokenization import CONVERSIONS
from fairseq_implicit.networks.initialisation import initialise
from fairseq_implicit.new_folder import new_folder

_LM_HEAD, _TOKENS = "encoder.lm_head.weight", "encoder.embed_tokens.weight"
_HEAD = "encoder.lm_head."


@dataclass(frozen=True)
class TrainedModel:
    """A model as fairseq has it, without fairseq.

    Attributes:
        config: of the model, the name of its classification head included.
        weights: under fairseq's names, of at most that one head.
        files: what the vocabulary was made from (``dict.txt`` and a tokenizer's files): name -> contents.
        tokenizer: of the vocabulary; ``None``: the folder gets none.
        facts: of its training and cost, in words, for the model card.
        left_out: the classification heads that the checkpoint has beside that one.
        untrained: names of weights that fairseq's model has and nobody trained; a folder does not get them.
    """

    config: ImplicitBertConfig
    weights: Mapping[str, Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerFast | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()


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
    config, kind = model.config, type(model.config)
    weights = {name: weight.detach().contiguous().clone() for name, weight in _exported(model).items()}
    auto = _auto_class(weights)
    _check(config, weights)
    config.architectures = [auto_classes(kind)[auto]]
    vars(config).pop("auto_map", None)
    if bundled:
        config.auto_map = auto_map(kind)
    with new_folder(Path(folder)) as part:
        config.save_pretrained(part)
        write_weights(weights, part)
        for name, contents in model.files.items():
            (part / name).write_bytes(contents)
        if model.tokenizer is not None:
            # After the files, of which a tokenizer.json may be one, whose ids are not those of the rows.
            model.tokenizer.save_pretrained(part)
        for name, text in (bundle(kind) if bundled else {}).items():
            (part / name).write_text(text, encoding="utf-8")
        card = model_card(config, auto, model.facts, bundled)
        (part / "README.md").write_text(card, encoding="utf-8")


def _shared(config: ImplicitBertConfig) -> dict[str, str]:
    """The further names of weights that layers have in common, with the first: a file holds them once."""
    with torch.device("meta"):
        shared = config.encoder(head=False).shared_weights()
    return {f"encoder.{name}": f"encoder.{first}" for name, first in shared.items()}


def _exported(model: TrainedModel) -> dict[str, Tensor]:
    weights = {name: weight for name, weight in model.weights.items() if name not in model.untrained}
    if model.config.tie_word_embeddings:
        weights.pop(_LM_HEAD, None)
    for name in _shared(model.config):
        weights.pop(name, None)
    return _names(model.config.classification_head).exported(weights)


def _auto_class(weights: Mapping[str, Tensor]) -> str:
    """By the head that they hold."""
    if any(name.startswith("classifier.") for name in weights):
        return "AutoModelForSequenceClassification"
    return "AutoModelForMaskedLM" if f"model.{_HEAD}bias" in weights else "AutoModel"


def _check(config: ImplicitBertConfig, weights: Mapping[str, Tensor]) -> None:
    """ValueError where a model of that configuration has other weights."""
    auto = _auto_class(weights)
    with torch.device("meta"):
        known = family_class(type(config), auto)(config).state_dict()
        if auto == "AutoModel":
            known = {f"model.{name}": weight for name, weight in known.items()}
        elif f"model.{_HEAD}bias" in weights:
            # A classifier has no head of masked tokens, but the file keeps it for whoever asks for that.
            known |= family_class(type(config), "AutoModelForMaskedLM")(config).state_dict()
    if config.tie_word_embeddings:
        known.pop(f"model.{_LM_HEAD}", None)
    for name in _shared(config):
        known.pop(f"model.{name}", None)
    for name in sorted(known.keys() | weights.keys()):
        shapes = [tuple(some[name].shape) if name in some else None for some in (weights, known)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the weight {name} has the shape {shapes[0]}, and the model of these options {shapes[1]}")


def read_folder(folder: str | Path) -> TrainedModel:
    """Read such a folder, also one that transformers has saved anew, with a head or without.

    Every model of fairseq's has a head of masked tokens. Where the folder has none it is as a fresh model's.

    Raises:
        FileNotFoundError: no configuration or no weights.
        ValueError: another model or head, or a damaged file.
    """
    source = Path(folder)
    found = read_json(source / "config.json").get("model_type")
    if found not in CONFIGURATIONS:
        raise ValueError(
            f"{source} holds a model of the type {found!r}, and not {', '.join(CONFIGURATIONS)}: "
            "models of others are for `fairseq-implicit convert`"
        )
    config = CONFIGURATIONS[found].from_pretrained(source)
    theirs = read_weights(source)
    if not any(name.startswith("model.") for name in theirs):  # saved without a head, and without a name before it
        theirs = {f"model.{name}": weight for name, weight in theirs.items()}
    try:
        weights = _names(config.classification_head).imported(theirs)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    fresh = _fresh_head(config) if f"{_HEAD}dense.weight" not in weights else {}
    weights.update(fresh)
    copies = {**_shared(config), **({_LM_HEAD: _TOKENS} if config.tie_word_embeddings else {})}
    weights.update({name: weights[first] for name, first in copies.items() if first in weights})
    names = ["dict.txt", *itertools.chain.from_iterable(CONVERSIONS)]
    files = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    tokenizer = _tokenizer(source) if (source / "tokenizer.json").is_file() else None
    model = TrainedModel(config, weights, files, tokenizer, untrained=tuple(fresh))
    try:
        _check(config, _exported(model))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return model


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of tokenizers, which has no kind of its own
        raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None


def _fresh_head(config: ImplicitBertConfig) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = config.encoder(head=True)
        initialise(encoder, config.options().initialisation())
    own = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    return {name: weight for name, weight in own.items() if name.startswith(_HEAD)}
