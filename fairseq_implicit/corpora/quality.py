"""Published quality filters through datatrove (optional): Gopher, C4, FineWeb.

Sources: Rae et al. 2021 (Gopher, appendix A1.1), Raffel et al. 2020 (C4, section 2.2), Penedo et al. 2024 (FineWeb).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from fairseq_implicit.corpora.problems import CorpusError, shown

# name on the command line -> class in datatrove.pipeline.filters
QUALITY_FILTERS = {
    "gopher-quality": "GopherQualityFilter",
    "gopher-repetition": "GopherRepetitionFilter",
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
}


class FilterFailed(Exception):
    """A filter ended with an error instead of a verdict; the message is the end of a sentence about a text."""


def quality_check(names: tuple[str, ...]) -> Callable[[str], str | None]:
    """Builds one check out of several filters.

    Returns:
        a function that gives the name of the first filter that rejects a text, or None, and raises `FilterFailed` when
        a filter fails on it. C4's filter also removes single lines in datatrove; here it only decides about whole
        documents, so that no text is changed uncounted.

    Raises:
        CorpusError: a name is unknown, or datatrove or one of its own requirements is not installed or fails.
    """
    unknown = [name for name in names if name not in QUALITY_FILTERS]
    if unknown:
        raise CorpusError(f"--quality-filter {unknown[0]} is unknown; choose from {', '.join(QUALITY_FILTERS)}.")
    if not names:
        return lambda text: None
    try:
        filters = importlib.import_module("datatrove.pipeline.filters")
        document_class = importlib.import_module("datatrove.data").Document
        checks = [(name, getattr(filters, QUALITY_FILTERS[name])()) for name in names]
        for _, quality_filter in checks:  # datatrove looks for its word tokenizer only when a text comes
            quality_filter.filter(document_class(text="A first sentence.", id=""))
    except ImportError as error:
        raise CorpusError(
            f"--quality-filter {names[0]} needs datatrove with its processing extras ({error}): "
            "pip install 'datatrove[processing]'."
        ) from error
    except Exception as error:  # of a model or a table that its tokenizer looks for
        raise CorpusError(
            f"--quality-filter {', '.join(names)}: datatrove fails on a plain sentence already "
            f"({type(error).__name__}: {shown(str(error), 300)}); mend its installation or leave the filter out."
        ) from error

    def check(text: str) -> str | None:
        for name, quality_filter in checks:
            try:
                verdict = quality_filter.filter(document_class(text=text, id=""))
            except MemoryError:
                raise
            except Exception as error:  # of word tokenizers and regular expressions on texts that nobody thought of
                fault = shown(str(error), 300)
                raise FilterFailed(f"--quality-filter {name} failed on it ({type(error).__name__}: {fault})") from error
            if not (verdict[0] if isinstance(verdict, tuple) else verdict):
                return f"quality {name}"
        return None

    return check
