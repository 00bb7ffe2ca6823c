"""The commands around training: toy data, check, OK-VQA, build, chat, merge."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (
    ASKED,
    HERE,
    LLAVA_HF,
    QUESTION,
    SENTENCES,
    SMALL,
    TOKENIZERS,
    VISION,
    adapt,
    built,
    edit,
    okvqa_argv,
    parts,
    refused,
    saved,
    small_tokenizer,
    tensors_of,
    theirs,
    tiny_llava,
    write,
    write_vqa,
)
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    ViTConfig,
)

import data
import lora
import model as llava
import okvqa
import toy as world
from data import IMAGE


def test_tokenizer_that_would_change_when_saved_is_refused(tmp_path):  # traps 12, 45
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        tokenizer.save_pretrained(tmp_path / name)
        saved, image_token_id = llava.add_image_token(
            tmp_path / name, tmp_path / f"{name} with image"
        )
        for text in ("A frog. </s>USER: x\n\ny", f"{IMAGE}\nWhat <|im_end|>\n is  it?"):
            assert saved(text).input_ids == tokenizer(text).input_ids
        assert (
            saved.convert_tokens_to_ids(IMAGE)
            == image_token_id
            == tokenizer.convert_tokens_to_ids(IMAGE)
        )


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert world.main(["data", "--out", str(folder / "a"), "--scenes", "200"]) == 0
    return folder / "a"


def test_toy_data_is_a_function_of_its_seed(toy, tmp_path, monkeypatch):
    for name, seed in (("again", 0), ("other", 1)):
        assert (
            world.main(
                ["data", "--out", str(tmp_path / name), "--scenes", "200", "--seed", str(seed)]
            )
            == 0
        )
        monkeypatch.setattr(Image.Image, "save", lambda *args, **options: None)  # the texts will do
    files = lambda folder: {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }  # noqa: E731
    assert files(tmp_path / "again") == files(toy)
    assert all(content != files(toy)[name] for name, content in files(tmp_path / "other").items())


def test_toy_data_keeps_its_rules(toy):
    sets = {
        path.stem: json.loads(path.read_text())
        for path in toy.glob("*.json")
        if path.stem != "baseline"
    }
    for rows in sets.values():
        assert len({r["id"] for r in rows}) == len(rows)
        for r in rows:
            names = data.parse_record(r)[1]
            assert all((toy / "images" / name).is_file() for name in names)
    train, held_out = sets["train"], sets["train_validation"]
    asked = Counter(kind for r in train for kind in r["kinds"])
    for kind in ("colour", "shape", "size", "position", "number"):
        answers = Counter(
            t["value"]
            for r in train
            for k, t in zip(r["kinds"], r["conversations"][1::2])
            if k == kind
        )
        assert asked[kind] >= 0.12 * asked.total() and len(answers) >= 4
        assert max(answers.values()) < 1.6 * answers.total() / len(answers)  # equally likely
    pictures = Counter(len(data.image_list(r)) for r in train)
    assert pictures[2] >= 0.1 * len(train) and pictures[0] > 0 and pictures[1] > len(train) / 2
    assert all(not data.image_list(r) for r in sets["reading"]) and all(
        len(data.image_list(r)) == 1 for r in sets["captions"]
    )
    files = lambda rows: {name for r in rows for name in data.image_list(r)}  # noqa: E731
    assert sum(len(r["kinds"]) for r in held_out) >= 500 and not files(
        train + sets["captions"]
    ) & files(held_out)


def test_okvqa_rows_are_the_raw_files_and_no_picture_is_on_both_sides(
    tmp_path,
):  # traps 1, 2, 3, 33
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


def test_okvqa_writes_the_same_bytes_whatever_the_hash_seed(tmp_path):  # trap 2
    argv = [*write_vqa(tmp_path, "train2014", ASKED), "--val_fraction", "0.4"]
    for out, seed in (("a", "0"), ("b", "1")):
        assert okvqa.main([*argv, "--out", str(tmp_path / out), "--seed", seed]) == 0
    again = [sys.executable, HERE / "data.py", *argv, "--out", tmp_path / "again"]
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
        d / "train2014_annotations.json", lambda c: c["annotations"][16].update(answers=[])
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
    "--image_folder .*coco: no such folder or .zip": lambda d: shutil.rmtree(d / "coco"),
    "--out .*out: exists already": lambda d: (d / "out").mkdir(),
    "0 questions to train on and 20": "--val_fraction 1",
    "20 questions to train on and 0": "--val_fraction 0.01",
    "20 questions to train on and 0.* -0.3": "--val_fraction -0.3",
    "20 questions to train on and 0.* -inf": "--val_fraction=-inf",
    "not questions as .*OverflowError": lambda d: change_json(
        d / "train2014_questions.json", lambda c: c["questions"][3].update(image_id=1e999)
    ),
    "--questions and --annotations take one file each, or two": "--annotations a b c",
}


@pytest.mark.parametrize("says", VQA_FAULTS)
def test_faulty_raw_files_are_one_line_and_nothing_is_written(tmp_path, capsys, says):
    argv, fault = write_vqa(tmp_path, "train2014", ASKED), VQA_FAULTS[says]
    more = fault.split() if isinstance(fault, str) else fault(tmp_path) and []
    before = sorted(tmp_path.rglob("*"))
    assert okvqa.main([*argv, "--out", str(tmp_path / "out"), *(more or [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and re.search(says, err), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "family, tied, spare_rows",
    [("llama", False, 0), ("llama", True, 70), ("qwen2", True, 0), ("qwen2", False, 70)],
)
def test_image_is_one_new_token_and_embeddings_grow_only_for_it_and_never_shrink(
    tmp_path, family, tied, spare_rows
):  # traps 12, 13
    vision, text = parts(tmp_path, family, tied, spare_rows)
    model = llava.build(vision, text, tmp_path / "llava", version="v1")
    before, after = tensors_of(text), tensors_of(tmp_path / "llava")
    tokenizer, old = AutoTokenizer.from_pretrained(tmp_path / "llava"), small_tokenizer(family)
    assert tokenizer("<image>", add_special_tokens=False).input_ids == [len(old)]
    assert model.config.image_token_id == len(old) and (llava.HEAD in after) == (not tied)
    for name in {llava.EMBEDDINGS, llava.HEAD} & set(after):
        rows, grown = before[name.removeprefix("language_model.")], after[name]
        assert torch.equal(grown[: len(rows)], rows)
        assert len(grown) == (len(rows) if spare_rows else 64 * (len(old) // 64 + 1))
        mean = rows.mean(0).expand(len(grown) - len(rows), -1)
        torch.testing.assert_close(grown[len(rows) :], mean)
    for sentence in (*SENTENCES[:3], "  two  spaces\n\nand  lines ", "ünï 数 🙂", "USER: x </s>y"):
        assert tokenizer(sentence).input_ids == old(sentence).input_ids


@pytest.mark.parametrize(
    "family, tokens, pad",
    [
        ("llama", {}, "<unk>"),
        ("llama", {"pad_token": "</s>"}, "</s>"),
        ("llama", {"unk_token": None}, "</s>"),
        ("qwen2", {}, "<|endoftext|>"),
    ],
)
def test_built_folders_name_pad_and_end_tokens_and_one_template(tmp_path, family, tokens, pad):
    folder = built(tmp_path, family, **tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, generation, more = (
        json.loads((folder / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert tokenizer.pad_token == pad and config["pad_token_id"] == tokenizer.pad_token_id
    assert generation == {
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    content = [[{"type": "image"}, {"type": "text", "text": QUESTION}], f"<image>\n{QUESTION}"]
    as_parts, as_string = (
        tokenizer.apply_chat_template([{"role": "user", "content": c}], tokenize=False)
        for c in content
    )
    assert as_parts == as_string and QUESTION in as_string and "chat_template" not in more


def test_a_saved_folder_holds_one_chat_template(tmp_path):
    folder, old = built(tmp_path), {"chat_template": "{{ 'an old one' }}"}
    edit(folder / "tokenizer_config.json", **old)
    edit(folder / "processor_config.json", **old)
    (folder / "chat_template.json").write_text(json.dumps(old))
    new, chat_template = tmp_path / "new", "{{ 'new' }}"
    llava.save_pretrained(llava.from_pretrained(folder), new, folder, chat_template)
    assert not any("an old one" in f.read_text() for f in new.iterdir() if "json" in f.suffix)
    for reader in (AutoTokenizer, AutoProcessor):
        assert reader.from_pretrained(new).chat_template == chat_template


def test_chat_prints_the_greedy_answer_alone_whatever_the_folder_suggests(tmp_path, capsys):
    folder, picture = built(tmp_path), tmp_path / "a.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    image.save(picture)
    reference, processor = theirs(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    new = reference.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=8,
        suppress_tokens=[reference.config.image_token_id],
    )
    new = new[0, inputs["input_ids"].shape[1] :]
    suggested = dict(do_sample=True, temperature=9.0, repetition_penalty=3.0, top_k=5)
    edit(folder / "generation_config.json", **suggested)
    capsys.readouterr()
    assert (
        llava.main(
            [
                "chat",
                "--model_name_or_path",
                str(folder),
                "--max_new_tokens",
                "8",
                "--image",
                str(picture),
                "--prompt",
                QUESTION,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out == processor.decode(new, skip_special_tokens=True).strip() + "\n" != "\n"


def test_chat_with_a_published_folder_whose_template_ends_no_answer_takes_a_version(
    tmp_path, capsys
):
    folder = built(tmp_path)
    (folder / "chat_template.jinja").write_text(LLAVA_HF)
    ask = [
        "chat",
        "--model_name_or_path",
        str(folder),
        "--max_new_tokens",
        "4",
        "--prompt",
        QUESTION,
    ]
    assert llava.main(ask) == 2 and "--version v1" in capsys.readouterr().err
    assert llava.main([*ask, "--version", "v1"]) == 0 and capsys.readouterr().out.strip()


def test_chat_remembers_the_conversation_and_survives_a_wrong_line(
    good, tmp_path, capsys, monkeypatch
):
    Image.new("RGB", (30, 50), (9, 99, 199)).save(tmp_path / "a.png")
    seen, reply = [], llava.reply

    def spy(model, text, messages, pixels, *args, **options):
        answer = reply(model, text, messages, pixels, *args, **options)
        seen.append(([m["content"] for m in messages], len(pixels), answer))
        return answer

    monkeypatch.setattr(llava, "reply", spy)
    lines = [
        "hello",
        f"/image {tmp_path}/none.png",
        f"/image {tmp_path}/a.png",
        "What is it?",
        "one <image> too many",
        "and now?",
        "",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    capsys.readouterr()
    assert llava.main(["chat", "--model_name_or_path", str(good[0]), "--max_new_tokens", "4"]) == 0
    (a, b, c), (out, err) = (answer for _, _, answer in seen), capsys.readouterr()
    asked = ["hello", a, "<image>\nWhat is it?", b, "and now?"]
    assert [s[:2] for s in seen] == [(asked[:1], 0), (asked[:3], 1), (asked, 1)]
    assert a in out and b in out and c in out and "none.png" in err and err.count("\n") == 3


@pytest.mark.parametrize(
    "config, more",
    [
        (Gemma2Config, {"head_dim": 8, "initializer_range": 0.02}),
        (CohereConfig, {}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (PhiConfig, {}),
    ],
)
def test_language_models_whose_logits_are_no_plain_linear_are_refused(
    tmp_path, capsys, config, more
):
    vision, text = parts(tmp_path)
    config = config(**dict(SMALL, **more), num_key_value_heads=2, vocab_size=400, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(text)
    assert config.model_type in refused(
        capsys,
        "build",
        "--vision_tower",
        vision,
        "--language_model",
        text,
        "--out",
        tmp_path / "out",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "vision"]


def test_commands_refuse_bad_arguments_and_leave_nothing_behind(good, tmp_path, capsys):
    vision, text = parts(tmp_path)
    AutoModel.from_config(ViTConfig(**VISION)).save_pretrained(text / "vit")
    command = ["build", "--vision_tower", vision, "--language_model", text, "--out"]
    new = tmp_path / "a/b"
    assert "exists" in refused(capsys, *command, text)
    assert "mm_projector_type" in refused(capsys, *command, new, "--mm_projector_type", "mlp")
    assert "--vision_tower" in refused(capsys, "build", "--out", new)
    assert "nowhere" in refused(capsys, *command, new, "--vision_tower", tmp_path / "nowhere")
    assert "vit" in refused(capsys, *command, new, "--vision_tower", text / "vit")
    assert "a qwen2; known are" in refused(capsys, *command, new, "--vision_tower", text)
    assert "--tiny" in refused(capsys, *command, new, "--tiny")
    (text / "dangling").symlink_to(text / "nowhere")
    assert "exists" in refused(capsys, *command, text / "dangling")
    (vision / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, *command, new)
    (text / "chat_template.jinja").unlink()
    assert "template" in refused(capsys, *command, new)
    (text / "tokenizer.json").unlink()
    assert "tokenizer" in refused(capsys, *command, new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "vision"]
    (tmp_path / "no.png").write_text("no picture")
    command = ["chat", "--model_name_or_path", good[0], "--prompt", "What is <image>?"]
    assert "<image>" in refused(capsys, *command)
    for flags in (["--temperature", "-1"], ["--temperature", "inf"], ["--top_p", "0"]):
        assert "a temperature is 0, or from 0.01 to 100" in refused(capsys, *command, *flags)
    assert "no.png" in refused(capsys, *command, "--image", tmp_path / "no.png")
    assert "gone.png" in refused(capsys, *command, "--image", tmp_path / "gone.png")
    assert "no/such" in refused(capsys, "chat", "--model_name_or_path", "no/such")


def test_the_merge_command(tmp_path, capsys):
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    adapt(model)
    saved(model, tmp_path / "adapter", tmp_path / "base")
    flags = {"--model_name_or_path": "base", "--adapter": "adapter", "--out": "out"}

    def run(*more, **changed):
        words = flags | {f"--{k}": v for k, v in changed.items()}
        argv = ["merge"] + [w for k, v in words.items() for w in (k, str(tmp_path / v))]
        capsys.readouterr()
        code = lora.main(argv + list(more))
        return code, capsys.readouterr().err

    message = f"error: {tmp_path}/adapter was not trained over 4 bits: leave --dequantize out\n"
    assert run("--dequantize") == (2, message)
    assert run(adapter="none")[0] == 2 and run(model_name_or_path="none")[0] == 2
    assert not (tmp_path / "out").exists()
    assert run("--dequantize", "False")[0] == 0
    code, message = run()
    assert code == 2 and message.count("\n") == 1 and "out exists" in message
