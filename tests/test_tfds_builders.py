"""TFDS builders over prepared shards, read without TensorFlow (extra [tfds])."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import prepare

CODE = """
import json, sys
import tensorflow_datasets as tfds
from data_pipes.tfds_builders import Videorefer700k, VideoreferBench
manual, data = sys.argv[1:]
config = tfds.download.DownloadConfig(manual_dir=manual)
for cls, name in ((Videorefer700k, "qa"), (Videorefer700k, "qa_nomedia"), (VideoreferBench, "d"),
                  (VideoreferBench, "q")):
  builder = cls(config=name, data_dir=data, file_format="array_record")
  builder.download_and_prepare(download_config=config)
  source = builder.as_data_source("train" if cls is Videorefer700k else "test")
  rows = [source[i] for i in range(len(source))]
  # The order of rows is the library's.
  first = min((r for r in rows if len(r["masks"]["rle"])), key=lambda r: r["id"])
  print(json.dumps({
    "name": f"{builder.name}/{name}", "rows": len(rows), "frames": len(first["frames"]),
    "jpeg": bytes(first["frames"][0][:2]).hex() if len(first["frames"]) else "",
    "index": [int(i) for i in first["frame_index"]], "id": first["id"].decode(),
    "rle": first["masks"]["rle"][0].decode(), "keys": sorted(first),
    "most": max(len(r["frames"]) for r in rows),
  }))
assert "tensorflow" not in sys.modules
"""


@pytest.mark.tfds
def test_builders_write_and_read_without_tensorflow(golden, tmp_path):
  files = {"qa": "train", "d": "bench_d", "q": "bench_q"}
  for name, file in files.items():
    prepare(tmp_path / "manual" / name, [golden / f"data/{file}.json"], golden / "media")
  done = subprocess.run(
    [sys.executable, "-c", CODE, tmp_path / "manual", tmp_path / "data"],
    env={"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": "/usr/bin:/bin"},
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  assert [(x["name"], x["rows"]) for x in lines] == [
    ("videorefer_700k/qa", 8), ("videorefer_700k/qa_nomedia", 8), ("videorefer_bench/d", 4),
    ("videorefer_bench/q", 4),
  ]  # fmt: skip
  qa, nomedia, d, q = lines
  assert 0 < qa["frames"] == len(qa["index"])
  assert qa["most"] >= 16
  assert qa["jpeg"] == "ffd8"
  assert nomedia["frames"] == 0
  assert nomedia["rle"] == qa["rle"]
  assert {"caption", "frame_idx"} <= set(d["keys"])
  assert {"question", "options", "answer", "type", "frame_idx"} <= set(q["keys"])
