"""Synthetic data: a template filled from data, sampled several times at several temperatures, filtered.

What is dropped goes to OUT.dropped.jsonl with the reason, so that a run that goes on does not make it again.
"""

import argparse
import hashlib
import importlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from infer.results import ResultFile, json_lines
from llama_jax.paths import as_path


def add_synthesis_options(parser: argparse.ArgumentParser) -> None:
    """Declare what makes data of a template."""
    group = parser.add_argument_group("synthetic data")
    group.add_argument("--template", metavar="F", help="a text with {fields} of IN's objects: IN is data then")
    group.add_argument("--system", metavar="S", help="the template is a user's message after this system message")
    group.add_argument("--continue-text", action="store_true", help="the template is a text to continue, not a message")
    group.add_argument("--samples", type=int, metavar="N", help="of each prompt and temperature; default: 1")
    group.add_argument("--temperature", type=float, action="append", metavar="T", help="repeatable; default: 1")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 1,024")
    group.add_argument("--seed", type=int, metavar="S", help="of the first sample; default: 0")
    group.add_argument(
        "--dedup", action="store_true", help="drop texts that were there before, but for case and spaces"
    )
    group.add_argument(
        "--filter", metavar="MODULE:FUNCTION", help="keep records for which this Python function is true"
    )
    group.add_argument(
        "--min-mean-logprob", type=float, metavar="X", help="drop texts that the model finds less likely"
    )


@dataclass
class Synthesis:
    """What is made of each object of the data, and what of that is kept."""

    template: str
    system: str | None
    continue_text: bool
    samples: int
    temperatures: list[float]
    max_new_tokens: int
    seed: int
    dedup: bool
    keep: Callable[[dict[str, Any]], Any] | None
    min_mean_logprob: float | None
    dropped: ResultFile
    _seen: set[bytes] = field(default_factory=set)

    @staticmethod
    def of(args: argparse.Namespace, output: ResultFile) -> "Synthesis | None":
        """What the options ask for, None without a template. Raises ValueError for options that do not fit together."""
        given = ("system", "samples", "temperature", "max_new_tokens", "seed", "filter", "min_mean_logprob")
        alone = [name for name in given if getattr(args, name) is not None]
        alone += [name for name in ("continue_text", "dedup") if getattr(args, name)]
        if args.template is None:
            if alone:
                raise ValueError(f"--{alone[0].replace('_', '-')} is for --template: a batch's lines say it themselves")
            return None
        if args.continue_text and args.system is not None:
            raise ValueError("--system is for messages: leave out --continue-text")
        if args.samples is not None and args.samples < 1:
            raise ValueError(f"--samples {args.samples}: expected at least 1")
        return Synthesis(
            as_path(args.template).read_text(encoding="utf-8"),
            args.system,
            args.continue_text,
            args.samples or 1,
            args.temperature or [1.0],
            args.max_new_tokens or 1024,
            args.seed or 0,
            args.dedup,
            args.filter and _function(args.filter),
            args.min_mean_logprob,
            ResultFile(output.path.with_name(output.path.name + ".dropped.jsonl")),
            {_key(line.get("text", "")) for line in output.lines()},
        )

    def jobs(self, path: str) -> list[dict[str, Any]]:
        """A request for each object, temperature and sample. Raises ValueError for an object without a field."""
        return [
            self._job(number, fields, temperature, sample, f"{path}, line {number}")
            for number, fields in json_lines(path)
            for temperature in self.temperatures
            for sample in range(self.samples)
        ]

    def _job(self, number: int, fields: dict[str, Any], temperature: float, sample: int, where: str) -> dict[str, Any]:
        prompt = fill(self.template, fields, where)
        body: dict[str, Any] = {"temperature": temperature, "max_tokens": self.max_new_tokens}
        body["seed"] = self.seed + number * self.samples + sample
        if self.continue_text:
            url, body = "/v1/completions", body | {"prompt": prompt, "logprobs": 0}
        else:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages = [*system, {"role": "user", "content": prompt}]
            url, body = "/v1/chat/completions", body | {"messages": messages, "logprobs": True}
        custom_id = f"{number}-{temperature:g}-{sample}"
        return {"custom_id": custom_id, "url": url, "body": body, "fields": fields, "prompt": prompt}

    def take(self, job: dict[str, Any], result: dict[str, Any], output: ResultFile) -> None:
        """Append the record of a result, or note that it is dropped."""
        if result["response"]["status_code"] != 200:
            return output.append({"custom_id": job["custom_id"], "error": result["response"]["body"]["error"]})
        record = self._record(job, result["response"]["body"]["choices"][0])
        reason = self._reason_to_drop(record)
        if reason is None:
            return output.append(record)
        self.dropped.append({"custom_id": record["custom_id"], "dropped": reason, "text": record["text"]})

    def _record(self, job: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        if self.continue_text:
            text, logprobs = choice["text"], choice["logprobs"]["token_logprobs"]
        else:
            text = choice["message"]["content"]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return {
            "custom_id": job["custom_id"],
            "fields": job["fields"],
            "prompt": job["prompt"],
            "text": text,
            "temperature": job["body"]["temperature"],
            "seed": job["body"]["seed"],
            "mean_logprob": sum(logprobs) / max(1, len(logprobs)),
            "num_tokens": len(logprobs),
            "finish_reason": choice["finish_reason"],
        }

    def _reason_to_drop(self, record: dict[str, Any]) -> str | None:
        if self.min_mean_logprob is not None and record["mean_logprob"] < self.min_mean_logprob:
            return "unlikely"
        if self.keep is not None and not self.keep(dict(record)):
            return "filter"
        key = _key(record["text"])
        if self.dedup and key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None


def fill(template: str, fields: dict[str, Any], where: str) -> str:
    """The template with {name} replaced by the field of that name, {{ and }} by braces.

    Raises ValueError for a field that is not there, and for attributes, indices and conversions, which data needs not.
    """
    parts = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template cannot be read: {error}; write {{{{ for a brace") from None
    for text, name, spec, conversion in pieces:
        parts.append(text)
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"the template has {{{name}}}: expected the name of a field, or {{{{ for a brace")
        if name not in fields:
            raise ValueError(f"{where} has no field {name!r}, which the template names")
        value = fields[name]
        parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(parts)


def _function(name: str) -> Callable[[dict[str, Any]], Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--filter {name}: expected MODULE:FUNCTION that Python can import: {error}") from None
    if not callable(found):
        raise ValueError(f"--filter {name} is a {type(found).__name__}, not a function")
    return found


def _key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
