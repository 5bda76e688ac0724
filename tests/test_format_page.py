"""Every example of docs/format.md is read, and each class of `vr data check` has a place there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.check import KINDS, Checks, check_file
from data_pipes.check_report import PAGE, check, table
from data_pipes.importers.captions import Captions
from data_pipes.importers.marked import Media, Text
from data_pipes.masks import mask_from_box, segmentation_to_mask
from data_pipes.records import Record, parse_record
from data_pipes.video import Video, open_video
from vr_jax.inference.bulk import read_requests
from vr_jax.inference.regions import objects_of, read_regions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / PAGE).read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```json\n(.*?)```", TEXT, re.DOTALL))
LEFT, RIGHT = (mask_from_box(box, 24, 32) for box in ((2, 2, 12, 10), (4, 2, 14, 10)))


@pytest.fixture
def example(tmp_path):
  """Writes an example of the page to a file of its name."""

  def write(name: str) -> Path:
    path = tmp_path / name
    path.write_text(EXAMPLES[name])
    return path

  return write


@pytest.fixture
def street(tmp_path) -> Video:
  """The video of the examples: 9 frames of 32x24, 30 a second."""
  folder = tmp_path / "street"
  folder.mkdir()
  for k in range(9):
    Image.new("RGB", (32, 24), (k, 0, 0)).save(folder / f"{k}.png")
  return open_video(folder, fps=30)


def record(path: Path) -> Record:
  (checked,) = check_file(path, Checks())
  assert not [finding for finding in checked.findings if finding.is_defect]
  assert checked.record is not None
  return checked.record


def test_a_video(example):
  video = record(example("video.json"))
  assert (video.id, video.path, video.size) == ("a1", "clips/street.mp4", (24, 32))
  assert [turn.role for turn in video.turns] == ["human", "gpt"] * 2
  first, second = video.objects
  assert np.array_equal(segmentation_to_mask(first[0]), LEFT)
  assert np.array_equal(segmentation_to_mask(first[8]), RIGHT)
  assert segmentation_to_mask(second[0], 24, 32).sum() == 100
  assert np.array_equal(
    segmentation_to_mask(second[4], 24, 32), segmentation_to_mask(second[0], 24, 32)
  )
  assert second[8] is None


def test_the_other_key_of_objects_means_the_same(example):
  (item,) = (checked.span.item for checked in check_file(example("video.json"), Checks()))
  masks = [
    {n: entry.get("segmentation", entry) for n, entry in by_frame.items()}
    for by_frame in item.pop("annotation")
  ]
  other = parse_record(item | {"masks": masks, "video": [item["video"]]}, "")
  assert other.objects == record(example("video.json")).objects


def test_an_image_and_a_text(example):
  image = record(example("image.json"))
  assert (image.media, segmentation_to_mask(image.objects[0][0]).sum()) == ("image", 30)
  text = record(example("text.json"))
  assert (text.media, text.objects) == (None, ())


@pytest.mark.parametrize("name", ["bench-q.json", "bench-d.json"])
def test_benchmarks(example, name):
  bench = record(example(name))
  assert not bench.turns
  assert np.array_equal(segmentation_to_mask(bench.objects[0][8]), RIGHT)


def test_a_region_in_a_file(example, street):
  masks = read_regions(street, f"car={example('rle.json')}")["car"]
  assert list(masks) == [0, 4, 6, 8]
  assert np.array_equal(masks[0], LEFT)
  assert np.array_equal(masks[8], RIGHT)
  assert (masks[4].sum(), masks[6].sum()) == (80, 0)


def test_requests(example, street):
  lines, refused = read_requests(example("requests.jsonl"))
  assert not refused
  assert [line.id for line in lines] == ["q1", "q2", 3]
  assert lines[1].request().seconds == (0, 1.5)
  car, other = objects_of(lines[1].request().regions, street)
  assert np.array_equal(car.masks[0], LEFT)
  assert (car.name, list(other.masks)) == ("car", [3])
  assert (
    objects_of(lines[2].request().regions, open_video([street.frames([0])[0]]))[0].masks[0].any()
  )


def test_captions(example):
  captions = Captions(example("captions.json"))
  texts = captions.take(Media("video", "clips/street.mp4", None, []))
  assert texts == [
    Text("the red car", ("3",)), Text("a dog", ("dog",)), Text("a dog that barks", ("dog",)),
  ]  # fmt: skip
  assert captions.take(Media("image", "dog.jpg", None, [])) == [Text("A dog in a park.")]


def test_all_examples_are_read():
  assert len(EXAMPLES) == 8


def test_check_points_to_the_paragraph_of_each_class(example):
  assert set(re.findall(r'<a id="([\w-]+)"></a>', TEXT)) == set(KINDS)
  path = example("video.json")
  path.write_text(path.read_text().replace("<region> waits", "it waits"))
  summary = check([path], Checks())
  assert summary["defects"]["region-count"]["see"] == "docs/format.md#region-count"
  assert any("docs/format.md#region-count" in line for line in table(summary))
