"""A process that saves step after step until it is killed: see test_checkpoint_files.py."""

import sys

import jax.numpy as jnp

import mpjax as mp

directory, first = sys.argv[1], int(sys.argv[2])
for step in range(first, first + 1000):
    mp.save_checkpoint(directory, {"x": jnp.full((4, 1 << 20), step)}, step=step, keep=2)
