"""How the threads of torch wait on a CPU. Imported before torch, whose OpenMP reads the environment once."""

import os
from collections.abc import MutableMapping

#: Turns that a thread makes before it sleeps. GNU's OpenMP, which torch's wheels bring along, makes 300,000: many
#: milliseconds, in which it holds a core that another program, or the thread it waits for, may need. One that sleeps
#: at once must be woken for each of the thousands of small operations of an update, which costs more than it saves.
SPIN_COUNT = "10000"


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bounds the time that waiting threads spin, in programs that start with ``environment``; a user's choice stays."""
    if not environment.get("GOMP_SPINCOUNT") and not environment.get("OMP_WAIT_POLICY"):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
