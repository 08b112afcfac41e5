"""A trace of a few steps, `--profile`: what host and devices did, for xprof (TensorBoard's profiler) or Perfetto.

The one invariant: every step that is traced begins and ends within the trace, because the devices are waited for at
both ends.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from llama_jax.entry import say
from llama_jax.paths import make_directory, staged_file

FIRST_STEP = 3  # of this start, from 0: compiling and the first steps are over
NUM_STEPS = 3


class Profile:
    """Traces NUM_STEPS steps of this start of a run into a directory, local or remote; None traces nothing."""

    def __init__(self, directory: Path | None):
        """Traces nothing yet."""
        self._directory, self._count, self._trace = directory, 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A step of the run, under its number in the trace."""
        if self._directory and self._count == FIRST_STEP:
            self._trace.enter_context(_traced_into(self._directory))
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def done(self, result: jax.Array) -> None:
        """A step was sent whose result this is."""
        self._count += 1
        if self._directory and self._count in (FIRST_STEP, FIRST_STEP + NUM_STEPS):
            result.block_until_ready()
        if self._count == FIRST_STEP + NUM_STEPS:
            self._trace.close()

    def close(self) -> None:
        """End a trace that a run ended before."""
        self._trace.close()


@contextlib.contextmanager
def _traced_into(directory: Path) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as here:
        jax.profiler.start_trace(here)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
        for file in sorted(path for path in Path(here).rglob("*") if path.is_file()):
            path = directory / file.relative_to(here).as_posix()
            make_directory(path.parent)
            with staged_file(path) as staged:
                shutil.copyfile(file, staged)
    say(f"a trace of {NUM_STEPS} steps is in {directory}; see it by xprof, or its trace.json.gz at ui.perfetto.dev")
