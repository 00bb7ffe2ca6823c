"""Which rows come when, and the processes that prepare them.

    steps = plan_epoch(dataset.records, global_batch=8, seed=0, epoch=0, by_modality=True)
    batches = micro_batches(steps, accumulation=2, world=1, rank=0)   # of 4 rows
    for batch in loader(dataset, batches, collate, workers=2):
        ...

The rows of an optimizer step are a function of seed, epoch and global batch alone, so ranks,
restarts and other splits into micro-batches agree. Length-grouped steps are LLaVA's
`group_by_modality_length` (github.com/haotian-liu/LLaVA, llava/train/llava_trainer.py).
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import sys

import numpy as np
import torch


def plan_epoch(records, global_batch: int, seed: int, epoch: int, by_modality: bool):
    """The rows of each optimizer step, longest first: (steps, global_batch) int64, padded with -1.

    records has `lengths` and `has_picture` of all rows. With `by_modality` a step has rows of one
    kind (with pictures, or without), of similar length. The step with the longest row is the first
    of epoch 0: what exceeds the memory shows at once.
    """
    rng, lengths = np.random.default_rng([seed, epoch]), records.lengths
    kinds = [records.has_picture, ~records.has_picture]
    steps = []
    for kind in kinds if by_modality else [np.full(len(lengths), True)]:
        rows = rng.permutation(np.flatnonzero(kind))
        if by_modality and len(rows):  # by length, give or take 5 %: other mates in each epoch
            noise = rng.uniform(-0.05, 0.05, len(rows)) * lengths[rows].mean()
            rows = rows[np.argsort(noise - lengths[rows])]
        missing = np.full(-len(rows) % global_batch, -1)
        steps.append(np.append(rows, missing).reshape(-1, global_batch))
    steps = rng.permutation(np.concatenate(steps))  # (steps, global_batch)
    size = np.where(steps < 0, 0, lengths[steps])
    steps = np.take_along_axis(steps, np.argsort(-size, axis=1, kind="stable"), axis=1)
    if epoch == 0:
        heaviest = size.max(axis=1).argmax()
        steps[[0, heaviest]] = steps[[heaviest, 0]]
    return steps


def micro_batches(steps: np.ndarray, accumulation: int, world: int, rank: int, start: int = 0):
    """This rank's micro-batches, lists of rows, `accumulation` of them for each step from `start`.

    Neighbours in length share one, and ranks take neighbours: padding and waiting are least.
    """
    micro = steps.shape[1] // (accumulation * world)
    rows = steps[start:].reshape(-1, accumulation, world, micro)[:, :, rank]
    return rows.reshape(-1, micro).tolist()


class Loader(torch.utils.data.DataLoader):
    """torch's, but its workers block the signals to stop, which `timeout` and srun send to them,
    too: they end with the run.
    """

    def __iter__(self):
        # What is blocked as a process is forked is blocked in it, from its first moment on.
        stops = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # here they arrive now


@atexit.register
def end_workers():
    """Those that an error has left. Python would send them SIGTERM, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for each worker that dies
    for worker in multiprocessing.active_children():
        worker.kill()


@functools.cache
def say_once(line: str):
    print(line, file=sys.stderr, flush=True)


def loader(dataset, batches: list, collate, workers: int, pin_memory: bool = False):
    """Batches, prepared by worker processes that are forked, so they share the rows with this one.

    They hand them over in /dev/shm, each two in advance. Where that is too small (Docker's default
    is 64 MB) a run would hang, so this process prepares them.
    """
    if workers and batches and os.path.isdir("/dev/shm"):
        samples = [dataset[batch[0]] for batch in batches[:: len(batches) // 3 + 1]]
        largest = max(row["pixel_values"].nbytes for row in samples)
        if 2 * workers * len(batches[0]) * largest > shutil.disk_usage("/dev/shm").free:
            workers = 0
            say_once("/dev/shm is too small, so rows have no workers (docker run --shm-size=8g)")
    options = {"collate_fn": collate, "pin_memory": pin_memory}
    if workers:
        options |= {"num_workers": workers, "multiprocessing_context": "fork"}
    options["generator"] = torch.Generator()  # the default would draw from dropout's
    return Loader(dataset, batch_sampler=batches, **options)


def windows(plan, per_epoch, step, accumulation, world, rank, dataset, *options):
    """This rank's micro-batches of each optimizer step from `step` on, epoch after epoch.

    plan(epoch) is `plan_epoch`'s, of per_epoch steps; dataset and options are `loader`'s.
    """
    epoch, start = divmod(step, per_epoch)
    while True:
        micro = micro_batches(plan(epoch), accumulation, world, rank, start)
        batches = iter(loader(dataset, micro, *options))
        yield from zip(*[batches] * accumulation)  # one iterator, that many times: a window
        epoch, start = epoch + 1, 0


def numbers_of(window: list[dict]) -> tuple:
    """Supervised tokens, tokens, the same with padding, rows, rows cut short, rows skipped."""
    return (
        sum((batch["labels"] >= 0).sum().item() for batch in window),
        sum(sum(batch["lengths"]) for batch in window),
        sum(batch["labels"].numel() for batch in window),
        sum(row >= 0 for batch in window for row in batch["rows"]),
        sum(batch["cut"] for batch in window),
        sum(len(batch["faults"]) for batch in window),
    )
