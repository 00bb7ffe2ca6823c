"""A data set before it is trained on: what check.py finds and says."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import noise, open_dataset, row, write

import check
import data
import toy as world
from data import IGNORE, IMAGE


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "a"
    assert world.main(["data", "--out", str(folder), "--scenes", "100"]) == 0
    return folder


@pytest.fixture
def one_row(toy, tiny):
    argv = {
        "model_name_or_path": tiny,
        "data_path": toy / "train.json",
        "image_folder": toy / "images",
    }
    return [word for key, value in argv.items() for word in (f"--{key}", str(value))]


def test_check_shows_a_row_as_the_model_gets_it(toy, tiny, one_row, tmp_path, capsys):
    asked = row([f"{IMAGE} or {IMAGE}?", "second"], image=["000001.png", "000002.png"])
    file = write(tmp_path / "rows.json", json.dumps([asked]))
    show = [*one_row, "--data_path", str(file), "--index", "0"]
    assert check.main([*show, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    dataset = open_dataset(file, toy / "images", tiny)
    batch = data.Collator(dataset.image_token_id, 576)([dataset[0]])
    assert printed == {key: batch[key][0].tolist() for key in ("input_ids", "labels")}
    assert check.main(show) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{IMAGE} x 576") == 2 and f"{len(batch['labels'][0])} tokens" in printed


def test_thumbnails_are_the_picture_again(tiny):
    transform = data.PictureTransform.from_pretrained(tiny)
    red = transform(Image.new("RGB", (336, 336), (200, 10, 10)))
    lines = check.thumbnail(transform, red).splitlines()
    colours = [
        [int(x) for x in re.findall(r"[34]8;2;(\d+);(\d+);(\d+)m", lines[0])[k]] for k in (0, 1)
    ]
    assert np.abs(np.array(colours) - [200, 10, 10]).max() <= 1
    assert len(lines) == 24 and all(line.count("▀") == 48 for line in lines)


@pytest.mark.parametrize(
    "argv, error",
    [
        (["--version", "v7"], "invalid choice"),
        (["--index", "99999"], "--index 99999"),
        (["--index", "-1"], "--index -1"),
        (["--model_max_length", "500"], "would cut off"),
        (["--data_path", "nowhere.json"], "No such file"),
        (["--image_folder", "nowhere"], "neither a folder nor"),
        (["--model_name_or_path", "nowhere"], "nowhere"),
        (["--version", "plain"], "--version plain takes one"),
        (["--wrong", "1"], "unrecognized"),
    ],
)
def test_a_bad_call_of_check_is_one_line(toy, one_row, capsys, argv, error):
    rows = json.loads((toy / "train.json").read_text())
    first = next(i for i, r in enumerate(rows) if data.parse_record(r)[1] and len(r["kinds"]) > 1)
    try:
        status = check.main([*one_row, "--index", str(first), *argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and re.search(error, err), err


def test_one_row_needs_a_model_and_pictures_a_folder(toy, capsys):
    rows = ["--data_path", str(toy / "train.json")]
    assert check.main([*rows, "--index", "0"]) == 2
    assert "--index shows tokens: name their model" in capsys.readouterr().err
    assert check.main(rows) == 2
    assert "has pictures: say where with --image_folder" in capsys.readouterr().err


def faulty_rows(folder):
    """Good rows, one of each fault, and their pictures."""
    (folder / "p").mkdir()
    for name, size in (("a.jpg", (640, 480)), ("cut.jpg", (640, 480)), ("b.png", (30, 20))):
        noise(*size).save(folder / "p" / name)
    whole = (folder / "p/cut.jpg").read_bytes()
    write(folder / "p/cut.jpg", whole[: len(whole) // 2])
    write(folder / "p/text.jpg", "no picture")
    ask = [f"{IMAGE} What?", "A frog."]
    return [
        row(ask, id="0", image="a.jpg"),
        row(["Hi", "Yes.", "So?", "No."], id="007"),
        row(ask, id="gone", image="gone.jpg"),
        row(ask, id="0", image="cut.jpg"),
        row([f"{IMAGE}{IMAGE}", "both"], id="both", image=["text.jpg", "gone.jpg"]),
        row(["?", "x"], id="no placeholder", image="a.jpg"),
        row(["only a question"], id="mute"),
        row([f"{IMAGE} What?", "long " * 300], id="long", image="b.png"),
        row([f"{IMAGE} " + "long " * 300, "x"], id="nothing left", image="b.png"),
        5,
    ]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("place", ["p", "p.zip"])
def test_check_finds_what_training_would_stumble_over(tiny, tmp_path, capsys, place, full):
    rows = write(tmp_path / "rows.json", json.dumps(faulty_rows(tmp_path)))
    shutil.make_archive(str(tmp_path / "p"), "zip", tmp_path / "p")
    argv = ["--data_path", str(rows), "--image_folder", str(tmp_path / place)]
    argv += ["--model_max_length", "700", "--model_name_or_path", str(tiny)]
    assert check.main([*argv, *["--full"] * full]) == 1
    out, err = capsys.readouterr()
    faults = [line for line in out.splitlines() if line.startswith("  ")]
    wanted = [
        r"2 rows, such as row 2 \(id gone\), row 4 \(id both\): picture gone.jpg: not in",
        *[r"row 3 \(id 0\): picture cut.jpg: not one that can be read .*truncated"] * full,
        r"2 rows, such as row 4 \(id both\), row 8 .*: of 1\d+ tokens .* would cut off .* raise it",
        r"row 4 \(id both\): picture text.jpg: not one that can be read",
        r"row 5 \(id no placeholder\): 1 picture\(s\) but 0 <image>",
        r"row 6 \(id mute\): there is no gpt turn",
        r"row 9: expected a row such as {",
    ]
    assert len(faults) == len(wanted), out
    assert all(any(re.search(one, fault) for fault in faults) for one in wanted), out
    assert err == "" and "Traceback" not in out
    dataset = open_dataset(rows, tmp_path / place, tiny, max_length=700, on_bad_record="skip")
    items = [dataset[i] for i in range(10)]
    bad = [i for i in range(10) if items[i]["fault"]]
    assert bad == [2, 3, 4, 5, 6, 8, 9]  # training's verdict is that of a full check
    assert items[7]["cut"] > 0 and re.search(r"cut +3 rows .* at 700 tokens", out)
    report = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith(" "))
    assert report["faults"] == f"{6 + full} rows, {len(wanted)} kinds"
    assert report["turns"] == "16" and "--on_bad_record skip" in out
    assert report["ids"] == "1 of them repeated, the first '0'"


def test_check_groups_faults_and_says_what_all_have_in_common(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(5000)]
    assert check.main(["--data_path", str(write(tmp_path / "a.json", json.dumps(rows)))]) == 1
    out = capsys.readouterr().out
    assert "5,000 rows, such as row 0, row 1, row 2: there is no gpt turn" in out
    assert "Every row is bad" in out and len(out.splitlines()) < 9


@pytest.mark.parametrize("place", ["p", "p.zip"])
def test_check_names_the_file_of_another_case_or_form(tmp_path, capsys, place):
    (tmp_path / "p" / "Deep").mkdir(parents=True)
    for name in ("Deep/A.JPG", "caf\u00e9.png"):
        noise(9, 9).save(tmp_path / "p" / name)
    shutil.make_archive(str(tmp_path / "p"), "zip", tmp_path / "p")
    names = ("deep/a.jpg", "cafe\u0301.png", "b.png")
    rows = [row([f"{IMAGE}?", "x"], image=name) for name in names]
    rows = write(tmp_path / "rows.json", json.dumps(rows))
    assert check.main(["--data_path", str(rows), "--image_folder", str(tmp_path / place)]) == 1
    out = capsys.readouterr().out
    assert "picture deep/a.jpg: not in" in out and "(it has 'Deep/A.JPG', the same name in" in out
    assert "2 rows, such as row 0, row 1" in out and "1 row, such as row 2: picture b.png" in out


def test_check_warns_of_rows_beyond_the_models_positions(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    write(tmp_path / "model/config.json", json.dumps(config))
    rows = write(tmp_path / "a.json", json.dumps([row(["a", "b"]), row(["a", "long " * 60])]))
    argv = ["--data_path", str(rows), "--model_name_or_path", str(tmp_path / "model")]
    assert check.main(argv) == 0
    out = capsys.readouterr().out
    assert re.search("positions +1 rows are longer than the 40 .* --model_max_length 40", out)


def test_check_reports_the_tokens_that_training_sees(toy, tiny, capsys):
    argv = ["--data_path", str(toy / "train.json"), "--image_folder", str(toy / "images")]
    assert check.main(argv) == 0
    assert "tokens" not in capsys.readouterr().out  # no model, no tokens
    assert check.main([*argv, "--model_name_or_path", str(tiny)]) == 0
    report = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    dataset = open_dataset(toy / "train.json", toy / "images", tiny)
    batch = data.Collator(dataset.image_token_id, 576)([dataset[i] for i in range(len(dataset))])
    lengths, learnt = batch["lengths"], (batch["labels"] != IGNORE).sum()
    shares = [f"{s} % up to {np.percentile(lengths, s):,.0f}" for s in (50, 90, 99)]
    assert report["tokens"] == ", ".join([*shares, f"the longest {max(lengths):,}"])
    assert report["supervised"] == f"{learnt / sum(lengths):.1%} of the tokens"
    assert report["cut"].startswith("0 rows (0.00%)") and report["faults"] == "0"
