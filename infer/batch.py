"""Many prompts from a file: `python -m infer.batch in.jsonl out.jsonl --checkpoint C`.

in.jsonl is OpenAI's batch format, a request a line: {"custom_id", "method", "url", "body"}. With --template it is
data instead, an object a line, whose fields fill the template: synthetic data, n samples at each temperature.
Results are appended as they come. The invariant: however often it is killed, in the end out.jsonl has the result
of every line once.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.entry import add_model_options, add_plan_options, follow
from infer.results import ResultFile, json_lines
from infer.serve import add_engine_options, engine_options, import_api, make_server
from infer.synthesis import Synthesis, add_synthesis_options
from infer.throughput import guesses_text
from llama_jax.devices import open_devices, use_compilation_cache
from llama_jax.entry import run_entry, say
from llama_jax.paths import is_remote
from llama_jax.progress import Bar, progress

if TYPE_CHECKING:
    from infer.api.server import Server
    from infer.hosts import Hosts

_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m infer.batch", description="Continue the prompts of a file.", allow_abbrev=False
    )
    parser.add_argument("input", metavar="IN", help="JSON lines: OpenAI's batch format, or data for --template")
    parser.add_argument("output", metavar="OUT", help="JSON lines; what is there is kept and not done again")
    add_synthesis_options(parser)
    add_engine_options(parser)
    add_model_options(parser)
    add_plan_options(parser, with_json=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Do what is not done yet. Raises ValueError or OSError for what is wrong with options or files."""
    if args.plan:
        from infer.plan import print_plan

        return print_plan(args, served=engine_options(args))
    if is_remote(args.output):
        raise ValueError(f"{args.output}: results are appended as they come, which an object store cannot; name a file")
    import_api()
    from infer.hosts import Hosts

    use_compilation_cache()
    open_devices()
    with Hosts() as hosts:
        answer_all(args, hosts) if hosts.leads else follow(args, hosts)


def answer_all(args: argparse.Namespace, hosts: "Hosts") -> None:
    """Do what is not done yet, in the first process."""
    from infer.api.limits import Limits

    output = ResultFile(Path(args.output))
    synthesis = Synthesis.of(args, output)
    jobs = synthesis.jobs(args.input) if synthesis else read_jobs(args.input)
    done = output.done | (synthesis.dropped.done if synthesis else set())
    left = [job for job in jobs if job["custom_id"] not in done]
    say(f"{len(left)} of {len(jobs)} to do")
    if not left:
        return
    server = make_server(args, Limits(max_choices=1024, timeout_seconds=0), hosts)
    failed = asyncio.run(_run_all(server, left, output, synthesis))
    if guesses := guesses_text(server.engine.stats()):
        say(guesses)
    if failed:
        say(f"{failed} of them are answered by an error: see status_code in {args.output}")


def read_jobs(path: str) -> list[dict[str, Any]]:
    """The lines of a file in OpenAI's batch format.

    Raises ValueError naming the first line that is none, has a custom_id again, or asks for what a batch does not do.
    """
    jobs: dict[str, dict[str, Any]] = {}
    for number, job in json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(job.get("custom_id"), str) or not isinstance(job.get("body"), dict):
            raise ValueError(f'{where}: expected {{"custom_id": str, "method": "POST", "url": str, "body": object}}')
        if job.get("method", "POST") != "POST" or job.get("url") not in _PATHS:
            raise ValueError(f"{where}: {job.get('method')} {job.get('url')!r}: expected POST {' or '.join(_PATHS)}")
        if job["body"].get("stream"):
            raise ValueError(f"{where}: a batch does not stream")
        if job["custom_id"] in jobs:
            raise ValueError(f"{where}: custom_id {job['custom_id']!r} was there before")
        jobs[job["custom_id"]] = job
    return list(jobs.values())


async def _run_all(server: "Server", jobs: list[dict], output: ResultFile, synthesis: Synthesis | None) -> int:
    """Run the jobs, some more at a time than the engine's batch has room for; how many were answered by an error."""
    server.worker.start()
    failed, waiting = 0, iter(jobs)

    async def work(bar: Bar) -> None:
        nonlocal failed
        for job in waiting:
            result = await answer(server, job)
            if synthesis:
                synthesis.take(job, result, output)
            else:
                output.append(result)
            failed += result["response"]["status_code"] != 200
            bar.update(1)

    try:
        with progress(len(jobs), desc="batch", unit=" prompts") as bar:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(jobs), 2 * server.engine.max_batch_size)):
                    group.create_task(work(bar))
    finally:
        await server.worker.drain(0.0)
    return failed


async def answer(server: "Server", job: dict[str, Any]) -> dict[str, Any]:
    """One line of the output: the body that the server would have sent, an error's too.

    Raises RuntimeError if the engine failed, which is no answer.
    """
    from pydantic import ValidationError

    from infer.api.answers import new_id
    from infer.api.errors import ApiError

    try:
        status, body = 200, await _answered(server, job["url"], job["body"])
    except ValidationError as error:
        first = error.errors()[0]
        wrong = ApiError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:500])
        status, body = wrong.status, wrong.body
    except ApiError as error:
        if server.worker.failure is not None:
            raise RuntimeError("the engine failed") from server.worker.failure
        status, body = error.status, error.body
    response = {"status_code": status, "request_id": new_id("req"), "body": body}
    return {"id": new_id("batch_req"), "custom_id": job["custom_id"], "response": response, "error": None}


async def _answered(server: "Server", path: str, body: dict[str, Any]) -> dict[str, Any]:
    from infer.api import chat, completions, embeddings, responses, schemas

    if path == "/v1/embeddings":
        return await embeddings.embedded(server, schemas.EmbeddingRequest.model_validate(body))
    if path == "/v1/completions":
        found = await completions.begin(server, schemas.CompletionRequest.model_validate(body))
    elif path == "/v1/responses":
        found = await responses.begin(server, schemas.ResponsesRequest.model_validate(body))
    else:
        found = await chat.begin(server, schemas.ChatRequest.model_validate(body))
    await server.finish(found.requests)
    return found.whole()


if __name__ == "__main__":
    run_entry(main)
