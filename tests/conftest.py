"""Shared by all tests: shapes are checked, warnings are errors, compiled programs are cached between runs."""

import gc
import os
from pathlib import Path

import jaxtyping

CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ELEGANS_CACHE", str(CACHE))
# a sixth of the time to compile; `make test-all` optimises in full
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
gc.set_threshold(100_000, 50, 50)  # tracing makes many small objects that live on: looking through them took a fifth of the time

jaxtyping.install_import_hook("elegans", "typechecking.check").__enter__()

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)  # as elegans does: a device for every core
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
