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

LENGTH, HEADS = 16, 4
POSITIONS = 3 * LENGTH + 4
BLOCK = 256  # most steps between two readings of the clock, and in one call of elegans
TOLERANCE = 1e-4
FOREIGN = 0.2  # CPU cores that other processes may use while something is timed
MODES = {"a": "PyTorch, eager", "b": "PyTorch, torch.compile", "c": "Lightning", "d": "elegans", "e": "elegans"}
TORCH = dict.fromkeys(("a", "b", "attention", "check"), ("torch",))
NEEDS = TORCH | {"c": ("torch", "lightning")}
PRESETS = {
    "cpu": ("cpu", "float32", ["64,2,16,8"]),
    "gpu": ("cuda", "bfloat16", ["16,4,8,1024", "64,4,64,64", "256,4,64,16"]),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement: everything a worker process needs."""

    mode: str
    d_model: int
    layers: int
    batch: int
    replicas: int
    dtype: str
    device: str
    seconds: float
    attention: str = "sdpa"
    compile_mode: str = "default"


class Stopwatch:
    """Times blocks of steps: the first step, then warm-up in doubling blocks, then blocks of about a third of `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self.block, self.done = seconds, 1, False
        self.first: float | None = None
        self._warm, self._laps = False, list[tuple[int, float]]()
        self._began = self._last = time.perf_counter()

    def lap(self) -> None:
        """A block of steps has ended, and the device is idle."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        if self.first is None:
            self.first = now - self._began
        elif self._warm:
            self._laps.append((self.block, took))
            self.done = len(self._laps) >= 3 and sum(t for _, t in self._laps) >= self.seconds
        elif took >= self.seconds / 5 or self.block >= BLOCK:
            self._warm = True
        else:
            self.block *= 2

    def result(self, replicas: int = 1) -> dict[str, Any]:
        rate = statistics.median(n / t for n, t in self._laps)
        return {"steps_s": rate, "replica_steps_s": rate * replicas, "first_s": self.first, "steps": sum(n for n, _ in self._laps)}


# ---- workers: PyTorch and Lightning


def torch_run(job: Job) -> dict[str, Any]:
    """Modes a and b."""
    import torch
    import torch_model as peer

    torch.set_float32_matmul_precision("high")
    watch = Stopwatch(job.seconds)
    torch.manual_seed(0)
    model = peer.Decoder(job.d_model, job.layers, HEADS, POSITIONS - 1, getattr(torch, job.dtype), job.attention).to(job.device)
    optimizer = peer.optimizer(model, fused=True)

    def objective() -> Any:
        return model.loss(peer.sample_rows(job.batch, LENGTH, job.device))

    if job.mode == "b":
        objective = torch.compile(objective, mode=None if job.compile_mode == "default" else job.compile_mode)
    while not watch.done:
        for _ in range(watch.block):
            loss = objective()
            peer.optimise(model, optimizer, loss)
        last = loss.item()  # waits for the device
        watch.lap()
    return watch.result() | {"loss": last}


def lightning_module(job: Job) -> Any:
    """The peer as a LightningModule with automatic optimisation."""
    import lightning
    import torch
    import torch_model as peer

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = peer.Decoder(job.d_model, job.layers, HEADS, POSITIONS - 1, getattr(torch, job.dtype), job.attention)

        def training_step(self, rows: Any, index: int) -> Any:
            del index
            found = peer.metrics(self.model, rows)
            self.log_dict(found)
            return found["loss"]

        def configure_optimizers(self) -> Any:
            return peer.optimizer(self.model, fused=False)

    return Module()


def lightning_run(job: Job) -> dict[str, Any]:
    """Mode c."""
    import logging
    import warnings

    import lightning
    import torch
    import torch_model as peer
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    class Clock(lightning.Callback):
        left = 1

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *batch: Any) -> None:
            del module, batch
            self.left -= 1
            if not self.left:
                self.loss = outputs["loss"].item()  # waits for the device
                watch.lap()
                self.left, trainer.should_stop = watch.block, watch.done

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")
    watch, clock = Stopwatch(job.seconds), Clock()
    torch.manual_seed(0)
    logger = CSVLogger(os.environ["TMPDIR"])  # and its default: every 50 steps to disk
    quiet = {"logger": logger, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings: dict[str, Any] = {"accelerator": "gpu" if job.device == "cuda" else "cpu", "devices": 1, "max_steps": 10**9, **quiet}
    trainer = lightning.Trainer(gradient_clip_val=peer.CLIP, callbacks=[clock], **settings)
    trainer.fit(lightning_module(job), DataLoader(peer.AdditionRows(LENGTH), batch_size=job.batch))
    return watch.result() | {"loss": clock.loss}


def pick_attention(job: Job) -> dict[str, Any]:
    """PyTorch's quicker attention at this size, on this device: the one that its modes use."""
    rates = {kernel: torch_run(dataclasses.replace(job, mode="a", attention=kernel))["steps_s"] for kernel in ("sdpa", "math")}
    return {"attention": max(rates, key=lambda kernel: rates[kernel]), "steps_s": rates}


# ---- workers: elegans


def elegans_run(job: Job) -> dict[str, Any]:
    """Modes d and e, through the engine that every study uses."""
    import elegans as el
    from elegans.training.cohort import Programs
    from elegans.training.device import choose

    device = choose("gpu" if job.device == "cuda" else "cpu")
    watch = Stopwatch(job.seconds)
    model = el.Transformer(layers=job.layers, d_model=job.d_model, heads=HEADS, dtype=job.dtype)
    run = el.Run(el.Addition(length=LENGTH), model, steps=10**6, batch=job.batch)
    programs = Programs(el.grid(run, {"seed": range(job.replicas)}), device)
    states, step = programs.start(), 0
    while not watch.done:
        block = watch.block
        states, metrics = programs.chunk(states, step, block)  # metrics arrive on the host: this waits for the device
        step += block
        watch.lap()
    return watch.result(job.replicas) | {"loss": float(metrics["loss"][-1].mean()), "bytes": programs.bytes()}


# ---- is it the same model?


def check(job: Job) -> dict[str, Any]:
    """Largest difference of logits from the same weights, and of losses through 5 optimiser steps, in float32 on the CPU."""
    import jax
    import numpy as np
    import torch
    import torch_model as peer

    import elegans as el
    from elegans.training.cohort import resolve
    from elegans.training.step import params_of, start

    run = el.Run(
        el.Addition(length=LENGTH), el.Transformer(layers=job.layers, d_model=job.d_model, heads=HEADS), steps=100, batch=job.batch
    )
    run = resolve(run)  # as the engine sees it
    state, model = start(run), peer.Decoder(job.d_model, job.layers, HEADS, POSITIONS - 1)
    noise = 0.02 * jax.random.normal(jax.random.key(1), state.params.shape)  # so that no weight is still 1
    state = dataclasses.replace(state, params=state.params + noise)
    params = params_of(run, state.params)
    peer.load(model, params)
    torch.manual_seed(0)
    batches = [peer.sample_rows(job.batch, LENGTH, "cpu") for _ in range(5)]
    tokens = batches[0][:, :-1]
    ours = jax.vmap(lambda row: run.model.apply(params, row)[0])(np.asarray(tokens, np.int32))
    logits = float(np.abs(model(tokens).detach().numpy() - np.asarray(ours)).max())
    pairs = zip(peer.losses(model, batches), _losses(run, state, batches), strict=True)
    losses = max(abs(a - b) for a, b in pairs)
    return {"logits": logits, "losses": losses, "same": logits < TOLERANCE and losses < TOLERANCE}


def _losses(run: Any, state: Any, batches: list[Any]) -> list[float]:
    """Losses of elegans' own optimiser steps on given rows."""
    import jax
    import numpy as np

    import elegans as el

    update, found = jax.jit(lambda state, batch, step: run.update.apply(run, state, batch, step, jax.random.key(0))), []
    for step, rows in enumerate(batches):
        scored = np.broadcast_to(np.arange(POSITIONS) > 2 * LENGTH, rows.shape)
        state, metrics = update(state, el.Example(np.asarray(rows, np.int32), scored), np.int32(step))
        found.append(float(metrics["loss"]))
    return found


def survey(job: Job) -> dict[str, Any]:
    """What this machine has, as the frameworks see it."""
    found: dict[str, Any] = {"gpu": None}
    if importlib.util.find_spec("torch"):
        import torch

        found["torch_threads"] = torch.get_num_threads()
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if job.device != "cpu":
        import jax

        found["jax_backend"] = jax.default_backend()
        found["gpu"] = found["gpu"] or (jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None)
    return found


WORK: dict[str, Callable[[Job], dict[str, Any]]] = {
    "a": torch_run,
    "b": torch_run,
    "c": lightning_run,
    "d": elegans_run,
    "e": elegans_run,
    "attention": pick_attention,
    "check": check,
    "survey": survey,
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
