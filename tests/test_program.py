"""Work read from the text of programs: written by hand, and a Llama compiled here against the closed formula."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llama_jax.mesh import make_mesh
from llama_jax.model import Llama
from llama_jax.program import Buffer, Collective, read_program
from tests.tiny import TINY


def module(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n\n{before}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def loop(body: str, *, condition: str = "", config: str = "", start: str = "s32[] constant(0)", step: int = 1) -> str:
    """A module whose loop has this body, and counts in such steps."""
    body += (
        "\n  %carried = (s32[], f32[8]{0}) parameter(0)\n  %j = s32[] get-tuple-element(%carried), index=0\n"
        "  %v = f32[8]{0} get-tuple-element(%carried), index=1\n"
        f"  %step = s32[] constant({step})\n  %next = s32[] add(%j, %step)\n"
        "  ROOT %after = (s32[], f32[8]{0}) tuple(%next, %v)"
    )
    condition = (
        condition or "%bound = s32[]{:T(128)} constant(12)\n  ROOT %lt = pred[] compare(%i, %bound), direction=LT"
    )
    before = (
        f"%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{\n  {body}\n}}\n\n"
        "%condition (p: (s32[], f32[8])) -> pred[] {\n"
        "  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)\n"
        f"  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0\n  {condition}\n}}\n"
    )
    return module(
        f"%start = {start}",
        "%x = f32[8]{0} parameter(0)",
        "%t = (s32[], f32[8]{0}) tuple(%start, %x)",
        f"%w = (s32[], f32[8]{{0}}) while(%t), condition=%condition, body=%body{config}",
        before=before,
    )


DOT = (
    "%a = f32[4,16,32]{2,1,0} parameter(0)\n"
    "  %b = bf16[32,8]{1,0} parameter(1)\n"
    "  %d = f32[4,16,8]{2,1,0} dot(%a, %b), lhs_contracting_dims={2}, rhs_contracting_dims={0}"
)


def test_a_product_is_two_flops_for_each_value_and_contracted_place():
    assert read_program(module(*DOT.splitlines())).matmul_flops == 2 * 4 * 16 * 8 * 32


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({}, 12),
        ({"start": "s32[] constant(2)"}, 10),
        ({"step": 4}, 3),
        ({"step": 5}, 3),
        ({"config": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
        ({"condition": "ROOT %done = pred[] compare(%i, %i), direction=GT"}, 1),
    ],
)
def test_what_stands_in_a_loop_counts_as_often_as_it_runs_or_once_if_nobody_knows(options, turns):
    assert read_program(loop(DOT, **options)).matmul_flops == turns * 2 * 4 * 16 * 8 * 32


@pytest.mark.parametrize(
    ("left", "right", "result", "rest", "products"),
    [
        # A plain matrix product.
        ("[64,32]", "[32,16]", "[64,16]", "dim_labels=bf_io->bf", 64 * 32 * 16),
        # One with 8 x 4 heads, which a TPU writes as a padded window.
        (
            "[64,1,1,32]",
            "[8,4,32,16]",
            "[64,8,4,16]",
            "window={size=8x4 pad=7_7x3_3 rhs_reversal=1x1}, dim_labels=b01f_01io->b01f",
            64 * 8 * 4 * 32 * 16,
        ),
        # A batch of 8 products, which it writes as a spread window.
        (
            "[8,64,32]",
            "[8,32,16]",
            "[8,64,16]",
            "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            8 * 64 * 32 * 16,
        ),
    ],
)
def test_a_convolution_counts_products_with_values_and_none_with_padding(left, right, result, rest, products):
    text = module(
        f"%a = bf16{left} parameter(0)",
        f"%b = bf16{right} parameter(1)",
        f"%c = bf16{result} convolution(%a, %b), {rest}, metadata={{}}",
    )
    assert read_program(text).matmul_flops == 2 * products


def test_cycles_copies_and_what_a_fusion_calls_are_summed():
    before = f"%fused (p: f32[8]) -> f32[8] {{\n  {DOT}\n}}\n"
    text = module(
        "%x = f32[8]{0} parameter(0)",
        '%f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"250"}',
        '%c = f32[8,2]{1,0} copy(%f), backend_config={"window_config":{"estimated_cycles":"30"}}',
        before=before,
    )
    program = read_program(text)
    assert (program.cycles, program.copied_bytes, program.matmul_flops) == (280, 64, 2 * 4 * 16 * 8 * 32)


def test_a_copy_in_a_fusion_counts_where_it_is_what_the_fusion_makes():
    turned = "%p = f32[8,2]{1,0} parameter(0)\n  %c = f32[8,2]{0,1} copy(%p)"
    before = (
        f"%made (p: f32[8,2]) -> f32[8,2] {{\n  {turned.replace('%c', 'ROOT %c')}\n}}\n\n"
        "%within (p: f32[8,2]) -> f32[8,2] {\n  %p = f32[8,2]{1,0} parameter(0)\n"
        "  %i = f32[8,2]{0,1} fusion(%p), kind=kLoop, calls=%made\n  ROOT %n = f32[8,2]{0,1} negate(%i)\n}\n\n"
        f"%passed (p: f32[8,2]) -> f32[8,2] {{\n  {turned}\n  ROOT %n = f32[8,2]{{0,1}} negate(%c)\n}}\n"
    )

    def copied(name: str) -> float:
        line = f"%f = f32[8,2]{{0,1}} fusion(%x), kind=kLoop, calls=%{name}"
        return read_program(module("%x = f32[8,2]{1,0} parameter(0)", line, before=before)).copied_bytes

    assert [copied(name) for name in ("made", "within", "passed")] == [64, 0, 0]


@pytest.mark.parametrize(
    ("line", "collective", "size"),
    [
        (
            "bf16[64,8]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}",
            Collective("all-gather", (0, 1), False),
            1024,
        ),
        (
            "f32[64]{0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add",
            Collective("all-reduce", (0, 2, 4, 6), False),
            256,
        ),
        (
            "f32[16]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={0}",
            Collective("reduce-scatter", (0, 1, 2, 3), False),
            256,
        ),
        (
            "(f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}",
            Collective("all-gather", (0, 4), True),
            256,
        ),
        (
            "f32[16]{0} collective-permute(%x), source_target_pairs={{0,3},{3,0}}",
            Collective("collective-permute", (0, 3), False),
            64,
        ),
    ],
)
def test_a_collective_has_its_kind_its_first_group_and_the_whole_arrays_bytes(line, collective, size):
    program = read_program(module("%x = f32[16]{0} parameter(0)", f"%g = {line}"))
    assert program.collectives == {collective: size}


def test_a_part_of_the_queries_counts_half_of_all_keys_too_where_the_kernel_is_causal():
    text = module(
        "%q = bf16[8,64,128]{2,1,0} parameter(0)",
        "%k = bf16[2,256,128]{2,1,0} parameter(1)",
        '%splash_mha_fwd_residuals = f32[8]{0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"',
    )
    assert read_program(text).kernel_flops == 2 * 2 * 8 * 64 * 256 * 128 / 2


def test_what_a_slice_sends_to_the_others_is_a_collective_across_them():
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
    text = module(
        "%x = bf16[64,8]{1,0} parameter(0)",
        "%t = token[] after-all()",
        "%s = (bf16[64,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=4, is_host_transfer=true, "
        f"frontend_attributes={{{attributes}}}",
    )
    assert read_program(text).collectives == {Collective("all-reduce", (), True, across=True): 1024}


def test_an_exchange_that_rides_along_with_computing_counts_once_where_it_is_started():
    gather = (
        "%x = bf16[16,8]{1,0} parameter(0)\n  %g = bf16[64,8]{1,0} all-gather(%x), channel_id=3, "
        'replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="3"}'
    )
    started = f'{gather}\n  ROOT %s = u32[] custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    before = f"%started (x: bf16[16,8]) -> u32[] {{\n  {started}\n}}\n\n" + "".join(
        f"%{name} (x: bf16[16,8]) -> bf16[64,8] {{\n  {gather}\n}}\n\n" for name in ("carried", "ended")
    )
    fusions = [
        f"%f{i} = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%{name}"
        for i, name in enumerate(("started", "carried", "carried", "ended"))
    ]
    program = read_program(module("%x = bf16[16,8]{1,0} parameter(0)", *fusions, before=before))
    assert program.collectives == {Collective("all-gather", (0, 1, 2, 3), True): 1024}


def test_buffers_are_the_arrays_in_main_memory_that_are_not_within_a_fusion():
    before = f"%fused (p: f32[8]) -> f32[8] {{\n  {DOT}\n}}\n"
    text = module(
        "%x = f32[8]{0} parameter(0)",
        '%f = f32[64]{0:T(128)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/logits/dot"}',
        "%v = f32[32]{0:T(128)S(3)} copy(%f)",
        "%m = (f32[2]{0}, s32[4]{0}) all-to-all(%f, %f)",
        before=before,
    )
    assert read_program(text).buffers == {
        Buffer("f32", (64,), "jit(step)/logits/dot"),
        Buffer("f32", (2,), "all-to-all"),
        Buffer("s32", (4,), "all-to-all"),
    }
    assert Buffer("bf16", (64, 2), "").num_bytes == 256


def test_a_reduction_that_a_tpu_slices_at_once_is_a_reduce_scatter():
    before = (
        "%all-reduce-scatter.7 (x: bf16[64]) -> bf16[16] {\n  %x = bf16[64]{0} parameter(0)\n"
        "  %r = bf16[64]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add\n}\n"
    )
    text = module(
        "%x = bf16[64]{0} parameter(0)", "%f = bf16[16]{0} fusion(%x), calls=%all-reduce-scatter.7", before=before
    )
    assert read_program(text).collectives == {Collective("reduce-scatter", (0, 1, 2, 3), False): 128}


def test_kernels_are_named_and_attention_counts_half_of_what_it_could_see():
    queries, keys = "bf16[8,256,128]{2,1,0} parameter(0)", "bf16[2,256,128]{2,1,0} parameter(1)"
    call = 'f32[8]{0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"'
    text = loop(f"%q = {queries}\n  %k = {keys}\n  %splash_mha_dq_no_residuals.7 = {call}\n  %mine.1.2 = {call}")
    program = read_program(text)
    assert program.kernels == {"splash_mha_dq_no_residuals": 12, "mine": 12}
    assert program.kernel_flops == 12 * 3 * 2 * 8 * 256 * 256 * 128 / 2


def test_a_condition_counts_its_branches_by_their_share():
    one = f"%one (p: f32[8]) -> f32[8] {{\n  {DOT}\n}}\n\n"
    two = "%two (p: f32[8]) -> f32[8] {\n  %p = f32[8] parameter(0)\n}\n"
    text = module(
        "%i = s32[] parameter(0)",
        "%c = f32[8]{0} conditional(%i, %i, %i), branch_computations={%one, %two}",
        before=one + two,
    )
    assert read_program(text).matmul_flops == 4 * 16 * 8 * 32


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("nothing")


@pytest.mark.parametrize("spec", ["fsdp=1", "fsdp=2,tensor=2"])
def test_a_compiled_llama_computes_what_the_closed_formula_says(spec):
    # One tile of attention, whose half is not skipped, is a hundredth of so wide a model.
    cfg = dataclasses.replace(TINY, embed_dim=256, mlp_dim=512, head_dim=16)
    batch, length = 4, 8
    with jax.set_mesh(mesh := make_mesh(spec, jax.devices()[: 1 if spec == "fsdp=1" else 4])):
        model = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        compiled = jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).compile()
    expected = cfg.train_flops_per_token(length) / 3 * batch * length / mesh.size
    assert read_program(compiled.as_text() or "").matmul_flops == pytest.approx(expected, rel=0.01)
