"""The launch scripts for TPUs: the commands they print, and what they do with a stand-in for gcloud.

The stand-in keeps a queued resource in a directory, lets it go through its states, and runs what is given by ssh on
this machine, once a worker. It is as unreliable as gcloud: on a slice that is gone, ssh does nothing and ends with 0.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

TPU = Path(__file__).parent.parent / "tpu"
SCRIPTS = ("create", "setup", "run", "babysit", "delete", "jobset")
SLICE = ("--name=slice", "--zone=us-east5-a")
TRAIN = ("python", "-m", "ldm_jax.train", "--workdir=gs://bucket/run")
POLL = "--poll=0.03"

GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$SIM/calls"
declare -A flag
for word; do [[ $word != --*=* ]] || flag[${word%%=*}]=${word#*=}; done
state() { head -n 1 "$SIM/states" 2>/dev/null; }

create() {
  local nodes=${flag[--node-count]:-1} node worker
  for ((node = 0; node < nodes; node++)); do
    for ((worker = 0; worker < WORKERS; worker++)); do mkdir -p "$SIM/vm/$node/$worker"; done
  done
  echo "${flag[--accelerator-type]}" >"$SIM/accelerator"
  echo >>"$SIM/created"
  printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$SIM/states"
}

describe() {
  if [[ ! -f $SIM/states ]]; then
    echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found" >&2
    exit 1
  fi
  printf '%s\t%s\t%s\n' "$(state)" "$(<"$SIM/accelerator")" "$(ls "$SIM/vm" | wc -l)"
  [[ $(wc -l <"$SIM/states") == 1 ]] || sed -i 1d "$SIM/states"
}

delete() {
  local pid
  for pid in "$SIM"/vm/*/*/runs/*/pid; do [[ ! -f $pid ]] || kill -KILL -- "-$(<"$pid")" 2>/dev/null; done
  rm -rf "$SIM/vm" "$SIM/states"
}

workers() {
  local node=${flag[--node]/all/*} worker=${flag[--worker]/all/*}
  [[ $(state) != ACTIVE ]] || ls -d "$SIM"/vm/$node/$worker
}

ssh() {
  local home name
  for home in $(workers); do
    name=${home#"$SIM/vm/"}
    [[ -f $SIM/silent && $(<"$SIM/silent") == "$name" ]] ||
      (cd "$home" && HOME=$home HOSTNAME=${name/\//-} bash -c "${flag[--command]}") &
  done
  wait
}

scp() {
  local home word files=()
  for word; do [[ $word == --* || $word == *: ]] || files+=("$word"); done
  for home in $(workers); do cp "${files[@]}" "$home"; done
}

case "$1 $2 $3" in
  "compute tpus queued-resources") "$4" "${@:5}" ;;
  "storage ls "*) ls "$SIM/bucket" | sed 's|.*|gs://bucket/run/checkpoints/&/commit_success.txt|' ;;
  *) exit 3 ;;
esac
"""

PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$PWD: $*" >>"$SIM/pip" ;;
  "-m ldm_jax.train") . "$SIM/train" ;;
esac
"""


def run(script, *words, **environment):
    """A script as a user starts it."""
    return subprocess.run(
        ["bash", str(TPU / f"{script}.sh"), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def await_that(condition, pause=0.02, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(pause)


def dry(script, *words):
    """The commands that a dry run prints, as the words that a shell reads."""
    done = run(script, "--dry-run", *words, PATH=os.defpath)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def tpus(verb, *words):
    where = ["--zone=us-east5-a", "--quiet"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *where]


def ssh(command, node="all", worker="all"):
    place = (f"--node={node}", f"--worker={worker}")
    return tpus("ssh", "slice", *place, f"--command=bash worker.sh {command}")


DESCRIBE = tpus(
    "describe",
    "slice",
    "--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec.len())",
)


class Cloud:
    """The stand-in for gcloud, and what its workers execute as `python -m ldm_jax.train`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.bin = directory / "bin"
        self.watchers = []
        for name in ("bin", "bucket"):
            (directory / name).mkdir()
        for name, text in (("gcloud", GCLOUD), ("python3.13", PYTHON)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.source = directory / "source"
        self.source.mkdir()
        (self.source / "new.txt").write_text("not committed")
        subprocess.run(["git", "init", "-q", self.source], check=True)
        self.train("exit 0")

    def environment(self):
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "SIM": str(self.directory), "WORKERS": "2"}

    def run(self, script, *words):
        return run(script, *SLICE, *words, **self.environment())

    def train(self, text):
        (self.directory / "train").write_text(text + "\n")

    def ready(self, *words):
        """A slice of two workers, set up."""
        assert self.run("create", "--accelerator=v5p-16", POLL, *words).returncode == 0
        assert self.run("setup", f"--source={self.source}").returncode == 0

    def start(self, *words, logs="logs"):
        return self.run("run", POLL, f"--logs={self.directory / logs}", "--", *TRAIN, *words)

    def watch(self):
        """A `run.sh` that goes on beside the test, and the file of what it tells."""
        logs, told = f"--logs={self.directory / 'logs'}", self.directory / "told"
        # A shell that runs the tests in its background has them ignore Ctrl-C.
        words = ["env", "--default-signal=INT", "bash", TPU / "run.sh", *SLICE, POLL, logs]
        environment = {**os.environ, **self.environment()}
        with told.open("w") as out:
            watcher = subprocess.Popen(
                [*words, "--", *TRAIN], env=environment, stdout=out, stderr=out
            )
        self.watchers.append(watcher)
        return watcher, told

    def babysit(self, *words):
        flags = ("--accelerator=v5p-16", "--spot", POLL, f"--source={self.source}")
        logs = f"--logs={self.directory / 'logs'}"
        return self.run("babysit", *flags, logs, *words, "--", *TRAIN)

    def created(self):
        path = self.directory / "created"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def calls(self):
        return (self.directory / "calls").read_text()

    def end(self):
        for watcher in self.watchers:
            watcher.kill()
            watcher.wait()
        for pid in self.directory.glob("vm/*/*/runs/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    stand_in = Cloud(tmp_path)
    yield stand_in
    stand_in.end()


# --- what is printed ------------------------------------------------------------------------------


def test_create_prints_gclouds_commands():
    create = ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]
    request = tpus("create", "slice", "--node-id=slice", *create, "--spot")
    words = (*SLICE, "--accelerator=v5p:4x4x4", "--spot")
    assert dry("create", *words) == [DESCRIBE, request, DESCRIBE]


def test_create_requests_several_slices_a_reservation_and_whatever_gcloud_knows():
    words = ("--accelerator=v5e:16x16", "--slices=2", "--reserved", "--project=my-project")
    flags = ("--create-flag=--network=mine", "--create-flag=--labels=a=b c")
    _, request, _ = dry("create", *SLICE, *words, *flags)
    assert request[4:] == [
        *("create", "slice", "--node-count=2", "--node-prefix=slice"),
        *("--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"),
        *("--reserved", "--network=mine", "--labels=a=b c"),
        *("--zone=us-east5-a", "--quiet", "--project=my-project"),
    ]


def test_setup_prints_the_copy_and_the_installation():
    everywhere = ("--node=all", "--worker=all")
    worker = str(TPU / "worker.sh")
    pack, *rest = dry("setup", *SLICE, f"--source={TPU}", "--mount=gs://data:/mnt/data")[1:]
    assert pack[1:] == [f"--source={TPU}", "--pack=source.tar.gz"]
    assert rest == [
        tpus("scp", worker, "source.tar.gz", "slice:", *everywhere),
        ssh("install source.tar.gz data:/mnt/data"),
    ]


def test_setup_installs_from_a_url():
    url = "https://example.com/ldm.git#v1"
    assert dry("setup", *SLICE, f"--source={url}")[-1] == ssh(f"install '{url}'")


def test_run_prints_what_it_asks_the_workers():
    command = ("python", "-c", "print('a  b')")
    assert dry("run", *SLICE, "--", *command) == [
        DESCRIBE,
        ssh("status slice || echo ldm_jax $HOSTNAME uninstalled"),
        ssh(f"start slice {shlex.join(command)}".replace('"\'"', "\\'")),
        ssh("follow slice 1", 0, 0),
        ssh("status slice"),
        ssh("follow slice 1", 0, 0),
        ssh("forget slice"),
    ]


def test_delete_prints_its_command():
    assert dry("delete", *SLICE) == [tpus("delete", "slice", "--force")]


def test_babysit_prints_what_its_parts_print():
    size, source = ("--accelerator=v6e:4x4", "--spot"), "--source=https://example.com/ldm.git"
    newest = [*("gcloud", "storage", "ls"), "gs://bucket/run/checkpoints/*/commit_success.txt"]
    parts = [("create", *SLICE, *size), ("setup", *SLICE, source), ("run", *SLICE, "--", *TRAIN)]
    expected = [newest, *(line for part in parts for line in dry(*part))]
    expected += [newest, *dry("delete", *SLICE)]
    assert dry("babysit", *SLICE, *size, source, "--delete", "--", *TRAIN) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_a_script_is_used_and_names_every_flag(script):
    text = run(script, "--help").stdout
    assert f"tpu/{script}.sh --name=NAME" in text and "Exit status" in text
    refused = run(script, "--no-such-flag").stderr
    known = [word.rstrip(",") for word in refused.split("there are")[1].split() if "--" in word]
    assert len(known) > 3 and all(flag in text for flag in known if flag != "--help")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        ("create", SLICE[:1], "--zone=VALUE is missing"),
        ("create", (*SLICE, "--accelerator=v5p-100"), "v5p-100 is no slice; there are v5p:2x2x1 (v5p-8)"),
        ("create", (*SLICE, "--accelerator=v5e-64"), "v5e:8x8 (v5litepod-64)"),
        ("create", (*SLICE, "--accelerator=a100"), "there are v4:2x2x1 (v4-8)"),
        ("create", (*SLICE, "--accelerator=v4-8", "--spot", "--reserved"), "exclude each other"),
        ("create", (*SLICE, "--accelerator"), "--accelerator needs a value: --accelerator=VALUE"),
        ("create", (*SLICE, "--spot=yes"), "--spot takes no value, got --spot=yes"),
        ("create", (*SLICE, "v4-8"), "got v4-8, which is no flag"),
        ("create", (*SLICE, "--accelerator=v4-8", "--slices=0"), "--slices=0 is not a number of slices"),
        ("create", (*SLICE, "--", "x"), "there is no command after -- here"),
        ("delete", ("--name=My_Slice", SLICE[1]), "--name=My_Slice is not a name"),
        ("delete", ("--name=slice", "--zone=europe"), "--zone=europe is not a zone such as"),
        ("setup", (*SLICE, "--source=/nowhere", "--dry-run"), "--source=/nowhere is no git checkout"),
        ("setup", (*SLICE, "--mount=data"), "--mount=data is not BUCKET:/DIRECTORY"),
        ("run", SLICE, "the command is missing"),
        ("babysit", (*SLICE, "--accelerator=v4-8", "--", "python"), "has no --workdir=gs://"),
        ("jobset", ("--name=a", "--image=b", "--mount=c1c:/d", "--accelerator=v4-8", "--slices=2", "--", "e"),
         "cannot be joined on GKE"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_sentence_and_exit_2(script, words, sentence):
    done = run(script, *words, PATH=os.defpath)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", sorted(path.name for path in TPU.glob("*.sh")))
def test_the_scripts_are_sound_to_bash(script):
    assert subprocess.run(["bash", "-n", TPU / script]).returncode == 0


def test_the_scripts_are_sound_to_shellcheck():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, *sorted(TPU.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- what is done ---------------------------------------------------------------------------------


def test_create_waits_until_the_slice_is_active_and_shows_the_states(cloud):
    done = cloud.run("create", "--accelerator=v5p-16", POLL)
    states = [line.split(": ")[-1] for line in done.stderr.splitlines()]
    assert states == ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert cloud.run("create", "--accelerator=v5p-16", POLL).returncode == 0
    assert cloud.created() == 1
    other = cloud.run("create", "--accelerator=v5p-32", POLL)
    assert (
        other.returncode == 2 and "is there as 1 x v5p-16, asked for is 1 x v5p-32" in other.stderr
    )


def test_create_replaces_a_slice_that_was_preempted(cloud):
    cloud.run("create", "--accelerator=v5p-16", POLL)
    (cloud.directory / "states").write_text("SUSPENDED\n")
    assert cloud.run("create", "--accelerator=v5p-16", POLL).returncode == 0
    assert cloud.created() == 2


def test_setup_installs_what_git_knows_or_would_add_on_every_worker(cloud):
    (cloud.source / ".gitignore").write_text("secret\n")
    (cloud.source / "secret").write_text("")
    cloud.ready("--slices=2")
    homes = sorted(cloud.directory.glob("vm/*/*"))
    assert len(homes) == 4
    for home in homes:
        files = {path.name for path in (home / "ldm_jax").iterdir()}
        assert files == {"new.txt", ".gitignore"}
    installs = (cloud.directory / "pip").read_text().splitlines()
    assert sorted(installs) == [f"{home}: -m pip install --quiet ./ldm_jax[tpu]" for home in homes]


def test_setup_ends_with_76_where_a_worker_is_silent(cloud):
    cloud.run("create", "--accelerator=v5p-16", POLL)
    (cloud.directory / "silent").write_text("0/1")
    done = cloud.run("setup", f"--source={cloud.source}")
    assert done.returncode == 76 and "1 of 2 workers answer" in done.stderr


def test_setup_shows_why_an_installation_failed(cloud):
    cloud.run("create", "--accelerator=v5p-16", POLL)
    text = PYTHON.replace('echo "$PWD: $*" >>"$SIM/pip"', "echo no such package; exit 1")
    (cloud.bin / "python3.13").write_text(text)
    done = cloud.run("setup", f"--source={cloud.source}")
    assert done.returncode == 1 and "the installation failed on 0-0 0-1" in done.stderr
    assert "0-1: no such package" in done.stderr


def test_run_shows_worker_0_gathers_all_logs_and_ends_as_the_command_does(cloud):
    cloud.ready()
    cloud.train('for word; do echo "$HOSTNAME got $word"; done; exit 0')
    done = cloud.start("a  'b'")
    assert done.returncode == 0, done.stderr
    words = [*TRAIN[1:], "a  'b'"]
    assert done.stdout.splitlines() == [f"0-0 got {word}" for word in words]
    log = (cloud.directory / "logs" / "slice-0-worker-1.log").read_text()
    assert log.splitlines() == [f"0-1 got {word}" for word in words]


@pytest.mark.parametrize(
    ("first", "second", "whole"),
    [(0, 0, 0), (0, 1, 1), (76, 2, 2), (134, 137, 137), (75, 134, 134)],
)
def test_the_status_of_a_run_is_that_of_the_worker_that_explains_the_others(
    cloud, first, second, whole
):
    cloud.ready()
    cloud.train(f"[[ $HOSTNAME == 0-0 ]] && exit {first}; exit {second}")
    assert cloud.start().returncode == whole


def test_a_run_outlives_its_watcher_and_a_second_call_attaches(cloud):
    cloud.ready()
    cloud.train(
        'echo started >>"$SIM/starts"; until [[ -f $SIM/go ]]; do sleep 0.05; done; echo end'
    )
    watcher, told = cloud.watch()
    await_that((cloud.directory / "logs" / "slice-0-worker-0.log").exists)
    # Again until it is heard, as bash can lose the one that comes while $(...) ends.
    await_that(lambda: watcher.send_signal(signal.SIGINT) or watcher.poll() is not None, 0.5)
    assert watcher.returncode == 130
    assert told.read_text().count("the run goes on without this machine") == 1
    (cloud.directory / "go").touch()
    done = cloud.start()
    assert done.returncode == 0 and done.stdout.endswith("end\n")
    assert "attached to what is there already: python -m ldm_jax.train" in done.stderr
    assert (cloud.directory / "starts").read_text().splitlines() == ["started"] * 2


def test_a_run_is_stopped_by_sigterm_and_its_status_told(cloud):
    cloud.ready()
    cloud.train(
        "trap 'echo saved; exit 75' TERM; touch $SIM/up-$HOSTNAME; while :; do sleep 0.05; done"
    )
    watcher, _ = cloud.watch()
    await_that(lambda: len(list(cloud.directory.glob("up-*"))) == 2)
    watcher.terminate()
    watcher.wait(60)
    logs = f"--logs={cloud.directory / 'logs'}"
    done = cloud.run("run", "--stop", POLL, logs)
    assert done.returncode == 75 and "saved" in done.stdout
    again = cloud.run("run", "--stop", POLL, logs)
    assert again.returncode == 1 and "nothing runs on slice" in again.stderr


def test_a_worker_that_outlives_a_failed_one_is_ended(cloud):
    cloud.ready()
    cloud.train("[[ $HOSTNAME == 0-1 ]] && exit 137; exec sleep 60")
    done = cloud.start()
    assert done.returncode in (137, 143)
    assert "TERM to the workers that run on, as others failed: 0-1 137" in done.stderr


def test_a_run_on_a_slice_that_is_gone_ends_with_76(cloud):
    cloud.ready()
    cloud.train("echo SUSPENDED >$SIM/states; exec sleep 60")
    done = cloud.start()
    assert done.returncode == 76 and "slice is gone: its state is SUSPENDED" in done.stderr


def test_the_logs_of_an_earlier_run_are_put_away(cloud):
    cloud.ready()
    cloud.train("echo first; exit 75")
    assert cloud.start().returncode == 75
    cloud.train("echo second; exit 0")
    assert cloud.start().stdout == "second\n"
    (earlier,) = (cloud.directory / "logs").glob("until-*/slice-0-worker-0.log")
    assert earlier.read_text() == "first\n"


def test_run_asks_for_setup_where_nothing_is_installed(cloud):
    cloud.run("create", "--accelerator=v5p-16", POLL)
    done = cloud.start()
    assert done.returncode == 1 and "nothing is installed on slice: tpu/setup.sh" in done.stderr


def test_babysit_replaces_a_preempted_slice_and_continues_with_the_same_code(cloud):
    cloud.train(
        """
        life=$(wc -l <"$SIM/created")
        echo "life $life: $(<new.txt)"
        [[ $life == 1 ]] || exit 0
        echo changed >"$SIM/source/new.txt"
        mkdir -p "$SIM/bucket/000000000100"
        echo SUSPENDED >"$SIM/states"
        exec sleep 60
        """
    )
    done = cloud.babysit("--delete")
    assert done.returncode == 0, done.stderr
    assert cloud.created() == 2
    assert "life 2: not committed" in done.stdout
    again = "trying again, from gs://bucket/run/checkpoints/000000000100"
    assert again in done.stderr
    assert not (cloud.directory / "vm").exists()


@pytest.mark.parametrize("status", [1, 2])
def test_babysit_stops_at_an_error_of_the_user(cloud, status):
    cloud.train(f"exit {status}")
    assert cloud.babysit().returncode == status
    assert cloud.calls().count("worker.sh start") == 1


def test_babysit_restarts_on_the_slice_that_is_there_after_75_76_and_a_crash(cloud):
    cloud.train(
        """
        [[ $HOSTNAME == 0-0 ]] || exit 0
        mkdir -p "$SIM/bucket/$(printf %012d $((${RANDOM} + $(ls "$SIM/bucket" | wc -l) * 100000)))"
        case $(ls "$SIM/bucket" | wc -l) in 1) exit 75 ;; 2) exit 76 ;; 3) exit 134 ;; esac
        """
    )
    assert cloud.babysit("--restarts=0").returncode == 0
    assert cloud.calls().count("worker.sh start") == 4
    assert cloud.created() == 1


def test_babysit_gives_up_when_restarts_bring_no_checkpoint(cloud):
    cloud.train("exit 76")
    done = cloud.babysit("--restarts=2")
    assert done.returncode == 76 and "no new checkpoint" in done.stderr
    assert cloud.calls().count("worker.sh start") == 3


def test_delete_of_what_is_not_there_is_no_error(cloud):
    done = cloud.run("delete")
    assert done.returncode == 0 and "there is no slice in us-east5-a" in done.stderr


# --- GKE ------------------------------------------------------------------------------------------


def manifest(*words, command=TRAIN):
    flags = ("--name=run", "--image=repository/ldm_jax:1", "--mount=gs://data:/mnt/data")
    done = run("jobset", "--dry-run", *flags, *words, "--", *command)
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl apply --filename=- <<'END'", "END")
    return yaml.safe_load("\n".join(lines))


def test_the_jobset_has_a_job_for_each_slice_and_a_pod_for_each_host():
    spec = manifest("--accelerator=v5p:4x4x4", "--slices=2")["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert container["image"] == "repository/ldm_jax:1"
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "data"
    assert mount == {"name": volume["name"], "mountPath": "/mnt/data"}
    assert pod["terminationGracePeriodSeconds"] == 300


def test_the_command_reaches_the_pod_word_by_word():
    command = ("python", "-c", 'print("$NAME\\n", 1)', "a b")
    pod = manifest("--accelerator=v6e-8", command=command)["spec"]["replicatedJobs"][0]
    container = pod["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == list(command)
    assert container["resources"]["limits"] == {"google.com/tpu": 8}


def test_a_preemption_restarts_the_jobset_uncounted_and_an_error_of_the_user_fails_it():
    spec = manifest("--accelerator=v4-16")["spec"]
    failed, restarted = spec["failurePolicy"]["rules"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [1, 2, 75, 76]
    assert codes["onExitCodes"]["containerName"] == "run"
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    # as Kubernetes words it: Container run for pod default/x failed with exit code 1 matching FailJob rule at index 0
    (pattern,) = failed["onJobFailureMessagePatterns"]
    message = "Container run for pod default/x failed with exit code {} matching FailJob rule"
    found = [code for code in (1, 2, 75, 76, 12) if re.search(pattern, message.format(code))]
    assert found == [1, 2]
    assert failed["action"] == "FailJobSet"
    assert restarted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert restarted["onJobFailureReasons"] == ["PodFailurePolicy"]
