"""Models of equal parameters: how wide a feed-forward part has to be."""

import dataclasses
import functools
import logging
from typing import Any

import torch

from fairseq_implicit.families.bert import BertOptions
from fairseq_implicit.families.deq_bert import DeqBertOptions
from fairseq_implicit.families.neural_ode_bert import NeuralOdeBertOptions
from fairseq_implicit.families.ode_bert import OdeBertOptions
from fairseq_implicit.networks.encoder import Encoder

FAMILIES: dict[str, type[BertOptions]] = {
    "ode_bert": OdeBertOptions,
    "neural_ode_bert": NeuralOdeBertOptions,
    "deq_bert": DeqBertOptions,
}


def matched_width(flags: dict[str, Any], reference: dict[str, Any]) -> int:
    """The ``encoder-ffn-embed-dim`` with which a model of ``flags`` has the parameters of one of ``reference``.

    Raises:
        ValueError: its other parts alone have more, or a flag has an impossible value.
    """
    few, more = (_parameters({**flags, "encoder-ffn-embed-dim": width}) for width in (64, 128))
    width = 64 + round(64 * (_parameters(reference) - few) / (more - few))
    if width < 1:
        raise ValueError("without any feed-forward part it has more parameters than the reference")
    return width


def _parameters(flags: dict[str, Any]) -> int:
    """Of the whole network but the vocabulary's embeddings."""
    return _count(flags["arch"], tuple(sorted((name.replace("-", "_"), value) for name, value in flags.items())))


@functools.cache
def _count(arch: str, options: tuple[tuple[str, Any], ...]) -> int:
    family = FAMILIES[arch]
    known = {field.name for field in dataclasses.fields(family)}
    values = {name: value for name, value in options if name in known}
    values.setdefault("max_positions", dict(options).get("tokens_per_sample"))
    made = family(**values)
    logging.disable(logging.INFO)  # what an equilibrium says of its cost
    try:
        with torch.device("meta"):
            network = Encoder(made.network(symbols=2, padding=1), made.build_depth())
    finally:
        logging.disable(logging.NOTSET)
    return sum(parameter.numel() for parameter in network.parameters())
