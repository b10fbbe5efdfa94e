"""How a function of fairseq is replaced by one that calls it."""

import functools
import types


def wrap(owner, name: str, wrapper) -> None:
    """Put ``wrapper(original, *args, **kwargs)`` in the place of ``owner.name``; wrapping again changes nothing.

    Args:
        owner: a module or a class.
        name: of a function, or of a plain, static or class method.
        wrapper: receives the original (bound, where the class or static method was) and the call's arguments.
    """
    original = getattr(owner, name)
    if getattr(original, "__wrapper__", None) is wrapper:
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    wrapped.__wrapper__ = wrapper
    bound = isinstance(owner, type) and not isinstance(owner.__dict__[name], types.FunctionType)
    setattr(owner, name, staticmethod(wrapped) if bound else wrapped)
