"""The options of a family as a configuration of transformers: flat, JSON, under the names that they have here."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from fairseq_implicit.families.bert import BertOptions
from fairseq_implicit.networks.encoder import Encoder
from fairseq_implicit.options import OptionError


def _attributes(text: str) -> str:
    """A text with attributes' names in place of flags: ode_steps for --ode-steps."""
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda found: found[1].replace("-", "_"), text)


#: In files and by hand 2 stands for 2.0.
_NUMBERS: dict[Any, Any] = {float: float | int, float | None: float | int | None}


@strict
class ImplicitBertConfig(PretrainedConfig):
    """Vocabulary and head, for all families. A family adds its options: ``class …(ImplicitBertConfig, options=…)``.

    Args:
        vocab_size: symbols of the vocabulary.
        bos_token_id, pad_token_id, eos_token_id, mask_token_id: ids, in fairseq's order by default.
        classifier_inner_dim: width of the layer in the head of whole inputs; ``None``: that of the state.
        classification_head: fairseq's name of that head.

    Raises:
        ValueError: an impossible value or combination, in one sentence with the attribute's name.
        StrictDataclassError: a value of another type.
    """

    #: The options of the family, a dataclass.
    options_class: ClassVar[type[BertOptions]] = BertOptions
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "statistics", "penalties", "auxiliary"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "encoder_embed_dim",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_embed_dim",
        "max_position_embeddings": "max_positions",
        "type_vocab_size": "segment_types",
        "layer_norm_eps": "layernorm_eps",
        "initializer_range": "encoder_init_std",
    }

    vocab_size: int = 50265
    bos_token_id: int | None = 0
    pad_token_id: int = 1
    eos_token_id: int | None = 2
    mask_token_id: int | None = None
    classifier_inner_dim: int | None = None
    classification_head: str = "sentence_classification_head"

    def __init_subclass__(cls, options: type[BertOptions] | None = None, **kwargs: Any):
        if options is not None:
            cls.options_class = options
            cls.__doc__ = f"{options.__doc__}\n\nEvery option under its own name, and those of a vocabulary."
            annotations = cls.__dict__.get("__annotations__", {})
            for option in dataclasses.fields(options):
                annotations[option.name] = _NUMBERS.get(option.type, option.type)
                setattr(cls, option.name, 512 if option.name == "max_positions" else option.default)
            cls.__annotations__ = annotations
        super().__init_subclass__(**kwargs)

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id {self.pad_token_id} is no id of a vocabulary of vocab_size {self.vocab_size}"
            )
        with self.naming():
            self.options().check()

    def options(self, **changes: Any) -> BertOptions:
        """The family's options, ``changes`` in place of some."""
        own = {option.name: getattr(self, option.name) for option in dataclasses.fields(self.options_class)}
        return self.options_class(**{**own, **changes})

    def encoder(self, head: bool) -> Encoder:
        """The network, with a masked-LM head or without, in weights that torch's modules start from."""
        options = self.options()
        with self.naming():
            depth, around = options.build_depth(), options.network(self.vocab_size, self.pad_token_id)
        return Encoder(around if head else replace(around, head=None), depth)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Within it a wrong option is said with its attribute's name, not with a command line's flag."""
        try:
            yield
        except OptionError as error:
            said = error.renamed(self.options().flags.flag)
            raise type(said)(_attributes(said.option), _attributes(said.sentence)) from None
        except ValueError as error:
            if "--" not in str(error):
                raise
            raise ValueError(_attributes(str(error))) from None

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output matrix is that of the token embeddings."""
        return not self.untie_weights_roberta

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, tied: bool) -> None:
        self.untie_weights_roberta = not tied
