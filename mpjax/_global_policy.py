"""The global policy: what a policy, or a module, takes when it is given none."""

import contextlib
from collections.abc import Iterator

from ._ambient import (
    current_policy,
    pop_context_policy,
    push_context_policy,
    set_process_policy,
)
from ._dtype_names import is_floating
from ._identifiers import default_policy, single_policy
from ._policy import DTypePolicy
from ._policy_map import FrozenDTypePolicyMap, Policy, freeze


def dtype_policy() -> DTypePolicy | FrozenDTypePolicyMap:
    """Returns the global policy: of the innermost scope, else of the process, else float32.

    References:
        https://keras.io/api/mixed_precision/policy/
    """
    policy = current_policy()
    return default_policy() if policy is None else policy


def set_dtype_policy(policy: Policy | str) -> None:
    """Sets the global policy of the process, for all threads.

    Inside a `dtype_policy_scope` the scope's policy stays in effect until the scope ends. Of a
    map, a snapshot is kept: editing the map later changes nothing.

    Args:
        policy: A policy, a map, or the name of a policy.

    Raises:
        ValueError: If `policy` is anything else, or its compute dtype is not floating-point.

    References:
        https://keras.io/api/mixed_precision/policy/
    """
    set_process_policy(_global_candidate(policy))


@contextlib.contextmanager
def dtype_policy_scope(
    policy: Policy | str,
) -> Iterator[DTypePolicy | FrozenDTypePolicyMap]:
    """Makes `policy` the global policy inside a `with` block, for this thread or task only.

    Args:
        policy: As in `set_dtype_policy`.

    Yields:
        The policy in effect; of a map, its snapshot.

    Raises:
        ValueError: As in `set_dtype_policy`.
    """
    candidate = _global_candidate(policy)
    token = push_context_policy(candidate)
    try:
        yield candidate
    finally:
        pop_context_policy(token)


def _global_candidate(policy: Policy | str) -> DTypePolicy | FrozenDTypePolicyMap:
    """Returns what is stored for `policy`, checked."""
    if isinstance(policy, str):
        policy = single_policy(policy)
    if not isinstance(policy, Policy):
        raise ValueError(
            "Invalid `policy` argument. Expected the string name of a policy (such as "
            f"'mixed_float16') or a policy. Received: policy={policy!r} (of type {type(policy)})"
        )
    if not is_floating(policy.compute_dtype):
        raise ValueError(
            "The global policy can only be a floating-point policy, such as 'float32' or "
            f"'mixed_float16', but got policy: {policy.name}"
        )
    return freeze(policy)
