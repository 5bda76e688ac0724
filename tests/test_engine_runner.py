"""Tasks (stage, shard): killed anywhere they end with the same bytes, and nothing is done twice."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import engine_toy
import pytest

from data_pipes import jobs
from data_pipes.engine import pipeline
from data_pipes.engine.graph import KEPT, QUARANTINED, REJECTED, Stage, StopRun, digest
from data_pipes.engine.job import EngineJob
from data_pipes.engine.pipeline import run_stages
from data_pipes.engine.store import Record, Store, manifest
from data_pipes.errors import InputError
from data_pipes.jobs import run_local

TESTS = Path(__file__).parent


def run(folder: Path, shards: int = 2, store: Path | None = None, only=None, **settings):
  store_ = Store(store or folder / "run", shards)
  if not store_.settings():
    store_.write_settings({})
  options = {
    k: settings.pop(k) for k in ("retry_quarantined", "stages", "item_seconds") if k in settings
  }
  run_stages(engine_toy.ref(folder, **settings), store_, shards=only, **options)
  return store_


def files(store: Store) -> dict[str, str]:
  """Content hashes of everything but progress."""
  return {
    str(p.relative_to(store.folder)): digest(p.read_bytes().hex())
    for p in sorted(store.folder.rglob("*"))
    if p.is_file() and "progress" not in p.parts
  }


def done(folder: Path) -> Counter:
  return Counter((folder / "done.log").read_text().splitlines())


def test_rows_pass_through_groups_joins_and_surveys(tmp_path):
  store = run(tmp_path)
  squares = {r["number"] for r in store.rows("a")}
  assert squares == {i * i for i in range(40)}
  kept = list(store.rows("b"))
  assert len(kept) == 40
  assert all(r["number"] % 2 == 0 for r in kept)
  assert all(r["parts"] == {"é": int(r["origin"]) ** 2} for r in kept)
  rejects = [r for i in range(2) for r in store.records("b", i) if r.status == REJECTED]
  assert len(rejects) == 40
  assert all(r.row["number"] % 2 == 1 for r in rejects)  # evidence is kept
  row = next(store.rows("d"))
  assert row["parts"]["agents"] == {"a": {"backend": "toy a"}, "b": {"backend": "toy b"}}
  table = {e["stage"]: e for e in manifest(store, engine_toy.ref(tmp_path).build())}
  assert table["b"] | {"reasons": 0} == {
    "stage": "b", "shards": 2, "of": 2, "outdated": 0, "inputs": 40, KEPT: 40, REJECTED: 40,
    QUARANTINED: 0, "reasons": 0,
  }  # fmt: skip
  assert table["d"]["reasons"] == {"first of its kind": 4}


def test_keys_are_in_order_and_shards_do_not_depend_on_the_rest(tmp_path):
  store = run(tmp_path, items=60)
  for shard in range(2):
    keys = [r.key for r in store.records("a", shard)]
    assert keys == sorted(keys)
    assert {store.shard_of(k) for k in keys} == {shard}


def test_a_second_run_does_nothing_and_more_items_only_the_new(tmp_path):
  store = run(tmp_path)
  before, count = files(store), sum(done(tmp_path).values())
  run(tmp_path)
  assert files(store) == before
  assert sum(done(tmp_path).values()) == count
  run(tmp_path, items=43)
  assert max(n for line, n in done(tmp_path).items() if line[0] in "ab") == 1
  assert sum(line[0] == "a" for line in done(tmp_path)) == 43


def test_the_number_of_workers_and_processes_change_no_byte(tmp_path):
  (tmp_path / "x").mkdir()
  (tmp_path / "y").mkdir()
  one = files(run(tmp_path / "x", workers=1))
  two = files(run(tmp_path / "y", where="process", workers=2, items=40))
  assert one == two


def kill_at_random(folder: Path, store: Path, times: int, rng: random.Random) -> int:
  """Runs until the end, killed `times` times; returns how many kills hit a running process."""
  code = (
    "import sys; sys.path.insert(0, sys.argv[3]);"
    "import test_engine_runner as t; from pathlib import Path;"
    "t.run(Path(sys.argv[1]), store=Path(sys.argv[2]), slow=0.004)"
  )
  command = [sys.executable, "-c", code, str(folder), str(store), str(TESTS)]
  hits = 0
  for _ in range(times):
    process = subprocess.Popen(command, start_new_session=True)
    try:
      log = folder / "done.log"
      start = log.stat().st_size if log.exists() else 0
      goal = start + rng.randrange(1, 400)
      while process.poll() is None and (not log.exists() or log.stat().st_size < goal):
        time.sleep(0.002)
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        hits += 1
    finally:
      process.wait()
  subprocess.run(command, check=True)
  return hits


def opened(folder: Path) -> Counter:
  """How often each (stage, process) was opened."""
  return Counter((folder / "opened.log").read_text().splitlines())


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_worker_opens_a_stage_once_for_all_shards(tmp_path, where):
  """A model may take minutes to load."""
  run(tmp_path, shards=8, where=where, workers=2)
  assert set(opened(tmp_path).values()) == {1}
  processes = Counter(line.split()[0] for line in opened(tmp_path))
  most = 2 if where == "process" else 1
  assert all(1 <= processes[stage] <= most for stage in "abcd")


def test_tasks_of_a_job_share_what_their_process_opened(tmp_path):
  (tmp_path / "whole").mkdir()
  store = Store(tmp_path / "run", 8)
  store.write_settings({})
  job = EngineJob(engine_toy.ref(tmp_path), store.folder)
  assert job.stages == ("1", "2")  # d surveys all shards
  run_local(job)
  assert opened(tmp_path) == {f"{stage} {os.getpid()}": 1 for stage in "abcd"}
  assert files(store) == files(run(tmp_path / "whole", shards=8))


@pytest.mark.multiprocess
def test_processes_of_a_job_keep_what_they_opened(tmp_path):
  store = Store(tmp_path / "run", 8)
  store.write_settings({})
  run_local(EngineJob(engine_toy.ref(tmp_path), store.folder), workers=2)
  assert set(opened(tmp_path).values()) == {1}
  assert len(list(store.rows("a"))) == 40


class DyingRay:
  """What `_run_stage` needs of Ray: calls that are done when they are waited for."""

  class exceptions:
    class RayTaskError(Exception):
      pass

    class RayActorError(Exception):
      pass

  @staticmethod
  def wait(calls):
    return calls[:1], calls[1:]

  @staticmethod
  def get(call):
    return call()


class DyingActor:
  def __init__(self, dies: bool, shards: list[int]):
    self.dies, self.shards, self.run = dies, shards, self

  def remote(self, stage, shard):
    def call():
      if self.dies:
        raise DyingRay.exceptions.RayActorError
      self.shards.append(shard)

    return call


def test_an_actor_that_died_for_good_leaves_its_shard_to_the_others(tmp_path):
  store, ran = Store(tmp_path / "run", 4), []
  store.write_settings({})
  job = EngineJob(engine_toy.ref(tmp_path), store.folder)
  actors = [DyingActor(dies, ran) for dies in (False, True, True)]
  jobs._run_stage(DyingRay, actors, job, "1", lambda *_: None)
  assert sorted(ran) == [0, 1, 2, 3]
  with pytest.raises(InputError, match="all actors died"):
    jobs._run_stage(DyingRay, actors[1:], job, "1", lambda *_: None)


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path):
  for name in ("killed", "whole"):
    (tmp_path / name).mkdir()
  store = tmp_path / "killed" / "run"
  hits = kill_at_random(tmp_path / "killed", store, 3, random.Random(7))
  assert hits >= 2
  assert files(Store(store)) == files(run(tmp_path / "whole"))
  # Each item was finished once, but for those in work at a kill.
  again = sum(n - 1 for n in done(tmp_path / "killed").values())
  assert again <= hits * 4 * 3  # stages times workers


LINK = """
import sys
from pathlib import Path
from data_pipes.engine.agents.ingest import _link
media, source = Path(sys.argv[1]), Path(sys.argv[2])
while not (media / "go").exists():
  pass
for i in range(300):
  _link(media, {"key": f"{i}"}, source)
"""


def test_a_worker_that_a_killed_run_left_is_in_nobodys_way(tmp_path):
  """Two processes make the same links at the same time, and neither fails."""
  (tmp_path / "a.mp4").touch()
  media = tmp_path / "W" / "media"
  media.mkdir(parents=True)
  command = [sys.executable, "-c", LINK, str(media), str(tmp_path / "a.mp4")]
  processes = [subprocess.Popen(command) for _ in range(3)]
  (media / "go").touch()
  assert [p.wait() for p in processes] == [0, 0, 0]
  links = sorted((media / "videos").iterdir())
  assert len(links) == 300
  assert all(link.resolve() == (tmp_path / "a.mp4").resolve() for link in links)


WORKER = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from data_pipes.jobs import die_with_parent
if __name__ == "__main__":
  with ProcessPoolExecutor(1, get_context("spawn"), die_with_parent) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_workers_end_when_their_run_is_killed(tmp_path):
  (tmp_path / "run.py").write_text(WORKER)
  command = [sys.executable, str(tmp_path / "run.py")]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert process.stdout
  worker = int(process.stdout.readline())
  os.kill(worker, 0)  # it is there
  process.kill()
  process.wait()
  process.stdout.close()
  deadline = time.monotonic() + 30
  while _alive(worker) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _alive(worker)


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  stat = Path(f"/proc/{pid}/stat")  # one that nobody waits for stays as a zombie
  return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_torn_line_is_cut_off_and_whole_ones_are_kept(tmp_path):
  with pytest.raises(StopRun, match="budget"):
    run(tmp_path, shards=1, stop_at=30, workers=1)
  (part,) = (tmp_path / "run" / "a").glob("*.part")
  lines = part.read_bytes().splitlines(keepends=True)
  assert len(lines) >= 30
  part.write_bytes(b"".join(lines) + lines[0][:17])
  (tmp_path / "go").touch()
  store = run(tmp_path, shards=1, stop_at=30, workers=1)
  assert set(done(tmp_path).values()) == {1}
  assert len(list(store.rows("a"))) == 40
  assert not list((tmp_path / "run").rglob("*.part"))


def test_a_poisoned_item_is_quarantined_and_tried_again_only_when_asked(tmp_path):
  store = run(tmp_path, poison=7)
  (bad,) = [r for i in range(2) for r in store.records("a", i) if r.status == QUARANTINED]
  assert (bad.key, bad.reason, bad.row) == ("00007", "RuntimeError: poisoned item", None)
  assert len(list(store.rows("a"))) == 39
  run(tmp_path)
  assert len(list(store.rows("a"))) == 39
  run(tmp_path, retry_quarantined=True)
  assert len(list(store.rows("a"))) == 40
  assert done(tmp_path)["a 00006"] == 1


def test_an_item_that_kills_its_process_is_quarantined(tmp_path):
  store = run(tmp_path, deadly=5, where="process", workers=2, items=12)
  bad = [r for i in range(2) for r in store.records("a", i) if r.status == QUARANTINED]
  assert [(r.key, r.reason) for r in bad] == [("00005", "the worker process died with this item")]
  assert len(list(store.rows("a"))) == 11


@pytest.mark.parametrize("where", ["process", "own process"])
def test_an_item_that_hangs_or_kills_costs_itself_alone(tmp_path, where):
  store = run(
    tmp_path, shards=1, deadly=3, endless=9, item_seconds=1, where=where, workers=2, items=16
  )
  bad = {r.key: r.reason for r in store.records("a", 0) if r.status == QUARANTINED}
  assert bad == {
    "00003": "the worker process died with this item",
    "00009": "the worker process hung: no result within 1 s",
  }
  assert len(list(store.rows("a"))) == 14
  counts = Counter(line.split()[0] for line in opened(tmp_path))
  assert counts["a"] <= 4  # two workers, and one for each that was lost


def test_a_stage_that_cannot_be_opened_ends_the_run(tmp_path):
  with pytest.raises(InputError, match="a: what the stage needs crashed: its process ended with"):
    run(tmp_path, shards=1, broken_model="a", where="process", workers=2)


class DoneShard:
  """A shard that an earlier run has done; opening it costs nothing."""

  def __init__(self, store, stage, shard, *_):
    self.stage, self.shard, self.current, self.total, self.left = stage, shard, True, 1, 0
    self.counts = Counter(kept=1)


def test_the_cost_of_a_shard_does_not_grow_with_their_number(tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline, "OpenShard", DoneShard)
  monkeypatch.setattr(Store, "rows", lambda self, stage: iter(()))
  started = time.process_time()
  progress = run_stages(engine_toy.ref(tmp_path, items=1), Store(tmp_path / "run", 2000))
  assert time.process_time() - started < 2
  assert {counts["shards"] for counts in progress.stages.values()} == {2000}


def test_shards_of_this_run_are_read_from_memory_as_from_their_files(tmp_path, monkeypatch):
  import pyarrow.parquet

  def opened_file(*_, **__):
    raise AssertionError("a shard that was just written is read from its file")

  with monkeypatch.context() as patch:
    patch.setattr(pyarrow.parquet, "ParquetFile", opened_file)
    store = run(tmp_path)
    remembered = [list(store.records(stage, i)) for stage in "abcd" for i in range(2)]
  fresh = Store(store.folder)
  assert remembered == [list(fresh.records(stage, i)) for stage in "abcd" for i in range(2)]
  store.path("a", 0).write_bytes(store.path("a", 1).read_bytes())  # another file in its place
  assert list(store.records("a", 0)) == list(store.records("a", 1))


def test_numbers_in_memory_are_those_of_the_columns(tmp_path):
  @dataclass(frozen=True)
  class Measured:
    key: str
    fps: float
    frames: int | None
    more: dict

  stage = Stage("m", Measured, lambda: None, {})
  rows = [
    {"key": "a", "fps": 25, "frames": None, "more": {"x": 1, "y": [1.5, "é"]}},
    {"key": "b", "fps": 0.1, "frames": 2**40, "more": {}},
  ]
  records = [Record(r["key"], r["key"], "f", KEPT, "", r, {"backend": "b"}) for r in rows]
  store = Store(tmp_path, 1)
  meta = {"columns": {"key": "str", "fps": "float", "frames": "int", "more": "json"}}
  store.commit(stage, 0, records, meta)
  remembered, read = list(store.records("m", 0)), list(Store(tmp_path, 1).records("m", 0))
  assert repr(remembered) == repr(read)  # 25.0, not 25
  assert [r.content() for r in remembered] == [r.content() for r in read]


def test_a_job_surveys_once_for_all_its_shards(tmp_path, monkeypatch):
  store = Store(tmp_path / "run", 8)
  store.write_settings({})
  job = EngineJob(engine_toy.ref(tmp_path, items=8), store.folder)
  run_local(job)
  surveyed = []
  monkeypatch.setattr(Store, "rows", lambda self, *which: surveyed.append(which) or iter(()))
  for shard in range(8):
    job.run("2", shard)
  assert all(len(which) == 2 for which in surveyed)  # of its own shard, none of all


def test_a_changed_stage_is_redone_with_what_follows_and_the_others_kept(tmp_path):
  store = run(tmp_path)
  table = manifest(store, engine_toy.ref(tmp_path, version_b=2).build())
  assert [e["outdated"] for e in table] == [0, 2, 0, 0]
  run(tmp_path, version_b=2)
  counts = done(tmp_path)
  assert {n for line, n in counts.items() if line[0] == "a"} == {1}
  assert {n for line, n in counts.items() if line[0] == "b"} == {2}


def test_changed_half_way_the_journal_is_not_mixed(tmp_path):
  with pytest.raises(StopRun):
    run(tmp_path, shards=1, stop_at=30, workers=1)
  (tmp_path / "go").touch()
  store = run(tmp_path, shards=1, stop_at=30, workers=1, version_a=2)
  assert done(tmp_path)["a 00000"] == 2
  (tmp_path / "whole").mkdir()
  assert files(store) == files(run(tmp_path / "whole", shards=1, version_a=2))


def test_stages_and_shards_can_be_done_apart_as_a_job_array_does(tmp_path):
  for shard in range(2):
    run(tmp_path, stages=["a", "b"], only=[shard])
  for shard in range(2):
    run(tmp_path, stages=["d", "c"], only=[shard])
  (tmp_path / "whole").mkdir()
  assert files(Store(tmp_path / "run")) == files(run(tmp_path / "whole"))


def test_a_stage_whose_input_is_missing_says_so(tmp_path):
  run(tmp_path, stages=["a"], only=[0])
  with pytest.raises(InputError, match=r"b, shard 1: reads shard 1 of a, which is not done yet"):
    run(tmp_path, stages=["b"], only=[1])


def test_two_runs_do_not_work_on_one_shard(tmp_path):
  import fcntl

  store = run(tmp_path, stages=["a"], only=[0])
  part = store.path("b", 0).with_suffix(".part")
  part.parent.mkdir()
  with open(part, "ab") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another run has this shard in work"):
      run(tmp_path, stages=["b"], only=[0])


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path):
  """A file size limit fails writes as a full disk does."""
  code = (
    "import sys, resource, signal; sys.path.insert(0, sys.argv[2]);"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "import test_engine_runner as t; from pathlib import Path;"
    "import pyarrow.parquet;"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY));"
    "t.run(Path(sys.argv[1]), shards=1)"
  )
  assert hasattr(resource, "RLIMIT_FSIZE")
  command = [sys.executable, "-c", code, str(tmp_path), str(TESTS)]
  full = subprocess.run(command, capture_output=True, text=True)
  assert full.returncode != 0
  assert "StopRun" in full.stderr
  assert "nothing that was done is lost" in full.stderr
  (part,) = (tmp_path / "run" / "a").glob("*.part")
  journalled = part.read_bytes().count(b"\n")
  assert journalled > 5
  run(tmp_path, shards=1)
  again = sum(n - 1 for line, n in done(tmp_path).items() if line[0] == "a")
  assert again <= 2 * 3 + 1  # those in work when it was full
  (tmp_path / "whole").mkdir()
  assert files(Store(tmp_path / "run")) == files(run(tmp_path / "whole", shards=1))


@pytest.mark.parametrize(
  ("content", "message"),
  [('{"format": 9, "shards": 2}', "format 9"), ("{", "accepted: what vr engine run wrote")],
)
def test_a_folder_that_is_no_run(tmp_path, content, message):
  (tmp_path / "run.json").write_text(content)
  with pytest.raises(InputError, match=message):
    Store(tmp_path, 2)


def test_the_number_of_shards_stays(tmp_path):
  run(tmp_path)
  with pytest.raises(InputError, match="has 2 shards, 3 were asked for"):
    Store(tmp_path / "run", 3)
  with pytest.raises(InputError, match="found no run"):
    Store(tmp_path / "other")
  store = Store(tmp_path / "run")
  store.path("a", 0).write_bytes(b"PAR1 not")
  with pytest.raises(InputError, match="no shard of this engine"):
    store.meta("a", 0)


def test_progress_is_written_and_names_what_stopped(tmp_path):
  with pytest.raises(StopRun):
    run(tmp_path, stop_at=20)
  found = json.loads((tmp_path / "run" / "progress" / "local.json").read_text())
  assert found["stopped"] == "the budget is spent"
  assert not found["finished"]
  (tmp_path / "go").touch()
  run(tmp_path, stop_at=20)
  found = json.loads((tmp_path / "run" / "progress" / "local.json").read_text())
  assert found["finished"]
  assert found["stages"]["a"]["done"] == found["stages"]["a"]["total"] == 40
  assert found["stages"]["a"]["reused"] > 0
