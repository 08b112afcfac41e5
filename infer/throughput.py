"""What an engine counts: the speed of a run, and where it stands.

The invariant: seconds in which a program compiles belong to no other count.
"""

import time
from collections import deque
from dataclasses import dataclass, field

# The part of a dispatch after which the next must be sent, or the devices might wait for it.
_MOST = 0.7

# Seconds of a dispatch of several decoding steps, for which a prompt that comes meanwhile has to wait.
_LONGEST = 0.05

# Seconds of a chunk of a prompt for which those that decode have to wait, and tokens that it has however slow it is.
_LONGEST_CHUNK = 3.0
_LEAST_CHUNK = 64

# Dispatches of prompts of which the one that took least a token counts: short ones take more than long ones.
_CHUNKS = 16


@dataclass(frozen=True)
class EngineStats:
    """Requests that wait and that have a row now; pages of the cache; and what has been counted since the start.

    prompt_tokens are those of requests when they are first given a row, prefix_hit_tokens how many of them were
    found in the cache. draft_tokens were guessed ahead, accepted_tokens of them rightly.
    """

    waiting: int
    running: int
    pages_total: int
    pages_free: int
    prompt_tokens: int
    prefix_hit_tokens: int
    generated_tokens: int
    preemptions: int
    compilations: int
    draft_tokens: int = 0
    accepted_tokens: int = 0


def guesses_text(counts: "EngineStats | Throughput") -> str:
    """What became of guesses, as "63% of 480 draft tokens accepted"; nothing where none were made."""
    made, accepted = counts.draft_tokens, counts.accepted_tokens
    return f"{accepted / made:.0%} of {made} draft tokens accepted" if made else ""


@dataclass
class Throughput:
    """What a run measured: tokens and seconds of prefill and of decode, and seconds of compiling before them.

    Tokens that were found in the cache are not counted. first_token_seconds is the time from the start of the run to
    its first token, and first_compile_seconds how much of that was compiling.
    last_read is what the clock showed when the last dispatch had been read, last_steps the seconds of a step in the
    last two that decoded, last_chunks those of a token in the last of prompts. draft_tokens were guessed ahead, and
    accepted_tokens of them rightly.
    """

    compile_seconds: float = 0.0
    first_compile_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    last_read: float = 0.0
    last_steps: tuple[float, float] = (0.0, 0.0)
    last_chunks: deque[float] = field(default_factory=lambda: deque(maxlen=_CHUNKS))

    def clock(self) -> float:
        """Seconds that do not pass while a program compiles."""
        return time.perf_counter() - self.compile_seconds

    def count_prefill(self, dispatched: float, tokens: int, new: int) -> None:
        """So many tokens of prompts, sent when the clock showed dispatched, have been read and brought new ones."""
        seconds = self._read(dispatched, new)
        self.prefill_seconds += seconds
        self.prefill_tokens += tokens
        self.last_chunks.append(seconds / tokens)

    def count_decode(self, dispatched: float, steps: int, new: int) -> None:
        """Likewise so many steps of decoding."""
        seconds = self._read(dispatched, new)
        self.decode_seconds += seconds
        self.decode_tokens += new
        self.last_steps = self.last_steps[1], seconds / steps

    def _read(self, dispatched: float, new: int) -> float:
        """The seconds of a dispatch that has just been read; it ran after the one before it."""
        began, self.last_read = max(dispatched, self.last_read), self.clock()
        if new and not self.first_token_seconds:
            self.first_token_seconds = time.perf_counter() - self.began
            self.first_compile_seconds = self.compile_seconds
        return self.last_read - began

    def steps_of_a_dispatch(self, most: int) -> int:
        """How many steps of decoding a prompt that comes can be let wait for, as far as is known."""
        return max(1, min(most, int(_LONGEST / max(1e-9, min(self.last_steps)))))

    def tokens_of_a_chunk(self) -> int | None:
        """How many tokens of a prompt those that decode can be let wait for; None as long as nothing is known."""
        seconds = min(self.last_chunks, default=0.0)
        return max(_LEAST_CHUNK, int(_LONGEST_CHUNK / seconds)) if seconds else None

    def spare_seconds(self, dispatched: float, steps: int) -> float:
        """Until most has run of a dispatch of decoding, sent at this time of the clock, if its steps take as before.

        The shorter of the last counts: what is sent too early only makes those wait that come next.
        """
        began = max(dispatched, self.last_read)
        return max(0.0, began + _MOST * steps * min(self.last_steps) - self.clock())

    def count_guesses(self, made: int, accepted: int) -> None:
        """So many tokens were guessed ahead, and so many of them rightly."""
        self.draft_tokens += made
        self.accepted_tokens += accepted

    def __str__(self) -> str:
        guesses = guesses_text(self)
        return (
            f"prefill {self.prefill_tokens_per_second:.1f} tokens/s, "
            f"decode {self.decode_tokens_per_second:.1f} tokens/s, {guesses and guesses + ', '}"
            f"compiled in {self.compile_seconds:.1f} s"
        )

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, padding not counted."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first a second, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0
