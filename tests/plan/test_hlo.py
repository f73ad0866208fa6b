"""Reading of compiled programs' text: forms that compilers for TPU, GPU and CPU write."""

import types

import numpy as np
import pytest

from mmx.parallel.exchange import FURTHER
from mmx.plan import hlo, hlo_text
from mmx.plan.hlo import Collective

MESH = types.SimpleNamespace(shape={"data": 2, "expert": 2, "tensor": 4})


def program(lines, before=""):
    """A program of one entry computation; the last line is its root."""
    *lines, last = [line.strip() for line in lines.strip().splitlines()]
    body = "\n".join([*(f"  {line}" for line in lines), f"  ROOT {last}"])
    return f"HloModule jit_f, is_scheduled=true\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n" \
           f"{body}\n}}\n"


def found(text, mesh=MESH):
    return hlo.collectives(text, mesh)


# Groups of a mesh of 2 x 2 x 4, each axis or pair of axes in every form.
GROUPS = [
    ("{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", ("tensor",)),
    ("[4,4]<=[16]", ("tensor",)),
    ("mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", ("tensor",)),
    ("{{0,4},{1,5},{2,6},{3,7},{8,12},{9,13},{10,14},{11,15}}", ("expert",)),
    ("[8,2]<=[2,2,4]T(0,2,1)", ("expert",)),
    ("mesh['a'=2,'b'=2,'c'=4] {'b'}", ("expert",)),
    ("mesh['a'=4,'c'=4] {'a':(2)2}", ("expert",)),
    ("[8,2]<=[2,8]T(1,0)", ("data",)),
    ("mesh['a'=4,'c'=4] {'a':(1)2}", ("data",)),
    ("[4,4]<=[4,4]T(1,0)", ("data", "expert")),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_0'}", ("data", "expert")),
    ("mesh['a'=2,'b'=2,'c'=4] {'a','c'}", ("data", "tensor")),
    ("[2,8]<=[2,2,4]T(1,0,2)", ("data", "tensor")),
    ("{}", ("data", "expert", "tensor")),
    ("{{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}", ("data", "expert", "tensor")),
    ("mesh['a'=16] {'a'}", ("data", "expert", "tensor")),
    ("[8,2]<=[16]", ("tensor",)),
    ("mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}", ("data", "expert")),
]


@pytest.mark.parametrize("groups, axes", GROUPS, ids=[groups for groups, _ in GROUPS])
def test_groups_span_axes(groups, axes):
    text = program(f"""%p = bf16[8,128]{{1,0}} parameter(0)
        %all-reduce.1 = bf16[8,128]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, \
use_global_device_ids=true, to_apply=%add""")
    (one,) = found(text)
    assert (one.kind, one.axes, one.count, one.bytes) == ("all-reduce", axes, 1, 8 * 128 * 2)
    whole = int(np.prod([MESH.shape[axis] for axis in axes]))
    assert one.group == (2 if groups == "[8,2]<=[16]" else whole)


def test_groups_list_every_device_once():
    for groups, _ in GROUPS:
        ids = hlo.replica_groups(f"replica_groups={groups}, x=1", 16)
        assert sorted(ids.reshape(-1)) == list(range(16)), groups


def test_an_unknown_form_of_groups_is_not_passed_over():
    with pytest.raises(ValueError, match="replica groups"):
        hlo.replica_groups("replica_groups=tree(0,1)", 2)


def test_text_without_a_program_is_not_passed_over():
    with pytest.raises(ValueError, match="ENTRY"):
        found("module @jit_f {}")


TENSOR = "replica_groups=[4,4]<=[16]"
KINDS = {
    "all-gather": ("""%p = bf16[2,128]{1,0} parameter(0)
        %g = bf16[8,128]{1,0} all-gather(%p), channel_id=1, GROUPS, dimensions={0}""", 2048, 1536),
    "all-gather async": ("""%p = bf16[2,128]{1,0} parameter(0)
        %s = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%p), GROUPS, dimensions={0}
        %d = bf16[8,128]{1,0} all-gather-done(%s)""", 2048, 1536),
    "reduce-scatter": ("""%p = f32[8,128]{1,0} parameter(0)
        %r = f32[2,128]{1,0} reduce-scatter(%p), GROUPS, dimensions={0}, to_apply=%add""",
                       4096, 3072),
    "reduce-scatter async": ("""%p = f32[8,128]{1,0} parameter(0)
        %s = ((f32[8,128]{1,0}), f32[2,128]{1,0}) reduce-scatter-start(%p), GROUPS, dimensions={0}
        %d = f32[2,128]{1,0} reduce-scatter-done(%s)""", 4096, 3072),
    "all-reduce": ("""%p = f32[8,128]{1,0} parameter(0)
        %q = s8[128]{0} parameter(1)
        %r = (f32[8,128]{1,0}, s8[128]{0}) all-reduce(%p, %q), GROUPS, to_apply=%add""",
                   4224, 6336),
    "all-reduce async": ("""%p = f32[8,128]{1,0} parameter(0)
        %s = f32[8,128]{1,0} all-reduce-start(%p), GROUPS, to_apply=%add
        %d = f32[8,128]{1,0} all-reduce-done(%s)""", 4096, 6144),
    "all-to-all": ("""%p = bf16[8,4,256]{2,0,1:T(8,128)(2,1)S(1)} parameter(0)
        %a = bf16[8,4,256]{2,0,1:T(8,128)(2,1)S(1)} all-to-all(%p), GROUPS, dimensions={1}""",
                   16384, 12288),
    "all-to-all async": ("""%p = bf16[8,4,256]{2,1,0} parameter(0)
        %s = ((bf16[8,4,256]{2,1,0}), bf16[8,4,256]{2,1,0}) all-to-all-start(%p), GROUPS
        %d = bf16[8,4,256]{2,1,0} all-to-all-done(%s)""", 16384, 12288),
    "ragged-all-to-all": ("""%p = bf16[16,8]{1,0} parameter(0)
        %o = bf16[32,8]{1,0} parameter(1)
        %n = s32[4]{0} parameter(2)
        %a = bf16[32,8]{1,0} ragged-all-to-all(%p, %o, %n, %n, %n, /*index=5*/%n), GROUPS""",
                          256, 192),
}


@pytest.mark.parametrize("name", KINDS)
def test_bytes_of_each_kind(name):
    lines, size, sent = KINDS[name]
    (one,) = found(program(lines.replace("GROUPS", TENSOR)))
    assert one == Collective(name.removesuffix(" async"), ("tensor",), size, 1, 4)
    assert one.sent == sent


@pytest.mark.parametrize("shift, short, way", [(1, 1, "tensor"), (2, 2, "tensor"),
                                               (3, 1, "tensor"), (4, 1, "expert")])
def test_permutes_know_their_way(shift, short, way):
    block = 4 if shift < 4 else 8
    pairs = ",".join(f"{{{i},{i - i % block + (i + shift) % block}}}" for i in range(16))
    text = program(f"""%p = f32[64]{{0}} parameter(0)
        %s = (f32[64]{{0}}, f32[64]{{0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) \
collective-permute-start(%p), channel_id=1, source_target_pairs={{{pairs}}}
        %d = f32[64]{{0}} collective-permute-done(%s)""")
    (one,) = found(text)
    assert one == Collective("collective-permute", (way,), 256, 1, MESH.shape[way], short)


def test_exchanges_with_oneself_are_none():
    text = program("""%p = f32[64]{0} parameter(0)
        %r = f32[64]{0} all-reduce(%p), replica_groups=[16,1]<=[16], to_apply=%add
        %c = f32[64]{0} collective-permute(%r), source_target_pairs={{0,0},{1,1}}""")
    assert found(text) == []


LOOP = """%outer_condition (c: (s32[], f32[64], s32[])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[64]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%c), index=2
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%inner_compare (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %le = pred[] compare(%a, %three), direction=LE
}

%inner_condition (c: (s32[], f32[64])) -> pred[] {
  %c = (s32[], f32[64]{0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %f = pred[] fusion(%n), kind=kLoop, calls=%inner_compare
}

%inner_body (b: (s32[], f32[64])) -> (s32[], f32[64]) {
  %b = (s32[], f32[64]{0}) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two)
  %x = f32[64]{0} get-tuple-element(%b), index=1
  %r = f32[64]{0} all-reduce(%x), replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %t = (s32[], f32[64]{0}) tuple(%next, %r)
}

%outer_body (b: (s32[], f32[64], s32[])) -> (s32[], f32[64], s32[]) {
  %b = (s32[], f32[64]{0}, s32[]) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %x = f32[64]{0} get-tuple-element(%b), index=1
  %r = f32[64]{0} all-reduce(%x), replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  %start = s32[] constant(-1)
  %in = (s32[], f32[64]{0}) tuple(%start, %r)
  %w = (s32[], f32[64]{0}) while(%in), condition=%inner_condition, body=%inner_body
  %y = f32[64]{0} get-tuple-element(%w), index=1
  %l = s32[] get-tuple-element(%b), index=2
  ROOT %t = (s32[], f32[64]{0}, s32[]) tuple(%next, %y, %l)
}
"""


def test_loops_multiply_and_nest():
    """Outer: from 2 below 7, its limit in the tuple. Inner: from -1 to 3 by 2, in a fusion."""
    text = program("""%p = f32[64]{0} parameter(0)
        %two = s32[] constant(2)
        %begin = s32[] copy(%two)
        %seven = s32[] constant(7)
        %in = (s32[], f32[64]{0}, s32[]) tuple(%begin, %p, %seven)
        %w = (s32[], f32[64]{0}, s32[]) while(%in), condition=%outer_condition, body=%outer_body
        %y = f32[64]{0} get-tuple-element(%w), index=1""", LOOP)
    counts = {one.axes: one.count for one in found(text)}
    assert counts == {("data",): 5, ("tensor",): 5 * 3}
    assert hlo.open_loops(text) == {}


def test_a_known_count_goes_before_all():
    text = program("""%p = f32[64]{0} parameter(0)
        %z = s32[] constant(0)
        %in = (s32[], f32[64]{0}) tuple(%z, %p)
        %w = (s32[], f32[64]{0}) while(%in), condition=%inner_condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"11"},"known_init_step":{"init":"0","step":"1"}}
        %y = f32[64]{0} get-tuple-element(%w), index=1""", LOOP)
    assert [one.count for one in found(text)] == [11]


UNTIL = """%until (c: (s32[], f32[64], s32[])) -> pred[] {
  %c = (s32[], f32[64]{0}, s32[]) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %l = s32[] get-tuple-element(%c), index=2
  ROOT %lt = pred[] compare(%n, %l), direction=LT
}

%piece (x: f32[64], n: s32[]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %s = f32[16]{0} dynamic-slice(%x, %n), dynamic_slice_sizes={16}
}

%blocks (b: (s32[], f32[64], s32[])) -> (s32[], f32[64], s32[]) {
  %b = (s32[], f32[64]{0}, s32[]) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %x = f32[64]{0} get-tuple-element(%b), index=1
  %s = f32[16]{0} fusion(%x, %n), kind=kLoop, calls=%piece
  %r = f32[16]{0} all-reduce(%s), replica_groups=[4,4]<=[16], to_apply=%add
  %l = s32[] get-tuple-element(%b), index=2
  ROOT %t = (s32[], f32[64]{0}, s32[]) tuple(%next, %x, %l)
}
"""


def test_a_loop_whose_bounds_are_data_is_named_and_counts_its_pieces():
    """Blocks of 16 out of 64, up to a limit that is an argument: four at most."""
    def text(body):
        return program(f"""%p = f32[64]{{0}} parameter(0)
            %limit = s32[] parameter(1)
            %z = s32[] constant(0)
            %in = (s32[], f32[64]{{0}}, s32[]) tuple(%z, %p, %limit)
            %search = (s32[], f32[64]{{0}}, s32[]) while(%in), condition=%until, body={body}
            %y = f32[64]{{0}} get-tuple-element(%search), index=1""", UNTIL)

    assert hlo.open_loops(text("%blocks")) == {"search": 4}
    assert [(one.count, one.bytes) for one in found(text("%blocks"))] == [(4, 64)]
    whole = text("%blocks").replace("fusion(%x, %n), kind=kLoop, calls=%piece", "slice(%x)")
    assert hlo.open_loops(whole) == {"search": 1}
    rare = text("%blocks").replace("body=%blocks", 'body=%blocks, metadata={op_name="jit(f)/'
                                   f'{FURTHER}/while"}}')
    assert hlo.open_loops(rare) == {"search": 0} and found(rare) == []


# A TPU overlaps one gather with two products: the same line stands in three fusions.
SPREAD = """%begin (a: bf16[2,64]) -> (bf16[2,64], bf16[8,64], u32[]) {
  %a = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=3, replica_groups=[4,4]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[2,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) custom-call(%g.1), \
custom_call_target="AsyncCollectiveStart"
}

%meanwhile (a: bf16[2,64], b: bf16[64,32]) -> bf16[2,32] {
  %a = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  %g.2 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=3, replica_groups=[4,4]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %v = bf16[2,32]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%end (a: bf16[2,64], b: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(1)
  %g.3 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=3, replica_groups=[4,4]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(%b, %g.3), \
custom_call_target="AsyncCollectiveDone"
}

%offloaded (a: bf16[8,64], t: token[]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %t = token[] parameter(1)
  ROOT %r = bf16[8,64]{1,0} all-reduce(%a), replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
}

%all-reduce-scatter.1 (a: bf16[8,64], i: s32[]) -> bf16[2,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %r = bf16[8,64]{1,0} all-reduce(%a), replica_groups=[4,4]<=[16], to_apply=%add
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = bf16[2,64]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={2,64}
}
"""


def test_a_tpus_own_forms_count_once():
    text = program("""%p = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
        %q = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
        %i = s32[] parameter(2)
        %s = (bf16[2,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%begin
        %x = bf16[8,64]{1,0} get-tuple-element(%s), index=1
        %m = bf16[2,32]{1,0} fusion(%p, %q), kind=kOutput, calls=%meanwhile
        %d = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%p, %x), kind=kCustom, calls=%end
        %t = token[] after-all()
        %o = ((bf16[8,64]{1,0}, token[]), bf16[8,64]{1,0}) call-start(%d, %t), \
async_execution_thread="sparsecore", to_apply=%offloaded
        %e = bf16[8,64]{1,0} call-done(%o)
        %f = bf16[2,64]{1,0} fusion(%e, %i), kind=kCustom, calls=%all-reduce-scatter.1""", SPREAD)
    assert set(found(text)) == {
        Collective("all-gather", ("tensor",), 1024, 1, 4),
        Collective("all-reduce", ("data",), 1024, 1, 2),
        Collective("reduce-scatter", ("tensor",), 1024, 1, 4)}
    assert hlo.dots(text) == 2 * 2 * 64 * 32


def test_the_heavier_branch_counts():
    branches = """%light (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} all-reduce(%a), replica_groups=[4,4]<=[16], to_apply=%add
}

%heavy (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%a), replica_groups={}, to_apply=%add
  ROOT %q = f32[64]{0} all-reduce(%r), replica_groups={}, to_apply=%add
}
"""
    for names in ("branch_computations={%heavy, %light}",
                  "true_computation=%light, false_computation=%heavy"):
        text = program(f"""%p = f32[64]{{0}} parameter(0)
            %c = pred[] parameter(1)
            %r = f32[64]{{0}} conditional(%c, %p, %p), {names}""", branches)
        assert found(text) == [Collective("all-reduce", ("data", "expert", "tensor"), 256, 2, 16)]


DOTS = {
    "plain": ("f32[8,16]{1,0}", "f32[16,32]{1,0}", "f32[8,32]{1,0} dot(%a, %b), "
              "lhs_contracting_dims={1}, rhs_contracting_dims={0}", "f32", 2 * 8 * 16 * 32),
    "batch": ("bf16[4,8,16]{2,1,0}", "bf16[4,16,32]{2,1,0}", "f32[4,8,32]{2,1,0} dot(%a, %b), "
              "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
              "rhs_contracting_dims={1}", "bf16", 2 * 4 * 8 * 16 * 32),
    "tpu": ("s8[8,16]{1,0:T(8,128)(4,1)}", "s8[16,32]{1,0}", "s32[8,32]{1,0} convolution(%a, %b), "
            "dim_labels=bf_io->bf", "s8", 2 * 8 * 16 * 32),
    "tpu transposed": ("bf16[8,16]{1,0}", "bf16[32,16]{1,0}", "bf16[32,8]{1,0} "
                       "convolution(%a, %b), dim_labels=bf_oi->fb", "bf16", 2 * 8 * 16 * 32),
    "tpu batch": ("bf16[16,256,512]{2,1,0}", "bf16[16,512,128]{2,1,0}", "bf16[16,256,128]{2,1,0} "
                  "convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
                  "dim_labels=0bf_0io->0bf", "bf16", 2 * 16 * 256 * 512 * 128),
    "image": ("f32[1,8,8,3]{3,2,1,0}", "f32[3,3,3,16]{3,2,1,0}", "f32[1,8,8,16]{3,2,1,0} "
              "convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
              "f32", 2 * 22 * 22 * 3 * 16),
    "cublas": ("bf16[8,16]{1,0}", "bf16[16,32]{1,0}", "(bf16[8,32]{1,0}, s8[64]{0}) "
               'custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
               '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":'
               '["1"],"rhs_contracting_dimensions":["0"]}}}', "bf16", 2 * 8 * 16 * 32),
    "pallas": ("bf16[8,16]{1,0}", "bf16[16,32]{1,0}", 'bf16[8,32]{1,0} custom-call(%a, %b), '
               'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{'
               '"body":"TUzv","cost_estimate":{"flops":"777","transcendentals":"0",'
               '"bytes_accessed":"99"}}}', "kernel", 777),
}


@pytest.mark.parametrize("name", DOTS)
def test_operations_of_products(name):
    a, b, line, kind, flops = DOTS[name]
    text = program(f"%a = {a} parameter(0)\n%b = {b} parameter(1)\n%c = {line}")
    assert hlo.dots_by_type(text) == {kind: flops}
    assert hlo.dots(text) == flops


def moved(lines, before=""):
    return hlo.bytes_accessed(program(lines, before))


SLICED = """%take (w: bf16[5,64,32], i: s32[], x: bf16[8,64]) -> bf16[8,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,64,32]{2,1,0} dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,64,32}
  %v = bf16[64,32]{1,0} bitcast(%s)
  %x = bf16[8,64]{1,0} parameter(2)
  ROOT %d = bf16[8,32]{1,0} dot(%x, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%as_seen (w: bf16[5,64,32]) -> bf16[5,64,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  ROOT %c = bf16[5,64,32]{2,0,1} copy(%w)
}

%take_seen (w: bf16[5,64,32], i: s32[]) -> bf16[1,64,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %v = bf16[5,64,32]{2,0,1} fusion(%w), kind=kLoop, calls=%as_seen
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = bf16[1,64,32]{2,1,0} dynamic-slice(%v, %i, %z, %z), dynamic_slice_sizes={1,64,32}
}

%put (w: bf16[5,64,32], u: bf16[64,32], i: s32[]) -> bf16[5,64,32] {
  %w = bf16[5,64,32]{2,1,0} parameter(0)
  %u = bf16[64,32]{1,0} parameter(1)
  %v = bf16[1,64,32]{2,1,0} bitcast(%u)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %r = bf16[5,64,32]{2,1,0} dynamic-update-slice(%w, %v, %i, %z, %z)
}
"""


def test_bytes_of_slices_not_of_what_is_sliced():
    """Of five stacked matrices one is read, or written; 4 bytes are the index."""
    one = 64 * 32 * 2
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %i = s32[] parameter(1)
        %x = bf16[8,64]{1,0} parameter(2)
        %f = bf16[8,32]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%take""", SLICED) == \
        one + 4 + 8 * 64 * 2 + 8 * 32 * 2
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %u = bf16[64,32]{1,0} parameter(1)
        %i = s32[] parameter(2)
        %f = bf16[5,64,32]{2,1,0} fusion(%w, %u, %i), kind=kLoop, calls=%put""", SLICED) == \
        2 * one + 4
    assert moved("""%w = bf16[5,64,32]{2,1,0} parameter(0)
        %i = s32[] parameter(1)
        %f = bf16[1,64,32]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%take_seen""", SLICED) == \
        2 * one + 4


def test_bytes_of_a_tpus_on_chip_memory_do_not_count():
    lines = """%p = f32[256]{0:T(256)} parameter(0)
        %s = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%p)
        %d = f32[256]{0:T(256)S(1)} copy-done(%s)
        %n = f32[256]{0:T(256)S(1)} negate(%d)
        %c = f32[256]{0:T(256)} copy(%n)"""
    assert moved(lines) == 2 * 1024
    # On a GPU the same number names ordinary memory: read and written by each of three lines.
    assert moved(lines.replace(":T(256)", ":").replace("{0:}", "{0}")) == 6 * 1024


def test_the_heaviest_lines_come_first():
    text = program("""%p = f32[64]{0} parameter(0)
        %z = s32[] constant(0)
        %in = (s32[], f32[64]{0}) tuple(%z, %p)
        %w = (s32[], f32[64]{0}) while(%in), condition=%inner_condition, body=%inner_body
        %y = f32[64]{0} get-tuple-element(%w), index=1
        %c = f32[64]{0} copy(%y), metadata={op_name="jit(f)/cut" stack_frame_id=1}""", LOOP)
    (first, told), (second, named) = hlo.heaviest(text, 2)
    assert (first, second) == (2 * 2 * 256, 2 * 256)  # from 0 to 3 by 2: twice
    assert told == "all-reduce -> f32[64] in inner_body (r)"
    assert named == "copy -> f32[64] in main (jit(f)/cut)"
    assert sum(size for size, _ in hlo.heaviest(text, 99)) == hlo.bytes_accessed(text)


def test_sizes_of_element_types():
    sizes = {"pred": 1, "s4": 0.5, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f32": 4, "s64": 8, "c64": 8}
    for name, size in sizes.items():
        assert hlo_text.leaves_of(f"{name}[6,2]{{1,0}}")[0].bytes == 12 * size
    assert [leaf.dims for leaf in hlo_text.leaves_of("((f32[2,3]{1,0}, u32[]), token[], s8[<=7])")
            ] == [(2, 3), (), (), (7,)]


def test_notes_of_a_kernel_on_lines_of_their_own_do_not_end_a_computation():
    call = ('%c = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
            'frontend_attributes={kernel_metadata={NOTES}}')
    text = program(f"""
        %p = f32[8]{{0}} parameter(0)
        {call}
        %r = f32[8]{{0}} add(%c, %p)""")
    notes = '{\n"block_q": 512, "fused": {"a": 1}\n}'
    module = hlo_text.parse(text.replace("{NOTES}", notes))
    assert [line.name for line in module.computations[module.entry].lines] == ["p", "c", "r"]
