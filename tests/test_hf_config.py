"""Hugging Face's config.json is understood or refused."""

import copy
import dataclasses
import json

import pytest
import transformers

from llama_jax.checkpoint.hf import read_config, write_config
from llama_jax.config import PRESETS, RopeConfig

# What all of Meta's config.json files say alike.
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_8B = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
INSTRUCT = {"eos_token_id": [128001, 128008, 128009]}
LLAMA_3_2_1B = COMMON | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "rope_scaling": COMMON["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
LLAMA_3_3_70B = COMMON | {
    **INSTRUCT,
    "head_dim": 128,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "transformers_version": "4.47.0.dev0",
}


def read(tmp_path, config, **options):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return read_config(tmp_path, **options)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (LLAMA_8B, "llama3.1-8b"),
        (LLAMA_8B | INSTRUCT, "llama3.1-8b"),
        (LLAMA_3_2_1B, "llama3.2-1b"),
        (LLAMA_3_3_70B, "llama3.3-70b"),
    ],
    ids=["Llama-3.1-8B", "Llama-3.1-8B-Instruct", "Llama-3.2-1B", "Llama-3.3-70B-Instruct"],
)
def test_published_configs_are_the_presets_with_their_token_ids(tmp_path, config, preset):
    cfg, token_ids = read(tmp_path, config)
    assert cfg == PRESETS[preset]
    assert token_ids == {"bos_token_id": 128000, "eos_token_id": config["eos_token_id"], "pad_token_id": None}


def test_every_attribute_that_transformers_5_writes_is_accepted(tmp_path):
    theirs = transformers.LlamaConfig(**copy.deepcopy(LLAMA_8B))  # it writes into what it is given
    config = json.loads(theirs.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
    assert "rope_parameters" in config and len(config) > 30
    assert read(tmp_path, config)[0] == PRESETS["llama3.1-8b"]


def test_every_attribute_that_transformers_4_writes_is_accepted(tmp_path):
    """PretrainedConfig.to_dict() of 4.43 beside LlamaConfig's own, with its defaults."""
    inherited = """_name_or_path add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
        cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
        encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
        forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
        no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
        output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty
        return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
        tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p use_bfloat16""".split()
    config = dict.fromkeys(inherited, False) | {"pruned_heads": {}, "cross_attention_hidden_size": None} | LLAMA_8B
    assert read(tmp_path, config)[0] == PRESETS["llama3.1-8b"]


def test_absent_and_null_attributes_take_llama_1_s_values_as_in_transformers(tmp_path):
    shape = {key: LLAMA_8B[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 32}
    cfg, token_ids = read(tmp_path, shape | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None})
    theirs = transformers.LlamaConfig(**shape)
    assert (cfg.num_kv_heads, cfg.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (32, 128)
    assert (cfg.norm_eps, cfg.max_seq_len) == (theirs.rms_norm_eps, theirs.max_position_embeddings) == (1e-6, 2048)
    assert cfg.rope == RopeConfig(theta=10_000.0, factor=1.0) and not cfg.tie_embeddings
    assert theirs.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert token_ids == {key: getattr(theirs, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


@pytest.mark.parametrize("form", [4, 5])
def test_both_forms_of_rope_are_read(tmp_path, form):
    rope = COMMON["rope_scaling"]
    config = without(LLAMA_8B, "rope_scaling", "rope_theta")
    config |= (
        {"rope_scaling": rope, "rope_theta": 7e5}
        if form == 4
        else {"rope_parameters": rope | {"rope_theta": 7e5, "partial_rotary_factor": 1.0}}
    )
    assert read(tmp_path, config)[0].rope == RopeConfig(theta=7e5, factor=8.0)


def test_both_forms_at_once_must_agree(tmp_path):
    agreeing = LLAMA_8B | {"rope_parameters": COMMON["rope_scaling"] | {"rope_theta": 5e5}}
    assert read(tmp_path, agreeing)[0] == PRESETS["llama3.1-8b"]
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters do not say the same"):
        read(tmp_path, agreeing | {"rope_theta": 1e4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported, only 1"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE scaling of type 'linear' is not supported"),
        ({"rope_scaling": COMMON["rope_scaling"] | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_change_the_numbers_are_refused_whatever_is_allowed(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(tmp_path, LLAMA_8B | change, allow_unknown=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_softcapping": 30.0}, "unknown attribute logit_softcapping=30.0"),
        ({"rope_scaling": COMMON["rope_scaling"] | {"attention_factor": 2.0}}, "unknown attribute attention_factor=2"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "unknown attribute factor=2.0"),
        ({"factor": 2.0}, "unknown attribute factor=2.0"),
    ],
    ids=["model", "rope", "unscaled", "misplaced"],
)
def test_unknown_attributes_are_refused_by_name_and_value_unless_allowed(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"config.json: {message}.*allow unknown config"):
        read(tmp_path, LLAMA_8B | change)
    read(tmp_path, LLAMA_8B | change, allow_unknown=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "128256"}, "vocab_size='128256', expected a positive integer"),
        ({"vocab_size": True}, "vocab_size=True, expected a positive integer"),
        ({"hidden_size": 4096.0}, "hidden_size=4096.0, expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0, expected a positive integer"),
        ({"num_key_value_heads": [8]}, r"num_key_value_heads=\[8\], expected a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5', expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, expected a positive number"),
        ({"rope_theta": False}, "rope_theta=False, expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1, expected true or false"),
        ({"rope_scaling": "llama3"}, "RoPE must be described by a JSON object, not 'llama3'"),
        ({"rope_scaling": COMMON["rope_scaling"] | {"factor": "8"}}, "factor='8', expected a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling lacks low_freq_factor, high_freq_"),
        ({"vocab_size": None, "hidden_size": None}, "vocab_size, hidden_size must be given"),
        ({"num_key_value_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
    ],
)
def test_values_of_the_wrong_type_and_missing_ones_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(tmp_path, LLAMA_8B | change)


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("mistral", ["MistralForCausalLM"]),
        ("mixtral", ["MixtralForCausalLM"]),
        ("gpt2", ["GPT2LMHeadModel"]),
        ("llama", ["LlamaForSequenceClassification"]),
        ("mllama", None),
        (None, None),
        ("llama", "LlamaForCausalLM"),
    ],
)
def test_another_architecture_is_refused_in_one_line(tmp_path, model_type, architectures):
    config = LLAMA_8B | {"model_type": model_type, "architectures": architectures, "sliding_window": 4096}
    with pytest.raises(
        ValueError, match="only a LlamaForCausalLM of model_type 'llama' is supported, this is"
    ) as caught:
        read(tmp_path, config)
    assert str(model_type) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\xff\xfe"])
def test_what_is_not_a_json_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json: "):
        read_config(tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_is_read_back_here_and_in_transformers(tmp_path, preset):
    cfg, token_ids = PRESETS[preset], {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "pad_token_id": None}
    write_config(tmp_path, cfg, dtype="bfloat16", token_ids=token_ids)
    assert read_config(tmp_path) == (cfg, token_ids)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.LlamaConfig)
    assert theirs.rope_parameters == {
        "rope_theta": cfg.rope.theta,
        "rope_type": "llama3",
        "factor": cfg.rope.factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert (theirs.eos_token_id, theirs.tie_word_embeddings) == ([128001, 128009], cfg.tie_embeddings)
    assert str(theirs.dtype).endswith("bfloat16")


def test_unscaled_rope_is_written_as_null_and_token_ids_that_are_not_known_too(tmp_path):
    cfg = dataclasses.replace(PRESETS["llama3.1-8b"], rope=RopeConfig(theta=10_000.0, factor=1.0), head_dim=96)
    write_config(tmp_path, cfg, dtype="float32", token_ids={})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] is None and written["head_dim"] == 96
    assert read_config(tmp_path)[0] == cfg
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (None, None)  # not Llama 1's 1 and 2
