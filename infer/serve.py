"""Serve a model over HTTP as OpenAI's API: `python -m infer.serve --checkpoint C --port 8000`.

It listens on this machine alone unless --host says otherwise, and logs ids and times, never prompts. The
invariant: SIGTERM lets what runs end, within --grace seconds, and an engine that fails ends the process with
status 1, so that a launcher starts it again.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.entry import (
    CACHE_DTYPES,
    add_model_options,
    add_plan_options,
    add_speculation_options,
    follow,
    load_model,
    load_speculation,
    open_draft,
    open_model,
    sampling_params,
)
from llama_jax.devices import open_devices, use_compilation_cache
from llama_jax.entry import run_entry, say
from llama_jax.paths import as_path

if TYPE_CHECKING:
    import uvicorn

    from infer.api.limits import Limits
    from infer.api.server import Server
    from infer.engine import Engine
    from infer.hosts import Hosts
    from infer.sampling import SamplingParams
    from llama_jax.tokenizer import Tokenizer

API_KEY_VARIABLE = "LLAMA_JAX_API_KEYS"

_MOST_FILES = 65536


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m infer.serve", description="Serve a model as OpenAI's API.", allow_abbrev=False
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="default: %(default)s, this machine alone")
    group.add_argument("--port", type=int, default=8000, metavar="P", help="default: %(default)s; 0 takes a free one")
    group.add_argument("--served-model-name", action="append", metavar="NAME", help="repeatable; default: C's name")
    group.add_argument("--root-path", default="", metavar="PATH", help="where a proxy puts this server")
    group.add_argument("--cors-origin", action="append", default=[], metavar="URL", help="repeatable; default: none")
    group.add_argument("--warmup", action="store_true", help="compile and run everything before the first request")
    group.add_argument("--grace", type=float, default=30.0, metavar="S", help="after SIGTERM; default: %(default)s")
    add_limit_options(parser)
    add_engine_options(parser)
    add_model_options(parser)
    add_plan_options(parser, with_json=True)
    return parser.parse_args(argv)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Declare how requests are batched and cached."""
    group = parser.add_argument_group("engine")
    group.add_argument("--max-batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="tokens of prompts at a time; default: %(default)s"
    )
    group.add_argument("--cache-gib", type=float, metavar="G", help="of the KV cache; default: what fits")
    group.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of the KV cache; default: the weights'")
    group.add_argument("--no-prefix-cache", action="store_true", help="do not keep pages for prompts that begin alike")
    add_speculation_options(parser)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_engine_options` declares, as the engine takes it."""
    from infer.sizes import CacheOptions

    num_bytes = None if args.cache_gib is None else int(args.cache_gib * 2**30)
    dtype = "float8_e4m3fn" if args.cache_dtype == "fp8" else args.cache_dtype
    cache = CacheOptions(dtype, num_bytes, not args.no_prefix_cache, args.prefill_chunk)
    return {"max_batch_size": args.max_batch_size, "cache": cache}


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Declare who may ask, and how much."""
    group = parser.add_argument_group("limits")
    group.add_argument("--api-key-file", metavar="F", help=f"a key a line; also {API_KEY_VARIABLE}, apart by commas")
    group.add_argument("--max-waiting", type=int, default=256, metavar="N", help="then 429; default: %(default)s")
    group.add_argument("--max-per-key", type=int, default=0, metavar="N", help="requests in flight of one API key")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; default: what the context holds")
    group.add_argument("--max-choices", type=int, default=16, metavar="N", help="of n, best_of; default: %(default)s")
    group.add_argument(
        "--max-body-mib", type=float, default=8.0, metavar="M", help="of a request; default: %(default)s"
    )
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a request; default: %(default)s")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Serve until told to stop. Raises ValueError or OSError for what is wrong with the options."""
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: expected 0 to 65535")
    if args.plan:
        from infer.plan import print_plan

        return print_plan(args, served=engine_options(args))
    import_api()
    from infer.hosts import Hosts

    limits = read_limits(args)
    use_compilation_cache()
    open_devices()
    with Hosts() as hosts:
        if not hosts.leads:
            return follow(args, hosts)
        allow_connections()
        if args.host not in ("127.0.0.1", "::1", "localhost") and not limits.api_keys:
            say(f"warning: whoever reaches {args.host} may ask, for there are no API keys (--api-key-file)")
        with bound(args.host, args.port) as port:  # before the weights are read, which takes minutes
            server = make_server(args, limits, hosts, names=args.served_model_name or (), max_waiting=args.max_waiting)
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
            listen(http_config(args, server), server, port)


def http_config(args: argparse.Namespace, server: "Server") -> "uvicorn.Config":
    """The application behind uvicorn."""
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from infer.api.app import make_app
    from infer.api.connection import guarded

    warm_up = server.engine.warmup if args.warmup else None
    app = make_app(server, warm_up=warm_up, grace_seconds=args.grace)
    if args.cors_origin:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(CORSMiddleware, allow_origins=args.cors_origin, allow_methods=["*"], allow_headers=["*"])
    grace = max(1, round(args.grace))
    return uvicorn.Config(
        app,
        http=guarded(AutoHTTPProtocol),
        root_path=args.root_path,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=grace,
        server_header=False,
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address. Raises OSError if it is taken or not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}; name another") from None
    return found


def allow_connections() -> None:
    """As many open files as this user may have: the usual 1,024 are fewer than the connections of a busy server."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def import_api() -> None:
    """Raises ValueError with the command that installs what serving needs."""
    try:
        import uvicorn  # noqa: F401

        import infer.api.app  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f'serving needs {error.name}: python -m pip install "llama_jax[serve]"') from None


def read_limits(args: argparse.Namespace) -> "Limits":
    """The limits that the options ask for. Raises ValueError for one out of range and for an empty file of keys."""
    for name in ("max_waiting", "max_per_key", "timeout", "grace"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more")
    if args.max_choices < 1 or args.max_body_mib <= 0 or (args.max_new_tokens or 1) < 1:
        raise ValueError("--max-choices and --max-new-tokens must be at least 1 and --max-body-mib above 0")
    keys = [key.strip() for key in os.environ.get(API_KEY_VARIABLE, "").split(",") if key.strip()]
    if args.api_key_file is not None:
        lines = as_path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise ValueError(f"{args.api_key_file} has no key: expected one a line")
        keys += from_file
    from infer.api.limits import Limits

    return Limits(
        api_keys=keys,
        max_body_bytes=int(args.max_body_mib * 2**20),
        max_per_key=args.max_per_key,
        max_choices=args.max_choices,
        max_new_tokens=args.max_new_tokens,
        timeout_seconds=args.timeout,
    )


def make_server(
    args: argparse.Namespace, limits: "Limits", hosts: "Hosts", *, names: Sequence[str] = (), max_waiting: int = 1 << 30
) -> "Server":
    """The model of the options, loaded, in an engine that a worker will run. names are what clients call it."""
    from infer.api.server import Server
    from infer.api.worker import Worker

    engine, tokenizer, defaults = load_engine(args, hosts)
    if defaults.temperature == 0:  # OpenAI's default, where the checkpoint advises nothing
        defaults = dataclasses.replace(defaults, temperature=1.0)
    names = [*(names or [_name(args.checkpoint)]), *engine.adapter_names]
    if len(set(names)) < len(names):
        raise ValueError(f"two models have one name: {', '.join(names)}; see --served-model-name and --adapter")
    return Server(engine, tokenizer, Worker(engine, max_waiting=max_waiting), limits, defaults, names)


def load_engine(args: argparse.Namespace, hosts: "Hosts") -> "tuple[Engine, Tokenizer, SamplingParams]":
    """The model of the options, loaded, in an engine; its tokenizer, and how its checkpoint advises to sample."""
    from infer.engine import Engine
    from llama_jax.tokenizer import load_tokenizer

    checkpoint = open_model(args)
    tokenizer = load_tokenizer(checkpoint.companions)
    nothing_given = argparse.Namespace(
        temperature=None, top_k=None, top_p=None, min_p=None, max_new_tokens=1, seed=0, stop=[]
    )
    advised = sampling_params(nothing_given, checkpoint)
    draft = open_draft(args, checkpoint, tokenizer)
    model = load_model(args, checkpoint, hosts)
    speculation = load_speculation(args, model, draft, hosts)
    engine = Engine(
        model, tokenizer, max_seq_len=args.max_seq_len, hosts=hosts, speculation=speculation, **engine_options(args)
    )
    return engine, tokenizer, advised


def _name(checkpoint: str | None) -> str:
    """A hub id as it is, the last part of a path, "demo" for the model that ships with the project."""
    if checkpoint is None:
        return "demo"
    return Path(checkpoint).name if Path(checkpoint).exists() or "://" in checkpoint else checkpoint


def listen(config: "uvicorn.Config", server: "Server", port: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C. Raises RuntimeError if the engine failed."""
    import asyncio

    import uvicorn

    class Http(uvicorn.Server):
        """One that ends as a process does that has done its work: uvicorn's own dies of the signal after all."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
            yield

    http = Http(config)
    host, number, *_ = port.getsockname()
    host = f"[{host}]" if ":" in host else host

    async def tell_and_watch() -> None:
        while not http.started:
            await asyncio.sleep(0.01)
        say(f"serving {', '.join(server.model_names)} at http://{host}:{number}/ (Ctrl-C stops)")
        await server.worker.closed.wait()
        http.should_exit = True

    async def serve() -> None:
        watch = asyncio.create_task(tell_and_watch())
        await http.serve(sockets=[port])
        watch.cancel()

    asyncio.run(serve())
    if server.worker.failure is not None:
        raise RuntimeError("the engine failed, see above") from server.worker.failure
    if server.worker.stuck:
        os._exit(0)  # Python would wait for the programs that are being compiled, for minutes


if __name__ == "__main__":
    run_entry(main)
