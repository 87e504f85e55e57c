"""The environment of every test: eight simulated devices, strict shapes, nothing of the user's own."""

import os
import sys

assert "jax" not in sys.modules, "the settings below only hold if they are made before JAX is imported"

# Set in the environment, so that commands started by a test have them, too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# A [B, T] added to a [T] by accident is an error. Strict dtype promotion would be good to have, but optax.adam and
# flax.linen.LayerNorm in bfloat16 do not stand it.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A program that another run has compiled would hide what is compiled here, and how often.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.pop("TFDS_DATA_DIR", None)
