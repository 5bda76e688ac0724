"""Signals that end a run: it saves first."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import jax

from vr_jax.training.checkpoints import Checkpoints

# SIGHUP: the terminal, or the connection that it came over, is gone.
STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def stop_signals(checkpoints: Checkpoints) -> Iterator[Callable[[int], bool]]:
  """Gives `stopped(step)`: SIGTERM, SIGHUP or Ctrl-C came. A second Ctrl-C interrupts at once.

  Further SIGTERMs change nothing: a machine that is taken away sends several. SIGHUP stays ignored
  where it was (nohup). Where there are several processes, all stop at the same step, whichever got
  the signal.
  """
  came: list[int] = []
  several = jax.process_count() > 1

  def note(number, frame):
    if number == signal.SIGINT:
      signal.signal(number, before[number])
      print("stopping after this step and saving; Ctrl-C again to stop now", file=sys.stderr)
    if several and not came:
      os.kill(os.getpid(), signal.SIGTERM)
    came.append(number)

  # With several processes JAX itself watches for SIGTERM and tells the others.
  watched = [s for s in (*STOP, signal.SIGINT) if not (several and s == signal.SIGTERM)]
  watched = [s for s in watched if signal.getsignal(s) is not signal.SIG_IGN]
  before = {}
  with contextlib.suppress(ValueError):  # not the main thread; signals are somebody else's
    before = {s: signal.signal(s, note) for s in watched}
  try:
    yield checkpoints.reached_preemption if several else lambda step: bool(came)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
