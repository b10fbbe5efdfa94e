"""One JSON (or parquet) record to one `Document`: The Pile's fields and every spelling of OSCAR's.

Sources: The Pile's lm_dataformat archives (``text`` as a string or a list of paragraphs, ``meta`` absent, an object or
JSON in a string); OSCAR 22.01 (``content``, ``metadata.annotation``) and 23.01 (``metadata.quality_warnings``,
``harmful_pp``, ``tlsh``, ``categories``), and the field names that the Hugging Face loader gave to 22.01 (``text``,
``meta.annotations``, ``meta.identification``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from fairseq_implicit.corpora.problems import shown

# Where the text stands: The Pile and most others, OSCAR, RedPajama-V2.
TEXT_FIELDS = ("text", "content", "raw_content")
# lm_dataformat joins the paragraphs of a list with an empty line; the cleaning folds it.
_PARAGRAPH_BREAK = "\n\n"


@dataclass(slots=True)
class Document:
    """A document as it was read, before any cleaning.

    Attributes:
        text: the document's text.
        path: file it came from (with ``!member`` inside an archive).
        offset: byte offset of its record in the uncompressed stream.
        component: The Pile's ``pile_set_name``, or None.
        annotations: OSCAR's quality labels (``tiny``, ``noisy``, ...), empty when there are none.
        language: the document's identified language, or None.
        language_probability: its probability, or None.
        harmful_perplexity: OSCAR 23.01's ``harmful_pp`` (lower is worse), or None.
        categories: OSCAR 23.01's block-list categories.
        repairs: what the reader had to repair or leave out (``"invalid UTF-8"``).
    """

    text: str
    path: str
    offset: int
    component: str | None = None
    annotations: tuple[str, ...] = ()
    language: str | None = None
    language_probability: float | None = None
    harmful_perplexity: float | None = None
    categories: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


class RecordError(ValueError):
    """The record is valid JSON but no document; the message says why."""


def is_oscar_2109_metadata(record: object) -> bool:
    """True for a line of OSCAR 21.09's side file, which describes documents and contains no text."""
    return isinstance(record, dict) and "nb_sentences" in record and "offset" in record and "content" not in record


def in_words(names: tuple[str, ...]) -> str:
    """``'a', 'b' or 'c'`` for a sentence."""
    *others, last = (f"'{name}'" for name in names)
    return f"{', '.join(others)} or {last}" if others else last


def document_from_record(
    record: object, path: str, offset: int, text_fields: tuple[str, ...] = TEXT_FIELDS
) -> Document:
    """Interprets one decoded JSON value; whatever is odd about it, the result is a document or a `RecordError`.

    Args:
        record: a JSON object, or a bare JSON string (the oldest lm_dataformat archives).
        path, offset: where it stands, for the reports.
        text_fields: names of the field with the text; the first one that is there counts.

    Raises:
        RecordError: there is no text in it.
    """
    try:
        return _document(record, path, offset, text_fields)
    except (RecordError, MemoryError):
        raise
    except Exception as error:  # a record that nobody thought of must not end the reading of a corpus
        raise RecordError(f"it cannot be interpreted ({type(error).__name__}: {error})") from error


def _document(record: object, path: str, offset: int, text_fields: tuple[str, ...]) -> Document:
    if isinstance(record, str):
        return Document(record, path, offset)
    if not isinstance(record, dict):
        raise RecordError(f"it holds a JSON {type(record).__name__} where an object with a text is expected")
    for field in text_fields:
        if field in record:
            text = record[field]
            break
    else:
        fields = shown(", ".join(sorted(record)), 300) or "none"
        raise RecordError(f"it has no field {in_words(text_fields)} (its fields: {fields})")
    if isinstance(text, list) and all(isinstance(paragraph, str) for paragraph in text):
        text = _PARAGRAPH_BREAK.join(text)
    if not isinstance(text, str):
        raise RecordError(f"its field '{field}' holds a {type(text).__name__} where a string or list is expected")

    document = Document(text, path, offset)
    meta = record.get("metadata", record.get("meta"))
    if isinstance(meta, str):
        meta = _meta_from_string(meta)
    if isinstance(meta, dict):
        _read_meta(document, meta)
    return document


def _meta_from_string(meta: str) -> object:
    try:
        return json.loads(meta)
    except (ValueError, RecursionError):
        # Some re-packs put a bare component name there.
        return {"pile_set_name": meta} if meta and meta[0] not in "{[" else None


def _read_meta(document: Document, meta: dict) -> None:
    component = meta.get("pile_set_name")
    document.component = component if isinstance(component, str) else None
    for name in ("quality_warnings", "annotation", "annotations"):
        labels = meta.get(name)
        if isinstance(labels, list):
            document.annotations = tuple(str(label) for label in labels)
            break
    identification = meta.get("identification")
    if isinstance(identification, dict):
        language = identification.get("label")
        document.language = language if isinstance(language, str) else None
        document.language_probability = _number(document, identification.get("prob"))
    document.harmful_perplexity = _number(document, meta.get("harmful_pp", meta.get("harmful_ppl")))
    categories = meta.get("categories")
    document.categories = tuple(str(name) for name in categories) if isinstance(categories, list) else ()


def _number(document: Document, value: object) -> float | None:
    """A finite number, or None; what is none of both is left out and counted."""
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    document.repairs = ("metadata that is no number left out",)
    return None
