"""A decoder that crashes or never ends: what a file's name says happens when FFmpeg opens it.

`with_bad_decoder` makes it that of every Python that is started from now on.
"""

import os
from pathlib import Path

import pytest

SITE = """
import os, sys
import av
plain = av.open
def bad(file, *args, **options):
  name = os.path.basename(os.path.realpath(str(file)))
  if name.startswith("abort"):
    os.abort()
  while name.startswith("endless"):
    pass
  return plain(file, *args, **options)
av.open = bad
"""


def with_bad_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "sitecustomize.py").write_text(SITE)
  before = os.environ.get("PYTHONPATH")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), before])))
  from data_pipes import isolation

  monkeypatch.setattr(isolation, "_workers", isolation.Workers())  # those that run do not know
