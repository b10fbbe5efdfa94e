"""ODE-BERT in transformers."""

from huggingface_hub.dataclasses import strict

from fairseq_implicit.families.ode_bert import OdeBertOptions
from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.modeling import models_of


@strict
class OdeBertConfig(ImplicitBertConfig, options=OdeBertOptions):
    model_type = "ode_bert"


(
    OdeBertModel,
    OdeBertForMaskedLM,
    OdeBertForSequenceClassification,
    OdeBertForTokenClassification,
    OdeBertForQuestionAnswering,
) = models_of(OdeBertConfig)
