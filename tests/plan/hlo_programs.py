"""Text of compiled programs for the tests that read it."""

# A loop within a loop.
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


def program(lines, before=""):
    """A program of one entry computation; the last line is its root."""
    *lines, last = [line.strip() for line in lines.strip().splitlines()]
    body = "\n".join([*(f"  {line}" for line in lines), f"  ROOT {last}"])
    return f"HloModule jit_f, is_scheduled=true\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n" \
           f"{body}\n}}\n"
