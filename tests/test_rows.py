"""Files of rows, the dataset, batches and the order of rows."""

import contextlib
import inspect
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import damage, damages, encoded, noise, open_dataset, row, write

import data
import model as llava
import order
from data import IGNORE, IMAGE

SAID = row(["a", "b"])["conversations"]
PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    "wrong, error",
    [
        ([], "expected a row such as {"),
        (None, "expected a row"),
        ({}, "expected a row"),
        ({"conversations": "hello"}, "expected a row"),
        ({"messages": []}, "expected a row"),
        ({"conversations": [1]}, "expected a row"),
        ({"conversations": [{"from": "human"}, SAID[1]]}, "turn 1: neither a string"),
        (row(["a", 3]), "turn 2: neither a string"),
        (row(["a", None]), "turn 2: neither"),
        (row(["a", [PART, {"type": "video"}]]), "turn 2: neither .* parts of text and images"),
        (row(["hi"]), "no gpt turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no gpt turn"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "no gpt turn"),
        (
            {"conversations": [*SAID, {"from": "tool", "value": "x"}]},
            "human and gpt .* must alternate",
        ),
        ({"conversations": [{"from": [], "value": "x"}]}, "human and gpt"),
        ({"conversations": [*SAID[:1], *SAID]}, "human and gpt .* must alternate"),
        ({"conversations": [SAID[1], *SAID[1:], *SAID]}, "must alternate, human first"),
        ({"conversations": [*SAID, {"from": "system", "value": "x"}]}, "must alternate"),
        ({"conversations": SAID, "system": 3}, "turn 1: neither"),
        (row(["hi", "yes"], image="a.png"), "1 picture.* but 0 <image>.* write one each"),
        (row(["hi", "yes"], images=["a.png"]), "1 picture.* but 0 <image>"),
        (row([f"{IMAGE} hi", "yes"]), "0 picture.* but 1 <image>"),
        (row([f"{IMAGE}{IMAGE} hi", "yes"], image="a.png"), "1 picture.* but 2 <image>"),
        (row(["hi", f"{IMAGE} yes"], image="a.png"), "1 picture.* but 0 <image>"),
        (row([f"{IMAGE} hi", "yes"], image=3), r'"image" holds \[3\]: no file names'),
        (row([f"{IMAGE} hi", "yes"], image=[None]), r'"image" holds \[None\]: no'),
        (row([f"{IMAGE} hi", "yes"], image=""), "\"image\" holds .''.: no"),
        (row(["hi", "yes"], video="a.mp4"), "'video'. would be ignored"),
        (row(["hi", "yes"], audios=["a.wav"]), "'audios'. would be ignored"),
        (
            row(["hi", "yes"], image_path="a.png"),
            "image_path.* would be ignored: pictures stand in",
        ),
        (row(["\ud800", "b"]), "turn 1: neither a string in UTF-8"),
    ],
)
def test_wrong_row_is_one_clear_error(wrong, error):
    with pytest.raises(ValueError, match=error) as refused:
        data.parse_record(wrong)
    assert "\n" not in str(refused.value)


def test_right_rows_are_taken_as_they_are():
    turns = [f"{IMAGE}a{IMAGE}", f"b {IMAGE}", f"{IMAGE}c", "d", "and?"]
    names = ["1.png", "2.png", "3.png"]
    messages, images = data.parse_record(row(turns, id="1", image=names, answers=[1], videos=[]))
    assert [m["content"] for m in messages] == turns[:4]  # the question at the end is dropped
    assert images == names and [m["role"] for m in messages] == ["user", "assistant"] * 2
    for more in ({}, {"image": None}, {"images": []}):
        assert data.parse_record(row(["a", ""], **more))[1] == []
    for key in ("image", "images"):
        for value in ("x", ["x"]):
            assert data.parse_record(row([f"a\n{IMAGE}", "b"], **{key: value}))[1] == ["x"]


def test_a_gpt_turn_before_the_first_question_is_dropped():
    opening = {"from": "gpt", "value": "Hello!"}
    system = {"from": "system", "value": "Be short."}
    assert data.parse_record({"conversations": [opening, *SAID]}) == data.parse_record(
        row(["a", "b"])
    )
    messages, _ = data.parse_record({"conversations": [system, opening, *SAID]})
    assert [m["content"] for m in messages] == ["Be short.", "a", "b"]


def test_both_forms_of_a_row_have_equal_ids_and_labels(open_rows):
    question, answer = f"{IMAGE}\n{IMAGE}\nAlike?", "No."
    picture = {"type": "image"}
    parts = [picture, picture, {"type": "text", "text": "Alike?"}]
    named = [{**picture, "image": "0.png"}, {**picture, "path": "1.png"}, parts[2]]
    links = [{**picture, "url": "0.png"}, {**picture, "image": "1.png"}, parts[2]]
    images, system = {"images": ["0.png", "1.png"]}, {"role": "system", "content": "Be short."}

    def messages(content, answer=answer, first=()):
        said = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": [*first, *said]}

    system_turn = {"from": "system", "value": "Be short."}
    plain, ruled = (
        row([question, answer], image=images["images"]),
        row([question, answer], **images),
    )
    ruled["conversations"].insert(0, system_turn)
    user = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    alike = [
        [
            plain,
            {"conversations": user, **images},
            {**messages(question), **images},
            {**messages(parts), **images},
            {**messages(parts, [{"type": "text", "text": answer}]), **images},
            messages(named),
            messages(links),
        ],
        [
            ruled,
            {**plain, "system": "Be short."},
            {**messages(question, first=[system]), **images},
            {**messages(named), "system": "Be short."},
        ],
    ]
    for rows in alike:
        dataset = open_rows(rows)
        assert dataset.records.bad_rows == []
        first, *others = [dataset[i] for i in range(len(rows))]
        for other in others:
            assert all(first[k].equal(other[k]) for k in ("input_ids", "labels", "pixel_values"))
    assert data.parse_record(alike[0][5])[1] == images["images"]


def refuse(turns):
    if any("</s>" in turn["content"] for turn in turns):
        raise ValueError("a control string")


def test_records_come_back_as_they_were(tmp_path):
    about = {"id": "004539375", "image": "a.png", "answers": ["x"] * 10}
    rows = [
        row([f"{IMAGE}\nWas ist das?", "Ein Frosch 🐸"], **about),
        row(["hi", "yes"], id=7),
        row(["\ud800", "x"]),
        [1],
        row([f"{IMAGE}{IMAGE}hi", "yes"] + ["hi", "yes"] * 50, image=["a", "b"]),
        row(["hi", "yes </s>"]),
    ]
    text, lines = json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows)) + "\n\n"
    bom = b"\xef\xbb\xbf"
    for name, content in (
        ("a.json", text),
        ("b.json", bom + text.encode()),
        ("c.json", lines),  # one object a line
        ("a.jsonl", lines),
        ("a.ndjson", bom + lines.replace("\n", "\r\n").encode()),
        ("b.jsonl", text),  # a list
    ):
        records = data.Records(write(tmp_path / name, content), 576, refuse)
        assert [records[i] for i in range(len(records))] == rows
    assert records.has_picture.tolist() == [True, False, False, False, True, False]
    assert records.lengths.argsort()[::-1][:2].tolist() == [4, 0] and 576 < records.lengths[0] < 700
    assert records.bad_rows == [2, 3, 5]  # half a character, no row, a control string
    assert "row 0 (id 004539375)" in records.where(0) and records.where(3).endswith("row 3")


@pytest.mark.parametrize(
    "name, content, error",
    [
        ("a.json", '[\n{"id": 1},\n{"id" 2}]', "a.json: line 3: not JSON"),
        ("a.jsonl", '{"id": 1}\n\n{"id"', "a.jsonl: line 3: not JSON"),
        ("a.json", '[{"id": 1},\n{}] x', "a.json: line 2: not JSON"),
        ("a.json", '{\n  "id": 1\n}', "a.json: line 1: not JSON .*in a list or one a line"),
        ("a.json", "[1,]", "not JSON"),
        (
            "a.csv",
            "image,question\na.png,What?",
            'line 1: not JSON .*rows.*such as {"image": "a.jpg"',
        ),
        ("a.json", "[]", "no rows"),
        ("a.json", "", "no rows"),
        ("a.jsonl", "\n", "no rows"),
    ],
)
def test_broken_file_names_the_line(tmp_path, name, content, error):
    with pytest.raises(ValueError, match=error) as refused:
        data.Records(write(tmp_path / name, content))
    assert "\n" not in str(refused.value)


@pytest.fixture
def open_rows(tiny, tmp_path):
    """Writes rows, and pictures 0.png, 1.png ... of one shade each, and opens them as a dataset."""

    def make(rows, **options):
        for i in range(3):
            Image.new("RGB", (40, 30), (80 * i,) * 3).save(tmp_path / f"{i}.png")
        (tmp_path / "bad.png").write_bytes(b"no picture")
        return open_dataset(
            write(tmp_path / "rows.json", json.dumps(rows)), tmp_path, tiny, **options
        )

    return make


def shades(pixels):
    return pixels[:, :, 168, 168].mean(1).argsort().tolist()


def test_pictures_keep_the_order_of_their_placeholders(open_rows):
    dataset = open_rows(
        [
            row(
                [f"{IMAGE}{IMAGE} which?", "none", f"and {IMAGE}?", "no"],
                image=["2.png", "0.png", "1.png"],
            ),
            row(["hi", "yes"]),
            row([f"{IMAGE}", "x"], image="1.png"),
        ]
    )
    collate = data.Collator(dataset.image_token_id, 576)
    batch = collate([dataset[i] for i in (0, 1, 2, -1)])
    image = batch["input_ids"] == dataset.image_token_id
    assert image.sum(1).tolist() == [3 * 576, 0, 576, 0] and batch["pixel_values"].shape == (
        4,
        3,
        336,
        336,
    )
    assert shades(batch["pixel_values"][:3]) == [1, 2, 0]
    assert (batch["labels"][image] == IGNORE).all() and batch["rows"] == [0, 1, 2, -1]
    for k, length in enumerate(batch["lengths"]):  # right-padded; labels are the ids, or ignored
        ids, labels = batch["input_ids"][k], batch["labels"][k]
        assert (labels[length:] == IGNORE).all() and ((labels == ids) | (labels == IGNORE)).all()
        assert (
            length == 1 if k == 3 else labels[:length][-2] != IGNORE
        )  # the end token, before its newline
    text_only = collate([dataset[1], dataset[-1]])
    assert (
        text_only["pixel_values"].shape == (0, 3, 336, 336)
        and (text_only["labels"] != IGNORE).any()
    )
    with pytest.raises(AssertionError, match="row 2: 1 <image> for 0 pictures"):
        collate([{**dataset[2], "pixel_values": torch.zeros(0, 3, 336, 336)}])


def test_a_long_row_loses_its_end_never_a_picture(open_rows):
    rows = [
        row([f"{IMAGE}\nWhat?", "one two three four five six"], id="long", image="1.png"),
        row([f"{IMAGE} a", "b", f"c {IMAGE}", "d"], id="two", image=["1.png", "0.png"]),
    ]
    full = open_rows(rows)[0]
    width = len(full["input_ids"]) + 575
    first = int((full["labels"] == IGNORE).int().argmin()) + 575  # tokens before the answer
    dataset = open_rows(rows)
    for limit in range(first + 1, width + 1):
        dataset.max_length = limit
        item = dataset[0]
        assert len(item["input_ids"]) + 575 == limit and item["cut"] == width - limit
        assert item["labels"].equal(full["labels"][: limit - 575])
    for i, limit in ((0, first), (0, 300), (1, first + 20)):
        error = "would cut off a picture, or leave nothing to learn from: raise it"
        with pytest.raises(ValueError, match=rf"row {i} \(id .*{error}"):
            open_rows(rows, max_length=limit)[i]
        skipped = open_rows(rows, max_length=limit, on_bad_record="skip")[i]
        assert (
            error in skipped["fault"]
            and (skipped["labels"] == IGNORE).all()
            and len(skipped["pixel_values"]) == 0
        )


def test_bad_row_stops_or_is_skipped_with_one_line(open_rows):
    rows = [
        row([f"{IMAGE} a", "b"], id="good", image="1.png"),
        row([f"{IMAGE} a", "b"], id="gone", image="nowhere.png"),
        row([f"{IMAGE} a", "b"], id="bad", image="bad.png"),
        row(["a"], id="mute"),
        row(["\ud800", "b"], id="half"),
        row(["a", "b<|im_end|>"], id="ends"),
        5,
    ]
    errors = {
        1: "id gone.*nowhere.png",
        2: "id bad.*bad.png.*can be read",
        3: "id mute.*no gpt turn",
        4: "id half.*in UTF-8",
        5: "id ends.*</s>|<.im_end.>, a control string",
        6: "row 6: expected",
    }
    for i, error in errors.items():
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            open_rows(rows)[i]
    dataset = open_rows(rows, on_bad_record="skip")
    assert dataset.records.bad_rows == [3, 4, 5, 6]  # known before a picture is read
    batch = data.Collator(dataset.image_token_id, 576)([dataset[i] for i in range(7)])
    assert len(batch["faults"]) == 6 and not any("\n" in fault for fault in batch["faults"])
    assert (
        (batch["labels"][1:] == IGNORE).all()
        and (batch["labels"][0] != IGNORE).any()
        and len(batch["pixel_values"]) == 1
    )


def test_what_does_not_fit_together_is_one_clear_error(tiny, tmp_path):
    rows = write(tmp_path / "a.json", json.dumps([row([f"{IMAGE} a", "b"], image="x")]))
    with pytest.raises(ValueError, match="has pictures: say where with --image_folder"):
        open_dataset(rows, None, tiny)
    with pytest.raises(FileNotFoundError, match="No such file.*nowhere.json"):
        open_dataset(tmp_path / "nowhere.json", None, tiny)


def test_the_lines_of_the_docstring_make_a_batch(open_rows, tiny, tmp_path, monkeypatch, capsys):
    """They tie the file together, so they must be true."""
    rows = [row([f"{IMAGE}\nWhat is {i}?", "A frog."], image=f"{i % 3}.png") for i in range(12)]
    open_rows(rows)
    (tmp_path / "rows.json").rename(tmp_path / "train.json")
    (tmp_path / "images").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "images" / path.name)
    monkeypatch.chdir(tmp_path)
    names = vars(data) | {"folder": tiny, "config": llava.read_config(tiny)}
    names["tokenizer"] = llava.open_tokenizer(tiny)

    def execute(lines):
        exec("\n".join(line[4:] for line in lines.splitlines() if line.startswith("    ")), names)

    execute(data.__doc__[data.__doc__.index("One row, by hand") :])
    collate = data.Collator(names["dataset"].image_token_id, 576)
    by_hand = {
        "input_ids": torch.tensor(names["input_ids"]),
        "labels": torch.tensor(names["labels"]),
    }
    by_hand["pixel_values"] = torch.tensor(np.stack(names["pixel_values"]))
    batch, same = collate([by_hand]), collate([names["dataset"][0]])
    assert all(batch[key].equal(same[key]) for key in by_hand)
    assert names["batch"]["pixel_values"].shape == (2, 3, 336, 336)
    names |= vars(order)
    execute(order.__doc__.replace("...", 'print(len(batch["rows"]))'))
    assert capsys.readouterr().out.split() == ["4"] * 4  # 12 rows, 8 a step


def test_the_collator_alone_collates_any_rows():
    names = {"torch": torch}
    exec(inspect.getsource(data.Collator), names)  # pasted, as a reader would
    ids, labels = torch.tensor([5, 99, 7, 8]), torch.tensor([-100, -100, 7, 8])
    pixels = torch.ones(1, 3, 2, 2)
    one = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    other = {"input_ids": ids[2:], "labels": labels[2:], "pixel_values": pixels[:0]}
    batch = names["Collator"](99, 3)([one, other])
    assert batch["input_ids"].tolist() == [[5, 99, 99, 99, 7, 8], [7, 8, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [7, 8], [7, 8] + [-100] * 4]
    assert batch["pixel_values"].equal(pixels) and batch["lengths"] == [6, 2]


def test_importing_data_has_no_side_effects(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch\n"
        "a = torch.get_rng_state(), torch.get_num_threads()\n"
        "import data; assert a[0].equal(torch.get_rng_state()) and a[1] == torch.get_num_threads()\n"
        "assert not {'model', 'train', 'lora', 'cli', 'transformers'} & set(sys.modules)"
    )
    argv = [sys.executable, "-B", "-c", code, str(Path(data.__file__).parent)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def private_bytes():
    """The memory that this process shares with no other (USS)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


class Loaded(torch.utils.data.Dataset):
    """Prepares a row and forgets it."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, i):
        assert self.rows[i]["fault"] is None


@pytest.mark.long
def test_600_000_rows_open_fast_and_workers_stay_small(tiny, tmp_path):
    n, picture = 600_000, encoded(noise(64, 48), "JPEG")
    said = ["organization is synonymous with azaleas .", "a man in front of the house on the beach"]
    with open(tmp_path / "chat.json", "w") as file:
        for i in range(n):
            turns = [f"Provide a brief description of the given image.\n{IMAGE}", said[i % 2]]
            caption = row(turns, id=f"GCC_train_{i:09d}", image=f"GCC_train_{i:09d}.jpg")
            file.write(("[" if i == 0 else ", ") + json.dumps(caption))
        file.write("]")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(n):
            archive.writestr(f"GCC_train_{i:09d}.jpg", picture)
    began = time.process_time()  # of this process, whatever else the machine does
    rows = open_dataset(
        tmp_path / "chat.json",
        tmp_path / "images.zip",
        tiny,
        text=data.ChatText(llava.open_tokenizer(tiny), "plain"),
    )
    steps = order.plan_epoch(rows.records, 256, 0, 0, False)
    seconds = time.process_time() - began
    batches = order.micro_batches(steps, 1, 1, 0)[:16]
    shares = [sum(batches[k::4], []) for k in range(4)]  # 1,024 rows for each of 4 workers
    private = list(
        torch.utils.data.DataLoader(
            Loaded(rows),
            batch_sampler=shares,
            num_workers=4,
            collate_fn=lambda _: private_bytes(),
            multiprocessing_context="fork",
        )
    )
    print(f"{seconds:.1f} s, {[b // 2**20 for b in private]} MiB")
    assert len(rows) == n and seconds < 60 and max(private) < 500e6


WHOLE_JSON = json.dumps(
    [row(["hi", "yes"], id="007"), row(["ä", "\ud83d"], id=3), 5, [], row(["x", ""])], indent=1
)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(damages, st.booleans())
def test_damaged_json_gives_its_rows_or_one_clear_error(workdir, changes, by_line):
    whole = WHOLE_JSON if not by_line else "\n".join(map(json.dumps, json.loads(WHOLE_JSON)))
    content = damage(whole.encode(), changes)
    path = write(workdir / ("rows.jsonl" if by_line else "rows.json"), content)
    content = (
        content.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    )
    is_list = content.lstrip()[:1] == "["
    try:
        lines = [line for line in content.split("\n") if line.strip()]
        wanted = json.loads(content) if is_list else [json.loads(line) for line in lines]
    except ValueError:
        wanted = None
    try:
        records = data.Records(path)
        found = [records[i] for i in range(len(records))]
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error) and not wanted
        return
    assert repr(found) == repr(wanted)  # NaN is not itself
    for i, value in enumerate(found):
        with contextlib.suppress(ValueError):  # nothing else
            data.parse_record(value)
        assert records.where(i).startswith(f"{path}: row {i}")
