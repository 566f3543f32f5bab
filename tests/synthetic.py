"""A store folder with made-up rows of known numbers: what reports and figures are tested on, without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from elegans import specs
from elegans.files import write_json, write_table
from elegans.models.transformer import Transformer
from elegans.store import Store
from elegans.sweeps import grid
from elegans.tasks.addition import Addition
from elegans.training.optimisers import AdamW
from elegans.training.run import Run

LENGTH, STEPS = 8, 20_000
TASK = Addition(length=LENGTH)
PLATEAU = TASK.plateau()
SITES = [("embed", "embed", -1)] + [(f"{family}.{i}", family, i) for i in range(2) for family in ("attn_out", "mlp_out", "resid")]
BITS = np.arange(LENGTH)
CHANCE = {"first_operand": np.full(LENGTH, 0.51), "carry": 0.5 + 2.0 ** -(BITS + 2)}


def log_steps(per_decade: int, steps: int = STEPS) -> np.ndarray:
    points = np.rint(10 ** (np.arange(int(np.log10(steps) * per_decade) + 1) / per_decade)).astype(int)
    return np.array(sorted({0, *points.tolist(), steps}))


def runs_of(axes: dict[str, Sequence[Any]]) -> list[Run]:
    base = Run(
        task=TASK, model=Transformer(layers=2, d_model=16, heads=2), optim=AdamW(lr=1e-3), batch=64, steps=STEPS, label="lr={optim.lr}"
    )
    return grid(base, axes)


def small() -> list[Run]:
    return runs_of({"optim.lr": [3e-4, 1e-3, 3e-3], "seed": range(4)})


def make(
    path: Path,
    runs: list[Run],
    *,
    tables: Sequence[str] = ("metrics", "positions", "probe", "ablate", "transition", "lead"),
    probes: int = 12,
) -> Store:
    """A store of one cohort: the last run diverged at step 1234, every third run never learned."""
    truths = [_truth(i, run, len(runs)) for i, run in enumerate(runs)]
    _cohort(path, runs, truths)
    rows = {
        "metrics": _metrics,
        "positions": _positions,
        "probe": lambda t: _probe(t, probes),
        "ablate": _ablate,
        "transition": _transition,
        "lead": _lead,
    }
    for name in tables:
        folder = path / "cohorts" / "c0ffee000000" if name in ("metrics", "positions") else path / "rows" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_table(
            folder / (f"{name}-{0:010d}-{STEPS:010d}.parquet" if name in ("metrics", "positions") else "c0ffee000000.parquet"),
            rows[name](truths),
        )
    return Store(path)


def _truth(i: int, run: Run, count: int) -> dict[str, Any]:
    """When a run learns: the loss at `when`, the carry 10^lead earlier, the operand after some 30 steps."""
    draw = np.random.default_rng(i)
    lr = float(run.optim.lr)
    when = 2000 * (1e-3 / lr) ** 0.7 * 10 ** draw.normal(0, 0.08)
    lead = 0.21 + 0.1 * np.log10(lr / 1e-3) + draw.normal(0, 0.1)
    return {
        "run": run.id, "lr": lr, "learns": i % 3 != 2 and i != count - 1, "diverged": 1234 if i == count - 1 else None,
        "when": when, "lead": float(lead), "carry": when / 10**lead, "draw": draw,
    }  # fmt: skip


def _cohort(path: Path, runs: list[Run], truths: list[dict[str, Any]]) -> None:
    folder = path / "cohorts" / "c0ffee000000"
    folder.mkdir(parents=True)
    write_json(path / "format.json", {"format": 1})
    lines = []
    for slot, run in enumerate(runs):
        facts = {"length": STEPS, "parameters": 6912, "flops_per_step": 8.9e7}
        lines.append(
            {"run": run.id, "slot": slot, "label": f"lr={run.optim.lr:g}", "steps": STEPS, **facts, "code": {}, "spec": specs.to_dict(run)}
        )
    (folder / "spec.json").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    write_json(folder / "plan.json", {"runs": [run.id for run in runs], "segments": [[0, STEPS, len(runs)]], "memory": 1, "bytes": 1})
    diverged = {t["run"]: t["diverged"] for t in truths if t["diverged"] is not None}
    write_json(folder / "status.json", {"step": STEPS, "finished": True, "diverged": diverged, "recompiled": False})
    versions = {"python": "3.12.1", "elegans": "0.1.0", "jax": "0.10.0"}
    write_json(folder / "provenance.json", {"versions": versions, "device": {"platform": "cpu", "cores": 2}, "commit": None, "flags": {}})


def _sigmoid(steps: np.ndarray, when: float, sharpness: float = 9.0) -> np.ndarray:
    return 1 / (1 + np.exp(-sharpness * (np.log10(np.maximum(steps, 0.5)) - np.log10(when))))


def _done(truth: dict[str, Any], steps: np.ndarray) -> np.ndarray:
    """Share of the way from plateau to floor."""
    return _sigmoid(steps, truth["when"]) if truth["learns"] else np.zeros(len(steps))


def _loss(truth: dict[str, Any], steps: np.ndarray) -> np.ndarray:
    early = 1.1 * (1 - _sigmoid(steps, 25 * (1e-3 / truth["lr"]) ** 0.5, 4.0))
    loss = PLATEAU * (1 - _done(truth, steps)) + early
    return np.where(steps >= truth["diverged"], np.nan, loss) if truth["diverged"] is not None else loss


def _part(truth: dict[str, Any], split: str, steps: np.ndarray) -> dict[str, Any]:
    noise = 0.02 if split == "train" else 0.003
    loss = _loss(truth, steps) + truth["draw"].normal(0, noise, len(steps)) * np.sqrt(_loss(truth, steps) + 1e-3)
    done = np.where(np.isnan(loss), np.nan, _done(truth, steps))
    columns = {"loss": np.maximum(loss, 1e-4), "accuracy": 0.55 + 0.45 * done, "exact_match": done**3}
    norm = 0.3 + 0.7 * loss if split == "train" else np.full(len(steps), np.nan)
    return {"run": [truth["run"]] * len(steps), "step": steps, "split": [split] * len(steps), **columns, "grad_norm": norm}


def _table(parts: list[dict[str, Any]]) -> pa.Table:
    """Columns joined; NaN becomes null."""

    def column(values: list[Any]) -> pa.Array:
        joined = np.concatenate([np.asarray(v) for v in values])
        return pa.array(joined.astype(np.float32) if joined.dtype.kind == "f" else joined, from_pandas=joined.dtype.kind == "f")

    return pa.table({name: column([part[name] for part in parts]) for name in parts[0]})


def _metrics(truths: list[dict[str, Any]]) -> pa.Table:
    shapes = [("train", log_steps(30)[1:]), ("validation", log_steps(10)), ("test", np.array([STEPS]))]
    return _table([_part(t, split, steps) for t in truths for split, steps in shapes])


def _positions(truths: list[dict[str, Any]]) -> pa.Table:
    steps, scored = log_steps(10), np.arange(2 * LENGTH + 2, TASK.positions)
    parts = []
    for t in truths:
        late = 1 + 0.08 * np.arange(len(scored))  # higher bits are learned later
        grid = np.array([_loss(t | {"when": t["when"] * k}, steps) for k in late]).T
        grid[:, -1] = 1.6 * (1 - _sigmoid(steps, 20, 6.0))
        shape = grid.shape
        parts.append({
            "run": [t["run"]] * grid.size, "step": np.repeat(steps, shape[1]), "split": ["validation"] * grid.size,
            "position": np.tile(scored, shape[0]), "loss": grid.reshape(-1),
        })  # fmt: skip
    return _table(parts)


def _probe(truths: list[dict[str, Any]], count: int) -> pa.Table:
    steps = np.unique(np.concatenate([[0], np.rint(np.geomspace(10, STEPS, count - 1)).astype(int)]))
    parts = []
    for t in (t for t in truths if t["diverged"] is None):
        for feature, when in (("first_operand", 30.0), ("carry", t["carry"])):
            known = _sigmoid(steps, when) if t["learns"] or feature == "first_operand" else np.zeros(len(steps))
            depth = np.array([0.05 if s == "embed" else 0.5 if s.endswith("0") else 1.0 for s, _, _ in SITES])
            gain = known[:, None, None] * depth[None, :, None] * (1 - 0.03 * BITS)[None, None]
            chance = np.broadcast_to(CHANCE[feature], gain.shape)
            noise = t["draw"].normal(0, 0.008, gain.shape)
            untrained = np.broadcast_to(chance[:1] + 0.02, gain.shape)
            accuracy = np.clip(untrained + (0.995 - untrained) * gain + noise, 0, 1)
            shape = accuracy.shape
            parts.append({
                "run": np.full(accuracy.size, t["run"]), "step": np.broadcast_to(steps[:, None, None], shape).ravel(),
                "feature": np.full(accuracy.size, feature),
                "site": np.broadcast_to(np.array([s for s, _, _ in SITES])[None, :, None], shape).ravel(),
                "family": np.broadcast_to(np.array([f for _, f, _ in SITES])[None, :, None], shape).ravel(),
                "layer": np.broadcast_to(np.array([n for _, _, n in SITES])[None, :, None], shape).ravel(),
                "index": np.broadcast_to(BITS, shape).ravel(),
                "position": np.broadcast_to(2 * LENGTH + 1 + BITS, shape).ravel(),
                "accuracy": accuracy.ravel(), "log_loss": (1 - accuracy).ravel(), "chance": chance.ravel(),
                "control": np.clip(0.5 + np.abs(noise.ravel()), 0, 1), "untrained": untrained.ravel(),
            })  # fmt: skip
    return _table(parts)


def _ablate(truths: list[dict[str, Any]]) -> pa.Table:
    rows = []
    for t in (t for t in truths if t["learns"]):
        base = 0.985 + 0.01 * t["draw"].random()
        for feature, left in (("carry", 0.08), ("first_operand", 0.3)):
            head = {"run": t["run"], "step": STEPS, "feature": feature, "method": "projection", "base_loss": 0.01, "base_exact_match": base}
            rows.append(head | {"direction": "feature", "draw": 0, "loss": 0.6, "exact_match": left + 0.05 * t["draw"].random()})
            for draw in range(20):
                rows.append(head | {"direction": "random", "draw": draw, "loss": 0.03, "exact_match": base - 0.15 * t["draw"].beta(1, 6)})
    return pa.Table.from_pylist(rows)


def _transition(truths: list[dict[str, Any]]) -> pa.Table:
    rows = []
    for t in truths:
        for feature in ("carry", "first_operand"):
            seen = t["learns"] or (feature == "first_operand" and t["diverged"] is None)
            at = t["carry"] if feature == "carry" else 30.0
            rows.append({
                "run": t["run"], "group": f"lr={t['lr']:g}", "feature": feature, "level": 0.99 if seen else None,
                "loss_step": t["when"] if t["learns"] else None,
                "feature_step": at if seen else None, "lead": float(np.log10(t["when"] / at)) if t["learns"] else None,
            })  # fmt: skip
    return pa.Table.from_pylist(rows)


def _lead(truths: list[dict[str, Any]]) -> pa.Table:
    rows = []
    for lr in sorted({t["lr"] for t in truths}):
        members = [t for t in truths if t["lr"] == lr]
        for feature in ("carry", "first_operand"):
            leads = [t["lead"] if feature == "carry" else np.log10(t["when"] / 30) for t in members if t["learns"]]
            mean, half = float(np.mean(leads)), float(2.5 * np.std(leads) / np.sqrt(len(leads)))
            verdict = "leads" if mean - half > 0 else "undecided"
            rows.append({
                "group": f"lr={lr:g}", "feature": feature, "runs": len(leads), "of": len(members),
                "mean": mean, "low": mean - half, "high": mean + half, "verdict": verdict,
            })  # fmt: skip
    return pa.Table.from_pylist(rows)


# ---- a grid over training budgets


def grid_store(path: Path, budgets: Sequence[float], loss: Any, scores: dict[str, Any], *, task: Any = TASK, seeds: int = 3) -> Store:
    """A store of finished runs at several budgets, two widths each: `loss(flops, d_model, seed)` on both held-out parts.

    `scores` maps a feature to its probe accuracy (flops, d_model, seed) at the site resid.1, None where it was not probed.
    """
    base = Run(task=task, model=Transformer(layers=2, d_model=16, heads=2), optim=AdamW(), batch=64, flops=1e12)
    runs = grid(base, {"model.d_model": [8, 16], "flops": list(budgets), "seed": range(seeds)})
    truths = [{"run": run.id, "lr": 1e-3, "diverged": None} for run in runs]
    for width in (8, 16):  # a cohort has one structure
        members = [i for i, run in enumerate(runs) if run.model.d_model == width]
        _grid_cohort(path, f"c0ffee{width:06d}", [runs[i] for i in members], [truths[i] for i in members], loss, scores)
    write_json(path / "format.json", {"format": 1})
    return Store(path)


def _grid_cohort(path: Path, name: str, runs: list[Run], truths: list[dict[str, Any]], loss: Any, scores: dict[str, Any]) -> None:
    _cohort(path / name, runs, truths)  # written apart, then moved into its place
    folder = path / "cohorts" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    (path / name / "cohorts" / "c0ffee000000").rename(folder)
    metrics, probes = [], []
    for run in runs:
        at = (run.flops, run.model.d_model, run.seed)
        head = {"run": run.id, "step": STEPS}
        for split in ("validation", "test"):
            metrics.append(head | {"split": split, "loss": loss(*at), "accuracy": None, "exact_match": float(loss(*at) < 0.01)})
        for feature, score in scores.items():
            if score(*at) is not None:
                read = {"feature": feature, "site": "resid.1", "family": "resid", "layer": 1, "index": 0, "position": 1}
                values = {"accuracy": score(*at), "log_loss": 1 - score(*at), "chance": 0.5, "control": 0.5, "untrained": 0.5}
                probes.append(head | read | values)
    write_table(folder / "metrics.parquet", pa.Table.from_pylist(metrics))
    if probes:
        (path / "rows" / "probe").mkdir(parents=True, exist_ok=True)
        write_table(path / "rows" / "probe" / f"{name}.parquet", pa.Table.from_pylist(probes))
