"""What a step takes, held once against what its program was planned to take.

The invariant: training waits for none of this. The plan is read from a program when it is compiled, and the
devices are asked for their memory once, at a step that is logged anyway.
"""

from collections.abc import Iterator

import jax
from jax.sharding import get_mesh

from llama_jax.plan import expectation, gib

# Steps after which their time is taken for what it will be.
NUM_STEPS = 10

# Beyond this share of the plan a run warns.
TOLERANCE = 0.25


class Expected:
    """The plan of one compiled step on the devices of the ambient mesh."""

    def __init__(self, compiled: jax.stages.Compiled, *, model_flops: float, first_step: int):
        """model_flops: those of all devices a step. first_step: of the stage, the last before the program ran."""
        self._devices = [device for device in get_mesh().devices.flat if device.process_index == jax.process_index()]
        self._planned = expectation(compiled, model_flops=model_flops)
        self._first_step, self._peak_before, self._is_told = first_step, self._peak_bytes(), False

    def compare(self, step: int, seconds: float) -> Iterator[str]:
        """Lines that tell, once, of a step that takes so many seconds and of the devices' memory.

        Nothing is told before NUM_STEPS, and nothing of what is unknown: a CPU's speed, memory where the
        runtime does not count it, and memory of which another program had needed more.
        """
        if self._is_told or step - self._first_step < NUM_STEPS:
            return
        self._is_told = True
        found = []
        if (planned := self._planned.seconds) is not None:
            found.append(("a step", f"{seconds:.4g} s", f"{planned:.4g} s", seconds / planned))
        peak = self._peak_bytes()
        if peak is not None and peak != self._peak_before:
            share = peak / self._planned.peak_bytes
            found.append(("memory a device", gib(peak), gib(self._planned.peak_bytes), share))
        if found:
            yield "; ".join(f"{what} {is_} ({was} planned, {share - 1:+.0%})" for what, is_, was, share in found)
        for what, *_, share in found:
            if abs(share - 1) > TOLERANCE:
                yield f"warning: {what} is {share - 1:+.0%} off its plan; --check measures each device and its links"

    def _peak_bytes(self) -> int | None:
        """The most bytes that any of this process's devices has held since it started."""
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._devices]
        return max((peak for peak in peaks if peak is not None), default=None)
