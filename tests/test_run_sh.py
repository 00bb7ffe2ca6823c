"""run.sh among stand-ins for what it starts."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import HERE, STAGES, STANDINS, free_port, launched, losses_of, run, weights_of

import checkpoint
import train

SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"}


@pytest.mark.parametrize(
    "environment, processes, config",
    [  # processes: what the launcher is told, -1 as many as there are GPUs, None no launcher
        ({}, None, None),
        ({"GPUS": "4"}, -1, "ds_zero2.json"),
        ({"GPUS": "8", "DEEPSPEED_CONFIG": "ds_zero3.json"}, -1, "ds_zero3.json"),
        ({"GPUS": "8", "NUM_GPUS": "2"}, 2, "ds_zero2.json"),
        ({"GPUS": "8", "DEEPSPEED_CONFIG": "none"}, None, None),
        ({"DEEPSPEED_CONFIG": "ds_zero3.json"}, 1, "ds_zero3.json"),
        ({"NUM_GPUS": "2"}, 2, "ds_zero2.json"),
        ({"HOSTFILE": "hosts"}, -1, "ds_zero2.json"),
        ({"GPUS": "4", "SLURM_NNODES": "1"} | SLURM, -1, "ds_zero2.json"),
    ],
)
def test_run_sh_launches_what_the_machine_has(shell, environment, processes, config):
    start, calls = shell
    assert start(**STAGES, **environment).wait() == 0
    alone = [words for words in calls("python") if words[0] == "train.py"]
    assert len(calls("counted")) == ("NUM_GPUS" not in environment) and not calls("srun")
    if processes is None:
        assert len(alone) == 1 and train.parse(alone[0][1:]).train_type == "freeze_vision"
        return
    (words,) = calls("deepspeed")
    launcher, args = launched(words)
    assert not alone and (launcher.num_gpus, args.deepspeed) == (processes, config)
    assert launcher.hostfile == environment.get("HOSTFILE", "/job/hostfile")
    assert launcher.master_port == (13456 if "SLURM_JOB_ID" in environment else 29500)


def test_slurm_starts_one_launcher_on_each_node_and_all_meet_at_the_first(shell, tmp_path):
    """Trap 34. sbatch runs a copy of the script that lies elsewhere, in a job with 4 tasks a node, say."""
    from deepspeed.launcher import runner

    start, calls = shell
    script = tmp_path / "slurm_script"
    shutil.copy(HERE / "run.sh", script)
    job = SLURM | {"SLURM_NNODES": "3", "SLURM_NTASKS": "12", "SLURM_SUBMIT_DIR": str(HERE)}
    stage1 = {"PRETRAIN_DATA": "a.json", "PRETRAIN_IMAGES": "images"}
    assert start(script, **STAGES, **stage1, **job, NUM_GPUS="4").wait() == 0
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


@pytest.mark.parametrize("signal_name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_reaches_the_run_as_the_file_stop_alone_and_a_warned_job_is_queued_again(
    shell, tmp_path, signal_name
):
    """Sent to the whole process group, as Ctrl-C is. The second start goes on through both stages."""
    start, calls = shell
    environment = (
        STAGES | SLURM | {"PRETRAIN_DATA": "a.json", "PRETRAIN_IMAGES": "images", "GPUS": "4"}
    )
    process = start(**environment, WAIT="yes")
    while not (tmp_path / "calls").exists() or not calls("waiting"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, getattr(signal, signal_name))
    assert process.wait(timeout=60) == 3 and not calls("signalled") and len(calls("deepspeed")) == 1
    requeued = [words for words in calls("scontrol") if words[0] == "requeue"]
    assert requeued == ([["requeue", "123456"]] if signal_name == "SIGUSR1" else [])
    assert not (tmp_path / "out/stage1/stop").exists()
    process = start(**environment)
    assert process.wait() == 0 and process.stdout.read().endswith("out/stage2/final\n")
    args = [launched(words)[1] for words in calls("deepspeed")]
    assert [Path(a.output_dir).name for a in args] == ["stage1", "stage1", "stage2"]
    assert all(a.resume_from_checkpoint == "latest" for a in args)


def test_another_tower_in_the_same_folder_and_a_missing_variable_are_refused(shell, tmp_path):
    start, calls = shell
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model.txt").write_text("clip+qwen+own\n")
    parts = {"VISION_TOWER": "siglip", "LANGUAGE_MODEL": "qwen"}
    for wrong in (
        {"TRAIN_TYPE": "use_lora"},
        {"MODEL": "m", "BITS": "9"},
        {"MODEL": "m", "TRAIN_TYPE": "x"},
    ):
        assert start(**wrong).wait() == 2
    assert start(**parts).wait() == 2
    assert start(VISION_TOWER="clip", LANGUAGE_MODEL="qwen").wait() == 0
    assert start(PRETRAIN_DATA="a.json", OUT=str(tmp_path / "new")).wait() == 1  # no tower
    assert not (tmp_path / "new").exists()


def test_help_names_every_variable_that_run_sh_reads_and_an_unknown_command_shows_it():
    text = (HERE / "run.sh").read_text()
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd="/")
    shown = run(["bash", HERE / "run.sh", "help"])
    read = set(re.findall(r"\$\{([A-Z]+_?[A-Z]+):[-+]", text)) - {"MASTER_PORT"}
    read = {name for name in read if not name.startswith("SLURM")} | {"VISION_TOWER"}
    assert shown.returncode == 0 and read <= set(re.findall(r"^  ([A-Z_]+)  ", shown.stdout, re.M))
    wrong = run(["bash", HERE / "run.sh", "hlep"])
    assert wrong.returncode == 2 and wrong.stderr == shown.stdout and not wrong.stdout


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
def test_both_stages_end_as_an_undisturbed_process_does_though_stopped_in_a_slow_save(
    world, shell, tmp_path, signal_name, seconds, ranks, environment
):
    """What two ranks make equals what one makes, to 1e-5. (Spaces in the folder's name pdsh does not take.)"""
    start, calls = shell
    out = tmp_path / "out"
    folder = tmp_path / ("folder" if "HOSTFILE" in environment else "a folder with spaces")
    folder.mkdir()
    (folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    for path in [*HERE.glob("*.py"), *HERE.glob("*.json"), HERE / "run.sh"]:
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


def wheel(folder, version):
    """A package without dependencies, which pip installs without a network."""
    name = f"thing-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr("thing.py", f"version = '{version}'")
        head = f"Metadata-Version: 2.1\nName: thing\nVersion: {version}\n"
        archive.writestr(f"{name}.dist-info/METADATA", head)
        wheel = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{name}.dist-info/WHEEL", wheel)
        archive.writestr(f"{name}.dist-info/RECORD", "")
    (folder / "requirements.txt").write_text(f"./{name}-py3-none-any.whl\n")


def test_set_up_installs_only_when_the_requirements_have_changed(tmp_path):
    """In a fresh environment of its own, in a folder with spaces in its name."""
    folder, programs = tmp_path / "a folder with spaces", tmp_path / "bin"
    folder.mkdir(), programs.mkdir()
    (programs / "python").write_text("#!/bin/sh\nexit 1")  # no packages there
    (programs / "python3").symlink_to(Path(sys.base_prefix, "bin/python3"))
    (programs / "python").chmod(0o755)
    shutil.copy(HERE / "run.sh", folder)
    (folder / "train.py").touch()
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "MODEL": "x"}
    for version, installs in (("1.0", 1), ("1.0", 0), ("2.0", 1)):
        wheel(folder, version)
        run = subprocess.run(
            ["bash", folder / "run.sh"],
            env=environment | {"DEEPSPEED_CONFIG": "none", "NUM_GPUS": "0"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and run.stderr.count("installing") == installs, run.stderr
        own = [folder / ".venv/bin/python", "-c", "import thing; print(thing.version)"]
        assert subprocess.check_output(own, text=True, cwd=tmp_path).strip() == version
