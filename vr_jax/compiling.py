"""How many programs JAX compiled in this process, and how long that took."""

import jax

_seconds: list[float] = []  # of each program, since this module was imported


def compilations() -> int:
  """Programs that XLA was asked for."""
  return len(_seconds)


def compile_seconds() -> float:
  """Seconds that they took together."""
  return sum(_seconds)


def _listen(event: str, seconds: float, **_: object) -> None:
  if event == "/jax/core/compile/backend_compile_duration":
    _seconds.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_listen)  # for the life of the process
