"""Where the global policy is kept: one for the process, and one per context on top of it.

Only storage: `_global_policy.py` checks what goes in. It is a file of its own because a policy
reads the global one while it is built, and so must not import what is built from policies.
"""

import contextvars
import threading
from typing import Any

DEFAULT_NAME = "float32"

_lock = threading.Lock()
_process_policy: Any = None
_context_policy: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "mpjax_dtype_policy", default=None
)


def current_policy() -> Any:
    """Returns the policy of this context, else of the process, else None."""
    policy = _context_policy.get()
    if policy is not None:
        return policy
    with _lock:
        return _process_policy


def current_source_name() -> str:
    """Returns the name that a policy built without one takes."""
    policy = current_policy()
    return DEFAULT_NAME if policy is None else policy.source_name


def set_process_policy(policy: Any) -> None:
    """Replaces the policy of the process, for all of its threads."""
    global _process_policy
    with _lock:
        _process_policy = policy


def push_context_policy(policy: Any) -> contextvars.Token[Any]:
    """Replaces the policy of this context until `pop_context_policy` is given the token."""
    return _context_policy.set(policy)


def pop_context_policy(token: contextvars.Token[Any]) -> None:
    """Restores the policy that this context had before `push_context_policy`."""
    _context_policy.reset(token)
