"""What people see of a run: tables, the progress line, logs, trackers, last words."""

import fcntl
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LORA, evaluated, metrics_of, parsed, run
from tiny import HERE, open_dataset

import draw
import model as llava
import report
import toy
import train

# --- before step 1 ---


def test_memory_is_what_torch_holds_between_steps(world):
    """Weights in bf16, fp32 masters, their gradients and AdamW's moments, by their tensors' sizes."""
    model = llava.from_pretrained(world / "llava", torch.bfloat16)
    model.vision_tower.requires_grad_(False)
    args = parsed("freeze_vision", "--bf16", "True")
    engine = train.open_engine(model, args, None)
    batch = torch.tensor([[5, 6, 7]]), torch.zeros(0, 3, 28, 28), torch.tensor([[5, 6, 7]])
    engine.backward(engine.forward(*batch)[0], True)

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    masters = engine.trained.values()
    found = {"weights": size(model.parameters()), "masters": size(masters)}
    found["gradients"] = size(p.grad for p in masters)
    states = engine.optimizer.state.values()
    found["moments"] = size(state[key] for state in states for key in ("exp_avg", "exp_avg_sq"))
    assert report.memory(model, 1, 0, True) == found
    quarter = report.memory(model, 4, 2, True)
    assert quarter == {k: v / (1 if k == "weights" else 4) for k, v in found.items()}
    assert report.memory(model, 4, 3, True)["weights"] == found["weights"] / 4


def test_what_exceeds_the_gpu_is_said_before_step_1(monkeypatch, capsys):
    card = types.SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    held = {"weights": 6 * 2**30, "gradients": 2**30, "masters": 2**30, "moments": 2**30}
    for offload, fits in (("none", False), ("optimizer", True)):
        report.show_memory(held, offload)
        printed = capsys.readouterr().out
        assert ("does not fit: 9.0 GiB, and the GPU has 8.0" in printed) != fits
        assert ("--offload" in printed and "ds_zero3.json" in printed) != fits
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    report.show_batches(4, 2, 1, 100, 13, 13)
    assert "GPUs: 1 of 8; `deepspeed" in capsys.readouterr().out


def test_a_dry_run_measures_and_writes_nothing(world, tmp_path, capsys):
    """The heaviest step, whose first time does not count, and the next few."""
    flags = dict(dry_run=True, max_steps=100, validation_data_path=world / "rows.json")
    status, printed, _ = run(world, tmp_path / "run", **flags)
    assert status == 0 and not (tmp_path / "run").exists()
    expected = r"dry run: peak [\d.]+ GiB; 100 steps take \d:\d\d:\d\d, without evaluations"
    assert re.fullmatch(expected, printed.splitlines()[-1])
    plan, lengths = np.array([[2, 3], [0, 1], [0, -1]]), np.array([10, 20, 30, 50])
    report.dry_run([99, 3, 1], plan, lengths, 48, "cpu")  # a tenth of a second a token, 40 a step
    assert "48 steps take 0:03:12" in capsys.readouterr().out


@pytest.mark.long
def test_a_dry_run_is_right_within_15_percent(tmp_path):
    """Peak and total time against those of the run itself, each in its own process."""
    toy.make_model(tmp_path / "model", toy.toy_words(200))
    toy.make_data(tmp_path / "toy", 240, 0)
    argv = [
        sys.executable,
        HERE / "train.py",
        "--model_name_or_path",
        tmp_path / "model",
        "--train_type",
        "full",
    ]
    argv += ["--data_path", tmp_path / "toy/train.json", "--image_folder", tmp_path / "toy/images"]
    argv += ["--output_dir", tmp_path / "run", "--per_device_train_batch_size", "8"]
    said = subprocess.run([*argv, "--dry_run"], capture_output=True, text=True, check=True).stdout
    peak, takes = re.search(r"peak ([\d.]+) GiB.* take ([\d:]+),", said).groups()
    seconds = sum(int(part) * 60**i for i, part in enumerate(reversed(takes.split(":"))))
    subprocess.run(argv, check=True, capture_output=True)
    lines = metrics_of(tmp_path / "run")
    assert float(peak) == pytest.approx(lines[-1]["peak_gib"], rel=0.15)
    assert seconds == pytest.approx(sum(8 / line["samples_per_s"] for line in lines), rel=0.15)


# --- each step ---


def test_progress_is_80_columns_or_whole_lines_in_a_file(monkeypatch, capsys):
    shares = dict.fromkeys(["supervised", "padded", "waiting"], 0.12)
    m = dict(step=12346, loss=0.1234, lr=2e-5, tokens_per_s=12345, peak_gib=139.94, **shares)
    monitor, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        bar = report.Progress(50_000, 12_345, 0)
        bar.start_t -= 0.25  # seconds of a step
        bar.show(m, True)
        shown = str(bar)
    os.close(monitor)
    text = "loss 0.123 lr2e-05 12k/s sup12% pad12% wait12% 140G"
    assert re.fullmatch(r"12346/50000 \d:\d\d:\d\d " + text, shown.strip()) and len(shown) < 80
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        report.Progress(50_000, 12_345, 0).show(m, True)
        assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().out == f"12346/50000 {text}\n"


def test_a_log_takes_back_the_lines_behind_a_checkpoint(tmp_path):
    """And one that a kill cut short. An answer may hold what Python takes for ends of lines."""
    rows = [{"step": s, "prediction": "a\u2028b\x85\n\r\x0c\ud800"} for s in (1, 2, 2, 3)]
    report.append(tmp_path / "predictions.jsonl", *rows)
    with open(tmp_path / "predictions.jsonl", "a") as file:
        file.write('{"step": 1, "pred')
    report.Log(tmp_path, "id", 2, {"report_to": "none"})
    assert report.read_lines(tmp_path / "predictions.jsonl") == rows[:3]
    assert report.read_lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_reports_go_to_tensorboard_or_wandb(world, tmp_path, monkeypatch, kind):
    """To stand-ins, which note what they are told. What such a library raises is one line."""
    flags = dict(validation_data_path=world / "rows.json", max_steps=2, report_to=kind)
    monkeypatch.setattr(report, "is_installed", lambda name: True)
    told, module = [], types.ModuleType(kind)

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "a" / "tensorboard") and purge_step == 0

        def __getattr__(self, name):
            return lambda *args, **options: told.append((name, *args))

    class Run:
        def log(self, figures, step):
            told.extend((name, name, value, step) for name, value in figures.items())

        def finish(self):
            told.append(("close",))

    def no_account(**options):
        raise module.Error("No API key configured.\nUse `wandb login`.")

    module.SummaryWriter, module.Error, module.init = Writer, KeyError, no_account
    module.Table, module.Image = lambda *args: args, lambda picture: (picture.size, picture)
    place = "wandb" if kind == "wandb" else "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, place, module)
    if kind == "wandb":
        status, _, error = run(world, tmp_path / "none", **flags)
        assert status == 2 and error.count("\n") == 1 and "WANDB_MODE=offline" in error
    module.init = lambda **options: Run()
    assert run(world, tmp_path / "a", **flags)[0] == 0 and told[-1] == ("close",)
    scalars = {(name, step): value for _, name, value, step in (t for t in told if len(t) == 4)}
    for m in metrics_of(tmp_path / "a"):
        assert all(scalars[name, m["step"]] == value for name, value in m.items() if name != "step")
    assert {("answers", 0), ("samples", 0), ("samples", 2)} <= scalars.keys()

    def fails(*args, **options):
        raise KeyError("the service is gone")

    Run.log = Writer.flush = fails
    for n, only_training in enumerate((dict(validation_data_path=None), {})):
        Writer.__init__ = lambda *args, **options: None
        status, _, error = run(world, tmp_path / f"gone{n}", **flags | only_training)
        assert status == 2 and error.count("\n") == 1 and "the service is gone" in error


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb_or_such").mkdir()  # a folder, as wandb leaves one, is no package
    with monkeypatch.context() as here:
        here.syspath_prepend(str(tmp_path))
        assert not report.is_installed("wandb_or_such") and report.is_installed("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        parsed("full", "--report_to", "wandb")
    assert stop.value.code == 2 and "pip install wandb" in capsys.readouterr().err


# --- evaluations ---


def test_each_evaluation_leaves_pictures_which_can_be_drawn_again(world, tmp_path, capsys):
    flags = dict(validation_data_path=world / "rows.json", max_steps=2, eval_steps=1)
    status, output, error = run(world, tmp_path / "a", **flags)
    assert status == 0 and not list((tmp_path / "a").glob("*.part")), error
    said = report.read_lines(tmp_path / "a/predictions.jsonl")
    rows = json.loads((world / "rows.json").read_text())
    assert {a["step"] for a in said} == {0, 1, 2}
    assert all(a["id"] == rows[a["row"]]["id"] for a in said)
    assert max(map(len, output.split("done after")[0].split("\n"))) <= 80
    dataset = open_dataset(world / "rows.json", world / "images", world / "llava")
    newest = [a for a in said if a["step"] == 2]
    title = f"step 2: validation loss {metrics_of(tmp_path / 'a')[-1]['eval_loss']:.4f}, "
    samples = draw.samples(newest, dataset.records, dataset.pictures, title)
    drawn = {"samples.png": samples, "curves.png": draw.curves(metrics_of(tmp_path / "a"))}
    for again in (False, True):
        for name, picture in drawn.items():
            assert Image.open(tmp_path / "a" / name).tobytes() == picture.tobytes()
            (tmp_path / "a" / name).unlink()
        assert report.main([str(tmp_path / "a")]) == 0
    assert evaluated(world, tmp_path / "b")[0] == report.main([str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "samples.png").exists()
    assert report.main([str(world)]) == 2 and "no run to draw" in capsys.readouterr().err


# --- the end ---


def test_last_words_can_be_pasted_and_name_what_is_there(world, tmp_path, monkeypatch):
    """From another folder, with a space in a path, without the environment on PATH."""
    flags = LORA | {"bits": 4, "max_steps": 2, "validation_data_path": world / "rows.json"}
    out = tmp_path / "a run"
    monkeypatch.setenv("PATH", "/nowhere")
    status, output, error = run(world, out, **flags)
    assert status == 0, error
    losses = {m["step"]: m["eval_loss"] for m in metrics_of(out) if "eval_loss" in m}
    best = out / ("final" if min(losses, key=losses.get) == 2 else "best")
    lines = output.replace("\\\n", "").split("\n")
    chat, merge = (shlex.split(line) for line in lines if ".py" in line)
    base = ["--model_name_or_path", str(world / "llava"), "--adapter", str(best)]
    assert chat[2:] == [*base, "--bits", "4"] and "--dequantize" in output
    assert merge[2:] == [*base, "--out", str(out / "merged")]
    assert all(os.path.abspath(call[0]) == sys.executable for call in (chat, merge))
    assert [Path(call[1]).resolve() for call in (chat, merge)] == [
        HERE / "chat.py",
        HERE / "merge.py",
    ]


def test_a_best_that_was_removed_is_not_announced(tmp_path, capsys):
    flags = {"output_dir": str(tmp_path), "train_type": "full", "bits": 16}
    flags["model_name_or_path"] = "x"
    (tmp_path / "best").mkdir()
    for there in (True, False):
        report.last_words(flags, 4, 4, [[0, 3.0], [2, 1.0], [4, 2.0]])
        printed = capsys.readouterr().out
        assert "best at step 2: validation loss 1.0000, 2.0000 below the first" in printed
        assert (f"{tmp_path}/best" in printed) == there != (f"path {tmp_path}/final" in printed)
        shutil.rmtree(tmp_path / "best", ignore_errors=True)
    report.last_words(flags, 4, 4, [[0, 3.0], [4, 2.0]])
    assert "below the last" not in capsys.readouterr().out  # which is the best
