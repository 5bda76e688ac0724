"""TFDS builders `videorefer_700k` and `videorefer_bench` over prepared shards, without TensorFlow.

    vr data prepare short.json --media DIR --out MANUAL/short --size 384
    builder = Videorefer700k(config="short", data_dir=D, file_format="array_record")
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=MANUAL))
    source = builder.as_data_source("train")  # a Grain source

Frames are encoded bytes and masks are flat, as nested sequences and `features.Video` need
TensorFlow. Needs the extra [tfds]; nothing else imports this module.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from data_pipes.errors import InputError
from data_pipes.masks import counts_to_string, encode_mask, segmentation_to_mask
from data_pipes.shards import ShardSet, StoredClip

_COMMON = ("id", "video", "source")


def _features(bench: str | None) -> tfds.features.FeaturesDict:
  import numpy as np

  text = tfds.features.Text
  features: dict[str, Any] = {
    **{name: text() for name in _COMMON},
    "frames": tfds.features.Sequence(text()),  # JPEG or PNG bytes
    "frame_index": tfds.features.Sequence(np.int32),
    "frame_pts": tfds.features.Sequence(np.int64),
    "time_base": text(),
    "index_space": text(),
    "rule": text(),  # JSON: how frames were chosen and stored
    "height": np.int32,
    "width": np.int32,
    "masks": tfds.features.Sequence({"object": np.int32, "frame": np.int32, "rle": text()}),
  }
  if bench is None:
    features["conversations"] = tfds.features.Sequence({"from": text(), "value": text()})
  elif bench == "d":
    features |= {"caption": text(), "frame_idx": np.int32}
  else:
    features |= {name: text() for name in ("question", "answer", "type")}
    features |= {"options": tfds.features.Sequence(text()), "frame_idx": np.int32}
  return tfds.features.FeaturesDict(features)


def example(shards: ShardSet, index: int, bench: str | None, media: bool) -> dict[str, Any]:
  """One sample in the flat layout; `media` False leaves the frames out."""
  sample, record = shards.sample(index), shards[index]
  item, clip = sample["record"], sample["clip"] or {}
  height, width = clip.get("size", record.size or (0, 0))
  masks = [
    {"object": i, "frame": number, "rle": _rle(segmentation, height, width)}
    for i, by_frame in enumerate(record.objects)
    for number, segmentation in by_frame.items()
  ]
  stored = record.stored
  frames = stored.encoded() if media and isinstance(stored, StoredClip) else []
  out: dict[str, Any] = {
    "id": str(record.id),
    "video": record.path,
    "source": clip.get("source", ""),
    "frames": frames,
    "frame_index": clip.get("frames", []) if media else [],
    "frame_pts": clip.get("pts", []) if media else [],
    "time_base": clip.get("time_base", ""),
    "index_space": clip.get("index_space", ""),
    "rule": json.dumps(clip.get("rule", {})),
    "height": height,
    "width": width,
    "masks": masks,
  }
  if bench is None:
    return out | {"conversations": [{"from": t.role, "value": t.text} for t in record.turns]}
  out["frame_idx"] = int(item["frame_idx"])
  if bench == "d":
    return out | {"caption": item["caption"]}
  question = {"question": item["Question"], "answer": item["Answer"], "options": item["options"]}
  return out | question | {"type": str(item.get("type", ""))}


def _rle(segmentation: Any, height: int, width: int) -> str:
  """Compressed COCO run lengths; "" for no mask. Polygons are drawn by COCO's rule."""
  if segmentation is None:
    return ""
  if isinstance(segmentation, dict):
    counts = segmentation["counts"]
    return counts if isinstance(counts, str) else counts_to_string(counts)
  return encode_mask(segmentation_to_mask(segmentation, height, width))["counts"]


class _Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Reads MANUAL/<config>, a folder that `vr data prepare` has filled."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Prepare each configuration with `vr data prepare FILE --media DIR --out MANUAL/<config>`."
  )
  SPLIT: str
  code_path = None  # nothing is downloaded, so there are no checksums beside the code

  def _bench(self) -> str | None:
    return None

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(features=_features(self._bench()), disable_shuffling=True)

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    name = self.builder_config.name
    folder = Path(dl_manager.manual_dir) / name.removesuffix("_nomedia")
    return {self.SPLIT: self._generate_examples(folder, not name.endswith("_nomedia"))}

  def _generate_examples(self, folder: Path, media: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    shards = ShardSet(folder)
    for i in range(len(shards)):
      if (shards.sample(i)["record"].get("conversations") is None) != bool(self._bench()):
        raise InputError(f"{folder}: sample {i} is not of {self.name}")
      yield i, example(shards, i, self._bench(), media)


class Videorefer700k(_Prepared):
  """VideoRefer-700K: short and detailed captions, and QA."""

  name = "videorefer_700k"
  SPLIT = "train"
  BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads a list)
    tfds.core.BuilderConfig(name=f"{name}{media}")
    for name in ("short", "detailed", "qa")
    for media in ("", "_nomedia")
  ]


class VideoreferBench(_Prepared):
  """VideoRefer-Bench D and Q."""

  name = "videorefer_bench"
  SPLIT = "test"
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("d", "q")]  # noqa: RUF012

  def _bench(self) -> str | None:
    return self.builder_config.name
