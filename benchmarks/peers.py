"""elegans beside its peers: the same model, batch and data trained by PyTorch, Lightning and elegans, on this machine.

    python benchmarks/peers.py --preset cpu --seconds 5 --rounds 3 --json peers.json
    python benchmarks/peers.py --configs 64,2,16,8 64,4,64,64 --dtype bfloat16 --modes a,b,e
    python benchmarks/peers.py --check

Modes:
  a  an eager PyTorch loop; b  the same loop under torch.compile
  c  Lightning: automatic optimisation, a DataLoader over rows made one by one in Python; it records loss, accuracy and
     exact match, as elegans does, and writes no checkpoints
  d  elegans, one replica; e  elegans, many replicas in one program

The model is elegans' default Transformer, 4 heads, trained on addition of 16-bit numbers (52 tokens a row) with AdamW
and clipping, loss on scored tokens. elegans runs as in a study: its task's split, metrics of every step, divergence
guard. a and b sample rows on the device too, without a split, and record nothing. Before any timing, PyTorch's copy is
given elegans' weights, and must give the same logits and follow the same losses through some optimiser steps.

Every measurement is a process of its own, modes alternate round by round, and compilation caches are off. The first
step counts from after the imports until the first step is done. Numbers are medians over rounds (lowest to highest).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_workers import TOLERANCE, WORK, Job

FOREIGN = 0.2  # CPU cores that other processes may use while something is timed
MODES = {"a": "PyTorch, eager", "b": "PyTorch, torch.compile", "c": "Lightning", "d": "elegans", "e": "elegans"}
TORCH = dict.fromkeys(("a", "b", "attention", "check"), ("torch",))
NEEDS = TORCH | {"c": ("torch", "lightning")}
PRESETS = {
    "cpu": ("cpu", "float32", ["64,2,16,8"]),
    "gpu": ("cuda", "bfloat16", ["16,4,8,1024", "64,4,64,64", "256,4,64,16"]),
}


# ---- the parent: one process a measurement


def spawn(job: Job) -> dict[str, Any]:
    """A worker's result, or {"error": ...}. Caches of compiled code are fresh, so that every start is a cold one."""
    for package in NEEDS.get(job.mode, ()):
        if importlib.util.find_spec(package) is None:
            return {"error": f"not installed: {package}"}
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TRITON_CACHE_DIR": cache,
            "ELEGANS_CACHE": cache,
            "TMPDIR": cache,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if job.device == "cpu" or job.mode == "check":
            env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(job))]
        began, before = time.perf_counter(), foreign_seconds()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        foreign = (foreign_seconds() - before) / (time.perf_counter() - began)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]) | {"foreign": foreign}
    said = [line.strip() for line in done.stderr.splitlines() if "Error" in line or "Exception" in line]
    return {"error": (said or [f"exit status {done.returncode}"])[-1][:160]}


def foreign_seconds() -> float:
    """CPU seconds that this machine has spent so far on anything but this benchmark's finished workers; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *rest = (int(x) for x in stat.read_text().split("\n")[0].split()[1:9])
    own = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - own.children_user - own.children_system


def settle(patience: float) -> None:
    """Wait, at most `patience` seconds, until other processes leave the machine alone for two seconds."""
    until = time.perf_counter() + patience
    while time.perf_counter() < until:
        before = foreign_seconds()
        time.sleep(2)
        if foreign_seconds() - before < 2 * FOREIGN:
            return


def measure(jobs: dict[str, Job], rounds: int, patience: float, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of one configuration: every mode once a round, in turn."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in jobs}
    for turn in range(rounds):
        for mode, job in jobs.items():
            failed = next((r for r in found[mode] if "error" in r), None)
            if failed is None:
                note(f"round {turn + 1} of {rounds}: {MODES[mode]}")
                settle(patience)
            found[mode].append(failed or spawn(job))
    return [summary(jobs[mode], results) for mode, results in found.items()]


def summary(job: Job, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over rounds, and their range."""
    row: dict[str, Any] = {"mode": job.mode, "name": MODES[job.mode], "replicas": job.replicas, "dtype": job.dtype}
    if job.mode in "de":
        row["name"] += ", 1 replica" if job.replicas == 1 else f", {job.replicas} replicas"
    good = [r for r in results if "error" not in r]
    if len(good) < len(results):
        row["error"] = next(r["error"] for r in results if "error" in r)
    for key in ("steps_s", "replica_steps_s", "first_s") if good else ():
        values = [r[key] for r in good]
        row[key], row[f"{key}_range"] = statistics.median(values), [min(values), max(values)]
    return row | {"rounds": results}


def compare(rows: list[dict[str, Any]]) -> None:
    """Add every row's replica-steps/s over those of a and of c."""
    rates = {row["mode"]: row.get("replica_steps_s") for row in rows}
    for row in rows:
        for base in ("a", "c"):
            if rates.get(base) and rates[row["mode"]]:
                row[f"over_{base}"] = rates[row["mode"]] / rates[base]


# ---- report


def number(value: float | None) -> str:
    """Three significant digits, without exponents."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> Any:
    """A Markdown table."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.MARKDOWN)
    for i, name in enumerate(("mode", "dtype", "steps/s per replica", "replica-steps/s", "over eager", "over Lightning", "first step, s")):
        made.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        if "steps_s" not in row:
            made.add_row(row["name"], row["dtype"], row["error"])
            continue
        low, high = row["replica_steps_s_range"]
        ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("over_a", "over_c")]
        spread = f"{number(row['replica_steps_s'])} ({number(low)}-{number(high)})"
        made.add_row(row["name"], row["dtype"], number(row["steps_s"]), spread, *ratios, number(row["first_s"]))
    return made


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions of everything that was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = [n for n in ("elegans", "jax", "torch", "lightning") if importlib.util.find_spec(n)]
    versions = {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}
    return {"cpu": cpu, "cores": cores, "versions": versions} | spawn(Job("survey", 1, 1, 1, 1, "float32", device, 0.0))


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=("auto", *PRESETS), help="a device, a dtype and configurations; auto: gpu where there is one")
    p.add_argument("--configs", nargs="+", metavar="D,LAYERS,BATCH,REPLICAS", help="configurations, instead of the four options below")
    for name, default in (("--d-model", 64), ("--layers", 2), ("--batch", 16), ("--replicas", 8), ("--rounds", 3)):
        p.add_argument(name, type=int, default=default)
    p.add_argument("--seconds", type=float, default=5.0, help="timed seconds of every measurement, after warm-up")
    p.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine before every measurement")
    p.add_argument("--device", choices=("cpu", "cuda", "auto"), help="default: auto, or the preset's")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type of a, b, d and e; default: float32, or the preset's")
    p.add_argument("--lightning-dtype", choices=("float32", "bfloat16"), default="float32", help="compute type of c")
    p.add_argument("--attention", choices=("auto", "sdpa", "math"), default="auto", help="PyTorch's; auto: the quicker one, timed first")
    p.add_argument("--compile-mode", default="default", help="of torch.compile, such as reduce-overhead")
    p.add_argument("--modes", type=lambda text: text.replace(",", ""), default="abcde", help="such as a,b,e")
    p.add_argument("--check", action="store_true", help="only check at these sizes that the models are the same")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    options = p.parse_args()
    if set(options.modes) - set(MODES):
        p.error(f"--modes: allowed: {','.join(MODES)}")
    return options


def bases(options: argparse.Namespace, gpu: bool) -> list[Job]:
    """The configurations asked for."""
    name = ("gpu" if gpu else "cpu") if options.preset == "auto" else options.preset
    device, dtype, configs = PRESETS[name] if name else ("auto", "float32", [])
    device, dtype = options.device or device, options.dtype or dtype
    device = ("cuda" if gpu else "cpu") if device == "auto" else device
    configs = options.configs or configs or [f"{options.d_model},{options.layers},{options.batch},{options.replicas}"]
    made = []
    for config in configs:
        d, layers, batch, replicas = (int(part) for part in config.split(","))
        made.append(Job("", d, layers, batch, replicas, dtype, device, options.seconds, options.attention, options.compile_mode))
    return made


def verify(jobs: list[Job]) -> list[dict[str, Any]]:
    """Whether PyTorch's copy is the same model at these sizes; exits where it is not."""
    found = []
    for job in jobs:
        result = spawn(dataclasses.replace(job, mode="check", device="cpu"))
        size = f"d_model {job.d_model}, {job.layers} layers, batch {job.batch}"
        if "error" in result:
            print(f"Not checked whether the models are the same ({size}): {result['error']}")
        else:
            verdict = "same model" if result["same"] else "NOT THE SAME MODEL"
            differences = f"logits differ by {result['logits']:.1e}, losses of 5 steps by {result['losses']:.1e}"
            print(f"{verdict} ({size}): {differences}; allowed {TOLERANCE:g}")
        if not result.get("same", True):
            sys.exit(1)
        found.append({"size": size, **result})
    return found


def run_config(base: Job, options: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Everything of one configuration: the quicker attention, then all modes in turn."""
    result: dict[str, Any] = {"config": {k: getattr(base, k) for k in ("d_model", "layers", "batch", "replicas", "device")}}
    attention = base.attention
    if attention == "auto":
        note("timing PyTorch's attention")
        settle(options.patience)
        picked = spawn(dataclasses.replace(base, mode="attention", seconds=min(1.0, base.seconds)))
        attention, result["attention_steps_s"] = picked.get("attention", "sdpa"), picked.get("steps_s")
    jobs = {}
    for mode in options.modes:
        dtype = options.lightning_dtype if mode == "c" else base.dtype
        replicas = base.replicas if mode == "e" else 1
        jobs[mode] = dataclasses.replace(base, mode=mode, dtype=dtype, replicas=replicas, attention=attention)
    rows = measure(jobs, options.rounds, options.patience, note)
    compare(rows)
    return result | {"attention": attention, "rows": rows}


def main() -> None:
    """Check that the models are the same, then measure and report."""
    from rich.console import Console

    options = parse()
    if options.worker:
        job = Job(**json.loads(options.worker))
        print(json.dumps(WORK[job.mode](job)))
        return
    found = machine(options.device or "auto")
    configs = bases(options, bool(found.get("gpu")))
    if options.check:
        verify(configs)
        return
    report: dict[str, Any] = {"machine": found, "check": verify([dataclasses.replace(configs[0], d_model=16, layers=2, batch=4)])}
    print(f"{found['cpu']}, {found['cores']} cores; GPU: {found.get('gpu')}; {found['versions']}")
    report["configs"] = []
    console, errors = Console(width=160), Console(stderr=True)
    for base in configs:
        with errors.status("") as status:
            result = run_config(base, options, status.update)
        report["configs"].append(result)
        sizes = f"d_model {base.d_model}, {base.layers} layers, batch {base.batch}"
        print(f"\n{sizes}, {base.device}, PyTorch's attention: {result['attention']}")
        console.print(table(result["rows"]))
        foreign = max((r.get("foreign", 0) for row in result["rows"] for r in row["rounds"]), default=0)
        if foreign > FOREIGN:
            print(f"Do not trust these: other processes used up to {foreign:.1f} CPU cores meanwhile")
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
