"""Scores of benchmarks by lm-eval: `python -m infer.evaluate --checkpoint C --tasks gsm8k,arc_challenge`.

The table goes to stdout, with --json one object. The invariant: tasks, prompts and metrics are lm-eval's own, and
what the model says is what lm-eval's model of transformers says (`infer/evaluation.py`).
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infer.entry import add_model_options, add_plan_options, follow
from infer.serve import add_engine_options, engine_options, load_engine
from llama_jax.devices import open_devices, use_compilation_cache
from llama_jax.entry import run_entry, say
from llama_jax.paths import as_path, is_remote, staged_file

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from infer.hosts import Hosts

# Of what lm-eval tells, that which says how a score came about.
_TOLD = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m infer.evaluate", description="Score a model by lm-eval.", allow_abbrev=False
    )
    parser.add_argument("--tasks", required=True, metavar="T,U", help="lm-eval's tasks, groups or tags; * matches")
    parser.add_argument("--include-path", metavar="DIR", help="a directory with more tasks, as YAML")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question; default: a task's")
    parser.add_argument("--limit", type=float, metavar="N", help="documents of each task, below 1 a part: a quick look")
    parser.add_argument("--chat", action="store_true", help="ask as in a dialog, examples as its earlier turns")
    parser.add_argument("--system", metavar="S", help="the system message of --chat, else text before each question")
    parser.add_argument("--samples", metavar="F", help="write every document, answer and score there, as JSON lines")
    parser.add_argument("--run-unsafe-code", action="store_true", help="for tasks that run what the model writes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_options(parser)
    add_model_options(parser)
    add_plan_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Print the scores. Raises ValueError or OSError for what is wrong with options, tasks or their data."""
    if args.plan:
        from infer.plan import print_plan

        return print_plan(args, served=engine_options(args))
    if (args.num_fewshot or 0) < 0 or (args.limit is not None and args.limit <= 0):
        raise ValueError("--num-fewshot must be 0 or more and --limit above 0")
    if len(args.adapter) > 1:
        raise ValueError("evaluate takes one --adapter")
    if args.samples is not None and not is_remote(args.samples) and not as_path(args.samples).parent.is_dir():
        raise FileNotFoundError(f"--samples {args.samples}: its directory is not there; make it")
    tasks, manager = find_tasks(args)
    from infer.hosts import Hosts

    use_compilation_cache()
    open_devices()
    with Hosts() as hosts:
        score(args, hosts, tasks, manager) if hosts.leads else follow(args, hosts)


def find_tasks(args: argparse.Namespace) -> tuple[list[str], "TaskManager"]:
    """The names that --tasks stands for, and where lm-eval finds them. Raises ValueError for one that is not there."""
    asked = list(filter(None, args.tasks.split(",")))
    if not asked:
        raise ValueError("--tasks names no task")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(f'evaluating needs {error.name}: python -m pip install "llama_jax[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if args.include_path is not None and not as_path(args.include_path).is_dir():
        raise FileNotFoundError(f"--include-path {args.include_path} is no directory")
    manager, names = TaskManager(include_path=args.include_path), []
    for name in asked:
        found = manager.match_tasks([name])
        if not found:
            raise ValueError(f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists those that there are")
        names += found
    return names, manager


def score(args: argparse.Namespace, hosts: "Hosts", tasks: list[str], manager: "TaskManager") -> None:
    """Print the scores, in the first process."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import make_table

    from infer.evaluation import EngineModel

    # Before the weights are read: data may be out of reach. lm-eval asks for it again.
    loaded = manager.load(tasks)  # type: ignore[arg-type]
    manager.load = lambda task_list: loaded
    engine, tokenizer, params = load_engine(args, hosts)
    name = args.checkpoint or "demo"
    adapter = next(iter(engine.adapter_names), None)
    model = EngineModel(engine, tokenizer, name, stop_tokens=params.stop_tokens, adapter=adapter)
    if args.run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    began = time.perf_counter()
    found: Any = simple_evaluate(
        model,
        tasks=tasks,  # type: ignore[arg-type]
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=int(args.limit) if (args.limit or 0) >= 1 else args.limit,
        apply_chat_template=args.chat,
        fewshot_as_multiturn=args.chat,
        system_instruction=args.system,
        log_samples=args.samples is not None,
        confirm_run_unsafe_code=args.run_unsafe_code,
        torch_random_seed=None,  # type: ignore[arg-type]
    )
    seconds = time.perf_counter() - began
    if args.json:
        told = {key: found[key] for key in _TOLD if key in found}
        settings = {"model": name, "limit": args.limit, "chat": args.chat, "system": args.system}
        print(json.dumps(told | {"config": settings, "seconds": seconds}, default=str))
    else:
        print(make_table(found))
        if found.get("groups"):
            print(make_table(found, "groups"))
    if args.samples is not None:
        write_samples(args.samples, found["samples"])
    stats = engine.stats()
    say(
        f"{seconds:.0f} s, {stats.prompt_tokens:,} tokens of prompts, {stats.prefix_hit_tokens:,} of them found in the "
        f"cache, {stats.generated_tokens:,} new tokens"
    )


def write_samples(path: str, samples: dict[str, list[dict]]) -> None:
    """Every document with what was asked, answered and scored, a JSON object a line, tasks one after the other."""
    with staged_file(path) as staged, staged.open("w", encoding="utf-8") as file:
        for task, listed in samples.items():
            for sample in listed:
                file.write(json.dumps({"task": task, **sample}, default=str) + "\n")


if __name__ == "__main__":
    run_entry(main)
