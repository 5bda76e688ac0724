"""`vr data bench`: the input pipeline alone, with the time of each stage and what limits it.

Times are CPU seconds, so other load on the machine counts less; samples a second a core is one over
those of the whole loader a sample. Grain's own part is what the loader takes for samples in which
there is nothing to do: beside real ones it is less than the noise of decoding.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from data_pipes.batch import Clip, Row, empty_rows, fit_shape, place, rows_of
from data_pipes.clips import media_path, read_clip
from data_pipes.errors import InputError
from data_pipes.loader import make_dataset, prefetched
from data_pipes.packing import plan_rows
from data_pipes.records import Record
from data_pipes.samples import RowRules, RowSource, Samples, record_needs
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import Video, open_video, read_scene, scene_ids

_EMPTY = 4000  # samples that Grain's own time is taken of
_PLANNED = 4000  # samples that packing is tried on, at most
STAGES = ("read", "text", "open", "decode", "resize and masks", "lay out")


@dataclass(frozen=True)
class Options:
  """What is timed, and how.

  Attributes:
    repeats: of the loader's turns; their medians count.
    pack: slots of a packed row; as many as the longest sample takes, if that is more.
  """

  media: str = field(
    default=".", metadata={"help": "the media are relative to DIR", "metavar": "DIR"}
  )
  samples: int = field(default=64, metadata={"help": "default: %(default)s", "metavar": "N"})
  threads: int = field(default=2, metadata={"help": "default: %(default)s", "metavar": "N"})
  scene: int = 16
  batch_size: int = 8
  repeats: int = 1
  pack: int = 8192


def bench(
  records: Sequence[Record],
  tokenizer: Tokenizer,
  sizes: Mapping[str, int],
  rules: RowRules,
  options: Options,
) -> dict[str, Any]:
  """Reads records stage by stage, then by the loader; plans packed rows of them.

  Args:
    sizes: image_size, grid, tokens_per_object, scene_tokens of a row.

  Returns CPU milliseconds a sample by stage, the loader's samples/s/core and its wall rate with
  `threads`, Grain's own microseconds a sample and their share of the loader's, encodes per unique
  frame, and how full packed rows are.
  """
  count = min(options.samples, len(records))
  if not count:
    raise InputError("found no records; accepted: at least one")
  step = len(records) / count
  chosen = [records[int(i * step)] for i in range(count)]
  scene, batch_size, threads = options.scene, options.batch_size, options.threads
  needs = [record_needs(r, i, tokenizer, scene, rules) for i, r in enumerate(chosen)]
  shape = fit_shape(needs, scene=scene, **sizes)
  source = Samples(chosen, tokenizer, shape, media_root=options.media, rules=rules)
  stages, frames, slots = _stages(records, step, count, source, batch_size)
  per_sample = {name: 1e3 * seconds / count for name, seconds in stages.items()}

  dataset = make_dataset([source], batch_size=batch_size, seed=0, drop_remainder=False)
  runs = [_time(prefetched(dataset, threads=threads)) for _ in range(options.repeats)]
  cpu, wall = map(median, zip(*runs, strict=True))
  grain = grain_seconds(batch_size, threads, max(options.repeats, 3))
  return {
    "samples": count,
    "frames_a_sample": frames / count,
    "cpu_ms_a_sample": per_sample,
    "samples_per_second_per_core": count / cpu,
    "limited_by": max(stages, key=lambda name: stages[name]),
    "threads": threads,
    "loader_samples_per_second": count / wall,
    "grain_us_a_sample": 1e6 * grain,
    "loader_overhead": grain * count / cpu,
    "encodes_per_unique_frame": slots / max(frames, 1),
    "packing": _packing(records, source, sizes, scene, options.pack),
  }


class _Empty(RowSource):
  """Samples in which there is nothing to do."""

  shape = fit_shape([], image_size=1, grid=1, tokens_per_object=1, scene_tokens=1)

  def __len__(self) -> int:
    return _EMPTY

  def fill(self, row: Row, index: int) -> None:
    pass

  def names(self, index: int) -> list[str]:
    return []


def grain_seconds(batch_size: int, threads: int, repeats: int = 3) -> float:
  """CPU seconds that the loader takes for a sample besides making it; the median of `repeats`."""
  dataset = make_dataset([_Empty()], batch_size=batch_size, seed=0, drop_remainder=False)
  return median(_time(prefetched(dataset, threads=threads))[0] for _ in range(repeats)) / _EMPTY


def _packing(
  records: Sequence[Record],
  source: Samples,
  sizes: Mapping[str, int],
  scene: int,
  pack: int,
) -> dict[str, Any]:
  """How full packed rows of evenly chosen records are."""
  count = min(len(records), _PLANNED)
  needs = []
  for i in (int(k * len(records) / count) for k in range(count)):
    needs.append(record_needs(records[i], i, source.tokenizer, scene, source.rules))
  longest = max(n.length(sizes["tokens_per_object"], sizes["scene_tokens"]) for n in needs)
  plan = plan_rows(needs, max(pack, longest), sizes=dict(sizes), scene=scene)
  return {
    "length": plan.shape.length,
    "samples": count,
    "rows": len(plan.rows),
    "slots_filled": plan.fill["length"],
    "frames_filled": plan.fill["frames"],
  }


def _time(batches: Iterator[Row]) -> tuple[float, float]:
  """(CPU seconds of the process, wall seconds) until they end."""
  wall, cpu = time.perf_counter(), time.process_time()
  deque(batches, maxlen=0)
  return time.process_time() - cpu, time.perf_counter() - wall


def _stages(
  records: Sequence[Record], step: float, count: int, source: Samples, batch_size: int
) -> tuple[dict[str, float], int, int]:
  """(CPU seconds by stage, unique frames of all samples, frame slots that they fill)."""
  clock = dict.fromkeys(STAGES, 0.0)

  def timed(stage: str, call: Callable, *args: Any, **options: Any) -> Any:
    start = time.thread_time()
    result = call(*args, **options)
    clock[stage] += time.thread_time() - start
    return result

  rules, shape = source.rules, source.shape
  region_id = source.tokenizer.region_id
  unique = slots = 0
  for i in range(count):
    if i % batch_size == 0:
      batch = timed("lay out", empty_rows, shape, batch_size)
      rows = rows_of(batch)
    row = rows[i % batch_size]
    record = timed("read", records.__getitem__, int(i * step))
    text = timed("text", rules.text, record, source.tokenizer)
    clip = None
    if record.media is not None:
      clip, frames = _clip(record, rules.objects(record, i), source, row, timed)
      unique += frames
    timed("lay out", place, row, text, clip, shape, region_id, record.where)
    slots += int(row["frames"].any((1, 2, 3)).sum())
  return clock, unique, slots


def _clip(
  record: Record, objects: list, source: Samples, row: Row, timed: Callable
) -> tuple[Clip, int]:
  """The clip as `read_clip` gives it, its frames decoded before, so that both are timed apart."""
  image = record.media == "image"
  path = record.stored or media_path(source.media_root, record.path)
  video = timed("open", open_video, path)
  scene = [0] if image else scene_ids(video, source.shape.scene)
  numbers = list(dict.fromkeys([*scene, *(n for masks in objects for n in masks)]))
  frames = dict(zip(numbers, timed("decode", read_scene, video, numbers), strict=True))
  rules = source.rules
  clip = timed(
    "resize and masks",
    read_clip,
    _Decoded(video, frames),
    source.shape,
    objects,
    image=image,
    aspect_ratio=rules.aspect_ratio,
    mask_rule=rules.mask_rule,
    size=record.size,
    room=row["frames"],
  )
  return clip, len(numbers)


class _Decoded(Video):
  """A video some of whose frames are decoded already."""

  def __init__(self, video: Video, frames: Mapping[int, Any]):
    self.name, self.kind, self.fps, self.size = video.name, video.kind, video.fps, video.size
    self._count, self._frames = len(video), frames

  def __len__(self) -> int:
    return self._count

  def _read(self, numbers: list[int]) -> Iterator[Any]:
    return (self._frames[n] for n in numbers)


def table(result: Mapping[str, Any]) -> Iterator[str]:
  """The result as lines for a terminal."""
  yield f"{result['samples']} samples of {result['frames_a_sample']:.1f} frames on average"
  total = sum(result["cpu_ms_a_sample"].values())
  for name, ms in result["cpu_ms_a_sample"].items():
    yield f"  {name:<17} {ms:9.2f} ms CPU a sample  {ms / total:6.1%}"
  yield f"{result['samples_per_second_per_core']:.1f} samples/s/core; limit: {result['limited_by']}"
  yield (
    f"loader with {result['threads']} threads: {result['loader_samples_per_second']:.1f} samples/s "
    f"(wall); Grain's own {result['grain_us_a_sample']:.0f} us a sample, "
    f"{result['loader_overhead']:.2%} of its CPU time"
  )
  yield f"encodes per unique frame: {result['encodes_per_unique_frame']:.2f}"
  packing = result["packing"]
  yield (
    f"packed rows of {packing['length']}: {packing['slots_filled']:.1%} of the slots and "
    f"{packing['frames_filled']:.1%} of the frames filled, {packing['samples']} samples in "
    f"{packing['rows']} rows"
  )
