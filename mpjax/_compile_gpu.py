"""What NVIDIA's compiler has to know of a GPU that is not there: XLA's `GpuTargetConfigProto`.

The figures are those that the driver reports of each card, as XLA's own descriptions have them
(https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs). The versions are of
cuDNN and of CUDA: without the latter XLA takes it for one so old that cuBLASLt knows no float8.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
      name: as the driver says it.
      capability: the compute capability, (major, minor).
      cores: streaming multiprocessors.
      clock_ghz: of these.
      bandwidth: of the memory, bytes per second.
      memory: bytes of it.
      l2: bytes of the cache.
      shared: bytes of shared memory per core, and of what one block can opt in to.
      fpus: float32 units per core.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    bandwidth: int
    memory: int
    l2: int
    shared: tuple[int, int] = (233472, 232448)
    fpus: int = 128

    def proto(self) -> str:
        """The description as a text proto."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared[0]}
              shared_memory_per_block_optin: {self.shared[1]}
              core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory}
              l2_cache_size: {self.l2}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            runtime_version {{ major: 12 minor: 9 patch: 0 }}
            device_description_str: "{self.name}"
        """


_H100_CORES, _GHZ, _L2 = 132, 1.98, 52428800

GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        1.41,
        2039040000000,
        85100068864,
        41943040,
        (167936, 166912),
        64,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), _H100_CORES, _GHZ, 3352320000000, 84942979072, _L2
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), _H100_CORES, _GHZ, 4800000000000, 150000000000, _L2),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 1.965, 7672320000000, 191514411008, 132644864),
}
