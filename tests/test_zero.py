"""Many processes beside one."""

import contextlib
import datetime
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import (
    KINDS,
    LORA,
    STILL,
    ZERO,
    argv_of,
    be_rank,
    end,
    free_port,
    launch,
    launch_all,
    lines_in,
    losses_of,
    metrics_of,
    printed,
    run,
    server,
    start_all,
    weights_of,
    zero_flags,
)
from tiny import HERE, built, parts
from transformers import AutoModelForCausalLM, Qwen2Config

import checkpoint
import engines
import model as llava
import ranks
import train
from build import build


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    """The folder of a run without DeepSpeed, of 8 rows a step, made once for each kind."""
    root = tmp_path_factory.mktemp("one")

    @functools.cache
    def made(kind, steps, bf16=False, micro=8, stage=2):
        out = root / f"{kind}-{steps}-{bf16}-{micro}-{stage}"
        split = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro)
        with rounding_like_a_rank(stage):
            status, output, error = run(world, out, **zero_flags(world, kind, steps, bf16), **split)
        assert status == 0, error
        (out / "output.txt").write_text(output)
        return out

    return made


@contextlib.contextmanager
def rounding_like_a_rank(stage):
    """In bf16 a sum's order shows. Under ZeRO-3 each module gets tensors of its
    own, so that their gradients meet in another order, and linear layers round before the bias, too.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    def own(module, inputs):
        return tuple(x.view_as(x) if torch.is_tensor(x) else x for x in inputs)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if stage == 3:
            patch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
            hook = torch.nn.modules.module.register_module_forward_pre_hook(own)
            stack.callback(hook.remove)
        yield


# Stage, offload, ranks, train type, accumulation, bf16.
ALL = [
    (stage, offload, ranks, kind, accumulation, bf16)
    for stage in (2, 3)
    for offload in ("none", "optimizer", "all")[:stage]
    for ranks in (2, 1)
    for kind in KINDS
    for accumulation in (4, 1)
    for bf16 in (False, True)
]


def pairwise(cases):
    """Few of the cases, in which any two values stand together that do so in one of all."""
    pairs = lambda case: set(itertools.combinations(enumerate(case), 2))  # noqa: E731
    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


SHORT = [(2, "none", 2, "full", 4, True)]  # the shortest that sees sums of gradients in bf16


@pytest.mark.parametrize(
    "ranks, cases, steps",
    [(ranks, pairwise(ALL) + SHORT, 3) for ranks in (2, 1)]
    + [pytest.param(ranks, ALL, 10, marks=pytest.mark.long) for ranks in (2, 1)],
)
def test_many_processes_equal_one(world, one_process, tmp_path, ranks, cases, steps):
    """ZeRO-2, ZeRO-3 and offloads, rows of every kind, ranks without a picture, clipping at work."""
    runs = {}
    for case in sorted(cases):  # stage 3 last: it leaves linear layers that round as its own do
        stage, offload, case_ranks, kind, accumulation, bf16 = case
        if case_ranks == ranks:
            runs[tmp_path / "-".join(map(str, case))] = case, {
                **zero_flags(world, kind, steps, bf16), **ZERO[stage], "offload": offload,
                "per_device_train_batch_size": 8 // ranks // accumulation,
                "gradient_accumulation_steps": accumulation,
            }  # fmt: skip
    launch_all(world, ranks, {out: flags for out, (_, flags) in runs.items()}, seconds=3000)
    for many, (case, flags) in runs.items():
        stage, _, _, kind, _, bf16 = case
        # In fp32 however the rows are split; bf16 rounds a batch as it is.
        more = (flags["per_device_train_batch_size"], stage) if bf16 else ()
        assert_equal(one_process(kind, steps, bf16, *more), many, ranks, 1e-3 if bf16 else 1e-5)


def assert_equal(one, many, ranks, tolerance):
    """Losses, weights, evaluation, answers of many processes are those of plain torch in one."""
    assert losses_of(one) == pytest.approx(losses_of(many), abs=tolerance), many.name
    assert max(m["grad_norm"] for m in metrics_of(many) if "loss" in m) > 1  # clipped
    a, b = weights_of(one), weights_of(many)
    assert a.keys() == b.keys()
    # Keys' biases are left out: softmax ignores them, so AdamW scales up what rounding leaves of zero.
    off = {k: (a[k].float() - b[k].float()).abs().max().item() for k in a if "k_proj.bias" not in k}
    assert max(off.values()) < tolerance, (many.name, max(off, key=off.get))
    ours, theirs = (
        [m["eval_loss"] for m in metrics_of(x) if "eval_loss" in m] for x in (one, many)
    )
    assert ours == pytest.approx(theirs, abs=tolerance), many.name
    said = [(x / "predictions.jsonl").read_text().splitlines() for x in (one, many)]
    assert sorted(said[0]) == sorted(said[1])
    module = r"^(?:vision_tower|multi_modal|language_model).*$"
    texts = (one / "output.txt").read_text(), printed(many, ranks)
    ours, theirs = (re.findall(module, text, re.M) for text in texts)
    assert ours == theirs and len(ours) == 3  # the table of parameters


def test_zero_3_casts_what_the_file_holds(world, tmp_path):
    """Its weights stay mapped, in the file's dtype, until they are partitioned."""
    folder = built(tmp_path, dtype=torch.bfloat16)
    flags = LORA | STILL | {"model_name_or_path": folder, "max_steps": 3, "eval_samples": 0}
    assert run(world, tmp_path / "a", **flags)[0] == 0
    statuses, output = launch(world, tmp_path / "b", **flags, **ZERO[3])
    assert statuses == [0], output
    assert losses_of(tmp_path / "a") == pytest.approx(losses_of(tmp_path / "b"), abs=1e-5)


def be_measured(rank, ranks, port, argv, at_start, loaded, report):
    """Reports MiB of masters and moments, and of weights, that a process holds. It waits `at_start` before
    it loads the model, and says when all have `loaded` it.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = train.parse(argv)
    config = engines.deepspeed_config(args)
    ranks.join(bool(args.deepspeed))
    stage = config["zero_optimization"]["stage"]
    config["zero_optimization"]["reduce_bucket_size"] = (
        10**6
    )  # 4 bytes each, twice: not in question
    for _ in ("measured before", "go"):
        at_start.wait(100)
    model = train.load_model(args, Path(args.model_name_or_path), "cpu", stage)
    engine = train.open_engine(model, args, config)
    torch.distributed.barrier()
    loaded.set()
    size = model.config.vision_config.image_size
    ids = torch.ones(1, 8, dtype=torch.long)
    loss, _ = engine.forward(ids, torch.zeros(0, 3, size, size), ids)
    engine.backward(loss, True)
    engine.step(1.0)
    adam = engine.optimizer.optimizer  # DeepSpeed's around torch's
    held = [p for group in adam.param_groups for p in group["params"]]
    held += [x for state in adam.state.values() for x in state.values() if x.ndim]
    weights = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    report.put(
        [sum(x.numel() * x.element_size() for x in tensors) / 2**20 for tensors in (held, weights)]
    )
    torch.distributed.barrier()


def proportional(processes):
    """MiB that processes hold together, of their own and mapped from files: PSS, in which a page that n
    processes share counts 1/n for each. They stand still meanwhile, so that it is of one moment.
    """
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    texts = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in processes]
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    return [
        sum(int(re.search(rf"{key}: +(\d+)", text)[1]) for text in texts) / 2**10
        for key in ("Pss_Anon", "Pss_File")
    ]


def measured(folder, stage, ranks, train_type):
    """MiB: what each process holds, [(masters and moments, weights)], and by how much that of all
    together grew at most while the model was loaded, [of their own, mapped from the file].
    """
    argv = argv_of(folder.parent, folder.parent / "out", **ZERO[stage], train_type=train_type)
    at_start, loaded = server().Barrier(ranks + 1), server().Event()
    report, port = server().Queue(), free_port()
    processes = [
        server().Process(target=be_measured, args=(r, ranks, port, argv, at_start, loaded, report))
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    at_start.wait(100)
    before = peak = proportional(processes)
    at_start.wait(100)
    while not loaded.wait(0.02):
        assert all(process.is_alive() for process in processes)
        peak = list(map(max, peak, proportional(processes)))
    held = [report.get(timeout=200) for _ in processes]
    assert end(processes) == [0] * ranks
    return held, [high - low for high, low in zip(peak, before)]


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    """A LLaVA of 1 GB in fp32: random weights, the language model almost all of it."""
    root = tmp_path_factory.mktemp("gigabyte")
    vision, text = parts(root)
    config = Qwen2Config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=320, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(text)
    build(vision, text, root / "llava")
    return root / "llava"


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_of_a_process_falls_with_their_number(gigabyte, ranks):
    """ZeRO-2 partitions masters and moments, ZeRO-3 the weights too; while a model is loaded for it no
    process has a copy of its own, but maps the file, whose pages all share: two processes cost no more
    than one (measured: 1, 2, 4 have 1577, 1296, 1604 MiB of their own and map 1006, for a model of 986).
    """
    size = (gigabyte / "model.safetensors").stat().st_size / 2**20
    assert 900 < size < 1100
    adam, weights = zip(*measured(gigabyte, 2, ranks, "freeze_vision")[0])
    print(f"\nZeRO-2, {ranks}: optimizer {max(adam):.0f} MiB, weights {max(weights):.0f} MiB")
    assert max(adam) == pytest.approx(3 * size / ranks, rel=0.01)
    held, (own, mapped) = measured(gigabyte, 3, ranks, "projector")
    weights = max(weights for _, weights in held)
    print(f"ZeRO-3, {ranks}: weights {weights:.0f} MiB; while loading all have {own:.0f} MiB of their own, "
          f"{mapped:.0f} MiB of the file")  # fmt: skip
    assert weights == pytest.approx(size / ranks, rel=0.05)
    # Together: the model once as it is partitioned, once as it is mapped; some buffers of each process.
    assert own < size + 650 * ranks and mapped < size + 50


@pytest.mark.long
def test_the_launcher_starts_what_equals_one_process(world, one_process, tmp_path):
    flags = zero_flags(world, "full", 3, False) | ZERO[2] | {"per_device_train_batch_size": 4}
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port"]
    command = [*launcher, free_port(), HERE / "train.py", *argv_of(world, tmp_path / "a", **flags)]
    threads = {"OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], check=True, env={**os.environ, **threads}, timeout=200)
    one = losses_of(one_process("full", 3))
    assert losses_of(tmp_path / "a") == pytest.approx(one, abs=1e-5)


def test_a_users_error_under_the_launcher_is_one_line(world, tmp_path):
    """Which stands alone among all that the launcher prints; its status is the launcher's."""
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port"]
    flags = ZERO[2] | {"data_path": tmp_path / "missing.json"}
    command = [*launcher, free_port(), HERE / "train.py", *argv_of(world, tmp_path / "a", **flags)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "missing.json" in line]
    (ours,) = [line for line in lines if line.startswith("train.py: ")]
    assert "no such file" in ours.lower() and "Traceback" not in done.stderr
    assert done.returncode == 2


ASLEEP = """
import os, runpy, sys, threading, model

def fail_or_sleep(self, *inputs):
    if os.environ["RANK"] == "1":
        open("failed", "w").close()
        raise ValueError("row 7 is bad")
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # sleeps in C for ever, whatever a signal's handler does

model.Llava.forward = fail_or_sleep
sys.argv[0] = model.__file__.replace("model.py", "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_rank_that_fails_ends_ranks_asleep_in_c(world, tmp_path):
    """As NCCL makes them; the launcher's SIGTERM would be but a wish to stop."""
    (tmp_path / "asleep.py").write_text(ASLEEP)
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port"]
    command = [*launcher, free_port(), "asleep.py", *argv_of(world, tmp_path / "a", **ZERO[2])]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    took = time.time() - (tmp_path / "failed").stat().st_mtime
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "row 7" in line]
    assert lines == ["train.py: rank 1: row 7 is bad"] and done.returncode == 2 and took < 45


def be_rank_that_fails(rank, *args):
    """Rank 1, in its second forward pass."""
    forward, calls = llava.Llava.forward, []

    def failing(self, *inputs):
        calls.append(rank)
        if calls == [1, 1]:
            raise RuntimeError("something unforeseen")
        return forward(self, *inputs)

    llava.Llava.forward = failing
    be_rank(rank, *args)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("exception", "RuntimeError: something unforeseen"),
        ("row", "row 4 (id r4): "),
        ("disk", "checkpoint-1.part/state-"),
    ],
)
def test_a_rank_that_fails_ends_the_launch(world, tmp_path, kind, says):
    """With its one line, within 15 seconds."""
    rows = json.loads((world / "rows.json").read_text())
    rows[4]["image"] = "missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    flags = ZERO[2] | {"per_device_train_batch_size": 2, "save_steps": 1}
    flags |= {"data_path": (tmp_path / "bad.json" if kind == "row" else world / "rows.json")}
    target = be_rank_that_fails if kind == "exception" else be_rank
    limits = {1: 20_000} if kind == "disk" else {}
    statuses, output = launch(world, tmp_path / "a", 2, limits, target, **flags)
    spoke = max((tmp_path / f"a-{rank}.txt").stat().st_mtime for rank in range(2))
    assert time.time() - spoke + ranks.HEAD_START_SECONDS + 1 < 15
    (line,) = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert says in line and sorted(statuses) == [-signal.SIGKILL, 2], output
    assert ("Traceback" in output) == (kind == "exception")


def be_rank_in_a_folder_of_its_own(rank, ranks, jobs, root):
    (root / f"node {rank}").mkdir()
    os.chdir(root / f"node {rank}")
    be_rank(rank, ranks, jobs)


def test_a_disk_that_is_not_shared_is_named(world, tmp_path):
    flags = ZERO[2] | {"per_device_train_batch_size": 2, "save_steps": 1}
    jobs = [(free_port(), argv_of(world, "out", **flags), tmp_path / "a")]
    roots = {0: tmp_path, 1: tmp_path}
    statuses = end(start_all(2, jobs, roots, be_rank_in_a_folder_of_its_own))
    (line,) = [x for x in printed(tmp_path / "a", 2).splitlines() if x.startswith("train.py: ")]
    assert statuses == [2, -signal.SIGKILL] and "on a disk that all nodes share" in line


def be_rank_with_a_slow_save(rank, ranks, jobs, timeout_seconds):
    import deepspeed

    publish, start = checkpoint.publish, deepspeed.init_distributed

    def slow(*args):
        time.sleep(8)
        publish(*args)

    def impatient(timeout):
        assert timeout.total_seconds() == 3600
        start(timeout=datetime.timedelta(seconds=timeout_seconds) if timeout_seconds else timeout)

    checkpoint.publish, deepspeed.init_distributed = slow, impatient
    be_rank(rank, ranks, jobs)


def test_ranks_wait_for_a_slow_save(world, tmp_path):
    """With a timeout of 4 seconds they do not; it is an hour, where DeepSpeed's is 10 minutes."""
    flags = ZERO[2] | {"per_device_train_batch_size": 2, "save_steps": 2, "max_steps": 3}
    for limits, expected in (({0: 4, 1: 4}, False), ({}, True)):
        out = tmp_path / f"{expected}"
        statuses, output = launch(world, out, 2, limits, be_rank_with_a_slow_save, **flags)
        assert (statuses == [0, 0]) == expected, output
        assert (out / "final").exists() == expected


def be_rank_on_a_node_without_the_data(rank, *args):
    if rank == 1:
        os.chdir("/")
    be_rank(rank, *args)


def test_what_is_wrong_for_all_is_said_once(world, tmp_path, monkeypatch):
    """And none waits for another. A path is wrong for one rank only if nodes differ."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    wrong = [
        ({"model_name_or_path": tmp_path / "no model"}, "no model"),
        ({"validation_data_path": tmp_path / "no rows.json"}, "no rows.json"),
        ({"output_dir": tmp_path / "full"}, "not empty"),
        ({"deepspeed": tmp_path / "ds.json"}, "needs a stage, 2 or 3"),
    ]
    for flags, says in wrong:
        statuses, output = launch(world, tmp_path / "a", 2, **ZERO[2] | flags)
        lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert 2 in statuses and len(lines) == 1 and says in lines[0], output
        assert "Traceback" not in output
    monkeypatch.chdir(world)
    flags = ZERO[2] | {"data_path": "rows.json"}
    statuses, output = launch(
        world, tmp_path / "a", 2, target=be_rank_on_a_node_without_the_data, **flags
    )
    assert statuses == [-signal.SIGKILL, 2] and output.count("train.py: ") == 1, output
    assert "train.py: rank 1: " in output and "rows.json" in output
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_fewer_rows_than_processes_stop_nobody(world, tmp_path, stage):
    """The one row that there is falls to one of two ranks, to the other falls none."""
    rows = json.loads((world / "rows.json").read_text())[:1]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    flags = ZERO[stage] | {"per_device_train_batch_size": 1, "max_steps": 2, "version": "own"}
    flags |= {"train_type": "projector", "data_path": tmp_path / "one.json"}
    flags |= {"validation_data_path": tmp_path / "one.json"}
    statuses, output = launch(world, tmp_path / "a", 2, **flags)
    assert statuses == [0, 0], output
    assert [m["samples_per_s"] > 0 for m in metrics_of(tmp_path / "a") if "loss" in m] == [True] * 2
    assert lines_in(tmp_path / "a" / "predictions.jsonl") == 3  # one question, asked three times


def test_ranks_wait_for_the_longest_answer(world, tmp_path):
    """Under ZeRO-3, after learning the rows by heart: answers of 1 to 7 words, one a batch."""
    flags = {"learning_rate": 1e-2, "max_steps": 60, "per_device_train_batch_size": 12}
    assert run(world, tmp_path / "a", **flags)[0] == 0
    flags |= {"model_name_or_path": tmp_path / "a" / "final", "max_steps": 1, "learning_rate": 0}
    flags |= {"validation_data_path": world / "rows.json", "max_new_tokens": 12, "eval_samples": 3}
    flags |= {"per_device_eval_batch_size": 1, "train_type": "projector", "version": "own"}
    assert run(world, tmp_path / "b", **flags)[0] == 0
    flags |= ZERO[3] | {"per_device_train_batch_size": 6}
    statuses, output = launch(world, tmp_path / "c", 2, **flags)
    assert statuses == [0, 0], output
    one, two = ((tmp_path / x / "predictions.jsonl").read_text().splitlines() for x in "bc")
    assert sorted(one) == sorted(two)
    assert len({len(json.loads(line)["prediction"]) for line in one}) > 1
