"""Which documents are wanted: The Pile's components and weights, OSCAR's labels and languages."""

from __future__ import annotations

import logging

from fairseq_implicit.corpora.records import Document
from fairseq_implicit.corpora.settings import COMPONENT_SPELLINGS, PILE_EPOCHS, PrepareSettings

logger = logging.getLogger(__name__)


def component_of(document: Document) -> str:
    """The component's usual spelling, ``""`` when the record names none."""
    return COMPONENT_SPELLINGS.get(document.component or "", document.component or "")


def reason_to_drop(document: Document, component: str, settings: PrepareSettings) -> str | None:
    """Why the record's own metadata exclude the document of a component, or None when it is wanted."""
    if settings.include_components and component not in settings.include_components:
        return "component not included"
    if component in settings.exclude_components:
        return "component excluded"
    if settings.component_weights.get(component) == 0:
        return "component weight"
    if document.annotations:
        if settings.only_unannotated:
            return "annotation"
        for label in settings.drop_annotations:
            if label in document.annotations:
                return f"annotation {label}"
    if settings.languages and document.language not in settings.languages:
        return "language"
    # A missing probability (formats without identification) is no evidence against the document.
    if document.language_probability is not None and document.language_probability < settings.min_language_probability:
        return "language probability"
    perplexity = document.harmful_perplexity
    if settings.min_harmful_perplexity and perplexity is not None and perplexity < settings.min_harmful_perplexity:
        return "harmful perplexity"
    for category in settings.drop_categories:
        if category in document.categories:
            return f"category {category}"
    return None


def warn_of_unknown_components(settings: PrepareSettings) -> None:
    """Logs component names that The Pile does not have; derived copies may have their own, so it is no error."""
    named = {*settings.include_components, *settings.exclude_components, *settings.component_weights}
    for name in sorted(named - set(PILE_EPOCHS)):
        logger.warning("The component '%s' is none of The Pile's 22; it is matched literally.", name)
