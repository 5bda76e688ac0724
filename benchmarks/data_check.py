"""Memory of `vr data check` on a file of any size: it must not grow with the file.

    python benchmarks/data_check.py [--gigabytes 2]

Writes items of 45 KB, 32 masks each as in VideoRefer-700K, runs the command on them without media
and prints its resident memory at ten moments of the run, and the largest. The goal is that the last
is no more than a tenth above the first.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipes.masks import encode_mask


def rss_mb(pid: int) -> float:
  pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 1e6


def write(path: Path, size: float) -> int:
  """Writes about `size` bytes; returns the number of items."""
  noise = np.random.default_rng(0).random((480, 854)) < 0.5
  mask = np.zeros((480, 854), np.uint8)
  mask[:, 300:304] = noise[:, 300:304]  # about 1.4 KB
  masks = {str(16 * i): {"segmentation": encode_mask(mask)} for i in range(32)}
  item = {
    "id": "ID",
    "video": "a.mp4",
    "conversations": [
      {"from": "human", "value": "<video>\nWhat is <region>?"},
      {"from": "gpt", "value": "A thing."},
    ],
    "annotation": [masks],
  }
  text = json.dumps(item)
  count = max(1, int(size / len(text)))
  with open(path, "w") as file:
    for i in range(count):
      file.write(("[" if i == 0 else ",\n") + text.replace('"ID"', str(i), 1))
    file.write("]")
  return count


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--gigabytes", type=float, default=2.0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "items.json"
    count = write(path, args.gigabytes * 1e9)
    size, memory = path.stat().st_size, []
    command = [sys.executable, "-m", "vr_jax", "data", "check", str(path), "--json", "--jobs", "1"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
    while process.poll() is None:
      memory.append(rss_mb(process.pid))
      time.sleep(0.25)
    summary = json.loads(process.stdout.read())
  assert process.returncode == 0, summary
  assert summary["good"] == count, summary
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = used.ru_utime + used.ru_stime
  print(
    f"{count} items, {size / 1e9:.2f} GB, {seconds:.0f} s CPU ({size / seconds / 1e6:.0f} MB/s)"
  )
  running = memory[len(memory) // 20 :]  # behind the start of Python
  points = [running[int(i * (len(running) - 1) / 9)] for i in range(10)]
  print(
    f"data.check_mb {', '.join(f'{m:.0f}' for m in points)}; at most {max(memory):.0f} MB; the "
    f"last is {points[-1] / points[0]:.2f} of the first (goal: at most 1.10)"
  )


if __name__ == "__main__":
  main()
