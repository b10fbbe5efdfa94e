"""What lets the tokens of a sequence read each other: one file per mixer, one line here."""

from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.mixers.disentangled import DisentangledConfig
from fairseq_implicit.fields.mixers.mixer import MixerConfig

#: Mixers by the name that ``--mixer`` calls them. Any mixer works in every field, scheme and depth.
MIXERS: dict[str, type[MixerConfig]] = {"attention": AttentionConfig, "disentangled": DisentangledConfig}
