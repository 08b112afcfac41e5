"""Plans tried one after the other while time is left: the best of many, and a way out of what does not fit."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from llama_jax.entry import say
from llama_jax.plan import gib

Candidate = TypeVar("Candidate")
Planned = TypeVar("Planned")


def try_each(
    candidates: Callable[[list[tuple[Candidate, Planned]]], Iterator[Candidate]],
    attempt: Callable[[Candidate], Planned],
    *,
    seconds: float,
    rank: Callable[[Planned], Any],
    summary: Callable[[Planned], str],
) -> list[tuple[Candidate, Planned]]:
    """Plan candidates while time is left and return all that was tried, what ranks lowest first.

    candidates sees what has been tried so far. A candidate that is illegal (ValueError) is passed over.
    Ctrl-C ends the search with what there is; before the first plan it is raised.
    """
    tried: list[tuple[Candidate, Planned]] = []
    began = time.perf_counter()
    try:
        for candidate in candidates(tried):
            spent = time.perf_counter() - began
            if tried and spent * (1 + 1 / len(tried)) > seconds:
                break
            try:
                found = attempt(candidate)
            except ValueError as error:
                say(f"  {candidate}: {error}")
                continue
            tried.append((candidate, found))
            say(f"  {len(tried)} tried, {time.perf_counter() - began:.0f} of {seconds:.0f} s: {summary(found)}")
    except KeyboardInterrupt:
        if not tried:
            raise
        say(f"interrupted: the best of {len(tried)} tried")
    return sorted(tried, key=lambda pair: rank(pair[1]))


def advise(
    ways: Iterable[tuple],
    attempt: Callable[[Any], Any],
    *,
    otherwise: str,
    seconds: float,
    rank: Callable[[Any], Any],
    summary: Callable[[Any], str],
) -> str:
    """The first of the ways, each a tuple that begins with its name, that fits or else the nearest, in a few words.

    otherwise: what is said where none could be planned.
    """

    def untried(tried: list) -> Iterator[tuple]:
        for way in ways:
            if any(found.fits for _, found in tried):
                return
            yield way

    tried = try_each(untried, attempt, seconds=seconds, rank=rank, summary=summary)
    if not tried:
        return otherwise
    (name, *_), found = tried[0]
    verdict = "fits" if found.fits else f"is the nearest of {len(tried)} tried"
    return f"{name} {verdict}: {gib(found.hbm_peak_bytes)} of {gib(found.hbm_capacity_bytes)}"
