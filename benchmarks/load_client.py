"""A client that asks /v1/completions for streams, on time, and notes when their pieces come.

The load is open: requests come by a Poisson process whether or not those before have ended, as users do. Lengths are
lognormal with the means that Kwon et al. give for ShareGPT (arXiv 2309.06180, section 6.1: 161 tokens of prompt, 338
of answer); they publish no spread, so the logarithm's deviation of 1 is a choice.
"""

import asyncio
import json
import math
import random
import time
from dataclasses import dataclass, field

import numpy as np

PROMPT_TOKENS, ANSWER_TOKENS, SIGMA = 161.31, 337.99, 1.0


@dataclass
class Asked:
    """One request: when it comes, what it asks, and, once it is answered, when each piece came."""

    at: float
    prompt: str | list[str]
    num_tokens: int
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    usage: dict | None = None
    error: str = ""

    @property
    def generated(self) -> int:
        """Tokens that came; of a server that does not tell, pieces."""
        return self.usage["completion_tokens"] if self.usage else len(self.pieces)


def drawn(words: list[str], rate: float, seconds: float, scale: float, seed: int) -> list[Asked]:
    """What comes in so many seconds at so many requests a second; lengths are scaled, prompts are made of words."""
    chance, at, asked = random.Random(seed), 0.0, []

    def length(mean: float) -> int:
        mu = math.log(mean * scale) - SIGMA**2 / 2
        return max(4, min(round(chance.lognormvariate(mu, SIGMA)), round(6 * mean * scale)))

    while (at := at + chance.expovariate(rate)) < seconds:
        start = chance.randrange(len(words))
        num_words = length(PROMPT_TOKENS)
        prompt = " ".join((words[start:] + words)[:num_words])
        asked.append(Asked(at, prompt, length(ANSWER_TOKENS)))
    return asked


async def ask(port: int, model: str, one: Asked) -> None:
    """Ask and note what comes."""
    body = {"model": model, "prompt": one.prompt, "max_tokens": one.num_tokens, "temperature": 0, "stream": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    one.sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            one.error = status.decode().strip()
            return
        async for line in reader:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            one.usage = event.get("usage") or one.usage
            if event.get("error"):
                one.error = str(event["error"])
            elif event["choices"]:
                one.pieces.append(time.perf_counter())
    except OSError as error:
        one.error = str(error)
    finally:
        writer.close()


async def offer(port: int, model: str, load: list[Asked]) -> float:
    """Ask each when it comes and wait for all; the seconds that took."""
    began = time.perf_counter()

    async def one_at_its_time(one: Asked) -> None:
        await asyncio.sleep(max(0.0, began + one.at - time.perf_counter()))
        await ask(port, model, one)

    await asyncio.gather(*(one_at_its_time(one) for one in load))
    return time.perf_counter() - began


def report(load: list[Asked], seconds: float) -> dict:
    """Tokens a second, and p50, p95 and p99 in milliseconds of what a user feels.

    ttft: from asking to the first piece; token: between two tokens, on average over one answer; gap: between two
    pieces, of which one may hold several tokens.
    """
    done = [one for one in load if one.pieces and not one.error]
    firsts = [one.pieces[0] - one.sent for one in done]
    tokens = [(one.pieces[-1] - one.pieces[0]) / (one.generated - 1) for one in done if one.generated > 1]
    gaps = [gap for one in done for gap in np.diff(one.pieces)]

    def percentiles(values: list[float]) -> list[float]:
        return [round(float(value) * 1000, 1) for value in np.percentile(values, [50, 95, 99])] if values else []

    return {
        "requests": len(load),
        "failed": len(load) - len(done),
        "tokens_a_second": round(sum(one.generated for one in done) / seconds, 1),
        "ttft_ms": percentiles(firsts),
        "token_ms": percentiles(tokens),
        "gap_ms": percentiles(gaps),
    }
