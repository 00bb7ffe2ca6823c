"""The commands around training: toy data, OK-VQA, check, merge."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import ASKED, HERE, okvqa_argv, open_dataset, refused, row, theirs, write, write_vqa

import data
import okvqa
import report
from data import IMAGE
from toy import COLOURS, ToyWorld, print_summary, shapes_of
from toy import main as make_toy


def test_toy_data_is_a_function_of_its_seed(toy, tmp_path, monkeypatch):
    for name, seed in (("again", "0"), ("other", "1")):
        argv = ["data", "--out", str(tmp_path / name), "--scenes", "200", "--seed", seed]
        assert make_toy(argv) == 0
        monkeypatch.setattr(Image.Image, "save", lambda *args, **options: None)  # the texts will do

    def files(folder):
        found = [file for file in folder.rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): file.read_bytes() for file in found}

    assert files(tmp_path / "again") == files(toy)
    assert all(content != files(toy)[name] for name, content in files(tmp_path / "other").items())


def test_toy_data_keeps_its_rules(toy):
    sets = {path.stem: json.loads(path.read_text()) for path in toy.glob("*.json")}
    del sets["baseline"]
    for rows in sets.values():
        assert len({r["id"] for r in rows}) == len(rows)
        for r in rows:
            names = data.parse_record(r)[1]
            assert all((toy / "images" / name).is_file() for name in names)
    train, held_out = sets["train"], sets["train_validation"]
    asked = Counter(kind for r in train for kind in r["kinds"])
    given = {kind: Counter() for kind in asked}
    for r in train:
        for kind, turn in zip(r["kinds"], r["conversations"][1::2]):
            given[kind][turn["value"]] += 1
    for kind in ("colour", "shape", "size", "position", "number"):
        answers = given[kind]
        assert asked[kind] >= 0.12 * asked.total() and len(answers) >= 4
        assert max(answers.values()) < 1.6 * answers.total() / len(answers)  # equally likely
    pictures = Counter(len(data.parse_record(r)[1]) for r in train)
    assert pictures[1] > 0.9 * len(train) and pictures[0] > 0 == pictures[2]
    assert all(not data.parse_record(r)[1] for r in sets["reading"])
    assert all(len(data.parse_record(r)[1]) == 1 for r in sets["captions"])

    def files(rows):
        return {name for r in rows for name in data.parse_record(r)[1]}

    assert sum(len(r["kinds"]) for r in held_out) >= 500
    assert not files(train + sets["captions"]) & files(held_out)


def test_the_lines_of_toys_docstring_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = sys.modules["toy"]
    lines = "\n".join(re.findall(r"^    (make_.*)$", module.__doc__, re.M))
    exec(lines.replace("scenes=8000", "scenes=4"), vars(module).copy())
    assert len(json.loads(Path("out/toy/train.json").read_text())) == 4
    assert Path("out/tiny/model.safetensors").is_file()


def test_shuffled_rows_ask_the_same_of_other_pictures(toy):
    rows, shuffled = (
        json.loads((toy / f"train_{name}.json").read_text()) for name in ("validation", "shuffled")
    )
    for asked, other in zip(rows, shuffled, strict=True):
        assert {**asked, "image": 0} == {**other, "image": 0}
        assert len(data.parse_record(asked)[1]) == len(data.parse_record(other)[1])
        assert not data.parse_record(asked)[1] or asked["image"] != other["image"]


def test_drawn_shapes_are_what_the_words_say(tmp_path):
    """Counted in the pixels: corner, colour, number of separate shapes."""
    (tmp_path / "images").mkdir()
    world = ToyWorld(tmp_path, 3)
    for _ in range(40):
        scene = world.scene()
        pixels = Image.open(tmp_path / "images" / world.draw(shapes_of(scene))).convert("RGB")
        pixels = np.asarray(pixels).astype(int)
        drawn = np.abs(pixels - COLOURS[scene["colour"]]).sum(-1) < 30
        rows, columns = np.nonzero(drawn)
        half = "top" if rows.mean() < 168 else "bottom"
        side = "left" if columns.mean() < 168 else "right"
        assert f"{half} {side}" == scene["position"]
        cells = {(r // 84, c // 84) for r, c in zip(rows.tolist(), columns.tolist())}
        assert len(cells) == 1 + ["one", "two", "three", "four"].index(scene["number"])


def test_both_pictures_of_a_row_count_and_their_order(good, toy, tmp_path):
    """From JSON to gradients; the tiny model is too small to learn to compare two pictures."""
    folder, model = good
    names = ["000001.png", "000007.png"]
    asked = row([f"{IMAGE}\n{IMAGE}\nWhich picture has a ring?", "second"], image=names)
    file = write(tmp_path / "rows.json", json.dumps([asked]))
    dataset = open_dataset(file, toy / "images", folder)
    batch = data.Collator(dataset.image_token_id, 4)([dataset[0]])
    ids, labels, pixels = (batch[key] for key in ("input_ids", "labels", "pixel_values"))
    pictures = data.Pictures(toy / "images")
    for name, given in zip(names, pixels, strict=True):
        shown = data.decode_picture(pictures.read(name), name)
        assert torch.equal(given, torch.as_tensor(dataset.transform(shown)))  # in their order
    pixels.requires_grad_(True)
    loss, _ = model(ids, pixels, labels)
    (gradient,) = torch.autograd.grad(loss, pixels)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-6
    with torch.no_grad():
        swapped, _ = model(ids, pixels.flip(0), labels)
        assert (swapped - loss).abs() > 1e-3
        logits = theirs(folder)(input_ids=ids, pixel_values=pixels).logits[:, :-1]
    targets = labels[:, 1:]
    expected = F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="sum")
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(toy, tmp_path):
    """What is left of a recipe, as far as the summary reads it."""
    out = tmp_path / "my out"
    (out / "toy").mkdir(parents=True)
    for name in ("train_validation", "baseline"):
        shutil.copy(toy / f"{name}.json", out / "toy")
    for stage in ("reading", "stage1", "stage2"):
        write_lines(
            out / stage / "metrics.jsonl",
            {"step": 0, "eval_loss": 4.5},
            {"step": 90, "eval_loss": 0.25},
        )
        (out / stage / "final").mkdir()
        (out / stage / "run.json").touch()
        os.utime(out / stage / "final", (1090, 1090))
        os.utime(out / stage / "run.json", (1000, 1000))
    rows = json.loads((toy / "train_validation.json").read_text())
    answers, kinds = [], Counter()
    for r in rows:
        kinds.update(r["kinds"])
        for kind, turn in zip(r["kinds"], r["conversations"][::2]):
            answers.append(
                {"id": r["id"], "kind": kind, "question": turn["value"], "prediction": f"a {kind}"}
            )
    write_lines(out / "train_validation" / "predictions.jsonl", *answers)
    for name, right in (("train_validation", 1.0), ("train_shuffled", 0.25)):
        scores = {f"eval_exact_match/{kind}": right for kind in kinds}
        scores["eval_exact_match/colour"] = right / 2
        write_lines(out / name / "metrics.jsonl", scores)
    return out, kinds


def test_the_summary_has_the_figures_and_pasteable_commands(recipe, tmp_path, monkeypatch, capsys):
    out, kinds = recipe
    monkeypatch.setattr(sys, "prefix", "/an/environment")  # that its user has activated
    monkeypatch.chdir(tmp_path)
    assert make_toy(["summary", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "stage2        90       1.5   4.500 > 0.250" in said
    five = ("colour", "shape", "size", "position", "number")
    total = sum(kinds[kind] for kind in five)
    mean = 1 - kinds["colour"] / total / 2
    assert f"the first five    {total:>10}{mean:>8.1%}{mean / 4:>20.1%}" in said
    assert f"relation          {kinds['relation']:>10}  100.0%               25.0%" in said
    assert said.count(" > a ") == 5  # the questions about one picture
    command = shlex.split(said.partition("to ask more:\n")[2].replace("\\\n", " "))
    assert command[:4] == [
        "python",
        os.path.relpath(HERE / "chat.py"),
        "--model_name_or_path",
        "my out/stage2/final",
    ]
    assert re.fullmatch(r"my out/toy/images/\d+\.png", command[-1])
    assert max(map(len, said.splitlines())) <= 80 + len(os.path.relpath(HERE))


@pytest.mark.parametrize("folder", ["llava", "link"])
def test_commands_name_run_shs_environment(recipe, tmp_path, monkeypatch, capsys, folder):
    """Also where the folder or its .venv is a link to another place."""
    for name in ("llava", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("llava")
    (tmp_path / "llava" / ".venv").symlink_to(tmp_path / "elsewhere")
    made = tmp_path / folder / ".venv"
    monkeypatch.setattr(sys, "prefix", str(made))
    monkeypatch.setattr(sys, "executable", str(made / "bin/python"))
    monkeypatch.setattr(report, "__file__", str(made.parent / "report.py"))
    monkeypatch.chdir(tmp_path)
    print_summary(recipe[0])
    assert f"\n  {folder}/.venv/bin/python llava/chat.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "command"),
        (["paint"], "invalid choice"),
        (["data"], "--out"),
        (["data", "--out", "x", "--scenes", "many"], "--scenes"),
        (["data", "--out", "x", "--scenes", "0"], "--scenes: 0 is not from 1"),
        (["data", "--out", "FILE"], "FILE: exists already"),
        (["model", "--out", "FILE"], "FILE: exists already"),
        (["summary", "--out", "x"], "x: the recipe was not run"),
    ],
)
def test_a_bad_call_of_toy_is_one_line(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    assert says in refused(capsys, sys.modules["toy"], *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_okvqa_rows_are_the_raw_files_split_by_picture(tmp_path):
    argv = write_vqa(tmp_path, "train2014", ASKED)
    assert okvqa.main([*argv, "--out", str(tmp_path / "a" / "b"), "--val_fraction", "0.3"]) == 0
    train, validation = (
        json.loads((tmp_path / "a/b" / f"{n}.json").read_text()) for n in ("train", "validation")
    )
    files = [{r["image"] for r in rows} for rows in (train, validation)]
    assert len(files[1]) == 3 and len(files[0]) == 7 and not files[0] & files[1]
    rows = {r["id"]: r for r in train + validation}
    assert len(rows) == len(train + validation) == len(ASKED)
    assert [r["id"] for r in train] == sorted(r["id"] for r in train)  # the file's order
    for k, (n, i, question, answers) in enumerate(ASKED):
        r = rows[str(n)]
        assert r["image"] == f"train2014/COCO_train2014_{i:012d}.jpg" and r["answers"] == answers
        (q, a), (picture,) = data.parse_record(r)
        assert (
            q["content"]
            == f"<image>\n{question}\nAnswer the question using a single word or phrase."
        )
        best = "été" if k % 2 else "x" if k % 3 == 0 else "frog"  # of ties the first
        assert a["content"] == best and (tmp_path / "coco" / picture).is_file()
    argv[-1] = str(tmp_path / "coco" / "train2014")  # the split's own folder, or a zip of COCO's
    assert okvqa.main([*argv, "--out", str(tmp_path / "own"), "--val_fraction", "0.3"]) == 0
    shutil.make_archive(str(tmp_path / "coco"), "zip", tmp_path / "coco")
    argv[-1] = str(tmp_path / "coco.zip")
    assert okvqa.main([*argv, "--out", str(tmp_path / "zip"), "--val_fraction", "0.3"]) == 0
    for name in ("train.json", "validation.json"):
        text = (tmp_path / "a/b" / name).read_text()
        assert (tmp_path / "zip" / name).read_text() == text
        assert (tmp_path / "own" / name).read_text() == text.replace("train2014/", "")


def test_okvqa_writes_the_same_bytes_whatever_the_hash_seed(tmp_path):
    argv = [*write_vqa(tmp_path, "train2014", ASKED), "--val_fraction", "0.4"]
    for out, seed in (("a", "0"), ("b", "1")):
        assert okvqa.main([*argv, "--out", str(tmp_path / out), "--seed", seed]) == 0
    again = [sys.executable, HERE / "okvqa.py", *argv, "--out", tmp_path / "again"]
    subprocess.run(
        again, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True
    )
    for name in ("train.json", "validation.json"):
        first = (tmp_path / "a" / name).read_bytes()
        assert (
            (tmp_path / "again" / name).read_bytes()
            == first
            != (tmp_path / "b" / name).read_bytes()
        )


def test_okvqa_takes_validation_from_files_of_its_own(tmp_path, capsys):
    write_vqa(tmp_path, "train2014", ASKED[:12])
    write_vqa(tmp_path, "val2014", [(n + 100, i + 50, *rest) for n, i, *rest in ASKED[12:]])
    argv = okvqa_argv(tmp_path, "train2014", "val2014")
    assert okvqa.main([*argv, "--out", str(tmp_path / "out")]) == 0
    counts = [
        len(json.loads((tmp_path / "out" / f"{n}.json").read_text()))
        for n in ("train", "validation")
    ]
    assert (
        counts == [12, 8]
        and "train.json: 12 questions about 10 pictures" in capsys.readouterr().out
    )
    twice = okvqa_argv(tmp_path, "train2014", "train2014")
    assert okvqa.main([*twice, "--out", str(tmp_path / "twice")]) == 2
    assert (
        "train2014_questions.json: train2014/COCO_train2014_000000000000.jpg is a picture of"
        in capsys.readouterr().err
    )


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


VQA_FAULTS = {
    "train2014_questions.json: not questions as .* \\(KeyError: 'questions'\\)": lambda d: (
        change_json(d / "train2014_questions.json", lambda c: c.pop("questions"))
    ),
    "not questions as .* \\(KeyError: 'image_id'\\)": lambda d: change_json(
        d / "train2014_questions.json", lambda c: c["questions"][3].pop("image_id")
    ),
    "not questions as .*AttributeError": lambda d: change_json(
        d / "train2014_questions.json", lambda c: c["questions"][3].update(question=3)
    ),
    "not questions as .*JSONDecodeError": lambda d: write(d / "train2014_questions.json", "[{"),
    "not questions as .*UnicodeDecodeError": lambda d: write(
        d / "train2014_questions.json", b"[\xff"
    ),
    "not questions as .*RecursionError": lambda d: write(
        d / "train2014_questions.json", "[" * 99_999
    ),
    "train2014_annotations.json: not annotations as .*TypeError": lambda d: write(
        d / "train2014_annotations.json", "[]"
    ),
    "no answer to question 25003 of .*train2014_questions.json": lambda d: change_json(
        d / "train2014_annotations.json",
        lambda c: c["annotations"][16].update(answers=[{"answer": " "}]),
    ),
    "no answer to question 25019": lambda d: change_json(
        d / "train2014_annotations.json", lambda c: c["annotations"].pop(0)
    ),
    "no answer to question 250.*, about picture": lambda d: change_json(
        d / "train2014_annotations.json", lambda c: c["annotations"][3].update(image_id=99)
    ),
    "a question_id stands twice": lambda d: change_json(
        d / "train2014_annotations.json", lambda c: c["annotations"].append(c["annotations"][0])
    ),
    "question 250.* is 'What <image>.': remove it": lambda d: change_json(
        d / "train2014_questions.json", lambda c: c["questions"][3].update(question="What <image>?")
    ),
    "2 of 20 questions have no picture in .*coco, the first COCO_train2014_000000000004.jpg: get COCO's train2014": lambda d: (
        (d / "coco/train2014/COCO_train2014_000000000004.jpg").unlink()
    ),
    "No such file.*train2014_questions.json": lambda d: (d / "train2014_questions.json").unlink(),
    "--image_folder .*coco: neither a folder nor a whole .zip": lambda d: shutil.rmtree(d / "coco"),
    "out: exists already": lambda d: (d / "out").mkdir(),
    "0 questions to train on and 20": "--val_fraction 1",
    "20 questions to train on and 0": "--val_fraction 0.01",
    "--val_fraction: -0.3 is not from 0 to 1": "--val_fraction=-0.3",
    "not questions as .*OverflowError": lambda d: change_json(
        d / "train2014_questions.json", lambda c: c["questions"][3].update(image_id=1e999)
    ),
    "--questions and --annotations take one file each, or two": "--annotations a b c",
}


@pytest.mark.parametrize("says", VQA_FAULTS)
def test_faulty_raw_files_are_one_line_and_nothing_is_written(tmp_path, capsys, says):
    argv, fault = write_vqa(tmp_path, "train2014", ASKED), VQA_FAULTS[says]
    more = fault.split() if isinstance(fault, str) else []
    if not more:
        fault(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert re.search(says, refused(capsys, okvqa, *argv, "--out", tmp_path / "out", *more))
    assert sorted(tmp_path.rglob("*")) == before
