"""Loading, overriding, storing and comparing configs."""

import random
import re
import textwrap

import jax
import pytest
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax import cli, configs
from vr_jax.configs import (
  MISSING,
  base_config,
  diff,
  find_config,
  from_json,
  load_config,
  packaged_configs,
  parse_arg,
  to_json,
)


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(
    textwrap.dedent("""
      from vr_jax.configs import base_config, parse_arg

      def get_config(arg=None):
        arg = parse_arg(arg, steps=5, lr=1e-3, freeze=False, files=None)
        config = base_config()
        config.total_steps = arg.steps
        config.lr = arg.lr
        config.schedule = [("img/.*", None if arg.freeze else {}), (".*", {"peak": 2.0})]
        return config
    """)
  )
  return str(path)


def test_arguments_and_overrides_reach_their_fields(config_file):
  config = load_config(
    f"{config_file}:steps=7,freeze",
    [
      "config.lr=1e-4",
      "--config.input.batch_size=3",
      "schedule.1.1.peak=0.5",
      "mesh=(('data',2),)",
    ],
  )
  assert config.total_steps == 7
  assert config.lr == 1e-4
  assert config.input.batch_size == 3
  assert config.schedule == (("img/.*", None), (".*", {"peak": 0.5}))
  assert config.mesh == (("data", 2),)
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.new_field = 1


@pytest.mark.parametrize(
  ("args", "overrides", "message"),
  [
    ("stepz=7", [], "argument 'stepz' is not known; did you mean 'steps'"),
    ("steps=1e3", [], "steps='1e3': expected int"),
    ("", ["config.input.batchsize=3"], "batchsize is not known; did you mean 'input.batch_size'"),
    ("", ["total_steps=1e3"], "config.total_steps='1e3': expected int"),
    ("", ["input.batch_size=1e3"], "config.input.batch_size='1e3': expected int"),
    ("", ["input.shuffle=yes"], "config.input.shuffle='yes': expected bool"),
    ("", ["lr=fast"], "config.lr='fast': expected float"),
    ("", ["schedule=3"], "config.schedule='3': expected tuple"),
    ("", ["schedule.2=3"], "expected an item from 0 to 1, got '2'"),
    ("", ["input=3"], "config.input is a group; set one of its fields: .*batch_size"),
    ("", ["lr.x=3"], "config.lr.x is not known"),
    ("", ["lr"], "override 'lr': expected config.key=value; write --lr=VALUE"),
    ("", ["input.files=('a.json')"], r"expected tuple; .* is written \('a.json',\)"),
    ("", ["input.files=a.json"], r"expected tuple; .* is written \('a.json',\)"),
    ("", ["lr=None"], "config.lr='None': expected float"),
  ],
)
def test_wrong_keys_and_types_are_refused(config_file, args, overrides, message):
  with pytest.raises(InputError, match=message):
    load_config(f"{config_file}:{args}", overrides)


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("config.lrr = 1", "run.py:5: config has no field 'lrr'; did you mean 'lr'"),
    ("config.input.bach_size = 1", "run.py:5: .* did you mean 'input.batch_size'"),
    ("config.seed = 0.5", "run.py:5: TypeError"),
    ("1 / 0", "run.py:5: ZeroDivisionError"),
    ("return 3", "returned int, not a ConfigDict"),
    ("config.model = [base_config]", "config.model.0 is a function"),
    ("config.input.files = ('a.json')", r"run.py:5: 'a.json' is no tuple; write \('a.json',\)"),
    ("config.log_steps = 0", "config.log_steps=0: accepted: at least 1"),
    ("config.tokenizer = 's3://bucket/tokenizer'", "config.tokenizer: s3://bucket/tokenizer: acc"),
    ("config = (", "run.py:[56]: SyntaxError"),
  ],
)
def test_errors_in_a_config_file_are_one_line_with_the_place(tmp_path, body, message):
  path = tmp_path / "run.py"
  path.write_text(
    "from vr_jax.configs import base_config\n"
    f"def get_config():\n  config = base_config()\n\n  {body}\n  return config\n"
  )
  with pytest.raises(InputError, match=message) as error:
    load_config(str(path))
  assert "\n" not in str(error.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["run.py"]


def test_an_argument_that_nobody_reads_is_refused(tmp_path):
  path = tmp_path / "run.py"
  path.write_text("from vr_jax.configs import base_config as get_config\n")
  with pytest.raises(InputError, match="takes no argument, got 'steps=3'"):
    load_config(f"{path}:steps=3")


def test_packaged_configs_are_found_by_name_in_checkouts_and_wheels(tmp_path, monkeypatch):
  checkout = tmp_path / "checkout"
  wheel = tmp_path / "site-packages"
  for package, folder in (
    (checkout / "vr_jax", checkout / "configs"),
    (wheel / "vr_jax", wheel / "vr_jax" / "configs"),
  ):
    folder.mkdir(parents=True)
    package.mkdir(exist_ok=True)
    (folder / "stage9.py").write_text("from vr_jax.configs import base_config as get_config\n")
    monkeypatch.setattr(configs, "__file__", str(package / "configs.py"))
    for name in ("stage9", "stage9.py", "configs/stage9.py"):
      assert find_config(name) == folder / "stage9.py"
    with pytest.raises(InputError, match="did you mean 'stage9'"):
      load_config("stage8")
    assert load_config("stage9", ["seed=1"]).seed == 1


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_every_packaged_config_loads_and_describes_itself(name):
  config = load_config(name)
  assert config.is_locked
  command = rf"vr (train --config|engine run --config|sweep) (configs/)?{name}\b"
  assert re.search(command, find_config(name).read_text()), "the docstring holds the command"


def test_a_stored_config_comes_back_equal(config_file):
  config = load_config(f"{config_file}:freeze")
  back = from_json(to_json(config))
  assert back == config
  assert back.is_locked
  assert diff(config, back) == {}


@pytest.mark.parametrize("text", ["None", "none"])
def test_none_unsets_what_the_file_had_set(config_file, text):
  config = load_config(config_file, [f"total_steps={text}", "total_epochs=2"])
  assert (config.total_steps, config.total_epochs) == (None, 2.0)
  assert load_config(config_file, [f"total_steps={text}", "total_steps=4"]).total_steps == 4


@pytest.mark.parametrize(
  ("override", "accepted"),
  [
    ("log_steps=0", "at least 1"),
    ("ckpt_steps=0", "at least 1"),
    ("keep_ckpts=0", "at least 1"),
    ("keep_ckpt_steps=0", "at least 1"),
    ("input.batch_size=0", "at least 1"),
    ("input.threads=0", "at least 1"),
    ("schedule.0.1={'warmup_percent': 2.0}", "from 0 to 1"),
    ("schedule.1.1.peak=-1.0", "at least 0"),
    ("schedule=((3, None),)", "regex"),
    ("mesh=()", "size of at least 1"),
    ("mesh=(('data', 0),)", "size of at least 1"),
    ("mesh=(('data', -1), ('data', 2))", "size of at least 1"),
    ("lr=nan", "at least 0"),
    ("wd=-0.1", "at least 0"),
    ("b2=1.0", "from 0 to less than 1"),
    ("seed=-1", "from 0 to 4294967295"),
    ("model_init=(('img', 3),)", "path"),
    ("model_init=('img', 'siglip')", "path"),
    ("profile_steps=(3, 2)", r"\(first, last\), from 1"),
    ("input.masks=all", "single, multi, half"),
    ("input.weights=(1.0,)", "a share for each of the 0 of config.input.files"),
    ("input.weights=('a',)", "a share of more than 0"),
    ("input.max_unreadable=2.0", "from 0 to 1"),
    ("ema_decay=1.0", "from 0 to less than 1"),
    ("total_epochs=0", "more than 0"),
  ],
)
def test_values_out_of_range_are_refused_with_the_range(config_file, override, accepted):
  key = override.partition("=")[0]
  with pytest.raises(InputError, match=rf"config\.{re.escape(key)}.*accepted|expected") as error:
    load_config(config_file, [override])
  assert re.search(accepted, str(error.value))
  assert "\n" not in str(error.value)


def test_a_test_of_ours_that_is_wrong_is_no_user_error(config_file, monkeypatch):
  def broken(config, fields):
    raise ZeroDivisionError

  monkeypatch.setattr(configs, "check_values", broken)
  with pytest.raises(ZeroDivisionError):
    load_config(config_file)


VALUES = ("-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e40", "9" * 40, "None", "", "x", "()")
VALUES += ("(1,)", "(None,)", "(('a', 1),)", "((1, 'a'),)", "(('a',),)", "{'a': ()}", "(", "true")


@pytest.mark.parametrize("seed", range(2))
def test_any_value_is_taken_or_refused_in_one_line(config_file, seed):
  """Each field gets values of every kind; what is taken comes back from JSON as it was."""
  rng = random.Random(seed)
  for key in diff(base_config(), ConfigDict()):
    for value in rng.sample(VALUES, 6):
      try:
        config = load_config(config_file, [f"{key}={value}"])
      except InputError as error:
        line = str(error)
      else:
        assert from_json(to_json(config)) == config
        continue
      assert key in line
      assert "\n" not in line


def test_an_option_without_its_equals_sign_is_told_how(capsys):
  with pytest.raises(SystemExit, match="2"):
    cli.main(["train", "--config", "c.py", "--workdir", "W", "--config.lr", "0.1"])
  assert capsys.readouterr().err == "vr: --config.lr: write --config.lr=0.1\n"


def test_devices_that_are_not_here_are_one_line(capsys, monkeypatch):
  def fails(*args):
    raise AssertionError

  monkeypatch.setattr(cli, "call", fails)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  words = ["train", "--config", "c.py", "--workdir", "W"]
  with pytest.raises(AssertionError):  # there are devices: a fault of ours
    cli.main(words)
  monkeypatch.setattr(jax, "devices", fails)
  assert cli.main(words) == 2
  assert capsys.readouterr().err.startswith("vr train: JAX_PLATFORMS='cuda': JAX has no such")


def test_home_is_expanded(config_file, monkeypatch):
  monkeypatch.setenv("HOME", "/home/of")
  overrides = [
    "tokenizer=~/t",
    "input.files=('~/a.json', 'b~.json')",
    "model_init=(('img', '~/i'),)",
  ]
  config = load_config(config_file, overrides)
  assert config.tokenizer == "/home/of/t"
  assert config.input.files == ("/home/of/a.json", "b~.json")
  assert config.model_init == (("img", "/home/of/i"),)


def test_diff_names_fields_by_their_dotted_key(config_file):
  a, b = load_config(config_file), load_config(config_file, ["input.batch_size=3", "lr=1"])
  assert diff(a, b) == {"input.batch_size": (8, 3), "lr": (1e-3, 1.0)}
  b = b.copy_and_resolve_references().unlock()
  del b.wd
  assert diff(a, b)["wd"] == (0.0, MISSING)


def test_parse_arg_gives_values_the_type_of_their_default():
  arg = parse_arg("n=3,x=2,flag,name=a=b,free=1.5", n=1, x=1.0, flag=False, name="", free=None)
  assert (arg.n, arg.x, arg.flag, arg.name, arg.free) == (3, 2.0, True, "a=b", 1.5)
  assert parse_arg(None, n=1).n == 1


def test_the_base_config_is_locked():
  with pytest.raises(AttributeError):
    base_config().learning_rate = 1.0
