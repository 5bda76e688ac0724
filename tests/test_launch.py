"""The scripts of launch/: what they would run, and what they run with stand-ins for the cloud."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vr_jax import cli

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRAIN = ["--config", "my run.py:lr=0.1,note='a b'", "--workdir", "/mnt/W 1", "--config.log_steps=1"]
SETTINGS = {
  "NAME": "exp", "ZONE": "us-west4-a", "TYPE": "v5litepod-64", "SPOT": "1", "IMAGE": "reg/vr:tpu",
  "CLUSTER": "c", "NODES": "4", "MOUNT": "sudo mount 10.0.0.2:/s /mnt",
}  # fmt: skip


def call(script, *args, path=None, **environment):
  env = {"PATH": os.pathsep.join(filter(None, [str(path or ""), os.environ["PATH"]]))}
  return subprocess.run(
    [LAUNCH / script, *args],
    env=env | SETTINGS | environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def dry(script, *args):
  """The commands that a dry run prints, each as its words."""
  done = call(script, "--dry-run", *args)
  assert done.returncode == 0, done.stderr
  assert call(script, *args, DRY_RUN="1", PORT="1").returncode == 0
  return [shlex.split(line) for line in done.stdout.splitlines()]


def stand_in(folder, name, script):
  (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
  (folder / name).chmod(0o755)


def assert_trains(words):
  """The words from `vr` on are a command that the parser takes, with nothing lost on the way."""
  at = next(i for i, word in enumerate(words) if word.rpartition("/")[2] == "vr")
  args = cli.parse(words[at + 1 :])
  assert (args.command, args.config, args.workdir) == ("train", TRAIN[1], TRAIN[3])
  assert args.overrides == ["config.log_steps=1"]


@pytest.fixture
def tools(tmp_path):
  """A `vr` that writes down its arguments and where it is in the run."""
  names = "'VR_COORDINATOR','VR_PROCESSES','VR_PROCESS'"
  code = f"import json,os,sys;print(json.dumps([sys.argv[1:],*map(os.environ.get,({names}))]))"
  stand_in(tmp_path, "vr", f'exec {sys.executable} -c "{code}" "$@"')
  return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  shellcheck = Path(sys.executable).parent / "shellcheck"
  subprocess.run([shellcheck, "-x", "-P", LAUNCH, script], check=True)


def test_tpu_vm():
  delete, create, archive, copy, install, train = dry("tpu_vm.sh", "run", *TRAIN)
  assert delete[:5] == ["gcloud", "compute", "tpus", "queued-resources", "delete"]
  assert create[4:6] == ["create", "exp"]
  assert create[-1] == "--spot"
  assert create[create.index("--accelerator-type") + 1] == "v5litepod-64"
  assert archive[:2] == ["git", "archive"]
  assert copy[copy.index("--worker") + 1] == train[train.index("--worker") + 1] == "all"
  assert SETTINGS["MOUNT"] in install[-1]
  command = train[-1].partition(" 2>&1")[0]
  assert "VR_COORDINATOR=auto" in command
  assert_trains(shlex.split(command))
  for verb in ("follow", "status", "stop", "delete"):
    (words,) = dry("tpu_vm.sh", verb)
    assert words[0] == "gcloud"


def test_tpu_vm_goes_on_after_a_preemption_and_ends_with_a_fault(tmp_path):
  """The pod is gone when the first training ends; the second one fails on a pod that stands."""
  stand_in(
    tmp_path,
    "gcloud",
    """
echo "$*" | cut -c 1-60 >> "$LOG"
case "$*" in
  *describe*) [[ -e $LOG.pod ]] && echo ACTIVE || echo SUSPENDED ;;
  *create*) touch "$LOG.pod" ;;
  *delete*) rm -f "$LOG.pod" ;;
  *"vr train"*) [[ -e $LOG.tried ]] || { touch "$LOG.tried"; rm "$LOG.pod"; }; exit 1 ;;
esac""",
  )
  stand_in(tmp_path, "git", "true")
  log = tmp_path / "log"
  done = call("tpu_vm.sh", "run", *TRAIN, path=tmp_path, LOG=str(log))
  assert done.returncode == 1
  assert "exp: SUSPENDED; attempt 1 of 20" in done.stderr
  verbs = [line.split()[3] for line in log.read_text().splitlines()]
  verbs = [verb for verb in verbs if verb != "describe"]
  assert verbs == ["delete", "create", "scp", "ssh", "ssh"] * 2


PREEMPTED = """
echo "$*" | cut -c 1-60 >> "$LOG"
case "$*" in
  *describe*)
    if [[ ! -e $LOG.pod ]]; then echo SUSPENDED
    elif [[ -e $LOG.gone && -e $LOG.asked ]]; then rm "$LOG.pod" "$LOG.gone"; echo SUSPENDED
    else [[ ! -e $LOG.gone ]] || touch "$LOG.asked"; echo ACTIVE
    fi ;;
  *create*) touch "$LOG.pod" ;;
  *delete*) rm -f "$LOG.pod" ;;
  *"vr train"*) [[ -e $LOG.tried ]] && exit 0; touch "$LOG.tried" $GONE; exit "$CODE" ;;
esac"""


@pytest.mark.parametrize(("code", "preempted"), [(143, True), (255, True), (255, False)])
def test_tpu_vm_goes_on_when_the_pod_or_the_connection_goes_away(tmp_path, code, preempted):
  """A pod that is being taken away is still ACTIVE when it is first asked for."""
  stand_in(tmp_path, "gcloud", PREEMPTED)
  stand_in(tmp_path, "git", "true")
  log = str(tmp_path / "log")
  gone = f"{log}.gone" if preempted else ""
  done = call(
    "tpu_vm.sh", "run", *TRAIN, path=tmp_path, LOG=log, GONE=gone, CODE=str(code), POLL="0"
  )
  assert done.returncode == 0, done.stderr
  verbs = [line.split()[3] for line in Path(log).read_text().splitlines()]
  assert verbs.count("create") == (2 if preempted else 1)


def test_tpu_vm_ends_when_the_run_was_told_to(tmp_path):
  stand_in(tmp_path, "gcloud", PREEMPTED)
  stand_in(tmp_path, "git", "true")
  log = str(tmp_path / "log")
  done = call("tpu_vm.sh", "run", *TRAIN, path=tmp_path, LOG=log, GONE="", CODE="143", POLL="0")
  assert done.returncode == 143


def test_a_run_on_a_tpu_vm_outlives_its_connection_and_is_taken_up_again(tmp_path):
  """What the hosts are told to run, run here, with a stand-in for `vr`."""
  train = dry("tpu_vm.sh", "run", *TRAIN)[-1][-1]
  (tmp_path / "env" / "bin").mkdir(parents=True)
  stand_in(tmp_path / "env" / "bin", "vr", "echo begun; sleep 1.5; echo done; exit 143")
  first = subprocess.Popen(["bash", "-c", train], cwd=tmp_path, stdout=subprocess.PIPE)
  while not (tmp_path / "vr.pid").exists():
    time.sleep(0.05)
  first.send_signal(signal.SIGHUP)
  first.wait(10)
  again = subprocess.run(["bash", "-c", train], cwd=tmp_path, timeout=20, check=False)
  assert again.returncode == 143
  assert (tmp_path / "vr.log").read_text() == "begun\ndone\n"


def test_gke():
  hosts = {"tpu": 16, "gpu": 4}
  for verb, count in hosts.items():
    done = call("gke.sh", "--dry-run", verb, *TRAIN)
    assert done.returncode == 0, done.stderr
    (job,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["completions"] == count
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert_trains(container["command"])
    env = {item["name"]: item for item in container["env"]}
    if verb == "tpu":
      assert env["VR_COORDINATOR"]["value"] == "auto"
      assert container["resources"]["limits"] == {"google.com/tpu": 4}
    else:
      assert env["VR_COORDINATOR"]["value"] == "exp-host-0-0.exp:8476"
      assert env["VR_PROCESSES"]["value"] == "4"
      assert "job-completion-index" in json.dumps(env["VR_PROCESS"])
  (xpk,) = dry("gke.sh", "xpk", *TRAIN)
  assert xpk[:3] == ["xpk", "workload", "create"]
  assert_trains(shlex.split(xpk[-1]))
  assert [dry("gke.sh", verb)[0][0] for verb in ("follow", "status", "stop")] == ["kubectl"] * 3


def test_slurm(tools):
  (words,) = dry("slurm.sh", *TRAIN)
  assert words[0] == "srun"
  assert_trains(words)
  stand_in(tools, "srun", 'shift; exec "$@"')
  done = call("slurm.sh", *TRAIN, path=tools)
  assert json.loads(done.stdout)[0] == ["train", *TRAIN]


COMMANDS = """# All commands of a phase may run at once.
# phase 1
echo 1:0 >> "$LOG"
echo 1:1 >> "$LOG"
echo 1:2 >> "$LOG"
# phase 2
echo 2:0 >> "$LOG"
# at the end: writes the published files
false || echo 'the end' >> "$LOG"
"""


def test_a_printed_array_becomes_slurm_arrays_one_after_the_other(tmp_path):
  """A stand-in for sbatch runs each array's tasks, as a node would."""
  script = tmp_path / "my run.sh"
  script.write_text(COMMANDS)
  code = """
for i in $(seq "$#"); do
  case "${!i}" in
    --array) n=$((i + 1)); tasks=${!n#1-} ;;
    --wrap) n=$((i + 1)); wrap=${!n} ;;
    --dependency) n=$((i + 1)); echo "after ${!n}" >> "$LOG" ;;
  esac
done
for t in $(seq "$tasks"); do SLURM_ARRAY_TASK_ID=$t bash -c "$wrap"; done
echo "$((++JOB))" >> "$LOG.jobs"
echo "$(wc -l < "$LOG.jobs");cluster" """
  stand_in(tmp_path, "sbatch", code)
  log = tmp_path / "log"
  done = call("slurm_array.sh", str(script), "--gpus=1", path=tmp_path, LOG=str(log), TASKS="2")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "001: job 1, 2 tasks for 3 commands",
    "002: job 2, 1 tasks for 1 commands",
    "003: job 3, 1 tasks for 1 commands",
  ]
  lines = log.read_text().splitlines()
  assert lines[:3] == ["1:0", "1:2", "1:1"]
  assert lines[3:] == ["after afterok:1", "2:0", "after afterok:2", "the end"]
  first, _, last = dry("slurm_array.sh", str(script), "--gpus=1")
  assert "--dependency" not in first
  assert last[-4:] == ["--dependency", "afterok:JOB", "--kill-on-invalid-dep", "yes"]
  assert call("slurm_array.sh", str(tmp_path / "none")).returncode == 2


def test_slurm_saves_and_queues_again_near_the_time_limit(tmp_path):
  stand_in(tmp_path, "srun", 'echo $$ > "$STEP"; sleep 30 & trap "kill $!; exit 143" TERM; wait')
  stand_in(tmp_path, "scancel", 'kill -TERM "$(cat "$STEP")"')
  stand_in(tmp_path, "scontrol", 'echo "$@"')
  code = f"{shlex.quote(str(LAUNCH / 'slurm.sh'))} & sleep 1; kill -USR1 $!; wait $!"
  path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
  env = {"PATH": path, "STEP": str(tmp_path / "step"), "SLURM_JOB_ID": "7"}
  done = subprocess.run(
    ["bash", "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
  )
  assert (done.returncode, done.stdout) == (143, "requeue 7\n"), done.stderr


def test_sky(tools):
  task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
  env |= {"SKYPILOT_NODE_RANK": "1", "CONFIG": TRAIN[1], "WORKDIR": TRAIN[3], "ARGS": TRAIN[4]}
  env |= {"PATH": os.pathsep.join([str(tools), os.environ["PATH"]])}
  done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, check=True)
  assert json.loads(done.stdout) == [["train", *TRAIN], "10.0.0.1:8476", "2", "1"]


def test_local(tools):
  commands = dry("local.sh", "2", *TRAIN)
  assert len(commands) == 2
  for words in commands:
    assert_trains(words)
  done = call("local.sh", "3", *TRAIN, path=tools, PORT="2000")
  told = sorted(json.loads(line) for line in done.stdout.splitlines())
  assert told == [[["train", *TRAIN], "localhost:2000", "3", str(i)] for i in range(3)]


def test_local_hands_signals_on_and_ends_as_its_processes_end(tmp_path):
  stand_in(tmp_path, "vr", 'sleep 30 & trap "kill $!; exit 143" TERM; wait')
  code = f"{shlex.quote(str(LAUNCH / 'local.sh'))} 2 --config a & sleep 1; kill $!; wait $!"
  env = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
  done = subprocess.run(["bash", "-c", code], env=env, capture_output=True, timeout=20, check=False)
  assert done.returncode == 143


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh", "gke.sh"])
def test_a_wrong_call_is_told_how(script):
  done = call(script, "lunch")
  assert done.returncode == 2
  assert done.stderr.startswith(f"usage: launch/{script}")


def test_images_hold_what_the_package_is_built_from():
  for file in LAUNCH.glob("*.Dockerfile"):
    copied = [line.split()[1:-1] for line in file.read_text().splitlines() if line[:4] == "COPY"]
    for name in [name for names in copied for name in names]:
      assert (LAUNCH.parent / name).exists(), f"{file.name}: {name}"
