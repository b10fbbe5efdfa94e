"""What lets the tokens of a sequence read each other: one file per mixer, one line here."""

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.mixers.disentangled import DisentangledConfig
from fairseq_implicit.fields.mixers.lambda_layer import LambdaConfig
from fairseq_implicit.fields.mixers.mixer import MixerConfig
from fairseq_implicit.fields.mixers.narrow_attention import NarrowAttentionConfig
from fairseq_implicit.fields.mixers.wide_attention import WideAttentionConfig

#: Mixers by the name that ``--mixer`` calls them. Any mixer works in every field, scheme and depth.
MIXERS: dict[str, type[MixerConfig]] = {
    "attention": AttentionConfig,
    "wide-attention": WideAttentionConfig,
    "narrow-attention": NarrowAttentionConfig,
    "lambda": LambdaConfig,
    "disentangled": DisentangledConfig,
}
