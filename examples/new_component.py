"""Edits of the architecture: subclass one component, override `apply`, and sweep its new float field.

    elegans run examples/new_component.py model.attention.gain=1,2,3

`gain` multiplies the attention scores, but only in batches that hold the token `+` (id 2) somewhere:
the batch is an axis named "batch", so that a component may look across it. `SquaredMLP` squares the
MLP's output. The unedited model runs beside both.
"""

import jax
import jax.numpy as jnp

import elegans as el


@el.spec
class GainedAttention(el.Attention):
    """Attention whose scores are multiplied by `gain` where some row of the batch holds `token`."""

    gain: float = el.field(2.0, "factor on the scores", gt=0)  # a float: swept inside one cohort
    token: int = el.field(2, "the token id that switches it on", ge=0)  # an int: structure

    def apply(self, params, x, context):
        present = (context.tokens == self.token).any().astype(x.dtype)
        anywhere = jax.lax.pmax(present, "batch")

        def site(name, value):
            return context.site(name, value * jnp.where(anywhere > 0, self.gain, 1.0) if name == "scores" else value)

        return super().apply(params, x, el.Context(context.tokens, site, context.positions, context.key, context.dropout))


@el.spec
class SquaredMLP(el.SwiGLU):
    """The MLP, its output squared."""

    def apply(self, params, x, context):
        return super().apply(params, x, context) ** 2


plain = el.Run(el.Addition(length=4), el.Transformer(layers=1, d_model=16, heads=2), el.AdamW(lr=3e-3), batch=32, steps=300)
edits = [plain, el.replace(plain, "model.attention", GainedAttention()), el.replace(plain, "model.mlp", SquaredMLP())]
study = el.Study([run for edit in edits for run in el.grid(edit, {"seed": range(2)})], name="edits")
