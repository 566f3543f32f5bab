"""Spreading the replica axis over devices: each runs the plain program on its own share, and they never communicate.

A CPU counts as one device for every core, since one program rarely keeps two cores busy at these sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def devices_for(device: jax.Device, replicas: int, limit: int | None = None) -> list[jax.Device]:
    """The devices that share a cohort: on a CPU as many cores (at most `limit`) as divide it evenly, else the one asked for."""
    if device.platform != "cpu":
        return [device]
    cores = jax.devices("cpu")
    most = min(len(cores), limit or len(cores), replicas)
    return cores[: next(n for n in range(most, 0, -1) if replicas % n == 0)]


class Spread:
    """Compiles functions of stacked replicas for one or several devices. Axes are as in `vmap`: None is shared."""

    def __init__(self, devices: list[jax.Device]):
        self.devices = devices
        self.mesh = Mesh(np.array(devices), ("device",))

    def jit(self, function: Callable, in_axes: tuple[Any, ...], out_axes: Any, donate: tuple[int, ...] = ()) -> Any:
        """`jax.jit` of a function of stacked replicas, every device on its share."""
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

    def _specs(self, axes: Any) -> Any:
        return jax.tree.map(_spec, axes, is_leaf=lambda a: a is None)

    def _shardings(self, axes: Any) -> Any:
        return jax.tree.map(lambda a: NamedSharding(self.mesh, _spec(a)), axes, is_leaf=lambda a: a is None)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "device")
