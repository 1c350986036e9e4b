"""The reader of compiled programs, for text in the forms of XLA, and for programs that are counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from dit_video.core.hlo import read_program
from dit_video.core.hlo.text import find_mesh_axes, parse_replica_groups

MESH = {"data": 1, "fsdp": 2, "tensor": 1, "context": 4}


def make_module(*lines: str, rest: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    first = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[64,32]{1,0} parameter(0)"
    return f"HloModule jit_step\n\n{rest}\n{first}\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "axes", "moved"),
    [
        ("all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", "all-gather", ("context",), 3 * 8192),
        ("all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", "all-gather", ("fsdp",), 8192),
        ("all-gather(%p), replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}", "all-gather", ("fsdp",), 8192),
        ("all-reduce(%p), replica_groups={}, to_apply=%add", "all-reduce", ("fsdp", "context"), 2 * 8192 * 7 / 8),
        ("reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add", "reduce-scatter", ("context",), 8192 * 3 / 4),
        ("all-to-all(%p), replica_groups=[2,4]<=[8]", "all-to-all", ("context",), 8192 * 3 / 4),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,2}}", "collective-permute", ("context",), 8192),
        ("all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}", "all-gather", ("part of", "context"), 8192),
    ],
)
def test_collectives_are_read_with_kind_axes_and_bytes(line, kind, axes, moved):
    program = read_program(make_module(f"%c = f32[8]{{0}} {line}"), MESH)
    (result,) = program.collectives.values()
    assert (result.kind, result.axes, result.bytes, result.count) == (kind, axes, moved, 1)


LOOP = """
%body (t: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %t = (s32[], f32[64,32]{1,0}) parameter(0)
  %x = f32[64,32]{1,0} get-tuple-element(%t), index=1
  %a = f32[64,32]{1,0} all-to-all(%x), channel_id=1, replica_groups=[2,4]<=[8]
  %d = f32[64,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %r = (s32[], f32[64,32]{1,0}) tuple(%t, %a)
}

%condition (t: (s32[], f32[64,32])) -> pred[] {
  %t = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(24)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
"""


def test_operations_in_a_loop_count_once_for_each_iteration():
    text = make_module("%w = (s32[], f32[64,32]{1,0}) while(%p), condition=%condition, body=%body", rest=LOOP)
    program = read_program(text, MESH)
    assert program.flops == 24 * 2 * 64 * 64 * 32
    (moved,) = program.collectives.values()
    assert (moved.count, moved.bytes) == (24, 24 * 8192 * 3 / 4)
    config = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert read_program(text.replace("body=%body", config), MESH).flops == 5 * 2 * 64 * 64 * 32


def test_a_loop_whose_end_depends_on_data_counts_once():
    rest = LOOP.replace("%n = s32[] constant(24)", "%n = s32[] get-tuple-element(%t), index=0")
    text = make_module("%w = (s32[], f32[64,32]{1,0}) while(%p), condition=%condition, body=%body", rest=rest)
    assert read_program(text, MESH).unknown_loops == 1
    assert read_program(text, MESH).flops == 2 * 64 * 64 * 32
    assert read_program(text, MESH, outer_trip_count=50).flops == 50 * 2 * 64 * 64 * 32
    # A sampler's loop has room for more steps than are taken.
    text = text.replace(rest, LOOP)
    assert read_program(text, MESH, outer_trip_count=5).flops == 24 * 2 * 64 * 64 * 32
    assert read_program(text, MESH, outer_trip_count=5, max_outer_trip_count=24).flops == 5 * 2 * 64 * 64 * 32


def test_asynchronous_collectives_count_once():
    pair = [
        "%s = (f32[64,32]{1,0}, f32[256,32]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}",
        "%d = f32[256,32]{1,0} all-gather-done(%s)",
    ]
    (moved,) = read_program(make_module(*pair), MESH).collectives.values()
    assert (moved.count, moved.bytes) == (1, 3 * 8192)
    fused = "%{0} (q: f32[64,32]) -> f32[256,32] {{\n  %q = f32[64,32]{{1,0}} parameter(0)\n  ROOT %g.{0} = "
    fused += "f32[256,32]{{1,0}} "
    fused += 'all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={{chain_id="7"}}\n}}\n'
    calls = [f"%f.{name} = f32[256,32]{{1,0}} fusion(%p), kind=kOutput, calls=%{name}" for name in ("start", "end")]
    (moved,) = read_program(
        make_module(*calls, rest=fused.format("start") + fused.format("end")), MESH
    ).collectives.values()
    assert (moved.count, moved.bytes) == (1, 3 * 8192)


def test_a_sum_of_which_a_slice_is_taken_is_a_scatter():
    lines = ["%s = f32[64,32]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add"]
    lines += ["ROOT %d = f32[16,32]{1,0} dynamic-slice(%s), dynamic_slice_sizes={16,32}"]
    (moved,) = read_program(make_module(*lines), MESH).collectives.values()
    assert (moved.kind, moved.bytes) == ("reduce-scatter", 8192 * 3 / 4)


def test_sums_of_several_arrays_of_which_slices_are_taken_are_scatters():
    lines = ["%s = (f32[64,32]{1,0}, f32[64,32]{1,0}) all-reduce(%p, %p), replica_groups=[2,4]<=[8], to_apply=%add"]
    parts = [
        f"%g{part} = f32[64,32]{{1,0}} get-tuple-element(%s), index={part}\n"
        f"  %d{part} = f32[16,32]{{1,0}} dynamic-slice(%g{part}), dynamic_slice_sizes={{16,32}}"
        for part in (0, 1)
    ]
    result = []
    for whole in ("", "%w = f32[64,32]{1,0} negate(%g0)"):
        text = make_module(*lines, *parts, whole, "ROOT %r = (f32[16,32]{1,0}, f32[16,32]{1,0}) tuple(%d0, %d1)")
        result += read_program(text, MESH).collectives.values()
    assert [part.kind for part in result] == ["reduce-scatter", "all-reduce"]
    assert [part.bytes for part in result] == [2 * 8192 * 3 / 4, 2 * 2 * 8192 * 3 / 4]


def test_products_of_tpu_programs_are_counted():
    lines = [
        "%q = f32[32,16]{1,0} parameter(1)",
        "%c = f32[64,16]{1,0} convolution(%p, %q), dim_labels=bf_io->bf",
        "%a = f32[8,64,32]{2,1,0} parameter(2)",
        "%b = f32[8,32,16]{2,1,0} parameter(3)",
    ]
    assert read_program(make_module(*lines), MESH).flops == 2 * 64 * 32 * 16
    # Eight products, in a window of which each output meets one weight alone.
    window = "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    lines = [*lines[2:], f"%e = f32[8,64,16]{{2,1,0}} convolution(%a, %b), {window}"]
    assert read_program(make_module(*lines), MESH).flops == 8 * 2 * 64 * 32 * 16


def test_bytes_read_and_written_are_counted():
    lines = [
        "%i = s32[] parameter(1)",
        "%s = f32[1,32]{1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,32}",
        "%n = f32[64,32]{1,0:S(1)} negate(%p)",
        "ROOT %e = f32[64,32]{1,0} exponential(%n)",
    ]
    # A slice is read and written, then the whole read; what lies in near memory costs nothing; a whole is written.
    assert read_program(make_module(*lines), MESH).bytes == 2 * 128 + 8192 + 8192


def test_asynchronous_operations_are_read_and_written_once():
    """A slice that is copied ahead of its use costs the bytes of the slice, and near memory costs nothing."""
    near, far = "f32[64,32]{1,0:S(1)}", "f32[64,32]{1,0}"

    def traffic(*lines):
        return read_program(make_module(*lines), MESH).bytes

    ahead = f"%s = ({near}, {far}, u32[]) copy-start(%p)"
    assert traffic(ahead, f"ROOT %d = {near} copy-done(%s)") == 8192
    back = [f"%n = {near} negate(%p)", f"%s = ({far}, {near}, u32[]) copy-start(%n)", f"ROOT %d = {far} copy-done(%s)"]
    assert traffic(*back) == 8192 + 8192
    part = "f32[16,32]{1,0:S(1)}"
    pieces = [
        f"%s{start} = (({far}), {part}, s32[]) slice-start(%p), slice={{[{start}:{start + 16}], [0:32]}}"
        for start in (0, 16, 32, 48)
    ]
    assert traffic(*pieces, f"ROOT %d = {part} slice-done(%s0)") == 8192
    gathered = f"%s = ({far}, f32[256,32]{{1,0}}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={{0}}"
    assert traffic(gathered) == 8192 + 4 * 8192


def test_a_fusion_writes_only_the_updates_of_arrays_that_it_updates_in_place():
    """One of several results is a stack of which a slice is replaced, another one is passed on."""
    stack, part, passed = "f32[30,64,32]{2,1,0}", "f32[64,32]{1,0}", "f32[500]{0}"
    results = "f32[30,64,32], f32[64,32], f32[500]"
    fused = f"""%update (a: f32[30,64,32], b: f32[64,32], c: s32[], d: f32[500]) -> ({results}) {{
  %a = {stack} parameter(0)
  %b = {part} parameter(1)
  %c = s32[] parameter(2)
  %d = {passed} parameter(3)
  %n = {part} negate(%b)
  %o = f32[1,64,32]{{2,1,0}} bitcast(%n)
  %u = {stack} dynamic-update-slice(%a, %o, %c, %c, %c)
  ROOT %t = ({stack}, {part}, {passed}) tuple(%u, %n, %d)
}}
"""
    lines = [f"%s = {stack} parameter(1)", "%i = s32[] parameter(2)", f"%q = {passed} parameter(3)"]
    call = f"ROOT %f = ({stack}, {part}, {passed}) fusion(%s, %p, %i, %q), kind=kOutput, calls=%update"
    # A part and its index are read; the part and the slice are written.
    assert read_program(make_module(*lines, call, rest=fused), MESH).bytes == 8192 + 4 + 2 * 8192


def test_a_fusion_reads_only_the_slices_that_a_fusion_inside_of_it_takes():
    stack, part = "f32[30,64,32]{2,1,0}", "f32[64,32]{1,0}"
    inner = f"""%inner (a: f32[30,64,32], b: s32[]) -> f32[64,32] {{
  %a = {stack} parameter(0)
  %b = s32[] parameter(1)
  %d = f32[1,64,32]{{2,1,0}} dynamic-slice(%a, %b, %b, %b), dynamic_slice_sizes={{1,64,32}}
  ROOT %e = {part} bitcast(%d)
}}
"""
    outer = f"""%outer (a: f32[30,64,32], b: s32[]) -> f32[64,32] {{
  %a = {stack} parameter(0)
  %b = s32[] parameter(1)
  %g = {part} fusion(%a, %b), kind=kLoop, calls=%inner
  ROOT %h = {part} negate(%g)
}}
"""
    lines = [f"%s = {stack} parameter(1)", "%i = s32[] parameter(2)"]
    call = f"ROOT %f = {part} fusion(%s, %i), kind=kOutput, calls=%outer"
    assert read_program(make_module(*lines, call, rest=inner + outer), MESH).bytes == 8192 + 8192


def test_a_collective_that_several_fusions_continue_is_read_and_written_once():
    fused = """%{0} (q: f32[64,32], r: f32[256,32], s: f32[500]) -> (f32[256,32], f32[500]) {{
  %q = f32[64,32]{{1,0}} parameter(0)
  %r = f32[256,32]{{1,0}} parameter(1)
  %s = f32[500]{{0}} parameter(2)
  %g = f32[256,32]{{1,0}} all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={{chain_id="7"}}
  %e = f32[500]{{0}} exponential(%s)
  ROOT %t = (f32[256,32]{{1,0}}, f32[500]{{0}}) tuple(%g, %e)
}}
"""
    lines = ["%r = f32[256,32]{1,0} parameter(1)", "%s = f32[500]{0} parameter(2)"]
    lines += [
        f"%f.{name} = (f32[256,32]{{1,0}}, f32[500]{{0}}) fusion(%p, %r, %s), kind=kOutput, calls=%{name}"
        for name in ("start", "end")
    ]
    text = make_module(*lines, rest=fused.format("start") + fused.format("end"))
    assert read_program(text, MESH).bytes == 8192 + 4 * 8192 + 2 * (2000 + 2000)


def test_replica_groups_are_parsed():
    assert parse_replica_groups("replica_groups=[4,2]<=[2,4]T(1,0)", 8) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert parse_replica_groups("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", 8) == [[0, 1]]
    assert parse_replica_groups("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 8) == [[0, 2, 4, 6]]
    laid = "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'a'}"
    assert parse_replica_groups(laid, 8) == [[0, 4, 2, 6]]
    assert find_mesh_axes([0, 4], MESH) == ("fsdp",)


def test_a_program_compiled_on_this_machine_is_counted():
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    compiled = jax.jit(run).lower(jnp.ones((64, 32)), jnp.ones((6, 32, 32))).compile()
    program = read_program(compiled.as_text(), {"data": 1})
    if program.flops:  # some CPUs have their products in library calls, which the text does not tell
        assert program.flops == 6 * 2 * 64 * 32 * 32
        assert program.product_flops == {"f32": program.flops}
    assert program.unknown_loops == 0
    assert program.bytes > 6 * 32 * 32 * 4


GEMM = """{"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}"""


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_that_a_gpu_passes_to_cublas_are_counted(target):
    line = f'(f32[8,4]{{1,0}}, s8[64]{{0}}) custom-call(%p, %p), custom_call_target="{target}", backend_config={GEMM}'
    program = read_program(make_module(f"%c = {line}"), MESH)
    assert (program.flops, program.kernel_calls) == (2 * 8 * 4 * 32, 0)


@pytest.mark.parametrize(
    ("target", "calls"), [("tpu_custom_call", 1), ("__cudnn$fmhaSoftmaxBackward", 1), ("Sharding", 0)]
)
def test_calls_of_attention_kernels_are_counted(target, calls):
    line = f'%c = f32[8]{{0}} custom-call(%p), custom_call_target="{target}"'
    program = read_program(make_module(line), MESH)
    assert (program.flops, program.kernel_calls) == (0, calls)


def test_kernels_are_counted_by_name_and_with_the_attention_that_they_are_in():
    forward = "jit(step)/jvp(DiT)/attention:splash:Full:self/pallas_call/splash_mha_fwd"
    backward = "jit(step)/transpose(jvp(DiT))/attention:splash:Full:self/splash_mha_dkv"
    lines = [
        f'%a = f32[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", metadata={{op_name="{forward}"}}',
        f'%b = f32[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", metadata={{op_name="{backward}"}}',
        '%c = f32[8]{0} custom-call(%p), custom_call_target="TopK", metadata={op_name="jit(step)/top_k"}',
        '%d = f32[8]{0} custom-call(%p), custom_call_target="Sharding"',
        '%e = f32[8]{0} negate(%p), metadata={op_name="jit(step)/attention:chunked:TimeOnly:cross/neg"}',
    ]
    program = read_program(make_module(*lines), MESH)
    splash = {"tpu_custom_call splash_mha_fwd": 1, "tpu_custom_call splash_mha_dkv": 1}
    assert program.kernels == splash | {"TopK": 1}
    assert program.attention == {("splash", "Full", "self"): splash, ("chunked", "TimeOnly", "cross"): {}}
    assert program.kernel_calls == 2


def test_a_kernel_with_metadata_on_lines_of_its_own_is_read_as_one_instruction():
    call = 'custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
    name = "jit(f)/attention:splash:Full:self/splash_mha_dq/pallas_call"
    rest = f'"xprof_metadata":"{{\\"block_q\\": 512}}"\n}}}}, metadata={{op_name="{name}"}}'
    program = read_program(make_module(f"%a = f32[8]{{0}} {call}{rest}", "%b = f32[8]{0} negate(%a)"), MESH)
    kernels = {"tpu_custom_call splash_mha_dq": 1}
    assert (program.kernels, program.attention) == (kernels, {("splash", "Full", "self"): kernels})
    assert program.bytes == 64 * 32 * 4 + 8 * 4 + 2 * 8 * 4


def test_products_are_counted_by_dtype_and_by_whether_they_are_recomputed():
    product = "dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    lines = [
        f"%a = f32[64,64]{{1,0}} {product}",
        f"%b = f32[64,64]{{1,0}} {product}, operand_precision={{highest,highest}}",
        f'%c = f32[64,64]{{1,0}} {product}, metadata={{op_name="jit(f)/checkpoint/rematted_computation/dot_general"}}',
        "%h = bf16[64,32]{1,0} convert(%p)",
        f"%d = bf16[64,64]{{1,0}} {product.replace('%p', '%h')}",
    ]
    program, flops = read_program(make_module(*lines), MESH), 2 * 64 * 64 * 32
    assert program.product_flops == {"f32": 2 * flops, "f32 highest": flops, "bf16": flops}
    assert (program.flops, program.recomputed_flops) == (4 * flops, flops)


SLICED_MESH = {"data": 2, "fsdp": 4, "tensor": 1, "context": 2}
SLICES = {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
"""Four slices of four devices, 0 and 1 along fsdp, 0 and 2 along data."""


def make_transfer(attributes: str) -> str:
    done = "%done = (f32[64,32]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true"
    recv = "(f32[64,32]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true"
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    return (
        "HloModule jit_step\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %token = token[] after-all()\n"
        f"  %recv = {recv}, frontend_attributes={{{handler}{attributes}}}\n  {done}\n}}\n"
    )


@pytest.mark.parametrize(
    ("kind", "target", "expected", "axes", "moved"),
    [
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', "all-reduce", ("data", "fsdp"), 2 * 3 / 4 * 8192),
        ("ALL_GATHER", "{{100000,200000},{100001,200001}}", "all-gather", ("fsdp",), 8192 / 2),
        ("ALL_REDUCE", "{{100000,300000},{200001,400001}}", "all-reduce", ("data",), 8192),
        ("REDUCE_SCATTER", "{{100000,300000}}", "reduce-scatter", ("data",), 8192),
        ("ALL_TO_ALL", "{{100000,100001,200000,200001}}", "all-to-all", ("fsdp",), 8192 / 2),
        ("ONE_TO_ONE", "{{100002->200000},{200002->100000}}", "collective-permute", ("fsdp",), 8192),
    ],
)
def test_transfers_between_slices_are_read_with_kind_axes_and_bytes(kind, target, expected, axes, moved):
    attributes = f",_xla_megascale_target={target},_xla_megascale_transfer_type={kind!r}".replace("'", '"')
    program = read_program(make_transfer(attributes), SLICED_MESH, slices=SLICES)
    (transfer,) = program.slice_transfers.values()
    assert (transfer.kind, transfer.axes, transfer.bytes, transfer.count) == (expected, axes, moved, 1)
    assert transfer.between_slices
    assert not program.collectives


def test_other_receives_are_no_transfers_between_slices():
    assert not read_program(make_transfer(""), SLICED_MESH, slices=SLICES).slice_transfers


def test_a_group_inside_a_slice_is_that_of_the_slices_own_mesh():
    """Each slice has a program of its own four devices, 2 along fsdp and 2 along context."""
    gather = "%c = f32[8]{0} all-gather(%p), replica_groups={{0,2},{1,3}}, dimensions={0}"
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[64,32]{{1,0}} parameter(0)\n  {gather}\n}}\n"
    (part,) = read_program(text, SLICED_MESH, slices=SLICES).collectives.values()
    assert part.axes == ("fsdp",)
