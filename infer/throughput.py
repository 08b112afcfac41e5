"""What an engine counts: the speed of a run, and where it stands.

The invariant: seconds in which a program compiles belong to no other count.
"""

import time
from dataclasses import dataclass, field

# The part of a dispatch after which the next must be sent, or the devices might wait for it.
_MOST = 0.7


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
    last_read is what the clock showed when the last dispatch had been read, last_decodes the seconds of the last two
    that decoded. draft_tokens were guessed ahead, and accepted_tokens of them rightly.
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
    last_decodes: tuple[float, float] = (0.0, 0.0)

    def clock(self) -> float:
        """Seconds that do not pass while a program compiles."""
        return time.perf_counter() - self.compile_seconds

    def count(self, dispatched: float, *, prefill_tokens: int, decode_tokens: int, first: bool) -> None:
        """A dispatch that was sent when the clock showed dispatched has been read; it ran after the one before it."""
        now = self.clock()
        seconds, self.last_read = now - max(dispatched, self.last_read), now
        if prefill_tokens:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.last_decodes = self.last_decodes[1], seconds
        self.prefill_tokens += prefill_tokens
        self.decode_tokens += decode_tokens
        if first and not self.first_token_seconds:
            self.first_token_seconds = time.perf_counter() - self.began
            self.first_compile_seconds = self.compile_seconds

    def spare_seconds(self, dispatched: float) -> float:
        """Until most has run of a decode dispatch, sent at this time of the clock, if it is as short as the last two.

        The shorter counts: what is sent too early only makes those wait that come next.
        """
        began = max(dispatched, self.last_read)
        return max(0.0, began + _MOST * min(self.last_decodes) - self.clock())

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
