"""The transformers face: the families for the Auto classes, registered on import, and any encoder under the solvers.

Needs transformers, never fairseq.
"""

from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.huggingface.deq_bert import DeqBertConfig
from fairseq_implicit.huggingface.modeling import register
from fairseq_implicit.huggingface.neural_ode_bert import NeuralOdeBertConfig
from fairseq_implicit.huggingface.ode_bert import OdeBertConfig
from fairseq_implicit.huggingface.solved_depth import depth_statistics, load_solved, restore_depth, solve_depth

__all__ = ["CONFIGURATIONS", "depth_statistics", "load_solved", "restore_depth", "solve_depth"]

#: The families, by the type that ``config.json`` names.
CONFIGURATIONS: dict[str, type[ImplicitBertConfig]] = {
    family.model_type: family for family in (OdeBertConfig, NeuralOdeBertConfig, DeqBertConfig)
}
for _family in CONFIGURATIONS.values():
    register(_family)
