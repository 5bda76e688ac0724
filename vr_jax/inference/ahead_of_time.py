"""What `vr ask` runs, compiled for hardware that is not here: does it fit, how fast can it be?

`report(cfg, target)` compiles the programs of a model for one size of questions from shapes alone,
as `Model.warm_up` would on the target, and reads their memory off the result.
"""

import dataclasses
import re
import time
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from data_pipes.errors import InputError
from vr_jax.hardware import Target, target_devices
from vr_jax.inference.batching import Engine, Sizes
from vr_jax.inference.opening import weight_shapes
from vr_jax.inference.options import Options
from vr_jax.inference.placement import Placement
from vr_jax.inference.prefix import FRAMES, Visual, head_slots
from vr_jax.inference.programs import Programs, bytes_of
from vr_jax.models.connector import scene_token_count
from vr_jax.models.costs import connector_flops, decoder_flops, tower_flops
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.sharding import make_mesh

GIB = 2**30
HEAD = 24  # ids of the text before the media, as the published templates have
QUESTION = 128  # slots of a question and its objects
STEPS = ("encode", "prefill", "extend", "decode")  # of an answer, in their order


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program: seconds that the compiler took, and bytes of one device."""

  seconds: float
  arguments: float
  results: float  # without those that take the place of an argument
  temporaries: float


class NoRoom(Exception):
  """A TPU's compiler finds that a program needs more memory than a chip has."""


class Measuring(Programs):
  """Programs that are compiled and accounted for in `measured`, not run."""

  def __init__(self, mesh: Mesh, keep: dict[str, str]):
    """`keep`: names of programs, for their optimised HLO."""
    super().__init__(mesh)
    self.measured: dict[str, Compiled] = {}
    self._keep = keep

  def _compile(self, name: Hashable, lowered: Any) -> Any:
    name = name if isinstance(name, str) else str(name[0])  # type: ignore[index]
    began = time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      used = re.search(r"Used ([\d.]+)G of", str(error))
      needs = f"; it needs {used[1]} GiB" if used else ""
      raise NoRoom(f"program {name}: the compiler finds no room for it{needs}") from error
    memory = compiled.memory_analysis()
    self.measured[name] = Compiled(
      time.monotonic() - began,
      memory.argument_size_in_bytes,
      memory.output_size_in_bytes - memory.alias_size_in_bytes,
      memory.temp_size_in_bytes,
    )
    if name in self._keep:
      self._keep[name] = compiled.as_text()
    return compiled


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of answering on a target; bytes of one device, seconds."""

  model: str
  weights: str
  target: Target
  mesh: dict[str, int]
  sizes: Sizes
  programs: dict[str, Compiled]
  memory: dict[str, int]  # by category, as the engine plans it
  floors: dict[str, float]  # of each of STEPS; decode is one step of all rows
  refusal: str  # why it does not fit, "" where it does
  quick: bool = False  # compiled with 1 and 2 decoder layers, extrapolated to all

  @property
  def fits(self) -> bool:
    return not self.refusal

  def to_dict(self) -> dict[str, Any]:
    """For JSON."""
    return {
      **dataclasses.asdict(self),
      "target": str(self.target),
      "fits": self.fits,
      "needs": sum(self.memory.values()),
      "tokens_per_second": self.sizes.rows / self.floors["decode"],
    }

  def __str__(self) -> str:
    mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
    s, room = self.sizes, self.target.chip.memory_gib
    lines = [
      f"{self.model}, {self.weights}, on {self.target} ({self.target.chips} chips), mesh {mesh}",
      f"rows        {s.rows} of {s.slots} slots: prefix {s.prefix}, question {s.question}, answer "
      f"{s.new_tokens}",
      f"memory      a chip has {room:.2f} GiB",
      *(f"  {size / GIB:8.2f}  {name}" for name, size in self.memory.items()),
      f"  {sum(self.memory.values()) / GIB:8.2f}  in all: {self.refusal or 'fits'}",
      "programs    GiB of arguments, results, temporaries; seconds to compile"
      + (" (of 1 and 2 decoder layers; the rest is extrapolated)" if self.quick else ""),
    ]
    lines += [
      f"  {name:<10}{p.arguments / GIB:8.2f} {p.results / GIB:8.2f} {p.temporaries / GIB:8.2f}"
      f"{p.seconds:10.1f}"
      for name, p in self.programs.items()
    ]
    floors = ", ".join(f"{name} {1e3 * self.floors[name]:.1f} ms" for name in STEPS)
    first = sum(self.floors[name] for name in ("encode", "prefill", "extend"))
    lines.append(
      f"floor       {floors}: a first token after {1e3 * first:.0f} ms, then "
      f"{s.rows / self.floors['decode']:.0f} tokens/s of {s.rows} rows"
    )
    return "\n".join(lines)


def report(
  name: str,
  cfg: VideoReferConfig,
  target: Target,
  *,
  weights: str = "bfloat16",
  mesh: Sequence[tuple[str, int]] = (("data", 1), ("tensor", -1)),
  options: Options | None = None,
  quick: bool = False,
) -> Report:
  """Compiles the programs of a model for the target and accounts for them.

  `quick` compiles decoders of one and of two layers, and extrapolates to all of them: the layers of
  the real programs stand one behind the other, so that each costs the compiler the same.

  Args:
    weights: as of `Model`.
    mesh: axes `data` and `tensor` over the target's chips; one size may be -1.

  Raises:
    InputError: the mesh does not suit the model, or the compiler is not installed.
  """
  if cfg.img.kind == "navit":
    raise InputError(f"model {name!r}: --inference knows models of square frames only")
  placement = Placement(make_mesh(mesh, target_devices(target)))
  options, limit = options or Options(), int(target.chip.memory_gib * GIB)
  depths = (1, 2) if quick else (cfg.llm.depth,)
  results = [compile_programs(with_depth(cfg, d), placement, weights, options) for d in depths]
  programs, memory, sizes, refusal = results[-1]
  if quick:

    def grown(one: float, two: float) -> float:
      return one + (cfg.llm.depth - 1) * (two - one)

    first = results[0][0]
    programs = {
      name: Compiled(*map(grown, dataclasses.astuple(first[name]), dataclasses.astuple(program)))
      for name, program in programs.items()
      if name in first
    }
    memory = {name: int(grown(results[0][1][name], size)) for name, size in memory.items()}
  if sum(memory.values()) > limit and not refusal:
    refusal = "does not fit"
  return Report(
    name,
    weights,
    target,
    dict(placement.mesh.shape),  # type: ignore[union-attr]
    sizes,
    programs,
    memory,
    floors(cfg, target, placement, weights, sizes),
    refusal,
    quick,
  )


def compile_programs(
  cfg: VideoReferConfig,
  placement: Placement,
  weights: str,
  options: Options,
  keep: dict[str, str] | None = None,
) -> tuple[dict[str, Compiled], dict[str, int], Sizes, str]:
  """(programs by name, bytes of one device by category, sizes of the rows, the compiler's refusal).

  The optimised HLO of programs that `keep` names is put there.
  """
  placement.check(cfg.llm)
  assert placement.mesh is not None
  scene = options.scene_frames or cfg.num_frames
  tokens = scene_token_count(cfg.connector, scene, cfg.img.grid)
  fused, params = weight_shapes(cfg, weights, placement)
  programs = Measuring(placement.mesh, keep or {})
  sizes = Sizes(
    rows=placement.whole_rows(options.batch_size),
    prefix=head_slots(HEAD) + tokens,
    question=QUESTION,
    new_tokens=options.row_tokens,
  )
  module = VideoRefer(fused)
  try:
    Visual(module, params, programs, placement).compile(scene, HEAD)
    engine = Engine(
      module, params, programs, placement, sizes, eos_ids=(1,), pad_id=0, memory_limit=1 << 60
    )
  except NoRoom as error:
    return programs.measured, {"weights": bytes_of(params)}, sizes, f"does not fit: {error}"
  plan = engine.plan
  memory = {name: getattr(plan, name) for name in ("weights", "rows", "prefixes", "scratch")}
  return programs.measured, memory, sizes, ""


def with_depth(cfg: VideoReferConfig, layers: int) -> VideoReferConfig:
  """The model with a decoder of so many layers."""
  return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, depth=layers))


def floors(
  cfg: VideoReferConfig, target: Target, placement: Placement, weights: str, sizes: Sizes
) -> dict[str, float]:
  """Seconds that each of STEPS cannot go below: arithmetic, or reading the weights and the cache.

  encode and prefill are of one video, extend of one round of questions, decode of one step of all
  rows.
  """
  chip, tensor, data = target.chip, placement.size("tensor"), placement.size("data")
  # Tensor cores take float32 as TF32, at half the rate; a TPU rounds it to bfloat16 by default.
  rate = chip.tflops * 1e12 * (0.5 if weights == "float32" and chip.kind == "gpu" else 1)
  reads = chip.memory_gbs * 1e9
  fused, params = weight_shapes(cfg, weights, placement)
  llm = {k: v for k, v in params["llm"].items() if k != "embedder"}
  table = params["llm"]["embedder"]
  head = bytes_of(table.get("output_embedding", table["input_embedding"]))
  decoder = bytes_of(llm) + head
  frames = -(-cfg.num_frames // FRAMES) * FRAMES
  slots = sizes.prefix
  cache = 2 * fused.llm.depth * fused.llm.kv_heads * fused.llm.head_dim * sizes.slots
  cache *= jax.numpy.dtype(fused.llm.dtype).itemsize * sizes.rows / data / tensor
  connector = connector_flops(cfg.connector, cfg.img.width, cfg.num_frames, cfg.img.grid)
  prefill = connector + decoder_flops(cfg.llm, slots, 0)
  questions = 4 * decoder_flops(cfg.llm, 64, 1)
  return {
    "encode": max(
      frames * tower_flops(cfg.img) / data / tensor / rate, bytes_of(params["img"]) / reads
    ),
    "prefill": max(prefill / tensor / rate, decoder / reads),
    "extend": max(questions / tensor / rate, decoder / reads),
    "decode": (decoder + cache) / reads,
  }
