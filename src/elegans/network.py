"""One trained run in your hands: its model, weights and task; to sample, trace and edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.models import Model
from elegans.randomness import Purpose, key_for
from elegans.store import Store
from elegans.tasks import Task
from elegans.tasks.base import PARTS
from elegans.tasks.sampling import draw_set, prepare
from elegans.training.cohort import resolve
from elegans.training.run import Run
from elegans.training.step import params_of, scores
from elegans.types import Edit, Edits, Example, Trace, edit_of, no_edit


@dataclasses.dataclass(frozen=True)
class Network:
    """A run with the weights of one step."""

    run: Run
    step: int
    params: Any  # weights under TransformerLens names, `params["blocks"][0]["attn"]["W_Q"]`

    def __repr__(self) -> str:
        """The run, and not its weights, which fill screens."""
        return f"Network({self.run.id}, step={self.step}, {self.run.task!r}, {self.run.model!r})"

    @property
    def task(self) -> Task:
        return self.run.task

    @property
    def model(self) -> Model:
        return self.run.model

    def examples(self, count: int = 16, part: str = "test", seed: int = 0) -> Example:
        """Stacked examples of a part of the task's split. Raises `Invalid`."""
        if part not in PARTS:
            raise Invalid("part", part, f"allowed: {', '.join(PARTS)}")
        if count < 1:
            raise Invalid("count", count, "allowed: 1 or more")
        return jax.jit(lambda k: draw_set(self.task, part, k, count, prepare(self.task)))(key_for(seed, Purpose.INSTRUMENT))

    def tokens(self, rows: str | Sequence[int] | Any) -> Int[Array, "*batch position"]:
        """Token ids of a text, of ids, or of arrays of them. Raises `Invalid` for symbols and ids that the task lacks."""
        if isinstance(rows, str):
            symbols = self.task.symbols
            words = list(rows) if all(len(s) == 1 for s in symbols) else rows.split()
            unknown = [w for w in words if w not in symbols]
            if unknown:
                raise Invalid("tokens", unknown[0], f"allowed: {' '.join(symbols)}")
            rows = [symbols.index(w) for w in words]
        ids = np.asarray(rows)
        if ids.size == 0 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= self.task.vocab_size:
            raise Invalid("tokens", rows, f"allowed: at least one id from 0 to {self.task.vocab_size - 1}")
        return jnp.asarray(ids, jnp.int32)

    def trace(self, tokens: Any, edit: Edit | Edits = no_edit) -> tuple[Float[Array, "*batch position vocab"], Trace]:
        """Logits after every token, and everything on the way. See models/transformer.py for sites.

        `edit` intervenes in every row: `edit(site, x)` returns what replaces x, or by site what does so, `{"attn_out.1": jnp.zeros_like}`,
        or by head, `{"z.1.0": jnp.zeros_like}`. Raises `Invalid` for names that are no sites, and where a shape changes.
        """
        ids = self.tokens(tokens)
        if not callable(edit):
            sites = jax.eval_shape(lambda row: self.model.apply(self.params, row)[1].sites, ids.reshape(-1, ids.shape[-1])[0])
            edit = edit_of(edit, sites)
        if ids.ndim == 1:
            return self.model.apply(self.params, ids, edit=edit)
        return jax.vmap(lambda row: self.model.apply(self.params, row, edit=edit), axis_name="batch")(ids)

    def score(self, count: int = 512, part: str = "test", edit: Edit | Edits = no_edit) -> dict[str, float]:
        """Loss (nats per scored token), accuracy and exact match on examples of a part, under an edit as in `trace`."""
        rows = dataclasses.replace(self.examples(count, part), weights=None)  # these are the training loss's
        loss, metrics = scores(self.trace(rows.tokens[:, :-1], edit)[0], rows)
        return {"loss": float(loss), **{k: float(v) for k, v in metrics.items()}}

    def complete(self, prompt: Any, length: int | None = None, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """The prompt continued to `length` tokens (the task's rows): the likeliest token each time, or drawn at a temperature."""
        if not temperature >= 0:
            raise Invalid("temperature", temperature, "allowed: 0 or more")
        row = self.tokens(prompt).tolist()
        length = self.task.positions if length is None else length
        forward = jax.jit(lambda ids: self.model.apply(self.params, ids)[0])
        for place in range(len(row), length):
            padded = jnp.asarray(row + [0] * (length - len(row)), jnp.int32)  # one shape, one program; attention is causal
            logits = forward(padded)[place - 1]
            key = key_for(seed, Purpose.INSTRUMENT, place)
            row.append(int(logits.argmax() if temperature == 0 else jax.random.categorical(key, logits / temperature)))
        return row


def load(store: Store | str | Path, run: str | Run, step: int | None = None) -> Network:
    """A run of a store (or of the folder of one), itself or by the start of its id, with its final weights or those of a recorded step.

    Raises `Invalid`, and `StoreError` where code that the run is made of was edited since it was trained.
    """
    cohort, line = (store if isinstance(store, Store) else Store(store)).find(run.id if isinstance(run, Run) else str(run))
    cohort.check_code(line["slot"])
    spec = cohort.specs()[line["slot"]]
    if step is not None and step not in cohort.weight_steps():
        raise Invalid("step", step, f"allowed: {', '.join(map(str, cohort.weight_steps())) or 'none was recorded'}")
    vectors = cohort.vectors(step)
    if line["run"] not in vectors:
        raise Invalid("run", run, "it has no weights there: unfinished, diverged or shorter")
    params = jax.tree.map(jnp.asarray, params_of(resolve(spec), vectors[line["run"]]))
    return Network(spec, line["length"] if step is None else step, params)


def open_store(path: str | Path) -> Store:
    """Open a store: `.runs()`, `.table(name)`, `.sql(query)`, and `elegans.load(store, run)` for a network."""
    return Store(path)
