"""A language that iterates any table, and networks whose circuit on it is known: the oracle of what looks at attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from elegans.models.iterator import iterator
from elegans.randomness import Purpose, key_for
from elegans.specs import field, spec
from elegans.tasks import Parity
from elegans.tasks.base import Task
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import Run
from elegans.training.vectors import ravel
from elegans.types import Example, Truth

XOR, COPY = np.array([[0, 1], [1, 0]]), np.array([[0, 1], [0, 1]])
MOD = np.array([[(s * x + 1) % 5 for x in range(5)] for s in range(5)])


@spec
class Polynomial5(Task):
    """s_t = (s_{t-1} x_t + 1) mod 5 for x in 1..4, from s_0 = 0: rows `T x_1 .. x_L : s_1 .. s_L $`, 1 <= L <= length."""

    length: int = field(4, "inputs of the longest row", ge=1)

    @property
    def symbols(self):
        return tuple("01234T:$")

    @property
    def positions(self):
        return 2 * self.length + 3

    def sample(self, key, data):
        a, b = jax.random.split(key)
        n, t = jax.random.randint(a, (), 1, self.length + 1), jnp.arange(self.length)
        x = jnp.where(t < n, jax.random.randint(b, (self.length,), 1, 5), 0)
        state = jax.lax.scan(lambda s, x: ((s * x + 1) % 5,) * 2, 0, x)[1]
        p, end = jnp.arange(self.positions), n + 2 + n
        written = jnp.where(p < n + 2, x[(p - 1) % self.length], state[(p - n - 2) % self.length])
        tokens = jnp.select([p == 0, p == n + 1, p >= end], [5, 6, 7], written)
        reads = jnp.where(t < n, t + n + 1, -1)
        truth = {"input": Truth(x, reads, "categorical", 5), "state": Truth(state, reads, "categorical", 5)}
        return Example(tokens, (p > n + 1) & (p <= end), truth)


TASK = Parity(length=4, shortest=1, split=None)
MODEL, PERFECT = iterator(TASK, XOR)


def without(params: Any, layer: int) -> Any:
    """The network with queries that no longer choose: attention of that layer is uniform."""
    attn = params["blocks"][layer]["attn"]
    flat = {name: jnp.zeros_like(attn[name]) for name in ("W_Q", "b_Q")}
    blocks = list(params["blocks"])
    blocks[layer] = blocks[layer] | {"attn": attn | flat}
    return params | {"blocks": blocks}


NETWORKS = {
    "perfect": PERFECT,
    "no start": without(PERFECT, 0),
    "no fetch": without(PERFECT, 1),
    "untrained": MODEL.init(jax.random.key(7), TASK.vocab_size, TASK.positions),
}
RUNS = {name: Run(TASK, MODEL, steps=2, seed=i, data_seed=0) for i, name in enumerate(NETWORKS)}


def measured(instrument: Any, networks: Any = None) -> Any:
    """Rows of an instrument as the protocol makes them, of (name, step, parameters): by default every network at its end."""
    networks = networks or [(name, 2, params) for name, params in NETWORKS.items()]
    runs = {run.id: run for run in RUNS.values()}
    names = {run.id: name for name, run in RUNS.items()}
    vectors = [(RUNS[name].id, step, np.asarray(ravel(params))) for name, step, params in networks]
    tables = [t.to_pandas() for t in instrument._over(runs, vectors, lambda *_: None)]
    made = pd.concat(tables, ignore_index=True)
    return made.assign(run=made["run"].map(names))


def held_out(rows: int) -> Example:
    """The rows that `measured` measures on."""
    draw = jax.jit(lambda: draw_set(TASK, "test", key_for(0, Purpose.INSTRUMENT), rows, prepare(TASK)))
    return jax.device_get(draw())


def drawn(task: Task, rows: int, seed: int = 0) -> Example:
    return jax.device_get(jax.jit(jax.vmap(lambda k: task.sample(k, ())))(jax.random.split(jax.random.key(seed), rows)))
