"""Environment of every test: a CPU backend, and compiled programs kept between runs."""

import os
from pathlib import Path

# All of this has to stand before the first import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmx" / "jax-tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# References multiply small matrices; idle BLAS threads would spin on the cores that jax needs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
