"""A new kind of container: one class and a line of CONTAINERS; every reader of samples takes it."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipes import containers
from data_pipes.batch import fit_shape
from data_pipes.errors import InputError
from data_pipes.records import Container
from data_pipes.samples import Samples, record_needs
from vr_jax.cli import main
from vr_jax.training import videorefer_task


class ToyZip(Container):
  """A zip archive with a JSON file for each sample."""

  def __init__(self, path: str | Path):
    self.path = Path(path)
    with zipfile.ZipFile(path) as archive:
      self._texts = [archive.read(name) for name in sorted(archive.namelist())]

  @classmethod
  def reads(cls, path: Path) -> bool:
    return path.suffix == ".zip"

  def __len__(self) -> int:
    return len(self._texts)

  def item(self, index: int) -> Any:
    return json.loads(self._texts[index])


@pytest.fixture
def archive(tmp_path, monkeypatch, golden):
  """The items of the golden training file in a zip, and the kind of container registered."""
  monkeypatch.setattr(containers, "CONTAINERS", [ToyZip, *containers.CONTAINERS])
  items = json.loads((golden / "data/train.json").read_text())
  path = tmp_path / "items.zip"
  with zipfile.ZipFile(path, "w") as out:
    for i, item in enumerate(items):
      out.writestr(f"{i:05d}.json", json.dumps(item))
  return path


def test_data_commands_read_it(archive, golden, tmp_path, capsys):
  file = golden / "data/train.json"
  outputs = []
  for path in (archive, file):
    assert main(["data", "stats", str(path), "--json"]) == 0
    outputs.append(json.loads(capsys.readouterr().out) | {"files": []})
  assert outputs[0] == outputs[1]
  assert outputs[0]["readable"] > 0
  pages = []
  for path in (archive, file):
    page = tmp_path / "p.html"
    show = ["data", "show", str(path), "0", "--media", str(golden / "media"), "--out", str(page)]
    assert main(show) == 0
    pages.append(page.read_text().replace(str(path), "FILE"))
  assert pages[0] == pages[1]


def test_training_reads_it(archive, golden):
  tokenizer = golden / "tiny_videorefer_qwen2"
  rows = []
  for path in (archive, golden / "data/train.json"):
    inputs = videorefer_task.bench_inputs(str(path), "videorefer-7b", str(tokenizer), "multi")
    records, words, _, rules = inputs
    needs = [record_needs(r, i, words, 8, rules) for i, r in enumerate(records)]
    shape = fit_shape(needs, scene=8, image_size=56, grid=4, tokens_per_object=4, scene_tokens=32)
    rows.append(Samples(records, words, shape, media_root=golden / "media", rules=rules)[0])
  assert rows[0]["frames"].any()
  for name, array in rows[0].items():
    np.testing.assert_array_equal(array, rows[1][name], name)


def test_a_defect_names_the_archive(tmp_path, archive):
  with zipfile.ZipFile(archive, "w") as out:
    out.writestr("0.json", json.dumps({"id": 7}))
  with pytest.raises(InputError, match=r"items\.zip: item 0 \(id 7\): key 'conversations'"):
    containers.open_records(archive)[0]
