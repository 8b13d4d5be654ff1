"""placeholder"""

TUNED: dict[str, dict[int, tuple[int, int, int]]] = {
    "TPU v5e|TPU v5 ?lite": {512: (512, 256, 4096)},
    "TPU v6e|TPU v6 lite": {8: (512, 1024, 1024), 256: (512, 256, 4096)},
    "TPU ?7x?|TPU v7x?": {8: (512, 1024, 1024), 256: (512, 256, 4096)},
}
FOR_ANY: dict[int, tuple[int, int, int]] = {512: (512, 256, 4096)}
