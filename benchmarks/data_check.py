"""Memory of `vr data check` on a file of any size: it must not grow with the file.

    python benchmarks/data_check.py [--gigabytes 2]

Writes items of 45 KB, 32 masks each as in VideoRefer-700K, checks them without media and prints the
resident memory after every tenth of the file.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipes.check import Checks, check_file
from data_pipes.masks import encode_mask


def rss_mb() -> float:
  pages = int(Path("/proc/self/statm").read_text().split()[1])
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
    start, memory = time.process_time(), []
    for done in check_file(path, Checks()):
      assert not done.findings, done.findings
      if (done.index + 1) % max(1, count // 10) == 0:
        memory.append(rss_mb())
    seconds = time.process_time() - start
    size = path.stat().st_size
  print(
    f"{count} items, {size / 1e9:.2f} GB, {seconds:.0f} s CPU ({size / seconds / 1e6:.0f} MB/s)"
  )
  print(f"resident MB after each tenth: {', '.join(f'{m:.0f}' for m in memory)}")


if __name__ == "__main__":
  main()
