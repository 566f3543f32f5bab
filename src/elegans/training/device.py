"""The machine: which device, how much memory, where compiled programs are kept, and what to say of it all."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from elegans.errors import Invalid

_COUNTED = threading.local()  # of each thread: programs are compiled in several
WITHOUT_TRITON = 64  # least d_model
CPU_SHARE, DEVICE_SHARE = 0.5, 0.8  # of memory, for the default budget


def choose(name: str | None = None) -> jax.Device:
    """The device of a name such as `cpu`, `gpu` or `gpu:1`; the fastest one without a name. Raises `Invalid`."""
    keep_programs()
    use_cores()
    if name is None:
        return jax.devices()[0]
    kind, _, index = name.partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError):
        found = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
        raise Invalid("device", name, f"allowed here: {found} or cpu") from None


@functools.cache
def use_cores() -> None:
    """Make JAX count every core of the CPU as a device, where it was not started before."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


@functools.cache
def keep_programs() -> None:
    """Keep compiled programs in $ELEGANS_CACHE (default ~/.cache/elegans), and count those that were not there."""
    folder = Path(os.environ.get("ELEGANS_CACHE", Path.home() / ".cache" / "elegans"))
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.monitoring.register_event_listener(_count)


def _count(event: str, **details: Any) -> None:
    del details
    if event == "/jax/compilation_cache/cache_misses":
        _COUNTED.misses = getattr(_COUNTED, "misses", 0) + 1


def cache_misses() -> int:
    """Programs that this thread compiled so far and that were not in the persistent cache."""
    keep_programs()
    return getattr(_COUNTED, "misses", 0)


def compiler_options(platform: str, model: Any) -> dict[str, str] | None:
    """What XLA is told when it compiles a model for a platform, as JAX names it.

    Left alone it tries Triton for a GPU's matrix products, in every tiling: two thirds of compiling. Wide models in bfloat16 are as quick
    without, with cuBLAS and kernels of our own; narrow ones gain a fifth from it, float32 two fifths (docs/speed.md).
    """
    served = getattr(model, "dtype", None) == "bfloat16" and getattr(model, "d_model", 0) >= WITHOUT_TRITON
    return {"xla_gpu_enable_triton_gemm": "False"} if platform == "gpu" and served else None


def memory_budget(device: jax.Device, asked: str | None = None) -> int:
    """Bytes that a cohort may use: as asked (`8GiB`, `500MB`), else a share of the device's memory. Raises `Invalid`."""
    if asked is not None:
        return parse_bytes(asked)
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(DEVICE_SHARE * stats["bytes_limit"])
    return int(CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def parse_bytes(text: str) -> int:
    """Bytes of `8GiB`, `500MB` or a plain number. Raises `Invalid`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("BbGgMmKkIi ")
    try:
        size = int(float(number) * units[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        raise Invalid("memory", text, "allowed: a size such as 8GiB or 500MB") from None
    if size <= 0:
        raise Invalid("memory", text, "allowed: a size above 0")
    return size


@contextlib.contextmanager
def within_memory(planned: int) -> Iterator[None]:
    """Raises `Invalid` where a device's memory does not hold what is computed within, though so many bytes were planned for it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        allowed = "let other programs on the device end; what has not begun is planned anew with a smaller --memory"
        raise Invalid("memory", f"a device too full for {planned:,} bytes", allowed) from error


def provenance(device: jax.Device, memory: int) -> dict[str, Any]:
    """What the numbers may depend on besides the specs: versions, device, flags, commit. No clock, no host name."""
    packages = ("elegans", "jax", "jaxlib", "numpy", "optax")
    return {
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "device": {"platform": device.platform, "kind": device.device_kind, "cores": os.cpu_count()},
        "memory": memory,
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION") if name in os.environ},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of elegans' own source, where it runs from a checkout; with a + where files differ from it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
