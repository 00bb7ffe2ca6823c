"""Files of rows, the dataset, batches and the order of rows."""

import contextlib
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MEAN, STD, damage, damages, encoded, noise, row, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import IGNORE, IMAGE, PictureTransform


@pytest.mark.parametrize(
    "wrong, error",
    [
        ([], "expected {"),
        ("text", "expected {"),
        (None, "expected {"),
        ({}, "expected {"),
        ({"conversations": "hello"}, "expected {"),
        ({"conversations": [1]}, "expected {"),
        ({"conversations": [{"from": "human"}]}, "expected {"),
        ({"conversations": [{"from": "human", "value": 3}]}, "expected {"),
        ({"conversations": []}, "no gpt turn"),
        (row(["hi"]), "no gpt turn"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "no gpt turn"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "'user' is no role"),
        ({"conversations": [{"value": "x"}]}, "None is no role"),
        ({"conversations": [{"from": [], "value": "x"}]}, "is no role"),
        (
            {"conversations": [{"from": "human", "value": "x"}] * 2},
            "turn 2 is human's: .*alternate",
        ),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "turn 1 is gpt's: .*human first"),
        (
            {
                "conversations": row(["a", "b"])["conversations"]
                + [{"from": "system", "value": "x"}]
            },
            "turn 3 is system's",
        ),
        (row(["hi", "yes"], image="a.png"), "1 picture.* but 0 <image>"),  # trap 1
        (row([f"{IMAGE} hi", "yes"]), "0 picture.* but 1 <image>"),
        (row([f"{IMAGE}{IMAGE} hi", "yes"], image="a.png"), "1 picture.* but 2 <image>"),
        (row([f"{IMAGE} hi", "yes"], image=["a", "b"]), "2 picture.* but 1 <image>"),
        (row(["hi", f"{IMAGE} yes"], image="a.png"), "1 picture.* but 0 <image>"),
        (row([f"{IMAGE} hi", "yes"], image=3), "neither a file name nor a list"),
        (row([f"{IMAGE} hi", "yes"], image=[None]), "neither a file name nor a list"),
    ],
)
def test_wrong_row_is_one_clear_error(wrong, error):
    with pytest.raises(ValueError, match=error) as refused:
        data.parse_record(wrong)
    assert "\n" not in str(refused.value)


def test_right_rows_are_taken_as_they_are():  # traps 5, 6, 10
    turns = [f"{IMAGE}a{IMAGE}", f"b {IMAGE}", f"{IMAGE}c", "d", "and?"]
    messages, images = data.parse_record(
        row(turns, id="1", image=["1.png", "2.png", "3.png"], answers=[1])
    )
    assert [m["content"] for m in messages] == turns[:4] and images == [
        "1.png",
        "2.png",
        "3.png",
    ]  # the question at the end is dropped
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert (
        data.parse_record(row(["a", ""]))[1]
        == data.parse_record(row(["a", ""], image=None))[1]
        == []
    )
    assert data.parse_record(row([f"a\n{IMAGE}", "b"], image="x"))[1] == ["x"]
    system = {
        "conversations": [{"from": "system", "value": IMAGE}, *row(["a", "b"])["conversations"]]
    }
    assert [m["role"] for m in data.parse_record(system)[0]] == ["system", "user", "assistant"]


def test_records_come_back_as_they_were(tmp_path):  # trap 33
    rows = [
        row(
            [f"{IMAGE}\nWas ist das?", "Ein Frosch 🐸"],
            id="004539375",
            image="a.png",
            answers=["x"] * 10,
        ),
        row(["hi", "yes"], id=7),
        row(["\ud800", "x"]),
        [1],
        row(["hi", "yes"] * 50, image=["a", "b"]),
    ]
    for path in (
        write(tmp_path / "a.json", json.dumps(rows, indent=1)),
        write(
            tmp_path / "b.json", b"\xef\xbb\xbf" + json.dumps(rows[:2], ensure_ascii=False).encode()
        ),
        write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
    ):
        records = data.Records(path, 576)
        assert [records[i] for i in range(len(records))] == rows[: len(records)] and len(
            records
        ) >= 2
    assert records.has_picture.tolist() == [True, False, False, False, True]
    assert records.lengths.argsort()[::-1][:2].tolist() == [4, 0] and 576 < records.lengths[0] < 700
    assert "row 0 (id 004539375)" in records.where(0) and records.where(3).endswith("row 3")


@pytest.mark.parametrize(
    "name, content, error",
    [
        ("a.json", '[\n{"id": 1},\n{"id" 2}]', "a.json: line 3: not JSON"),
        ("a.jsonl", '{"id": 1}\n\n{"id"', "a.jsonl: line 3: not JSON"),
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}', "a.jsonl: line 2: not JSON"),
        ("a.json", "", "a.json: line 1: not JSON"),
        ("a.json", "{}", "expected a list of rows, found dict"),
        ("a.json", '[{"id": 1},\n{}] x', "a.json: line 2: not JSON"),
        ("a.json", "[1,]", "not JSON"),
        ("a.json", "[1 2]", "not JSON"),
        ("a.json", "[\n] x", "a.json: line 2: not JSON"),
        ("a.json", "[]", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[1" + "0" * 5000 + "]", "not JSON"),
        ("a.json", b"[\xff]", "not JSON"),
        ("a.json", b'[{},\n{},\n{"id": "\xff"}]', "a.json: line 3: not JSON"),
    ],
)
def test_broken_file_names_the_line(tmp_path, name, content, error):
    with pytest.raises(ValueError, match=error) as refused:
        data.Records(write(tmp_path / name, content))
    assert "\n" not in str(refused.value)


def test_row_nested_as_deep_as_python_reads_is_one_line(open_rows, tmp_path, capsys):
    """Where a row is loaded, less of Python's stack is left than where its file was opened."""
    path = tmp_path / "a.json"

    def deep(levels):
        nested = "[" * levels + "]" * levels
        return json.dumps(row(["a", "b"], id=0)).replace('"id": 0', f'"id": {nested}')

    def opens(levels):
        with contextlib.suppress(ValueError):
            return data.Records(write(path, f"[{deep(levels)}]"))

    def below(frames, call):
        return below(frames - 1, call) if frames else call()

    deepest = next(levels for levels in range(1000, 0, -1) if opens(levels))
    dataset = open_rows([row(["a", "b"])], on_bad_record="skip")
    dataset.records = opens(deepest)
    trained = below(50, lambda: dataset[0])["fault"]
    rows = [deep(deepest - 5 - k) for k in range(60)]  # `main` opens it a few calls further down
    write(path, f"[{','.join(rows)}]")
    status = data.main(["check", "--data_path", str(path)])
    out, err = capsys.readouterr()
    faults = [line for line in out.splitlines() if line.startswith(str(path))]
    assert status == bool(faults) and err == "" and len(faults) < 60
    says = r"row \d+: maximum recursion depth"
    assert all(re.search(says, fault) for fault in faults)
    if sys.version_info < (3, 12):  # later ones count no C function's calls
        assert faults and re.search(says, trained)


@pytest.fixture
def open_rows(tiny, tmp_path):
    """Writes rows, and pictures 0.png, 1.png ... of one shade each, and opens them as a dataset."""

    def make(rows, **options):
        for i in range(3):
            Image.new("RGB", (40, 30), (80 * i,) * 3).save(tmp_path / f"{i}.png")
        (tmp_path / "bad.png").write_bytes(b"no picture")
        return data.open_dataset(
            write(tmp_path / "rows.json", json.dumps(rows)), tmp_path, tiny, **options
        )

    return make


def shades(pixels):
    return pixels[:, :, 168, 168].mean(1).argsort().tolist()


def test_pictures_keep_the_order_of_their_placeholders(open_rows):  # traps 10, 11; trouble 2
    dataset = open_rows(
        [
            row(
                [f"{IMAGE}{IMAGE} which?", f"{IMAGE} is text", f"and {IMAGE}?", "no"],
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
    with pytest.raises(AssertionError, match="row 2: 1 <image> ids for 0 pictures"):
        collate([{**dataset[2], "pixel_values": torch.zeros(0, 3, 336, 336)}])


def test_long_row_loses_the_end_of_its_answer_never_a_picture(open_rows):  # traps 9, 31; trouble 3
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
        error = "nothing is left to learn from" if limit == first else "would cut off a picture"
        with pytest.raises(ValueError, match=rf"row {i} \(id .*{error}"):
            open_rows(rows, max_length=limit)[i]
        skipped = open_rows(rows, max_length=limit, on_bad_record="skip")[i]
        assert (
            error in skipped["fault"]
            and (skipped["labels"] == IGNORE).all()
            and len(skipped["pixel_values"]) == 0
        )


def test_bad_row_stops_or_is_skipped_with_one_line(open_rows):  # trap 32
    rows = [
        row([f"{IMAGE} a", "b"], id="good", image="1.png"),
        row([f"{IMAGE} a", "b"], id="gone", image="nowhere.png"),
        row([f"{IMAGE} a", "b"], id="bad", image="bad.png"),
        row(["a"], id="mute"),
        row(["\ud800", "b"], id="half"),
        5,
    ]
    errors = {
        1: "id gone.*nowhere.png",
        2: "id bad.*bad.png.*can be read",
        3: "id mute.*no gpt turn",
        4: "id half.*no character",
        5: "row 5: expected",
    }
    for i, error in errors.items():
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            open_rows(rows)[i]
    dataset = open_rows(rows, on_bad_record="skip")
    batch = data.Collator(dataset.image_token_id, 576)([dataset[i] for i in range(6)])
    assert len(batch["faults"]) == 5 and not any("\n" in fault for fault in batch["faults"])
    assert (
        (batch["labels"][1:] == IGNORE).all()
        and (batch["labels"][0] != IGNORE).any()
        and len(batch["pixel_values"]) == 1
    )


def test_folder_that_is_no_llava_is_one_clear_error(tiny, tmp_path):
    rows = write(tmp_path / "a.json", json.dumps([row([f"{IMAGE} a", "b"], image="x")]))
    write(tmp_path / "config.json", '{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="not a LLaVA folder, but qwen2"):
        data.open_dataset(rows, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="has pictures: say where with --image_folder"):
        data.open_dataset(rows, None, tiny)
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json"):
        data.PictureTransform.from_pretrained(tmp_path)


@pytest.mark.parametrize("rows, batch", [(1000, 16), (5, 8), (64, 8), (33, 4), (1, 1)])
@pytest.mark.parametrize("by_modality", [False, True])
def test_epoch_has_every_row_once_and_the_longest_step_first(rows, batch, by_modality):  # trap 23
    rng = np.random.default_rng(0)
    lengths, has_picture = rng.integers(5, 900, rows), rng.random(rows) < 0.7
    plan = lambda seed=0, epoch=0: data.plan_epoch(
        lengths, has_picture, batch, seed, epoch, by_modality
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
        random_order = data.plan_epoch(lengths, has_picture, batch, 0, 0, False)
        assert np.ptp(sizes, axis=1).mean() < np.ptp(lengths[random_order], axis=1).mean() / 4


def test_rows_grouped_by_length_are_padded_a_fifth_as_much_as_in_random_order():
    """On lengths spread as those of LLaVA-Instruct, of which the sampler knows an estimate."""
    rng = np.random.default_rng(0)
    has_picture = rng.random(20_000) < 0.94
    words = np.where(has_picture, rng.lognormal(5.1, 0.75, 20_000), rng.lognormal(6.3, 0.8, 20_000))
    lengths = (576 * has_picture + words).clip(12, 2048)
    estimate = 576 * has_picture + words * rng.lognormal(0, 0.12, 20_000)

    def padded(order):
        rows = np.reshape(order, (-1, 16))  # micro-batches
        sizes = np.where(rows < 0, 1, lengths[rows])
        return 1 - sizes.sum() / (16 * sizes.max(1)).sum()

    plain, grouped = (
        padded(data.micro_batches(data.plan_epoch(estimate, has_picture, 128, 0, 0, by), 8, 1, 0))
        for by in (False, True)
    )
    assert grouped < 0.08 < plain < 0.2 < 0.35 < padded(rng.permutation(20_000))


def test_every_split_takes_the_same_rows_in_each_step():
    steps = data.plan_epoch(np.arange(100), np.ones(100, bool), 12, 0, 0, False)
    for world, accumulation in ((1, 1), (1, 12), (2, 3), (4, 1), (3, 4)):
        for start in (0, 3):
            ranks = [
                list(data.micro_batches(steps, accumulation, world, rank, start))
                for rank in range(world)
            ]
            assert {len(batches) for batches in ranks} == {
                len(data.micro_batches(steps, accumulation, world, 0, start))
            }
            for k, step in enumerate(steps[start:]):
                windows = [batches[k * accumulation : (k + 1) * accumulation] for batches in ranks]
                assert sorted(i for window in windows for rows in window for i in rows) == sorted(
                    step.tolist()
                )
                assert {len(rows) for window in windows for rows in window} == {
                    12 // world // accumulation
                }


def test_importing_data_has_no_side_effects(tmp_path):  # trap 29
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; a = torch.get_rng_state(), torch.get_num_threads()\n"
        "import data; assert a[0].equal(torch.get_rng_state()) and a[1] == torch.get_num_threads()\n"
        "assert not {'model', 'train', 'lora'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(Path(data.__file__).parent)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(
        tmp_path.iterdir()
    )


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
def test_600_000_rows_start_in_10_seconds_and_a_worker_costs_under_100_mb(tiny, tmp_path):
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
    began = time.perf_counter()
    rows = data.open_dataset(tmp_path / "chat.json", tmp_path / "images.zip", tiny, "plain")
    steps = data.plan_epoch(rows.records.lengths, rows.records.has_picture, 256, 0, 0, False)
    seconds = time.perf_counter() - began
    batches = data.micro_batches(steps, 1, 1, 0)[:16]
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
    assert len(rows) == n and seconds < 10 and max(private) < 100e6


WHOLE_JSON = json.dumps(
    [row(["hi", "yes"], id="007"), row(["ä", "\ud83d"], id=3), 5, [], row(["x", ""])], indent=1
)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(damages, st.booleans())
def test_damaged_json_gives_the_rows_that_are_in_it_or_one_clear_error(workdir, changes, by_line):
    whole = WHOLE_JSON if not by_line else "\n".join(map(json.dumps, json.loads(WHOLE_JSON)))
    path = write(
        workdir / ("rows.jsonl" if by_line else "rows.json"),
        content := damage(whole.encode(), changes),
    )
    try:
        parts = [p for p in content.split(b"\n") if p.strip()] if by_line else [content]
        wanted = [json.loads(part) for part in parts] if by_line else json.loads(content)
    except ValueError:
        wanted = None
    try:
        records = data.Records(path)
        found = [records[i] for i in range(len(records))]
    except ValueError as error:
        assert (
            "\n" not in str(error)
            and str(path) in str(error)
            and not (wanted and isinstance(wanted, list))
        )
        return
    assert repr(found) == repr(wanted)  # NaN is not itself
    for i, value in enumerate(found):
        with contextlib.suppress(ValueError):  # nothing else
            data.parse_record(value)
        assert records.where(i).startswith(f"{path}: row {i}")


WHOLE_PICTURES = [("JPEG", encoded(noise(70, 50), "JPEG")), ("PNG", encoded(noise(40, 30))),
                  ("GIF", encoded(noise(20, 20, "P"), "GIF")), ("WEBP", encoded(noise(30, 20), "WEBP")),
                  ("TIFF", encoded(noise(20, 10), "TIFF")), ("BMP", encoded(noise(10, 9), "BMP"))]  # fmt: skip


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.sampled_from(WHOLE_PICTURES), damages)
def test_damaged_picture_is_a_picture_or_one_clear_error(whole, changes):  # trap 32
    try:
        picture = data.decode_picture(damage(whole[1], changes), "a.jpg")
    except ValueError as error:
        assert str(error).startswith("picture a.jpg: not one that can be read") and "\n" not in str(
            error
        )
        return
    assert picture.mode == "RGB" and PictureTransform(336, MEAN, STD, "pad")(picture).shape == (
        3,
        336,
        336,
    )
