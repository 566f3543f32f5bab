"""An edit of the training loop: corrupt the inputs but not the targets, and log the largest weight.

elegans run examples/new_update.py update.rate=0,0.05,0.1
"""

import dataclasses

import jax
import jax.numpy as jnp

import elegans as el


@el.spec
class Corrupt(el.Update):
    """Replaces a share of the tokens that the network reads by random ones; what it must predict stays."""

    rate: float = el.field(0.05, "share of tokens replaced", ge=0, le=1)

    def logits(self, run, params, batch, key):
        where, what = jax.random.split(key)
        noise = jax.random.randint(what, batch.tokens.shape, 0, run.task.vocab_size)
        hit = jax.random.bernoulli(where, self.rate, batch.tokens.shape)
        return super().logits(run, params, dataclasses.replace(batch, tokens=jnp.where(hit, noise, batch.tokens)), key)

    def apply(self, run, state, batch, step, key):
        state, metrics = super().apply(run, state, batch, step, key)
        return state, {**metrics, "largest_weight": jnp.abs(state.params).max()}  # a new column of metrics


run = el.Run(el.Addition(length=4), el.Transformer(layers=1, d_model=16, heads=2), el.AdamW(lr=3e-3), batch=32, steps=300, update=Corrupt())
study = el.Study(el.grid(run, {"update.rate": [0.0, 0.1], "seed": [0, 1]}), name="corrupt")
