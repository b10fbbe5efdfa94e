"""The choices of one preparation, checked once; a fingerprint of them guards a resumed run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from fairseq_implicit.corpora import near_duplicates
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.sources import BOUNDARIES

SPLITS = ("train", "valid", "test")

# Published number of passes over each component inside the original Pile (The Pile, Gao et al. 2020, table 1).
PILE_EPOCHS = {
    "Pile-CC": 1.0,
    "PubMed Central": 2.0,
    "Books3": 1.5,
    "OpenWebText2": 2.0,
    "ArXiv": 2.0,
    "Github": 1.0,
    "FreeLaw": 1.5,
    "StackExchange": 2.0,
    "USPTO Backgrounds": 2.0,
    "PubMed Abstracts": 2.0,
    "Gutenberg (PG-19)": 2.5,
    "OpenSubtitles": 1.5,
    "Wikipedia (en)": 3.0,
    "DM Mathematics": 2.0,
    "Ubuntu IRC": 2.0,
    "BookCorpus2": 1.5,
    "EuroParl": 2.0,
    "HackerNews": 2.0,
    "YoutubeSubtitles": 2.0,
    "PhilPapers": 2.0,
    "NIH ExPorter": 2.0,
    "Enron Emails": 2.0,
}

# Some derived copies of The Pile carry this misspelling.
COMPONENT_SPELLINGS = {"UPSTO Backgrounds": "USPTO Backgrounds"}

# Keeping only documents without any label would throw away 97 % of short-lined pages; these labels alone mark text
# that is useless or unwanted (ungoliant's thresholds: tiny < 5 lines, noisy > 50 % non-letters, adult: block list).
DEFAULT_DROPPED_ANNOTATIONS = ("tiny", "noisy", "adult")


# What changes no byte of the output: a run may go on with another choice.
_WITHOUT_EFFECT = {"strict": False, "compress_work": False}


@dataclass(frozen=True)
class PrepareSettings:
    """Everything that decides which bytes come out. Sizes are in bytes of UTF-8 text.

    Attributes:
        boundary: document boundary of plain text: "auto", "blank-line", "line" or "file".
        encoding: of text and JSON lines; "" reads UTF-8.
        text_fields: names of the field or column with the text; empty means `records.TEXT_FIELDS`.
        shard_size: text of one train shard, before duplicates are removed.
        valid_fraction, test_fraction: shares of the documents, chosen by their hash.
        seed: changes the order of the documents and the split.
        buckets: ranges of the hash that are merged one at a time; memory in the merge is the corpus divided by this.
        keep_duplicates: no exact-hash deduplication.
        drop_near_duplicates: MinHash near-duplicate removal.
        include_components, exclude_components: component names; empty means all, none.
        component_weights: how often the documents of a component are written; 0.5 keeps half of them.
        drop_annotations: OSCAR labels that drop a document.
        only_unannotated: drop every OSCAR document that carries any label.
        languages: document languages to keep; empty means all.
        min_language_probability: probability that the language must have.
        min_harmful_perplexity: OSCAR 23.01's ``harmful_pp`` below which a document is dropped; 0 keeps all.
        drop_categories: OSCAR 23.01 categories that drop a document.
        min_document_size: cleaned text below this is dropped.
        max_document_size: longer documents are split at line ends; 0 never splits.
        max_line_size: longer lines are wrapped; 0 never wraps.
        quality_filters: datatrove filters by name.
        sample: share of the documents to keep, chosen by hash.
        held_out_sample: the same for files that go to the valid or test split as a whole.
        documents_per_file: read at most this many documents of each file; 0 reads all.
        strict: stop at the first problem of an input file.
        compress_work: keep the intermediate files compressed: half of their room on the disk for more time.
    """

    boundary: str = "auto"
    encoding: str = ""
    text_fields: tuple[str, ...] = ()
    shard_size: int = 4 * 10**9
    valid_fraction: float = 0.0005
    test_fraction: float = 0.0
    seed: int = 1
    buckets: int = 4096
    keep_duplicates: bool = False
    drop_near_duplicates: bool = False
    include_components: tuple[str, ...] = ()
    exclude_components: tuple[str, ...] = ()
    component_weights: dict[str, float] = field(default_factory=dict)
    drop_annotations: tuple[str, ...] = DEFAULT_DROPPED_ANNOTATIONS
    only_unannotated: bool = False
    languages: tuple[str, ...] = ()
    min_language_probability: float = 0.0
    min_harmful_perplexity: float = 0.0
    drop_categories: tuple[str, ...] = ()
    min_document_size: int = 1
    max_document_size: int = 0
    max_line_size: int = 65536
    quality_filters: tuple[str, ...] = ()
    sample: float = 1.0
    held_out_sample: float = 1.0
    documents_per_file: int = 0
    strict: bool = False
    compress_work: bool = False

    def __post_init__(self):
        if self.boundary not in BOUNDARIES:
            raise CorpusError(f"--document-boundary {self.boundary} is unknown; choose from {', '.join(BOUNDARIES)}.")
        try:
            "".encode(self.encoding or "utf-8")
        except (LookupError, ValueError) as error:
            raise CorpusError(
                f"--encoding {self.encoding} is unknown; write for example gb18030, shift_jis, utf-16 or latin-1."
            ) from error
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise CorpusError(f"--{name.replace('_', '-')} {getattr(self, name)} must lie in [0, 1).")
        if self.valid_fraction + self.test_fraction >= 1:
            raise CorpusError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction} leave no training "
                "documents; their sum must stay below 1."
            )
        for name in ("sample", "held_out_sample"):
            if not 0 < getattr(self, name) <= 1:
                raise CorpusError(f"--{name.replace('_', '-')} {getattr(self, name)} must lie in (0, 1].")
        if not -(2**63) <= self.seed < 2**63:
            raise CorpusError(f"--seed {self.seed} does not fit 64 bits.")
        if self.shard_size < 1:
            raise CorpusError(f"--shard-size {self.shard_size} must be at least one byte.")
        if not 1 <= self.buckets <= 65536:
            raise CorpusError(f"--buckets {self.buckets} must lie in 1..65536.")
        for name in ("max_document_size", "max_line_size"):
            if 0 < getattr(self, name) < 16:
                raise CorpusError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is too small to hold a word; "
                    "give at least 16 bytes, or 0 for no limit."
                )
        for component, weight in self.component_weights.items():
            if not 0 <= weight <= 100:
                raise CorpusError(f"--component-weight {component}={weight} must lie in [0, 100].")
        both = set(self.include_components) & set(self.exclude_components)
        if both:
            raise CorpusError(f"--include-component and --exclude-component both name {', '.join(sorted(both))}.")

    def makes_copies(self) -> bool:
        """True when the documents of a component are written more than once."""
        return any(weight > 1 for weight in self.component_weights.values())

    def deciding(self) -> dict:
        """`as_dict` with the defaults of what changes no byte of the output."""
        return self.as_dict() | _WITHOUT_EFFECT

    def as_dict(self) -> dict:
        """The settings as JSON-ready values."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """Hash of everything that decides the output, input names excepted."""
        values = {name: value for name, value in self.as_dict().items() if name not in _WITHOUT_EFFECT}
        values["intermediate files"] = 2  # their format: those of another one are made again
        if self.drop_near_duplicates:
            values["near-duplicate signatures"] = near_duplicates.VERSION
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
