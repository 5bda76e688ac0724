"""The real training step compiled for hardware that is not here: does it fit, what does it cost?

`report(config, target)` builds the step that `train` would run, from shapes alone, compiles it with
the target's own compiler and reads memory, FLOPs and collectives off the result.
"""

import copy
import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipes.batch import RowShape, empty_row
from data_pipes.errors import InputError
from data_pipes.navit_images import blank
from data_pipes.navit_rows import Crop, Ids, Picture, Row, Sample, Shape, build_row, needed_shape
from data_pipes.patch_packing import BLOCK
from data_pipes.prompts import IGNORE
from vr_jax.attention import keys_of_pictures
from vr_jax.flops import count_flops
from vr_jax.hardware import Target, target_devices
from vr_jax.hlo import Collectives, Program
from vr_jax.models.connector import scene_token_count
from vr_jax.models.costs import training_flops
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params
from vr_jax.sharding import batch_sharding, check_rules, make_mesh
from vr_jax.training.loop import accum_steps, state_target
from vr_jax.training.navit_data import navit_work_of
from vr_jax.training.schedule import make_optimizer
from vr_jax.training.start import model_config
from vr_jax.training.step import TrainState, make_step
from vr_jax.training.videorefer_task import trained_parts, videorefer_loss

GIB = 2**30
LENGTHS = 128  # row lengths are assumed in multiples of it


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step with everything it takes as shapes."""

  config: ConfigDict
  cfg: VideoReferConfig
  shape: RowShape | Shape
  mesh: Mesh
  run: Callable[[TrainState, Any], Any]
  state: TrainState
  rows: dict[str, jax.ShapeDtypeStruct]

  @property
  def parts(self) -> int:
    """Micro-batches."""
    return self.rows["tokens"].shape[0]

  @property
  def device_rows(self) -> int:
    """Rows of a micro-batch on one device."""
    tokens = self.rows["tokens"]
    return tokens.sharding.shard_shape(tokens.shape)[1]


def make_abstract_step(config: ConfigDict, mesh: Mesh) -> Step:
  """The step of a config on a mesh whose devices need not exist; run nothing under that mesh.

  Raises:
    InputError: as `loop.train` for the same config.
  """
  if config.task != "videorefer":
    raise InputError(f"config.task={config.task!r}: vr compile knows the task videorefer only")
  cfg = model_config(config)
  check_rules(config.sharding_rules, mesh)
  sharding = batch_sharding(mesh, config.sharding_rules, leading=1)
  parts = accum_steps(config, sharding)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  optimizer = make_optimizer(config, shapes, total_steps=1000, data_size=10**6)
  state = state_target(config, shapes, optimizer, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  step = make_step(
    videorefer_loss(config, cfg), optimizer, accum_mean=config.accum_mean, shardings=shardings
  )
  leading = parts, config.input.batch_size // parts
  if cfg.img.kind == "navit":
    shape, row = assumed_packed_row(config, cfg)
  else:
    shape = assumed_shape(config, cfg)
    row = empty_row(shape)
  rows = {
    name: jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype, sharding=sharding)
    for name, array in row.items()
  }
  return Step(config, cfg, shape, mesh, step, state, rows)


def assumed_shape(config: ConfigDict, cfg: VideoReferConfig) -> RowShape:
  """The row shape of a config without its data: `input.row_*` where set, else the recipe's rows.

  Those hold a video, one object and 150 text ids (the published mixtures' mean), with as many mask
  frames as `input.masks` allows.
  """
  masks = 1 if config.input.masks == "single" else config.input.max_mask_frames
  scene_tokens = scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid)
  objects = config.input.row_objects or 1
  length = scene_tokens + objects * cfg.region.tokens + 150
  return RowShape(
    frames=config.input.row_frames or cfg.num_frames + masks,
    scene=cfg.num_frames,
    objects=objects,
    object_frames=config.input.row_object_frames or masks,
    length=config.input.row_length or -(-length // LENGTHS) * LENGTHS,
    image_size=cfg.img.image_size,
    grid=cfg.img.grid,
    tokens_per_object=cfg.region.tokens,
    scene_tokens=scene_tokens,
  )


TEXT, SUPERVISED = 150, 100  # ids of a sample beside its visual tokens, and targets among them


@functools.cache
def _packed(cfg: VideoReferConfig, length: int, objects: int) -> tuple[Shape, Row]:
  K, s = cfg.region.tokens, cfg.img.merge
  lite = cfg.region.kind == "cells_in_context"

  def picture(height: int, width: int, merge: int = 1) -> Picture:
    return Picture(blank(height * width, 3 * cfg.img.patch_size**2), (height, width), merge)

  def sample() -> Sample:
    # A frame has its share of 7/8 of the tokens, as the paper's clips have on average.
    tokens = max(1, 7 * cfg.img.max_tokens // 8 // cfg.num_frames)
    scene = [] if lite else [picture(s, s * tokens, s) for _ in range(cfg.num_frames)]
    beside = {"local": picture(16, 16), "whole": picture(24, 24)} if lite else {}
    crops = [
      Crop(picture(10, 10), np.ones((10, 10), np.uint8), (0, 0, 8, 8, 9, 9), **beside)
      for _ in range(objects)
    ]
    visual = [ids.image] * (tokens * len(scene)) + [ids.region] * (K * objects)
    labels = np.full(len(visual) + TEXT, IGNORE)
    labels[-SUPERVISED:] = 0
    return Sample(np.array(visual + [0] * TEXT), labels, scene, crops, video=not lite)

  ids = Ids(cfg.llm.vocab_size - 2, cfg.llm.vocab_size - 1, K)
  samples = [sample()]
  samples += [sample() for _ in range(length // len(samples[0].ids) - 1)]
  tower_row = -(-cfg.img.max_tokens // BLOCK) * BLOCK  # holds an image of all tokens
  shape = needed_shape([samples], merge=s, tokens_per_object=K, patches=tower_row)
  shape = dataclasses.replace(shape, length=length)
  return shape, build_row(samples, shape, ids)


def assumed_packed_row(config: ConfigDict, cfg: VideoReferConfig) -> tuple[Shape, Row]:
  """Shape and content of a packed row of a config without its data, for pictures of any size.

  It holds as many samples as fit `input.pack` slots: a video of `num_frames` frames with one object
  and 150 text ids; of PixelRefer-Lite, an object on 8 frames. `input.row_objects` says otherwise.

  Raises InputError: no `input.pack`, or less than a sample takes.
  """
  if not config.input.pack:
    raise InputError(
      "config.input.pack=0: pictures of any size come in packed rows; accepted: slots"
    )
  objects = config.input.row_objects or (8 if cfg.region.kind == "cells_in_context" else 1)
  return _packed(cfg, config.input.pack, objects)


# --- Compiling --------------------------------------------------------------------------------


class DoesNotFit(Exception):
  """The compiler found that the program needs more memory than a device has; holds its words."""


def compile_step(step: Step) -> tuple[Any, str]:
  """The compiled step and its optimised HLO.

  Raises:
    DoesNotFit: the TPU compiler says so (the GPU compiler never does: compare the peak).
  """
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(step.mesh):
    lowered = step.run.lower(step.state, step.rows)
    # The TPU compiler writes its program down: printing a large one of v5p or v6e afterwards fails.
    tpu = step.mesh.devices.flat[0].platform == "tpu"
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if tpu else None
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" in str(error):
        raise DoesNotFit(str(error)) from error
      raise
    if not tpu:
      return compiled, compiled.as_text()
    (dumped,) = Path(folder).glob("*.after_optimizations.txt")
    return compiled, dumped.read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Measured:
  """What one compilation says of a device: bytes at the peak, collectives of a step, and the
  largest array with the vocabulary (or a chunk of it) for an axis. `peak` is None where only the
  compiler's refusal is known, `needs` then its figure in GiB."""

  peak: float | None
  collectives: dict[str, Collectives]
  vocabulary: tuple[float, str] = (0, "")
  needs: float | None = None


def measure(step: Step) -> Measured:
  """Compiles the step and reads the result."""
  try:
    compiled, text = compile_step(step)
  except DoesNotFit as error:
    used = re.search(r"Used ([\d.]+)G of", str(error))
    return Measured(None, {}, needs=float(used[1]) if used else None)
  memory = compiled.memory_analysis()
  # The fake devices of the CPU report no peak.
  peak = getattr(memory, "peak_memory_in_bytes", 0) or (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  program = Program(text)
  size = step.cfg.llm.vocab_size
  vocabulary = program.largest(size, min(step.config.loss_chunk, size))
  return Measured(peak, program.collectives(), vocabulary)


def measure_quickly(config: ConfigDict, mesh: Mesh) -> Measured:
  """`measure` for a decoder of one and of two layers, extrapolated to all of them.

  Peak and collectives grow by a layer's share for each layer; the tower keeps its layers.
  """
  depth = model_config(config).llm.depth
  one, two = (measure(make_abstract_step(with_depth(config, d), mesh)) for d in (1, 2))
  if one.peak is None or two.peak is None:
    return dataclasses.replace(two if two.peak is None else one, needs=None)

  def grown(a, b):
    return a + (depth - 1) * (b - a)

  none = Collectives(0, 0)
  pairs = {
    kind: (one.collectives.get(kind, none), two.collectives.get(kind, none))
    for kind in {**one.collectives, **two.collectives}
  }
  return Measured(
    grown(one.peak, two.peak),
    {kind: Collectives(*map(grown, *pair)) for kind, pair in pairs.items()},
    two.vocabulary,
  )


def with_depth(config: ConfigDict, layers: int) -> ConfigDict:
  """The config with a decoder of that many layers."""
  return _set(config, model=(*config.model, ("llm.depth", layers)))


# --- Accounts ---------------------------------------------------------------------------------


def state_bytes(step: Step) -> dict[str, int]:
  """Bytes of one device that lie there from step to step, by category."""

  def held(tree) -> int:
    return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )

  return {
    "trained parameters": held(step.state.params_train),
    "frozen parameters": held(step.state.params_frozen),
    "optimizer moments": held(step.state.opt_state),
    "batch": held(step.rows),
  }


def saved_bytes(cfg: DecoderConfig, tokens: int, policy: str, tensor: int = 1) -> float:
  """What the decoder's layers keep for the backward pass of `tokens` tokens on one device.

  Matmul outputs are split over `tensor`; estimates to compare policies with, not a promise.
  """
  size = jnp.dtype(cfg.dtype).itemsize
  stream = cfg.width * size  # the layer's input, always kept
  heads = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
  dots = 2 * cfg.width + (heads + 2 * cfg.mlp_dim) / tensor
  kept = {
    "full": 0,
    "offload": 0,
    "dots": dots,
    # also: inputs of the matmuls, both norms in float32, the activation and its product
    "none": 2 * dots + 4 * cfg.width + (heads + 2 * cfg.mlp_dim) / tensor,
  }[policy]
  return cfg.depth * tokens * (stream + kept * size)


def needed_flops(step: Step) -> int:
  """FLOPs that the mathematics asks of a step whose rows are all full."""
  shape, trained = step.shape, trained_parts(step.config, step.cfg)
  if isinstance(shape, Shape):
    _, row = assumed_packed_row(step.config, step.cfg)
    of_row = navit_work_of({k: x[None] for k, x in row.items()}, step.cfg, trained)[1]
    return step.config.input.batch_size * of_row
  supervised = min(step.config.loss_budget or shape.length, 100)
  row = training_flops(step.cfg, trained, shape.frames, shape.length, supervised)
  return step.config.input.batch_size * row


def executed_flops(step: Step) -> int:
  """FLOPs that the step does, recomputation and padding included; plain attention is counted."""
  loss = videorefer_loss(_set(step.config, sharding_rules=()), step.cfg)
  optimizer = make_optimizer(step.config, step.state.params(), total_steps=1000, data_size=10**6)
  run = make_step(loss, optimizer, accum_mean=step.config.accum_mean)
  flops = count_flops(run, step.state, step.rows)
  if not isinstance(step.shape, Shape):
    return flops
  # Counted as if each patch were compared with all of its row; forward alone, the tower is frozen.
  _, row = assumed_packed_row(step.config, step.cfg)
  img, (X, N) = step.cfg.img, row["patch_segments"].shape
  spared = 4 * X * N * (N - keys_of_pictures(jnp.asarray(row["patch_segments"]))) * img.width
  return flops - step.config.input.batch_size * img.layers * spared


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of a step on a target; times in seconds, memory in bytes of one device."""

  config: str
  target: Target
  mesh: dict[str, int]
  batch: int
  device_rows: int
  parts: int
  row: dict[str, int]
  remat: str
  quick: bool
  state: dict[str, int]
  measured: Measured
  executed: int
  needed: int
  parameters: int
  suggestion: str

  @property
  def fits(self) -> bool:
    peak = self.measured.peak
    return peak is not None and peak <= self.target.chip.memory_gib * GIB

  @property
  def collective_bytes(self) -> int:
    return sum(c.bytes for c in self.measured.collectives.values())

  @property
  def fsdp_minimum(self) -> int:
    """Bytes of the bfloat16 parameters: gathered for forward and backward, gradients scattered."""
    return 3 * 2 * self.parameters

  def floors(self) -> dict[str, float]:
    """Seconds a step cannot go below: arithmetic, links, and reading the gathered weights."""
    chip = self.target.chip
    return {
      "compute": self.executed / self.target.chips / (chip.tflops * 1e12),
      "collectives": self.collective_bytes / (self.target.gather_gbs * 1e9),
      "memory": (self.parts * self.fsdp_minimum + 2 * sum(self.state.values()))
      / (chip.memory_gbs * 1e9),
    }

  def to_dict(self) -> dict[str, Any]:
    """For JSON."""
    out = dataclasses.asdict(self)
    out["target"] = str(self.target)
    out["fits"] = self.fits
    out["measured"]["collectives"] = {
      kind: c._asdict() for kind, c in self.measured.collectives.items()
    }
    floors = self.floors()
    return {**out, "chips": self.target.chips, "floors": floors, **self._speed(floors)}

  def _speed(self, floors: dict[str, float]) -> dict[str, float]:
    chip, floor = self.target.chip, max(floors.values())
    at_peak = self.needed / self.target.chips / (chip.tflops * 1e12)
    return {
      "floor": floor,
      "mfu_ceiling": at_peak / floor,
      "expected": max(at_peak / chip.mfu, floor),
      "samples_per_second": self.batch / max(at_peak / chip.mfu, floor),
    }

  def __str__(self) -> str:
    chip, peak = self.target.chip, self.measured.peak
    mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
    row = self.row
    if "tower_rows" in row:
      held = f"{row['tower_rows']} x {row['patches']} patches, {row['objects']} objects"
    else:
      held = (
        f"{row['frames']} frames, {row['objects']} objects of up to {row['object_frames']} frames"
      )
    lines = [
      f"{self.config} on {self.target} ({self.target.chips} chips)",
      f"mesh        {mesh}; batch {self.batch} = {self.parts} x {self.device_rows} rows a device; "
      f"rows of {row['length']} slots, {held}; remat {self.remat}",
    ]
    if self.quick:
      lines.append("quick       compiled with 1 and 2 decoder layers, extrapolated to all of them")
    lines.append(f"memory      a chip has {chip.memory_gib:.2f} GiB")
    lines += [f"  {bytes_ / GIB:8.2f}  {name}" for name, bytes_ in self.state.items()]
    if peak is None:
      needs = f"{self.measured.needs:.2f} GiB" if self.measured.needs else "more than it has"
      lines.append(f"  the compiler refuses: the program needs {needs}")
    else:
      rest = peak - sum(self.state.values())
      lines.append(f"  {rest / GIB:8.2f}  activations, gathered weights, gradients at the peak")
      lines.append(f"  {peak / GIB:8.2f}  peak: {'fits' if self.fits else 'does not fit'}")
      size, shape = self.measured.vocabulary
      lines.append(f"  {size / GIB:8.2f}  of it the largest array along the vocabulary, {shape}")
    lines.append(
      f"FLOPs       {self.executed / 1e12:.0f} T a step, needed {self.needed / 1e12:.0f} T "
      f"(x {self.executed / self.needed:.2f})"
    )
    if peak is not None:
      total = self.collective_bytes
      lines.append(
        f"collectives {total / GIB:.1f} GiB a step = {total / self.fsdp_minimum:.2f} x the FSDP "
        "minimum (3 x 2 bytes x parameters)"
      )
      lines += [
        f"  {c.bytes / GIB:8.2f}  {kind}, {c.count}"
        for kind, c in self.measured.collectives.items()
      ]
      floors = self.floors()
      speed = self._speed(floors)
      parts = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in floors.items())
      lines.append(f"floor       {1e3 * speed['floor']:.0f} ms a step ({parts})")
      lines.append(
        f"speed       MFU at most {100 * speed['mfu_ceiling']:.0f} %; at {100 * chip.mfu:.0f} % "
        f"(published runs) {1e3 * speed['expected']:.0f} ms a step, "
        f"{speed['samples_per_second']:.1f} samples/s"
      )
    return "\n".join([*lines, f"suggestion  {self.suggestion}"])


def report(name: str, config: ConfigDict, target: Target, *, quick: bool = False) -> Report:
  """Compiles the config's step for the target and accounts for it.

  Raises:
    InputError: the config does not go with the target's mesh, or the compiler is not installed.
  """
  mesh = make_mesh(config.mesh, target_devices(target))
  step = make_abstract_step(config, mesh)
  measured = measure_quickly(config, mesh) if quick else measure(step)
  return Report(
    config=name,
    target=target,
    mesh=dict(mesh.shape),
    batch=config.input.batch_size,
    device_rows=step.device_rows,
    parts=step.parts,
    row=dataclasses.asdict(step.shape),
    remat=step.cfg.llm.remat,
    quick=quick,
    state=state_bytes(step),
    measured=measured,
    executed=executed_flops(step),
    needed=needed_flops(step),
    parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.state.params())),
    suggestion=suggest(step, target, measured),
  )


def suggest(step: Step, target: Target, measured: Measured) -> str:
  """The cheapest change that makes it fit, or the best use of the room that is left (estimated)."""
  llm, tensor = step.cfg.llm, step.mesh.shape.get("tensor", 1)
  room = target.chip.memory_gib * GIB
  state = sum(state_bytes(step).values())
  trains = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
    for leaf in jax.tree.leaves(step.state.params_train)
  )

  def saved(rows: int, policy: str) -> float:
    # Without gradients through the decoder nothing is kept.
    return saved_bytes(llm, rows * step.shape.length, policy, tensor)

  # What does not depend on the choice: from the compiler, or state, gradients and a gathered layer.
  layer = 2 * 2 * _elements(step.state.params()["llm"]["layers"]) / llm.depth / tensor
  fixed = state + trains + layer
  if measured.peak is not None:
    fixed = max(state, measured.peak - saved(step.device_rows, llm.remat))
  largest = step.device_rows * step.parts
  choices = [
    (rows, policy)
    for policy in ("none", "dots", "full")
    for rows in (1, 2, 4, 8, 16)
    if largest % rows == 0 and fixed + saved(rows, policy) <= 0.95 * room
  ]
  if choices:
    # The least recomputation, then the fewest micro-batches.
    policy = choices[0][1]
    rows = max(rows for rows, other in choices if other == policy)
    if (rows, policy) == (step.device_rows, llm.remat):
      return "remat and rows are the best that fit (estimated)"
    peak = (fixed + saved(rows, policy)) / GIB
    return (
      f"rows={rows} with remat {policy} should fit, about {peak:.1f} GiB (estimated): "
      f"NAME:rows={rows} and ('llm.remat', '{policy}') in config.model"
    )
  chips = target.chips
  while chips < 1024:
    chips *= 2
    smaller = fixed - (state + trains) * (1 - target.chips / chips)
    if smaller + saved(1, "full") <= 0.95 * room:
      return f"needs about {chips} {target.chip.name} chips with remat full and rows=1 (estimated)"
  return "no number of such chips is enough: split the decoder (tensor=4) or take larger chips"


def _elements(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _set(config: ConfigDict, **fields: Any) -> ConfigDict:
  config = copy.deepcopy(config).unlock()
  config.update(fields)
  return config.lock()
