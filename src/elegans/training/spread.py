"""Spreading the replica axis over devices: each runs the plain program on its own share, and they never communicate.

A CPU counts as one device for every core, since one program rarely keeps two cores busy at these sizes. A core
takes its replicas a few at a time, each for the whole call, so that what they work on stays in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

AT_ONCE = 2  # replicas that a core of a CPU trains together: at every size from d_model 8 to 64 the fastest of 1 to 32


def devices_for(device: jax.Device, replicas: int, limit: int | None = None) -> list[jax.Device]:
    """The devices that share a cohort: on a CPU as many cores (at most `limit`) as divide it evenly, else the one asked for."""
    if device.platform != "cpu":
        return [device]
    cores = jax.devices("cpu")
    most = min(len(cores), limit or len(cores), replicas)
    return cores[: next(n for n in range(most, 0, -1) if replicas % n == 0)]


class Spread:
    """Compiles functions of stacked replicas for one or several devices. Axes are as in `vmap`: None is shared."""

    def __init__(self, devices: list[jax.Device], replicas: int, whole: bool = False):
        """`whole`: a function needs all replicas at once, also on a CPU."""
        self.devices, self.replicas = devices, replicas
        share = replicas // len(devices)
        on_cpu = devices[0].platform == "cpu"
        self.turns = share // next(n for n in range(AT_ONCE, 0, -1) if share % n == 0) if on_cpu and not whole else 1
        self.mesh = Mesh(np.array(devices), ("device",))

    def jit(self, function: Callable, in_axes: tuple[Any, ...], out_axes: Any, donate: tuple[int, ...] = ()) -> Any:
        """`jax.jit` of a function of stacked replicas, every device on its share."""
        function = _in_turns(function, in_axes, out_axes, self.turns) if self.turns > 1 else function
        if len(self.devices) == 1:
            return jax.jit(function, donate_argnums=donate)
        specs = [self._specs(axes) for axes in (in_axes, out_axes)]
        shared = jax.shard_map(function, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
        shardings = [self._shardings(axes) for axes in (in_axes, out_axes)]
        return jax.jit(shared, in_shardings=shardings[0], out_shardings=shardings[1], donate_argnums=donate)

    def place(self, tree: Any, axes: Any = 0) -> Any:
        """Arrays on the devices that will use them."""
        if len(self.devices) == 1:
            return jax.device_put(tree, self.devices[0])
        return jax.device_put(tree, self._shardings(axes))

    def take(self, tree: Any, index: Int[np.ndarray, " replica"]) -> Any:
        """Some replicas' arrays out of those of more, on the devices that will use them."""
        if self.devices[0].platform == "cpu":
            tree = jax.tree.map(np.asarray, tree)
        return self.place(jax.tree.map(lambda a: a[index], tree))

    def _specs(self, axes: Any) -> Any:
        return jax.tree.map(_spec, axes, is_leaf=_is_none)

    def _shardings(self, axes: Any) -> Any:
        return jax.tree.map(lambda a: NamedSharding(self.mesh, _spec(a)), axes, is_leaf=_is_none)


def _in_turns(function: Callable, in_axes: tuple[Any, ...], out_axes: Any, turns: int) -> Callable:
    """The function on a part of the replicas after the other, each as long as the whole call takes."""

    def split(axis: int | None, tree: Any) -> Any:
        """Arrays with the turns as their first axis; nothing of what is shared."""
        return None if axis is None else jax.tree.map(lambda a: a.reshape(turns, -1, *a.shape[1:]), tree)

    def joined(axis: int, tree: Any) -> Any:
        def join(a: jax.Array) -> jax.Array:
            a = jnp.moveaxis(a, 0, axis)
            return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

        return jax.tree.map(join, tree)

    def called(*args: Any) -> Any:
        parts = jax.tree.map(split, in_axes, args, is_leaf=_is_none)
        made = jax.lax.map(lambda part: function(*jax.tree.map(_pick, in_axes, args, part, is_leaf=_is_none)), parts)
        return jax.tree.map(joined, out_axes, made)

    return called


def _pick(axis: int | None, shared: Any, part: Any) -> Any:
    return shared if axis is None else part


def _is_none(x: Any) -> bool:
    return x is None


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "device")
