"""The generate command: what goes in, what comes out where, and one clear line for each mistake."""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

import llama_jax
from infer import entry, generate
from infer.sampling import SamplingParams
from llama_jax.chat import encode_chat
from llama_jax.config import PRESETS, LlamaConfig
from llama_jax.devices import use_compilation_cache
from llama_jax.entry import run_entry
from llama_jax.tokenizer import load_tokenizer
from tests.reference import hf_model, save_hf

ROOT = Path(__file__).parents[1]
NAMES = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
CONFIG = LlamaConfig(
    vocab_size=264, num_layers=1, embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16, max_seq_len=64
)


def write_tokenizer(directory: Path, names=NAMES, vocab_size: int = 256) -> None:
    """A byte-level tokenizer.json without merges and its special tokens; larger than bytes with filling tokens."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"a" * (2 + i): 256 + i for i in range(vocab_size - 256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([f"<|{name}|>" for name in names])
    backend.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A Hugging Face directory without a tokenizer."""
    return save_hf(hf_model(CONFIG), tmp_path_factory.mktemp("hf") / "weights")


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("hf") / "tiny"
    shutil.copytree(weights, path)
    write_tokenizer(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [257, 261]}')
    return str(path)


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*argv) -> exit status, stdout, lines of stderr; by default one device, 8 tokens, no standard input."""
    monkeypatch.setattr(sys, "stdin", None)

    def run(*argv: str) -> tuple[int, str, list[str]]:
        with pytest.raises(SystemExit) as exit:
            run_entry(lambda: generate.main(["--mesh", "data=1", "--max-new-tokens", "8", *argv]))
        out, err = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, out, err.splitlines()

    return run


@contextlib.contextmanager
def pipe(data: bytes):
    """The reading end of a pipe that holds the data, as a text stream."""
    reading, writing = os.pipe()
    with open(writing, "wb") as stream:
        stream.write(data)
    with open(reading, encoding="utf-8") as stream:
        yield stream


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The greedy continuation of "def f" by the engine itself."""
    from infer.engine import Engine

    with llama_jax.use_mesh("data=1"):
        engine = Engine(llama_jax.load(checkpoint, layout="decoding"), load_tokenizer(checkpoint))
    return engine.generate("def f", SamplingParams(max_new_tokens=8))[0]


def test_one_prompt_is_printed_and_continued_between_lines_about_the_run(run, checkpoint, expected):
    status, out, err = run("def f", "--checkpoint", checkpoint)
    assert (status, out) == (0, "def f" + expected.text + "\n")
    assert err[0].startswith("1 x cpu, tensor=1, float32, ") and err[0].endswith(checkpoint)
    assert err[1] == "greedy"
    assert re.fullmatch(r"prefill \d+\.\d tokens/s, decode \d+\.\d tokens/s, compiled in \d+\.\d s", err[2])
    assert re.match(r"first token after \d+\.\d s: import \d", err[3])
    assert len(err) == 4


def test_json_is_one_object_a_prompt_and_nothing_else(run, checkpoint, expected):
    status, out, _ = run("x", "def f", "--json", "--checkpoint", checkpoint)
    first, second = map(json.loads, out.splitlines())
    assert status == 0
    speeds = [second.pop("prefill_tokens_per_second"), second.pop("decode_tokens_per_second")]
    assert all(speed > 0 for speed in speeds)
    assert second.pop("logprobs") == pytest.approx(expected.logprobs, abs=1e-5)
    assert second == {
        "prompt": "def f",
        "text": expected.text,
        "prompt_tokens": load_tokenizer(checkpoint).encode("def f", bos=True),
        "tokens": expected.tokens,
        "finish_reason": "length",
        "draft_tokens": 0,
        "accepted_tokens": 0,
    }
    assert (first["prompt"], len(first["tokens"])) == ("x", 8)


def test_several_prompts_are_printed_one_after_the_other(run, checkpoint, expected):
    _, out, _ = run("def f", "def f", "--checkpoint", checkpoint, "--seed", "3")
    assert out == f"def f{expected.text}\n\n" * 2


def test_sampling_flags_reach_the_engine(run, checkpoint, expected):
    texts = {seed: run("def f", "--checkpoint", checkpoint, "--temperature", "2", "--seed", seed)[1] for seed in "112"}
    assert len({*texts.values(), f"def f{expected.text}\n"}) == 3
    status, out, err = run("def f", "--checkpoint", checkpoint, "--temperature", "2", "--top-k", "1", "--min-p", "0.5")
    assert out == f"def f{expected.text}\n"
    assert err[1] == "temperature=2.0 top_k=1 min_p=0.5"


def test_stop_strings_end_the_text(run, checkpoint, expected):
    stop = expected.text[2:4]
    _, out, _ = run("def f", "--json", "--stop", "never seen", "--stop", stop, "--checkpoint", checkpoint)
    result = json.loads(out)
    assert (result["text"], result["finish_reason"]) == (expected.text.partition(stop)[0], "stop")


def test_prompt_tokens_are_used_as_given_and_need_no_tokenizer(run, weights, checkpoint, expected):
    ids = ",".join(map(str, expected.prompt_tokens))
    _, out, _ = run("--prompt-tokens", ids, "--json", "--checkpoint", str(weights))
    result = json.loads(out)
    assert result["prompt"] is None and result["text"] is None
    assert (result["prompt_tokens"], result["tokens"]) == (expected.prompt_tokens, expected.tokens)
    assert run("--prompt-tokens", ids, "--checkpoint", checkpoint)[1] == ",".join(map(str, expected.tokens)) + "\n"


def test_prompt_tokens_end_where_the_generation_config_says(run, weights, expected, tmp_path):
    shutil.copytree(weights, tmp_path / "ending")
    end = {"eos_token_id": [263, expected.tokens[2]]}
    (tmp_path / "ending" / "generation_config.json").write_text(json.dumps(end))
    ids = ",".join(map(str, expected.prompt_tokens))
    result = json.loads(run("--prompt-tokens", ids, "--json", "--checkpoint", str(tmp_path / "ending"))[1])
    assert result["finish_reason"] == "stop"
    assert result["tokens"] == expected.tokens[: expected.tokens.index(expected.tokens[2]) + 1]


def test_a_prompt_file_is_one_prompt_exactly_as_it_is(run, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("a\r\n\u0e2a".encode())
    result = json.loads(run("--prompt-file", str(tmp_path / "prompt.txt"), "--json", "--checkpoint", checkpoint)[1])
    assert result["prompt"] == "a\r\n\u0e2a"


def test_a_pipe_is_read_as_the_prompt(run, checkpoint, expected, monkeypatch):
    with pipe(b"def f") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("--checkpoint", checkpoint)[1] == f"def f{expected.text}\n"


def test_without_a_prompt_the_default_one_is_printed_and_continued(run, checkpoint, expected, monkeypatch):
    monkeypatch.setattr(generate, "DEFAULT_PROMPT", "def f")
    assert run("--checkpoint", checkpoint)[1] == f"def f{expected.text}\n"


def test_without_a_checkpoint_the_demo_model_speaks(run, checkpoint, expected, monkeypatch):
    monkeypatch.setattr(entry, "DEMO", Path(checkpoint))
    _, out, err = run("def f", "--json", "--mesh", "data=2,tensor=2", "--max-new-tokens", "1")
    assert json.loads(out)["tokens"] == expected.tokens[:1]
    assert err[0].startswith("4 x cpu, data=2,tensor=2, float32, ")


def test_dtype_and_config_settings_reach_the_model(run, checkpoint, expected):
    argv = ("def f", "--json", "--checkpoint", checkpoint, "--max-new-tokens", "1")
    status, out, err = run(*argv, "--dtype", "bfloat16", "--set", "rope.theta=50.0")
    assert status == 0 and ", bfloat16, " in err[0]
    assert json.loads(out)["logprobs"] != pytest.approx(expected.logprobs[:1], abs=1e-5)


# Chat.


CHAT = ("--chat", "--system", "Be brief", "--checkpoint")


def test_a_chat_prompt_becomes_a_message(run, checkpoint):
    _, out, _ = run("hi", "--json", *CHAT, checkpoint)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    result = json.loads(out)
    assert result["prompt"] == "hi"
    assert result["prompt_tokens"] == encode_chat(load_tokenizer(checkpoint), messages)


def test_an_answer_is_printed_without_its_prompt(run, checkpoint):
    answer = json.loads(run("hi", "--json", *CHAT, checkpoint)[1])["text"]
    assert run("hi", *CHAT, checkpoint)[1] == answer + "\n"


def test_metas_format_is_used_with_a_notice_and_a_base_model_is_refused(run, checkpoint, tmp_path):
    status, _, err = run("hi", *CHAT, checkpoint)
    assert status == 0 and err[0].startswith("no chat template: Meta's format is used")
    path = shutil.copytree(checkpoint, tmp_path / "base")
    (path / "generation_config.json").write_text('{"eos_token_id": 257}')
    assert_one_line(run("hi", *CHAT, str(path)), "this is a base model, .* drop --chat")


def test_a_conversation_may_answer_at_length_unless_told_otherwise(monkeypatch):
    with open(os.devnull) as null:  # a device, as a terminal is
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, fileno=null.fileno))
        lengths = [generate.parse_args(argv).max_new_tokens for argv in (["--chat"], ["--chat", "hi"], [])]
        assert lengths == [2048, 128, 128]
        assert generate.parse_args(["--chat", "--max-new-tokens", "128"]).max_new_tokens == 128


# Settings.


def chosen(directory: Path, config: object, *argv: str) -> SamplingParams:
    """The sampling of some options over a generation_config.json."""
    (directory / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    parser = argparse.ArgumentParser()
    entry.add_sampling_options(parser)
    return entry.sampling_params(parser.parse_args(argv), SimpleNamespace(companions=directory))


@pytest.mark.parametrize(
    ("config", "argv", "expected"),
    [
        ({}, [], {}),
        ({"temperature": 0.6, "top_p": 0.9}, [], {}),
        ({"do_sample": False, "temperature": 0.6}, [], {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, [], {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 5, "top_p": None}, [], {"temperature": 1.0, "top_k": 5}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, ["--temperature", "0"], {"top_p": 0.9}),
        ({"do_sample": True, "top_p": 0.9}, ["--top-p", "0.5"], {"temperature": 1.0, "top_p": 0.5}),
        ({}, ["--top-p", "0.5"], {"temperature": 1.0, "top_p": 0.5}),
        ({}, ["--min-p", "0.1", "--temperature", "0.7"], {"temperature": 0.7, "min_p": 0.1}),
        ({"eos_token_id": 7}, ["--seed", "3", "--stop", "x"], {"stop_tokens": (7,), "seed": 3, "stop": ("x",)}),
    ],
)
def test_sampling_is_the_generation_configs_if_it_samples_and_flags_override(tmp_path, config, argv, expected):
    assert chosen(tmp_path, config, *argv) == SamplingParams(**expected)


@pytest.mark.parametrize("config", ["{", "[1]"])
def test_a_damaged_generation_config_is_an_error(tmp_path, config):
    with pytest.raises(ValueError, match="generation_config.json is not a JSON object"):
        chosen(tmp_path, config)


def test_programs_are_cached_in_the_users_cache_unless_another_place_is_set(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == before["jax_compilation_cache_dir"] is not None
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == os.path.join("/somewhere", "llama_jax", "xla")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# Mistakes.


def assert_one_line(outcome: tuple[int, str, list[str]], message: str) -> None:
    status, out, (*before, error) = outcome
    assert (status, out) == (1, "")
    assert len(before) <= 1 and all(" x cpu, " in line for line in before)  # the run, told before weights are read
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([""], "^error: the prompt is empty"),
        (["a", ""], "the prompt is empty"),
        (["a" * 100], "101 tokens, which leaves no room in a context of 64"),
        (["a", "--temperature", "-1"], "temperature=-1.0: expected 0"),
        (["a", "--top-p", "2"], "top_p=2.0: expected"),
        (["a", "--stop", ""], "stop="),
        (["a", "--set", "num_layers"], "expected key=value"),
        (["a", "--set", "no_such=1"], "unknown model key 'no_such'"),
        (["a", "--max-seq-len", "65"], "65 must be between 1 and the model's 64"),
        (["a", "--system", "b"], "--system is the system message of --chat"),
        (["--prompt-file", "no/such/file"], "no/such/file"),
        (["--prompt-tokens", "1,x"], "expected token ids separated by commas"),
        (["--prompt-tokens", "1,264"], "prompt token 264 is outside the vocabulary of 264"),
        (["--prompt-tokens", "1", "--stop", "x"], "stop strings need a tokenizer"),
        (["a", "--prompt-tokens", "1"], "--prompt-tokens takes the place of text"),
        (["--chat"], "--chat needs a message here"),
        (["--chat", "--json"], "--chat needs a message here"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_a_failure(run, checkpoint, argv, message):
    assert_one_line(run(*argv, "--checkpoint", checkpoint), message)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [("model=2", "unknown mesh axis 'model'"), ("data=16", "needs 16 devices, but there are 8"), ("tensor=8", "heads")],
)
def test_an_impossible_mesh_is_one_line_and_a_failure(run, checkpoint, mesh, message):
    assert_one_line(run("a", "--checkpoint", checkpoint, "--mesh", mesh), message)


@pytest.mark.parametrize(("data", "message"), [(b"", "the prompt is empty"), (b"ab\xff", "byte 2 is 0xff")])
def test_a_pipe_that_is_no_prompt_is_one_line_and_a_failure(run, checkpoint, monkeypatch, data, message):
    with pipe(data) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert_one_line(run("--checkpoint", checkpoint), message)


def test_a_model_of_the_hub_that_does_not_fit_is_refused_before_it_is_fetched(run, monkeypatch):
    def download(name, check):
        check(PRESETS["llama3.1-8b"], None)
        pytest.fail("weights were fetched")

    monkeypatch.setattr("llama_jax.memory.bytes_left", lambda devices: 10**9)
    monkeypatch.setattr("llama_jax.checkpoint.formats.download", download)
    assert_one_line(run("a", "--checkpoint", "org/name"), r"llama3.1-8b needs .* \(weights 32.1, ")


def test_a_prompt_file_that_is_not_utf8_names_the_first_wrong_byte(run, checkpoint, tmp_path):
    (tmp_path / "latin1").write_bytes("caf\u00e9".encode("latin-1"))
    outcome = run("--prompt-file", str(tmp_path / "latin1"), "--checkpoint", checkpoint)
    assert_one_line(outcome, "latin1 is not UTF-8: byte 3 is 0xe9$")


def test_no_such_checkpoint_and_no_demo_model_are_one_line_and_a_failure(run, monkeypatch, tmp_path):
    assert_one_line(run("a", "--checkpoint", str(tmp_path / "none")), "no checkpoint at")
    monkeypatch.setattr(entry, "DEMO", tmp_path / "none")
    assert_one_line(run("a"), "the demo model is missing from .*none; name a model with --checkpoint")


def test_a_tokenizer_that_is_missing_too_large_or_cannot_chat_is_one_line_and_a_failure(run, weights, tmp_path):
    path = shutil.copytree(weights, tmp_path / "other")
    assert_one_line(run("a", "--checkpoint", str(path)), "no tokenizer at")
    write_tokenizer(path, vocab_size=265)
    assert_one_line(run("a", "--checkpoint", str(path)), "the tokenizer has 272 tokens but the model 264")
    write_tokenizer(path, names=[])
    assert_one_line(run("a", "--chat", "--checkpoint", str(path)), "this is a base model")


@pytest.mark.parametrize("flag", ["--image", "--audio", "--temp"])
def test_a_flag_that_is_not_built_is_refused(run, flag):
    status, out, err = run("a", flag, "x")
    assert (status, out) == (2, "") and f"unrecognized arguments: {flag}" in err[-1]


def test_help_does_not_wait_for_jax():
    code = "import sys, infer.generate as g\ntry: g.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--prompt-tokens" in done.stdout


def test_the_command_reads_a_pipe_and_writes_json(checkpoint):
    command = [sys.executable, "-m", "infer.generate", "--checkpoint", checkpoint, "--json", "--max-new-tokens", "2"]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, input="caf\u00e9", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["prompt"], len(result["tokens"])) == ("caf\u00e9", 2)
