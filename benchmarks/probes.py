"""All probes of a cohort, beside scikit-learn's: probes per second of both, and the difference of their held-out log loss.

    python benchmarks/probes.py                                      # 64 replicas, 10 checkpoints, 5 sites, 16 reads, 2 features
    python benchmarks/probes.py --replicas 2 --checkpoints 1 --sample 20 --layers 1   # a small one, for a CPU

elegans: one call of the `Probe` instrument for each checkpoint, rows and vectors included (drawn, traced, fitted and scored),
compiling apart. scikit-learn: `LogisticRegression(C=100)`, which is handed the vectors, on probes picked at random among the
same; only its fits are timed, by its default solver (L-BFGS), which stops short of the optimum, and by its Newton method,
which finds it and with whose log loss ours is compared. The ratio is to the faster of the two. Weights are untrained: what a
probe costs depends little on them. Both without the control of random labels, so that both fit as many.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import elegans as el
from elegans.instruments.probe import Probe, features_of, reads, sites_of, vectors
from elegans.randomness import Purpose, key_for
from elegans.tasks.sampling import draw_set, prepare
from elegans.training.cohort import resolve, stack
from elegans.training.device import memory_budget
from elegans.training.step import params_of, start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"replicas": 64, "checkpoints": 10, "layers": 4, "d-model": 64, "length": 16, "fit": 2048, "test": 1024, "sample": 300}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def networks(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The stacked runs, and their parameter vectors at every checkpoint."""
    model = el.Transformer(layers=options.layers, d_model=options.d_model)
    runs = [resolve(el.Run(el.Addition(length=options.length), model, steps=1, seed=s)) for s in range(options.replicas)]
    stacked, initial = stack(runs), jax.jit(jax.vmap(lambda run: start(run).params))
    other = [dataclasses.replace(stacked, init_seed=stacked.init_seed + 1000 * i) for i in range(options.checkpoints)]
    return stacked, [initial(s) for s in other]


def ours(probe: Probe, stacked: Any, weights: list[Any]) -> dict[str, Any]:
    """Seconds, and the log loss of every probe: [checkpoint, replica, feature, site, read]."""

    def one(run: Any, vector: Any, data: Any) -> dict[str, Any]:
        blocks = probe.apply(run, params_of(run, vector), data, key_for(run.data_seed, Purpose.INSTRUMENT))
        return {name: block["log_loss"] for name, block in blocks.items()}

    data, size = prepare(stacked.task), len(weights[0])
    began = time.perf_counter()
    while True:
        part = jax.tree.map(lambda a, n=size: np.asarray(a)[:n], stacked)
        program = jax.jit(jax.vmap(one, (0, 0, None))).lower(part, weights[0][:size], data).compile()
        analysis: Any = program.memory_analysis()
        needed, budget = analysis.temp_size_in_bytes + analysis.output_size_in_bytes, memory_budget(jax.devices()[0]) // 2
        if needed <= budget or size == 1:
            break
        size = max(1, min(size - 1, int(size * budget / needed)))
    compiling = time.perf_counter() - began
    batches = -(-len(weights[0]) // size)
    index = [np.arange(i * size, (i + 1) * size) % len(weights[0]) for i in range(batches)]  # the last is filled up
    parts = [jax.tree.map(lambda a, i=i: np.asarray(a)[i], stacked) for i in index]
    jax.block_until_ready(program(parts[0], weights[0][index[0]], data))
    began = time.perf_counter()
    found = [[program(p, w[i], data) for p, i in zip(parts, index, strict=True)] for w in weights]
    jax.block_until_ready(found)
    seconds = time.perf_counter() - began
    joined = [jax.tree.map(lambda *a: np.concatenate(a)[: len(weights[0])], *row) for row in found]
    return {"seconds": seconds, "compile_s": compiling, "at_once": size, "loss": joined}


def collector(probe: Probe) -> Any:
    """What `Probe.apply` hands to its fits, for one network: by feature, for the fitting and the testing part."""

    def one(run: Any, vector: Any, data: Any) -> list[dict[str, Any]]:
        keys = jax.random.split(key_for(run.data_seed, Purpose.INSTRUMENT), 3)
        made = []
        for part, n, key in zip(("validation", "test"), (probe.fit, probe.test), keys, strict=False):
            rows = draw_set(run.task, part, key, n, data)
            seen = vectors(run, params_of(run, vector), rows, sites_of(run, probe.families))
            found = {f: reads(run, seen, rows, f) for f in features_of(run, ())}
            made.append({f: (r.x, r.y[0]) for f, r in found.items()})
        return made

    return jax.jit(one)


def theirs(probe: Probe, stacked: Any, weights: list[Any], mine: list[Any], count: int) -> dict[str, Any]:
    """Seconds and log losses of scikit-learn on probes drawn at random, a few from each of several networks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    rng, collect, data = np.random.default_rng(0), collector(probe), prepare(stacked.task)
    seconds: dict[str, list[float]] = {"lbfgs": [], "newton-cholesky": []}
    losses: dict[str, list[float]] = {"ours": [], "lbfgs": [], "newton-cholesky": []}
    while len(losses["ours"]) < count:
        step, replica = (int(rng.integers(n)) for n in (len(weights), len(weights[0])))
        run = jax.tree.map(lambda a, i=replica: np.asarray(a)[i], stacked)
        train, test = jax.device_get(collect(run, weights[step][replica], data))
        for _ in range(min(10, count - len(losses["ours"]))):
            feature = str(rng.choice(sorted(train)))
            site, read = (int(rng.integers(n)) for n in train[feature][0].shape[:2])
            (x, y), (x_test, y_test) = ((part[feature][0][site, read], part[feature][1][read]) for part in (train, test))
            for solver in seconds:
                kept = x.astype(np.float64) if solver == "newton-cholesky" else x  # whose float32 has no factor
                began = time.perf_counter()
                fitted = LogisticRegression(C=probe.c, solver=solver, max_iter=10_000).fit(kept, y)
                seconds[solver].append(time.perf_counter() - began)
                losses[solver].append(log_loss(y_test, fitted.predict_proba(x_test.astype(kept.dtype)), labels=[0, 1]))
            losses["ours"].append(float(mine[step][feature][replica, site, read]))
    return {"seconds": {k: float(np.mean(v)) for k, v in seconds.items()}, "loss": {k: np.array(v) for k, v in losses.items()}}


def main() -> None:
    """Measure both in one process, one after the other, and report."""
    options = parse()
    probe = Probe(fit=options.fit, test=options.test, control=False)
    stacked, weights = networks(options)
    made = ours(probe, stacked, weights)
    other = theirs(probe, stacked, weights, made["loss"], options.sample)
    probes = sum(block.size for row in made["loss"] for block in row.values())
    loss, best = other["loss"], min(other["seconds"].values())
    report = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        **{k: v for k, v in vars(options).items() if k != "json"},
        "probes": probes,
        "at_once": made["at_once"],
        "compile_s": made["compile_s"],
        "seconds": made["seconds"],
        "ms_per_probe": 1e3 * made["seconds"] / probes,
        **{f"sklearn_ms_{solver}": 1e3 * seconds for solver, seconds in other["seconds"].items()},
        "ratio": best / (made["seconds"] / probes),
        **{f"log_loss_{who}": float(values.mean()) for who, values in loss.items()},
        "difference_mean": float((loss["ours"] - loss["newton-cholesky"]).mean()),
        "difference_largest": float(np.abs(loss["ours"] - loss["newton-cholesky"]).max()),
    }
    for name, value in report.items():
        print(f"{name:>26}  {value:.5g}" if isinstance(value, float) else f"{name:>26}  {value}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
