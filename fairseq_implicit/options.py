"""What is wrong with an option: said where it is checked, signed where it has its name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator


class OptionError(ValueError):
    """One option is wrong. Whoever knows the options by other names (flags, say) says it in those: :func:`named`.

    Attributes:
        option: the field of the configuration at fault.
        sentence: what is wrong and what to do; other options stand in it as `` `option` ``.
    """

    def __init__(self, option: str, sentence: str):
        super().__init__(f"{option}: {sentence}")
        self.option = option
        self.sentence = sentence

    def renamed(self, name: Callable[[str], str]) -> OptionError:
        """The same error with all options under the names that ``name`` gives them."""
        return type(self)(name(self.option), re.sub(r"`(\w+)`", lambda found: name(found[1]), self.sentence))


@contextlib.contextmanager
def named(name: Callable[[str], str]) -> Iterator[None]:
    """Says the errors of what is done within by other names.

    Args:
        name: gives an option's name here.
    """
    try:
        yield
    except OptionError as error:
        raise error.renamed(name) from None


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """OptionError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise OptionError(option, f"{value!r} is unknown: choose one of {', '.join(choices)}.")
