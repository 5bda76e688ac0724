"""Loading, overriding, storing and comparing configs."""

import re
import textwrap

import pytest

from data_pipes.errors import InputError
from vr_jax import configs
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
    ("", ["lr"], "override 'lr': expected config.key=value"),
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
