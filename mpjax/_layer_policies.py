"""`layer_policies`: which policy each layer of a wrapped model got."""

from typing import Any

from ._policy import DTypePolicy
from ._wrap import wrapped_adapter_of


def layer_policies(
    model: Any, variables: Any = None, *args: Any, **kwargs: Any
) -> dict[str, DTypePolicy]:
    """Lists every layer of a wrapped model with its policy, in the model's own order.

    A layer is a module that owns parameters. One that keeps its own dtype against the model's
    policy, because its author set `dtype=` or wrapped it by itself, is listed with that policy. One
    that a quantized policy cannot quantize (an embedding, a norm, a convolution) is listed with
    the policy all the same, and computes in its source precision.

    Args:
      model: a wrapped Linen or NNX module.
      variables: Linen: its variables, or their shapes (`jax.eval_shape(model.init, ...)`).
        NNX: nothing.
      *args: Linen: the arguments of one call (arrays or `ShapeDtypeStruct`s; traced, never run),
        which only a trace can tell the layers that keep their own dtype from. Without them every
        layer is listed with what the model's policy says of its path.
      **kwargs: Linen: keyword arguments of the call.

    Returns:
      A dict from path to `DTypePolicy`, from which a `DTypePolicyMap` can be filled:

          policy_map = mp.DTypePolicyMap("mixed_bfloat16")
          for path, policy in mp.layer_policies(model, variables).items():
              if policy.quantization_mode is not None:
                  policy_map[path] = policy

    Raises:
      TypeError: `model` is not a Flax module, or a Linen model comes without variables.
      ValueError: `model` is not wrapped, or the variables belong to another model.
    """
    return wrapped_adapter_of(model).layer_policies(model, variables, *args, **kwargs)
