"""What workers of data_pipes.isolation are asked to do in tests."""

import os
import signal
import time

import numpy as np

from data_pipes.errors import Defect


def double(array: np.ndarray) -> tuple[int, dict[str, np.ndarray]]:
  return os.getpid(), {"twice": array * 2}


def abort() -> None:
  os.abort()


def leave(code: int) -> None:
  os._exit(code)


def loop() -> None:
  while True:
    pass


def hold_the_interpreter() -> None:
  """A loop in C that no Python thread interrupts."""
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
  pow(3, 10**9)


def refuse() -> None:
  raise Defect("media-damaged", "as it says")


def blunder() -> None:
  raise KeyError("ours")


class Unreadable(Exception):
  def __init__(self, a, b):
    super().__init__(a)


def raise_what_does_not_come_back() -> None:
  raise Unreadable("lost", 2)


def nap(seconds: float) -> int:
  time.sleep(seconds)
  return os.getpid()
