"""Neural-ODE BERT in transformers."""

from huggingface_hub.dataclasses import strict

from fairseq_implicit.families.neural_ode_bert import NeuralOdeBertOptions
from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.modeling import models_of


@strict
class NeuralOdeBertConfig(ImplicitBertConfig, options=NeuralOdeBertOptions):
    model_type = "neural_ode_bert"


(
    NeuralOdeBertModel,
    NeuralOdeBertForMaskedLM,
    NeuralOdeBertForSequenceClassification,
    NeuralOdeBertForTokenClassification,
    NeuralOdeBertForQuestionAnswering,
) = models_of(NeuralOdeBertConfig)
