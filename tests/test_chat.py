"""chat.py: one answer alone, and a conversation, in a terminal too."""

import io
import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import HERE, LLAVA_HF, QUESTION, built, edit, refused, theirs
from transformers import AutoProcessor

import chat
import model as llava
from data import IMAGE, ChatText, PictureTransform

# What Qwen3's does: earlier answers lose what was thought, and the last one gets an empty thought.
QWEN3 = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role != 'assistant' -%}{{ message.content }}"
    "{%- else -%}{{ '<think>\n\n</think>\n\n' if loop.last else '' }}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


@pytest.fixture
def picture(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(content).save(tmp_path / "a b.png")
    return tmp_path / "a b.png"


# --- one answer ---


def test_a_question_without_a_picture_is_the_language_models(tmp_path):
    folder = built(tmp_path)
    model, text = llava.from_pretrained(folder).eval(), ChatText(llava.open_tokenizer(folder))
    messages = [{"role": "user", "content": QUESTION}]
    answer = chat.reply(model, text, messages, [], max_new_tokens=8)
    ids = torch.tensor([text.ids_and_labels(messages, prompt=True)[0]])
    alone = theirs(folder).model.language_model, theirs(folder).lm_head
    for _ in range(8):
        hidden = alone[0](input_ids=ids).last_hidden_state[:, -1]
        logits = alone[1](hidden)
        logits[:, text.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1].item() in text.stop_ids:
            break
    new = ids[0, -8:] if ids[0, -1].item() not in text.stop_ids else ids[0]
    assert answer and text.tokenizer.decode(new, skip_special_tokens=True).strip().endswith(answer)


def test_the_greedy_answer_alone_whatever_the_folder_suggests(tmp_path, picture, capsys):
    folder = built(tmp_path)
    reference, processor = theirs(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    forbidden = [reference.config.image_token_id]
    new = reference.generate(**inputs, do_sample=False, max_new_tokens=8, suppress_tokens=forbidden)
    new = new[0, inputs["input_ids"].shape[1] :]
    suggested = dict(do_sample=True, temperature=9.0, repetition_penalty=3.0, top_k=5)
    edit(folder / "generation_config.json", **suggested)
    flags = ["--model_name_or_path", str(folder), "--max_new_tokens", "8"]
    capsys.readouterr()
    assert chat.main([*flags, "--image", str(picture), "--prompt", QUESTION]) == 0
    out = capsys.readouterr().out
    assert out == processor.decode(new, skip_special_tokens=True).strip() + "\n" != "\n"


def test_a_template_that_ends_no_answer_takes_a_version(tmp_path, capsys):
    folder = built(tmp_path)
    (folder / "chat_template.jinja").write_text(LLAVA_HF)
    flags = ["--model_name_or_path", str(folder), "--max_new_tokens", "4", "--prompt", QUESTION]
    assert "--version v1" in refused(capsys, chat, *flags)
    assert chat.main([*flags, "--version", "v1"]) == 0 and capsys.readouterr().out.strip()


def test_sampling_takes_temperature_and_top_p(good, capsys):
    flags = ["--model_name_or_path", str(good[0]), "--max_new_tokens", "6", "--prompt", QUESTION]
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        assert chat.main([*flags, "--temperature", "5"]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) > 1
    assert chat.main(flags) == 0
    greedy = capsys.readouterr().out
    assert chat.main([*flags, "--temperature", "5", "--top_p", "0"]) == 0
    assert capsys.readouterr().out == greedy


def test_a_bad_call_is_one_line(good, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no picture")
    flags = ["--model_name_or_path", good[0], "--prompt", "What?"]
    for more, says in (
        (["--prompt", f"What is {IMAGE}?"], f"1 {IMAGE} in the question, 0 shown"),
        (["--temperature", "-1"], "--temperature: -1 is not from 0 to 100"),
        (["--temperature", "inf"], "--temperature: inf is not"),
        (["--top_p", "1.5"], "--top_p: 1.5 is not"),
        (["--max_new_tokens", "0"], "--max_new_tokens: 0 is not"),
        (["--image", tmp_path / "no.png"], "no.png"),
        (["--image", tmp_path / "gone.png"], "gone.png: no such file"),
        (["--model_name_or_path", "no/such"], "no/such"),
        (["--prompt", "long " * 40_000], "tokens, and the language model learnt 32768"),
    ):
        assert says in refused(capsys, chat, *flags, *more)


def test_the_lines_of_the_docstring_run(good):
    folder, pixels = good[0], torch.zeros(3, 28, 28)
    lines = re.findall(r"^    (\w.* = .*)$", chat.__doc__, re.M)
    scope = {**vars(chat), "folder": folder, "pixels": pixels}
    exec("\n".join(lines), scope)
    assert len(lines) == 3 and isinstance(scope["answer"], str)


# --- a conversation ---


@pytest.fixture
def talk(good, monkeypatch, capsys):
    """talk(lines, answers): [(what was said, number of pictures)] of each question, out, err."""

    def talk(lines, answers):
        seen, waiting = [], iter(answers)

        def reply(model, text, messages, pixels, **options):
            text.ids_and_labels(messages, prompt=True)
            seen.append(([message["content"] for message in messages], len(pixels)))
            return next(waiting)

        monkeypatch.setattr(chat, "reply", reply)
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        assert chat.main(["--model_name_or_path", str(good[0])]) == 0
        return seen, *capsys.readouterr()

    return talk


def test_the_conversation_is_remembered_and_wrong_lines_cost_nothing(talk, picture):
    lines = ["hello", "", f"/image {picture.parent}/none.png", f"/image {picture}", "What is it?"]
    lines += [f"one {IMAGE} too many", "/nonsense", "/image", "/help", "and now?"]
    seen, _, err = talk(lines, "abc")
    said = ["hello", "a", f"{IMAGE}\nWhat is it?", "b", "and now?"]
    assert seen == [(said[:1], 0), (said[:3], 1), (said, 1)]
    err = err.splitlines()
    assert "none.png: no such file" in err[1] and f"1 {IMAGE} in the question, 0 shown" in err[2]
    assert err[3] == f"/nonsense: {chat.HELP}" and err[4] == f"/image: {chat.HELP}"
    assert err[0] == err[5] == chat.HELP and len(err) == 6


def test_an_only_picture_goes_first_several_stay(good, monkeypatch):
    tokenizer, asked = llava.open_tokenizer(good[0]), []
    transform = PictureTransform.from_pretrained(good[0])
    conversation = chat.Conversation(good[1], ChatText(tokenizer), transform, {"max_new_tokens": 1})
    generate = good[1].generate

    def spy(ids, *args, **options):
        words = tokenizer.decode(ids[0]).replace(IMAGE * 4, IMAGE)
        asked.append(re.findall(r"user\n(.*?)<\|im_end", words, re.S)[-1])
        return generate(ids, *args, **options)

    monkeypatch.setattr(good[1], "generate", spy)
    for question, count in (
        ("What?", 0),
        ("What?", 1),
        (f"What is {IMAGE} here?", 1),
        ("Compare.", 2),
        (f"Is {IMAGE} like {IMAGE}?", 2),
    ):
        conversation.new = [torch.zeros(3, 28, 28)] * count
        conversation.ask(question)
    expected = ["What?", f"{IMAGE}\nWhat?", f"{IMAGE}\nWhat is  here?"]
    assert asked == [*expected, f"{IMAGE}\n{IMAGE}\nCompare.", f"Is {IMAGE} like {IMAGE}?"]


def test_clear_forgets_words_and_pictures(talk, picture):
    seen, _, _ = talk([f"/image {picture}", "What?", f"/image {picture}", "/clear", "Hi"], "ab")
    assert seen == [([f"{IMAGE}\nWhat?"], 1), (["Hi"], 0)]


def test_control_strings_of_an_answer_do_not_come_back(talk):
    answer = "A<|im_end|> frog <|im_<|im_end|>end|>and <image> so on"
    seen, _, _ = talk(["hello", "and?"], [answer, "b"])
    assert seen[1] == (["hello", "A frog and  so on", "and?"], 0)


def test_later_turns_work_where_a_template_rewrites_answers(good, monkeypatch):
    tokenizer = llava.open_tokenizer(good[0])
    tokenizer.chat_template = QWEN3
    transform = PictureTransform.from_pretrained(good[0])
    conversation = chat.Conversation(good[1], ChatText(tokenizer), transform, {"max_new_tokens": 2})
    conversation.ask("hello")
    conversation.messages[-1]["content"] = "<think>\nhm\n</think>\n\nA frog."
    asked, generate = [], good[1].generate
    monkeypatch.setattr(
        good[1],
        "generate",
        lambda ids, *args, **options: asked.append(ids) or generate(ids, *args, **options),
    )
    conversation.ask("and?")
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nA frog.<|im_end|>\n"
    text += "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked[0][0]) == text


def test_files_are_taken_as_terminals_paste_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b.png", "it's.png", "c.png"):
        (tmp_path / name).touch()
    where = str(tmp_path)
    for pasted, names in (
        (f"{where}/a b.png", ["a b.png"]),
        (f'"{where}/a b.png"', ["a b.png"]),
        (f"'{where}/a b.png'", ["a b.png"]),
        (f"{where}/a\\ b.png", ["a b.png"]),
        (f"{where}/it's.png", ["it's.png"]),
        (shlex.quote(f"{where}/it's.png"), ["it's.png"]),
        ("~/a b.png", ["a b.png"]),
        ("~/c.png", ["c.png"]),
        (f"{where}/a\\ b.png {where}/c.png ", ["a b.png", "c.png"]),
        (f"{where}/no'ne.png", ["no'ne.png"]),
    ):
        found = [Path(name).expanduser() for name in chat.files_in(pasted)]
        assert found == [tmp_path / name for name in names], pasted


# --- in a terminal ---

# Notes what each question is asked with, and answers without end.
DRIVER = """
import itertools, json, sys, time
import chat

def reply(model, text, messages, pixels, streamer, **options):
    with open("seen.jsonl", "a") as file:
        print(json.dumps([[m["content"] for m in messages], len(pixels)]), file=file)
    ids = text.tokenizer("A red circle, a blue square.").input_ids
    streamer.put(text.tokenizer(" ", return_tensors="pt").input_ids)
    for i in itertools.cycle(ids):
        streamer.put(__import__("torch").tensor([i]))
        time.sleep(0.01)

chat.reply = reply
sys.exit(chat.main(sys.argv[1:]))
"""


class Terminal:
    def __init__(self, command, cwd):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": str(HERE), "TERM": "dumb"},
            preexec_fn=take_terminal,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern, seconds=90):
        """What has been shown up to `pattern`, from where the last one ended."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.shown += os.read(self.master, 4096).decode().replace("\r", "")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, keys):
        os.write(self.master, keys.encode())


def take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal


def test_a_conversation_in_a_terminal(good, picture):
    command = [sys.executable, "-c", DRIVER, "--model_name_or_path", str(good[0])]
    terminal = Terminal(command, picture.parent)
    try:
        terminal.wait_for("> $")
        terminal.type('/image "a b.png"\n')
        terminal.wait_for("> $")
        terminal.type("What is it?\n")
        terminal.wait_for("red circle, a blue square.A red")
        terminal.type("\x03")  # ends the answer
        terminal.wait_for("\n> $")
        terminal.type("no, ")
        terminal.wait_for(
            "no, $"
        )  # it reads by now: a Ctrl-C just before would show with the next key
        terminal.type("\x03")  # ends the line
        terminal.wait_for("\n> $")
        terminal.type("and now?\n")
        terminal.wait_for("A red circle")
        terminal.type("\x03")
        terminal.wait_for("\n> $")
        terminal.type("/clear\n")
        terminal.wait_for("> $")
        terminal.type("hallo\x7f\x7f\x7f\x7fello\n")  # the line can be edited
        terminal.wait_for("A red circle")
        terminal.type("\x03")
        shown = terminal.wait_for("\n> $")
        terminal.type("\x04")
        terminal.wait_for("\n")
        assert terminal.process.wait(30) == 0 and "Traceback" not in shown
    finally:
        terminal.process.kill()
    asked = [json.loads(line) for line in (picture.parent / "seen.jsonl").read_text().splitlines()]
    answer = asked[1][0][1]
    assert answer.startswith("A red circle, a blue square.A red")
    what = f"{IMAGE}\nWhat is it?"
    assert asked == [[[what], 1], [[what, answer, "and now?"], 1], [["hello"], 0]]
