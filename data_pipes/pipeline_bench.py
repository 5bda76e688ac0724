"""`vr data bench`: the input pipeline alone, with the time of each stage and what limits it.

Times are CPU seconds of the thread that does the work, so other load on the machine hardly counts;
samples a second a core is one over their sum.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.batch import Clip, build_row, collate, fit_shape
from data_pipes.clips import media_path, read_clip
from data_pipes.errors import InputError
from data_pipes.loader import Failures, make_dataset, prefetched
from data_pipes.records import Record, RecordFile
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import Video, open_video, read_scene, scene_ids

STAGES = ("read", "text", "open", "decode", "resize and masks", "lay out", "collate")


def bench(
  records: Sequence[Record] | RecordFile,
  tokenizer: Tokenizer,
  sizes: Mapping[str, int],
  rules: RowRules,
  *,
  media: str | Path = "",
  scene: int = 16,
  samples: int = 64,
  batch_size: int = 8,
  threads: int = 2,
) -> dict[str, Any]:
  """Reads up to `samples` records three times: stage by stage, whole, and through the loader.

  Args:
    sizes: image_size, grid, tokens_per_object, scene_tokens of a row.

  Returns CPU milliseconds a sample by stage, samples/s/core, the loader's wall rate with `threads`,
  its own CPU share, and encodes per unique frame.
  """
  count = min(samples, len(records))
  if not count:
    raise InputError("found no records; accepted: at least one")
  step = len(records) / count
  chosen = [records[int(i * step)] for i in range(count)]
  needs = [record_needs(r, i, tokenizer, scene, rules) for i, r in enumerate(chosen)]
  shape = fit_shape(needs, scene=scene, **sizes)
  source = Samples(chosen, tokenizer, shape, media_root=media, rules=rules)
  stages, frames = _stages(records, step, count, source, batch_size)
  per_sample = {name: 1e3 * seconds / count for name, seconds in stages.items()}

  start = time.process_time()
  rows = [source[i] for i in range(count)]
  direct = time.process_time() - start
  slots = sum(int((row["frames"].any((1, 2, 3))).sum()) for row in rows)
  del rows
  failures = Failures()
  dataset = make_dataset(
    [source], batch_size=batch_size, seed=0, drop_remainder=False, failures=failures
  )
  wall, start = time.perf_counter(), time.process_time()
  batches = sum(1 for _ in prefetched(dataset, threads=threads))
  through, wall = time.process_time() - start, time.perf_counter() - wall
  total = sum(stages.values())
  return {
    "samples": count,
    "frames_a_sample": frames / count,
    "cpu_ms_a_sample": per_sample,
    "samples_per_second_per_core": count / total,
    "limited_by": max(stages, key=lambda name: stages[name]),
    "threads": threads,
    "loader_samples_per_second": batches * batch_size / wall,
    # What Grain, threads and hand-over cost beside making and collating the rows.
    "loader_overhead": max(through - direct - stages["collate"], 0) / through,
    "encodes_per_unique_frame": slots / max(frames, 1),
  }


def _stages(
  records: Sequence[Record] | RecordFile, step: float, count: int, source: Samples, batch_size: int
) -> tuple[dict[str, float], int]:
  """(CPU seconds by stage, unique frames of all samples)."""
  clock = dict.fromkeys(STAGES, 0.0)

  def timed(stage: str, call: Callable, *args: Any, **options: Any) -> Any:
    start = time.thread_time()
    result = call(*args, **options)
    clock[stage] += time.thread_time() - start
    return result

  rules, shape = source.rules, source.shape
  region_id = source.tokenizer.region_id
  rows, unique = [], 0
  for i in range(count):
    record = timed("read", records.__getitem__, int(i * step))
    text = timed("text", rules.text, record, source.tokenizer)
    clip = None
    if record.media is not None:
      clip, frames = _clip(record, rules.objects(record, i), source, timed)
      unique += frames
    rows.append(timed("lay out", build_row, text, clip, shape, region_id, record.where))
    if len(rows) == batch_size or i == count - 1:
      timed("collate", collate, rows)
      rows = []
  return clock, unique


def _clip(record: Record, objects: list, source: Samples, timed: Callable) -> tuple[Clip, int]:
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
    f"(wall), {result['loader_overhead']:.1%} of the CPU time its own"
  )
  yield f"encodes per unique frame: {result['encodes_per_unique_frame']:.2f}"
