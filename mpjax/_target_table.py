"""The figures of accelerators: of one chip, without sparsity, as their vendors publish them."""

from ._target import Target

_JAX = "jax/_src/pallas/mosaic/tpu_info.py of JAX 0.10.2"
_CLOUD = "https://docs.cloud.google.com/tpu/docs"
# E4M3 with an infinity, as JAX and mpjax store it, is emulated there: these two are native.
_V5_FLOAT8 = ("float8_e5m2", "float8_e4m3b11fnuz")
_T, _GB = 1e12, 10**9


def _tpu(name: str, kinds: tuple[str, ...], bfloat16: float, **figures) -> Target:
    rates = {"float32": bfloat16, "bfloat16": bfloat16, **figures.pop("also", {})}
    peak = {dtype: rate * _T for dtype, rate in rates.items()}
    return Target(name=name, platform="tpu", kinds=kinds, peak=peak, **figures)


def _gpu(name: str, platform: str, kinds: tuple[str, ...], peak: dict[str, float], **figures):
    peak = {dtype: rate * _T for dtype, rate in peak.items()}
    # cuBLASLt takes 8 bits with dimensions that are multiples of 16, both terms-last.
    figures = {"tile": 16, "weight_layout": "NK", **figures}
    return Target(name=name, platform=platform, kinds=kinds, peak=peak, **figures)


def _hopper(name: str, memory: int, bandwidth: float, source: str) -> Target:
    peak = {"float32": 494.7, "bfloat16": 989.4, "float16": 989.4}
    peak |= {"int8": 1978.9, "float8_e4m3fn": 1978.9, "float8_e5m2": 1978.9}
    return _gpu(
        name,
        "cuda",
        (rf".*\b{name}\b.*",),
        peak,
        memory_bytes=memory * _GB,
        bandwidth=bandwidth * _T,
        source=source,
    )


ACCELERATORS = (
    _tpu(
        "v4",
        ("TPU v4",),
        275,
        memory_bytes=32 * _GB,
        bandwidth=1.23 * _T,
        tile=128,
        source=f"{_JAX}; {_CLOUD}/v4. It takes an int8 weight into a bfloat16 product, but no int8 "
        "activation",
    ),
    _tpu(
        "v5e",
        ("TPU v5e", "TPU v5 ?lite"),
        197,
        also={"int8": 394, "int4": 788, **dict.fromkeys(_V5_FLOAT8, 197)},
        memory_bytes=16 * _GB,
        bandwidth=0.819 * _T,
        tile=128,
        source=f"{_JAX}; {_CLOUD}/v5e. float8_e4m3fn is emulated",
    ),
    _tpu(
        "v5p",
        ("TPU v5", "TPU v5p"),
        459,
        also={"int8": 918, "int4": 1840, **dict.fromkeys(_V5_FLOAT8, 459)},
        memory_bytes=95 * _GB,
        bandwidth=2.765 * _T,
        tile=128,
        source=f"{_JAX}; {_CLOUD}/v5p. float8_e4m3fn is emulated",
    ),
    _tpu(
        "v6e",
        ("TPU v6e", "TPU v6 lite"),
        918,
        also={"int8": 1836, "int4": 3680, **dict.fromkeys(_V5_FLOAT8, 918)},
        memory_bytes=32 * _GB,
        bandwidth=1.638 * _T,
        tile=256,
        source=f"{_JAX}; {_CLOUD}/v6e. float8_e4m3fn is emulated, and float8 no faster than "
        "bfloat16",
    ),
    _tpu(
        "tpu7x",
        ("TPU ?7x?", "TPU v7x?"),
        2307,
        also={"float8_e4m3fn": 4614, "float8_e5m2": 4614},
        memory_bytes=192 * _GB,
        bandwidth=7.38 * _T,
        tile=256,
        devices=2,
        source=f"{_JAX}; {_CLOUD}/tpu7x. No integer products",
    ),
    _gpu(
        "a100",
        "cuda",
        (r".*\bA100\b.*",),
        {"float32": 156, "bfloat16": 312, "float16": 312, "int8": 624},
        memory_bytes=80 * _GB,
        bandwidth=2.039 * _T,
        source="NVIDIA A100 datasheet, SXM, 80 GB",
    ),
    _hopper("h100", 80, 3.35, "NVIDIA H100 datasheet, SXM, half of the figures with sparsity"),
    _hopper("h200", 141, 4.8, "NVIDIA H200 datasheet, SXM, half of the figures with sparsity"),
    _gpu(
        "b200",
        "cuda",
        (r".*\bB200\b.*",),
        {"float32": 1100, "bfloat16": 2250, "float16": 2250, "int8": 4500}
        | {"float8_e4m3fn": 4500, "float8_e5m2": 4500},
        memory_bytes=180 * _GB,
        bandwidth=8 * _T,
        source="NVIDIA Blackwell datasheet, HGX B200 of 1,000 W; DGX B200 datasheet",
    ),
    _gpu(
        "mi300",
        "rocm",
        (r".*\bMI300X?\b.*",),
        {"float32": 163.4, "bfloat16": 1307.4, "float16": 1307.4, "int8": 2614.9}
        | {"float8_e4m3fnuz": 2614.9, "float8_e5m2fnuz": 2614.9},
        memory_bytes=192 * _GB,
        bandwidth=5.3 * _T,
        source="AMD Instinct MI300X data sheet. Its float8 are the fnuz ones: float8_e4m3fn is not "
        "multiplied",
    ),
)
