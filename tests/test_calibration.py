"""Weights rounded by text: the methods against their papers' arithmetic, what is seen and told against transformers."""

import argparse
import dataclasses
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama_jax
from infer.entry import DEMO
from llama_jax.calibration.folding import PLACES, awq, fold, smoothquant
from llama_jax.calibration.gptq import DAMPING, gptq
from llama_jax.calibration.layers import Calibration, _block, _Text
from llama_jax.calibration.text import Rows, read_rows
from llama_jax.checkpoint.formats import open_checkpoint, write_checkpoint
from llama_jax.checkpoint.quantized.compressing import Compression, Report
from llama_jax.checkpoint.quantized.nearest import fit, nearest
from llama_jax.convert import Recipe, convert, main
from llama_jax.kernels.narrow import round_inputs
from llama_jax.mesh import use_mesh
from llama_jax.schemes import SCHEMES, Scheme
from tests.reference import hf_logits, hf_model, relative_error, save_hf
from tests.tiny import TINY

FLOAT = np.dtype(np.float32)


def correlated(num_rows: int, num_inputs: int) -> np.ndarray:
    """Inputs of few causes, some a hundred times the size of others, as activations are."""
    rng = np.random.default_rng(0)
    causes = rng.standard_normal((num_rows, num_inputs // 4)) @ rng.standard_normal((num_inputs // 4, num_inputs))
    sizes = np.exp(rng.normal(0, 1.5, num_inputs))
    return ((causes + rng.standard_normal((num_rows, num_inputs))) * sizes).astype(np.float32)


def matrix(num_outputs: int, num_inputs: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((num_outputs, num_inputs)).astype(np.float32)


# GPTQ


def column_by_column(weights: np.ndarray, products: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order, as in section 3.1 of the paper: the inverse is updated each time."""
    weights, products = weights.astype(np.float64), products.astype(np.float64)
    inverse = np.linalg.inv(products + DAMPING * np.mean(np.diag(products)) * np.eye(len(products)))
    size = scheme.group or len(products)
    out = np.empty_like(weights)
    for i in range(len(products)):
        if i % size == 0:
            grid = fit(weights[:, i : i + size].astype(np.float32), scheme, FLOAT)
        column = weights[:, i : i + 1].astype(np.float32)
        out[:, i : i + 1] = grid.wide(grid.nearest(column))
        weights -= np.outer((weights[:, i] - out[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # a column that is done is not looked at again
    return out


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g64-asym", "fp8"])
def test_gptq_is_optimal_brain_quantization_in_the_order_of_the_columns(name):
    x, weights = correlated(300, 192), matrix(24, 192)
    made = gptq(weights, x.T @ x, SCHEMES[name], FLOAT)
    assert made.scales.shape == (24, 192 // (SCHEMES[name].group or 192))
    np.testing.assert_allclose(made.dequantize(), column_by_column(weights, x.T @ x, SCHEMES[name]), atol=1e-5)


def output_error(x: np.ndarray, weights: np.ndarray, rounded: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (rounded - weights).T) / np.linalg.norm(x @ weights.T))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g64-asym", "fp8"])
def test_gptq_loses_less_of_the_outputs_of_other_inputs_than_rounding_to_nearest(name):
    x, weights = correlated(600, 192), matrix(24, 192)
    seen, others = x[:400], x[400:]
    made = gptq(weights, seen.T @ seen, SCHEMES[name], FLOAT).dequantize()
    plain = nearest(weights, SCHEMES[name], FLOAT).dequantize()
    assert output_error(others, weights, made) < 0.85 * output_error(others, weights, plain)


def test_gptq_of_inputs_that_do_not_correlate_is_rounding_to_nearest_and_takes_inputs_that_are_never_there():
    weights = matrix(24, 128)
    for diagonal in (np.ones(128), np.arange(128), np.zeros(128)):
        made = gptq(weights, np.diag(diagonal).astype(np.float32), SCHEMES["int4"], FLOAT)
        assert np.array_equal(made.values, nearest(weights, SCHEMES["int4"], FLOAT).values)


# Folding


def folded(model: transformers.LlamaForCausalLM, dtype: np.dtype) -> None:
    """Fold scales between 1/8 and 8 at every place of every layer."""
    rng = np.random.default_rng(0)
    state = model.state_dict()
    for index in range(TINY.num_layers):
        prefix = f"model.layers.{index}."
        names = [name for name in state if name.startswith(prefix)]
        layer = {name.removeprefix(prefix).removesuffix(".weight"): state[name].numpy() for name in names}
        for place in PLACES:
            scales = np.exp2(rng.uniform(-3, 3, len(layer[place.before]))).astype(np.float32)
            layer = fold(layer, place, scales, TINY.head_dim, dtype)
        state |= {f"{prefix}{name}.weight": torch.tensor(values) for name, values in layer.items()}
    model.load_state_dict(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_scales_folded_in_gives_the_same_logits_also_where_norms_are_rounded(dtype):
    model, tokens = hf_model(TINY), torch.tensor(np.random.default_rng(0).integers(0, 128, (2, 20)))
    with torch.no_grad():
        before = model(tokens).logits.numpy()
        folded(model, np.dtype(dtype))
        after = model(tokens).logits.numpy()
    assert np.abs(before - after).max() < 1e-4 * np.abs(before).max()


def test_awq_takes_the_power_of_the_inputs_sizes_that_loses_the_least():
    x, scheme = correlated(300, 64), SCHEMES["int4"]
    matrices = [matrix(24, 64), matrix(16, 64) * 2]

    def lost(scales: np.ndarray) -> float:
        rounded = [nearest(weights * scales, scheme, np.dtype("bfloat16")).dequantize() for weights in matrices]
        return sum(float(np.sum(np.square(x @ (r / scales - w).T))) for r, w in zip(rounded, matrices, strict=True))

    size = np.sqrt(np.mean(np.square(x), axis=0))
    least = min(lost(size**exponent) for exponent in np.arange(20) / 20)
    made = awq(matrices, x.T @ x, 64, 16, scheme)
    slopes = np.diff(np.log(made)) / np.diff(np.log(size))
    np.testing.assert_allclose(slopes, slopes[0], atol=1e-3)
    assert lost(made) < 1.05 * least  # steps are rounded to bfloat16, which a common factor of the scales changes
    assert least < 0.8 * lost(np.ones(64, np.float32))


def test_smoothquant_shares_outliers_between_activations_and_weights():
    x, weights = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32), matrix(24, 64)
    x[:, ::16] *= 60
    scales = smoothquant([weights], np.abs(x).max(axis=0), 64, 16, SCHEMES["int8-a8"])
    np.testing.assert_allclose(np.abs(x / scales).max(axis=0), np.abs(weights * scales).max(axis=0), rtol=1e-4)

    def error(scales: np.ndarray) -> float:
        values, steps = round_inputs(jnp.asarray(x / scales)[None], 1, "int8", np.inf)
        inputs = np.asarray(values[0], np.float32) * np.asarray(steps[0])[:, None]
        rounded = nearest(weights * scales, SCHEMES["int8-a8"], FLOAT).dequantize()
        return float(np.linalg.norm(inputs @ rounded.T - x @ weights.T))

    assert error(scales) < 0.5 * error(np.ones(64, np.float32))


def test_query_heads_of_a_group_share_the_scale_of_their_value_head():
    largest = np.random.default_rng(0).uniform(1, 2, 128).astype(np.float32)
    scales = smoothquant([np.ones((8, 128), np.float32)], largest, 32, 16, SCHEMES["int8-a8"])
    np.testing.assert_allclose(scales**2, largest.reshape(2, 4, 16).max(axis=1).reshape(-1), rtol=1e-6)


# Layer by layer


def rows(num_calibration: int = 4, num_held_out: int = 2, length: int = 48) -> Rows:
    tokens = np.random.default_rng(0).integers(0, 128, (num_calibration + num_held_out, length)).astype(np.int32)
    return Rows(tokens[:num_calibration], tokens[num_calibration:])


def test_what_is_seen_of_inputs_is_what_transformers_products_get():
    model, tokens, seen = hf_model(TINY), rows().calibration, {}
    layer = model.model.layers[0]
    for place in PLACES:
        module = layer.get_submodule(place.products[0])
        module.register_forward_pre_hook(lambda module, args, name=place.before: seen.update({name: args[0]}))
    with torch.no_grad():
        model(torch.tensor(tokens))
    stored = {name.removesuffix(".weight"): values.numpy() for name, values in layer.state_dict().items()}
    with use_mesh("data=1"):
        ran = _Text(TINY, tokens, model.model.embed_tokens.weight.detach().numpy())
        products, largest = (ran.inputs(_block(TINY, stored), method) for method in ("gptq", "smoothquant"))
    for place in PLACES:
        x = seen[place.before].reshape(-1, products[place.before].shape[0]).numpy()
        np.testing.assert_allclose(products[place.before], x.T @ x, atol=1e-4 * np.abs(x.T @ x).max())
        np.testing.assert_allclose(largest[place.before], np.abs(x).max(axis=0), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("recipe", ["int4 gptq", "int4-g64-asym awq", "int8-a8 smoothquant", "fp8 gptq"])
def test_what_is_told_is_what_the_written_model_does_in_transformers(tmp_path, recipe):
    name, method = recipe.split()
    cfg = dataclasses.replace(TINY, mlp_dim=192)
    model = hf_model(cfg)
    source = open_checkpoint(save_hf(model, tmp_path / "floats")).source
    compression = Compression(
        source, SCHEMES[name], cfg.num_layers, Calibration(cfg, SCHEMES[name], method, rows()).weights
    )
    (tmp_path / "few").mkdir()
    with use_mesh("data=1"):
        write_checkpoint(tmp_path / "few", cfg, source, to="hf", compression=compression)
    wide = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "few", quantization_config=wide)
    ours = {}
    with use_mesh("data=1"):
        for dtype in ("float32", None):
            ours[dtype] = llama_jax.load(tmp_path / "few", dtype=dtype, layout="layers")(rows().held_out)
    assert relative_error(ours["float32"], hf_logits(theirs, rows().held_out)) < 2e-5
    before, after = compression.report.perplexities["held-out"]
    np.testing.assert_allclose(before, perplexity(hf_logits(model, rows().held_out)), rtol=1e-5)
    # Where activations are rounded too, those between two values fall to either side.
    close = 1e-4 if SCHEMES[name].rest.inputs is None else 1e-2
    np.testing.assert_allclose(after, perplexity(np.asarray(ours[None])), rtol=close)
    errors = list(compression.report.errors().values())
    assert len(errors) == cfg.num_layers and (errors[0] == 0) == (name == "fp8") and 0 < errors[-1] < 1


def perplexity(logits: np.ndarray) -> float:
    """Of logits [N, T, V] of the held-out rows."""
    chosen = torch.tensor(rows().held_out[:, 1:], dtype=torch.int64).flatten()
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:, :-1]).flatten(0, 1), chosen).exp())


def test_no_more_than_a_layer_of_the_model_is_in_memory(tmp_path):
    cfg = dataclasses.replace(TINY, num_layers=6)
    source = open_checkpoint(save_hf(hf_model(cfg), tmp_path / "floats")).source
    alive: list[tuple[str, weakref.ref]] = []

    class Watched:
        tensors = source.tensors

        def read(self, name: str) -> np.ndarray:
            values = source.read(name)
            if ".layers." in name:
                here = name.split(".")[2]
                others = {layer for layer, array in alive if array() is not None} - {here}
                floats = sum(array.nbytes for array in jax.live_arrays()) - before
                most.append((len(others), floats))
                alive.append((here, weakref.ref(values)))
            return values

    most: list[tuple[int, int]] = []
    before = sum(array.nbytes for array in jax.live_arrays())
    scheme = SCHEMES["int4"]
    with use_mesh("data=1"):
        covered = {name for name in source.tensors if "_proj" in name}
        for _ in Calibration(cfg, scheme, "gptq", rows()).weights(Watched(), covered, Report(0, (0, 0))):
            pass
    assert len(most) == 9 * cfg.num_layers
    assert max(most) == (0, 0)


# The command


@pytest.fixture
def documents(tmp_path):
    """Text of the demo's kind."""
    (tmp_path / "documents.txt").write_text(Path(argparse.__file__).read_text()[:20_000])
    return tmp_path / "documents.txt"


def test_gptq_costs_the_demo_less_than_rounding_to_nearest(documents, tmp_path):
    reports = {}
    for method in ("rtn", "gptq"):
        recipe = Recipe("int4", method, [str(documents)])
        reports[method] = convert(str(DEMO), str(tmp_path / method), to="hf", recipe=recipe)
    errors = [np.array(list(reports[method].errors().values())) for method in ("rtn", "gptq")]
    assert (errors[1] < 0.85 * errors[0]).all()
    rises = {method: [a / b - 1 for b, a in r.perplexities.values()] for method, r in reports.items()}
    assert sum(rises["gptq"]) < sum(rises["rtn"]) < 0.08
    assert max(rises["gptq"]) < 0.04


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--quantize int4 --method gptq", "--method gptq needs text: give it with --calibration FILE"),
        ("--quantize fp8 --method awq", "awq is for int8, int4, .*; fp8 takes --method rtn or gptq"),
        ("--quantize int4 --method smoothquant", "smoothquant is for int8-a8; int4 takes --method rtn or gptq or awq"),
        ("--quantize nf4 --method gptq", "gptq is for int8, .*; nf4 takes --method rtn"),
        ("--quantize int4 --to meta", "--quantize int4 is written with --to hf or gguf, not meta"),
        ("--quantize q4_0 --to gguf --method awq", "--method and --calibration are for --to hf; gguf is rounded"),
        ("--quantize int8 --calibration short.txt", "the calibration text has 6 tokens; give at least 2555"),
    ],
)
def test_what_cannot_be_done_says_what_can(tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few short words")
    with pytest.raises(ValueError, match=line):
        main([str(DEMO), str(tmp_path / "out"), *options.split()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", ["", "--to hf --method gptq", "--to orbax --calibration short.txt"])
def test_options_that_nothing_reads_are_refused(tmp_path, options):
    with pytest.raises(SystemExit):
        main([str(DEMO), str(tmp_path / "out"), *options.split()])


def test_rows_begin_with_their_token_and_every_fifth_is_held_out(documents):
    tokenizer, cfg = llama_jax.load_tokenizer(DEMO), open_checkpoint(DEMO).cfg
    calibration, held_out = read_rows([documents], tokenizer, cfg)
    assert calibration.shape[1] == held_out.shape[1] == 512
    assert len(held_out) == (len(calibration) + len(held_out)) // 5
    assert {row[0] for row in (*calibration, *held_out)} == {tokenizer.bos_id}
    whole = tokenizer.encode(documents.read_text())
    assert held_out[0, 1:].tolist() == whole[4 * 511 : 5 * 511]
