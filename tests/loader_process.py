"""One process of a run: prints a digest of each row of its batches, as a line of JSON.

python loader_process.py FILE TOKENIZER MODE INDEX COUNT START THREADS
"""

import hashlib
import json
import sys

from data_pipes.batch import RowShape
from data_pipes.failures import Failures
from data_pipes.loader import make_bucketed_dataset, make_dataset, prefetched
from data_pipes.packing import BucketSamples, PackedSamples, make_buckets, plan_rows
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer

SIZES = {"image_size": 56, "grid": 4, "tokens_per_object": 4, "scene_tokens": 32}


def main(folder, tokenizer, mode, index, count, start, threads):
  shape = RowShape(frames=48, scene=16, objects=4, object_frames=32, length=256, **SIZES)
  rules = RowRules(masks="half", single_frame="random", seed=7)
  samples = Samples(ShardSet(folder), Tokenizer.from_folder(tokenizer), shape, rules=rules)
  needs = [
    record_needs(samples.records[i], i, samples.tokenizer, 16, rules) for i in range(len(samples))
  ]
  options = {"batch_size": 8, "seed": 5, "epochs": 12}
  options |= {"process_index": int(index), "process_count": int(count)}
  if mode == "buckets":
    found = make_buckets(needs, (96, 128, 256), sizes=SIZES, scene=16)
    dataset = make_bucketed_dataset([BucketSamples([samples], b) for b in found], **options)
  else:
    if mode == "packed":
      plan = plan_rows(needs, 256, sizes=SIZES, scene=16)
      samples = PackedSamples([samples], plan, Failures())
    dataset = make_dataset([samples], drop_remainder=False, **options)
  for batch in prefetched(dataset, int(start), threads=int(threads)):
    rows = []
    for i in range(len(batch["tokens"])):
      code = hashlib.blake2b(digest_size=8)
      for key in sorted(batch):
        code.update(batch[key][i].tobytes())
      rows.append(code.hexdigest())
    print(json.dumps(rows), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
