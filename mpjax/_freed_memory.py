"""What was freed, given back to the system.

glibc keeps an arena of freed memory for each thread. The threads that decode a checkpoint are many
and short of work, so that what they have freed can exceed all that is in use.
"""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Gives freed memory back to the system, where the C library has a function that does."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library that could be asked
        return None
