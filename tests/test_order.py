"""The order of rows, and the processes that prepare them."""

import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import order


def rows_of(lengths, has_picture):
    return types.SimpleNamespace(lengths=lengths, has_picture=has_picture)


@pytest.mark.parametrize("rows, batch", [(1000, 16), (5, 8), (64, 8), (33, 4), (1, 1)])
@pytest.mark.parametrize("by_modality", [False, True])
def test_epoch_has_every_row_once_and_the_longest_step_first(rows, batch, by_modality):
    rng = np.random.default_rng(0)
    lengths, has_picture = rng.integers(5, 900, rows), rng.random(rows) < 0.7
    plan = lambda seed=0, epoch=0: order.plan_epoch(
        rows_of(lengths, has_picture), batch, seed, epoch, by_modality
    )  # noqa: E731
    steps = plan()
    assert (steps == plan()).all() and steps.shape[1] == batch
    assert sorted(steps[steps >= 0]) == list(range(rows))  # complete, no row twice
    kinds = [{bool(has_picture[i]) for i in step if i >= 0} for step in steps]
    assert len(steps) == sum(
        -(-n // batch)
        for n in ([has_picture.sum(), (~has_picture).sum()] if by_modality else [rows])
    )
    assert not by_modality or all(len(kind) == 1 for kind in kinds)
    assert sum((step < 0).any() for step in steps) <= 1 + by_modality
    sizes = np.where(steps < 0, 0, lengths[steps])
    assert sizes[0].max() == lengths.max() and (np.diff(sizes, axis=1) <= 0).all()
    if rows == 1000:  # other mates in each epoch and with each seed
        mates = [
            {frozenset(step) for step in plan(seed, epoch).tolist()}
            for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 1))
        ]
        assert sum(map(len, mates)) == len(set().union(*mates))
    if rows == 1000 and by_modality:  # alike in length within a step
        random_order = order.plan_epoch(rows_of(lengths, has_picture), batch, 0, 0, False)
        assert np.ptp(sizes, axis=1).mean() < np.ptp(lengths[random_order], axis=1).mean() / 4


def test_rows_grouped_by_length_are_padded_far_less():
    """On lengths spread as those of LLaVA-Instruct, of which the sampler knows an estimate."""
    rng = np.random.default_rng(0)
    has_picture = rng.random(20_000) < 0.94
    words = np.where(has_picture, rng.lognormal(5.1, 0.75, 20_000), rng.lognormal(6.3, 0.8, 20_000))
    lengths = (576 * has_picture + words).clip(12, 2048)
    estimate = 576 * has_picture + words * rng.lognormal(0, 0.12, 20_000)

    def padded(batches):
        rows = np.reshape(batches, (-1, 16))  # micro-batches
        sizes = np.where(rows < 0, 1, lengths[rows])
        return 1 - sizes.sum() / (16 * sizes.max(1)).sum()

    plain, grouped = (
        padded(
            order.micro_batches(
                order.plan_epoch(rows_of(estimate, has_picture), 128, 0, 0, by), 8, 1, 0
            )
        )
        for by in (False, True)
    )
    assert grouped < 0.08 < plain < 0.2 < 0.35 < padded(rng.permutation(20_000))


def test_every_split_takes_the_same_rows_in_each_step():
    steps = order.plan_epoch(rows_of(np.arange(100), np.ones(100, bool)), 12, 0, 0, False)
    for world, accumulation in ((1, 1), (1, 12), (2, 3), (4, 1), (3, 4)):
        for start in (0, 3):
            ranks = [
                list(order.micro_batches(steps, accumulation, world, rank, start))
                for rank in range(world)
            ]
            assert {len(batches) for batches in ranks} == {
                len(order.micro_batches(steps, accumulation, world, 0, start))
            }
            for k, step in enumerate(steps[start:]):
                windows = [batches[k * accumulation : (k + 1) * accumulation] for batches in ranks]
                assert sorted(i for window in windows for rows in window for i in rows) == sorted(
                    step.tolist()
                )
                assert {len(rows) for window in windows for rows in window} == {
                    12 // world // accumulation
                }


class Rows(torch.utils.data.Dataset):
    """Rows of one picture each; before it gives row i a worker does what it is told."""

    def __init__(self, before=lambda i: None):
        self.before = before

    def __getitem__(self, i):
        self.before(i)
        return {
            "input_ids": torch.tensor([i]),
            "pid": os.getpid(),
            "pixel_values": torch.zeros(3, 99, 99),
        }


def load(rows, count=8, workers=2):
    batches = [[i] for i in range(count)]
    return order.loader(
        rows, batches, lambda rows: (rows[0]["input_ids"].item(), rows[0]["pid"]), workers
    )


def test_workers_finish_whatever_the_run_is_told():
    """A signal to the whole group, as timeout and srun send, loses no batch."""
    found = []
    for i, pid in load(Rows()):
        assert pid != os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
        found.append(i)
    assert found == list(range(8))


def test_a_worker_hears_no_signal_as_it_starts(monkeypatch):
    """And the run itself hears again what comes after that."""
    torchs, heard = torch.utils.data._utils.worker._worker_loop, []

    def loop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        torchs(*args)

    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_loop", loop)
    assert [i for i, _ in load(Rows())] == list(range(8))
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("stop"))
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert heard == ["stop"]


def test_a_worker_that_dies_ends_the_run_in_one_line():
    parent = os.getpid()
    dies = Rows(lambda i: i == 3 and os.getpid() != parent and os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError) as caught:
        list(load(dies))
    assert "try --dataloader_num_workers 0" in cli.in_words(caught.value)


def test_little_shared_memory_means_no_workers_and_one_line(monkeypatch, capsys):
    order.say_once.cache_clear()
    usage = shutil.disk_usage("/")
    row_bytes = 3 * 99 * 99 * 4
    for free, alone in ((4 * row_bytes, False), (4 * row_bytes - 1, True)):  # two workers, two each
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        for _ in range(2):
            pids = {pid for _, pid in load(Rows())}
            assert (pids == {os.getpid()}) == alone
        err = capsys.readouterr().err
        assert err.count("docker run --shm-size=8g") == err.count("\n") == alone


FAILS = """
import order
dataset = [{"pixel_values": __import__("torch").zeros(1)}] * 8
batches = iter(order.loader(dataset, [[0], [1], [2], [3]], list, workers=1))
next(batches)
raise AssertionError("a bug")
"""


def test_a_bug_ends_a_program_with_its_workers():
    options = {"cwd": Path(order.__file__).parent, "capture_output": True, "text": True}
    ended = subprocess.run([sys.executable, "-c", FAILS], timeout=60, **options)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("AssertionError: a bug"), ended.stderr
