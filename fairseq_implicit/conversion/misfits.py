"""What keeps a model from becoming another, said whole: who mends one thing should know of the next."""

from collections.abc import Collection, Iterable


def refuse(sentences: Iterable[str]) -> None:
    """ValueError of all ``sentences``, where there are any."""
    if found := "; ".join(sentences):
        raise ValueError(found)


def listed(names: Collection[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
