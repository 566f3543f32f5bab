"""A model's parameters as one vector: updating one is one kernel, where a tree takes one for every matrix."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from elegans.types import AnyArray


def ravel(tree: Any) -> Float[Array, " parameter"]:
    """All parameters as one vector, in tree order. Updating one vector is one kernel, not one for every matrix."""
    return jnp.concatenate([w.reshape(-1) for w in jax.tree.leaves(tree)])


def unravel(vector: Float[AnyArray, "*lead parameter"], like: Any) -> Any:
    """The tree of a vector, or of many along leading axes; `like` has the shapes of one. Works on NumPy arrays too."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([w.size for w in leaves])
    parts = [vector[..., end - w.size : end].reshape(*vector.shape[:-1], *w.shape) for w, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(treedef, parts)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as dotted text: `blocks.0.attn.W_Q`."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def resized(w: Any, shape: tuple[int, ...]) -> Any:
    """A weight [replica, ...], cut or padded with zeros at its ends; NumPy's where it is."""
    if w.shape[1:] == shape:
        return w
    w = w[:, *map(slice, shape)]
    module: Any = np if isinstance(w, np.ndarray) else jnp
    return module.pad(w, [(0, 0), *((0, to - n) for n, to in zip(w.shape[1:], shape, strict=True))])


def refitted(tree: Any, own: Any, other: Any) -> Any:
    """A tree with vectors [replica, parameter] of a model made those of one of other shapes, cut or padded as its weights are."""
    pairs = list(zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True))
    if all(w.shape == to.shape for w, to in pairs):
        return tree
    size = sum(w.size for w, _ in pairs)

    def fit(a: Any) -> Any:
        if not (a.ndim == 2 and a.shape[1] == size):
            return a
        parts, end = [], 0
        for same, run in itertools.groupby(pairs, lambda pair: pair[0].shape == pair[1].shape):
            for piece in [list(run)] if same else [[pair] for pair in run]:  # neighbours that stay are one piece
                begin, end = end, end + sum(w.size for w, _ in piece)
                ((w, to), *_) = piece
                part = a[:, begin:end]
                parts.append(part if same else resized(part.reshape(-1, *w.shape), to.shape).reshape(len(a), -1))
        module: Any = np if isinstance(a, np.ndarray) else jnp
        return module.concatenate(parts, 1)

    return jax.tree.map(fit, tree)
