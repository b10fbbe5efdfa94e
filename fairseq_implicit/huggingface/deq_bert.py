"""DEQ-BERT in transformers."""

from huggingface_hub.dataclasses import strict

from fairseq_implicit.families.deq_bert import DeqBertOptions
from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.modeling import models_of


@strict
class DeqBertConfig(ImplicitBertConfig, options=DeqBertOptions):
    model_type = "deq_bert"


(
    DeqBertModel,
    DeqBertForMaskedLM,
    DeqBertForSequenceClassification,
    DeqBertForTokenClassification,
    DeqBertForQuestionAnswering,
) = models_of(DeqBertConfig)
