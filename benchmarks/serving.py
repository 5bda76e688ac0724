"""Many callers of one service, in one process: what each waits for, and what the machine gets done.

    python benchmarks/serving.py [--checkpoint C] [--only S1 S5] [--pairs 3] [--seconds 20]

Rows S1 to S7 and S9, with their goals. Sides of a ratio take turns in this process. A client is a
thread that measures as `vllm bench serve` does: TTFT (time to the first text), ITL (between two
texts). "Alone" is one client on a service without other work. Answers never end by themselves, so
that their lengths are those that were asked for. What HTTP adds is in serving_http.py.
"""

import argparse
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rows import Spread, alternate, ratio, row  # first: it keeps to two processors

import numpy as np  # isort: skip
from shared_video import make_clip  # isort: skip

import vr_jax  # isort: skip
from vr_jax.compiling import compilations  # isort: skip
from vr_jax.inference.service import Service  # isort: skip
from vr_jax.inference.tickets import Text, Ticket  # isort: skip

ROWS = 8
CLIENTS = 32
SHORT, LONG = 16, 256  # tokens of an answer
QUESTIONS = ("What happens?", "What is there?", "Does something move?", "Which colours are there?")


class Times(NamedTuple):
  """What a client saw of one answer: seconds to the first text, between texts, and in all."""

  first: float
  between: list[float]
  total: float


def read(ticket: Ticket) -> Times:
  begun = last = time.perf_counter()
  first, between = None, []
  for event in ticket:
    if isinstance(event, Text):
      now = time.perf_counter()
      if first is None:
        first = now - begun
      else:
        between.append(now - last)
      last = now
  ticket.result()
  total = time.perf_counter() - begun
  return Times(total if first is None else first, between, total)


class Bench:
  """A model, its service and its clips."""

  def __init__(self, checkpoint: str | None, folder: Path, pairs: int, seconds: float):
    self.model = vr_jax.load(checkpoint)
    self.model.eos_ids = ()
    self.pairs, self.seconds, self.folder = pairs, seconds, folder
    self.service = Service(
      self.model, rows=ROWS, new_tokens=LONG, question_slots=128, queue=None, per_client=None
    )
    self.clips = [folder / f"{i}.mp4" for i in range(4)]
    for i, clip in enumerate(self.clips):
      make_clip(clip, frames=24 + i)
    self._rng = np.random.default_rng(0)

  def request(self, i: int) -> vr_jax.Request:
    return vr_jax.Request(self.clips[i % len(self.clips)], QUESTIONS[i // 4 % len(QUESTIONS)])

  def new_clip(self) -> vr_jax.Request:
    """A clip that was never seen, as frames in memory."""
    return vr_jax.Request(self._rng.integers(0, 256, (16, 96, 96, 3), np.uint8), QUESTIONS[0])

  def ask(self, request: vr_jax.Request, tokens: int = SHORT, **options) -> Times:
    return read(self.service.submit(request, max_new_tokens=tokens, stream=True, **options))

  def ask_all(self, requests: Sequence, tokens: int, clients: int) -> list[Times]:
    """A closed loop: each client asks its next question when it has the answer."""
    with ThreadPoolExecutor(clients) as pool:
      return list(pool.map(lambda request: self.ask(request, tokens), requests))


def s1(bench: Bench) -> None:
  requests = [bench.request(i) for i in range(2 * CLIENTS)]

  def loop() -> dict[str, float]:
    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
      submit = lambda r: bench.service.submit(r, max_new_tokens=SHORT).result()  # noqa: E731
      list(pool.map(submit, requests))
    return {"rate": len(requests) / (time.perf_counter() - begun)}

  def together() -> dict[str, float]:
    begun = time.perf_counter()
    bench.model.ask_many(requests, max_new_tokens=SHORT, batch_size=ROWS)
    return {"rate": len(requests) / (time.perf_counter() - begun)}

  rates = alternate({"loop": loop, "many": together}, bench.pairs)
  detail = f"{rates['loop'][-1]['rate']:.1f} requests/s"
  row("cpu.serve.S1", ratio(rates, "rate", "loop", "many"), ">= 0.85", detail=detail)


def s2(bench: Bench) -> None:
  alone = [bench.ask(bench.request(i)).first for i in range(8)]
  eight = [t.first for t in bench.ask_all([bench.request(i) for i in range(64)], SHORT, 8)]
  base = float(np.median(alone))
  detail = f"alone {1e3 * base:.0f} ms"
  row("cpu.serve.S2.ttft_p50", float(np.median(eight)) / base, "<= 2", detail=detail)
  row("cpu.serve.S2.ttft_p99", float(np.percentile(eight, 99)) / base, "<= 5", detail=detail)


def s3(bench: Bench) -> None:
  alone = [bench.ask(bench.request(i)) for i in range(8)]
  first = float(np.median([t.first for t in alone]))
  between = float(np.median([gap for t in alone for gap in t.between]))
  requests = [bench.request(i) for i in range(64)]
  begun = time.perf_counter()
  bench.ask_all(requests, SHORT, CLIENTS)
  rate = 0.7 * len(requests) / (time.perf_counter() - begun)
  gaps = np.random.default_rng(1).exponential(1 / rate, max(20, int(rate * bench.seconds)))
  with ThreadPoolExecutor(256) as pool:
    waiting = []
    for i, gap in enumerate(gaps):
      time.sleep(gap)
      waiting.append(pool.submit(bench.ask, bench.request(i)))
    times = [one.result() for one in waiting]
  good = [
    t.first <= 10 * first and (not t.between or np.percentile(t.between, 99) <= 5 * between)
    for t in times
  ]
  row("cpu.serve.S3.goodput", float(np.mean(good)), ">= 0.99", detail=f"{rate:.1f} requests/s")


def s4(bench: Bench) -> None:
  def p99(meanwhile: Callable[[threading.Event], None]) -> float:
    over = threading.Event()
    other = threading.Thread(target=meanwhile, args=(over,))
    other.start()
    times = bench.ask_all([bench.request(i) for i in range(4)], LONG, 4)
    over.set()
    other.join()
    return float(np.percentile([gap for t in times for gap in t.between], 99))

  def clips(over: threading.Event) -> None:
    while not over.wait(0.1):
      bench.service.submit(bench.new_clip(), max_new_tokens=2).result()

  ratios = [p99(clips) / p99(lambda over: None) for _ in range(bench.pairs)]
  row("cpu.serve.S4.itl_p99", Spread.over(ratios), "<= 3")


def s5(bench: Bench) -> None:
  def rate(count: int) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
      begun = time.perf_counter()
      bench.ask_all([bench.request(i) for i in range(count)], LONG, count)
      return {"rate": count * LONG / (time.perf_counter() - begun)}

    return run

  def engine() -> dict[str, float]:
    begun = time.perf_counter()
    request = bench.request(0)
    stream = bench.model.stream(request.video, request.question, max_new_tokens=LONG, batch_size=1)
    for _ in stream:
      pass
    return {"rate": LONG / (time.perf_counter() - begun)}

  rates = alternate({"eight": rate(8), "one": rate(1), "engine": engine}, bench.pairs)
  detail = f"{rates['eight'][-1]['rate']:.0f} tokens/s"
  row("cpu.serve.S5.eight", ratio(rates, "rate", "eight", "engine"), ">= 2.5", detail=detail)
  row("cpu.serve.S5.alone", ratio(rates, "rate", "one", "engine"), ">= 0.9")


def s6(bench: Bench) -> None:
  before = compilations()
  temperatures = (0.1 + 0.013 * i for i in itertools.count())

  def answered(**options: float) -> dict[str, float]:
    return {"rate": 1 / bench.ask(bench.request(0), SHORT, **options).total}

  rates = alternate(
    {
      "new": lambda: answered(temperature=next(temperatures)),
      "warm": lambda: answered(temperature=0.1),
    },
    3 * bench.pairs,
  )
  slower = ratio(rates, "rate", "warm", "new")
  row("cpu.serve.S6.new", slower, "<= 1.05")
  row("serve.S6.compilations", compilations() - before, "<= 0")


def s7(bench: Bench) -> None:
  ratios = []
  for i in range(bench.pairs):
    clip = bench.folder / f"hd{i}.mp4"
    make_clip(clip, frames=48, size=720)
    first = bench.ask(vr_jax.Request(clip, QUESTIONS[0])).first
    before = bench.service.metrics()["frames_encoded"]
    ratios.append(bench.ask(vr_jax.Request(clip, QUESTIONS[1])).first / first)
    encoded = bench.service.metrics()["frames_encoded"] - before
  row("cpu.serve.S7.second", Spread.over(ratios), "<= 0.1", detail=f"{1e3 * first:.0f} ms first")
  row("serve.S7.encoded", encoded, "<= 0")


def s9(bench: Bench) -> None:
  waits = []
  for i in range(10):
    ticket = bench.service.submit(bench.request(i), max_new_tokens=LONG, stream=True)
    events = iter(ticket)
    while not isinstance(next(events), Text):
      pass
    begun = time.perf_counter()
    ticket.cancel()
    while bench.service.metrics()["rows_busy"]:
      time.sleep(0.0005)
    waits.append(1e3 * (time.perf_counter() - begun))
  row("cpu.serve.S9.free_ms", Spread.over(waits), "<= 50")

  def useful(cancelled: int) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
      begun = time.perf_counter()
      tickets = [
        bench.service.submit(bench.request(i), max_new_tokens=SHORT) for i in range(100 + cancelled)
      ]
      gone = tickets[1::2][:cancelled]
      for ticket in gone:
        ticket.cancel()
      kept = [ticket for ticket in tickets if ticket not in gone]
      for ticket in kept:
        ticket.result()
      return {"rate": len(kept) / (time.perf_counter() - begun)}

    return run

  rates = alternate({"half": useful(100), "ideal": useful(0)}, bench.pairs)
  row("cpu.serve.S9.useful", ratio(rates, "rate", "half", "ideal"), ">= 0.9")


PARTS = {"S1": s1, "S2": s2, "S3": s3, "S4": s4, "S5": s5, "S6": s6, "S7": s7, "S9": s9}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", help="default: vr-mini")
  parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--pairs", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=20, help="of the open loop of S3")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    bench = Bench(args.checkpoint, Path(folder), args.pairs, args.seconds)
    with bench.service:
      for name in args.only:
        PARTS[name](bench)


if __name__ == "__main__":
  main()
