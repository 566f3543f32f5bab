"""The values that flow along the line, and the names of their axes.

Axes, everywhere: replica, batch, position, vocab, layer, head, d_model, d_head, d_mlp.
Tasks, models and instruments are written for one example or one replica; the other axes are transforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, Union

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from elegans.errors import Invalid

AnyArray: TypeAlias = Union[Array, np.ndarray]  # noqa: UP007 (mypy needs this form). On the device or on the host
TruthKind = Literal["binary", "multilabel", "categorical", "number"]
HEAD_AXIS = {"q": -2, "k": -2, "v": -2, "z": -2, "scores": -3, "pattern": -3}  # from the right: rows may stand before it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truth:
    """One named intermediate value of the algorithm that a task's answer follows.

    `values[i]` is read from the network at token `positions[i]`; a position of -1 says that this
    example has no such value (a shorter row). `kind` is `binary`, `multilabel` (a further axis of
    binary labels), `categorical` (one of `classes` values from 0; none: of the vocabulary) or `number`.
    """

    values: Int[Array, "reads *label"]
    positions: Int[Array, " reads"]
    kind: TruthKind = dataclasses.field(default="binary", metadata={"static": True})
    classes: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a language: its tokens, which of them count, and the truth behind them.

    `scored[i]` says that predicting token i from the tokens before it counts towards loss and
    accuracy; token 0 has nothing before it and never counts. `weights` are those of tokens in the training
    loss; none: all alike. Accuracies and held-out losses are never weighted.
    """

    tokens: Int[Array, " position"]
    scored: Bool[Array, " position"]
    truth: dict[str, Truth] = dataclasses.field(default_factory=dict)
    weights: Float[Array, " position"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Everything a forward pass computed, by site: `embed`, `resid.0`, `pattern.1`, ... (see `Model.apply`).

    `z.1.0` is head 0 of the site `z.1`, of every row where there are several; so it is of sites of q, k, v, scores and pattern.
    Raises `Invalid` for a site or a head that is not there.
    """

    sites: dict[str, Float[Array, "..."]]

    def __getitem__(self, site: str) -> Float[Array, "..."]:
        whole, where = _place(site, self.sites)
        return self.sites[whole] if whole == site else self.sites[whole][where]


def _place(site: str, sites: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """Which site a name is of, and where in its array: all of it, or one head's. Raises `Invalid`."""
    if site in sites:
        return site, (...,)
    whole, _, head = site.rpartition(".")
    axis = HEAD_AXIS.get(whole.partition(".")[0])
    if whole not in sites or axis is None:
        raise Invalid("site", site, f"allowed: {', '.join(sites)}, and heads of {', '.join(HEAD_AXIS)}, such as z.0.0")
    heads = sites[whole].shape[axis]
    if not head.isdecimal() or int(head) >= heads:
        raise Invalid("site", site, f"allowed: heads 0 to {heads - 1} of {whole}")
    return whole, (..., int(head), *[slice(None)] * (-axis - 1))


Edit = Callable[[str, Any], Any]  # edit(site, x) returns what replaces x
Edits = Mapping[str, Callable[[Any], Any]]  # by site, or head of one: what makes of x what replaces it


def no_edit(site: str, x: Any) -> Any:
    """The edit that changes nothing."""
    del site
    return x


def apply_edit(edit: Edit, site: str, x: Any) -> Any:
    """What an edit makes of a site. Raises `Invalid` where that is not an array of the same shape, which would change what is meant."""
    made = edit(site, x)
    if getattr(made, "shape", None) != x.shape:
        shown = "None" if made is None else f"shape {getattr(made, 'shape', '()')}"
        raise Invalid(f"edit of {site}", shown, f"allowed: an array of shape {x.shape}; return x where nothing is to change")
    return made


def edit_of(edits: Edits, sites: Mapping[str, Any]) -> Edit:
    """One edit that does what each of some do to its site, or to one head there (`z.1.0`). Raises `Invalid` for names that are no sites."""
    places = [(name, *_place(name, sites), change) for name, change in edits.items()]

    def edit(site: str, x: Any) -> Any:
        for name, whole, where, change in places:
            if whole == site:
                x = x.at[where].set(apply_edit(lambda _, part, change=change: change(part), name, x[where]))
        return x

    return edit
