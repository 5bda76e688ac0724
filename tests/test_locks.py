"""A second run in a work directory of the product is one line, and changes nothing there."""

from pathlib import Path

import pytest

from data_pipes.files import LOCK, locked
from vr_jax import cli

TESTS = Path(__file__).parent
ENGINE = "engine run --config engine_embedded:videos={folder} --workdir {out}"
PREPARE = "data prepare {folder}/f.json --media {folder} --out {out}"
SWEEP = f"sweep {TESTS}/sweep_config.py --workdir {{out}}"


@pytest.mark.parametrize(
  "words",
  [
    ENGINE,
    f"{ENGINE} --only 1:0",
    f"{ENGINE} --runner array",
    PREPARE,
    f"{PREPARE} --task index 0",
    f"{PREPARE} --runner array",
    SWEEP,
    f"{SWEEP} --only lr=0.02",
    f"{SWEEP} --via slurm",
    f"train --config {TESTS}/toy_config.py --workdir {{out}}",
  ],
)
def test_a_second_run_is_one_line(tmp_path, capsys, words):
  (tmp_path / "f.json").write_text("[]")
  out = tmp_path / "W"
  out.mkdir()
  for name in ("run.json", "settings.json", "config.json"):
    (out / name).write_text("of the first run")
  with locked(out, "the first run"):
    code = cli.main(words.format(folder=tmp_path, out=out).split())
    files = {p.name: p.read_text() for p in out.iterdir() if p.name != LOCK}
  err = capsys.readouterr().err.splitlines()[-1]
  assert code == 2
  assert f"{out}: another run (process " in err
  assert err.endswith("is at work here; wait for it, or end it")
  assert set(files.values()) == {"of the first run"}
  assert len(files) == 3
