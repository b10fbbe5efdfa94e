"""Neural-ODE BERT for fairseq: its flags, stacks of blocks opened as its knots, its presets."""

import re
from dataclasses import dataclass
from typing import Any, Dict

from fairseq.models import register_model
from torch import Tensor

from fairseq_implicit.families.neural_ode_bert import NeuralOdeBertOptions
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.config import ImplicitBertConfig
from fairseq_implicit.models.presets import register_presets


@dataclass
class NeuralOdeBertConfig(NeuralOdeBertOptions, ImplicitBertConfig):
    __doc__ = NeuralOdeBertOptions.__doc__


@register_model("neural_ode_bert", dataclass=NeuralOdeBertConfig)
class NeuralOdeBertModel(ImplicitBertModel):
    """A neural ODE between RoBERTa's embeddings and heads."""

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """Let an ode_bert checkpoint be opened: its blocks become the knots, a tied block the field of all depths."""
        super().upgrade_state_dict_named(state_dict, name)
        depth = f"{name}.encoder.depth." if name else "encoder.depth."
        blocks = re.compile(re.escape(f"{depth}fields.") + r"(\d+)\.(.+)")
        matches = [match for match in map(blocks.fullmatch, list(state_dict)) if match]
        embedded = self.args.ode_depth_weights == "embedding"
        if embedded and len({match.group(1) for match in matches}) > 1:
            raise ValueError(
                "the checkpoint holds a stack of different blocks, which one field cannot be: open it with "
                "--ode-depth-weights linear or constant"
            )
        for match in matches:
            target = f"{depth}field." if embedded else f"{depth}field.knots.{match.group(1)}."
            state_dict[target + match.group(2)] = state_dict.pop(match.group(0))
        if not matches:
            return
        for key in [key for key in state_dict if key.startswith(f"{depth}combinations.")]:
            # Coefficients of the blocks' own schemes: here the solver has its own.
            del state_dict[key]
        if embedded:
            for key, value in self.encoder.depth.field.depth_embedding.state_dict().items():
                state_dict.setdefault(f"{depth}field.depth_embedding.{key}", value)


VARIANTS: Dict[str, Dict[str, Any]] = {
    "": {},
    # As many weights as the layers of BERT: at unit Euler steps it is that BERT.
    "knots": dict(ode_depth_weights="linear"),
}

register_presets("neural_ode_bert", NeuralOdeBertModel, NeuralOdeBertConfig, VARIANTS)
