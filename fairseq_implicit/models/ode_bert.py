"""ODE-BERT for fairseq: its flags, its checkpoints under other schemes, its presets."""

import logging
import re
from dataclasses import dataclass
from typing import Any, Dict

from fairseq.models import register_model
from torch import Tensor

from fairseq_implicit.families.bert import SIZES
from fairseq_implicit.families.ode_bert import OdeBertOptions
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.models.config import ImplicitBertConfig
from fairseq_implicit.models.presets import register_preset, register_presets

logger = logging.getLogger(__name__)


@dataclass
class OdeBertConfig(OdeBertOptions, ImplicitBertConfig):
    __doc__ = OdeBertOptions.__doc__


@register_model("ode_bert", dataclass=OdeBertConfig)
class OdeBertModel(ImplicitBertModel):
    """A stack of Runge–Kutta blocks between RoBERTa's embeddings and heads."""

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """Let a checkpoint be opened under another scheme.

        Combination coefficients belong to one scheme and mode: those that do not fit start anew from the tableau.
        """
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}." if name else ""
        self._split_blocks(state_dict, f"{prefix}encoder.depth.")
        part = f"{prefix}encoder.depth.combinations."
        own = {f"{prefix}{key}": value for key, value in self.state_dict().items() if f"{prefix}{key}".startswith(part)}
        stored = {key for key in state_dict if key.startswith(part)}
        foreign = {key for key in stored if key not in own or own[key].shape != state_dict[key].shape}
        for key in foreign:
            del state_dict[key]
        fresh = [key for key in own if key not in state_dict]
        for key in fresh:
            state_dict[key] = own[key]
        if foreign or fresh:
            logger.warning(
                "the checkpoint was trained with other combination coefficients (%d left out, %d started from the "
                "tableau): its scheme or --ode-coefficients differ from this model's",
                len(foreign),
                len(fresh),
            )

    def _split_blocks(self, state_dict: Dict[str, Tensor], depth: str) -> None:
        """Give each block of a coarser checkpoint's to all blocks that take its place in time.

        Raises:
            ValueError: the checkpoint's blocks do not divide the model's.
        """
        for part in ("fields", "combinations"):
            pattern = re.compile(re.escape(f"{depth}{part}.") + r"(\d+)\.(.+)")
            stored = [match for match in map(pattern.fullmatch, list(state_dict)) if match]
            blocks = len({match.group(1) for match in stored})
            own = len(getattr(self.encoder.depth, part, ()))
            if not blocks or blocks >= own or self.args.ode_split == 1:
                continue
            if own % blocks:
                raise ValueError(
                    f"--ode-split {self.args.ode_split} makes {own} blocks, which the checkpoint's {blocks} do not "
                    "divide: choose a multiple of the split that it was trained with"
                )
            copies = own // blocks
            weights = {match.groups(): state_dict.pop(match.group(0)) for match in stored}
            for (block, rest), weight in weights.items():
                for copy in range(copies):
                    # Copies of their own: trained further, the halves may part.
                    state_dict[f"{depth}{part}.{int(block) * copies + copy}.{rest}"] = weight.clone()


#: The coefficients that learned best in examples/study, and the start that suits them.
LEARNED = dict(ode_coefficients="learned", ode_coefficient_start="ones", encoder_init="identity")

VARIANTS: Dict[str, Dict[str, Any]] = {
    "": {},
    "euler": dict(ode_scheme="euler"),
    "rk2": dict(ode_scheme="rk2"),
    "rk3": dict(ode_scheme="rk3"),
    "rk4": dict(ode_scheme="rk4"),
    "learned": dict(ode_scheme="rk2", **LEARNED),
    "rk4_learned": dict(ode_scheme="rk4", **LEARNED),
    # As in the publications, one gate or one alpha serves the whole encoder.
    "gated": dict(ode_scheme="rk2", ode_coefficients="gated", ode_coefficient_scope="model"),
    "ema": dict(ode_scheme="rk2", ode_coefficients="ema", ode_coefficient_scope="model"),
}

register_presets("ode_bert", OdeBertModel, OdeBertConfig, VARIANTS)

#: ModernBERT (arXiv 2412.13663) in the sizes of Ettin (arXiv 2507.11412), deep and narrow: small and base have the
#: layers of its models of 68 M and 150 M parameters; tiny, for a processor, is half as wide as the smallest.
MODERN_SIZES: Dict[str, Dict[str, int]] = {
    "tiny": dict(encoder_layers=4, encoder_embed_dim=128, encoder_ffn_embed_dim=192, encoder_attention_heads=2),
    "small": dict(encoder_layers=19, encoder_embed_dim=512, encoder_ffn_embed_dim=768, encoder_attention_heads=8),
    "base": dict(encoder_layers=22, encoder_embed_dim=768, encoder_ffn_embed_dim=1152, encoder_attention_heads=12),
}
MODERN: Dict[str, Any] = dict(
    gated_feed_forward=True,
    no_biases=True,
    no_first_norm=True,
    attention_rotary_base=160_000.0,
    attention_local_rotary_base=10_000.0,
    attention_window=64,
    attention_global_every=3,
    dropout=0.0,
    attention_dropout=0.0,
)

register_presets("modern_ode_bert", OdeBertModel, OdeBertConfig, {"": MODERN}, MODERN_SIZES)

#: BERT with lambda layers, in the sizes of gsarti/lambda-bert; but of its two contexts that of its examples, 25 tokens,
#: which is linear in the length (--lambda-context 0 is all of them). --ode-scheme rk4, say, integrates its blocks.
LAMBDA_BERT: Dict[str, Any] = dict(
    mixer="lambda",
    encoder_attention_heads=8,
    encoder_positions="learned",
    encoder_init="plain",
    layernorm_eps=1e-12,
    ode_scheme="euler",
    ode_field="post-norm",
)

#: The classifying transformer of pbloem/former, with either of its own kinds of attention.
FORMER: Dict[str, Any] = dict(
    encoder_layers=6,
    encoder_embed_dim=128,
    encoder_ffn_embed_dim=512,
    encoder_attention_heads=8,
    encoder_init="plain",
    encoder_init_std=0.05,
    activation_fn="relu",
    dropout=0.0,
    attention_dropout=0.0,
    no_layernorm_embedding=True,
    ode_scheme="euler",
    ode_field="post-norm",
)

#: DeBERTa v3's published shapes (arXiv 2111.09543).
DEBERTA_SIZES: Dict[str, Dict[str, Any]] = {"small": {**SIZES["base"], "encoder_layers": 6}, "base": SIZES["base"]}
DEBERTA = dict(mixer="disentangled", ode_field="post-norm", ode_scheme="euler", layernorm_eps=1e-7)

register_presets("lambda_bert", OdeBertModel, OdeBertConfig, {"": LAMBDA_BERT})
for kind in ("wide", "narrow"):
    register_preset(f"former_{kind}", OdeBertModel, OdeBertConfig, {**FORMER, "mixer": f"{kind}-attention"})
register_presets("deberta_v3", OdeBertModel, OdeBertConfig, {"": DEBERTA}, DEBERTA_SIZES)
