"""GPUs and machines as they are: what train.py does there, the DeepSpeed files, cluster.md."""

import builtins
import json
import os
import re
import shlex

import pytest
import torch
from processes import launch, losses_of, run
from tiny import HERE

import bench
import cli
import report
import train

# --- GPUs, and machines without what Linux has ---


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without a GPU, and a folder for programs that say otherwise."""
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1"}.get(name, "0"))
    return tmp_path


def test_a_gpu_that_torch_does_not_see_stops_the_run(bare, world, monkeypatch):
    cli.find_device()  # where there is none, all is well
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    with pytest.raises(ValueError, match="SLURM gave this job 4"):
        cli.find_device()
    smi = bare / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 535.104.05'")
    smi.chmod(0o755)
    status, _, error = run(world, bare / "a")
    assert status == 2 and error.count("\n") == 1 and not (bare / "a").exists()
    assert "NVIDIA A100-SXM4-80GB, driver 535.104.05" in error and "download.pytorch.org" in error
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on purpose
    cli.find_device()


def test_one_process_on_many_gpus_is_told_of_the_others(bare, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert cli.find_device() == "cuda"
    report.show_batches(1, 1, 1, 8, 8, 8)
    assert "GPUs: 1 of 8" in capsys.readouterr().out
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_training_needs_no_deepspeed_bitsandbytes_nor_affinity(world, tmp_path, monkeypatch):
    real = builtins.__import__

    def hiding(name, *rest):
        if name.split(".")[0] in ("deepspeed", "bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {name}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", hiding)
    monkeypatch.setattr(report, "is_installed", lambda package: False)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert run(world, tmp_path / "a", max_steps=1, dataloader_num_workers=None)[0] == 0
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "b", deepspeed=HERE / "ds_zero2.json")
    assert stop.value.code == 2


# --- the DeepSpeed files and cluster.md ---

CLUSTER = (HERE / "cluster.md").read_text()


def test_cluster_md_explains_each_key_and_no_other():
    """DeepSpeed's own class refuses a key that is spelt wrong."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) ?\| (.*?) ?\| \w", CLUSTER, re.M)
    for column, name in ((1, "ds_zero2.json"), (2, "ds_zero3.json")):
        config = json.loads((HERE / name).read_text())
        flat = config.pop("zero_optimization")
        assert DeepSpeedZeroConfig(**flat).stage == int(name[7])
        for key, value in config.items():
            inner = isinstance(value, dict)
            flat |= {f"{key}.{k}": v for k, v in value.items()} if inner else {key: value}
        assert {row[0]: json.loads(row[column]) for row in rows if row[column]} == flat


def test_keys_left_out_are_what_cluster_md_says():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    default = DeepSpeedZeroConfig(stage=3)
    assert default.contiguous_gradients and torch.optim.AdamW in ZERO_SUPPORTED_OPTIMIZERS
    assert (default.prefetch_bucket_size, default.param_persistence_threshold) == (5e7, 1e5)


@pytest.mark.parametrize(
    "name, width, layers, mlp, words",
    [
        ("Qwen1.5-4B", 2560, 40, 6912, 151936),
        ("Vicuna-7B", 4096, 32, 11008, 32000),
        ("Vicuna-13B", 5120, 40, 13824, 32000),
    ],
)
def test_memory_by_model_is_the_arithmetic_it_claims(name, width, layers, mlp, words):
    matrices = layers * (4 * width**2 + 3 * width * mlp)
    decoder = matrices + 2 * words * width + (2 * layers + 1) * width
    projector = 1024 * width + width**2 + 2 * width
    adapters = layers * 128 * (8 * width + 3 * (width + mlp))
    weights = decoder + projector + 303.5e6  # CLIP's tower
    sizes = [
        2 * weights + 16 * projector,
        2 * (weights + adapters) + 16 * (adapters + projector),
        2 * (weights + adapters) - 1.484 * matrices + 16 * (adapters + projector),
    ]
    trained = 16 * (decoder + projector)
    sizes += [2 * weights + trained / ranks for ranks in (1, 4, 8)]
    sizes += [(2 * weights + trained) / ranks for ranks in (4, 8)]
    (row,) = re.findall(rf"^\| {name} \| ([\d,]+)M \| (.*) \|$", CLUSTER, re.M)
    assert int(row[0].replace(",", "")) == round(decoder / 1e6)
    assert [float(cell) for cell in row[1].split(" | ")] == pytest.approx(
        [size / 2**30 for size in sizes], abs=0.06
    )


def test_traffic_on_a_network_is_the_arithmetic_it_claims():
    """Of 8 GPUs each sends 7/8 of what is gathered or scattered, twice that of what all get."""
    trained, weights, adapters = 6.76e9, 7.06e9, 341e6
    gathered = 2 * 2 * weights * 7 / 8  # bf16, for the forward and the backward pass
    expected = [
        trained * 4 * 2 * 7 / 8,
        trained * 2 * 2 * 7 / 8,
        trained * 4,  # a reduction to one process passes each on once
        trained * 2,
        gathered + trained * 4 * 7 / 8,
        gathered + trained * 2 * 7 / 8,
        adapters * 4 * 2 * 7 / 8,
        gathered + adapters * 4 * 7 / 8,
    ]
    table = CLUSTER.partition("| | GB | NVLink")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    assert len(rows) == len(expected)
    for row, sent in zip(rows, expected):
        for cell, divisor in zip(row, (1, 230, 20, 11)):
            digits = len(cell.partition(".")[2])
            assert float(cell) == pytest.approx(sent / 1e9 / divisor, abs=0.6 * 10**-digits)


def test_the_key_that_rounds_nothing_trains_the_same(world, tmp_path):
    config = json.loads((HERE / "ds_zero2.json").read_text())
    assert '"use_multi_rank_bucket_allreduce": false' in CLUSTER
    config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
    (tmp_path / "reduce.json").write_text(json.dumps(config))
    flags = {"max_steps": 3, "learning_rate": 1e-3}
    assert run(world, tmp_path / "one", **flags)[0] == 0
    split = {"deepspeed": tmp_path / "reduce.json", "per_device_train_batch_size": 2}
    statuses, output = launch(world, tmp_path / "many", 2, **flags, **split)
    assert statuses == [0, 0], output
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "many"), abs=1e-5)


def test_the_commands_for_a_first_gpu_have_known_flags():
    text = CLUSTER.partition("## The first GPU")[2].replace("\\\n", " ")
    assert re.findall(r"^(\d+)\. ", text, re.M) == [str(n) for n in range(1, 11)]
    commands = [shlex.split(line) for line in re.findall(r"^ {7,8}(\S.*)$", text, re.M)]
    assert len(commands) >= 10
    for words in commands:
        if "bench.py" in words:
            bench.parse(words[words.index("bench.py") + 1 :])
        if "train.py" in words:
            train.parse(words[words.index("train.py") + 1 :])
