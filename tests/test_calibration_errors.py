"""What `mp.quantize(calibration=)` refuses, by name, before or instead of changing anything."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
from tests.helpers import assert_trees_equal

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (4, 8)))
BAD = X.copy()
BAD[2, 3] = np.nan
HUGE = np.full((4, 8), 1e38, np.float32)


class Net(nn.Module):
    """The inputs of `last` overflow for large numbers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="first")(x)
        return nn.Dense(4, name="last")(x * x)

    def awq(self, x):
        return self(x)

    def encode(self, x):
        return self(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.zero = nnx.Linear(8, 8, rngs=rngs)  # called first, and last by name
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.zero(x)
        return self.last(x * x)


def linen(policy="int8_static_from_float32"):
    return mp.wrap(Net(), policy), {"params": Net().init(KEY, X)["params"]}


def refused(error, match, policy="int8_static_from_float32", **options):
    model, variables = linen(policy)
    options.setdefault("calibration", [X])
    with pytest.raises(error, match=match):
        mp.quantize(model, variables, **options)


def generator():
    yield X


def used_up():
    batches = generator()
    list(batches)
    return batches


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "`calibration` has no batch: it is empty, or a generator that was used"),
        (used_up(), ValueError, "`calibration` has no batch"),
        (X, TypeError, r"iterable of batches.*got a ndarray of shape \(4, 8\): put a single batch"),
        ({"x": X}, TypeError, "iterable of batches.* got a dict: put a single batch into a list"),
        (3, TypeError, "iterable of batches.* got a int"),
        ([X, X[:0]], ValueError, r"batch 1 of `calibration` is empty: its argument 0 has shape"),
        ([{"x": X[:0]}], ValueError, r"batch 0 of `calibration` is empty: its argument 'x' has"),
        ([X, X, BAD], ValueError, "batch 2 of `calibration` is not finite: its argument 0 holds"),
        ([{"x": BAD}], ValueError, "batch 0 of `calibration` is not finite: its argument 'x'"),
        (
            [X, HUGE],
            ValueError,
            "batch 1 of `calibration` is finite, but makes the input of layer 'last' NaN or",
        ),
        ([X, X[:, :7]], ValueError, "batch 1 of `calibration` does not fit Net: "),
    ],
)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_batches_that_are_refused(api, batches, error, match):
    if api == "linen":
        if hasattr(batches, "send"):
            batches = used_up()
        return refused(error, match, calibration=batches)
    model = mp.wrap(NNXNet(nnx.Rngs(0)), "int8_static_from_float32")
    before = nnx.state(nnx.clone(model))
    match = match.replace("fit Net", "fit NNXNet")
    with pytest.raises(error, match=match):
        mp.quantize(model, calibration=batches)
    assert_trees_equal(nnx.state(model), before)


def test_the_first_operand_that_is_not_finite_is_named_in_the_order_of_the_calls():
    model = mp.wrap(NNXNet(nnx.Rngs(0)), "int8_from_float32")
    model.zero.kernel[...] = model.zero.kernel[...] * 1e20
    with pytest.raises(
        ValueError, match="batch 0 .* makes the input of layer 'last' NaN or infinite\\."
    ):
        mp.quantize(model, calibration=[X], method="smoothquant")
    big = mp.wrap(NNXNet(nnx.Rngs(0)), "int8_from_float32")
    with pytest.raises(ValueError, match="batch 0 .* input of layer 'last' NaN"):
        mp.quantize(big, calibration=[HUGE], method="gptq")


@pytest.mark.slow
def test_a_layer_of_a_stack_is_named_by_its_number():
    class Square(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="layer")(x) ** 2, None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(Square, length=3, **axes)(name="blocks")(x, None)[0]

    model = mp.wrap(Stack(), "int8_from_float32")
    variables = {"params": Stack().init(KEY, X)["params"]}
    match = r"the input of layer 'blocks/layer' \(number 2 of a stack\) NaN or infinite"
    with pytest.raises(ValueError, match=match):
        mp.quantize(model, variables, calibration=[X * 1e12], method="smoothquant")


def test_weights_that_a_scan_shares_between_its_steps_are_refused():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_broadcast": "params", "split_rngs": {"params": False}}
            return nn.scan(Step, length=3, **axes)()(x, None)[0]

    model = mp.wrap(Loop(), "int8_from_float32")
    variables = {"params": Loop().init(KEY, X)["params"]}
    with pytest.raises(NotImplementedError, match="Loop cannot be calibrated: .*share between"):
        mp.quantize(model, variables, calibration=[X], method="gptq")


@pytest.mark.parametrize(
    ("policy", "options", "error", "match"),
    [
        (
            "int8_from_float32",
            {"method": "smothquant"},
            ValueError,
            "`method` is 'smothquant', .*of Net that Flax is to call; did you mean 'smoothquant'",
        ),
        (
            "int8_from_float32",
            {"method": "awq"},
            ValueError,
            r"method='awq' could mean calibration or the method of that name of Net: .*Net.awq",
        ),
        ("int8_from_float32", {"method": 3}, TypeError, "must be a name or a function, got 3"),
        (
            "int8_static_from_float32",
            {"observer": mp.MSE},
            TypeError,
            r"`observer` must be an observer such as .*: MSE\(\)",
        ),
        ("int8_static_from_float32", {"observer": "mse"}, TypeError, "got 'mse'"),
        (
            "int8_from_float32",
            {"observer": mp.MSE()},
            ValueError,
            r"`observer` is MSE\(\), but no policy of the model keeps static scales",
        ),
        ("int8_from_float32", {}, ValueError, "`calibration` was given, but nothing needs it"),
        (
            "gptq/4/8_from_float32",
            {"method": "smoothquant"},
            ValueError,
            "method='smoothquant' was asked for, but the policy 'gptq/4/8_from_float32' chooses",
        ),
        (
            "gptq/4/8_from_float32",
            {"calibration": None},
            ValueError,
            "chooses its weights by gptq, which needs batches .* take 'int4/8_from_float32'",
        ),
        (
            "int8_from_float32",
            {"method": "gptq", "calibration": None},
            ValueError,
            "method='gptq' needs batches to learn from",
        ),
        (
            "int8_static_from_float32",
            {"observer": mp.MSE(), "calibration": None},
            ValueError,
            r"observer=MSE\(\) needs batches to learn from",
        ),
        ("float32", {}, ValueError, "nothing to quantize: .*has no quantization mode"),
        (
            "int4/128_from_float32",
            {"method": "gptq"},
            ValueError,
            "no layer of Net takes the method asked for; it has 8 inputs or outputs, fewer than",
        ),
        ("int8_static_from_float32", {"mutable": ["x"]}, ValueError, "leave `mutable` out"),
    ],
)
def test_what_is_asked_for_is_checked(policy, options, error, match):
    refused(error, match, policy, **options)


def test_awq_is_for_activations_that_are_not_quantized():
    model = mp.wrap(nn.Dense(8), "int8_from_float32")
    variables = {"params": nn.Dense(8).init(KEY, X)["params"]}
    with pytest.raises(ValueError, match="would change nothing.*awq is for activations that are"):
        mp.quantize(model, variables, calibration=[X], method="awq")


def test_a_nan_among_the_weights_is_named_before_the_batches_are_taken():
    model, variables = linen()
    variables["params"]["last"]["kernel"] = variables["params"]["last"]["kernel"].at[0].set(np.nan)
    with pytest.raises(ValueError, match="'params/last/kernel' has 4 of 32 values that are NaN"):
        mp.quantize(model, variables, calibration=[X])


def test_calibration_is_not_traced():
    model, variables = linen()
    with pytest.raises(ValueError, match="cannot be traced: call mp.quantize outside"):
        jax.eval_shape(lambda v: mp.quantize(model, v, calibration=[X]), variables)


def test_flax_method_and_calibration_method_are_told_apart():
    model, variables = linen("int8_from_float32")
    expected = mp.quantize(model, variables, X)
    for method in ("encode", Net.encode, lambda m, x: m(x)):
        assert_trees_equal(mp.quantize(model, variables, X, method=method), expected)
    # Flax' may come with the batch, beside the calibration's.
    batch = {"x": X, "method": "encode"}
    quantized = mp.quantize(model, variables, calibration=[batch], method="smoothquant")
    expected = mp.quantize(model, variables, calibration=[X], method="smoothquant")
    assert_trees_equal(quantized, expected)


def test_a_bar_without_tqdm_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        ImportError, r"progress=True needs tqdm: `pip install 'mpjax\[progress\]'", progress=True
    )
    model, variables = linen()
    mp.quantize(model, variables, calibration=[X])
