"""fairseq models. Importing this package registers them and their presets."""

from fairseq_implicit.models.deq_bert import DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertModel

__all__ = ["DeqBertModel", "NeuralOdeBertModel", "OdeBertModel"]
