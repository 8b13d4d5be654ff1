"""`init_scaling`: scaling states for weights that were trained, or loaded, without them."""

from typing import Any

from ._wrap import wrapped_adapter_of


def init_scaling(model: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds new scaling states to the variables of a wrapped Linen model, as `init` would.

    Args:
      model: a wrapped Linen module. (An NNX model is given its states by `wrap`.)
      variables: `{"params": ..., ...}`; states that it holds are replaced.
      *args: the arguments of one call; arrays may be `jax.ShapeDtypeStruct`s: the call is traced
        to meet the layers, never run.
      **kwargs: keyword arguments of the call (`train=False`, `method=`, `rngs=`, ...).

    Returns:
      The variables with the collection `scaling`; as they were, under a policy that keeps no state.

    Raises:
      TypeError: the model is an NNX one, or `variables` is something else.
      ValueError: the model is not wrapped, or the variables are another model's.
    """
    adapter = wrapped_adapter_of(model)
    if not hasattr(adapter, "init_scaling"):
        raise TypeError(
            "mp.wrap gave the NNX model its scaling states already; for new ones, unwrap it and "
            "wrap it again"
        )
    return adapter.init_scaling(model, variables, *args, **kwargs)
