"""Checkpoints of fairseq as folders of transformers, and back."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fairseq_implicit.data.byte_pairs import TOKENIZERS
from fairseq_implicit.evaluation.checkpoints import of_weights, stored
from fairseq_implicit.huggingface import CONFIGURATIONS
from fairseq_implicit.huggingface.export import TrainedModel
from fairseq_implicit.huggingface.tokenization import fast_tokenizer
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.hub_interface import ImplicitBertHubInterface, find_vocabulary
from fairseq_implicit.text.vocabulary import MASK, SPECIAL_SYMBOLS

_HEADS = "classification_heads."


def family_of(model: ImplicitBertModel) -> str:
    """``ode_bert`` of a model of that family, a preset's, too."""
    return next(name for name, config in CONFIGURATIONS.items() if isinstance(model.args, config.options_class))


def trained_model(path: str, data: str | None = None, head: str | None = None) -> TrainedModel:
    """What a checkpoint holds, in evaluation mode and float32.

    Args:
        path: of the checkpoint.
        data: folder of its dictionary and tokenizer, where they are not beside it.
        head: the classification head to keep; may be left out where there is only one.

    Raises:
        FileNotFoundError: no checkpoint, dictionary or tokenizer.
        ValueError: another model, no such head, or several and none named.
    """
    hub = ImplicitBertModel.from_pretrained(os.path.dirname(path) or os.curdir, os.path.basename(path), data)
    model, dictionary = hub.model, hub.dictionary
    depth = model.encoder.depth
    # fairseq keeps the number of updates beside the weights, and transformers has no other place for it than these.
    depth.count_updates(depth.updates_seen)
    head = _head_of(model, head)
    kept = f"{_HEADS}{head}."
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith(_HEADS)}
    options: dict[str, Any] = {}
    if head is not None:
        weights.update({name: weight for name, weight in model.state_dict().items() if name.startswith(kept)})
        layers = model.classification_heads[head]
        options["classification_head"] = head
        options["classifier_inner_dim"] = layers.dense.out_features
        options.update(_labels(hub, layers.out_proj.out_features))
    family = CONFIGURATIONS[family_of(model)]
    names = [item.name for item in dataclasses.fields(family.options_class)]
    config = family(
        **{name: _plain(getattr(model.args, name)) for name in names},
        **options,
        vocab_size=len(dictionary),
        bos_token_id=dictionary.bos(),
        pad_token_id=dictionary.pad(),
        eos_token_id=dictionary.eos(),
        mask_token_id=dictionary.index(MASK),
    )
    files = dict(hub.vocabulary.contents)
    files["dict.txt"] = _dictionary_file(find_vocabulary(path, data).folder).read_bytes()
    tokenizer = fast_tokenizer(hub.vocabulary, model.max_positions(), segments=model.args.segment_types > 1)
    return TrainedModel(
        config,
        weights,
        files,
        tokenizer,
        _facts(path, model),
        left_out=tuple(name for name in model.classification_heads if name != head),
        untrained=tuple((stored(path).get("extra_state") or {}).get("not_of_transformers", ())),
    )


def _head_of(model: ImplicitBertModel, head: str | None) -> str | None:
    heads = list(model.classification_heads)
    if head is None and len(heads) > 1:
        raise ValueError(f"the checkpoint has the heads {', '.join(heads)}, and a folder one: choose it with --head")
    if head is not None and head not in heads:
        raise ValueError(f"the checkpoint has no classification head {head!r} (it has: {', '.join(heads) or 'none'})")
    return head or next(iter(heads), None)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _labels(hub: ImplicitBertHubInterface, classes: int) -> dict[str, Any]:
    """How many classes the head has, and their names, which the data folder of a fine-tuning has."""
    task = hub.task.cfg
    if classes == 1:
        return {"num_labels": 1, "problem_type": "regression"}
    file = Path(str(task.get("data", "")).split(os.pathsep)[0], "label", "dict.txt")
    if not file.is_file():
        return {"num_labels": classes}
    names = [line.rsplit(" ", 1)[0] for line in file.read_text(encoding="utf-8").splitlines()][:classes]
    if len(names) < classes:
        return {"num_labels": classes}
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _dictionary_file(folder: str) -> Path:
    return next(path for path in (Path(folder, "dict.txt"), Path(folder, "input0", "dict.txt")) if path.is_file())


def _facts(path: str, model: ImplicitBertModel) -> dict[str, str]:
    """What a reader of a model card wants to know of the training, as far as the checkpoint tells."""
    checkpoint = stored(path)
    cfg, state = checkpoint["cfg"], checkpoint.get("extra_state") or {}
    updates = (checkpoint.get("optimizer_history") or [{}])[-1].get("num_updates")
    metric = (cfg.get("checkpoint") or {}).get("best_checkpoint_metric") or "loss"
    data = [os.path.basename(os.path.normpath(part)) for part in str(cfg["task"].get("data") or "").split(os.pathsep)]
    facts = {
        "Data": ", ".join(data),
        "Task": cfg["task"].get("_name"),
        "Updates": updates,
        f"Validation {metric}{' (base 2)' * (metric == 'loss')}": state.get("val_loss"),
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Evaluations of the field per forward pass": f"{_evaluations(model):.4g} (random tokens, full length)",
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


@torch.no_grad()
def _evaluations(model: ImplicitBertModel) -> float:
    symbols = torch.randint(
        len(SPECIAL_SYMBOLS),
        model.encoder.embeddings.symbols,
        (1, model.max_positions()),
        generator=torch.Generator().manual_seed(1),
    )
    return float(model.encoder(symbols, features_only=True).statistics["evaluations"])


def checkpoint_of(model: TrainedModel, folder: str) -> dict[str, Any]:
    """A checkpoint that fairseq, the hub and fine-tuning open, to lie in ``folder`` beside the vocabulary's files."""
    options = dataclasses.asdict(model.config.options())
    settings = {"_name": model.config.model_type, **options}
    return of_weights(settings, model.weights, folder, not_of_transformers=list(model.untrained))


def vocabulary_files(model: TrainedModel) -> dict[str, bytes]:
    """``dict.txt`` and a tokenizer's files of a folder; the dictionary from the tokenizer where it is not there.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: its symbols are not the model's.
    """
    if model.tokenizer is None:
        raise FileNotFoundError("the folder has no tokenizer.json: save its tokenizer there, too")
    ids = model.tokenizer.get_vocab()
    symbols = sorted(ids, key=ids.__getitem__)
    files = {"dict.txt": model.files.get("dict.txt")}
    if files["dict.txt"] is None:
        lines = (f"{symbol} 1\n" for symbol in symbols[len(SPECIAL_SYMBOLS) :] if symbol != MASK)
        files["dict.txt"] = "".join(lines).encode("utf-8")
    try:
        lines = files["dict.txt"].decode("utf-8").splitlines()
    except UnicodeError as error:
        raise ValueError(f"dict.txt is damaged: {error}") from None
    rows = [*SPECIAL_SYMBOLS, *(line.rpartition(" ")[0] for line in lines)]
    rows += [MASK] * (MASK not in rows)
    if len(rows) != model.config.vocab_size:
        raise ValueError(f"dict.txt makes {len(rows):,} symbols, and the model has {model.config.vocab_size:,}")
    for row, symbol in enumerate(rows):
        if ids.get(symbol) != row:
            raise ValueError(f"{symbol!r} has the id {ids.get(symbol)} in tokenizer.json, and {row} in dict.txt")
    for kind in TOKENIZERS.values():
        names = kind.published_names()
        if all(name in model.files for name in names):
            contents = [model.files[name] for name in names]
            try:
                kind(*contents, symbols=rows)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}") from None
            files.update(zip(names, contents, strict=True))
            break
    return files
