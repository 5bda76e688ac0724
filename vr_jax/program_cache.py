"""Compiled programs, kept on disk from one process to the next."""

import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_on_disk(folder: str | os.PathLike | None = None) -> Path:
  """Keeps compiled programs in `folder`, so that the next process need not compile them.

  The default folder is that of JAX_COMPILATION_CACHE_DIR, or `vr_jax/programs` in the user's cache
  (of a user without a home, in the folder of temporary files).
  """
  home = os.path.expanduser("~")
  cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"))
  if not cache.is_absolute():  # `~` stands for no home
    cache = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
  chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache / "vr_jax" / "programs"
  jax.config.update("jax_compilation_cache_dir", str(chosen))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  compilation_cache.reset_cache()  # a folder given after the first program is heeded too
  return Path(chosen)
