"""Evaluation, what it keeps and draws, and the VQA score."""

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import types

import numpy as np
import pytest
import torch
from conftest import HERE, LORA, OWN, losses_of, metrics_of, parsed, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import data
import model as llava
import train


def test_evaluation_equals_transformers(world):
    """Token-weighted loss and greedy answers, whatever the batch size; and the model trains on after it."""
    reference = LlavaForConditionalGeneration.from_pretrained(
        world / "llava", dtype=torch.float32
    ).eval()
    rows = data.open_dataset(world / "rows.json", world / "images", world / "llava")
    collate, text = data.Collator(reference.config.image_token_id, 4), rows.text
    loss, right, tokens, answers = 0.0, 0, 0, []
    for i in range(12):
        b = collate([rows[i]])
        pixels = {"pixel_values": b["pixel_values"]} if len(b["pixel_values"]) else {}
        out = reference(input_ids=b["input_ids"], labels=b["labels"], **pixels)
        n = (b["labels"] >= 0).sum().item()
        loss, tokens = loss + out.loss.item() * n, tokens + n
        predicted, labels = out.logits[0, :-1].argmax(-1), b["labels"][0, 1:]
        right += (predicted == labels)[labels >= 0].sum().item()
        turns = data.parse_record(rows.records[i])[0]
        for k in range(1, len(turns), 2):
            ids = torch.tensor([text.ids_and_labels(turns[:k], prompt=True)[0]])
            item = {
                "input_ids": ids[0],
                "labels": ids[0],
                "pixel_values": b["pixel_values"],
                "row": 0,
                "cut": 0,
                "fault": None,
            }
            new = reference.generate(
                input_ids=collate([item])["input_ids"],
                **pixels,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=text.stop_ids,
                suppress_tokens=[reference.config.image_token_id],
            )
            answers.append(
                text.tokenizer.decode(
                    new[0][len(collate([item])["input_ids"][0]) :], skip_special_tokens=True
                ).strip()
            )
    model = llava.from_pretrained(world / "llava")
    for size in (1, 5):
        args = train.parse(
            [
                "--model_name_or_path",
                "x",
                "--eval_only",
                "--validation_data_path",
                "x",
                "--eval_samples",
                "-1",
                "--max_new_tokens",
                "6",
                "--per_device_eval_batch_size",
                str(size),
                "--dataloader_num_workers",
                "0",
            ]
        )
        metrics, predictions = train.evaluate(model, rows, train.Alone(), collate, args, "cpu")
        assert metrics["eval_loss"] == pytest.approx(loss / tokens, abs=1e-5)
        assert metrics["eval_token_accuracy"] == pytest.approx(right / tokens)
        assert [p["prediction"] for p in predictions] == answers and len(answers) == 24
        assert (
            metrics["eval_exact_match"]
            == sum(p["prediction"] == p["answer"] for p in predictions) / 24
        )
    train.training_mode(model)
    assert model.language_model.training and not model.vision_tower.training  # trap 28


@pytest.mark.parametrize(
    "answer, same",
    [
        ("A frog.", "frog"),
        ("The  FROG\n", "frog"),
        ("an apple, the pear", "apple pear"),
        ("two", "2"),
        ("None", "0"),
        ("ten of the ten", "10 of 10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("its", "its"),
        ("it's 5:30", "it's 5:30"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t -shirt", "t shirt"),
        ("wi-fi, 4g", "wi fi 4g"),
        ("what?", "what"),
        ("(left)", "left"),
        ("a", ""),
        ("", ""),
    ],
)
def test_vqa_answers_are_normalised_as_the_official_score_does(answer, same):
    assert train.normalise(answer) == same


def test_vqa_accuracy_counts_matches_in_what_leaves_one_answer_out():
    for count, score in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        people = ["The frog!"] * count + [f"toad {i}" for i in range(10 - count)]
        assert train.vqa_accuracy("frog", people) == pytest.approx(score), count
        by_hand = [min(1, (people[:i] + people[i + 1 :]).count("The frog!") / 3) for i in range(10)]
        assert train.vqa_accuracy("A frog", people) == pytest.approx(sum(by_hand) / 10)


def test_kinds_and_answers_that_are_not_what_ours_mean_are_passed_over(world, tmp_path):
    rows = json.loads((world / "captions.json").read_text())[:6]
    for r, answers in zip(rows, (["a"] * 10, ["a"] * 4, ["a"] * 3, [{"answer": "a"}] * 10, "a", 7)):
        r |= {"answers": answers, "kinds": [answers] if answers == "a" else answers}
    rows[0]["conversations"] *= 2
    rows[0]["conversations"][2] = {"from": "human", "value": "And?"}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows = data.open_dataset(tmp_path / "rows.json", world / "images", world / "llava")
    questions = train.Questions(rows, 6)
    found = [questions.expected(j) for j in range(7)]
    assert [a["row"] for a in found] == [0, 0, 1, 2, 3, 4, 5]
    assert [a.get("answers") for a in found] == [None, None, ["a"] * 4, None, None, None, None]
    assert [a.get("kind") for a in found] == [None, None, None, None, None, "a", None]


@pytest.fixture(scope="session")
def overfitting(world, tmp_path_factory):
    """Flags of a run whose validation loss turns up: first it learns how answers look, which helps, then to be sure of
    words that are other ones in the validation rows. These have ten people's answers, as OK-VQA's.
    """
    root = tmp_path_factory.mktemp("overfitting")
    rows = {"train": [], "validation": []}
    for name, shape in (("train", "circle"), ("validation", "square")):
        for i in range(12):
            asked = "<image>\nWhat is it?\nAnswer the question using a single word or phrase."
            people = ["the red circle"] * (i % 6) + ["Red circle!"] * (i % 2) + ["square"] * 10
            rows[name].append(
                {
                    "id": f"{name}{i}",
                    "image": f"{i}.png",
                    "conversations": [
                        {"from": "human", "value": asked},
                        {"from": "gpt", "value": f"A red {shape}."},
                    ],
                    "answers": people[:10],
                }
            )
        (root / f"{name}.json").write_text(json.dumps(rows[name]))
    return dict(
        data_path=root / "train.json",
        validation_data_path=root / "validation.json",
        version="chatml_direct",
        max_steps=60,
        eval_steps=2,
        early_stopping_patience=3,
        learning_rate=5e-3,
        warmup_ratio=0,
        lr_scheduler_type="constant",
        eval_samples=-1,
        max_new_tokens=16,
        save_steps=3,
    )


@pytest.fixture(scope="session")
def overfitted(world, overfitting, tmp_path_factory):
    """(folder, output) of that run."""
    out = tmp_path_factory.mktemp("overfitted") / "a"
    status, output, error = run(world, out, **overfitting)
    assert status == 0, error
    return out, output


def evaluations_of(out):
    return [m for m in metrics_of(out) if "eval_loss" in m]


def test_validation_loss_turns_up_and_the_best_model_is_kept(
    world, tmp_path, overfitting, overfitted
):
    """Trap 28, users' troubles 15, 17, 23."""
    out, output = overfitted
    evaluations = evaluations_of(out)
    losses = [m["eval_loss"] for m in evaluations]
    best = losses.index(min(losses))
    assert 0 < best and len(losses) == best + 1 + 3 and evaluations[-1]["step"] < 60
    assert losses_of(out)[-1] < losses_of(out)[2 * best - 1]  # it overfits
    assert f"best at step {2 * best}: validation loss {min(losses):.4f}" in output
    assert f"{losses[0] - min(losses):.4f} below the first" in output
    assert f"{losses[-1] - min(losses):.4f} below the last" in output
    assert f"chat --model_name_or_path {out}/best" in output
    for folder, m in (("best", evaluations[best]), ("final", evaluations[-1])):
        again = {"model_name_or_path": out / folder, "version": "own", "data_path": None}
        flags = overfitting | again | {"train_type": None, "eval_only": True}
        del flags["early_stopping_patience"]
        assert run(world, tmp_path / folder, **flags)[0] == 0
        (figures,) = metrics_of(tmp_path / folder)
        assert figures == pytest.approx(m | {"step": 0}, abs=1e-6)
    # Every answer ends, long before --max_new_tokens, and scores as people's answers say.
    said = [json.loads(line) for line in (tmp_path / "final/predictions.jsonl").open()]
    assert {a["prediction"] for a in said} == {"A red circle."}
    matches = [i % 6 + i % 2 for i in range(12)]
    by_hand = [min(n, 4) * 0.3 - (n > 3) * 0.2 for n in matches]  # 0, .3, .6, .9, 1
    assert [a["vqa_accuracy"] for a in said] == pytest.approx(by_hand)
    assert figures["eval_vqa_accuracy"] == pytest.approx(sum(by_hand) / 12)
    assert figures["eval_exact_match"] == 0


class Killed(BaseException):
    pass


def test_the_best_model_and_patience_survive_a_kill(
    world, tmp_path, overfitting, overfitted, monkeypatch
):
    """Once by SIGKILL between two evaluations, once while best/ is being replaced."""
    undisturbed, summary = overfitted
    flags = {"model_name_or_path": world / "llava", "image_folder": world / "images"} | overfitting
    flags |= {"output_dir": tmp_path / "b", "train_type": "full", "bf16": False, "seed": 42}
    flags |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 0}
    argv = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *argv],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("wb"),
    )
    log = []
    for line in process.stdout:
        log.append(line)
        if line.startswith(b"5/60"):
            process.kill()
    assert process.wait() == -signal.SIGKILL and train.checkpoints(tmp_path / "b")
    log = b"".join(log).decode()
    assert max(len(line) for line in log.split("\n")) <= 80, log
    assert "\r" not in log and b"\r" not in (tmp_path / "stderr").read_bytes()
    rename, count = train.replace_folder, []

    def die_at_the_third(part, out):
        if out.name == "best":
            count.append(out)
        if len(count) == 3:
            out.rename(out.with_name("best.old"))
            raise Killed
        rename(part, out)

    monkeypatch.setattr(train, "replace_folder", die_at_the_third)
    again = overfitting | {"resume_from_checkpoint": "latest"}
    with pytest.raises(Killed):
        run(world, tmp_path / "b", **again)
    monkeypatch.undo()
    status, output, error = run(world, tmp_path / "b", **again)
    assert status == 0 and "resumed from" in output, error
    assert evaluations_of(undisturbed) == evaluations_of(tmp_path / "b")
    assert summary.splitlines()[-5:] == [
        line.replace(f"{tmp_path}/b", str(undisturbed)) for line in output.splitlines()[-5:]
    ]
    for name in ("best", "final"):
        a, b = (load_file(o / name / "model.safetensors") for o in (undisturbed, tmp_path / "b"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert sorted(p.name for p in undisturbed.iterdir()) == sorted(
        p.name for p in (tmp_path / "b").iterdir()
    )


def test_the_best_of_a_lora_run_is_a_complete_adapter(world, tmp_path, overfitting):
    flags = overfitting | LORA | {"max_steps": 6, "early_stopping_patience": None}
    _, output, _ = run(world, tmp_path / "a", **flags)
    best = tmp_path / "a" / "best"
    again = OWN | {"adapter": best, "eval_only": True, "version": "own", "data_path": None}
    status, _, error = run(
        world, tmp_path / "b", **flags | again | {"train_type": None, "output_dir": tmp_path / "b"}
    )
    assert status == 0, error
    losses = [m["eval_loss"] for m in evaluations_of(tmp_path / "a")]
    assert evaluations_of(tmp_path / "b")[0]["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert f"--adapter {best if losses[-1] > min(losses) else best.parent / 'final'}" in output


def test_without_validation_rows_nothing_is_evaluated(world, tmp_path):
    """Trap 35. And validation rows that cannot be used, or give no finite loss, are one line."""
    assert run(world, tmp_path / "a", eval_steps=1, max_steps=2)[0] == 0
    assert not evaluations_of(tmp_path / "a") and not (tmp_path / "a" / "best").exists()
    rows = json.loads((world / "rows.json").read_text())[:1]
    rows[0]["image"] = "missing.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    status, _, error = run(
        world, tmp_path / "b", validation_data_path=tmp_path / "rows.json", on_bad_record="skip"
    )
    assert status == 2 and error.endswith("rows.json: none of its rows can be used\n")


WORDS = ["Wörter", "数字", "🙂", "a", "frog.", "x" * 99, "\u0007", "don't", "</s>", "(left)"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(WORDS), max_size=30), st.integers(100, 500), st.integers(1, 4))
def test_text_in_pictures_is_wrapped_and_what_the_font_lacks_is_escaped(words, width, most):
    font = train.ImageFont.load_default(26)
    lines = train.wrap("\n".join(words), font, width, most)
    assert len(lines) <= most and all(font.getlength(line) <= width for line in lines)
    shown = train.wrap(" ".join(words), font, width, 10**6)
    whole = "".join(words).encode("unicode_escape").decode()
    assert "".join(shown).replace(" ", "") == whole
    assert whole.isascii() and (len(shown) <= most or lines[-1].endswith("..."))


def greys(picture):
    return np.asarray(picture.convert("L")).astype(int)


def test_the_sheet_tells_right_from_wrong_without_colour_and_nothing_leaves_its_place(world):
    rows = data.open_dataset(world / "rows.json", world / "images", world / "llava")
    long = {"question": "<image>\n" + "why " * 99, "answer": "y" * 400, "prediction": "数" * 200}
    answers = [
        {"row": i, "question": "What?", "answer": "a", "prediction": "a", "right": True}
        for i in range(30)
    ]
    for a in answers:
        a["row"] %= 12
    plain = train.draw_samples(answers[:1], rows, "title")
    wrong = train.draw_samples([answers[0] | {"right": False}], rows, "title")
    score = train.draw_samples([answers[0] | {"right": False, "vqa_accuracy": 0.3}], rows, "title")
    assert plain.tobytes() == score.tobytes() != wrong.tobytes()
    dark = [
        greys(sheet)[420:] < 200 for sheet in (plain, wrong)
    ]  # the two words, less their colour
    assert (dark[0] != dark[1]).sum() > 100
    for some in (answers, [answers[2] | long] * 3, [answers[1]], []):
        pixels = greys(train.draw_samples(some, rows, "title"))
        for k in range(4):  # what is between the columns of cards stays white
            assert (pixels[96:, 528 * k + 2 : 528 * k + 44] == 255).all()
        assert (pixels[-6:] == 255).all()
    assert (
        train.draw_samples(answers, rows, "").size
        == train.draw_samples(answers[:12], rows, "").size
    )


def test_curves_are_drawn_of_any_run():
    def metrics(steps, loss):
        trained = [{"step": s, "loss": loss(s), "token_accuracy": 0.5} for s in range(1, steps + 1)]
        found = {"eval_loss": 2 * loss(steps), "eval_token_accuracy": 1.0, "eval_exact_match": 0.0}
        return [{"step": 0, **found}, *trained, {"step": steps, **found, "eval_vqa_accuracy": 0.3}]

    for rows in (
        metrics(3000, lambda s: 8 / s),
        metrics(1, lambda s: 0.0),
        metrics(10, lambda s: 1e7),
        [{"step": 0, "eval_loss": 1.0, "eval_token_accuracy": 0.0}],
    ):
        pixels = greys(train.draw_curves(rows))
        blank = np.ones(pixels.shape, bool)  # nothing but legends, labels and panels
        blank[10:612, 4:1750] = False
        blank[100:520, 860:890] = True  # between the panels
        assert (pixels[blank] == 255).all() and (pixels[130:530, 102:840] < 200).any()
    longer = train.draw_curves(metrics(3000, lambda s: 8 / s + 0.1 * (s % 2)))
    assert longer.tobytes() != train.draw_curves(metrics(3000, lambda s: 8 / s)).tobytes()


def test_each_evaluation_leaves_pictures_and_the_exact_text(world, tmp_path, monkeypatch):
    drawn, draw = [], train.draw_samples
    monkeypatch.setattr(train, "draw_samples", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    flags = dict(validation_data_path=world / "rows.json", max_steps=2, eval_steps=1)
    status, output, error = run(world, tmp_path / "a", **flags)
    assert status == 0 and len(drawn) == 3, error
    assert Image.open(tmp_path / "a/samples.png").tobytes() == drawn[-1].tobytes()
    curves = train.draw_curves(metrics_of(tmp_path / "a"))
    assert Image.open(tmp_path / "a/curves.png").tobytes() == curves.tobytes()
    said = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").open()]
    rows = json.loads((world / "rows.json").read_text())
    assert {a["step"] for a in said} == {0, 1, 2}
    assert all(a["id"] == rows[a["row"]]["id"] for a in said)
    assert (
        not list((tmp_path / "a").glob("*.part")) and max(map(len, output.split("\n")[:-5])) <= 80
    )


def test_a_log_takes_back_the_lines_behind_a_checkpoint(tmp_path):
    """And the line that a kill cut short; an answer may hold what Python takes for ends of lines."""
    rows = [{"step": s, "prediction": "a\u2028b\x85\n\r\x0c"} for s in (1, 2, 2, 3)]
    train.append(tmp_path / "predictions.jsonl", *rows)
    with open(tmp_path / "predictions.jsonl", "a") as file:
        file.write('{"step": 1, "pred')
    attempt = train.Attempts()
    train.open_log(parsed("full"), "id", 2, attempt, tmp_path)
    lines = train.whole_lines(tmp_path / "predictions.jsonl")
    assert [json.loads(line) for line in lines] == rows[:3] and not attempt.faults


def test_progress_is_one_line_of_80_columns_in_a_terminal_and_whole_lines_in_a_file(
    monkeypatch, capsys
):
    shares = dict.fromkeys(["supervised", "padded", "waiting", "mfu"], 0.12)
    m = dict(step=12346, loss=0.1234, lr=2e-5, tokens_per_s=12345, peak_gib=139.94, **shares)
    monitor, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        bar = train.Progress(50_000, 12_345, 0)
        bar.start_t -= 0.25  # seconds of a step
        bar.show(m, True)
        shown = str(bar)
    os.close(monitor)
    text = "loss 0.123 lr2e-05 12k/s sup12% pad12% wait12% mfu12% 140G"
    assert re.fullmatch(r"12346/50000 \d:\d\d:\d\d " + text, shown.strip()) and len(shown) < 80
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        train.Progress(50_000, 12_345, 0).show(m, True)
        assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().out == f"12346/50000 {text}\n"


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_reports_go_to_tensorboard_or_wandb(world, tmp_path, monkeypatch, kind):
    """To stand-ins for both, which note what they are told; and one line says what to install.

    What such a library raises stops the run in one line, on all ranks: see Attempts.
    """
    flags = dict(validation_data_path=world / "rows.json", max_steps=2, report_to=kind)
    (tmp_path / "wandb_or_such").mkdir()  # a folder, as wandb leaves one, is no package
    with monkeypatch.context() as here:
        here.syspath_prepend(str(tmp_path))
        assert not train.is_installed("wandb_or_such") and train.is_installed("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
        train.parse([w for k, v in flags.items() for w in (f"--{k}", str(v))]
                    + ["--model_name_or_path", "x", "--eval_only"])  # fmt: skip
    assert stop.value.code == 2 and f"pip install {kind}" in error.getvalue()
    installed = types.SimpleNamespace(origin="here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    told, module = [], types.ModuleType(kind)

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "a" / "tensorboard") and purge_step == 0

        def __getattr__(self, name):
            return lambda *args, **options: told.append((name, *args))

    class Run:
        def log(self, figures, step):
            told.extend((name, name, value, step) for name, value in figures.items())

    def no_account(**options):
        raise module.Error("No API key configured.\nUse `wandb login`.")

    module.SummaryWriter, module.Error, module.init = Writer, KeyError, no_account
    module.Table, module.Image = lambda *args: args, lambda picture: (picture.size, picture)
    monkeypatch.setitem(
        sys.modules, "wandb" if kind == "wandb" else "torch.utils.tensorboard", module
    )
    if kind == "wandb":
        status, _, error = run(world, tmp_path / "none", **flags)
        assert status == 2 and error.count("\n") == 1 and "WANDB_MODE=offline" in error
    module.init = lambda **options: Run()
    assert run(world, tmp_path / "a", **flags)[0] == 0
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
