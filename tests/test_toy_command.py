"""A command is a file and a line of a table: a toy one, its options and what it refuses."""

import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from data_pipes.errors import InputError
from vr_jax import cli


@dataclass(frozen=True)
class Paint:
  """What `vr paint` takes: every kind of option that there is."""

  colour: str = field(metadata={"positional": True, "help": "such as red", "metavar": "COLOUR"})
  walls: tuple[int, ...] = field(
    default=(1,), metadata={"help": "which (default: 1)", "metavar": "N"}
  )
  hole: tuple[str, ...] = field(
    default=(), metadata={"repeat": True, "help": "left out", "metavar": "SPEC"}
  )
  size: tuple[int, int] | None = field(
    default=None, metadata={"help": "of a wall", "metavar": ("WIDTH", "HEIGHT")}
  )
  tool: Literal["brush", "roller"] = field(default="brush", metadata={"help": "what with"})
  hours: float | None = field(default=None, metadata={"help": "the most it may take"})
  dry: bool = field(default=True, metadata={"flag": "--wet", "help": "do not wait for it to dry"})
  coats: int = field(default=2, metadata={"flag": "--layers", "help": "default: %(default)s"})
  fast: bool = field(default=False, metadata={"help": "in a hurry"})
  seen: int = 0  # no help: no option

  def __post_init__(self):
    if self.coats < 1:
      raise InputError(f"coats={self.coats}; accepted: 1 or more")


@dataclass(frozen=True)
class Place:
  folder: Path = field(metadata={"help": "where"})


def paint(options: Paint, place: Place, overrides: list[str]) -> int:
  print(options, place, overrides)
  return 7


def blank(place: Place) -> None:
  print(place)


@pytest.fixture
def commands(monkeypatch):
  """The toy's file, and its lines of the table."""
  module = types.ModuleType("vr_jax.commands.toy")
  module.paint, module.blank = paint, blank
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(cli.COMMANDS, "paint", cli.Command("toy:paint", "paint the walls"))
  monkeypatch.setitem(cli.COMMANDS, "blank", cli.Command("toy:blank", "wash the walls"))


def refused(capsys, *words) -> str:
  with pytest.raises(SystemExit) as end:
    cli.main(words)
  assert end.value.code == 2
  return capsys.readouterr().err


def test_options_are_the_fields(commands, capsys):
  words = "paint red --folder d --walls 1 3 --hole a --hole b --size 4 5 --tool roller --hours 1.5"
  assert cli.main([*words.split(), "--wet", "--layers", "3", "--fast", "--config.lr=1"]) == 7
  options = Paint("red", (1, 3), ("a", "b"), (4, 5), "roller", 1.5, False, 3, True)
  assert capsys.readouterr().out == f"{options} {Place(Path('d'))} ['config.lr=1']\n"


def test_defaults_are_those_of_the_dataclass(commands, capsys):
  assert cli.main(["paint", "red", "--folder", "d"]) == 7
  assert capsys.readouterr().out == f"{Paint('red')} {Place(Path('d'))} []\n"


def test_a_command_that_returns_nothing_is_done(commands, capsys):
  assert cli.main(["blank", "--folder", "d"]) == 0


def test_what_the_dataclass_refuses_is_the_users_fault(commands, capsys):
  assert cli.main(["paint", "red", "--folder", "d", "--layers", "0"]) == 2
  assert capsys.readouterr().err == "vr paint: coats=0; accepted: 1 or more\n"


def test_help_has_the_words_of_the_fields(commands, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(["paint", "--help"])
  assert end.value.code == 0
  text = capsys.readouterr().out
  assert "paint the walls" in text
  assert "Any field of the config: --config.key=value" in text
  for line in ("COLOUR", "--walls N [N ...]", "--size WIDTH HEIGHT", "--tool {brush,roller}"):
    assert line in text
  assert "default: 2" in text
  assert "--seen" not in text


def test_the_table_is_the_help_of_vr(commands, capsys):
  with pytest.raises(SystemExit):
    cli.main(["--help"])
  assert "paint the walls" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    # The unknown option is named though something else is missing.
    ("paint --foldre d", "vr paint: unknown option '--foldre'; did you mean '--folder'?"),
    ("paint red --foldre=d", "vr paint: unknown option '--foldre'; did you mean '--folder'?"),
    ("paint red --xyzzy", "vr paint: unknown option '--xyzzy'"),
    ("ask --regoin box:1,2,3,4@0", "vr ask: unknown option '--regoin'; did you mean '--region'?"),
    ("pain red", "vr: unknown command 'pain'; did you mean 'paint'?"),
    ("data chekc", "vr data: unknown command 'chekc'; did you mean 'check'?"),
    ("--verbose", "vr: unknown option '--verbose'"),
  ],
)
def test_an_unknown_word_is_named_with_the_nearest_and_the_usage(commands, capsys, words, reason):
  prog = reason.partition(":")[0]
  first, usage = refused(capsys, *words.split()).splitlines()[:2]
  assert first == reason
  assert usage.startswith(f"usage: {prog} [-h]")


def test_an_unknown_command_with_no_neighbour_names_all(commands, capsys):
  err = refused(capsys, "zzzzz")
  assert "accepted: quickstart, train" in err
  assert "paint" in err


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    ("paint red", "vr paint: error: the following arguments are required: --folder"),
    ("paint red --folder d --tool axe", "vr paint: error: argument --tool: invalid choice: 'axe'"),
    ("paint red blue --folder d", "vr paint: error: unrecognized arguments: blue"),
    ("paint red --folder d --layers x", "vr paint: error: argument --layers: invalid int value"),
    ("blank --folder d --config.lr=1", "vr blank: error: --config.… belongs to vr train, "),
    ("engine", "vr engine: error: the following arguments are required: STEP"),
    ("", "vr: error: the following arguments are required: COMMAND"),
  ],
)
def test_other_faults_are_told_as_argparse_tells_them(commands, capsys, words, reason):
  err = refused(capsys, *words.split())
  assert reason in err
  assert err.startswith("usage: ")


def test_an_option_may_be_shortened_and_a_value_may_look_like_one(commands, capsys):
  assert cli.main(["blank", "--fold", "d"]) == 0
  assert cli.main(["sweep", "none.py", "--slurm", "--time 1 --mem 2"]) == 2
  assert "no such file" in capsys.readouterr().err


def entries(table=cli.COMMANDS, path=()):
  for name, entry in table.items():
    if isinstance(entry, cli.Group):
      yield from entries(entry.commands, (*path, name))
    else:
      yield (*path, name)


def test_no_help_needs_jax():
  code = f"""
import contextlib, io, sys
from vr_jax import cli
for words in {[(), *entries()]!r}:
  with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
    cli.main([*words, "--help"])
  assert out.getvalue().startswith(" ".join(["usage: vr", *words])), words
  assert "jax" not in sys.modules, words
"""
  subprocess.run([sys.executable, "-c", code], check=True)
