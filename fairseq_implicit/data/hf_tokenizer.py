"""``--bpe hf_tokenizer``: fairseq's interface to a ``tokenizer.json``."""

from dataclasses import dataclass, field

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass
from omegaconf import MISSING

from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from fairseq_implicit.text.vocabulary import MASK, SPECIAL_SYMBOLS


@dataclass
class HfTokenizerConfig(FairseqDataclass):
    hf_tokenizer: str = field(default=MISSING, metadata={"help": "path to a tokenizer.json"})


@register_bpe("hf_tokenizer", dataclass=HfTokenizerConfig)
class HfTokenizer:
    """Text to pieces with spaces between them, and back."""

    def __init__(self, config: HfTokenizerConfig):
        self.vocabulary = TokenizerVocabulary.open(config.hf_tokenizer)

    def encode(self, x: str) -> str:
        return " ".join(self.vocabulary.split(x))

    def decode(self, x: str) -> str:
        return self.vocabulary.join(x.split())

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether a piece begins a word, for fairseq's masking of whole words; special symbols do."""
        return x in (*SPECIAL_SYMBOLS, MASK) or self.vocabulary.surface(x).startswith(" ")
