"""DEQ-BERT for fairseq: its flags and presets."""

from dataclasses import dataclass
from typing import Any, Dict

from fairseq.models import register_model

from fairseq_implicit.families.deq_bert import MATCHED_SIZES, DeqBertOptions
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.config import ImplicitBertConfig
from fairseq_implicit.models.presets import register_presets


@dataclass
class DeqBertConfig(DeqBertOptions, ImplicitBertConfig):
    __doc__ = DeqBertOptions.__doc__


@register_model("deq_bert", dataclass=DeqBertConfig)
class DeqBertModel(ImplicitBertModel):
    """One equilibrium between RoBERTa's embeddings and heads."""


VARIANTS: Dict[str, Dict[str, Any]] = {"": {}}

register_presets("deq_bert", DeqBertModel, DeqBertConfig, VARIANTS, MATCHED_SIZES)
