"""The table of hardware, and how a name, a device or a set of CPU flags finds its row."""

import jax
import pytest

import mpjax as mp
from mpjax._target_cpu import cpu_at_hand, target_of_flags

TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}
TPUS["tpu7x"] = "TPU7x"
GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "mi300": "AMD Instinct MI300X",
}
EIGHT_BITS = {
    **{"v4": None, "v5e": "int8", "v5p": "int8", "v6e": "int8", "tpu7x": "float8_e4m3fn"},
    **{"a100": "int8", "mi300": "int8"},
    **dict.fromkeys(("h100", "h200", "b200"), "float8_e4m3fn"),
    **dict.fromkeys(("cpu-avx2", "cpu-avx512", "cpu-generic")),
    **dict.fromkeys(("cpu-amx", "cpu-avx512-bf16", "cpu-avx512-vnni", "cpu-avx-vnni"), "int8"),
    **dict.fromkeys(("cpu-arm-i8mm", "cpu-arm-dotprod"), "int8"),
}


def test_every_target_has_its_8_bits_and_its_source():
    assert {each.name: each.eight_bits for each in mp.targets()} == EIGHT_BITS
    assert all(each.source for each in mp.targets())


@pytest.mark.parametrize("name, kind", [*TPUS.items(), *GPUS.items()])
def test_a_device_kind_finds_its_target(name, kind):
    assert mp.resolve_target(kind) is mp.resolve_target(name.upper())
    assert mp.resolve_target(kind).name == name


@pytest.mark.parametrize("name, kind", TPUS.items())
def test_the_figures_of_tpus_are_those_that_jax_has(name, kind):
    from jax._src.pallas.mosaic import tpu_info  # there is no public table

    target, version = mp.resolve_target(name), tpu_info.chip_version_from_device_kind(kind)
    assert version is not None
    cores = version.num_physical_tensor_cores_per_chip
    jax_has = tpu_info.get_tpu_info_for_chip(version, 1)
    rates = {
        "bfloat16": jax_has.bf16_ops_per_second,
        "int8": jax_has.int8_ops_per_second,
        "float8_e4m3fn": jax_has.fp8_ops_per_second if name == "tpu7x" else 0,
        "int4": jax_has.int4_ops_per_second,
    }
    for dtype, rate in rates.items():
        # Of v6e and v5p two pages of the vendor differ in the third digit, and in the bandwidth.
        assert target.rates.get(dtype, 0) == pytest.approx(rate * cores, rel=0.005)
        assert (dtype in target.dtypes) == jax_has.is_matmul_supported(dtype, dtype)
    assert target.tile == jax_has.mxu_column_size
    assert target.bandwidth == pytest.approx(jax_has.mem_bw_bytes_per_second * cores, rel=0.13)
    assert target.memory_bytes == pytest.approx(jax_has.hbm_capacity_bytes * cores, rel=0.09)


@pytest.mark.parametrize("name", [*TPUS, *GPUS])
def test_two_operands_of_half_the_bits_are_multiplied_twice_as_fast(name):
    target = mp.resolve_target(name)
    if target.eight_bits is not None:
        ratio = target.rate(target.eight_bits) / target.rate("bfloat16")
        assert ratio == pytest.approx(2, rel=0.001)


def test_what_is_not_native_is_computed_in_more_bits():
    v6e, avx2 = mp.resolve_target("v6e"), mp.resolve_target("cpu-avx2")
    assert v6e.rate("float8_e4m3fn") == v6e.rate("bfloat16") == v6e.rate("int8") / 2
    assert avx2.rate("int8") == avx2.rate("bfloat16") == avx2.rate("float32")


@pytest.mark.parametrize(
    "flags, name",
    [
        ("fpu sse2", "cpu-generic"),
        ("avx2 fma", "cpu-avx2"),
        ("avx2 fma avx_vnni", "cpu-avx-vnni"),
        ("avx2 fma avx512f", "cpu-avx512"),
        ("avx2 fma avx512f avx512_vnni", "cpu-avx512-vnni"),
        ("avx2 fma avx512f avx512_vnni avx512_bf16", "cpu-avx512-bf16"),
        ("avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16", "cpu-amx"),
        ("fp asimd asimddp", "cpu-arm-dotprod"),
        ("fp asimd asimddp i8mm bf16", "cpu-arm-i8mm"),
    ],
)
def test_the_flags_of_a_cpu_find_its_instruction_set(flags, name):
    assert target_of_flags(frozenset(flags.split())).name == name


def test_the_device_at_hand_is_the_default():
    assert jax.devices()[0].platform == "cpu"
    here = mp.resolve_target()
    assert here is mp.resolve_target("cpu") is cpu_at_hand()
    one_core = mp.resolve_target(here.name)
    cores = here.bandwidth / one_core.bandwidth
    assert cores >= 1 and all(here.rate(d) == cores * one_core.rate(d) for d in here.dtypes)


def test_other_hardware_is_given_by_its_figures():
    mine = mp.Target(
        name="mine", platform="cuda", peak={"int8": 2e12, "float32": 1e12}, bandwidth=1e11
    )
    assert mp.resolve_target(mine) is mine and mine.eight_bits == "int8"
    assert hash(mine) == hash(mp.Target(**{f: getattr(mine, f) for f in mine.__dataclass_fields__}))
    with pytest.raises(ValueError, match="Target 'mine' has peak={'int8': 1.0}.*'float32'"):
        mp.Target(name="mine", platform="cpu", peak={"int8": 1}, bandwidth=1)
    with pytest.raises(ValueError, match="bandwidth=0: they must be positive"):
        mp.Target(name="mine", platform="cpu", peak={"float32": 1}, bandwidth=0)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="`target` is 'v9', .* 'cpu', 'v4', .*'h200', .*mp.Target"):
        mp.resolve_target("v9")
    with pytest.raises(TypeError, match="`target` is 6 of type int: give a name such as 'v6e'"):
        mp.resolve_target(6)
