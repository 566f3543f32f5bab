"""What a transition is read from does not depend on the order in which rows come."""

import duckdb
import numpy as np
import pyarrow as pa

from elegans.instruments.transition import READABLE, Transition, _nested


def test_rows_in_any_order_give_the_same_curves_and_ties_the_same_site() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"run": r, "feature": "carry", "site": s, "step": t, "index": i, "label": None, "r2": None, "accuracy": np.float32(a)}
        for r in ("a", "b")
        for s in ("resid.0", "resid.1")
        for t, a in zip((0, 10, 100), (0.5, rng.uniform(0.6, 0.9), 1.0), strict=True)
        for i in range(7)
    ]
    rows = [row | {"accuracy": np.float32(min(1.0, row["accuracy"] + rng.uniform(0, 0.05) * (row["step"] == 10)))} for row in rows]
    answers = []
    for _ in range(20):
        rng.shuffle(rows)
        probe = pa.Table.from_pylist(rows, schema=_SCHEMA)
        curves = _nested(duckdb.connect().register("probe", probe).sql(READABLE).to_arrow_table())
        answers.append(({k: Transition()._feature_step(v) for k, v in curves.items()}, curves))
    assert all(answer == answers[0] for answer in answers)
    steps, curves = answers[0]
    for key, by_site in curves.items():  # both sites end at 1: the first by name counts
        assert steps[key] == Transition()._feature_step({"resid.0": by_site["resid.0"]})
    assert any(steps[k] != Transition()._feature_step({"resid.1": v["resid.1"]}) for k, v in curves.items())


_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("run", "feature", "site")]
    + [("step", pa.int64()), ("index", pa.int64()), ("label", pa.int64()), ("accuracy", pa.float32()), ("r2", pa.float32())]
)
