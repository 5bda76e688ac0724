"""Calls to endpoints: answered ones are never paid for again, and all are accounted for.

One SQLite file (WAL, so on a local disk) for each process name that works in the folder:

    W/calls/local.sqlite

Before a request goes out it is entered as open, at the most that it may cost; with its answer it
becomes answered, at what it cost. What a killed run left open is listed as cut off: it may have
been paid for, is counted so, and is the only thing that repeats.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipes.engine.graph import StopRun

OPEN, ANSWERED, FAILED, CUT_OFF = "open", "answered", "failed", "cut off"
UNUSABLE = "unusable"  # an answer, but a refusal or one that did not fit

_TABLE = """
create table if not exists calls (
  request text not null, stage text not null, model text not null, status text not null,
  answer text, input_tokens integer, output_tokens integer, usd real,
  started real not null, seconds real, note text);
create index if not exists by_request on calls (request, status);
"""


@dataclass(frozen=True)
class Price:
  """US dollars for a million tokens."""

  input: float = 0.0
  output: float = 0.0

  def usd(self, input_tokens: int, output_tokens: int) -> float:
    return (input_tokens * self.input + output_tokens * self.output) / 1e6


class Calls:
  """The cache, ledger and budget of the calls of one process; safe to use from threads.

  Args:
    folder: W/calls. name: of this process's file; files of others there are read.
    budget_usd: no call is begun when this is spent, or might be overspent by those in flight.
    alone: the budget is this process's alone; otherwise what others had spent counts too.
    retry: unusable answers of earlier runs are asked for again.

  Attributes:
    halted: set when the run stops; who waits to ask again need not.
  """

  def __init__(
    self,
    folder: Path,
    name: str = "local",
    budget_usd: float | None = None,
    alone: bool = False,
    retry: bool = False,
  ):
    self.halted = threading.Event()
    self._usable = (time.time() if retry else 0.0, ANSWERED, UNUSABLE)
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self.budget = folder, budget_usd
    self._lock = threading.Lock()
    others = [path for path in sorted(folder.glob("*.sqlite")) if path.stem != name]
    with _stop_if_full(folder):
      self._db = self._connect(folder / f"{name}.sqlite")
      self._others = [db for path in others if (db := _connect_to_read(path))]
      # Whoever had this name is gone: what it left open was cut off.
      self._db.execute("update calls set status = ? where status = ?", (CUT_OFF, OPEN))
    self._spent = sum(_sum_usd(db) for db in (self._db, *(() if alone else self._others)))
    self._paid: dict[int, float] = {}  # call -> for tries of it that gave no answer
    self._reserved: dict[int, float] = {}  # call -> the most that it may cost

  @staticmethod
  def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=60)
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = normal")
    db.executescript(_TABLE)
    return db

  def close(self) -> None:
    for db in (self._db, *self._others):
      db.close()

  def answer(self, request: str) -> Any:
    """The stored answer to a request (its `request_key`), None if there is none."""
    since, *statuses = self._usable
    with self._lock, _stop_if_full(self.folder):
      for db in (self._db, *self._others):
        row = db.execute(
          "select answer from calls where request = ? and "
          "(status = ? or status = ? and started >= ?) order by started desc",
          (request, *statuses, since),
        ).fetchone()
        if row:
          return json.loads(row[0])
    return None

  def give_up(self, requests: Iterable[str]) -> None:
    """Marks the answers to these requests as unusable; they stay stored, as they were paid for."""
    with self._lock, _stop_if_full(self.folder):
      for request in requests:
        self._db.execute(
          "update calls set status = ? where request = ? and status = ?",
          (UNUSABLE, request, ANSWERED),
        )

  def begin(self, request: str, stage: str, model: str, most_usd: float) -> int:
    """Enters a call as open and sets the most that it may cost aside; returns its number.

    Raises:
      StopRun: the budget does not allow it.
    """
    with self._lock, _stop_if_full(self.folder):
      self._check_budget(most_usd)
      cursor = self._db.execute(
        "insert into calls (request, stage, model, status, started, usd) values (?, ?, ?, ?, ?, ?)",
        (request, stage, model, OPEN, time.time(), most_usd),
      )
      assert cursor.lastrowid is not None
      self._reserved[cursor.lastrowid] = most_usd
      return cursor.lastrowid

  def try_again(self, number: int, most_usd: float) -> None:
    """Counts a try of a call as paid for, at the most that it may have cost, and sets as much aside
    for the next. Raises StopRun as `begin`."""
    with self._lock, _stop_if_full(self.folder):
      self._spent += most_usd
      self._paid[number] = self._paid.get(number, 0.0) + most_usd
      self._db.execute("update calls set usd = usd + ? where rowid = ?", (most_usd, number))
      self._check_budget(0.0)

  def _check_budget(self, more: float) -> None:
    reserved = sum(self._reserved.values())
    if self.budget is not None and self._spent + reserved + more > self.budget:
      raise StopRun(
        f"budget of {self.budget:g} USD: {self._spent:.4f} spent, {reserved:.4f} set aside for "
        f"calls in flight, the next may cost {more:.4f}; raise --budget-usd to go on"
      )

  def end(
    self,
    number: int,
    answer: Any,
    *,
    input_tokens: int = 0,
    output_tokens: int = 0,
    usd: float = 0.0,
    note: str = "",
  ) -> None:
    """Stores the answer, or (None) that there was none; `usd` is what the last try cost."""
    with self._lock, _stop_if_full(self.folder):
      (started,) = self._db.execute(
        "select started from calls where rowid = ?", (number,)
      ).fetchone()
      self._reserved.pop(number, None)
      self._spent += usd
      usd += self._paid.pop(number, 0.0)
      self._db.execute(
        "update calls set status = ?, answer = ?, input_tokens = ?, output_tokens = ?, usd = ?, "
        "seconds = ?, note = ? where rowid = ?",
        (
          FAILED if answer is None else ANSWERED,
          None if answer is None else json.dumps(answer),
          input_tokens,
          output_tokens,
          usd,
          time.time() - started,
          note,
          number,
        ),
      )


def request_key(raw: str) -> str:
  """Hash of a request's canonical JSON."""
  return hashlib.blake2b(raw.encode("utf-8", "replace"), digest_size=16).hexdigest()


def spent_by_file(folder: Path) -> dict[str, float]:
  """US dollars that each process name has spent."""
  out = {}
  for path in sorted(folder.glob("*.sqlite")):
    if db := _connect_to_read(path):
      out[path.stem] = _sum_usd(db)
      db.close()
  return out


def ledger(folder: Path) -> list[dict[str, Any]]:
  """Calls by stage, model and status: how many, tokens, US dollars, mean seconds."""
  sums: dict[tuple[str, str, str], list[float]] = {}
  for path in sorted(folder.glob("*.sqlite")):
    db = _connect_to_read(path)
    if db is None:
      continue
    rows = db.execute(
      "select stage, model, status, count(*), coalesce(sum(input_tokens), 0), "
      "coalesce(sum(output_tokens), 0), coalesce(sum(usd), 0), coalesce(sum(seconds), 0) "
      "from calls group by 1, 2, 3"
    ).fetchall()
    db.close()
    for stage, model, status, *numbers in rows:
      into = sums.setdefault((stage, model, status), [0.0] * 5)
      for i, number in enumerate(numbers):
        into[i] += number
  return [
    {
      "stage": stage,
      "model": model,
      "status": status,
      "calls": int(calls),
      "input_tokens": int(tokens_in),
      "output_tokens": int(tokens_out),
      "usd": round(usd, 6),
      "mean_seconds": round(seconds / calls, 4),
    }
    for (stage, model, status), (calls, tokens_in, tokens_out, usd, seconds) in sorted(sums.items())
  ]


def _connect_to_read(path: Path) -> sqlite3.Connection | None:
  """To another process's file; None while that has no table yet."""
  db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False, timeout=60)
  if db.execute("select 1 from sqlite_master where name = 'calls'").fetchone():
    return db
  db.close()
  return None


def _sum_usd(db: sqlite3.Connection) -> float:
  return db.execute("select coalesce(sum(usd), 0) from calls").fetchone()[0]


@contextlib.contextmanager
def _stop_if_full(folder: Path) -> Iterator[None]:
  """A ledger that cannot be written stops the run: an unrecorded answer would be paid for twice."""
  try:
    yield
  except sqlite3.OperationalError as error:
    raise StopRun(f"{folder}: {error}; nothing that was done is lost: run again") from error
