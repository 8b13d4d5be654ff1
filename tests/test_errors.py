"""Every error that a user meets: its text, and that nothing is changed or lost by it."""

import contextlib
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

import mpjax as mp
from tests.helpers import assert_trees_equal, dot_dtypes

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 6).reshape(2, 3)
INT8 = "int8_from_mixed_bfloat16"

each_api = pytest.mark.parametrize("api", ["linen", "nnx"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(8, name="up")(x)))


class Net(nn.Module):
    out: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(Block(name="block")(x))
        return nn.Dense(self.out, name="head")(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(3, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = NNXBlock(rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.block(x)))


def randomized(shapes: Any) -> Any:
    """Weights for shapes, made without a compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


NNX_GRAPHDEF, NNX_SHAPES = nnx.split(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))))
NNX_WEIGHTS = randomized(NNX_SHAPES)
VARIABLES = randomized(jax.eval_shape(Net().init, KEY, X))


def net(api: str) -> Any:
    if api == "linen":
        return Net()
    return nnx.merge(NNX_GRAPHDEF, jax.tree.map(lambda w: w, NNX_WEIGHTS))  # Variables of its own


def run(model: Any, x: Any = X, variables: Any = VARIABLES) -> Any:
    return model.apply(variables, x) if isinstance(model, nn.Module) else model(x)


def anatomy(model: Any) -> list[Any]:
    """Which objects a model, or a tree of variables, is made of: their classes and identities."""
    if not isinstance(model, nnx.Module):
        return [id(leaf) for leaf in jax.tree.leaves(model)]
    parts = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            parts.append((path, id(node), type(node), id(node.get_raw_value())))
        elif isinstance(node, nnx.Module):
            attributes = {k: id(v) for k, v in vars(node).items() if not k.startswith("_pytree__")}
            parts.append((path, id(node), type(node), attributes))
    return parts


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = anatomy(model)
    yield
    assert anatomy(model) == before


def text_of(function: Any, *args: Any) -> tuple[type, str]:
    """Type and text of the error that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: B017
        function(*args)
    return caught.type, str(caught.value)


def test_the_check_for_changes_can_fail():
    model = net("nnx")
    before = anatomy(model)
    mp.wrap(model, "float32")
    assert anatomy(model) != before
    mp.unwrap(model)
    assert anatomy(model) == before
    model.head.kernel[...] = jnp.zeros((4, 2))
    assert anatomy(model) != before


# -- the policy


@each_api
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            "mixed_float15",
            "Cannot convert 'mixed_float15' to a mixed precision DTypePolicy. Valid policies "
            "include 'mixed_float16', 'mixed_bfloat16', the name of any dtype such as 'float32'",
        ),
        ("int8", r"Cannot convert `policy` into a valid pair .*such as 'int8_from_mixed_bfloat16'"),
        ("int7_from_float32", r"Invalid quantization mode. Expected one of .* mode=int7"),
        (["float32"], r"Expected a string, a dtype, a config or an instance.*\['float32'\]"),
        (
            mp.DTypePolicy("int8"),
            'policy <DTypePolicy "int8"> has compute dtype int8: a module can only be wrapped '
            "with floating-point policies of 16 bits or more, such as 'mixed_bfloat16'; for 8 bits "
            "use a quantized policy, such as 'int8_from_mixed_bfloat16'",
        ),
        (jnp.float8_e4m3fn, 'policy <DTypePolicy "float8_e4m3fn"> has compute dtype float8_e4m3fn'),
        (jnp.int8, 'policy <DTypePolicy "int8"> has compute dtype int8'),
        (mp.DTypePolicyMap("float32", {"head": jnp.int8}), '<DTypePolicy "int8"> has compute dtyp'),
        (mp.DTypePolicyMap(jnp.int8), '<DTypePolicy "int8"> has compute dtype int8'),
        ("bool", "has compute dtype bool"),
        ("complex64", "has compute dtype complex64"),
        (mp.DTypePolicy("float32", output_dtype="int32"), "has output dtype int32"),
        (
            "int8_from_mixed_float16",
            "mode='int8' doesn't work well with compute_dtype='float16'. Use a bfloat16 or "
            "float32 source, such as 'mixed_bfloat16'",
        ),
        ("int8_from_float16", "doesn't work well with compute_dtype='float16'"),
    ],
    ids=str,
)
def test_policies_that_nothing_can_be_wrapped_with(api, policy, message):
    model = net(api)
    with unchanged(model), pytest.raises(ValueError, match=message):
        mp.wrap(model, policy)


def test_what_is_not_a_policy_is_told_where_a_policy_goes():
    # A user who forgot the DTypePolicyMap should hear of it, and of `policy`, not of `dtype`.
    with pytest.raises(ValueError, match="`policy`.*DTypePolicyMap"):
        mp.wrap(Net(), {"head": "float32"})


def test_int8_with_float16_in_a_map_names_the_key():
    with pytest.raises(ValueError, match="key 'head' as one policy.*doesn't work well"):
        mp.DTypePolicyMap("mixed_float16", {"head": "int8_from_mixed_float16"})


def test_refused_global_policies_leave_the_one_before():
    for policy in ("mixed_float15", "int8", "int8_from_float16", mp.DTypePolicy("int8")):
        with pytest.raises(ValueError, match="Cannot convert|doesn't work well|floating-point pol"):
            mp.set_dtype_policy(policy)
        assert mp.dtype_policy() == mp.DTypePolicy("float32")


@each_api
def test_a_refused_policy_leaves_the_one_before(api):
    model = mp.wrap(net(api), "mixed_bfloat16")
    keys = {"head": "float32", "tail": "float32"}
    for policy in (
        "float16x",
        jnp.int8,
        mp.DTypePolicyMap("int32", keys),
    ):
        with unchanged(model), pytest.raises((ValueError, NotImplementedError)):
            mp.wrap(model, policy)
        assert model.policy == mp.DTypePolicy("mixed_bfloat16")
    assert jax.eval_shape(lambda: run(model)).dtype == jnp.bfloat16


# -- keys of a policy map

LINEN_DOORS = {
    "init": lambda model: jax.eval_shape(model.init, KEY, X),
    "apply": lambda model: jax.eval_shape(model.apply, VARIABLES, X),
    "jit": lambda model: jax.jit(model.apply)(VARIABLES, X),
    "bound call": lambda model: jax.eval_shape(lambda v: model.bind(v)(X), VARIABLES),
    "layer_policies": lambda model: mp.layer_policies(model, VARIABLES, X),
    "quantize": lambda model: mp.quantize(model, VARIABLES, X),
}
DOORS = [*LINEN_DOORS, "nnx wrap", "nnx wrap again"]
each_door = pytest.mark.parametrize("door", DOORS)


def pass_door(door: str, policy_map: mp.DTypePolicyMap, **options: Any) -> None:
    """Does the thing at which a model with this map should complain; checks that it is whole."""
    if door in LINEN_DOORS:
        with unchanged(VARIABLES):
            LINEN_DOORS[door](mp.wrap(Net(), policy_map, **options))
        return
    model = net("nnx")
    if door == "nnx wrap again":
        mp.wrap(model, "mixed_bfloat16")
    before = anatomy(model)
    try:
        mp.wrap(model, policy_map, **options)
    except ValueError:
        assert anatomy(model) == before
        raise


@each_door
@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("haed", "'head', "),
        ("blok/up", "'block/up', 'block/down', "),
        ("block/up/.*", "'block/up'"),
    ],
)
def test_a_key_that_matches_no_layer(door, key, nearest):
    message = rf"policy map key '{re.escape(key)}' matches no layer of \w*Net; nearest layer paths"
    with pytest.raises(ValueError, match=f"{message}: {nearest}.*whole path"):
        pass_door(door, mp.DTypePolicyMap("int8_from_float32", {key: "float32"}))


@each_door
def test_a_key_that_matches_only_containers(door):
    message = (
        r"policy map key 'block' matches only the container 'block' of \w*Net, not a layer; write "
        r"'block/\.\*' to reach the layers inside: 'block/(up', 'block/down|down', 'block/up)'"
    )
    with pytest.raises(ValueError, match=message):
        pass_door(door, mp.DTypePolicyMap("int8_from_float32", {"block": "float32"}))


@pytest.mark.parametrize("key", ["block", "bl.ck", ".*k", "(block|tail)", "block|tail", ""])
def test_the_key_that_is_suggested_works(key):
    for door in ("apply", "nnx wrap"):
        with pytest.raises(ValueError, match="matches only the container") as caught:
            pass_door(door, mp.DTypePolicyMap("float32", {key: "bfloat16"}))
        suggested = re.findall("write '(.*)' to reach", str(caught.value))
        pass_door(door, mp.DTypePolicyMap("float32", dict.fromkeys(suggested, "bfloat16")))


@each_door
@pytest.mark.parametrize("key", ["haed", "block"])
def test_not_strict_gives_the_same_as_a_warning(door, key):
    policy_map = mp.DTypePolicyMap("int8_from_float32", {key: "float32"})
    _, text = text_of(pass_door, door, policy_map)
    with pytest.warns(UserWarning) as warned:
        pass_door(door, policy_map, strict=False)
    assert {str(warning.message) for warning in warned} == {text}


@each_api
def test_not_strict_wraps_as_if_the_key_were_not_there(api):
    keys = mp.DTypePolicyMap("float32", {"haed": "float32", "block/.*": "mixed_bfloat16"})
    with pytest.warns(UserWarning, match="'haed' matches no layer"):
        model = mp.wrap(net(api), keys, strict=False)
        products = dot_dtypes(lambda: run(model))
    assert products == [("bfloat16",) * 2, ("bfloat16",) * 2, ("float32",) * 2]


@each_api
def test_the_warning_is_that_of_the_users_own_line(api):
    keys = mp.DTypePolicyMap("float32", {"haed": "bfloat16"})
    with pytest.warns(UserWarning, match="'haed' matches no layer") as warned:
        model = mp.wrap(net(api), keys, strict=False)
        if api == "linen":
            model.apply(VARIABLES, X)
    assert {warning.filename for warning in warned} == {__file__}


@each_door
def test_two_keys_that_match_one_layer(door):
    keys = mp.DTypePolicyMap("int8_from_float32", {".*/up": "float32", "block/.*": "bfloat16"})
    message = r"Path 'block/up' matches multiple dtype policy specification keys: \['\.\*/up', 'bl"
    with pytest.raises(ValueError, match=f"{message}.*at most one key"):
        pass_door(door, keys)


# -- the module


class KerasLike:
    dtype_policy = "float32"

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (KerasLike(), "<.*KerasLike object.*> of type KerasLike"),
        (Net, r".*Net.*; that is a class: pass an instance, Net\(...\)"),
        (NNXNet, r".*NNXNet.*; that is a class: pass an instance, NNXNet\(...\)"),
        (run, "<function run .*> of type function"),
        (Net().apply, "<bound method .*Net.* of type method"),
        (VARIABLES, ".* of type dict"),
        (None, "None of type NoneType"),
        ("float32", "'float32' of type str"),
    ],
    ids=["Keras", "Linen class", "NNX class", "function", "method", "dict", "None", "str"],
)
@pytest.mark.parametrize("function", [mp.wrap, mp.unwrap, mp.quantize, mp.layer_policies])
def test_a_module_that_is_neither_linen_nor_nnx(function, module, shown):
    message = "(?s)`module` must be a flax.linen.Module or a flax.nnx.Module, but got "
    arguments = {mp.wrap: ["float32"], mp.quantize: [VARIABLES, X]}.get(function, [])
    with pytest.raises(TypeError, match=f"{message}{shown}"):
        function(module, *arguments)


def test_the_message_does_not_print_all_weights():
    big = {"params": [jnp.zeros(100)] * 20}
    _, text = text_of(mp.quantize, big, mp.wrap(Net(), INT8), X)
    assert "of type dict" in text and len(text) < 500


@each_api
def test_a_module_that_is_not_wrapped(api):
    model = net(api)
    message = "Net is not wrapped: call `mp.wrap"
    arguments = [VARIABLES, X] if api == "linen" else []
    with unchanged(model), unchanged(VARIABLES):
        with pytest.raises(ValueError, match=message):
            mp.quantize(model, *arguments)
        with pytest.raises(ValueError, match=message):
            mp.layer_policies(model, *arguments)
        with pytest.raises(ValueError, match=message):
            mp.unwrap(model)


def test_a_linen_module_that_is_bound_is_wrapped_too_late():
    with pytest.raises(ValueError, match="already belongs to a bound parent.*from `bind` is wrapp"):
        mp.wrap(Net().bind(VARIABLES), "float32")


def test_calling_a_linen_module_that_is_not_bound_gives_flaxs_own_error():
    model = mp.wrap(Net(), "mixed_bfloat16")
    with pytest.raises(errors.CallCompactUnboundModuleError, match="Can't call compact methods on"):
        model(X)
    assert text_of(model, X) == text_of(Net(), X)


def test_a_rule_that_raises_leaves_the_nnx_module_as_it_was():
    class Odd(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(2))

        def __call__(self, x):
            return x * self.scale[...]

    @mp.nnx.register(Odd)
    def rule(layer, policy):
        raise RuntimeError(f"no rule for {policy.name}")

    model = nnx.Sequential(net("nnx"), Odd())
    with unchanged(model), pytest.raises(RuntimeError, match="no rule for mixed_bfloat16"):
        mp.wrap(model, "mixed_bfloat16")


# -- the variables


def misfits() -> dict[str, tuple[Any, type[Exception], str]]:
    """Variables of other models, and what Flax says of them."""
    dense = {"params": VARIABLES["params"]["head"]}
    wider = randomized(jax.eval_shape(Net(out=3).init, KEY, X))
    return {
        "names": (
            dense,
            errors.ScopeParamNotFoundError,
            'Could not find parameter named "kernel" in scope "/block/up"',
        ),
        "shapes": (
            wider,
            errors.ScopeParamShapeError,
            r'For parameter "kernel" in "/head", .* shape \(4, 2\), but .* has shape \(4, 3\)',
        ),
        "nothing": (
            {"params": {}},
            errors.ScopeCollectionNotFound,
            'Tried to access "kernel" from collection "params" in "/block/up" but the coll',
        ),
    }


@pytest.mark.parametrize("what", ["names", "shapes", "nothing"])
def test_params_of_another_model(what):
    variables, flax_error, flax_message = misfits()[what]
    model = mp.wrap(Net(), INT8)
    message = f"these variables do not fit Net: .*{flax_message}.*Are they the parameters of anot"
    with unchanged(variables):
        with pytest.raises(ValueError, match=message):
            mp.quantize(model, variables, X)
        with pytest.raises(ValueError, match=message):
            mp.layer_policies(model, variables, X)
        with pytest.raises(flax_error, match=flax_message):
            jax.eval_shape(model.apply, variables, X)
        expected = text_of(jax.eval_shape, Net().apply, variables, X)
        assert text_of(jax.eval_shape, model.apply, variables, X) == expected


@each_api
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("layer", ["up", "down"])
def test_weights_that_are_not_finite_are_not_quantized(api, bad, layer):
    model = mp.wrap(net(api), INT8)
    size = {"up": 24, "down": 32}[layer]
    message = f"block/{layer}/kernel' has 2 of {size} values that are NaN or infinite; .*checkpoint"
    if api == "nnx":
        kernel = getattr(model.block, layer).kernel
        kernel[...] = kernel[...].at[:2, 1].set(bad)
        with unchanged(model), pytest.raises(ValueError, match=f"'{message}"):
            mp.quantize(model)
        return
    variables = jax.tree.map(lambda w: w, VARIABLES)
    kernel = variables["params"]["block"][layer]["kernel"]
    variables["params"]["block"][layer]["kernel"] = kernel.at[:2, 1].set(bad)
    with unchanged(variables), pytest.raises(ValueError, match=f"'params/{message}"):
        mp.quantize(model, variables, X)


@each_api
@pytest.mark.parametrize("policy", ["mixed_bfloat16", mp.DTypePolicyMap("float32")], ids=repr)
def test_quantize_without_a_quantized_policy(api, policy):
    model = mp.wrap(net(api), policy)
    arguments = [VARIABLES, X] if api == "linen" else []
    message = (
        r"nothing to quantize: the policy of \w*Net, .*, has no quantization mode. Wrap .*'int8"
    )
    with unchanged(model), unchanged(VARIABLES), pytest.raises(ValueError, match=message):
        mp.quantize(model, *arguments)


@each_api
def test_quantize_without_a_layer_that_can_be_quantized(api):
    model = mp.wrap(net(api), mp.DTypePolicyMap("float32", {"norm": "int8_from_float32"}))
    arguments = [VARIABLES, X] if api == "linen" else []
    message = (
        r"nothing to quantize: the policy of \w*Net, .*, reaches no layer that can be quantized"
    )
    with unchanged(model), unchanged(VARIABLES), pytest.raises(ValueError, match=message):
        mp.quantize(model, *arguments)


def test_quantize_twice_linen():
    model = mp.wrap(Net(), INT8)
    quantized = mp.quantize(model, VARIABLES, X)
    message = r"'params/block/up/kernel' is quantized already \(QTensor.*\): quantize the float wei"
    with unchanged(quantized), pytest.raises(ValueError, match=message):
        mp.quantize(model, quantized, X)


def test_quantize_twice_nnx():
    model = mp.quantize(mp.wrap(net("nnx"), INT8))
    message = r"'block/\w+/kernel' is quantized already \(QTensor.*\): quantize the float weights"
    with unchanged(model), pytest.raises(ValueError, match=message):
        mp.quantize(model)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [([], "NoneType"), ([None, X], "NoneType"), ([X], "ArrayImpl"), ([{}, X], "dict")],
    ids=["nothing", "None", "only x", "empty"],
)
def test_quantize_linen_without_variables(arguments, got):
    message = f"`variables` must be what `init` returned, a dict with 'params', but got {got}"
    with pytest.raises(TypeError, match=f"{message}.*mp.quantize.model, variables, x"):
        mp.quantize(mp.wrap(Net(), INT8), *arguments)


def test_quantize_linen_without_the_arguments_of_a_call():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        mp.quantize(mp.wrap(Net(), INT8), VARIABLES)


@pytest.mark.parametrize("function", [mp.quantize, mp.layer_policies])
def test_the_params_without_their_collection(function):
    # The mistake that everyone makes once: `variables["params"]` in place of `variables`.
    arguments = [X] if function is mp.quantize else []
    with pytest.raises(TypeError, match="'params'.* got a dict with 'block', 'head', 'norm'"):
        function(mp.wrap(Net(), INT8), VARIABLES["params"], *arguments)


def test_layer_policies_linen_without_variables():
    with pytest.raises(
        TypeError, match="does not hold its layers: call mp.layer_policies.model, v"
    ):
        mp.layer_policies(mp.wrap(Net(), INT8))


@pytest.mark.parametrize(
    "arguments",
    [[VARIABLES], [VARIABLES, X], [None, X]],
    ids=["variables", "variables and x", "x"],
)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            mp.quantize,
            r"an NNX model holds its weights .*: call mp.quantize\(model\) with nothing else",
        ),
        (mp.layer_policies, r"an NNX model holds its layers: call mp.layer_policies\(model\)"),
    ],
)
def test_nnx_with_variables(function, message, arguments):
    model = mp.wrap(net("nnx"), INT8)
    error = TypeError
    if function is mp.quantize and arguments == [VARIABLES]:
        # Weights by path are what a model without values is given; these are at other paths.
        error, message = ValueError, "(?s)do not fit .*params/.*among the weights, absent from the"
    with unchanged(model), pytest.raises(error, match=message):
        function(model, *arguments)


@pytest.mark.parametrize(
    "keyword, meant", [("row", "rows"), ("calibrations", "calibration"), ("x", None)]
)
def test_nnx_with_a_misspelt_keyword(keyword, meant):
    model = mp.wrap(net("nnx"), INT8)
    match = (
        f"an NNX model takes no `{keyword}`, but calibration, method, .*rows; and what its calls"
    )
    with unchanged(model), pytest.raises(TypeError, match=match) as error:
        mp.quantize(model, **{keyword: 1})
    assert str(error.value).endswith(f"did you mean `{meant}`?" if meant else "a calibration")


# -- quantized variables under another policy


@pytest.mark.parametrize(
    ("policy", "path"),
    [
        ("mixed_bfloat16", "block/up"),
        ("float32", "block/up"),
        (mp.DTypePolicyMap(INT8, {"head": "float32"}), "head"),
    ],
    ids=str,
)
def test_quantized_variables_under_a_float_policy(policy, path):
    quantized = mp.quantize(mp.wrap(Net(), INT8), VARIABLES, X)
    message = (
        rf"parameter 'kernel' of layer '{path}' is quantized \(QTensor.*policy is <DTypePolicy.*: "
        "apply quantized variables with the model that `mp.quantize` was given, or wrap this one"
    )
    with unchanged(quantized), pytest.raises(TypeError, match=message):
        jax.eval_shape(mp.wrap(Net(), policy).apply, quantized, X)


@pytest.mark.parametrize(
    ("policy", "path"),
    [
        ("mixed_bfloat16", "block/(up|down)"),
        ("float32", "block/(up|down)"),
        (mp.DTypePolicyMap(INT8, {"head": "float32"}), "head"),
    ],
    ids=str,
)
def test_a_quantized_nnx_model_under_a_float_policy(policy, path):
    model = mp.quantize(mp.wrap(net("nnx"), INT8))
    message = rf"layer '{path}' is quantized \(QTensor.*, which <DTypePolicy .* cannot undo: keep"
    with unchanged(model), pytest.raises(ValueError, match=message):
        mp.wrap(model, policy)
    assert model.policy == mp.get_policy(INT8)


@each_api
@pytest.mark.parametrize(
    "message",
    [r"QTensor\(int8\[3,8\], .* cannot be used as an array", "wrap"],
    ids=["refused", "remedy"],
)
def test_quantized_weights_without_a_wrap(api, message):
    model, variables = mp.wrap(net(api), INT8), VARIABLES
    if api == "linen":
        variables = mp.quantize(model, variables, X)
    else:
        mp.quantize(model)
    with pytest.raises(TypeError, match=message):
        run(mp.unwrap(model), variables=variables)


# -- derivatives

NO_DERIVATIVE = (
    "no (useful )?derivative.*use mpjax_kernels.quantized_dot_general, or a policy of mpjax; "
    "differentiate the model before it is quantized"
)


def int8_loss(variables, x=X):
    return mp.wrap(Net(), INT8).apply(variables, x).astype(jnp.float32).sum()  # pyright: ignore


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda: jax.grad(lambda q: int8_loss(q), allow_int=True)(quantized_variables()),
        lambda: jax.grad(int8_loss, argnums=1)(quantized_variables(), X),
        lambda: jax.jit(jax.grad(int8_loss, argnums=1))(quantized_variables(), X),
        lambda: jax.jvp(lambda x: int8_loss(quantized_variables(), x), (X,), (X,)),
    ],
    ids=["grad", "grad of x", "jit", "jvp"],
)
def test_quantized_weights_have_no_derivative(differentiate):
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        differentiate()


@each_api
def test_an_int8_model_of_float_weights_is_trained_straight_through(api):
    if api == "linen":
        gradient = jax.grad(int8_loss)(VARIABLES)["params"]["head"]
    else:
        model = mp.wrap(net("nnx"), INT8)
        gradient = nnx.grad(lambda m: m(X).astype(jnp.float32).sum())(model)["head"]
    np.testing.assert_array_equal(gradient["bias"][...], [2, 2])  # once per row of X
    assert np.all(np.isfinite(gradient["kernel"][...])) and np.any(gradient["kernel"][...] != 0)


def quantized_variables() -> Any:
    return mp.quantize(mp.wrap(Net(), INT8), VARIABLES, X)


def test_quantized_weights_are_no_inputs_to_differentiate():
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs.*got int8"):
        jax.grad(int8_loss)(quantized_variables())
    model = mp.quantize(mp.wrap(net("nnx"), INT8))
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs.*got int8"):
        nnx.grad(lambda m: m(X).astype(jnp.float32).sum())(model)


def test_what_no_rounding_lies_behind_can_be_differentiated():
    quantized = quantized_variables()
    head = quantized["params"]["head"]

    def loss(bias):
        params = {**quantized["params"], "head": {**head, "bias": bias}}
        return int8_loss({"params": params})

    np.testing.assert_array_equal(jax.grad(loss)(head["bias"]), [2, 2])  # once per row of X

    def distillation(variables):
        return jnp.sum(Net().apply(variables, X) - int8_loss(quantized)) / 2

    gradient = jax.jit(jax.grad(distillation))(VARIABLES)
    np.testing.assert_array_equal(gradient["params"]["head"]["bias"], [1, 1])


# -- float64

NEEDS_X64 = (
    r"has {} dtype float64, which JAX turns into float32 unless the flag jax_enable_x64 is set: "
    r"call jax.config.update\('jax_enable_x64', True\)"
)


@each_api
@pytest.mark.parametrize(
    ("policy", "role"),
    [
        ("float64", "compute"),
        ("params=float64,compute=float32", "variable"),
        ("params=float32,output=float64", "output"),
        ("int8_from_float64", "compute"),
        (mp.DTypePolicyMap("float32", {"head": "float64"}), "compute"),
    ],
    ids=str,
)
def test_float64_needs_the_flag(api, policy, role):
    model = net(api)
    with unchanged(model), pytest.raises(ValueError, match=NEEDS_X64.format(role)):
        mp.wrap(model, policy)


FLOAT64 = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn, nnx
import mpjax as mp
from tests.helpers import dot_dtypes

x = np.linspace(-1, 1, 6).reshape(2, 3)
model = mp.wrap(nn.Dense(4), "float64")
assert model.policy.name == "float64"
variables = model.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
assert {w.dtype.name for w in jax.tree.leaves(variables)} == {"float64"}, variables
kernel = np.asarray(variables["params"]["kernel"])
for argument in (jnp.asarray(x), jnp.asarray(x, jnp.float32)):
    assert dot_dtypes(model.apply, variables, argument) == [("float64", "float64")]
    y = model.apply(variables, argument)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, np.asarray(argument, np.float64) @ kernel, rtol=0, atol=1e-15)
gradient = jax.grad(lambda v: model.apply(v, x).sum())(variables)
assert {g.dtype.name for g in jax.tree.leaves(gradient)} == {"float64"}

layer = mp.wrap(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "float64")
assert dot_dtypes(layer, jnp.asarray(x, jnp.float32)) == [("float64", "float64")]
y = layer(jnp.asarray(x))
assert y.dtype == jnp.float64
expected = x @ np.asarray(layer.kernel[...], np.float64)
np.testing.assert_allclose(y, expected, rtol=0, atol=1e-15)

mixed = mp.wrap(nn.Dense(4), "params=float64,compute=float32")
params = mixed.init(jax.random.key(0), x)["params"]
assert {w.dtype.name for w in params.values()} == {"float64"}
assert mixed.apply({"params": params}, x).dtype == jnp.float32
print("float64 works")
"""


def test_float64_works_under_the_flag():
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", FLOAT64],
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "float64 works", result.stderr


# -- the input

POLICIES = ["float32", "mixed_bfloat16", INT8]


@each_api
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integer_inputs_are_computed_as_floats(api, policy, dtype):
    model = mp.wrap(net(api), policy)
    x = jnp.array([[1, 0, 1], [0, 1, 1]])
    y = run(model, x.astype(dtype))
    assert y.dtype == model.policy.compute_dtype
    assert_trees_equal(y, run(model, x.astype(jnp.float32)))


@each_api
@pytest.mark.parametrize("policy", POLICIES)
def test_float_tokens_give_flaxs_own_error(api, policy):
    def embed() -> Any:
        return nn.Embed(5, 2) if api == "linen" else nnx.Embed(5, 2, rngs=nnx.Rngs(0))

    variables = {"params": {"embedding": jnp.ones((5, 2))}}
    model = mp.wrap(embed(), policy)
    with pytest.raises(ValueError, match="Input type must be an integer or unsigned integer"):
        run(model, X, variables)
    assert text_of(run, model, X, variables) == text_of(run, embed(), X, variables)


@each_api
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            "abc",
            "tuple index out of range|not a valid JAX array type|expected number, got str|"
            "could not convert string to flo",
        ),
        (np.array(["a", "b", "c"]), "<U1|could not convert string to flo|Error interpreting argum"),
        (None, "tuple index out of range|[Nn]one"),
    ],
    ids=["str", "array of str", "None"],
)
@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")
def test_inputs_that_are_no_arrays(api, policy, x, message):
    with pytest.raises((TypeError, IndexError, AttributeError, ValueError), match=message):
        run(mp.wrap(net(api), policy), x)


@each_api
@pytest.mark.parametrize("policy", [*POLICIES, "quantized"])
def test_an_empty_batch(api, policy):
    model = mp.wrap(net(api), INT8 if policy == "quantized" else policy)
    variables, empty = VARIABLES, jnp.ones((0, 3))
    if policy == "quantized" and api == "linen":
        variables = mp.quantize(model, VARIABLES, empty)
    elif policy == "quantized":
        mp.quantize(model)
    y = run(model, empty, variables)
    assert y.shape == (0, 2) and y.dtype == model.policy.compute_dtype


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_feature_size_gives_flaxs_own_error(policy):
    model, wide = mp.wrap(Net(), policy), jnp.ones((2, 5))
    message = r'"kernel" in "/block/up", .* generate shape \(5, 8\), but .* has shape \(3, 8\)'
    with pytest.raises(errors.ScopeParamShapeError, match=message):
        model.apply(VARIABLES, wide)
    expected = text_of(Net().apply, VARIABLES, wide)
    assert text_of(model.apply, VARIABLES, wide) == expected
    if policy == INT8:
        assert text_of(model.apply, quantized_variables(), wide) == expected
        with pytest.raises(ValueError, match=f"these variables do not fit Net: .*{message}"):
            mp.quantize(model, VARIABLES, wide)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_feature_size_nnx(policy):
    model, wide = mp.wrap(net("nnx"), policy), jnp.ones((2, 5))
    if policy != INT8:
        with pytest.raises(TypeError, match="dot_general requires contracting dimensions.*5.*3"):
            model(wide)
        assert text_of(model, wide) == text_of(net("nnx"), wide)
        return
    for each in (model, mp.quantize(mp.wrap(net("nnx"), INT8))):
        with pytest.raises(
            ValueError, match=r"shape \(2, 5\) but .*\(3, 8\): contracting 5 with 3"
        ):
            each(wide)


# -- calls that Flax refuses, with what they mean here


class Trained(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(self.rate, deterministic=not train)(nn.Dense(4)(x))
        return nn.BatchNorm(use_running_average=not train)(x)


def notes(error: pytest.ExceptionInfo) -> str:
    return " ".join(error.value.__notes__)


@pytest.mark.parametrize("call", [mp.quantize, mp.layer_policies, mp.export])
def test_a_call_of_training_is_said_to_be_one(call):
    model = mp.wrap(Trained(), INT8)
    variables = jax.eval_shape(functools.partial(model.init, train=False), KEY, X)
    variables = randomized(variables)
    with pytest.raises(errors.InvalidRngError) as error:
        call(model, variables, X, train=True)
    assert "the call of Trained draws random numbers, as dropout does in training" in notes(error)
    assert "train=False" in notes(error)
    with pytest.raises(errors.ModifyScopeVariableError) as error:
        call(mp.wrap(Trained(0.0), INT8), variables, X, train=True)
    assert "the call of Trained changes variables, as a batch norm does" in notes(error)


@pytest.mark.parametrize("call", [mp.quantize, mp.layer_policies, mp.export, mp.init_scaling])
def test_a_forgotten_argument_is_asked_for_with_the_signature(call):
    model = mp.wrap(Trained(), "int8_static_from_mixed_bfloat16")
    variables = randomized(jax.eval_shape(functools.partial(model.init, train=False), KEY, X))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'train'") as error:
        call(model, variables, X)
    assert "Trained.__call__ takes (self, x, train)" in notes(error)


def test_a_type_error_of_the_model_itself_is_left_alone():
    class Bad(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x) + "text"

    layer = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    with pytest.raises(TypeError) as error:
        mp.quantize(mp.wrap(Bad(), INT8), {"params": {"Dense_0": layer}}, X)
    assert "takes (self" not in " ".join(getattr(error.value, "__notes__", ()))


def test_the_signature_is_that_of_the_method_called():
    class Two(nn.Module):
        def setup(self):
            self.layer = nn.Dense(4)

        def __call__(self, x):
            return self.layer(x)

        def encode(self, x, scale):
            return self.layer(x) * scale

    model = mp.wrap(Two(), INT8)
    variables = randomized(jax.eval_shape(model.init, KEY, X))
    for method in ("encode", model.encode, Two.encode):
        with pytest.raises(TypeError, match="'scale'") as error:
            mp.quantize(model, variables, X, method=method)
        assert "Two.encode takes (self, x, scale)" in notes(error)


def test_wrapping_what_nnx_jit_was_given_tells_the_classes_apart():
    for transform in (nnx.jit, nnx.grad):
        with pytest.raises(
            ValueError, match=r"Linear \(wrapped by mp.wrap\)'.* a node of .*Linear'>"
        ):
            transform(lambda m, x: mp.wrap(m, "mixed_bfloat16")(x).sum())(
                nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X
            )


def test_an_nnx_model_is_not_changed_from_within_a_trace():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(errors.TraceContextError) as error:
        jax.jit(lambda x: mp.wrap(model, "float8_from_mixed_bfloat16")(x))(X)
    assert "mp.wrap changes an NNX model in place, and this one was made outside" in notes(error)
    assert type(model) is nnx.Linear
    mp.wrap(model, INT8)
    kernel = model.kernel.get_raw_value()
    for donate in (False, True):
        with pytest.raises(errors.TraceContextError) as error:
            jax.jit(lambda x, donate=donate: mp.quantize(model, donate=donate)(x))(X)
        assert "call mp.quantize before that function" in notes(error)
        assert model.kernel.get_raw_value() is kernel and not kernel.is_deleted()


def test_linen_variables_are_quantized_within_a_trace_too():
    model = mp.wrap(Net(), INT8)
    y = jax.jit(lambda x: model.apply(mp.quantize(model, VARIABLES, x), x))(X)
    np.testing.assert_array_equal(y, jax.jit(model.apply)(mp.quantize(model, VARIABLES, X), X))
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), VARIABLES)
    with pytest.raises(ValueError, match="'params/block/up/kernel' has 1 of 24 values"):
        jax.jit(lambda x: model.apply(mp.quantize(model, bad, x), x))(X)
