"""A new instrument, written for one network: the mean length of the residual stream at every site.

elegans run examples/new_instrument.py
elegans sql runs/lengths "select site, step, avg(length) from stream_length group by all order by all"
"""

import jax.numpy as jnp

import elegans as el
from elegans.instruments.probe import vectors
from elegans.tasks.sampling import draw_set


@el.spec
class StreamLength(el.ReplicaInstrument):
    """Mean Euclidean length of the residual stream over test rows and positions, in the units of activations."""

    count: int = el.field(64, "test rows", ge=1)

    def apply(self, run, params, data, key):
        rows = draw_set(run.task, "test", key, self.count, data)
        x = vectors(run, params, rows, run.model.probed_sites()["resid"])
        return {"stream": {"length": jnp.linalg.norm(x, axis=-1).mean((1, 2))}}  # one value a site

    def layouts(self, run):
        return {"stream": el.Layout({}, [[{"site": s} for s in run.model.probed_sites()["resid"]]])}


record = el.Record(weights=el.LogSpaced(per_decade=3))
run = el.Run(el.Parity(length=6), el.Transformer(layers=2, d_model=16, heads=2), batch=32, steps=300, record=record)
study = el.Study(el.grid(run, {"seed": range(3)}), instruments=[StreamLength()], name="lengths")
