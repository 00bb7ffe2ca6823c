"""run.sh among stand-ins for what it starts."""

import contextlib
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from processes import (
    PICTURES,
    ROWS,
    STAGES,
    STANDINS,
    free_port,
    launched,
    losses_of,
    run,
    weights_of,
)
from tiny import HERE

import checkpoint
import data
import train

SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"}
STAGE_1 = {"PRETRAIN_DATA": ROWS, "PRETRAIN_IMAGES": PICTURES}


# --- what is started ---


@pytest.mark.parametrize(
    "environment, processes, config",
    [  # processes: what the launcher is told, -1 as many as there are GPUs, None no launcher
        ({}, None, None),
        ({"GPUS": "1"}, None, None),
        ({"GPUS": "1", "DEEPSPEED_CONFIG": "ds_zero3.json"}, None, "ds_zero3.json"),
        ({"GPUS": "4"}, -1, "ds_zero2.json"),
        ({"GPUS": "8", "DEEPSPEED_CONFIG": "ds_zero3.json"}, -1, "ds_zero3.json"),
        ({"GPUS": "8", "NUM_GPUS": "2"}, 2, "ds_zero2.json"),
        ({"GPUS": "8", "DEEPSPEED_CONFIG": "none"}, None, None),
        ({"NUM_GPUS": "2"}, 2, "ds_zero2.json"),
        ({"HOSTFILE": ROWS}, -1, "ds_zero2.json"),
        ({"GPUS": "4", "SLURM_NNODES": "1"} | SLURM, -1, "ds_zero2.json"),
        ({"GPUS": "1", "SLURM_NNODES": "1"} | SLURM, None, None),
    ],
)
def test_run_sh_launches_what_the_machine_has(shell, environment, processes, config):
    start, calls = shell
    assert start(**STAGES, **environment).wait() == 0
    alone = [words for words in calls("python") if words[0] == "train.py"]
    assert len(calls("counted")) == ("NUM_GPUS" not in environment)
    assert len(calls("srun")) == ("SLURM_JOB_ID" in environment)
    if processes is None:
        (words,) = alone
        args = train.parse(words[1:])
        assert (args.train_type, args.deepspeed) == ("freeze_vision", config)
        return
    (words,) = calls("deepspeed")
    launcher, args = launched(words)
    assert not alone and (launcher.num_gpus, args.deepspeed) == (processes, config)
    assert launcher.hostfile == environment.get("HOSTFILE", "/job/hostfile")
    ports = [13456] if "SLURM_JOB_ID" in environment else range(10000, 30000)
    assert launcher.master_port in ports


def test_slurm_starts_a_launcher_per_node_from_any_folder(shell, tmp_path):
    """sbatch runs a copy of the script that lies elsewhere, in a job with 4 tasks a node, say."""
    from deepspeed.launcher import runner

    start, calls = shell
    script = tmp_path / "slurm_script"
    shutil.copy(HERE / "run.sh", script)
    job = SLURM | {"SLURM_NNODES": "3", "SLURM_NTASKS": "12", "COMMAND": f"{HERE}/run.sh a/b"}
    assert start(script, **STAGES, **STAGE_1, **job, NUM_GPUS="4").wait() == 0
    assert len(calls("srun")) == 2 and len(calls("deepspeed")) == 6  # of two stages
    assert all("--cpus-per-task=8" in words for words in calls("srun"))
    for stage in ("stage1", "stage2"):
        found = [launched(words) for words in calls("deepspeed")]
        found = [launcher for launcher, args in found if args.output_dir.endswith(stage)]
        assert sorted(launcher.node_rank for launcher in found) == [0, 1, 2]
        assert all(launcher.no_ssh and launcher.master_addr == "node1" for launcher in found)
        assert {launcher.master_port for launcher in found} == {13456}
        hosts = [runner.fetch_hostfile(launcher.hostfile) for launcher in found]
        assert all(dict(pool) == {"node1": 4, "node2": 4, "node3": 4} for pool in hosts)


def test_the_header_for_slurm_is_a_comment_to_bash():
    lines = (HERE / "run.sh").read_text().splitlines()
    header = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert all(line.startswith("#") for line in lines[: header[-1] + 1])  # it ends at a command
    options = " ".join(lines[i].removeprefix("#SBATCH ") for i in header).split()
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    assert {"--ntasks-per-node=1", "--gpus-per-node=a100:4"} <= set(options)


# --- how it stops, and comes back ---


def waiting(shell, tmp_path, runs=1, **environment):
    """run.sh, started, when so many of its launchers wait."""
    start, calls = shell
    process = start(**STAGES, **STAGE_1, WAIT="1.5", **environment)
    while not (tmp_path / "calls").exists() or len(calls("waiting")) < runs:
        assert process.poll() is None, (tmp_path / "errors").read_text()
        time.sleep(0.05)
    return process


def requeued(calls):
    return [words[1] for words in calls("scontrol") if words[0] == "requeue"]


JOBS = {  # what the launchers are, and the environment
    "one process": (1, {}),
    "one machine": (1, {"GPUS": "4"}),
    "one node": (1, {"GPUS": "4", "SLURM_NNODES": "1"} | SLURM),
    "two nodes": (2, {"NUM_GPUS": "4", "SLURM_NNODES": "2"} | SLURM),
}


@pytest.mark.parametrize(
    "where, signal_name",
    [
        ("one process", "SIGINT"),
        ("one machine", "SIGUSR1"),
        ("one node", "SIGUSR1"),
        ("two nodes", "SIGUSR1"),
        ("two nodes", "SIGTERM"),
    ],
)
def test_a_signal_reaches_runs_as_the_file_stop_alone(shell, tmp_path, where, signal_name):
    """Sent to the process group, as Ctrl-C is. Of two launchers the second ends 1.5 s after the
    first. The next start goes on through both stages.
    """
    start, calls = shell
    runs, environment = JOBS[where]
    process = waiting(shell, tmp_path, runs, **environment)
    os.killpg(process.pid, getattr(signal, signal_name))
    assert process.wait(timeout=60) == 3 and not calls("signalled")
    again = signal_name == "SIGUSR1" and "SLURM_JOB_ID" in environment
    assert requeued(calls) == ["123456"] * again
    assert ("to go on" in (tmp_path / "errors").read_text()) == (not again)
    assert not (tmp_path / "out/stage1/stop").exists()
    process = start(**STAGES, **STAGE_1, **environment)
    assert process.wait() == 0 and process.stdout.read().endswith("out/stage2/final\n")
    lines = calls("deepspeed") or [words for words in calls("python") if words[0] == "train.py"]
    parsed = [launched(w)[1] if w[0] != "train.py" else train.parse(w[1:]) for w in lines]
    names = [Path(args.output_dir).name for args in parsed]
    assert names == ["stage1"] * 2 * runs + ["stage2"] * runs
    assert all(args.resume_from_checkpoint == "latest" for args in parsed)


def processes_of(process, word):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] * (word in child.cmdline())
    return found


@pytest.mark.parametrize("where", ["one node", "two nodes"])
def test_preemption_that_tells_the_tasks_alone_is_heard(shell, tmp_path, where):
    _, calls = shell
    runs, environment = JOBS[where]
    process = waiting(shell, tmp_path, runs, **environment)
    (srun,) = processes_of(process, "--kill-on-bad-exit=1")
    srun.send_signal(signal.SIGTERM)  # which it passes on to all that the tasks have started
    assert process.wait(timeout=60) == 3 and not calls("signalled")
    assert requeued(calls) == ["123456"]


def test_scancel_which_tells_all_is_no_reason_to_come_back(shell, tmp_path):
    _, calls = shell
    process = waiting(shell, tmp_path, 2, **JOBS["two nodes"][1])
    os.killpg(process.pid, signal.SIGTERM)
    for srun in processes_of(process, "--kill-on-bad-exit=1"):
        srun.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 3
    assert not requeued(calls) and not calls("signalled")


@pytest.mark.parametrize("where", ["one machine", "two nodes"])
def test_a_stop_by_hand_stays_a_stop(shell, tmp_path, where):
    _, calls = shell
    runs, environment = JOBS[where]
    process = waiting(shell, tmp_path, runs, **environment)
    while process.poll() is None:
        (tmp_path / "out/stage1/stop").touch()
        time.sleep(0.3)
    assert process.wait() == 3 and not requeued(calls)


@pytest.mark.parametrize(
    "where, status, saves, again",
    [
        ("one machine", 1, "5", 0),
        ("one node", 1, "", 0),
        ("one node", 2, "5", 0),
        ("one node", 137, "5", 1),
        ("two nodes", 137, "5", 1),
    ],
)
def test_a_failed_job_comes_back_once_it_has_saved(shell, tmp_path, where, status, saves, again):
    start, calls = shell
    runs, environment = JOBS[where]
    for _ in range(1 + again):  # the second time it comes no step further
        process = start(**STAGES, **environment, FAILS=str(status), SAVES=saves)
        assert process.wait(timeout=60) in (status, 143)  # 143: terminated before it failed itself
    assert requeued(calls) == ["123456"] * again


def test_a_killed_launcher_that_says_0_is_no_success(shell, tmp_path):
    """DeepSpeed's runner ends with 0 where its launcher was killed by a signal."""
    start, calls = shell
    (tmp_path / "bin/deepspeed").write_text("#!/bin/bash\nexit 0")
    assert start(**STAGES, GPUS="4").wait() == 1


def test_one_task_of_an_array_is_queued_again_alone(shell, tmp_path):
    _, calls = shell
    array = {"SLURM_ARRAY_JOB_ID": "123450", "SLURM_ARRAY_TASK_ID": "6"}
    process = waiting(shell, tmp_path, **JOBS["one node"][1], **array)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 3 and requeued(calls) == ["123450_6"]


def test_the_command_printed_on_interruption_runs_when_pasted(shell, tmp_path):
    start, calls = shell
    rows = tmp_path / "it's a file.json"
    rows.touch()
    given = {"FINETUNE_ARGS": "--seed 5 --weight_decay 0.1", "VALIDATION_DATA": str(rows)}
    process = waiting(shell, tmp_path, GPUS="4", **given)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 3
    line = (tmp_path / "errors").read_text().splitlines()[-1]
    (tmp_path / "pasted").write_text(line.removeprefix("run.sh: stopped; to go on: "))
    (tmp_path / "calls").unlink()
    assert start(tmp_path / "pasted", GPUS="4", OUT="/nowhere").wait() == 0
    args = launched(calls("deepspeed")[-1])[1]
    assert args.output_dir == str(tmp_path / "out/stage2") and args.seed == 5
    assert args.validation_data_path == given["VALIDATION_DATA"]


# --- what is refused ---


def test_what_cannot_work_is_refused_in_one_line(shell, tmp_path):
    start, calls = shell
    script = tmp_path / "copy"
    shutil.copy(HERE / "run.sh", script)
    names = "GPU-8f3c12,GPU-77aa34"
    for words, path, environment in (
        ("TRAIN_TYPE", None, {"TRAIN_TYPE": "use_lora"}),
        ("need PRETRAIN_DATA", None, {"MODEL": "llava", "TRAIN_TYPE": "use_lora"}),
        ("BITS 9", None, STAGES | {"BITS": "9", "TRAIN_TYPE": "use_lora"}),
        ("BITS 4", None, STAGES | {"BITS": "4"}),
        ("TRAIN_TYPE x", None, STAGES | {"TRAIN_TYPE": "x"}),
        ("VERSION v2", None, STAGES | {"VERSION": "v2"}),
        ("PRETRAIN_DATA a.json", None, STAGES | STAGE_1 | {"PRETRAIN_DATA": "a.json"}),
        ("FINETUNE_DATA tests", None, STAGES | {"FINETUNE_DATA": "tests"}),
        ("FINETUNE_IMAGES a.zip", None, STAGES | STAGE_1 | {"FINETUNE_IMAGES": "a.zip"}),
        ("HOSTFILE hosts", None, STAGES | {"HOSTFILE": "hosts"}),
        ("each node", None, STAGES | {"HOSTFILE": ROWS, "DEEPSPEED_CONFIG": "none"}),
        ("PRETRAIN_IMAGES", None, STAGES | {"PRETRAIN_DATA": ROWS}),
        ("LANGUAGE_MODEL", None, STAGE_1 | {"VISION_TOWER": "clip"}),
        ("each node", None, STAGES | SLURM | {"SLURM_NNODES": "2", "DEEPSPEED_CONFIG": "none"}),
        (names, None, STAGES | {"GPUS": "2", "CUDA_VISIBLE_DEVICES": names}),
        ("its folder", script, STAGES),
        ("its folder", script, STAGES | SLURM | {"COMMAND": "(null)"}),
    ):
        assert start(*([path] if path else []), **environment).wait() == 2
        errors = (tmp_path / "errors").read_text()
        assert errors.startswith("run.sh: ") and errors.count("\n") == 1 and words in errors
    assert not calls("deepspeed")


def test_run_sh_takes_the_templates_and_train_types_of_train_py():
    text = (HERE / "run.sh").read_text()
    versions, types = (
        re.search(rf"{name}:-\w+}} =~ \^\((.*)\)\$", text)[1].split("|")
        for name in ("VERSION", "TRAIN_TYPE")
    )
    assert {*versions, "plain"} == set(data.VERSIONS)
    assert {*types, "projector"} == set(train.TRAIN_TYPES)


def test_a_model_is_built_alone_with_all_else_exported(shell, tmp_path):
    """On a login node, whose compute nodes have no internet."""
    start, calls = shell
    parts = {"VISION_TOWER": "clip", "LANGUAGE_MODEL": "qwen", "TRAIN_TYPE": "full"}
    given = STAGES | STAGE_1 | parts | {"MODEL": "", "PRETRAIN_DATA": "", "FINETUNE_DATA": ""}
    assert start(**given).wait() == 0
    assert [words[0] for words in calls("python") if words[0].endswith(".py")] == ["build.py"]


def test_another_tower_or_a_missing_variable_is_refused(shell, tmp_path):
    start, calls = shell
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model.txt").write_text("clip+qwen+own\n")
    assert start(VISION_TOWER="siglip", LANGUAGE_MODEL="qwen").wait() == 2
    assert start(VISION_TOWER="clip", LANGUAGE_MODEL="qwen").wait() == 0
    assert start(**STAGE_1, OUT=str(tmp_path / "new")).wait() == 2  # no tower
    assert not (tmp_path / "new").exists()


def test_without_deepspeed_one_process_runs_and_many_are_refused(shell, tmp_path):
    start, calls = shell
    (tmp_path / "bin/deepspeed").unlink()
    for name in ("bash", "cat", "dirname", "env", "ls", "mkdir", "rm", "sed", "sleep"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    path = {"PATH": str(tmp_path / "bin")}  # nor setsid
    assert start(**STAGES, **path, GPUS="8").wait() == 2
    assert "DEEPSPEED_CONFIG=none" in (tmp_path / "errors").read_text()
    assert start(**STAGES, **path, GPUS="8", DEEPSPEED_CONFIG="none").wait() == 0
    assert start(**STAGES, **path, GPUS="1", OUT=str(tmp_path / "b")).wait() == 0
    assert sum(words[0] == "train.py" for words in calls("python")) == 2


def test_help_names_every_variable_that_run_sh_reads():
    text = (HERE / "run.sh").read_text()
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd="/")
    shown = run(["bash", HERE / "run.sh", "help"])
    read = set(re.findall(r"\$\{([A-Z]+_?[A-Z]+):[-+]", text)) - {"MASTER_PORT"}
    read -= {"CUDA_VISIBLE_DEVICES"}
    read = {name for name in read if not name.startswith("SLURM")} | {"VISION_TOWER"}
    assert shown.returncode == 0 and read <= set(re.findall(r"^  ([A-Z_]+)  ", shown.stdout, re.M))
    wrong = run(["bash", HERE / "run.sh", "hlep"])
    assert wrong.returncode == 2 and wrong.stderr == shown.stdout and not wrong.stdout


# --- a save that is slow ---


SLOW = """
publish = checkpoint.publish

def slow(part, target, *rest):
    (target.parent / "saving").touch()
    time.sleep(SECONDS)
    publish(part, target, *rest)

checkpoint.publish = slow
"""


@pytest.mark.parametrize(
    "signal_name, seconds, ranks, environment",
    [
        ("SIGTERM", 3, 1, {"DEEPSPEED_CONFIG": "none"}),
        # The launcher would have killed its ranks by then, had the signal reached it.
        pytest.param("SIGTERM", 35, 2, {"NUM_GPUS": "2"}, marks=pytest.mark.long),
        pytest.param(  # two nodes, a launcher on each
            "SIGUSR1", 3, 2, {"NUM_GPUS": "1", "SLURM_NNODES": "2"} | SLURM, marks=pytest.mark.long
        ),
        pytest.param("SIGINT", 3, 2, {"HOSTFILE": "hosts"}, marks=pytest.mark.long),
    ],
)
def test_a_stop_in_a_slow_save_changes_no_weight(
    world, shell, tmp_path, signal_name, seconds, ranks, environment
):
    """What two ranks make equals what one makes, to 1e-5. (Spaces in the folder's name pdsh does not take.)"""
    start, calls = shell
    out = tmp_path / "out"
    folder = tmp_path / ("folder" if "HOSTFILE" in environment else "a folder with spaces")
    folder.mkdir()
    (folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    for kind in ("*.py", "*.json", "run.sh", "requirements.txt"):
        for path in HERE.glob(kind):
            shutil.copy(path, folder)
    code, main = (folder / "train.py").read_text(), 'if __name__ == "__main__":'
    (folder / "train.py").write_text(
        code.replace(main, SLOW.replace("SECONDS", str(seconds)) + main)
    )
    for name in ("python", "deepspeed"):  # the real ones
        (tmp_path / "bin" / name).unlink()
    (tmp_path / "bin/scontrol").write_text(STANDINS["scontrol"].replace("node%s", "127.0.0.%s"))
    flags = {"learning_rate": 1e-3, "save_steps": 2, "bf16": False, "dataloader_num_workers": 0}
    flags |= {"max_steps": 4, "seed": 1}
    text = " ".join(f"--{name} {value}" for name, value in flags.items())
    text += f" --per_device_train_batch_size {4 // ranks}"
    environment = environment | {
        "MODEL": str(world / "llava"),
        "PRETRAIN_DATA": str(world / "captions.json"),
        "FINETUNE_DATA": str(world / "rows.json"),
        "PRETRAIN_IMAGES": str(world / "images"),
        "FINETUNE_IMAGES": str(world / "images"),
        "PRETRAIN_ARGS": text,
        "FINETUNE_ARGS": text,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = start(folder / "run.sh", **environment)
    while not (out / "stage2/saving").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, getattr(signal, signal_name))
    assert process.wait(timeout=300) == 3
    assert checkpoint.checkpoints(out / "stage2")[-1].name == "checkpoint-3"
    assert not list(out.glob("*/*.part")) and not (out / "stage2/final").exists()
    assert start(folder / "run.sh", **environment).wait(timeout=300) == 0
    source = world / "llava"
    for stage, train_type, rows in (
        ("stage1", "projector", "captions"),
        ("stage2", "freeze_vision", "rows"),
    ):
        data_path, reference = world / f"{rows}.json", tmp_path / f"{stage} undisturbed"
        kind = dict(model_name_or_path=source, data_path=data_path, train_type=train_type)
        assert run(world, reference, **flags, **kind)[0] == 0
        a, b = weights_of(reference), weights_of(out / stage)
        off = [(a[k] - b[k]).abs().max() for k in a if ranks == 1 or not k.endswith("k_proj.bias")]
        assert max(off) <= (1e-5 if ranks > 1 else 0), stage
        assert losses_of(reference) == pytest.approx(losses_of(out / stage), abs=1e-5)
        source = reference / "final"


# --- set-up ---


PIP = """
case "$*" in *--dry-run*) grep -qx "$(cat requirements.txt)" installed 2>/dev/null; exit ;; esac
cp requirements.txt installed"""


def test_set_up_installs_only_when_the_requirements_have_changed(tmp_path):
    """In a folder with spaces in its name; pip's own comparison of versions is the next test's."""
    folder, programs = tmp_path / "a folder with spaces", tmp_path / "bin"
    folder.mkdir(), programs.mkdir()
    for name, script in (
        ("python", "exit 1"),  # no packages there
        ("python3", "mkdir -p .venv/bin; cp ../bin/pip .venv/bin/python; cp ../bin/pip .venv/bin"),
        ("pip", PIP),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{script}")
        (programs / name).chmod(0o755)
    shutil.copy(HERE / "run.sh", folder)
    (folder / "train.py").touch()
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "MODEL": "x"}
    start = functools.partial(subprocess.run, ["bash", folder / "run.sh"], text=True)
    for version, installs in (("1.0", 1), ("1.0", 0), ("2.0", 1)):
        (folder / "requirements.txt").write_text(f"thing=={version}\n")
        done = start(env=environment | {"NUM_GPUS": "0"}, stderr=subprocess.PIPE)
        assert done.returncode == 0 and done.stderr.count("installing") == installs, done.stderr


@pytest.mark.parametrize(
    "line, fits",
    [
        (f"numpy=={np.__version__}", True),
        ("numpy==1.0", False),
        ("protobuf>=3", True),
        ("protobuf>=99", False),
        ("no-such-package==1; sys_platform == 'nowhere'", True),
    ],
)
def test_an_environment_with_other_versions_is_not_used(tmp_path, line, fits):
    (tmp_path / "requirements.txt").write_text(line)
    text = (HERE / "run.sh").read_text()
    (function,) = re.findall(r"^has_packages\(\) \{.*?^\}$", text, re.M | re.S)
    script = f"{function}\nhas_packages {shlex.quote(sys.executable)}"
    assert (subprocess.run(["bash", "-c", script], cwd=tmp_path).returncode == 0) == fits


def test_an_old_python_is_told_in_one_line(shell, tmp_path):
    start, _ = shell
    for name, script in (
        ("python", "exit 1"),
        ("python3", '[ "$1" = --version ] && echo Python 3.9.6; exit 1'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / "bin" / name).chmod(0o755)
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(HERE / "run.sh", folder)
    (folder / "train.py").touch()
    assert start(folder / "run.sh").wait() == 2
    said = "run.sh: needs Python 3.11 or newer, and python3 is Python 3.9.6\n"
    assert (tmp_path / "errors").read_text() == said
