"""One thread that runs the engine, and the asyncio side that feeds it and hears from it.

The engine is not thread-safe, so all that touches it goes through the thread's inbox. The invariant: a request
that was submitted ends, by its own stop, by an abort or by the failure of the engine; its pages are free then.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from infer.api.errors import ApiError, unavailable
from infer.engine import Engine
from infer.request import Request


class Delta(NamedTuple):
    """What came for one of the requests of a stream: new text that may be shown, and how many tokens there are now."""

    index: int
    text: str
    num_tokens: int
    finished: bool


# The stream that hears of a request, and the request's place in it.
_Listener = tuple[asyncio.Queue[Delta | ApiError], int]


class Worker:
    """An engine in a thread of its own. `failure` says why it stopped working, if it did; `closed` that it ended."""

    def __init__(self, engine: Engine, *, max_waiting: int):
        """At most max_waiting requests wait for a place in the running batch."""
        self.engine, self.max_waiting = engine, max_waiting
        self.ready, self.closed = asyncio.Event(), asyncio.Event()
        self.failure: BaseException | None = None
        self._warming = False
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = False

    def start(self, warm_up: Callable[[], None] | None = None) -> None:
        """Run the engine, after warm_up; called from the event loop."""
        self._loop = asyncio.get_running_loop()
        if warm_up is not None:
            self._warming = True
            self._inbox.put(warm_up)
        self._inbox.put(lambda: self._tell(self._is_warm))
        self._thread.start()

    def _is_warm(self) -> None:
        self._warming = False
        self.ready.set()

    @property
    def active(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._listeners)

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[Delta, None]:
        """Submit requests and yield what comes for any of them; leaving early aborts those that have not ended.

        Raises ApiError: 503 if the engine stops, 400 if it cannot take a request.
        """
        self.check_open()
        arrived: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        going = dict(enumerate(requests))
        for index, request in going.items():
            self._listeners[id(request)] = arrived, index
            self._inbox.put(lambda request=request: self._add(request))
        try:
            while going:
                news = await arrived.get()
                if isinstance(news, ApiError):
                    raise news
                if news.finished:
                    del self._listeners[id(going.pop(news.index))]
                yield news
        finally:
            for request in going.values():
                self._listeners.pop(id(request), None)
                self._inbox.put(lambda request=request: self.engine.abort(request))

    async def call(self, function: Callable[[], Any]) -> Any:
        """What function gives in the engine's thread, between two of its steps."""
        self.check_open()
        answer: asyncio.Future = self._loop.create_future()

        def settle(method: Callable[[Any], None], value: Any) -> None:
            if not answer.done():
                method(value)

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._tell(settle, answer.set_exception, error)
            else:
                self._tell(settle, answer.set_result, result)

        self._inbox.put(run)
        return await answer

    def check_open(self) -> None:
        """Raises ApiError 503 when no request can be taken."""
        if self.failure is not None or self._draining:
            raise unavailable(self._why())
        if self._warming:  # not in the queue: compiling takes longer than clients wait
            raise unavailable("the engine is warming up")

    async def drain(self, seconds: float) -> bool:
        """Take nothing new and wait for what runs, at most so long; whether all of it ended. Then stop the thread.

        `stuck` tells then whether it does not stop, as in a warm-up.
        """
        self._draining = True
        deadline = self._loop.time() + seconds
        while self._listeners and self.failure is None and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        all_ended = not self._listeners
        self._inbox.put(None)
        self._end_streams()
        await asyncio.to_thread(self._thread.join, 1.0 if self._warming else 10.0)
        return all_ended

    @property
    def stuck(self) -> bool:
        """Whether the engine's thread runs on."""
        return self._thread.is_alive()

    def _why(self) -> str:
        return "the server is shutting down" if self.failure is None else f"the engine failed: {self.failure}"

    def _tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function in the event loop's thread, unless the loop has closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
        except BaseException as error:  # not only Exception: whatever it is, nobody else would hear of it
            self.failure = error
            self._tell(self._end_streams)
        self._tell(self.closed.set)

    def _take_inbox(self) -> bool:
        """Do what has arrived, and arrives while there is nothing better to do; false when told to stop."""
        while True:
            spare = self.engine.spare_seconds if self.engine.has_work else None
            try:
                message = self._inbox.get(block=spare != 0, timeout=spare)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _step(self) -> None:
        news = []
        for request, text in self.engine.step():
            if (listener := self._listeners.get(id(request))) is not None:  # else its client has gone
                arrived, index = listener
                news.append((arrived, Delta(index, text, len(request.result.tokens), not request.unfinished)))
        if news:
            self._tell(_deliver, news)

    def _add(self, request: Request) -> None:
        listener = self._listeners.get(id(request))
        if listener is None:
            return
        try:
            self.engine.add(request)
        except ValueError as error:
            self._tell(_deliver, [(listener[0], ApiError(str(error)))])

    def _end_streams(self) -> None:
        _deliver([(arrived, unavailable(self._why())) for arrived, _ in self._listeners.values()])


def _deliver(news: Sequence[tuple[asyncio.Queue[Delta | ApiError], Delta | ApiError]]) -> None:
    for arrived, item in news:
        arrived.put_nowait(item)
