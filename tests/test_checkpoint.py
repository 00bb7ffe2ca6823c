"""Stopping and resuming: what a run on disk holds, survives, and refuses."""

import functools
import json
import os
import pickletools
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from peft import PeftModel
from processes import (
    LORA,
    STAGE_1,
    STILL,
    ZERO,
    argv_of,
    be_rank,
    end,
    launch,
    launch_all,
    lines_in,
    losses_of,
    metrics_of,
    run,
    start,
    weights_of,
)
from safetensors.torch import load_file
from tiny import HERE, change_tensors
from transformers import LlavaForConditionalGeneration

import checkpoint
import train

LATEST = {"resume_from_checkpoint": "latest"}


def cut_back(whole, out, step):
    """A copy of a run as it was after the checkpoint of a step."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    for folder in checkpoint.checkpoints(out):
        if checkpoint.step_of(folder) > step:
            shutil.rmtree(folder)
    return out


def same_end(a, b):
    a_weights, b_weights = weights_of(a), weights_of(b)
    assert losses_of(a) == losses_of(b) and a_weights.keys() == b_weights.keys()
    assert all(torch.equal(a_weights[name], b_weights[name]) for name in a_weights)


# --- one format for all ---

FULL = dict(learning_rate=1e-3, mm_projector_lr=3e-4, mm_vision_tower_lr=1e-4, weight_decay=0.1)
STILL_LORA = LORA | STILL | {"learning_rate": 1e-3}
KINDS = {"full": FULL, "lora": STILL_LORA, "qlora": STILL_LORA | {"bits": 4}}


def split(micro, accumulation):
    return dict(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)


def test_one_run_goes_on_with_other_engines_and_processes(world, tmp_path):
    """12 steps in one process; and 3 each of plain torch, ZeRO-2 x 2, ZeRO-3 x 3, plain torch."""
    offload = {"offload": "optimizer"}
    parts = [(1, split(4, 3)), (2, split(3, 2) | ZERO[2] | offload), (3, split(2, 2) | ZERO[3])]
    parts.append((1, split(6, 2)))
    for i, (ranks, flags) in enumerate(parts):
        runs = {}
        for kind in KINDS:
            out = tmp_path / f"{i}-{kind}"
            if i > 0:
                cut_back(tmp_path / f"{i - 1}-{kind}", out, 3 * i)
            runs[out] = KINDS[kind] | dict(max_steps=12, save_steps=3, save_total_limit=-1)
            runs[out] |= flags | (LATEST if i > 0 else {})
        launch_all(world, ranks, runs)
    for kind in KINDS:
        whole, last = tmp_path / f"0-{kind}", tmp_path / f"3-{kind}"
        assert len(losses_of(last)) == 12 and losses_of(last)[-1] < losses_of(last)[0]
        assert losses_of(last) == pytest.approx(losses_of(whole), abs=2e-5), kind


@pytest.mark.parametrize("kind", [{}, {"bf16": True}, LORA, {**LORA, "bits": 4}, STAGE_1])
def test_an_interrupted_run_equals_one_that_was_not(world, tmp_path, kind):
    """Bit for bit, losses and weights, in the middle of an epoch, dropout included."""
    rows = world / ("captions.json" if kind == STAGE_1 else "rows.json")
    flags = dict(data_path=rows, validation_data_path=rows, per_device_train_batch_size=2) | kind
    flags |= dict(save_steps=2, save_total_limit=-1)
    whole = tmp_path / "a"
    assert run(world, whole, **flags)[0] == 0
    out = cut_back(whole, tmp_path / "b", 4)
    (out / "checkpoint-7.part").mkdir()  # what a run leaves that dies while it saves
    status, output, _ = run(world, out, **flags, **LATEST)
    assert status == 0 and f"resumed from {out}/checkpoint-4" in output
    assert len(losses_of(out)) == 6 and not list(out.glob("*.part"))
    same_end(whole, out)
    evaluations = [[m for m in metrics_of(x) if "eval_loss" in m] for x in (whole, out)]
    assert evaluations[0] == evaluations[1]
    assert run(world, out, **flags, **LATEST)[1].endswith("complete\n")


def test_two_ranks_resume_bit_for_bit(world, tmp_path):
    cases = [
        (2, FULL),
        (2, FULL | {"bf16": True, "offload": "optimizer"}),
        (2, LORA | {"bf16": True}),
        (3, FULL | {"bf16": True}),
        (3, LORA | {"offload": "all"}),
        (3, LORA | {"bits": 4, "bf16": True}),
    ]
    whole, resumed = {}, {}
    for i, (stage, kind) in enumerate(cases):
        flags = kind | ZERO[stage] | dict(max_steps=4, save_steps=2, save_total_limit=-1)
        flags |= {"per_device_train_batch_size": 2}
        whole[tmp_path / f"whole{i}"] = flags
        resumed[tmp_path / f"resumed{i}"] = flags | LATEST
    launch_all(world, 2, whole)
    for a, b in zip(whole, resumed):
        cut_back(a, b, 2)
    launch_all(world, 2, resumed)
    for a, b in zip(whole, resumed):
        same_end(a, b)


# --- what a checkpoint is ---


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The folder of a LoRA run with a checkpoint at each step, and its flags: plain, or ZeRO-2."""
    root = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def made(ranks):
        flags = LORA | dict(save_steps=1, max_steps=8, save_total_limit=-1)
        flags |= dict(per_device_train_batch_size=4 // ranks) | (ZERO[2] if ranks > 1 else {})
        statuses, output = launch(world, root / f"{ranks}", ranks, **flags)
        assert statuses == [0] * ranks, output
        return root / f"{ranks}", flags

    return made


def test_a_checkpoint_holds_no_pickle_and_others_may_read_it(undisturbed):
    folder = undisturbed(2)[0] / "checkpoint-8"
    files = json.loads((folder / "progress.json").read_text())["files"]
    assert files.keys() | {"progress.json"} == {path.name for path in folder.iterdir()}
    assert sum(name.startswith("state-") for name in files) == 2  # one of each rank
    for path in folder.iterdir():
        assert not zipfile.is_zipfile(path)
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))
        assert path.stat().st_mode & 0o044 == 0o044


def test_a_checkpoint_of_a_lora_run_loads_in_peft(world, undisturbed):
    folder = undisturbed(1)[0] / "checkpoint-5"
    base = LlavaForConditionalGeneration.from_pretrained(world / "llava", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).state_dict()
    ours = {
        key.split(".", 1)[1]: value
        for file in folder.glob("state-*.safetensors")
        for key, value in load_file(file).items()
        if key.startswith("weight.")
    }
    assert {value.shape for value in ours.values()} > {(4, 64)} or len(ours) > 10
    unmatched = [tuple(value.shape) for value in ours.values()]
    for value in theirs.values():
        if any(value.shape == own.shape and torch.equal(value, own) for own in ours.values()):
            unmatched.remove(tuple(value.shape))
    assert not unmatched


def test_a_damaged_checkpoint_is_named_and_passed_over(world, undisturbed, tmp_path):
    whole, flags = undisturbed(1)
    out = cut_back(whole, tmp_path / "a", 5)
    file = "state-*.safetensors"
    (short,) = (out / "checkpoint-5").glob(file)
    os.truncate(short, short.stat().st_size - 1)
    (missing,) = (out / "checkpoint-4").glob(file)
    missing.unlink()
    (cut,) = (out / "checkpoint-3").glob("progress.json")
    os.truncate(cut, 20)
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-final-2").mkdir()
    bad = [out / "checkpoint-9/progress.json", short, missing, cut]
    for path in bad:
        status, _, error = run(world, out, **flags, resume_from_checkpoint=path.parent)
        assert status == 2 and str(path) in error and error.count("\n") == 1
    status, output, _ = run(world, out, **flags, **LATEST)
    assert status == 0 and f"resumed from {out}/checkpoint-2" in output
    assert [f"{path}: " in output for path in bad] == [True] * 4
    same_end(whole, out)
    other = {"resume_from_checkpoint": whole.parent / "1" / "checkpoint-2"}
    edit_id = json.loads((out / "run.json").read_text()) | {"id": "another"}
    (out / "run.json").write_text(json.dumps(edit_id))
    shutil.rmtree(out / "final")
    assert "another run's" in run(world, out, **flags | other)[2]


def test_only_the_newest_checkpoints_are_kept(world, undisturbed, tmp_path):
    whole, flags = undisturbed(1)
    out = cut_back(whole, tmp_path / "a", 3)
    (out / "checkpoint-9").mkdir()  # it counts for none
    assert run(world, out, **flags | LATEST | {"save_total_limit": 2})[0] == 0
    left = [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(out)]
    assert left == [7, 8, 9]


# --- killed, stopped ---


def wait_for(condition, processes, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and any(process.is_alive() for process in processes):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.002)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_comes_to_the_same_end(world, undisturbed, tmp_path, ranks, kills):
    """SIGKILL at random moments, every other one while a checkpoint is written; resumed at once."""
    whole, flags = undisturbed(ranks)
    out, draw, at = tmp_path / "a", random.Random(ranks), []
    flags = flags | LATEST
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


@pytest.mark.parametrize("way", ["signal", "file"])
def test_asked_to_stop_all_ranks_save_one_step(world, undisturbed, tmp_path, way):
    whole, flags = undisturbed(2)
    flags, out = flags | {"save_steps": -1}, tmp_path / "a"
    processes = start(world, out, 2, **flags)
    wait_for(lambda: lines_in(out / "metrics.jsonl") >= 2, processes)
    if way == "signal":
        os.kill(processes[1].pid, signal.SIGTERM)  # to one of them only
    else:
        (out / "stop").touch()
    assert end(processes) == [3, 3]
    (stopped,) = checkpoint.checkpoints(out)
    assert checkpoint.step_of(stopped) == metrics_of(out)[-1]["step"]
    statuses, output = launch(world, out, 2, **flags, **LATEST)
    assert statuses == [0, 0], output
    same_end(whole, out)


WORKERS = dict(max_steps=100_000, save_steps=-1, dataloader_num_workers=2)


def be_a_group(rank, *args):
    os.setpgid(0, 0)
    be_rank(rank, *args)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_group_saves(world, tmp_path, number):
    """Loader workers get it too."""
    out = tmp_path / "a"
    processes = start(world, out, target=be_a_group, **WORKERS)
    wait_for(lambda: lines_in(out / "metrics.jsonl") >= 2, processes)
    os.killpg(processes[0].pid, number)
    assert end(processes) == [3] and len(checkpoint.checkpoints(out)) == 1


def test_timeout_ends_a_run_with_a_checkpoint(world, tmp_path):
    """Asked to end, `timeout` does what it does when the time is over: it signals the whole group."""
    argv = [sys.executable, HERE / "train.py", *argv_of(world, tmp_path / "a", **WORKERS)]
    process = subprocess.Popen(
        ["timeout", "-s", "TERM", "1000", *argv], start_new_session=True, stdout=subprocess.DEVNULL
    )
    while lines_in(tmp_path / "a" / "metrics.jsonl") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3 and len(checkpoint.checkpoints(tmp_path / "a")) == 1


def test_a_worker_that_dies_ends_the_run_in_one_line(world, tmp_path):
    processes = start(world, tmp_path / "a", **WORKERS)
    wait_for(lambda: lines_in(tmp_path / "a" / "metrics.jsonl") >= 2, processes)
    for child in children(processes[0].pid):
        os.kill(child, signal.SIGKILL)
    assert end(processes) == [2]
    lines = (tmp_path / "a-0.txt").read_text().splitlines()
    assert "--dataloader_num_workers 0" in lines[-1] and "Traceback" not in "".join(lines)


def children(pid):
    text = (train.Path(f"/proc/{pid}/task/{pid}/children")).read_text()
    return [int(child) for child in text.split()]


# --- what must be the same ---


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A folder with everything of its own: model, rows, and a run that has come to step 2 of 4."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(world, root, dirs_exist_ok=True)
    flags = dict(max_steps=4, save_steps=2, save_total_limit=-1)
    assert run(root, root / "whole", **flags)[0] == 0
    cut_back(root / "whole", root / "a", 2)
    return root, flags


@pytest.fixture
def own(stopped, tmp_path):
    """(the folder, flags, resume(more flags)) of a copy of `stopped`, to be changed."""
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    run_json = tmp_path / "a" / "run.json"
    run_json.write_text(run_json.read_text().replace(str(stopped[0]), str(tmp_path)))
    return tmp_path, lambda **more: run(tmp_path, tmp_path / "a", **stopped[1] | LATEST | more)


def shrink(root):
    rows = json.loads((root / "rows.json").read_text())
    (root / "rows.json").write_text(json.dumps(rows[:-1]))


def grow(root):
    rows = json.loads((root / "rows.json").read_text())
    (root / "rows.json").write_text(json.dumps(rows + rows))


def change_word(root):
    text = (root / "rows.json").read_text()
    (root / "rows.json").write_text(text.replace("blue", "pink"))


def change_base(root):
    def double(tensors):
        tensors["multi_modal_projector.linear_2.weight"] *= 2

    change_tensors(root / "llava", double)


def former(root):
    old = {"id": "x", "rows_a_step": 4, "args": {}}
    (root / "a" / "run.json").write_text(json.dumps(old))


@pytest.mark.parametrize(
    "change, flags, says",
    [
        (shrink, {}, "the rows of data_path"),
        (grow, {}, "the rows of data_path"),
        (change_word, {}, "the rows of data_path"),
        (change_base, {}, "a base (its weights)"),
        (former, {}, "format of another version"),
        (None, {"max_steps": 5}, "--max_steps 4, not 5"),
        (None, {"num_train_epochs": 2}, "--num_train_epochs 1.0, not 2.0"),
        (None, {"learning_rate": 1}, "--learning_rate 0.01, not 1.0"),
        (None, {"per_device_train_batch_size": 8}, "x accumulation x processes"),
        (None, {"resume_from_checkpoint": "nowhere"}, "nowhere/progress.json: missing"),
        (None, {"resume_from_checkpoint": None}, "--resume_from_checkpoint latest"),
    ],
)
def test_what_would_change_a_run_is_refused(own, change, flags, says):
    root, resume = own
    if change:
        change(root)
    before = sorted(root.rglob("*"))
    status, _, error = resume(**flags)
    assert status == 2 and says in error and error.count("\n") == 1
    assert sorted(path for path in root.rglob("*") if path.name != "lock") == [
        path for path in before if path.name != "lock"
    ]


def test_what_changes_nothing_that_is_learnt_is_free(own, stopped, monkeypatch):
    """Paths, engine, split, memory, how often: all at once, and the end is the same."""
    root, resume = own
    shutil.move(root / "rows.json", root / "moved.json")
    shutil.move(root / "images", root / "pictures")
    monkeypatch.chdir(root)
    status, _, error = resume(
        model_name_or_path="./llava", data_path="moved.json", image_folder="./pictures",
        gradient_checkpointing=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_steps=1, logging_steps=2, dataloader_num_workers=1, on_bad_record="skip",
        per_device_eval_batch_size=2,
    )  # fmt: skip
    assert status == 0, error
    whole = losses_of(stopped[0] / "whole")
    assert losses_of(root / "a") == pytest.approx([*whole[:2], whole[3]], abs=2e-5)


def test_a_second_run_in_a_folder_is_refused(world, tmp_path):
    out = tmp_path / "a"
    flags = WORKERS | {"dataloader_num_workers": 1}
    processes = start(world, out, **flags)
    wait_for(lambda: lines_in(out / "metrics.jsonl") >= 2, processes)
    statuses, output = launch(world, tmp_path / "b", **flags | LATEST | {"output_dir": out})
    assert statuses == [2] and "a run is going on there" in output and "Traceback" not in output
    assert processes[0].is_alive()
    wait_for(lambda: children(processes[0].pid), processes)
    worker = children(processes[0].pid)[0]
    os.kill(worker, signal.SIGSTOP)  # it outlives the run, and has its files open
    processes[0].kill()
    end(processes)
    checkpoint.lock(out).close()
    os.kill(worker, signal.SIGKILL)


# --- ends ---


def test_the_newest_checkpoints_are_kept(world, tmp_path):
    flags = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
    assert run(world, tmp_path / "a", **flags)[0] == 0
    kept = [path.name for path in checkpoint.checkpoints(tmp_path / "a")]
    assert kept == ["checkpoint-3", "checkpoint-4"]


def test_a_best_that_was_deleted_is_not_announced(world, tmp_path):
    flags = dict(validation_data_path=world / "rows.json", max_steps=2, save_steps=1)
    flags |= dict(learning_rate=0, mm_projector_lr=0, mm_vision_tower_lr=0)  # the start is the best
    whole = tmp_path / "a"
    status, output, _ = run(world, whole, **flags)
    assert status == 0 and f"{whole}/best" in output
    out = cut_back(whole, tmp_path / "b", 1)
    shutil.rmtree(out / "best")
    status, output, _ = run(world, out, **flags, **LATEST)
    assert status == 0 and f"{out}/best" not in output and f"{out}/final" in output


def unsupervised(world, tmp_path, which):
    """Rows whose answers are cut away, wherever `which(i)`."""
    rows = json.loads((world / "rows.json").read_text())
    for i, row in enumerate(rows):
        if which(i):
            row["image"], row["conversations"] = (
                [f"{i}.png"],
                [
                    {"from": "human", "value": "<image>\n" + "hello " * 300},
                    {"from": "gpt", "value": "cut away"},
                ],
            )
    (tmp_path / "cut.json").write_text(json.dumps(rows))
    return dict(data_path=tmp_path / "cut.json", on_bad_record="skip", model_max_length=200)


def test_steps_without_supervised_tokens_count_in_all_engines(world, tmp_path):
    """Their gradients are zero: momentum and decay go on."""
    flags = unsupervised(world, tmp_path, lambda i: i % 3)  # of 6 steps some have nothing to learn
    flags |= dict(max_steps=6, warmup_ratio=0, weight_decay=0.1, per_device_train_batch_size=1)
    one = {tmp_path / "1": flags | {"gradient_accumulation_steps": 2}}
    two = {tmp_path / f"{stage}": flags | ZERO[stage] for stage in (2, 3)}
    launch_all(world, 1, one)
    launch_all(world, 2, two)
    losses = losses_of(tmp_path / "1")
    assert 0 in losses and max(losses) > 0
    for out in two:
        assert losses_of(out) == pytest.approx(losses, abs=1e-5)
        a, b = weights_of(tmp_path / "1"), weights_of(out)
        assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a if "k_proj.bias" not in k)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_run_that_learns_from_nothing_ends_in_one_line(world, tmp_path, steps):
    """At the end of its first epoch, of 3 steps here, or at its end."""
    flags = unsupervised(world, tmp_path, lambda i: True) | {"max_steps": steps}
    status, _, error = run(world, tmp_path / "a", **flags)
    assert status == 2 and f"after {min(steps, 3)} steps" in error.splitlines()[-1]
    assert not (tmp_path / "a" / "final").exists()
