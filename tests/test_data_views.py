"""vr data stats, show and bench: figures that can be counted by hand, pages and pictures."""

import json

import numpy as np
import pytest
from PIL import Image
from test_data_check import BENCH_Q, image_item, item, mask, media, write  # noqa: F401 (media)
from test_prepare import prepare

from data_pipes import loader_bench
from data_pipes.drawing import colour_of
from data_pipes.errors import InputError
from data_pipes.samples import RowRules
from data_pipes.shards import ShardSet
from data_pipes.show import find_item, overlays
from data_pipes.stats import Stats, read_stats
from data_pipes.tokenizer import Tokenizer
from vr_jax.cli import main

TALK = [{"from": "human", "value": "Good day"}, {"from": "gpt", "value": "To you too."}]
ITEMS = [
  item(id="a", video="x/a.mp4"),
  item(id="b", video="x/b.mp4", annotation=[{"0": {"segmentation": mask()}, "7": {}}]),
  image_item("i.png", height=48, width=64),
  item(id="d", video=..., annotation=..., conversations=TALK * 2),
  BENCH_Q,
  item(id="f", conversations=[]),
]


def test_stats_are_what_can_be_counted_by_hand(tmp_path, capsys):
  file = write(tmp_path / "f.json", ITEMS)
  result = read_stats([file])
  assert (result["items"], result["readable"]) == (6, 5)
  assert result["kinds"] == {
    "video region short": 2, "image region short": 1, "text": 1, "bench Q": 1,
  }  # fmt: skip
  assert result["sources"] == {"(top folder)": 3, "x": 2}
  assert result["types"] == {"Basic": 1}
  assert result["defects"] == {"conversations": 1}
  assert result["distributions"]["objects"] == {
    "0": 1, "1": 4, "2": 0, "3": 0, "4": 0, "5": 0, "> 5": 0,
  }  # fmt: skip
  assert result["distributions"]["frames"]["0–1"] == 2  # the image's and the benchmark's
  assert result["distributions"]["seen"] == {
    "0": 0, "1": 3, "2–4": 1, "5–8": 0, "9–16": 0, "17–24": 0, "25–31": 0, "> 31": 0,
  }  # fmt: skip
  assert result["distributions"]["area"]["≤ 30.00%"] == 5  # 400 of 3072 pixels
  assert result["means"]["area"] == pytest.approx(400 / 3072)
  assert result["means"]["rounds"] == pytest.approx(5 / 4)
  assert main(["data", "stats", str(file), "--html", str(tmp_path / "p.html")]) == 0
  out = capsys.readouterr().out
  assert "6 items, 5 of them readable" in out
  page = (tmp_path / "p.html").read_text()
  assert "Area of a mask (share of the frame), mean 0.1302" in page
  # One share on both: of all items, the unreadable one among them.
  for share in ("2 (33.3%)", "1 (16.7%)", "3 (50.0%)"):
    assert share in out
    assert share in page
  assert main(["data", "stats", str(file), "--json"]) == 0
  assert json.loads(capsys.readouterr().out) == result


def test_an_item_that_check_refuses_is_not_readable():
  stats = Stats()
  stats.add(item(), "a")
  stats.add(item(annotation=[{"0": {"segmentation": None}}]), "b")
  stats.add(item(annotation=[{"0": {"segmentation": {"size": [4, 4], "counts": [99]}}}]), "c")
  assert stats.result()["readable"] == 1
  assert stats.result()["defects"] == {"never-seen": 1, "segmentation": 1}


@pytest.fixture(scope="module")
def shown(tmp_path_factory, media):  # noqa: F811
  folder = tmp_path_factory.mktemp("shown")
  two = [{"from": "human", "value": "<video>\nIs <region> left of <region>?"}, TALK[1]]
  seven = [
    {"7": {"segmentation": mask(2, 2, 10, 10)}},
    {"7": {"segmentation": mask(30, 40, 10, 10)}},
  ]
  file = write(
    folder / "f.json",
    [item(id="one"), item(id="two", conversations=two, annotation=seven), BENCH_Q],
  )
  prepare(folder / "s", [file], media, shards=1)
  return folder


@pytest.mark.parametrize("source", ["f.json", "s"])
def test_objects_are_drawn_where_they_are(shown, media, source):  # noqa: F811
  record, raw = find_item(shown / source, "id=two")
  assert raw["id"] == record.id == "two"
  ((number, image),) = overlays(record, media, width=640)
  assert number == 7
  pixels = np.asarray(image).astype(int)

  assert pixels.shape[:2] == (480, 640)

  def density(index, top, left):
    """How much denser its colour is around the object than elsewhere."""
    colour = np.array([int(colour_of(index)[i : i + 2], 16) for i in (1, 3, 5)])
    near = np.abs(pixels - colour).sum(-1) < 12
    inside = np.zeros(near.shape, bool)
    inside[max(10 * top - 20, 0) : 10 * top + 120, max(10 * left - 20, 0) : 10 * left + 120] = True
    return near[inside].mean() / max(near[~inside].mean(), 1e-9)

  assert density(0, 2, 2) > 10
  assert density(1, 30, 40) > 10


def test_pages_and_pictures(shown, media, tmp_path, capsys):  # noqa: F811
  file = str(shown / "f.json")
  page = tmp_path / "p.html"
  assert main(["data", "show", file, "1", "--media", str(media), "--out", str(page)]) == 0
  text = page.read_text()
  assert "frame 7" in text
  assert "&lt;region 1&gt;" in text
  assert "data:image/jpeg;base64," in text
  assert main(["data", "show", file, "2", "--media", str(media), "--out", str(page)]) == 0
  assert "(A) A box (B) A dog" in page.read_text()
  picture = tmp_path / "p.png"
  assert main(["data", "show", file, "0", "--media", str(media), "--out", str(picture)]) == 0
  with Image.open(picture) as image:
    assert image.size == (960, 360)
  assert main(["data", "show", file, "9", "--media", str(media)]) == 2
  assert "no item '9'; accepted: 0 to 2, or id=ID" in capsys.readouterr().err
  with pytest.raises(InputError, match="no item 'id=none'"):
    find_item(file, "id=none")


def test_bench_names_the_time_of_every_stage(shown, golden):
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  sizes = {"image_size": 56, "grid": 4, "tokens_per_object": 4, "scene_tokens": 32}
  shards = ShardSet(shown / "s")
  records = [shards[i] for i in range(len(shards)) if shards[i].turns]
  result = loader_bench.bench(
    records, tokenizer, sizes, RowRules(), loader_bench.Options(samples=8, batch_size=2)
  )
  assert result["samples"] == 2
  assert set(result["cpu_ms_a_sample"]) == set(loader_bench.STAGES)
  assert all(ms >= 0 for ms in result["cpu_ms_a_sample"].values())
  assert result["encodes_per_unique_frame"] == 1.0
  assert result["frames_a_sample"] > 16
  assert 0 < result["grain_us_a_sample"] < 1e4
  sample = sum(result["cpu_ms_a_sample"].values())
  assert 0 < result["loader_overhead"] < result["grain_us_a_sample"] / (100 * sample)
  packing = result["packing"]
  assert (packing["length"], packing["samples"], packing["rows"]) == (8192, 2, 1)
  assert 0 < packing["slots_filled"] < 0.1
  assert "samples/s/core" in "\n".join(loader_bench.table(result))
