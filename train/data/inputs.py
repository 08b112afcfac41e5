"""What a stage reads: its sources, the mixture at each of its steps, and the rows of each phase.

The one invariant: a mixture, a length or a source that cannot be read is refused before the first step.
"""

from collections.abc import Mapping, Sequence

from llama_jax.entry import say
from llama_jax.mesh import ShardingRules
from llama_jax.tokenizer import Tokenizer
from train.checkpoints import Progress
from train.config import PhaseConfig, TrainConfig
from train.data.mixture import ALL, RECALL, mixture_shares
from train.data.packing import PackedRows, Rows, share_past_half, stack
from train.data.recall import RecallRows
from train.data.shards import TokenDataset, all_documents, open_sources
from train.data.stream import Stream
from train.device import local_rows

# Rows of each source that are read to tell how far back tokens can look.
_SAMPLE_ROWS = 16


class Inputs:
    """The training data of one stage."""

    def __init__(self, config: TrainConfig, stage: str, tokenizer: Tokenizer):
        """Opens and checks the data, the mixtures and the rows of every phase. Raises ValueError for what cannot be."""
        self._config, self._stage, self._tokenizer = config, stage, tokenizer
        self._settings = settings = config.stage[stage]
        self.sources = open_sources(config.data.directory, "train", vocab_size=config.model.vocab_size)
        known = {name: source.num_tokens for name, source in self.sources.items()}
        changes = settings.mixture_changes
        self._starts = [0, *(change.after_tokens for change in changes)]
        if self._starts != sorted(set(self._starts)):
            raise ValueError(
                f"stage.{stage}.mixture_changes: after_tokens must rise from above 0, got {self._starts[1:]}"
            )
        mixtures = [settings.mixture or config.data.mixture, *(change.mixture for change in changes)]
        self._shares = [mixture_shares(mixture, known) for mixture in mixtures]
        if unknown := sorted(settings.length_weights.keys() - known.keys()):
            raise ValueError(f"stage.{stage}.length_weights names {unknown[0]!r}; there are {', '.join(sorted(known))}")
        self._takes_all = ALL in (mixtures[0] or {ALL})
        for phase in settings.phases:
            self.rows(phase)

    def rows(self, phase: PhaseConfig) -> dict[str, Rows]:
        """The rows of each source that is ever in the mixture.

        Raises ValueError for a context beyond the first that no document reaches.
        """
        names = list(dict.fromkeys(name for shares in self._shares for name in shares))
        reach = {name: phase.seq_len if name == RECALL else _longest(self.sources[name]) for name in names}
        if self._takes_all:  # all there is, as far as it is long enough
            names = [name for name in names if name == RECALL or reach[name] >= phase.min_document_tokens] or names
        longest = max(reach[name] for name in names)
        if longest < phase.seq_len > self._config.model.rope.original_max_seq_len:
            raise ValueError(
                f"stage {self._stage}: no document reaches seq_len={phase.seq_len}, the longest of "
                f"{', '.join(names)} has {longest} tokens; add longer ones, or the source recall to the mixture"
            )
        return {name: self._source_rows(name, phase) for name in names}

    def _source_rows(self, name: str, phase: PhaseConfig) -> Rows:
        seed, stage = self._config.run.seed, list(self._config.stage).index(self._stage)
        if name == RECALL:
            text = all_documents(self.sources)
            return RecallRows(phase.seq_len, seed, stage=stage, text=text, tokenizer=self._tokenizer)
        return PackedRows(
            self.sources[name],
            phase.seq_len,
            seed,
            stage=stage,
            source=name,
            min_document_tokens=phase.min_document_tokens,
            length_weights=self._settings.length_weights.get(name, ()),
        )

    def shares(self, tokens: int) -> Mapping[str, float]:
        """The mixture of the batch that begins behind so many of the stage's tokens."""
        return next(
            shares for start, shares in zip(self._starts[::-1], self._shares[::-1], strict=True) if start <= tokens
        )

    def stream(self, phase: PhaseConfig, progress: Progress, rules: ShardingRules) -> tuple[Stream, list[int]]:
        """The batches of a phase from where the stage stands, and which of their rows this process reads."""
        num_rows = self._settings.phase_rows(phase)
        mine, rows = local_rows(num_rows, phase.seq_len, rules), self.rows(phase)

        def shares(number: int) -> Mapping[str, float]:
            now = self.shares(progress.stage_tokens + number * phase.batch_tokens)
            present = {name: share for name, share in now.items() if name in rows}
            return {name: share / sum(present.values()) for name, share in present.items()}

        now = shares(0)
        say(
            f"stage {self._stage}: seq_len {phase.seq_len}, {num_rows} rows a step, "
            f"{', '.join(f'{name} {share:.1%}' for name, share in now.items())}; "
            f"{_past_half(rows, now):.1%} of the tokens have more than half of the window behind them"
        )
        return Stream(rows, shares, num_rows, state=progress.rows, mine=mine), mine


def _longest(source: TokenDataset) -> int:
    return max(int(shard.lengths().max()) for shard in source.shards)


def _past_half(rows: Mapping[str, Rows], shares: Mapping[str, float]) -> float:
    """How much of the mixture can look back over half of the window, from a few rows of each source."""

    def sample(source: Rows) -> Sequence:
        return [source.row(i) for i in range(min(_SAMPLE_ROWS, len(source)))]

    return sum(share * share_past_half(stack(sample(rows[name]))) for name, share in shares.items())
