"""How fast each device multiplies and each link between devices carries, to find the slow one among many.

Every process calls these together, outside of a mesh, and learns of its own devices. The one invariant: the
devices do equal work, and of several tries the fastest counts, so what differs is the hardware.
"""

import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Of the median speed, what a device must reach.
SLOW_SHARE = 0.8

_TRIES = 5

# Width of the matrices and bytes to be summed on each device: some 20 ms of work on an accelerator.
_WIDTH, _LINK_BYTES = 8192, 2**28
_CPU_WIDTH, _CPU_LINK_BYTES = 256, 2**20

_PRODUCTS = 4


def matrix_speeds() -> dict[int, float]:
    """FLOP/s of products of bfloat16 matrices by id of this process's devices, one device after the other."""
    return {device.id: _matrix_speed(device) for device in jax.local_devices()}


def _matrix_speed(device: Any) -> float:
    width = _CPU_WIDTH if device.platform == "cpu" else _WIDTH
    x = jax.device_put(np.full((width, width), 1 / width, jnp.bfloat16), device)
    products = jax.jit(lambda x: functools.reduce(lambda y, _: x @ y, range(_PRODUCTS), x))
    products(x).block_until_ready()
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        products(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * _PRODUCTS * width**3 / min(seconds)


def link_speeds() -> dict[int, float]:
    """Bytes a second of an all-reduce with a neighbour by id of this process's devices, the better of two; {} for one.

    Devices stand in a ring, in the order of jax.devices(): a slow device or link is slow with both its neighbours or
    between two. An odd number of them sums together, and only differences between processes can be seen.
    """
    devices = np.array(jax.devices())
    if len(devices) == 1:
        return {}
    if len(devices) % 2:
        return _link_speeds(devices[None])
    rounds = [_link_speeds(ring.reshape(-1, 2)) for ring in (devices, np.roll(devices, 1))]
    return {device: max(speeds[device] for speeds in rounds) for device in rounds[0]}


def _link_speeds(groups: np.ndarray) -> dict[int, float]:
    """The same in groups [G, N] of devices, each summing over its own, in one program."""
    mesh = Mesh(groups, ("group", "member"), axis_types=(AxisType.Auto,) * 2)
    num_bytes = _CPU_LINK_BYTES if groups.flat[0].platform == "cpu" else _LINK_BYTES
    rows = P(("group", "member"))
    shape = (groups.size, num_bytes // 4)
    x = jax.make_array_from_callback(shape, NamedSharding(mesh, rows), lambda index: np.ones((1, shape[1]), np.float32))
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "member"), mesh=mesh, in_specs=rows, out_specs=P("group")))
    total(x).block_until_ready()
    seconds: dict[int, float] = {}
    for _ in range(_TRIES):
        began = time.perf_counter()
        waiting = {shard.device.id: shard.data for shard in total(x).addressable_shards}
        while waiting:  # each device is done by itself
            for device in [device for device, data in waiting.items() if data.is_ready()]:
                del waiting[device]
                seconds[device] = min(seconds.get(device, np.inf), time.perf_counter() - began)
    return {device: num_bytes / taken for device, taken in seconds.items()}


def slow_devices(speeds: Mapping[Any, float]) -> dict[Any, float]:
    """Those below SLOW_SHARE of the median speed, with their share of it."""
    median = statistics.median(speeds.values())
    return {device: speed / median for device, speed in speeds.items() if speed < SLOW_SHARE * median}
