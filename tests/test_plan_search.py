"""Which meshes a search tries, in which order, and what it says when it is stopped or nothing fits."""

import dataclasses

import jax
import pytest

import train.plan
import train.search
from benchmarks import plan_table
from benchmarks.plan_table import SERVING, TRAINING, peer_seconds
from llama_jax.attempts import try_each
from llama_jax.config import PRESETS
from llama_jax.mesh import make_mesh, parse_mesh, sharding_rules
from llama_jax.plan import Plan, rank, summary
from llama_jax.remat import REMAT_POLICIES
from llama_jax.schemes import find_scheme
from llama_jax.slices import parse_slice
from tests.tiny import TINY
from train.config import DataConfig, PhaseConfig, RunConfig, StageConfig, TrainConfig, read_config

CPU8 = parse_slice("cpu:8")

CONFIG = TrainConfig(
    name="tiny",
    model=dataclasses.replace(TINY, num_layers=1),
    data=DataConfig("data/tiny"),
    stage={"1": StageConfig((PhaseConfig(8, 6400), PhaseConfig(16, 6400)), 128, 1e-3, 1e-4)},
    run=RunConfig(mesh="fsdp=4,tensor=2", compute_dtype="float32"),
)


def planned(mesh: str, *, fits: bool = True, seconds: float | None = 1.0, peak: int = 2**30) -> Plan:
    """A plan as a compiler might have made it."""
    return Plan("v4:2x2x2", 8, mesh, "tpu", fits, 2**31, peak, 0, peak, 0, {}, estimated_step_seconds=seconds)


def test_every_mesh_that_is_tried_is_legal_for_the_model_and_divides_every_batch():
    meshes = list(train.search.legal_meshes(CONFIG, "1", CPU8))
    assert {"data": 1, "fsdp": 8, "context": 1, "tensor": 1} in meshes
    assert {"data": 2, "fsdp": 2, "context": 2, "tensor": 1} in meshes
    assert len({train.search.spec(sizes) for sizes in meshes}) == len(meshes)
    for sizes in meshes:
        assert parse_mesh(train.search.spec(sizes), 8) == sizes
        rules = sharding_rules(CONFIG.model, make_mesh(train.search.spec(sizes), jax.devices()))
        assert all(rows % rules.batch_multiple == 0 for rows in (16, 8))


def test_what_cannot_hold_the_weights_is_never_compiled():
    config, target = read_config("llama3.1-70b"), parse_slice("v5p:4x4x4")
    meshes = train.search.ranked_meshes(config, "1", target)
    assert meshes
    capacity, needed = target.chip.hbm_bytes, 12 * config.model.num_params()
    assert all(needed <= capacity * sizes["fsdp"] * sizes["context"] * sizes["tensor"] for sizes in meshes)
    assert any(sizes["data"] > 1 for sizes in train.search.legal_meshes(config, "1", target))


def test_weights_split_over_all_chips_come_before_tensor_where_rows_are_enough():
    config = read_config("llama3.1-8b", {"stage.1.phases": [{"seq_len": 8192, "tokens": 10**9}]})
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, micro_batch_tokens=0))
    meshes = train.search.ranked_meshes(config, "1", parse_slice("v4:4x4x4"))
    assert train.search.spec(meshes[0]) in ("fsdp=64", "data=2,fsdp=32")


def test_a_search_compiles_its_own_mesh_first_and_ranks_what_it_tried(capsys):
    seen = []

    def attempt(config: TrainConfig) -> Plan:
        seen.append((config.stage_mesh("1"), config.run.remat))
        return planned(seen[-1][0], seconds=0.5 if seen[-1] == ("fsdp=8", "dots") else 2.0)

    tried = train.search.search(CONFIG, "1", CPU8, attempt, seconds=60.0)
    assert seen[0] == ("fsdp=4,tensor=2", "full")
    assert str(tried[0][0]) == "fsdp=8 with remat dots"
    assert len(seen) == len(set(seen))
    assert {remat for mesh, remat in seen if mesh == "fsdp=8"} == set(REMAT_POLICIES)
    assert "1 tried, 0 of 60 s: fsdp=4,tensor=2: 2 s a step, 1.00 GiB of 2.00 GiB" in capsys.readouterr().err


def test_a_search_ends_when_its_time_is_spent():
    tried = train.search.search(CONFIG, "1", CPU8, lambda config: planned(config.stage_mesh("1")), seconds=0.0)
    assert len(tried) == 1


def test_an_interrupted_search_gives_the_best_so_far(capsys):
    def attempt(number: int) -> Plan:
        if number == 2:
            raise KeyboardInterrupt
        return planned("fsdp=8", seconds=3.0 - number)

    tried = try_each(lambda _: iter(range(9)), attempt, seconds=60.0, rank=rank, summary=summary)
    assert [number for number, _ in tried] == [1, 0]
    assert "interrupted: the best of 2 tried" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        try_each(lambda _: iter([2]), attempt, seconds=60.0, rank=rank, summary=summary)


def test_an_illegal_candidate_is_passed_over():
    def attempt(number: int) -> Plan:
        if number == 0:
            raise ValueError("no")
        return planned("fsdp=8")

    tried = try_each(lambda _: iter(range(2)), attempt, seconds=60.0, rank=rank, summary=summary)
    assert [number for number, _ in tried] == [1]


def test_what_fits_is_better_than_what_is_fast_and_then_memory_counts():
    best, slow, large, unfit = (
        planned("a"),
        planned("a", seconds=2.0),
        planned("a", peak=2**31),
        planned("a", fits=False, seconds=0.1),
    )
    assert sorted([unfit, large, slow, best], key=rank) == [best, large, slow, unfit]


def test_a_model_that_can_never_fit_names_the_smallest_slice_that_would():
    config = read_config("llama3.1-405b")
    with pytest.raises(
        ValueError,
        match="4535.77 GiB, and v4:4x4x4 has 64 x 30.75 GiB; the smallest slice that holds them is v4:4x4x12",
    ):
        train.plan.print_plan(config, "1", "v4:4x4x4", as_json=True)


def test_changes_that_may_make_room_begin_with_the_least():
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, remat="none"))
    phase = config.stage["1"].phases[-1]
    ways = list(train.search.ways_out(config, "1", phase, parse_slice("v4:2x2x1")))
    assert [text for text, *_ in ways[:4]] == [
        "--set run.remat=full",
        "--set run.remat=full --set run.loss_chunks=4",
        "--set run.remat=full --set run.loss_chunks=4 --set run.micro_batch_tokens=16",
        "--set run.remat=offload --set run.loss_chunks=4 --set run.micro_batch_tokens=16",
    ]
    assert [str(target) for *_, target in ways] == ["v4:2x2x1"] * 5 + ["v4:2x2x2", "v4:2x2x4", "v4:2x4x4"]
    assert ways[-1][0].endswith("on v4:2x4x4")


def test_a_searched_plan_prints_the_best_and_the_others(capsys):
    small = dataclasses.replace(CONFIG, stage={"1": StageConfig((PhaseConfig(16, 640),), 128, 1e-3, 1e-4)})
    train.plan.print_plan(small, "1", "cpu:2", as_json=False, search_seconds=0.001)
    printed = capsys.readouterr().out
    assert "the best tried" in printed
    assert "remat full" in printed


def test_the_rows_of_the_table_have_the_measures_parts():
    row = TRAINING["8b-v4-64-b1"]
    # 2.229 s of cycles, 96.8 TFLOP of kernels at 60 % of 275, 56.2 GiB over six links of 45 GB/s.
    assert peer_seconds(row, row.peers[0]) == pytest.approx(2.229 + 0.5865 + 0.2235, rel=1e-3)
    assert {"405b-v4-2048-128k", "8b-v4-64-b1-fast"} < set(TRAINING)
    assert {row.mesh for row in SERVING.values() if row.slice == "v4:2x4x4"} == {"tensor=32"}
    assert all(parse_slice(row.slice).num_chips for row in (*TRAINING.values(), *SERVING.values()))


def test_a_row_of_serving_is_what_the_options_of_generation_would_plan(monkeypatch):
    asked = []
    monkeypatch.setattr(plan_table, "plan_generation", lambda work, target, mesh, hlo: asked.append((work, mesh)))
    plan_table.plan_serving(SERVING["serve-405b-int8-v5p-16-128k"])
    ((work, mesh),) = asked
    assert (work.cfg, work.context, mesh) == (PRESETS["llama3.1-405b"], 131_072, "tensor=16")
    assert work.scheme == find_scheme("int8")
