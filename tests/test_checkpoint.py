"""Stopping, resuming, and what a run on disk survives."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    HERE,
    LORA,
    ZERO,
    argv_of,
    end,
    launch,
    lines_in,
    losses_of,
    metrics_of,
    run,
    start,
    weights_of,
    zero_flags,
)

import train


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(world, tmp_path):
    flags = dict(max_steps=40, per_device_train_batch_size=2, dataloader_num_workers=1)
    assert run(world, tmp_path / "a", **flags)[0] == 0
    argv = argv_of(world, tmp_path / "b", **flags)
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *argv], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("5/40"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    assert 5 <= int(train.checkpoints(tmp_path / "b")[-1].name.split("-")[1]) < 40
    assert run(world, tmp_path / "b", **flags, resume_from_checkpoint="latest")[0] == 0
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def wait_for(condition, processes, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and any(process.is_alive() for process in processes):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The folder of a run with a checkpoint at each step, and its flags: on one process, or ZeRO-2."""
    root = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def made(ranks):
        flags = LORA | dict(save_steps=1, max_steps=8, save_total_limit=-1)
        flags |= dict(per_device_train_batch_size=4 // ranks) | (ZERO[2] if ranks > 1 else {})
        statuses, output = launch(world, root / f"{ranks}", ranks, **flags)
        assert statuses == [0] * ranks, output
        return root / f"{ranks}", flags

    return made


def same_end(a, b):
    a_weights, b_weights = weights_of(a), weights_of(b)
    assert losses_of(a) == losses_of(b) and a_weights.keys() == b_weights.keys()
    assert all(torch.equal(a_weights[name], b_weights[name]) for name in a_weights)


def cut_back(run_folder, out, step):
    """A copy of a run, as it was after the checkpoint of a step."""
    shutil.copytree(run_folder, out)
    shutil.rmtree(out / "final")
    for path in train.checkpoints(out):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_a_run_comes_to_the_same_end(
    world, undisturbed, tmp_path, ranks, kills
):
    """SIGKILL at random moments, every other one while a checkpoint is written. Users' trouble 5."""
    whole, flags = undisturbed(ranks)
    out, draw, at = tmp_path / "a", random.Random(ranks), []
    flags = flags | {"resume_from_checkpoint": "latest"}
    parts = lambda: set(out.glob("checkpoint-*.part"))  # noqa: E731
    while len(at) < kills:
        stale, before = parts(), lines_in(out / "metrics.jsonl")
        processes = start(world, out, ranks, **flags)
        if len(at) % 2:
            wait_for(lambda: parts() - stale, processes)
            time.sleep(draw.uniform(0, 0.02))
        else:
            wait_for(lambda: lines_in(out / "metrics.jsonl") > before, processes)
            time.sleep(draw.uniform(0, 0.1))
        moment = "save" if parts() - stale else "step"
        for process in processes:
            process.kill()
        if -signal.SIGKILL in end(processes):
            at.append(moment)
        else:  # it was at its end
            same_end(whole, out)
            shutil.rmtree(out)
    assert kills == 3 or "save" in at
    statuses, output = launch(world, out, ranks, **flags)
    assert statuses == [0] * ranks, output
    same_end(whole, out)
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("way", ["signal", "file"])
def test_asked_to_stop_all_ranks_save_at_the_same_step(world, undisturbed, tmp_path, way):
    whole, flags = undisturbed(2)
    flags, out = flags | {"save_steps": -1}, tmp_path / "a"
    processes = start(world, out, 2, **flags)
    wait_for(lambda: lines_in(out / "metrics.jsonl") >= 2, processes)
    if way == "signal":
        os.kill(processes[1].pid, signal.SIGTERM)  # to one of them only
    else:
        (out / "stop").touch()
    assert end(processes) == [3, 3]
    (stopped,) = train.checkpoints(out)
    assert stopped.name == f"checkpoint-{metrics_of(out)[-1]['step']}"
    statuses, output = launch(world, out, 2, **flags, resume_from_checkpoint="latest")
    assert statuses == [0, 0], output
    same_end(whole, out)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_is_named_and_latest_takes_the_one_before(
    world, undisturbed, tmp_path, ranks
):
    whole, flags = undisturbed(ranks)
    cut_back(whole, tmp_path / "a", 4)
    damaged = {
        4: "rng-0.pt",
        3: "progress.json",
        2: "state*.pt" if ranks == 1 else "state/*_1_*.pt",
    }
    for step, name in damaged.items():
        (file,) = (tmp_path / "a" / f"checkpoint-{step}").glob(name)
        content = bytearray(file.read_bytes())
        if step == 4:  # a bit turns over, in the middle of a tensor
            content[len(content) // 2] ^= 1
        file.write_bytes(content if step == 4 else content[:-1])
        damaged[step] = file
    for step, file in damaged.items():
        folder = tmp_path / "a" / f"checkpoint-{step}"
        statuses, output = launch(
            world, tmp_path / "a", ranks, **flags, resume_from_checkpoint=folder
        )
        assert statuses == [2] * ranks and output.count("train.py: ") == 1
        (line,) = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert f"{file}: damaged" in line
    statuses, output = launch(
        world, tmp_path / "a", ranks, **flags, resume_from_checkpoint="latest"
    )
    assert statuses == [0] * ranks and output.count("passed over") == 3, output
    assert f"resumed from {tmp_path}/a/checkpoint-1" in output
    same_end(whole, tmp_path / "a")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", ["full", "unwritable", "blocked"])
def test_a_write_that_fails_on_one_rank_stops_all_with_one_line(
    world, undisturbed, tmp_path, ranks, fault
):
    """And the checkpoint before it is whole. A disk is full here for files above some size."""
    whole, flags = undisturbed(ranks)
    out = tmp_path / "a"
    cut_back(whole, out, 4)
    flags = flags | {"resume_from_checkpoint": "latest"}
    last = ranks - 1
    if fault == "unwritable":  # a folder is in the way of what only this rank writes
        (out / "checkpoint-5.part" / f"rng-{last}.pt").mkdir(parents=True)
    if fault == "blocked":
        (out / "checkpoint-5.part").touch()
    limits = {last: 20_000} if fault == "full" else {}
    statuses, output = launch(world, out, ranks, limits, **flags)
    lines = [line for line in output.splitlines() if "train.py: " in line]
    assert statuses == [2] * ranks and len(lines) == 1, output
    assert "checkpoint-5.part" in lines[0] and "not written" in lines[0]
    assert "Traceback" not in output
    assert train.checkpoints(out)[-1].name == "checkpoint-4"
    shutil.rmtree(out / "checkpoint-5.part") if fault == "unwritable" else None
    (out / "checkpoint-5.part").unlink() if fault == "blocked" else None
    assert launch(world, out, ranks, **flags)[0] == [0] * ranks
    same_end(whole, out)


@pytest.mark.parametrize(
    "stage, offload, kind, bf16, was, now",
    [
        (2, "none", "full", False, 2, 1),
        (2, "optimizer", "lora", True, 1, 2),
        (3, "none", "qlora", True, 2, 1),
        (3, "all", "full", False, 1, 2),
    ],
)
def test_another_number_of_processes_goes_on_to_the_same_end(
    world, tmp_path, stage, offload, kind, bf16, was, now
):
    """If a step keeps its rows. Groups of weights have rates and decay of their own, which must come back."""
    whole, out = tmp_path / "a", tmp_path / "b"
    flags = zero_flags(world, kind, 6, bf16) | ZERO[stage] | dict(offload=offload, eval_samples=0)
    flags |= dict(
        save_steps=3, weight_decay=0.1, mm_projector_lr=3e-4, per_device_train_batch_size=2
    )
    statuses, output = launch(world, whole, was, **flags, gradient_accumulation_steps=2 // was)
    assert statuses == [0] * was, output
    cut_back(whole, out, 3)
    flags["resume_from_checkpoint"] = "latest"
    statuses, output = launch(world, out, now, **flags, gradient_accumulation_steps=2)
    if now == 2:
        assert statuses == [2, 2] and output.count("train.py: ") == 1
        assert "of 4 rows a step, not 8" in output
        flags["gradient_accumulation_steps"] = 1
        statuses, output = launch(
            world, out, now, {0: 20_000}, **flags
        )  # a disk full of rewriting it
        assert statuses == [2, 2] and output.count("train.py: ") == 1, output
        assert "checkpoint-3.universal/state: not written" in output
        statuses, output = launch(world, out, now, **flags)
    assert statuses == [0] * now, output
    assert f"written by {was} processes, and these are {now}" in output
    assert losses_of(whole) == pytest.approx(losses_of(out), abs=1e-5)
    a, b = weights_of(whole), weights_of(out)
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a if "k_proj.bias" not in k)
    left = {path.name for path in out.iterdir() if path.is_dir()}
    assert left == {"best", "checkpoint-3", "checkpoint-6", "final"}
    assert json.loads((out / "checkpoint-6" / "progress.json").read_text())["world"] == now


def test_a_damaged_run_is_named_and_a_half_written_checkpoint_passed_over(world, tmp_path):
    flags = dict(save_steps=2, save_total_limit=-1)
    assert run(world, tmp_path / "a", **flags)[0] == 0
    shutil.rmtree(tmp_path / "a" / "final")
    (tmp_path / "a" / "checkpoint-9").mkdir()
    (tmp_path / "a" / "checkpoint-final-2").mkdir()
    assert train.checkpoints(tmp_path / "a")[-1].name == "checkpoint-6"
    assert run(world, tmp_path / "a", **flags, resume_from_checkpoint="latest")[0] == 0
    shutil.rmtree(tmp_path / "a" / "final")
    (tmp_path / "a" / "run.json").write_text("[]")
    status, _, error = run(world, tmp_path / "a", **flags, resume_from_checkpoint="latest")
    assert status == 2 and "run.json" in error and error.count("\n") == 1
