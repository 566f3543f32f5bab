"""Weights that a run does not train: bitwise as they were, in nobody's norm, and without moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elegans import AdamW, Addition, Invalid, Learned, Run, Transformer, Update, grid, spec
from elegans.tasks.sampling import prepare
from elegans.training.cohort import resolve
from elegans.training.planner import plan
from elegans.training.step import draw_batch, draw_data, mask_of, params_of, scores, start, trained_of
from elegans.training.vectors import path_name
from helpers import advance, as_arrays

MODEL = Transformer(layers=2, d_model=8, heads=2, position=Learned())
RUN = Run(Addition(length=3), MODEL, AdamW(lr=0.05, clip=0.1, weight_decay=0.3), batch=4, steps=5)
MLP_1 = ("blocks.1.mlp.*",)


@spec
class Own(Update):
    """Takes steps without elegans' optimiser, towards zero for every weight."""

    def apply(self, run, state, batch, step, key):
        new = type(state)(0.5 * state.params, state.opt, state.diverged)
        return new, {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}


def by_name(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@functools.cache
def after(run, steps=3):
    """A run's state before and after some steps, and the metrics of the last."""
    task, run = prepare(run.task), as_arrays(run)
    step = jax.jit(lambda run, state, i: advance(run, state, i, draw_data(run, task)))
    begun = state = start(run)
    for i in range(steps):
        state, metrics = step(run, state, jnp.int32(i))
    return begun, state, metrics


def names_that_moved(run):
    begun, ended, _ = after(run)
    old, new = (by_name(params_of(resolve(run), s.params)) for s in (begun, ended))
    return {name for name in old if not np.array_equal(old[name], new[name])}


@pytest.mark.parametrize(
    ("globs", "update", "moves"),
    [
        (MLP_1, Update(), lambda name: name.startswith("blocks.1.mlp.")),
        (MLP_1, Own(), lambda name: name.startswith("blocks.1.mlp.")),
        (("!pos_embed.*", "!*.attn.W_?"), Own(), lambda name: name != "pos_embed.W_pos" and ".attn." not in name),
        (("blocks.*", "embed.W_E", "!blocks.0.*"), Own(), lambda name: name.startswith("blocks.1.") or name == "embed.W_E"),
    ],
)
def test_only_what_is_named_moves(globs, update, moves):
    """Neither a gradient, nor weight decay, nor a training loop of the user's moves the rest by a bit."""
    run = grid(RUN, {"trained": [globs], "update": [update]})[0]
    names = set(by_name(trained_of(resolve(run))))
    assert names_that_moved(run) == {name for name in names if moves(name)} != set()


def test_no_moments_and_no_norm_of_what_is_not_trained():
    run = grid(RUN, {"trained": [MLP_1]})[0]
    _, state, _ = after(run)
    mask = mask_of(resolve(run))
    moments = [np.asarray(m) for m in jax.tree.leaves(state.opt) if np.shape(m) == mask.shape]
    assert len(moments) == 2
    for m in moments:
        assert not m[~mask].any() and m[mask].any()


def test_one_step_by_hand():
    """The gradient of the trained weights alone, clipped by its own norm, in an AdamW of optax that knows no others."""
    run = grid(RUN, {"trained": [MLP_1]})[0]
    begun, ended, metrics = after(run, steps=1)
    run = as_arrays(run)
    params = params_of(run, begun.params)
    batch = draw_batch(run, jnp.int32(0), draw_data(run, prepare(run.task)))

    def loss(mlp):
        given = {**params, "blocks": [params["blocks"][0], {**params["blocks"][1], "mlp": mlp}]}
        logits = jax.vmap(lambda row: run.model.apply(given, row[:-1])[0], axis_name="batch")(batch.tokens)
        return scores(logits, batch)[0]

    mlp = params["blocks"][1]["mlp"]
    grads = jax.jit(jax.grad(loss))(mlp)
    rule = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05, 0.9, 0.95, 1e-8, weight_decay=0.3))
    change, _ = rule.update(grads, rule.init(mlp), mlp)
    found, expected = by_name(params_of(run, ended.params)["blocks"][1]["mlp"]), by_name(optax.apply_updates(mlp, change))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_every_weight_named_is_every_weight():
    for a, b in zip(jax.tree.leaves(after(RUN)), jax.tree.leaves(after(grid(RUN, {"trained": [("*",)]})[0])), strict=True):
        assert np.array_equal(a, b)
    assert names_that_moved(RUN) == set(by_name(trained_of(resolve(RUN))))


NOTHING = {
    ("blocks.9.*",): "pos_embed.W_pos",
    ("!",): "blocks.*.mlp.W_in",
    ("embed.*", "!*"): "nothing to train",
    (): "one glob or more",
}


@pytest.mark.parametrize(("globs", "said"), NOTHING.items())
def test_globs_that_name_nothing(globs, said):
    with pytest.raises(Invalid, match="trained") as found:
        plan(grid(RUN, {"trained": [globs]}), 2**30)
    assert said in str(found.value)
