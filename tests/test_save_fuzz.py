"""`mp.load` of files that are damaged in every way: equal to what was saved, or our error."""

import copy
import json
import random
import time
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
import mpjax_kernels as mk
from mpjax._safetensors import encode_header

W = jax.random.normal(jax.random.key(0), (4, 6))
TREE = {
    "params": {
        "int8": mk.contiguous(mk.quantize(W, "int8", axis=0), axis=0),
        "int4": mk.quantize(W, "int4", axis=0, group_size=2, symmetric=False),
        "float8": mk.quantize(W, "float8_e4m3fn"),
        "bias": jnp.arange(3, dtype=jnp.bfloat16),
        "empty": {},
    },
    "scaling": {
        "input": mp.ScalingState(
            amax_history=jnp.ones(2),
            scale=jnp.float32(2),
            observed=jnp.float32(3),
            recipe=mp.DelayedScaling(2),
            format="float8_e4m3fn",
            of_gradient=False,
        )
    },
    "rngs": {"key": jax.random.key(1)},
}
# What a header may say of a number, a text or a list, and is not so.
NASTY = [
    *(0, 1, -1, 2, 3, 7, 8, 255, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 10**30),
    *(0.5, 1e308, float("nan"), float("inf"), True, None, "", "a", "F32", "I8", "int4", "float64"),
    *("\ud800", "\x00", "../../x", [], [0], [-1], [2**40, 2**40], [0, 2**62], [1.0], ["1"], {}),
    *({"shape": [1]}, {"class": "DelayedScaling", "amax_history_length": 2**40}, [[]], [1] * 40),
]
MOST_BYTES = 2 << 20  # of Python and NumPy, to load a file of three kilobytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = mp.save(tmp_path_factory.mktemp("fuzz") / "m", TREE, policy="int8_from_mixed_bfloat16")
    return path.read_bytes()


def bits(tree):
    """All there is to a tree, to be compared."""
    leaves = jax.tree.leaves(tree)
    data = [jax.random.key_data(x) if x.dtype == TREE["rngs"]["key"].dtype else x for x in leaves]
    arrays = [np.asarray(x) for x in data]
    return jax.tree.structure(tree), [(x.dtype, x.shape, x.tobytes()) for x in arrays]


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_in_front(data, rng):
    return flip(data[:16], rng) + data[16:]


def insert(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 1, 8, 1000])) + data[at:]


def delete(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice([1, 1, 8, 300]) :]


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def copy_over(data, rng):
    start, at, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 200)
    piece = data[start : start + size]
    return data[:at] + piece + data[at + len(piece) :]


def other_length(data, rng):
    length = rng.choice([0, 1, 2, len(data), len(data) - 8, 10**8, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + data[8:]


def places(node):
    """Every container in a JSON value with each of its keys."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node))
    found = [(node, key) for key, _ in items]
    for _, child in items:
        if isinstance(child, dict | list):
            found += places(child)
    return found


def splice(node, rng):
    """Changes one value, name or length somewhere in a JSON value."""
    container, key = rng.choice(places(node))
    how = rng.choice(["value", "value", "value", "remove", "rename", "repeat", "copy"])
    if how == "value":
        container[key] = copy.deepcopy(rng.choice(NASTY))
    elif how == "remove":
        del container[key]
    elif how == "rename" and isinstance(container, dict):
        container[rng.choice(["", "a", "params/int8", "value", "\udfff"])] = container.pop(key)
    elif how == "repeat" and isinstance(container, list):
        container.insert(key, container[key])
    else:
        other, at = rng.choice(places(node))
        container[key] = copy.deepcopy(other[at])


def splice_header(data, rng):
    header, rest = split(data)
    splice(header, rng)
    return joined(header, rest)


def repeat_name(data, rng):
    header, rest = split(data)
    name = rng.choice(list(header))
    text = json.dumps(header)[:-1] + f",{json.dumps(name)}:{json.dumps(header[name])}}}"
    return len(text).to_bytes(8, "little") + text.encode() + rest


def nest_deeply(data, rng):
    header, rest = split(data)
    deep = rng.choice(["[", '{"a":']) * rng.choice([100, 10_000, 200_000])
    text = json.dumps(header)[:-1] + ',"x":' + deep
    return len(text).to_bytes(8, "little") + text.encode() + rest


def splice_contents(data, rng, forge=False):
    header, rest = split(data)
    metadata = header["__metadata__"]
    content = json.loads(metadata["mpjax"])
    splice(content, rng)
    metadata["mpjax"] = json.dumps(content)
    if forge:
        crc32 = zlib.crc32(metadata["mpjax"].encode())
        metadata["mpjax_crc32"] = f"{crc32:08x}"
    return joined(header, rest)


def forge(data, rng):
    """A changed header with the checksum that belongs to it: another file, perhaps a valid one."""
    return splice_contents(data, rng, forge=True)


HARMS = [
    *(flip, flip_in_front, insert, delete, truncate, copy_over, other_length),
    *(splice_header, splice_header, repeat_name, nest_deeply, splice_contents, forge, forge),
]


def fuzz(saved, path, seeds):
    """How many of the changed files load; the rest raise our error."""
    expected, loads = bits(TREE), 0
    mp.load(path)  # what is loaded once only
    mp.load_policy(path)
    tracemalloc.start()
    try:
        for seed in seeds:
            rng = random.Random(seed)
            harm = HARMS[seed % len(HARMS)]
            path.write_bytes(harm(saved, rng))
            start = time.monotonic()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for load in (mp.load, mp.load_policy):
                try:
                    found = load(path)
                except mp.ModelFileError as error:
                    assert str(path) in str(error), (seed, harm)
                    continue
                if load is mp.load:
                    loads += 1
                    assert harm is forge or bits(found) == expected, (seed, harm)
            used = tracemalloc.get_traced_memory()[1] - before
            assert used < MOST_BYTES + 20 * path.stat().st_size, (seed, harm, used)
            assert time.monotonic() - start < 10, (seed, harm)
    finally:
        tracemalloc.stop()
    return loads


def run(saved, tmp_path, seeds):
    path = tmp_path / "m"
    path.write_bytes(saved)
    return fuzz(saved, path, seeds)


def test_damaged_files(saved, tmp_path):
    loads = run(saved, tmp_path, range(300))
    assert 0 < loads < 100  # some changes change nothing, most do


@pytest.mark.slow
def test_ten_thousand_damaged_files(saved, tmp_path):
    assert run(saved, tmp_path, range(1000, 11_000)) > 0


def test_damaged_files_of_others(tmp_path):
    """They have no checksums, so a change may load; whatever the header says, nothing else."""
    path = tmp_path / "m"
    tensors = {
        "a.weight": ((4, 6), np.int8),
        "a.weight_scale": ((4, 1), np.float32),
        "b": ((3,), np.float16),
    }
    header = encode_header({n: (np.dtype(t), s) for n, (s, t) in tensors.items()}, {})
    whole = header + np.ones(24 + 16 + 6, np.uint8).tobytes()
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        harms = [h for h in HARMS if h not in (splice_contents, forge)]
        path.write_bytes(harms[seed % len(harms)](whole, rng))
        try:
            found = mp.load_safetensors(path)
        except mp.ModelFileError:
            refused += 1
            continue
        assert sum(x.nbytes for x in jax.tree.leaves(found)) <= path.stat().st_size, seed
    assert 100 < refused < 300


def test_every_byte_counts(saved, tmp_path):
    """No byte of the arrays, or of what is said of them, can change unnoticed."""
    path = tmp_path / "m"
    rng = random.Random(0)
    for at in rng.sample(range(len(saved)), 200):
        path.write_bytes(saved[:at] + bytes([saved[at] ^ 1 << rng.randrange(8)]) + saved[at + 1 :])
        try:
            found = mp.load(path)
        except mp.ModelFileError:
            continue
        assert bits(found) == bits(TREE), at
