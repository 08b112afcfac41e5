"""LoRA adapters side by side on one base, against PEFT."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import infer.plan
import llama_jax
from infer import generate, serve
from infer.engine import Engine
from infer.entry import named_adapters
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from infer.speculation import Ngrams
from llama_jax.checkpoint.adapters import load_adapters, read_adapter
from llama_jax.lora import adapter_names
from llama_jax.plan import plan
from tests.reference import hf_model, save_hf
from tests.tiny import TINY

# PEFT asks transformers by a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SMALL = dataclasses.replace(TINY, num_layers=2)
ADAPTERS = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "uneven": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 10},
    },
}
PROMPTS = [[5, 3, 9], list(range(40, 75)), [7, 8, 9, 10, 11, 12], [1]]
GREEDY = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directories of a base and of adapters that PEFT made for it, their factors large enough to show."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_hf(hf_model(SMALL), folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        peft = get_peft_model(hf_model(SMALL), LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in (p for key, p in peft.named_parameters() if "lora_" in key):
                parameter.normal_(std=0.3)
        peft.save_pretrained(folder / name)
    return base, {name: folder / name for name in ADAPTERS}


def adapted(saved, mesh="data=1"):
    base, directories = saved
    with llama_jax.use_mesh(mesh):
        return load_adapters(llama_jax.load(base, layout="decoding"), directories)


def short_chunks(model):
    return Engine(model, max_batch_size=8, cache=CacheOptions(prefill_chunk=16))


@pytest.fixture(scope="module")
def engine(saved):
    return short_chunks(adapted(saved))


def theirs(saved, adapter):
    base = hf_model(SMALL)
    return (base if adapter is None else PeftModel.from_pretrained(base, saved[1][adapter])).eval()


def mixed(engine):
    """Requests of every adapter and of none, two of each."""
    names = [None, *ADAPTERS]
    return [engine.requests([p], GREEDY, adapter=name)[0] for p in PROMPTS[:2] for name in names], names * 2


def tokens_of(engine, requests):
    for _ in engine.run(requests):
        pass
    return [request.result.tokens for request in requests]


def test_rows_of_one_batch_get_the_tokens_of_their_own_adapters_in_peft(saved, engine):
    requests, names = mixed(engine)
    found = tokens_of(engine, requests)
    assert len({tuple(tokens) for tokens in found[: len(names) // 2]}) == len(ADAPTERS) + 1  # each shows
    for request, name, tokens in zip(requests, names, found, strict=True):
        prompt = request.result.prompt_tokens
        with torch.no_grad():
            model, options = theirs(saved, name), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            whole = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, **options)[0]
            logits = model(whole[None]).logits[0, len(prompt) - 1 : -1]
        assert tokens == whole[len(prompt) :].tolist(), name
        logprobs = torch.log_softmax(logits, -1)[torch.arange(12), whole[len(prompt) :]]
        np.testing.assert_allclose(request.result.logprobs, logprobs, atol=2e-4)


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "context=2"])
def test_meshes_give_the_same_tokens(saved, engine, mesh):
    split = short_chunks(adapted(saved, mesh))
    assert tokens_of(split, mixed(split)[0]) == tokens_of(engine, mixed(engine)[0])


def test_generate_takes_an_adapter(saved, engine, capsys):
    base, directories = saved
    options = ["--checkpoint", str(base), "--mesh", "data=1", "--json"]
    options += ["--prompt-tokens", "5,3,9", "--max-new-tokens", "5"]
    generate.main([*options, "--adapter", str(directories["all"])])
    (expected,) = engine.generate([[5, 3, 9]], SamplingParams(max_new_tokens=5), adapter="all")
    assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens
    with pytest.raises(ValueError, match="takes one --adapter"):
        generate.main([*options, "--adapter", "a", "--adapter", "b"])


def test_a_plan_counts_an_adapter_and_lowers_the_programs_of_its_run(saved, monkeypatch):
    base, directories = saved
    engine = Engine(adapted((base, {"all": directories["all"]})), max_seq_len=32)
    engine.generate([1] * 24, SamplingParams(max_new_tokens=8), adapter="all")
    run = [compiled.memory_analysis() for compiled in engine._compiled.values()]
    plans = []
    monkeypatch.setattr(infer.plan, "plan", lambda *args, **known: plans.append(plan(*args, **known)) or plans[-1])
    options = ["--checkpoint", str(base), "--mesh", "data=1", "--plan", "cpu:1", "--max-seq-len", "32"]
    generate.main([*options, "--max-new-tokens", "8", "--adapter", str(directories["all"])])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._rounds.programs.weights))
    assert [found.parts["weights"] for found in plans] == [held, held]
    assert [found.hbm_temporaries_bytes for found in plans] == [
        stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes for stats in run
    ]


def test_adapters_have_names_of_their_own():
    options = serve.parse_args(["--adapter", "sql=runs/a", "--adapter", "runs/b"])
    assert named_adapters(options) == {"sql": "runs/a", "b": "runs/b"}
    with pytest.raises(ValueError, match="there is another 'a'; name it, as in --adapter other=x/a"):
        named_adapters(serve.parse_args(["--adapter", "runs/a", "--adapter", "x/a"]))


def test_a_row_without_an_adapter_has_the_numbers_of_the_base(saved, engine):
    with llama_jax.use_mesh("data=1"):
        base = short_chunks(llama_jax.load(saved[0], layout="layers"))
    requests, names = mixed(engine)
    tokens_of(engine, requests)
    plain = [request.result for request, name in zip(requests, names, strict=True) if name is None]
    for result, expected in zip(plain, base.generate(PROMPTS[:2], GREEDY), strict=True):
        assert result.tokens == expected.tokens
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_prompts_share_pages_only_under_the_same_adapter(engine):
    found = []
    prompt = [i % SMALL.vocab_size for i in range(300)]
    for name in ("all", "attention", None, "all"):
        (request,) = engine.requests([prompt], SamplingParams(max_new_tokens=2), adapter=name)
        engine.add(request)
        while engine.has_work:
            engine.step()
        found.append(request.result.cached_tokens > 0)
    assert found == [False, False, False, True]


def test_embeddings_follow_the_adapter(saved, engine):
    for name in (None, "all"):
        with torch.no_grad():
            model, ids = theirs(saved, name), torch.tensor([PROMPTS[1]])
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy()
        found = engine.embed(PROMPTS[1], "last", adapter=name)
        np.testing.assert_allclose(found, hidden / np.linalg.norm(hidden), atol=1e-5)


def test_a_base_in_few_bits_takes_adapters(saved, engine):
    with llama_jax.use_mesh("data=1"):
        narrow = load_adapters(llama_jax.load(saved[0], layout="layers", quantize="int8"), saved[1])
    found, plain, base = (
        one.embed(PROMPTS[1], adapter=name)
        for one, name in ((short_chunks(narrow), "all"), (engine, "all"), (engine, None))
    )
    assert found @ plain > 0.999 > base @ plain  # cosines: int8 rounds to a hundredth


def test_tokens_guessed_ahead_change_nothing(saved, engine):
    guessing = Engine(adapted(saved), max_batch_size=8, speculation=Ngrams(num_tokens=2))
    assert tokens_of(guessing, mixed(guessing)[0]) == tokens_of(engine, mixed(engine)[0])


def test_an_engine_knows_its_adapters(saved, engine):
    assert adapter_names(adapted(saved)) == engine.adapter_names == tuple(ADAPTERS)
    with pytest.raises(ValueError, match="no adapter 'sql'; there is all, attention, uneven"):
        engine.generate([PROMPTS[0]], GREEDY, adapter="sql")


# What cannot be read.


def copied(directory, folder, **changes):
    """An adapter's copy with settings changed."""
    folder.mkdir()
    for file in directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"r": 5}, "lora_A .* expected rank 5"),
        ({"r": 0}, "does not describe a LoRA adapter"),
        ({"lora_alpha": "much"}, "does not describe a LoRA adapter"),
    ],
)
def test_settings_that_are_not_followed_are_refused(saved, tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_adapter(copied(saved[1]["all"], tmp_path / "changed", **changes))


def test_adapters_of_other_models_are_refused(saved, tmp_path):
    def other(**changes):
        base = hf_model(dataclasses.replace(SMALL, **changes))
        return llama_jax.load(save_hf(base, tmp_path / str(changes)), layout="layers")

    with llama_jax.use_mesh("data=1"):
        small, wide = other(num_layers=1), other(mlp_dim=96)
        stacked = llama_jax.load(saved[0])
        with pytest.raises(ValueError, match=r"'uneven' changes model.layers.1.* this model does not have"):
            load_adapters(small, {"uneven": saved[1]["uneven"]})
        with pytest.raises(ValueError, match=r"'all' changes .*_proj.weight .*160.*; here it is .*96"):
            load_adapters(wide, saved[1])
        with pytest.raises(ValueError, match='layout="layers"'):
            load_adapters(stacked, saved[1])


def test_what_is_no_adapter_is_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        read_adapter(saved[0])
    empty = copied(saved[1]["all"], tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safe_serialization"):
        read_adapter(empty)


def test_adapters_are_born_split_like_their_weights(saved):
    model = adapted(saved, "tensor=4")
    weight = model.layers[0].mlp.w_down[...]
    assert jax.typeof(weight.down).sharding.spec[0] == weight.base.sharding.spec[0] is not None
