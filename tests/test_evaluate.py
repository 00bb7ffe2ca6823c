"""Evaluation: losses, answers, and the best model of a run."""

import json
import math
import re
import signal
import subprocess
import sys
import unicodedata

import pytest
import torch
from processes import LORA, evaluated, losses_of, metrics_of, run
from safetensors.torch import load_file, save_file
from tiny import HERE, open_dataset, write
from transformers import LlavaForConditionalGeneration

import checkpoint
import data
import evaluate
import model as llava
import report
import train
from engines import OneProcess


def opened(world, rows, **options):
    """A dataset that reports its bad rows, of rows or of a file of them, and a collator for it."""
    if isinstance(rows, list):
        rows = write(world / f"rows{len(list(world.iterdir()))}.json", json.dumps(rows))
    options = {"on_bad_record": "skip"} | options
    dataset = open_dataset(rows, world / "images", world / "llava", **options)
    return dataset, data.Collator(dataset.image_token_id, dataset.tokens_per_picture)


def results(model, dataset, collate, **options):
    options = {"batch_size": 4, "eval_samples": -1, "max_new_tokens": 6, "workers": 0} | options
    options = {"on_bad_record": "stop", "device": "cpu", "engine": OneProcess()} | options
    return evaluate.evaluate(model, dataset, options.pop("engine"), collate, **options)


def row(question, answer, *pictures, **more):
    ask = {"from": "human", "value": "<image>\n" * len(pictures) + question}
    turns = [ask, {"from": "gpt", "value": answer}]
    return {"image": list(pictures), "conversations": turns, **more}


def test_evaluation_equals_transformers(world):
    """Loss of each token, and greedy answers, whatever the batch; the model trains on after it."""
    reference = LlavaForConditionalGeneration.from_pretrained(world / "llava").eval()
    dataset, collate = opened(world, world / "rows.json")
    text, loss, right, tokens, answers = dataset.text, 0.0, 0, 0, []
    for i in range(12):
        b = collate([dataset[i]])
        pixels = {"pixel_values": b["pixel_values"]} if len(b["pixel_values"]) else {}
        out = reference(input_ids=b["input_ids"], labels=b["labels"], **pixels)
        n = (b["labels"] >= 0).sum().item()
        loss, tokens = loss + out.loss.item() * n, tokens + n
        predicted, labels = out.logits[0, :-1].argmax(-1), b["labels"][0, 1:]
        right += (predicted == labels)[labels >= 0].sum().item()
        turns = data.parse_record(dataset.records[i])[0]
        for k in range(1, len(turns), 2):
            ids = torch.tensor(text.ids_and_labels(turns[:k], prompt=True)[0])
            ids = ids.repeat_interleave(torch.where(ids == text.image_token_id, 4, 1))[None]
            new = reference.generate(
                input_ids=ids,
                **pixels,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=text.stop_ids,
                suppress_tokens=[text.image_token_id],
            )
            new = new[0][ids.shape[1] :]
            answers.append(text.tokenizer.decode(new, skip_special_tokens=True).strip())
    model = llava.from_pretrained(world / "llava")
    for size in (1, 5):
        metrics, told = results(model, dataset, collate, batch_size=size)
        assert metrics["eval_loss"] == pytest.approx(loss / tokens, abs=1e-5)
        assert metrics["eval_token_accuracy"] == pytest.approx(right / tokens)
        assert [a["prediction"] for a in told] == answers and len(answers) == 24
        equal = sum(a["prediction"] == a["answer"] for a in told)
        assert metrics["eval_exact_match"] == equal / 24
    train.training_mode(model)
    assert model.language_model.training and not model.vision_tower.training


THINKING = """{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}
{%- if loop.last and m.role == 'assistant' -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{{ m.content + '<|im_end|>\n' }}{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""


@pytest.mark.parametrize("kind", ["thinking", "plain", "normalised"])
def test_all_tokens_right_means_all_answers_right(world, tmp_path, kind):
    """A template that adds to an answer, captions of two paragraphs, a tokenizer that lower-cases
    and composes: learnt by heart, both figures are 100 %.
    """
    flags = {"data_path": tmp_path / "rows.json", "version": "own", "model": tmp_path / "llava"}
    llava_folder = tmp_path / "llava"
    subprocess.run(["cp", "-r", world / "llava", llava_folder], check=True)
    answers = ["a circle", "blue"]
    if kind == "thinking":
        (llava_folder / "chat_template.jinja").write_text(THINKING)
    elif kind == "plain":
        flags["version"], answers = "plain", ["A red circle.\n\nIt is large.", "A lion."]
    else:
        answers = [unicodedata.normalize("NFD", "Caf\u00e9"), "A Red Circle"]
        tokenizer = json.loads((llava_folder / "tokenizer.json").read_text())
        steps = [{"type": "NFC"}, {"type": "Lowercase"}]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
        (llava_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [row("What is it?", answer, f"{i}.png") for i, answer in enumerate(answers)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    status, _, error = run(
        world,
        tmp_path / "out",
        model_name_or_path=flags.pop("model"),
        validation_data_path=tmp_path / "rows.json",
        max_steps=40,
        eval_steps=40,
        eval_samples=-1,
        max_new_tokens=40,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        save_steps=-1,
        **flags,
    )
    assert status == 0, error
    last = evaluations_of(tmp_path / "out")[-1]
    assert last["eval_token_accuracy"] == last["eval_exact_match"] == 1
    told = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()][-2:]
    assert not any("think" in a["prediction"] or "cut" in a for a in told)


class Oracle(torch.nn.Module):
    """Answers as it is told, in token ids, and notes what it is asked."""

    def __init__(self, dataset, *answers):
        super().__init__()
        encode, text = dataset.text.tokenizer.encode, dataset.text
        ids = [encode(words, add_special_tokens=False) + text.stop_ids[:1] for words in answers]
        self.answers, self.calls, self.image_token_id = iter(ids), [], text.image_token_id

    def features(self, pixel_values):
        self.calls.append(("features", len(pixel_values)))
        return torch.zeros(max(1, len(pixel_values)), 4, 8)

    def forward(self, ids, features, labels):
        right = (labels >= 0).sum()
        return right * 0.5, right

    def generate(self, ids, features, mask, eos_token_id, max_new_tokens, **_):
        self.calls.append(("generate", len(ids)))
        assert (ids == self.image_token_id).sum() == len(features) * 4
        said = [next(self.answers)[:max_new_tokens] for _ in ids]
        width = max(map(len, said))
        return torch.tensor([words + [eos_token_id[0]] * (width - len(words)) for words in said])


def test_an_answer_that_max_new_tokens_ends_is_marked_cut(world):
    dataset, collate = opened(world, [row("What?", "a circle"), row("Where?", "a circle")])
    model = Oracle(dataset, "a circle", "a circle and a square and a lion")
    _, told = results(model, dataset, collate, max_new_tokens=8)
    assert [a["right"] for a in told] == [True, False]
    assert [a.get("cut") for a in told] == [None, True]


def test_a_picture_is_seen_once_for_all_questions_about_it(world, monkeypatch):
    """Of one row or of many; and questions are asked as many at a time as there may be rows."""
    rows = json.loads((world / "rows.json").read_text())
    rows += [row(f"Question {i}?", "no", "1.png") for i in range(6)]
    rows += [row("What differs?", "no", "1.png", "2.png"), row("Hello?", "no")]
    dataset, collate = opened(world, rows)
    decode, decoded = data.decode_picture, []
    note = lambda content, name="": decoded.append(name) or decode(content, name)  # noqa: E731
    monkeypatch.setattr(data, "decode_picture", note)
    model = Oracle(dataset, *["no"] * 32)
    results(model, dataset, collate, batch_size=8)
    seen = [n for what, n in model.calls if what == "features"]
    names = {
        tuple(data.parse_record(record)[1])
        for record in map(dataset.records.__getitem__, range(20))
    }
    assert sum(seen) == len(decoded) <= sum(map(len, names))
    assert [n for what, n in model.calls if what == "generate"] == [8, 8, 8, 8]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_all_rows_in_equally_many_batches(world, world_size):
    rows = [row("What?", "no", *[f"{i % 7}.png"] * (i % 3 > 0)) for i in range(40)]
    dataset, _ = opened(world, rows)
    for size in (1, 3, 16):
        engines = [OneProcess() for _ in range(world_size)]
        for rank, engine in enumerate(engines):
            engine.rank, engine.world = rank, world_size
        plans = [evaluate.plan(dataset, size, engine) for engine in engines]
        assert len({len(plan) for plan in plans}) == 1
        batches = [batch for plan in plans for batch in plan]
        assert all(0 < len(batch) <= size for batch in batches)
        asked = sorted(i for batch in batches for i in batch if i >= 0)
        assert asked == list(range(40))


def test_only_the_first_rows_are_asked_about(world):
    dataset, collate = opened(world, [row("What?", "no", f"{i}.png") for i in range(5)])
    metrics, told = results(Oracle(dataset, *["no"] * 3), dataset, collate, eval_samples=3)
    assert [a["row"] for a in told] == [0, 1, 2] and metrics["eval_exact_match"] == 1
    metrics, told = results(Oracle(dataset), dataset, collate, eval_samples=0)
    assert told == [] and "eval_exact_match" not in metrics and metrics["eval_loss"] == 0.5


def test_each_kind_of_question_has_its_line(world, capsys):
    rows = [row("What?", "no", kinds=["colour"]), row("What?", "no", kinds=["size"])]
    rows += [row("What?", "no", kinds=["colour"]), row("What?", "no", kinds=["one of", "two"])]
    rows += [row("What?", "no", answers=answers) for answers in (["no"] * 4, ["no"] * 3, "no", 7)]
    rows += [row("What?", "no", answers=[{"answer": "no"}] * 10, kinds="colour")]
    rows[0]["conversations"] *= 2  # two questions, one kind: not what ours means
    dataset, collate = opened(world, rows)
    said = ["no", "no", "yes", "no", "no", "yes", "no", "no", "no", "no"]
    metrics, told = results(Oracle(dataset, *said), dataset, collate, batch_size=16)
    assert [a.get("kind") for a in told] == [None, None, "size", "colour"] + [None] * 6
    assert metrics["eval_exact_match/size"] == 0 and metrics["eval_exact_match/colour"] == 1
    assert [a["vqa_accuracy"] for a in told if "vqa_accuracy" in a] == [0]
    report.show_evaluation(metrics, told)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 0: validation loss 0.5000, token accuracy 100.0%")
    assert printed[2].split() == "colour 1 questions: exact match 100.0%".split()
    assert "  What? > yes (not no)" in printed and max(map(len, printed)) <= 80


def test_the_lines_of_the_docstring_run(world, monkeypatch):
    lines = re.search(r"    model = open_model.*", evaluate.__doc__, re.S)[0]
    names = {**vars(evaluate), "folder": world / "llava", "images": world / "images"}
    names["rows"] = world / "rows.json"
    exec("if True:\n" + lines, names)
    assert len(names["answers"]) == 24


# --- the best model of a run ---


@pytest.fixture(scope="session")
def overfitting(world, tmp_path_factory):
    """Flags of a run whose validation loss turns up: first it learns how answers look, which helps, then to be sure of
    words that are other ones in the validation rows. These have ten people's answers, as OK-VQA's.
    """
    root = tmp_path_factory.mktemp("overfitting")
    asked = "What is it?\nAnswer the question using a single word or phrase."
    for name, shape in (("train", "circle"), ("validation", "square")):
        rows = []
        for i in range(12):
            people = ["the red circle"] * (i % 6) + ["Red circle!"] * (i % 2) + ["square"] * 10
            rows.append(row(asked, f"A red {shape}.", f"{i}.png", id=i, answers=people[:10]))
        (root / f"{name}.json").write_text(json.dumps(rows))
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


def test_validation_loss_turns_up_and_the_best_is_kept(world, tmp_path, overfitting, overfitted):
    out, output = overfitted
    evaluations = evaluations_of(out)
    losses = [m["eval_loss"] for m in evaluations]
    best = losses.index(min(losses))
    assert 0 < best and len(losses) == best + 1 + 3 and evaluations[-1]["step"] < 60
    assert losses_of(out)[-1] < losses_of(out)[2 * best - 1]  # it overfits
    assert f"best at step {2 * best}: validation loss {min(losses):.4f}" in output
    assert f"{losses[0] - min(losses):.4f} below the first" in output
    assert f"{losses[-1] - min(losses):.4f} below the last" in output
    assert f"--model_name_or_path {out}/best" in output
    for folder, m in (("best", evaluations[best]), ("final", evaluations[-1])):
        status, _, error = evaluated(
            world,
            tmp_path / folder,
            model_name_or_path=out / folder,
            validation_data_path=overfitting["validation_data_path"],
            max_new_tokens=16,
        )
        assert status == 0, error
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


def test_the_best_model_and_patience_survive_a_kill(world, tmp_path, overfitting, overfitted):
    """Of SIGKILL, between two evaluations. The log of a run has whole lines of 80 columns."""
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
    assert process.wait() == -signal.SIGKILL and checkpoint.checkpoints(tmp_path / "b")
    log = b"".join(log).decode()
    assert max(len(line) for line in log.split("\n")) <= 80, log
    assert "\r" not in log and b"\r" not in (tmp_path / "stderr").read_bytes()
    again = overfitting | {"resume_from_checkpoint": "latest"}
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
    status, _, error = evaluated(
        world,
        tmp_path / "b",
        adapter=best,
        validation_data_path=overfitting["validation_data_path"],
    )
    assert status == 0, error
    losses = [m["eval_loss"] for m in evaluations_of(tmp_path / "a")]
    assert evaluations_of(tmp_path / "b")[0]["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    named = best if losses[-1] > min(losses) else best.parent / "final"
    assert f"--adapter {named}" in output


# --- the command, and what can be wrong ---


def test_without_validation_rows_nothing_is_evaluated(world, tmp_path):
    assert run(world, tmp_path / "a", eval_steps=1, max_steps=2)[0] == 0
    assert not evaluations_of(tmp_path / "a") and not (tmp_path / "a" / "best").exists()


def test_bad_rows_stop_an_evaluation_or_are_skipped(world, tmp_path):
    """Where all are bad, there is nothing to skip to."""
    rows = [row("What?", "no", "missing.png"), row("What?", "no", "1.png")]
    for name, some in (("one", rows), ("all", rows[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    status, _, error = evaluated(world, None, validation_data_path=tmp_path / "one.json")
    assert status == 2 and error.count("\n") == 1 and "one.json: row 0" in error
    flags = {"on_bad_record": "skip", "output_dir": tmp_path / "out"}
    status, _, error = evaluated(world, None, validation_data_path=tmp_path / "one.json", **flags)
    assert status == 0 and error.count("skipped: ") == 1
    told = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    assert [a["row"] for a in told] == [1]
    for command in (evaluated, run):
        flags = {"validation_data_path": tmp_path / "all.json", "on_bad_record": "skip"}
        status, _, error = command(world, tmp_path / command.__name__, **flags)
        assert status == 2 and error.endswith("all.json: none of its rows can be used\n")


def test_wrong_calls_are_one_line_and_write_nothing(world, tmp_path, monkeypatch):
    (tmp_path / "held").mkdir()
    (tmp_path / "nan").mkdir()
    for path in (world / "llava").iterdir():
        (tmp_path / "nan" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"][0] = math.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    for out, flags, says in (
        ("held", {}, "exists already"),
        ("out", {"model_name_or_path": tmp_path / "none"}, "no such folder"),
        ("out", {"adapter": tmp_path / "held"}, "held"),
        ("out", {"image_folder": None}, "--image_folder"),
        ("out", {"model_name_or_path": tmp_path / "nan"}, "the loss on its rows is nan"),
    ):
        status, _, error = evaluated(world, tmp_path / out, **flags)
        assert status == 2 and error.count("\n") == 1 and says in error
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def forward(*_, error=error):
            raise error

        monkeypatch.setattr(llava.Llava, "forward", forward)
        status, _, error = evaluated(world, tmp_path / "out")
        assert status == 2 and "in an evaluation: try --per_device_eval_batch_size 8" in error
    monkeypatch.setattr(llava.Llava, "forward", lambda *_: 1 / torch.zeros(2)[5])
    with pytest.raises(IndexError):
        evaluated(world, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "held").iterdir())
