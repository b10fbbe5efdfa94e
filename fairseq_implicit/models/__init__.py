"""fairseq models. Importing this package registers them and their presets, and with them the rest of the package."""

import fairseq_implicit
from fairseq_implicit.models.deq_bert import DeqBertModel
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertModel

fairseq_implicit.register()

__all__ = ["DeqBertModel", "NeuralOdeBertModel", "OdeBertModel"]
