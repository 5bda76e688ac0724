"""Collectives and large buffers read off compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.hlo import Program
from vr_jax.sharding import make_mesh

# As the TPU and GPU compilers write them: a start with (operands, results), a mesh for groups.
TEXT = """
HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,16]) -> f32[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %huge = f32[8,16,99999]{2,1,0} broadcast(%p), dimensions={0,1}
  ROOT %r = f32[8,16]{1,0} reduce(%huge), dimensions={2}, to_apply=%add
}

%body (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %t = (s32[], bf16[8,16]{1,0}) parameter(0)
  %w = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %ag = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%w), dimensions={0}
  %agd = bf16[64,16]{1,0} all-gather-done(%ag)
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%w)
}

%condition (c: (s32[], bf16[8,16])) -> pred[] {
  %c = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: bf16[8,16], g: f32[64,16]) -> f32[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %g = f32[64,16]{1,0} parameter(1)
  %init = (s32[], bf16[8,16]{1,0}) tuple(%x)
  %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0"}}
  %fusion = f32[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %ar = (f32[64,16]{1,0}, f32[8,16]{1,0}) all-reduce(%g, %fusion), to_apply=%add
  %big = f32[2000,4]{1,0} broadcast(%x), dimensions={}
  %off = f32[9000,4]{1,0:S(5)} copy(%big)
  ROOT %rs = f32[8,16]{1,0} reduce-scatter(%g), dimensions={0}, to_apply=%add
}
"""


def test_every_trip_of_a_loop_counts():
  found = Program(TEXT).collectives()
  assert found["all-gather"] == (28, 28 * 64 * 16 * 2)
  assert found["all-reduce"] == (1, 2 * (64 * 16 + 8 * 16) * 4)
  assert found["reduce-scatter"] == (1, 64 * 16 * 4)
  assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}


def test_trips_stand_in_the_condition_where_they_are_not_noted():
  """As programs for TPUs have them."""
  noted = 'backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0"}}'
  bound = "constant(28)\n  %i = s32[] get-tuple-element(%c), index=0\n"
  bound += "  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT"
  text = TEXT.replace(noted, "metadata={}")
  text = text.replace("ROOT %less = pred[] constant(true)", f"%bound = s32[]{{:T(128)}} {bound}")
  assert Program(text).collectives() == Program(TEXT).collectives()
  assert Program(TEXT.replace(noted, "metadata={}")).collectives()["all-gather"].count == 1


def test_a_collective_spread_over_fusions_is_one():
  """As programs for TPUs have them: a start, what it runs beside, and its end hold it alike."""
  gather = "%g = bf16[64,16]{1,0} all-gather(%p), channel_id=7, dimensions={0}"
  names = ("start", "beside", "done")
  fused = "".join(
    f"%{name} (p: bf16[8,16]) -> bf16[64,16] {{\n  %p = bf16[8,16]{{1,0}} parameter(0)\n"
    f"  ROOT {gather}\n}}\n\n"
    for name in names
  )
  calls = "".join(
    f"  %f{name} = bf16[64,16]{{1,0}} fusion(%w), kind=kCustom, calls=%{name}\n" for name in names
  )
  text = TEXT.replace("%body (t", f"{fused}%body (t").replace("  %ag = ", f"{calls}  %ag = ")
  found = Program(text).collectives()
  assert found["all-gather"] == (2 * 28, 2 * 28 * 64 * 16 * 2)


def test_buffers_inside_fusions_and_on_the_host_are_none():
  size, shape = Program(TEXT).largest(2000, 99999)
  assert (size, shape) == (2000 * 4 * 4, "f32[2000,4]{1,0}")
  assert Program(TEXT).largest(10**6) == (0, "")


@pytest.mark.parametrize("length", [1, 5])
def test_a_scan_over_sharded_weights_gathers_each_of_them(length):
  mesh = make_mesh([("data", 1), ("fsdp", 8)])
  rows, weights = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))

  def run(x, w):
    def layer(x, w):
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

    return jax.lax.scan(layer, x, w)[0]

  step = jax.jit(run, in_shardings=(rows, weights), out_shardings=rows)
  shapes = (
    jax.ShapeDtypeStruct((4096, 64), jnp.float32),
    jax.ShapeDtypeStruct((length, 64, 64), jnp.float32),
  )
  found = Program(step.lower(*shapes).compile().as_text()).collectives()
  assert found == {"all-gather": (length, length * 64 * 64 * 4)}
