"""Which source the next row comes from: smooth weighted round robin over integers.

Each pick adds to every source's credit its weight, takes the source with the most credit (of equal ones the
first by name) and takes the sum of the weights from it (the scheduler that nginx made known). So after any
number of rows each source is within a few rows of its share, without chance. The one invariant: the next row
of each source and its credit are the whole state, and picks are made for the global batch, so neither a
resume nor another number of processes changes what follows.
"""

from collections.abc import Mapping

RECALL = "recall"  # the source that is made, not read (see train/data/recall.py)
ALL = "*"  # all sources that are read

_SCALE = 2**20  # the sum of the weights, but for rounding


def mixture_shares(mixture: Mapping[str, float], num_tokens: Mapping[str, int]) -> dict[str, float]:
    """The share of the rows of each source that is in a mixture; num_tokens are the tokens of those that exist.

    A name that is not a source's stands for all sources below it, in proportion to their tokens:
    "multilingual" for "multilingual/de" and "multilingual/fr"; "*" stands for every source, and an empty mixture
    is "*" alone. Raises ValueError for a name of no source and for one without tokens.
    """
    shares: dict[str, float] = {}
    for name, share in (mixture or {ALL: 1.0}).items():
        if name == RECALL:
            found = {name: share}
        elif name == ALL:
            found = _by_tokens("data", share, num_tokens)
        elif name in num_tokens:
            found = _by_tokens(name, share, {name: num_tokens[name]})
        else:
            below = {source: count for source, count in num_tokens.items() if source.startswith(f"{name}/")}
            if not below:
                known = ", ".join(sorted(num_tokens))
                raise ValueError(f"the mixture names {name!r}, which is no source with documents; there are {known}")
            found = _by_tokens(name, share, below)
        for source, part in found.items():
            shares[source] = shares.get(source, 0.0) + part
    return {source: share for source, share in shares.items() if share > 0}


def _by_tokens(name: str, share: float, num_tokens: Mapping[str, int]) -> dict[str, float]:
    total = sum(num_tokens.values())
    if share > 0 and not total:
        raise ValueError(f"{name} has no tokens; prepare some, or leave it out of the mixture")
    return {source: share * count / max(1, total) for source, count in num_tokens.items()}


class Mixture:
    """Picks rows of sources by their shares, from a state on."""

    def __init__(self, shares: Mapping[str, float], state: Mapping[str, tuple[int, int]] | None = None):
        """Go on from what `state()` gave, (next row, credit) by source; a source that is not in it starts at row 0."""
        self._state = {name: (row, credit) for name, (row, credit) in (state or {}).items()}
        self.set_shares(shares)

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """Go on with these shares; a source that is taken out keeps its place."""
        # No share is so small that it never comes.
        self._weights = {name: max(1, round(share * _SCALE)) for name, share in sorted(shares.items()) if share > 0}
        self._state = dict.fromkeys(self._weights, (0, 0)) | self._state

    def take(self, count: int) -> list[tuple[str, int]]:
        """The source and the row of each of the next `count` rows."""
        total, picks = sum(self._weights.values()), []
        for _ in range(count):
            for name, weight in self._weights.items():
                row, credit = self._state[name]
                self._state[name] = row, credit + weight
            chosen = max(self._weights, key=lambda name: self._state[name][1])  # the first of equal ones
            row, credit = self._state[chosen]
            self._state[chosen] = row + 1, credit - total
            picks.append((chosen, row))
        return picks

    def state(self) -> dict[str, tuple[int, int]]:
        """(next row, credit) of every source that was ever in the mixture."""
        return dict(self._state)
