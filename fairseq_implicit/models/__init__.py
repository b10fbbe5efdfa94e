"""fairseq models. Importing this package registers them and their presets."""

from fairseq_implicit.models.ode_bert import OdeBertModel

__all__ = ["OdeBertModel"]
