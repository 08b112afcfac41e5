"""Connections that only cost: those that never ask and those that do not read are closed.

Uvicorn bounds how long a connection idles after an answer, not how long it may take to ask or to read. The
invariant: a client that does nothing holds a connection at most twice _SECONDS, and no page of the cache.
"""

import asyncio
from typing import Any

_SECONDS = 30.0


def guarded(protocol: Any) -> Any:
    """One of uvicorn's HTTP protocols, that looks after each of its connections every _SECONDS."""

    class Guarded(protocol):
        """A connection."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Begins to look."""
            super().connection_made(transport)
            self._stands = None
            self._look = self.loop.call_later(_SECONDS, self._look_again)

        def connection_lost(self, exc: Exception | None) -> None:
            """Ends it."""
            self._look.cancel()
            super().connection_lost(exc)

        def _look_again(self) -> None:
            unread = self.transport.get_write_buffer_size()
            answering = self.cycle is not None and not self.cycle.response_complete
            # Where nothing is to be read and an answer is being made, the server is who takes its time.
            stands = None if answering and not unread else (self.cycle, answering, unread)
            if stands is not None and stands == self._stands:
                self.transport.abort()  # close() would wait for what is never read
                return
            self._stands = stands
            self._look = self.loop.call_later(_SECONDS, self._look_again)

    return Guarded
