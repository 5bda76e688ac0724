"""Addresses gs://BUCKET/…: work directories, checkpoints, configs and data in a bucket."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_server import bucket

from data_pipes import buckets
from data_pipes.buckets import as_path, copy_files, here
from data_pipes.content import digest_of_data
from data_pipes.errors import InputError
from vr_jax import cli, load
from vr_jax.checkpoint import checkpoint_sha256, load_params
from vr_jax.configs import load_config
from vr_jax.interop.convert import convert
from vr_jax.training.digests import digest_of_weights
from vr_jax.training.loop import train
from vr_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("programs_on_disk")
CONFIG = str(Path(__file__).parent / "toy_config.py")


def test_without_gcsfs_an_address_is_one_line_and_makes_no_folder(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
  assert cli.main(["train", "--config", CONFIG, "--workdir", "gs://bucket/run"]) == 2
  line = "vr train: --workdir: gs://bucket/run: gs:// needs gcsfs; pip install 'vr-jax[gcs]'\n"
  assert capsys.readouterr().err == line
  assert cli.main(["train", "--config", "gs:///run.py", "--workdir", "W"]) == 2
  assert capsys.readouterr().err == (
    "vr train: config: gs:///run.py: no bucket; accepted: gs://BUCKET/PATH\n"
  )
  words = ["train", "--config", CONFIG, "--workdir", "W", "--config.input.media=gs://bucket/media"]
  assert cli.main(words) == 2
  assert "config.input.media: gs://bucket/media: accepted: a path of" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  """gs://bucket, served here."""
  with bucket() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    patch.setenv(buckets.CACHE, str(tmp_path_factory.mktemp("copies")))
    yield "gs://bucket"


@pytest.mark.gcs
@pytest.mark.multiprocess
def test_a_killed_run_in_a_bucket_ends_as_its_twin_on_a_disk(address, tmp_path):
  run = f"""
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from vr_jax import cli
sys.exit(cli.main(["train", "--config", {CONFIG!r}, "--workdir", "{address}/runs/killed"]))
"""
  path = os.pathsep.join(str(p) for p in (Path(__file__).parent.parent, Path(__file__).parent))
  environment = os.environ | {"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"}
  killed = subprocess.run(
    [sys.executable, "-c", run],
    env=environment | {"JAX_PLATFORMS": "cpu", "TOY_SIGNAL": "SIGKILL:7"},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert killed.returncode == -9, killed.stderr
  workdir = f"{address}/runs/killed"
  assert train(load_config(CONFIG), workdir).finished
  train(load_config(CONFIG), tmp_path / "twin")
  ours, twins = load_params(workdir), load_params(tmp_path / "twin")
  jax.tree.map(np.testing.assert_array_equal, ours, twins)
  copy_files(as_path(f"{workdir}/metrics.jsonl"), tmp_path / "metrics.jsonl")
  assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 11))
  assert {p.name for p in tmp_path.iterdir()} == {"twin", "metrics.jsonl"}  # no folder "gs:"
  with pytest.raises(InputError, match=r"gs://bucket/runs/killed was made with another config: lr"):
    train(load_config(f"{CONFIG}:lr=0.5"), workdir)


@pytest.mark.gcs
def test_a_model_is_converted_into_a_bucket_and_opened_there(address, tmp_path):
  convert("vr-mini", f"{address}/models/mini", "vr", logits="never", report=lambda line: None)
  with pytest.raises(InputError, match="gs://bucket/models/mini: exists; nothing is written over"):
    convert("vr-mini", f"{address}/models/mini", "vr", logits="never", report=lambda line: None)
  ours, packaged = load(f"{address}/models/mini"), load()
  jax.tree.map(np.testing.assert_array_equal, ours.params, packaged.params)
  copy_files(as_path(f"{address}/models/mini"), tmp_path / "mini")
  assert checkpoint_sha256(f"{address}/models/mini") == checkpoint_sha256(tmp_path / "mini")
  assert digest_of_weights(f"{address}/models/mini") == digest_of_weights(tmp_path / "mini")


@pytest.mark.gcs
def test_configs_and_data_are_copied_once_and_again_when_they_change(address, tmp_path):
  copy_files(Path(CONFIG), as_path(f"{address}/toy.py"))
  assert load_config(f"{address}/toy.py:lr=0.5").lr == 0.5
  for name, content in {"a.json": "[1]", "b/manifest.json": "{}", "b/x.array_record": "x"}.items():
    as_path(f"{address}/data/{name}").write_text(content)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
  for name in ("a.json", "b"):
    assert digest_of_data(f"{address}/data/{name}") == digest_of_data(tmp_path / name)
  first = here(f"{address}/data/a.json")
  assert here(f"{address}/data/a.json") == first
  as_path(f"{address}/data/a.json").write_text("[1, 2]")
  assert here(f"{address}/data/a.json").read_text() == "[1, 2]"
  with pytest.raises(InputError, match="gs://bucket/none: no such file or folder in the bucket"):
    here(f"{address}/none")


@pytest.mark.gcs
def test_a_bucket_that_is_not_there_is_one_line(address, capsys):
  assert cli.main(["train", "--config", CONFIG, "--workdir", "gs://other/run"]) == 2
  (line,) = capsys.readouterr().err.splitlines()[-1:]
  assert line.startswith("vr train: --workdir gs://other/run: the bucket cannot be used (")
