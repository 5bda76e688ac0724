"""`vr doctor` and `vr --version`: what is here, read from the installation itself."""

import json
import os
import sys
from importlib import metadata

import pytest

import vr_jax
from vr_jax import cli
from vr_jax.commands import doctor


def test_facts_are_those_of_the_installation(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = tmp_path / "vr_jax" / "videos"
  folder.mkdir(parents=True)
  (folder / "index").write_bytes(b"12345")
  assert cli.main(["doctor", "--json"]) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts["versions"]["jax"] == metadata.version("jax")
  assert facts["devices"] == {"kinds": {"cpu: cpu": 8}}
  assert facts["caches"]["video indexes"] == {"folder": str(folder), "bytes": 5}
  assert facts["missing"]["test"] == []  # or this test would not run
  assert "libtpu" in facts["missing"]["tpu"]  # of jax[tpu], which has an extra of its own


def test_an_extra_that_is_not_here_says_how_to_get_it(monkeypatch, capsys):
  is_here = doctor._is_here
  monkeypatch.setattr(doctor, "_is_here", lambda p: p not in ("ray", "pyarrow") and is_here(p))
  assert doctor.missing_of_extras()["ray"] == ["pyarrow", "ray"]  # with what [engine] lacks
  assert cli.main(["doctor"]) == 0
  assert "extra [ray]: lacks pyarrow, ray: pip install '.[ray]'" in capsys.readouterr().out


def test_without_a_device_the_reason_stands_there(monkeypatch, capsys):
  def none():
    raise RuntimeError("no plug-in\nfor tpu")

  monkeypatch.setattr("jax.devices", none)
  assert cli.main(["doctor"]) == 2
  assert "devices:  none: no plug-in for tpu" in capsys.readouterr().out


def test_the_version_is_the_installed_one(capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(["--version"])
  assert ended.value.code == 0
  assert capsys.readouterr().out == f"vr-jax {metadata.version('vr-jax')}\n"


def test_the_face_shows_what_users_import():
  assert set(vr_jax.__all__) <= set(dir(vr_jax))


def unread(monkeypatch, words) -> int | str | None:
  """The exit code of a command whose stdout is a pipe that nobody reads."""
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as stdout:
    monkeypatch.setattr(sys, "stdout", stdout)
    try:
      return cli.main(words)
    except SystemExit as end:
      return end.code


@pytest.mark.parametrize(
  "words",
  [["--version"], ["--help"], ["data", "--help"], ["config", "show", "stage1_align"], ["doctor"]],
)
def test_output_that_nobody_reads_ends_a_command_quietly(monkeypatch, capsys, words):
  assert unread(monkeypatch, words) == 141
  assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_our_fault(monkeypatch):
  def broken(*_):
    raise BrokenPipeError("of a worker")

  monkeypatch.setattr(doctor, "run", broken)
  with pytest.raises(BrokenPipeError, match="of a worker"):
    cli.main(["doctor"])
