"""What a process of `peers.py` measures: one job, in PyTorch, Lightning or elegans; and whether the models are the same."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

LENGTH, HEADS = 16, 4
POSITIONS = 3 * LENGTH + 4
BLOCK = 256  # most steps between two readings of the clock, and in one call of elegans
TOLERANCE = 1e-4


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
