"""The compiled programs of a model, and the arrays that stay on its devices from dispatch to dispatch.

Weights are passed as a flat tuple, because flattening a module costs milliseconds a call; pages, rows and their
history are donated to each dispatch and taken back from it, so that nothing has to be read in between. Of several
processes the first calls, and what is `led` the others call, too (infer/hosts.py). The invariant: each bucket of shapes
compiles once, and what has compiled is known to fit.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infer import steps
from infer.rows import split_rows
from infer.sampling import Choice, History, SamplingParams, empty_history, row_settings
from infer.sizes import bytes_for_pages
from infer.steps import NUM_STOPS, Batch, Held, Prompts, RowState, Told
from llama_jax.cache import init_pages
from llama_jax.memory import bytes_a_device, check_program
from llama_jax.mesh import platform
from llama_jax.model import Llama

if TYPE_CHECKING:
    from infer.hosts import Hosts

_WAYS = "fewer prompts at a time, a shorter prefill_chunk or more devices"

# A jitted function, its arguments, and those that are static.
Call = tuple[Any, tuple, dict[str, Any]]

Method = TypeVar("Method", bound=Callable)


def led(method: Method) -> Method:
    """A method of Programs that all processes call when the first does, with host arrays and plain values.

    No such method calls another.
    """

    @wraps(method)
    def call(self: "Programs", *args: Any, **kwargs: Any) -> Any:
        if self.hosts is not None:
            self.hosts.tell(method.__name__, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class Programs:
    """Prefill and decode of one model. Batches with allowed tokens run with all that only some rows need."""

    def __init__(
        self, model: Llama, guesser: Any = None, *, num_rows: int, num_steps: int, hosts: "Hosts | None" = None
    ):
        """num_rows: of all shards; num_steps: the most that one dispatch decodes; hosts: in the process that leads.

        guesser: of tokens ahead, see infer/speculation.py.
        """
        self.hosts = hosts
        if hosts is not None:
            hosts.tell("programs", num_rows=num_rows, num_steps=num_steps)
        self.cfg, self.rules, self.guesser, self.num_rows = model.cfg, model.rules, guesser, num_rows
        leaves, tree = jax.tree.flatten((model, guesser))
        self.weights = tuple(map(_passable, leaves))
        self.mesh = leaves[0].sharding.mesh
        self.compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self._held: Held | None = None
        self._history: History | None = None
        self._prefill = jax.jit(partial(steps.prefill, tree), static_argnames="fresh", donate_argnames="held")
        self._decode = jax.jit(partial(steps.decode, tree, num_steps), donate_argnames="held")
        self._remember = jax.jit(partial(steps.remember, model.rules), donate_argnames="history")
        self._embed = jax.jit(partial(steps.embed, tree))

    @led
    def room(self, dtype: Any, *, prefill_chunk: int, held: int, left: int | None = None) -> int | None:
        """`infer.sizes.bytes_for_pages`, of the process that has least."""
        num_rows = self.num_rows * steps.tokens_a_step(self.guesser)
        sizes = {"num_rows": num_rows, "prefill_chunk": prefill_chunk, "held": held, "left": left}
        rooms = [bytes_for_pages(self.cfg, self.mesh, dtype, **sizes)]
        rooms += [] if self.hosts is None else self.hosts.answers()
        return min((room for room in rooms if room is not None), default=None)

    @led
    def open(self, num_pages: int, page_size: int, dtype: Any) -> None:
        """Allocate empty pools of num_pages pages, those of all shards, and rows that are off."""
        self._held = None  # before the new ones, so that the memory is there
        with jax.set_mesh(self.mesh):
            self._held = jax.jit(partial(self._allocate, num_pages, page_size, dtype))()

    def page_bytes(self, page_size: int, dtype: Any) -> int:
        """Bytes a device of a page in each shard, with all that is held of its tokens."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return bytes_a_device(jax.eval_shape(partial(self._pools, self.rules.batch_multiple, page_size, dtype)))

    def _pools(self, num_pages: int, page_size: int, dtype: Any) -> tuple[Any, Any]:
        pages = init_pages(self.cfg, self.rules, num_pages, page_size, dtype=dtype)
        return pages, self.guesser and self.guesser.allocate(self.rules, num_pages, page_size, dtype)

    def _allocate(self, num_pages: int, page_size: int, dtype: Any) -> Held:
        stops = np.full((self.num_rows, NUM_STOPS), -1, np.int32)
        settings = row_settings([SamplingParams()] * self.num_rows, stops=stops)
        off = np.zeros(self.num_rows, np.int32)
        state = split_rows(self.rules, RowState(off, off, off, settings, off - 1))
        pages, ahead = self._pools(num_pages, page_size, dtype)
        return Held(pages, state, None, ahead)

    @led
    def prefill(self, prompts: Prompts, batch: Batch, *, fresh: bool) -> tuple[Choice, Told | None]:
        """Store chunks of prompts; where they are the last, tokens [B, 1] that follow, and what targets ask for.

        fresh: every chunk is the first of its prompt, so that its tokens see each other alone. Raises ValueError
        as `decode` does.
        """
        choice, told = self._advance(self._prefill_call(prompts, batch, fresh))
        return choice, told

    @led
    def decode(self, batch: Batch, num_steps: int) -> tuple[Choice, Array | None]:
        """Decode up to so many steps of every row; tokens [B, those of the program], -1 for none; guesses made [B].

        Raises ValueError if the devices have not the memory that a new bucket needs.
        """
        choice, guessed = self._advance(self._decode_call(batch, num_steps))
        return choice, guessed

    @led
    def remember(self, row: np.ndarray, prompt: np.ndarray, generated: np.ndarray) -> None:
        """Set the history of one row anew; row int32 [shards] names it in its shard and is beyond all in the others."""
        self._history = self._run((self._remember, (self._full_history(), row, prompt, generated), {}))

    @led
    def embed(self, tokens: np.ndarray, lengths: np.ndarray, adapters: np.ndarray) -> tuple[Array, Array]:
        """Mean and last of the final hidden states float32 [B, D] of texts int32 [B, T]."""
        return self._run(self._embed_call(tokens, lengths, adapters))

    def _embed_call(self, tokens: np.ndarray, lengths: np.ndarray, adapters: np.ndarray) -> Call:
        return self._embed, (self.weights, tokens, lengths, adapters), {}

    def _prefill_call(self, prompts: Prompts, batch: Batch, fresh: bool) -> Call:
        return self._prefill, (self.weights, self._holding(batch), prompts, batch), {"fresh": fresh}

    def _decode_call(self, batch: Batch, num_steps: int) -> Call:
        return self._decode, (self.weights, self._holding(batch), batch, np.int32(num_steps)), {}

    def _holding(self, batch: Batch) -> Held:
        assert self._held is not None
        return self._held if batch.allowed is None else self._held._replace(history=self._full_history())

    def _full_history(self) -> History:
        """What each row holds; allocated when a row first needs it."""
        if (history := self._history) is None:
            with jax.set_mesh(self.mesh):
                empty = partial(empty_history, self.num_rows, self.cfg.vocab_size)
                self._history = history = jax.jit(lambda: split_rows(self.rules, empty()))()
        return history

    def _advance(self, call: Call) -> list[Any]:
        held, *results = self._run(call)
        if held.history is not None:
            self._history = held.history
        self._held = held._replace(history=None)
        return results

    def _run(self, call: Call) -> Any:
        """Call a program, compiling it first, with the time taken apart, if its bucket is new."""
        key, args = _key(call), call[1]
        if key not in self.compiled:
            jax.block_until_ready(args)  # or what still runs would be taken for compiling
            began = time.perf_counter()
            self._keep(key, self._lower(call).compile())
            self.compile_seconds += time.perf_counter() - began
        return self.compiled[key](*args)

    def _keep(self, key: Any, compiled: Any) -> None:
        check_program("this batch", compiled, self.mesh.devices.flat, ways=_WAYS)
        self.compiled[key] = compiled

    def _lower(self, call: Call) -> jax.stages.Lowered:
        function, args, static = call
        with jax.set_mesh(self.mesh):
            return function.lower(*args, **static)

    def warm(
        self,
        decode: Sequence[Batch],
        prefill: Sequence[tuple[Prompts, Batch, bool]],
        texts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        bar: Callable[[int], Any] = lambda _: None,
    ) -> None:
        """Compile for all these batches in every process, several at a time; bar hears here of each that is done.

        Of texts those that the devices have no memory for are left out: they are refused when they are asked for.
        """
        if self.hosts is not None:
            self.hosts.tell("warm", decode, prefill, texts)
        calls = [self._decode_call(batch, 1) for batch in decode]
        calls += [self._prefill_call(*chunks) for chunks in prefill]
        calls += [self._embed_call(*text) for text in texts]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            jobs = {}
            for call in calls:
                if (key := _key(call)) not in self.compiled and key not in jobs:
                    jobs[key] = threads.submit(self._lower(call).compile)
            for key, job in jobs.items():
                with suppress(ValueError) if key[0] is self._embed else nullcontext():
                    self._keep(key, job.result())
                bar(1)

    def lower(
        self, prompts: Prompts, chunks: Batch, fresh: bool, decode: Batch, *, num_pages: int, page_size: int, dtype: Any
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered, Held]:
        """Prefill and decode, and what they hold, for pools that are not there, on the ambient mesh."""
        held = jax.eval_shape(partial(self._allocate, num_pages, page_size, dtype))
        first = self._prefill.lower(self.weights, held, prompts, chunks, fresh=fresh)
        return first, self._decode.lower(self.weights, held, decode, np.int32(1)), held


def _key(call: Call) -> Any:
    """What tells a bucket from others: shapes, and which of the optional arrays are there."""
    function, (_, *args), static = call
    return function, *(x.shape for x in jax.tree.leaves(args)), *static.values()


def _passable(leaf: Any) -> Any:
    """A weight as a compiled program takes it: on CPUs four bits as eight.

    There jax 0.10.2 tells of int4 arrays a layout that the programs which it compiles for them refuse.
    """
    if leaf.dtype != jnp.int4 or platform(leaf.sharding.mesh) != "cpu":
        return leaf
    if isinstance(leaf, Array):
        return jax.jit(lambda x: x.astype(jnp.int8))(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.int8, sharding=leaf.sharding)
