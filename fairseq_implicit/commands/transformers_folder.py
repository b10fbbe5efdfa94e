"""Folders of transformers' encoders, to and from folders of an ode_bert: weights, vocabulary, tokenizer."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_implicit.conversion import albert, bert, deberta, electra, modernbert, roberta
from fairseq_implicit.conversion.misfits import listed, refuse
from fairseq_implicit.conversion.rows import reordered, with_padding
from fairseq_implicit.conversion.said import wrong_kinds
from fairseq_implicit.conversion.weight_files import needed, read_json, read_weights, write_weights
from fairseq_implicit.data.data_bin import read_dictionary
from fairseq_implicit.evaluation import checkpoints
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel
from fairseq_implicit.new_folder import new_folder
from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from fairseq_implicit.text.vocabulary import BOS, EOS, MADE_UP, MASK, PAD, count_of

#: The tables by config.json's model_type; those with equal layers share one.
MODELS = {
    "bert": bert,
    "electra": electra,
    "roberta": roberta,
    "xlm-roberta": roberta,
    "camembert": roberta,
    "albert": albert,
    "deberta-v2": deberta,
    "modernbert": modernbert,
}
CONFIG, CHECKPOINT, TOKENIZER = "config.json", "model.pt", "tokenizer.json"
#: What transformers calls the symbols around a text, whose ids its configurations make up where nothing is said.
_ENDS = {BOS: ("bos", "cls"), EOS: ("eos", "sep")}
#: The types that `fairseq-implicit export` writes.
OURS = ("ode_bert", "neural_ode_bert", "deq_bert")
#: What else belongs to the tokenizer; kept beside the checkpoint for the way back.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
#: The output matrix and its bias, where they are those of the embeddings and of the head.
_TIED = {
    *("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    *("lm_head.decoder.weight", "lm_head.decoder.bias", "generator_lm_head.weight"),
    *("predictions.decoder.weight", "predictions.decoder.bias"),
    "decoder.weight",
}


def from_folder(source: Path, target: Path) -> dict[str, Any]:
    """Writes ``model.pt``, ``dict.txt`` and the tokenizer's files to a new folder; returns the model's settings.

    Raises:
        OSError, ValueError: the folder lacks a file, or holds a model or a tokenizer that is no ode_bert's.
    """
    config = read_json(source / CONFIG)
    if config.get("model_type") in OURS:
        raise ValueError(f"{source} holds a model of this package: bring it back with `fairseq-implicit import`")
    if config.get("model_type") not in [*MODELS]:
        raise ValueError(f"{source / CONFIG}: model_type is {config.get('model_type')}, and not {', '.join(MODELS)}")
    if not (source / TOKENIZER).is_file():  # published folders of DeBERTa v3, for one, hold only spm.model
        raise FileNotFoundError(
            f"there is no {TOKENIZER} in {source}: transformers writes one, "
            f"AutoTokenizer.from_pretrained({str(source)!r}).save_pretrained({str(source)!r})"
        )
    vocabulary, theirs = TokenizerVocabulary.open(source / TOKENIZER), read_weights(source)
    try:
        refuse(wrong_kinds(config))
        settings, weights = MODELS[config["model_type"]].from_transformers(config, theirs)
        symbols, order = _order(vocabulary, len(weights["encoder.embed_tokens.weight"]))
        weights = with_padding(reordered(weights, order), settings["max_positions"], PAD)
        weights, fresh = _completed(settings, weights, symbols)
    except (KeyError, ValueError) as error:
        reason = f"the model lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{source}: {reason}") from None
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{source}: {CONFIG} holds a value of the wrong kind ({error})") from None
    rows = symbols[4:-1]  # dict.txt has neither fairseq's four symbols nor <mask>
    checkpoint = checkpoints.of_weights(settings, weights, str(target.resolve()), not_of_transformers=fresh)
    with new_folder(target) as part:
        (part / "dict.txt").write_text("".join(f"{row} {count_of(row)}\n" for row in rows), encoding="utf-8")
        for name in (TOKENIZER, *_BESIDE):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        # Beside a checkpoint its name would make the folder one of transformers.
        shutil.copyfile(source / CONFIG, part / f"transformers_{CONFIG}")
        checkpoints.write(checkpoint, str(part / CHECKPOINT))
    return settings


def to_folder(path: Path, target: Path, model_type: str) -> dict[str, Any]:
    """Writes ``config.json``, ``model.safetensors`` and the tokenizer's files of an ode_bert; returns the config.

    Args:
        path: of the checkpoint, beside which lie ``dict.txt`` and ``tokenizer.json``.
        target: a new folder.
        model_type: one of :data:`MODELS`.

    Raises:
        OSError, ValueError: a file is missing, or the model has no counterpart of that type.
    """
    checkpoint = checkpoints.stored(str(path))
    dictionary = read_dictionary(str(needed(path.with_name("dict.txt"))))
    dictionary.add_symbol(MASK)
    vocabulary = TokenizerVocabulary.open(needed(path.with_name(TOKENIZER)), symbols=dictionary.symbols)
    fresh = set(checkpoint["extra_state"].get("not_of_transformers", ()))
    weights = {name: weight for name, weight in checkpoint["model"].items() if name not in fresh}
    settings = dict(checkpoint["cfg"]["model"])
    ids = torch.from_numpy(vocabulary.token_ids)
    ids[ids < 0] = torch.tensor(sorted(set(range(len(ids))) - set(ids.tolist())), dtype=torch.int64)
    padding = int(ids[PAD])
    if MODELS[model_type] is roberta:
        weights = with_padding(weights, settings["max_positions"], padding)
    original = path.with_name(f"transformers_{CONFIG}")
    before = read_json(original) if original.is_file() else {}
    # Which of its head's two names a DeBERTa had.
    options = {"legacy": before["legacy"]} if MODELS[model_type] is deberta and "legacy" in before else {}
    try:
        config, found = MODELS[model_type].to_transformers(settings, reordered(weights, ids.argsort()), **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    base = f"{min(found).partition('.')[0]}."
    if all(name.startswith(base) for name in found):  # a model without heads has no name before its parts
        found = {name.removeprefix(base): weight for name, weight in found.items()}
    ends = {f"{name}_token_id": int(ids[row]) for row, names in _ENDS.items() for name in names}
    config = {**ends, **before, **config, "model_type": model_type, "pad_token_id": padding}
    with new_folder(target) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (TOKENIZER, *_BESIDE):
            if path.with_name(name).is_file():
                shutil.copyfile(path.with_name(name), part / name)
        write_weights(_stored_once(config, found), part)
    return config


def _order(vocabulary: TokenizerVocabulary, rows: int) -> tuple[list[str], Tensor]:
    """The symbols of all rows, and each one's id in the tokenizer; rows that it has no token for are filling."""
    symbols, ids = [*vocabulary.symbols, MASK], vocabulary.token_ids.tolist()
    if missing := [symbol for symbol, number in zip(symbols, ids, strict=True) if number < 0]:
        raise ValueError(f"its tokenizer has no symbol for {', '.join(missing)}, which fairseq's dictionary needs")
    unused = sorted(set(range(rows)) - set(ids))
    names = (name for number in range(rows) if (name := f"{MADE_UP}{number:04d}") not in vocabulary.symbols)
    filling = [next(names) for _ in unused]
    return [*symbols[:-1], *filling, MASK], torch.tensor([*ids[:-1], *unused, ids[-1]])


def _completed(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor], symbols: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights and, where they lack a masked-LM head, a fresh one; the names of what is fresh.

    Raises:
        ValueError: all that they lack else, that has no place, or whose shape is not that of the settings.
    """
    dictionary = Dictionary()
    for symbol in symbols[4:]:
        dictionary.add_symbol(symbol)
    config = OdeBertConfig(**{name: value for name, value in settings.items() if name != "_name"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = OdeBertModel.build_model(config, Namespace(source_dictionary=dictionary)).state_dict()
    if not settings["untie_weights_roberta"]:
        own["encoder.lm_head.weight"] = weights["encoder.embed_tokens.weight"]
    fresh = [name for name in own if name not in weights]
    misfits = []
    if lacking := [name for name in fresh if not name.startswith("encoder.lm_head.")]:
        misfits.append(f"the model lacks {listed(lacking)}")
    if strangers := [name for name in weights if name.startswith("encoder.") and name not in own]:
        misfits.append(f"its config leaves no place for {listed(strangers)}")
    found = {**weights, **{name: own[name] for name in fresh}}
    misfits += [
        f"{name} has the shape {tuple(found[name].shape)}, and its config says {tuple(weight.shape)}"
        for name, weight in own.items()
        if found[name].shape != weight.shape
    ]
    refuse(misfits)
    return found, fresh


def _stored_once(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what transformers ties by itself."""
    tied = _TIED if config["tie_word_embeddings"] else ()
    return {name: weight for name, weight in weights.items() if name not in tied}
