"""From how many rows on, and in which blocks, `_tpu.py` multiplies on each kind of TPU.

Written by `python benchmarks/tpu_kernels.py --tune`, by the estimates for each chip that are in
`benchmarks/results/tpu_kernels.jsonl`: not to be edited. `benchmarks/_tpu_tune.py` has the rule.
"""

# By what JAX calls the devices: {fewest rows: at most [rows, columns, terms] in a step}.
TUNED: dict[str, dict[int, tuple[int, int, int]]] = {
    "TPU v5e|TPU v5 ?lite": {512: (512, 256, 4096)},  # v5e
    "TPU v6e|TPU v6 lite": {8: (512, 512, 4096)},  # v6e
    "TPU ?7x?|TPU v7x?": {8: (512, 512, 4096)},  # tpu7x
}
FOR_ANY: dict[int, tuple[int, int, int]] = {512: (512, 512, 4096)}
# Few rows are those below the first; what was compared beside them are weights of int4, of so many
# entries or more.
FEW = 256
SMALLEST = 16777216
