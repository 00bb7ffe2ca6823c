"""What must hold, each against something that this project did not write wherever it exists:
transformers' LLaVA and processors, PEFT, plain torch, closed forms. Trap numbers in comments count the
mistakes of earlier LLaVA trainers that a test guards against.

    bash run.sh test            or: python -m pytest test_smoke.py -k text
    bash run.sh test --all      the long ones too
"""

import base64
import contextlib
import copy
import difflib
import fcntl
import functools
import gc
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

import bench
import data
import lora
import model as llava
import train
from data import IGNORE, IMAGE, ChatText, PictureTransform

HERE = Path(train.__file__).parent


# --- data.py ---


# --- tokenizers, made here ---

TEXT = [
    "A chat between a curious user and an assistant. USER: ASSISTANT: What is it? A frog. On a leaf.",
    "system\nuser\nassistant\n\nYou are a helpful assistant. Answer the questions. 12 30 the lion and a cat ",
] * 4
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pad="<|endoftext|>", rstrip=False, vocabulary=None):
    """Like Qwen's: bytes, no start token. `vocabulary` is (ids of pieces, merges), or trained here."""
    bpe = Tokenizer(models.BPE(*vocabulary or ()))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    if not vocabulary:
        bpe.train_from_iterator(TEXT, trainer)
    bpe.add_special_tokens(
        [
            "<|endoftext|>",
            "<|im_start|>",
            AddedToken("<|im_end|>", rstrip=rstrip, normalized=False),
            "<s>",
            "<<s>>",
        ]
    )
    return with_image(
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token=pad)
    )


def trained_pieces():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece reaches over a space
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    saved = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *saved["vocab"]]
    return {p: i for i, p in enumerate(pieces)}, [tuple(m) for m in saved["merges"]]


def sentencepiece(pad, legacy, vocabulary=None):
    """Like Llama's: words with ▁ in front, bytes where there is no piece, <s> at the start."""
    pieces, merges = vocabulary or trained_pieces()
    bpe = Tokenizer(
        models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:  # ▁ in front of every stretch between special tokens
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:  # ▁ in front of the text only
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return with_image(
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token=pad,
        )
    )


def with_image(tokenizer):
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


TOKENIZERS = {
    "bytes": lambda: byte_level(),
    "bytes, pad = eos": lambda: byte_level(pad="<|im_end|>"),
    "bytes, end token swallows newline": lambda: byte_level(rstrip=True),
    "sentencepiece legacy, pad = unk": lambda: sentencepiece("<unk>", legacy=True),
    "sentencepiece, pad = eos": lambda: sentencepiece("</s>", legacy=False),
}


def package_file(package, path):
    """A file inside a public package, which need not be importable; without the package, no test."""
    found = importlib.util.find_spec(package)
    if not found:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / path


def merges_of(ranks):
    """A BPE's merges, from the rank of each of its pieces: a piece is made of any two others."""
    pairs = []
    for piece, rank in ranks.items():
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
        pairs += [(rank, ranks[a], ranks[b], a, b) for a, b in halves]
    return [(a, b) for *_, a, b in sorted(pairs)]


@functools.cache
def qwen_vocabulary():
    """Qwen's 151,643 pieces, as tiktoken writes them: in base 64, each with its rank."""
    lines = package_file("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, lines)}
    letters = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # GPT-2's: a letter for each byte
    letter = dict(zip(letters, map(chr, letters)))
    letter.update(zip((b for b in range(256) if b not in letter), map(chr, range(256, 512))))
    vocabulary = {"".join(map(letter.get, piece)): rank for piece, rank in ranks.items()}
    return vocabulary, merges_of(vocabulary)


@functools.cache
def mistral_vocabulary():
    """Mistral's 32,000 pieces, Llama's kind, from sentencepiece's file: field 1 holds piece and score."""
    model = package_file("mistral_common", "data/tokenizer.model.v1").read_bytes()
    pieces, at = [], 0
    while (
        model[at : at + 1] == b"\n"
    ):  # a piece: its length, and b"\n", length, text, b"\x15", score
        size, text = model[at + 1], model[at + 3]
        assert size < 128 and model[at + 2] == 10
        pieces.append(model[at + 4 : at + 4 + text].decode())
        at += 2 + size
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merged = {p: i for p, i in vocabulary.items() if i > 258}  # behind <unk>, <s>, </s> and bytes
    return vocabulary, merges_of(merged)


REAL = {
    "Qwen": lambda: byte_level(vocabulary=qwen_vocabulary()),
    "Mistral, pad = unk": lambda: sentencepiece("<unk>", False, mistral_vocabulary()),
    "Mistral legacy, pad = eos": lambda: sentencepiece("</s>", True, mistral_vocabulary()),
}


@pytest.fixture(
    params=[*TOKENIZERS, *(pytest.param(name, marks=pytest.mark.long) for name in REAL)]
)
def tokenizer(request):
    return {**TOKENIZERS, **REAL}[request.param]()


@pytest.mark.long
def test_real_vocabularies_have_the_known_ids():
    qwen = REAL["Qwen"]()
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_start|>assistant"
    assert qwen(text).input_ids == [
        *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198),
        *(151644, 872, 198, 151644, 77091),
    ]
    mistral = REAL["Mistral, pad = unk"]()
    assert mistral("Hello, my name is").input_ids == [1, 22557, 28725, 586, 1141, 349]


# --- templates ---

SYSTEMS = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    "llava_llama_2": "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.",
    "chatml_direct": "Answer the questions.",
    "qwen": "You are a helpful assistant.",
}
# facts.md B3: what stands before the conversation, its turns, an answer as it is rendered
FORMATS = {
    "v1": ("{bos}{system} ", "USER: {q} ASSISTANT:", " {a}{eos}", ""),
    "llava_llama_2": ("", "{bos}[INST] {system}{q} [/INST]", " {a} {eos}", ""),
    "chatml_direct": (
        "{bos}<|im_start|>system\n{system}<|im_end|>",
        "<|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n",
        "{a}<|im_end|>",
        "",
    ),
    "qwen": (
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "{a}<|im_end|>",
        "\n",
    ),
}
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = "{% for message in messages %}" + QWEN[QWEN.index("{{'<|im_start|>'") :]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
DROPS_SYSTEM = CHATML.replace("%}{{'", "%}{% if message.role != 'system' %}{{'", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)
WITH_BOS = "{{ bos_token }}" + CHATML
PARTS = CHATML.replace("message['content']", "message['content'][0]['text']")
NO_PREFIX = CHATML.replace("assistant\n", "assistant\n<think>")
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def chat_text(tokenizer, version):
    if version not in data.VERSIONS:
        tokenizer.chat_template, version = QWEN if version == "qwen" else version, "own"
    text = ChatText(tokenizer, version)
    tokenizer.chat_template = text.chat_template  # as in a folder that we write
    return text


def render(version, tokenizer, turns, system=None):
    """(prompts, answers): the text as facts.md B3 has it, in pieces; the last prompt is what follows the last answer."""
    start, prompt, answer, behind = FORMATS[version]
    system, prompts, answers = SYSTEMS[version] if system is None else system, [], []
    if version == "llava_llama_2":
        system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    words = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token}
    for i, (q, a) in enumerate(turns):
        head = (start if i == 0 else behind) + prompt
        prompts.append(head.format(q=q, system=system if i == 0 else "", **words))
        answers.append(answer.format(a=a, **words))
    return prompts + [behind], answers


def messages_of(turns, system=None):
    messages = [
        {"role": r, "content": t} for turn in turns for r, t in zip(("user", "assistant"), turn)
    ]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def plain_ids(tokenizer, text):
    """The tokenizer's own ids for a whole string, with one start token where the model has one."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer(text).input_ids


def decode(tokenizer, ids):
    lead = tokenizer(
        "a", add_special_tokens=False
    ).input_ids  # its decoder drops the text's first space
    return tokenizer.decode(lead + ids, clean_up_tokenization_spaces=False).removeprefix("a")


def supervised(text, messages):
    """The decoded stretches of labels, one for each answer."""
    ids, labels = text.ids_and_labels(messages)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    spans = [[]]
    for label in labels:
        spans += [[]] if label == IGNORE and spans[-1] else []
        spans[-1] += [label] if label != IGNORE else []
    return [decode(text.tokenizer, span) for span in spans if span]


TURNS = [
    (f"{IMAGE}\nWhat is it?", "A frog."),
    ("Where?", "On a leaf, at 12:30."),
    ("Sure?", "Yes\n\n1. I am"),
]


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("system", [None, "Be short.", ""])
def test_ids_are_the_tokenizers_own_and_labels_the_answers(
    tokenizer, version, system
):  # traps 4, 6, 7, 8, 30, 42, 44, 46; troubles 1, 18
    text = chat_text(tokenizer, version)
    for n in (1, 2, 3):
        prompts, answers = render(version, tokenizer, TURNS[:n], system)
        messages = messages_of(TURNS[:n], system)
        whole = "".join(p + a for p, a in zip(prompts, answers + [""]))
        assert text.render(messages) == whole
        ids, labels = text.ids_and_labels(messages)
        assert ids == plain_ids(tokenizer, whole)
        if (
            tokenizer.bos_token and version != "llava_llama_2"
        ):  # that one has a start token in each turn
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert supervised(text, messages) == answers
        for k in range(
            n
        ):  # what is asked at inference is what was trained on, and what anyone else feeds
            asked = messages[: len(messages) - 2 * (n - k) + 1]
            prompt = text.ids_and_labels(asked, prompt=True)[0]
            assert (
                prompt == ids[: len(prompt)]
                and labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]
            )
            theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
            assert prompt in (theirs, text.bos + theirs)


MISTRAL = (  # a start token inside, no system turn
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (  # a start token in each turn, contents stripped
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [QWEN, CHATML, NO_SYSTEM, WITH_BOS, PARTS, MISTRAL, LLAMA_2],
    ids="qwen chatml no_system with_bos parts mistral llama_2".split(),
)
def test_a_folders_own_template_gives_the_ids_that_it_gives_anyone(
    tokenizer, template
):  # traps 4, 6, 44, 46, 47; troubles 1, 18
    if tokenizer.bos_token is None:
        tokenizer.bos_token = "<s>"  # has one, as Qwen2's may, and never puts it in front by itself
    text = chat_text(tokenizer, template)
    tokenizer.chat_template = template  # as anyone else would call it

    def theirs(messages, prompt):
        if template == PARTS:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt).input_ids
        return (
            ids if ids[0] == tokenizer.bos_token_id else text.bos + ids
        )  # one start token, always

    for n in (1, 2, 3):
        messages = messages_of(TURNS[:n])
        ids, labels = text.ids_and_labels(messages)
        assert ids == theirs(messages, False)
        answers = [s.strip() for s in supervised(text, messages)]
        ends = {a[len(said) :].strip() for a, (_, said) in zip(answers, TURNS[:n], strict=True)}
        assert [a.startswith(said) for a, (_, said) in zip(answers, TURNS)] == [True] * n
        assert len(ends) == 1 and ends <= {"<|im_end|>", "</s>"}
        prompt = text.ids_and_labels(messages[:-1], prompt=True)[0]
        assert prompt == theirs(messages[:-1], True) == ids[: len(prompt)]
        assert labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]


def test_plain_is_picture_and_caption_without_end_token(tokenizer):  # trap 37
    text = ChatText(tokenizer, "plain")
    ids, labels = text.ids_and_labels(messages_of(TURNS[:1]))
    assert ids == tokenizer(f"{IMAGE}A frog.\n").input_ids and tokenizer.eos_token_id not in ids
    assert [a.lstrip(" ") for a in supervised(text, messages_of(TURNS[:1]))] == [
        "A frog.\n"
    ]  # legacy: a space in front
    assert text.chat_template is None and ids[-1] in text.stop_ids
    for wrong in (
        messages_of(TURNS[:2]),
        messages_of(TURNS[1:2]),
        messages_of(TURNS[:1], "Be short."),
    ):
        with pytest.raises(ValueError, match="--version plain takes one human and one gpt turn"):
            text.ids_and_labels(wrong)


@pytest.mark.parametrize(
    "template",
    [
        QWEN,
        CHATML,
        NO_SYSTEM,
        DROPS_SYSTEM,
        WITH_BOS,
        PARTS,
        {"default": CHATML, "tool_use": "{{ 1 }}"},
        *SYSTEMS,
    ],
)
def test_saved_template_takes_strings_and_parts_with_equal_ids(template, tmp_path):
    tokenizer = sentencepiece("<unk>", legacy=False)
    text = chat_text(tokenizer, template)
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    for content in (TURNS[0][0], question):
        theirs = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        ours = text.ids_and_labels(messages_of(TURNS)[:1], prompt=True)[0]
        assert ours in (theirs.input_ids, text.bos + theirs.input_ids)
        assert ours.count(1) == 1 == ours.count(text.image_token_id)
    once = tokenizer.chat_template
    assert ChatText(tokenizer).chat_template == once  # a folder that we wrote is taken as it is
    answers = [a for _, a in TURNS]
    assert [
        s.strip().removesuffix("</s>").removesuffix("<|im_end|>").strip()
        for s in supervised(text, messages_of(TURNS))
    ] == answers


@pytest.mark.parametrize(
    "template, error",
    [
        (LLAVA_HF, "puts no end token after an answer.* --version v1"),
        (NO_PREFIX, "generation prompt does not begin .* --version v1"),
        (None, "no chat template: .* --version v1"),
        ("{{ messages[0].content.nothing.at_all }}", "the chat template refuses"),
        ("{{ 1 / 0 }}", "the chat template refuses"),
        (CHATML.replace("message['content']", "message['content'] | replace('A', '')"), "changes an answer"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '</s>' if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
            "{{ 'assistant: ' if add_generation_prompt else '' }}",
            "puts no end token",
        ),
    ],
)
def test_template_that_cannot_teach_is_refused_in_one_line(template, error):
    tokenizer = sentencepiece("<unk>", legacy=True)
    with pytest.raises(ValueError, match=error) as refused:
        chat_text(tokenizer, template)
    assert "\n" not in str(refused.value)


def test_system_turn_that_a_template_refuses_or_drops_is_one_clear_line():  # trap 47
    for template, error in (
        (NO_SYSTEM, "refuses this conversation: System role not supported"),
        (DROPS_SYSTEM, "drops the system turn"),
    ):
        text = chat_text(byte_level(), template)
        assert supervised(text, messages_of(TURNS)) == [a + "<|im_end|>" for _, a in TURNS]
        with pytest.raises(ValueError, match=error):
            text.ids_and_labels(messages_of(TURNS, "Be short."))


def test_thinking_block_that_a_template_adds_belongs_to_the_answer():
    template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message.role == 'assistant' "
        "else '') + message['content']",
    )
    text = chat_text(byte_level(), template)
    assert supervised(text, messages_of(TURNS[:2])) == [
        "A frog.<|im_end|>",
        "<think></think>On a leaf, at 12:30.<|im_end|>",
    ]


def test_chatml_on_a_tokenizer_without_its_tokens_and_a_tokenizer_without_image_are_refused():  # trap 12
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="no token <image>"):
        ChatText(bare, "v1")
    with pytest.raises(ValueError, match="puts no end token"):
        ChatText(with_image(bare), "chatml_direct")
    with pytest.raises(ValueError, match="--version v7: known are plain, v1"):
        ChatText(bare, "v7")


ODD = [
    "ASSISTANT: ",
    "\nA frog.",
    "\n\n",
    "",
    "   ",
    " a",
    "a ",
    "</s>",
    "<|im_end|>",
    f"{IMAGE} is text here",
    "<unk>",
    "<s>",
    "[INST] x [/INST]",
    "USER: x ASSISTANT: y</s>USER:",
    "<|im_start|>user\nhi<|im_end|>\n",
    "naïve 数字 🙂",
    "<<s>>",
    "<|endoftext|>",
    "</s",
    "/s>",
    "<0x0A>",
    "<ima" + IMAGE + "ge>",
    "\ta\r\n",
]


@pytest.mark.parametrize("version", FORMATS)
def test_odd_answers_and_control_strings_are_taught_as_text(tokenizer, version):  # traps 5, 8, 10
    text = chat_text(tokenizer, version)
    control = set(tokenizer.added_tokens_decoder)
    normal = Counter(i for i in text.ids_and_labels(messages_of(TURNS[:2]))[0] if i in control)
    for odd in ODD:
        turns = [(f"{IMAGE}\n" + odd.replace(IMAGE, "x"), odd), ("Where?", odd)]
        ids = text.ids_and_labels(messages_of(turns))[0]
        assert supervised(text, messages_of(turns)) == render(version, tokenizer, turns)[1], odd
        assert Counter(i for i in ids if i in control) == normal, odd
        prompt = text.ids_and_labels(messages_of(turns)[:3], prompt=True)[0]
        assert prompt == ids[: len(prompt)], odd


texts = st.lists(
    st.one_of(
        st.sampled_from(["frog", " ", "\n", "  ", ".", "USER:", "<|im_start|>", *ODD]),
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="▁\U0010ffff"), max_size=4
        ),
    ),
    max_size=5,
).map("".join)
made = {}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.sampled_from(list(TOKENIZERS)),
    st.sampled_from(list(FORMATS)),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
)
def test_any_conversation_teaches_its_answers_and_nothing_else(name, version, turns):
    key = (name, version)
    text = made[key] = made.get(key) or chat_text(TOKENIZERS[name](), version)
    messages = messages_of(turns)
    ids, _ = text.ids_and_labels(messages)
    assert supervised(text, messages) == render(version, text.tokenizer, turns)[1]
    assert ids.count(text.image_token_id) == sum(q.count(IMAGE) for q, _ in turns)
    prompt = text.ids_and_labels(messages[:-1], prompt=True)[0]
    assert prompt == ids[: len(prompt)]


def test_text_that_cannot_be_encoded_is_one_clear_error():
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    text = ChatText(
        with_image(
            PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
        ),
        "v1",
    )
    with pytest.raises(ValueError, match="cannot encode a control string"):
        text.ids_and_labels(messages_of([("a", "b </s>")]))
    for text_of_no_character in ("\ud800", "\U0010ffff"):
        with pytest.raises(ValueError, match="no character"):
            chat_text(byte_level(), QWEN).ids_and_labels(messages_of([("a", text_of_no_character)]))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A LLaVA folder as `model.py build --tiny` writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    assert llava.main(["build", "--tiny", "--out", str(folder)]) == 0
    return folder


def test_processor_of_a_folder_gives_the_same_ids_and_pixels(tiny, tmp_path):  # trap 43
    noise(400, 300).save(tmp_path / "a.png")
    parts = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "text", "text": "What is it?"},
    ]
    theirs = AutoProcessor.from_pretrained(tiny).apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    rows = write(tmp_path / "a.json", json.dumps([row([TURNS[0][0], "A frog."], image="a.png")]))
    dataset = data.open_dataset(rows, tmp_path, tiny)
    ours = data.Collator(dataset.image_token_id, 576)([dataset[0]])
    prompt = theirs["input_ids"].shape[1]
    assert (
        ours["input_ids"][:, :prompt].equal(theirs["input_ids"])
        and (ours["labels"][0, :prompt] == IGNORE).all()
    )
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5 and ours["labels"][
        0, prompt
    ] != IGNORE


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


# --- pictures ---


def noise(width, height, mode="RGB"):
    """Smooth shapes and noise, so that a shift by a pixel shows."""
    rng = np.random.default_rng(width * height)
    picture = Image.fromarray(rng.integers(0, 255, (height, width, 4), np.uint8), "RGBA")
    picture = picture if mode == "RGBA" else picture.convert("RGB")
    return picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


SIZES = [(336, 336), (640, 480), (333, 1000), (1001, 337), (1, 1), (2, 7), (335, 337), (50, 900)]
KINDS = ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"]


@pytest.mark.parametrize(
    "size, kind", [*((size, "RGB") for size in SIZES), *(((300, 200), kind) for kind in KINDS)]
)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_equal_transformers(tiny, size, kind, aspect):
    processor = AutoProcessor.from_pretrained(tiny).image_processor
    assert processor.do_pad
    if aspect == "square":
        processor = CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )
    file = encoded(noise(*size, kind), "TIFF" if kind == "CMYK" else "PNG")
    ours = data.PictureTransform(336, MEAN, STD, aspect)(data.decode_picture(file))
    theirs = processor(Image.open(io.BytesIO(file)).convert("RGB"), return_tensors="np")[
        "pixel_values"
    ][0]
    assert ours.shape == (3, 336, 336) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5


def test_padding_has_the_mean_colour_and_square_loses_the_ends():
    red = Image.new("RGB", (672, 336), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 100, 336))
    pad, square = (
        data.PictureTransform(336, MEAN, STD, aspect)(red) for aspect in ("pad", "square")
    )
    background = (np.float32([122, 116, 104]) / 255 - MEAN) / STD
    assert np.allclose(pad[:, 0, 0], background, atol=1e-6) and np.allclose(
        pad[:, 335, 335], background, atol=1e-6
    )
    assert (np.ptp(square, axis=(1, 2)) == 0).all()  # the blue end is gone


@pytest.mark.parametrize("size", [(40_000, 3), (2, 90_000), (1, 60_000)])
def test_extreme_aspect_ratio_costs_no_memory(size, monkeypatch):
    picture, made = data.decode_picture(encoded(Image.new("RGB", size, (250, 250, 250)))), []
    new, resize = Image.new, Image.Image.resize
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *a: made.append(size) or new(mode, size, *a)
    )
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a: made.append(size) or resize(self, size, *a)
    )
    for aspect in ("pad", "square"):
        pixels = data.PictureTransform(336, MEAN, STD, aspect)(picture)
        assert (
            pixels.shape == (3, 336, 336)
            and 0 < pixels[:, 168, 168].mean()
            and abs(pixels).max() < 3
        )
    assert max(wide * high for wide, high in made) <= 2**24


def test_what_is_no_picture_is_one_clear_error():  # trap 32
    bomb = bytearray(encoded(noise(9, 9)))
    bomb[16:24] = struct.pack(">2I", 20_000, 20_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    whole = encoded(noise(300, 300), "JPEG")
    for bad in (
        b"",
        b"no picture",
        whole[:2000],
        bytes(bomb),
        encoded(noise(64, 64))[:-40],
        b"\x89PNG\r\n\x1a\n",
    ):
        with pytest.raises(ValueError, match="picture a.png: not one that can be read") as error:
            data.decode_picture(bad, "a.png")
        assert "\n" not in str(error.value) and "0x" not in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_that_is_packed_as_few_are_says_so(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.png", encoded(noise(9, 9)))
    with pytest.raises(ValueError, match=f"packed by method {method}; zip it with deflate"):
        data.Pictures(tmp_path / "a.zip").read("a.png")


PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "content, error",
    [
        ("[]", "does not say how"),
        ("{", "does not say how"),
        ("[" * 99_999, "does not say how"),
        (PROCESSOR | {"crop_size": 14, "image_mean": [1e999] * 3}, "does not say how"),
        (PROCESSOR | {"crop_size": 14, "image_std": "x"}, "does not say how"),
        (PROCESSOR, "does not say how"),
        (PROCESSOR | {"size": {"longest_edge": 14}}, "does not say how"),
        (PROCESSOR | {"size": {"height": 14, "width": 14}}, "neither padded .* nor cropped"),
        (PROCESSOR | {"crop_size": 14, "do_center_crop": False}, "neither padded .* nor cropped"),
        ({"size": 14}, "no preprocessor_config.json, which"),
    ],
)
def test_processor_files_of_other_kinds_are_refused_in_one_line(tmp_path, content, error):
    content = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        PictureTransform.from_pretrained(tmp_path)


def test_zip_is_read_as_the_folder_is(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    files = {
        "a.png": encoded(noise(30, 20)),
        "deep/b.jpg": encoded(noise(20, 30), "JPEG"),
        "deep/é ü.bin": b"x" * 5000,
    }
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    os.mkfifo(tmp_path / "folder" / "pipe")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
            for name in files:
                archive.write(tmp_path / "folder" / name, name)
        for place in ("folder", "z.zip"):
            pictures = data.Pictures(tmp_path / place)
            assert {name: pictures.read(name) for name in files} == files
            for missing in ("c.png", "deep", "pipe", "/dev/zero", "x" * 5000, "\0"):
                with pytest.raises(FileNotFoundError, match="picture "):
                    pictures.read(missing)
        whole = bytearray((tmp_path / "z.zip").read_bytes())
        far = whole.index(b"PK\1\2") + 42  # in the directory, where the first picture begins
        for at, wrong in ((35, b"\xff" * 20), (60, b"?" * 20), (far, b"\xff\xff\xff\x7f")):
            bad = write(tmp_path / "bad.zip", bytes(whole[:at] + wrong + whole[at + len(wrong) :]))
            with pytest.raises(ValueError, match="picture a.png in .*: damaged"):
                data.Pictures(bad).read("a.png")
    for name, content in {
        "cut.zip": whole[:900],
        "text.zip": b"hello",
        "directory.zip": whole.replace(b"PK\1\2", b"PK\1\3"),
    }.items():
        write(tmp_path / name, bytes(content))
        with pytest.raises(ValueError, match="neither a folder nor a whole .zip"):
            data.Pictures(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such folder or .zip"):
        data.Pictures(tmp_path / "nowhere")


# --- records ---


def row(turns, **more):
    names = ["human", "gpt"]
    return {
        "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)],
        **more,
    }


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


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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


# --- rows and batches ---


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


# --- the order of rows ---


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


# --- commands ---


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


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert data.main(["toy", "--out", str(folder / "a"), "--scenes", "200"]) == 0
    return folder / "a"


def test_toy_data_is_a_function_of_its_seed(toy, tmp_path, monkeypatch):
    for name, seed in (("again", 0), ("other", 1)):
        assert (
            data.main(
                ["toy", "--out", str(tmp_path / name), "--scenes", "200", "--seed", str(seed)]
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


@pytest.fixture
def show(toy, tiny):
    return [
        "show",
        "--model_name_or_path",
        str(tiny),
        "--data_path",
        str(toy / "train.json"),
        "--image_folder",
        str(toy / "images"),
    ]


def test_show_prints_a_row_as_the_model_gets_it(toy, tiny, show, capsys):
    rows = json.loads((toy / "train.json").read_text())
    i = next(i for i, r in enumerate(rows) if len(data.image_list(r)) == 2)
    assert data.main([*show, "--index", str(i), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    dataset = data.open_dataset(toy / "train.json", toy / "images", tiny)
    batch = data.Collator(dataset.image_token_id, 576)([dataset[i]])
    assert printed == {
        "input_ids": batch["input_ids"][0].tolist(),
        "labels": batch["labels"][0].tolist(),
    }
    assert data.main([*show, "--index", str(i)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{IMAGE} x 576") == 2 and f"{len(batch['labels'][0])} tokens" in printed


@pytest.mark.parametrize(
    "argv, error",
    [
        ([], "command"),
        (["paint"], "invalid choice"),
        (["toy"], "--out"),
        (["toy", "--out", "x", "--scenes", "many"], "invalid int"),
        (["toy", "--out", "FILE"], "FILE"),
        (["toy", "--out", "x", "--scenes", "0"], "--scenes 0"),
        (["show"], "--model_name_or_path"),
        (["SHOW", "--version", "v7"], "invalid choice"),
        (["SHOW", "--index", "99999"], "--index 99999"),
        (["SHOW", "--index", "-1"], "--index -1"),
        (["SHOW", "--model_max_length", "500"], "would cut off"),
        (["SHOW", "--data_path", "nowhere.json"], "no such file"),
        (["SHOW", "--image_folder", "nowhere"], "no such folder"),
        (["SHOW", "--model_name_or_path", "nowhere"], "no config.json"),
        (["SHOW", "--version", "plain"], "--version plain takes one"),
        (["SHOW", "--wrong", "1"], "unrecognized"),
    ],
)
def test_bad_call_is_one_line_and_status_2(toy, show, tmp_path, monkeypatch, capsys, argv, error):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "FILE", "")
    rows = json.loads((toy / "train.json").read_text())
    first = next(i for i, r in enumerate(rows) if data.image_list(r) and len(r["kinds"]) > 1)
    argv = [*show, "--index", str(first), *argv[1:]] if argv[:1] == ["SHOW"] else argv
    try:
        status = data.main(argv)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and re.search(error, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


# --- okvqa, check ---


def write_vqa(folder, split, questions, **more):
    """Raw files as OK-VQA and VQAv2 (no raw_answer) have them, of (id, picture, words, answers); and pictures."""
    (folder / "coco" / split).mkdir(parents=True, exist_ok=True)
    asked = [{"image_id": i, "question": q, "question_id": n} for n, i, q, _ in questions]
    given = [
        {
            "image_id": i,
            "question_id": n,
            "question_type": "four",
            "answer_type": "other",
            "confidence": 3,
            "answers": [
                {"answer_id": k + 1, "answer": a, **({"raw_answer": "?"} if n % 2 else {})}
                for k, a in enumerate(answers)
            ],
        }
        for n, i, _, answers in reversed(questions)
    ]
    head = {"info": {}, "data_type": "mscoco", "data_subtype": split, **more}
    write(folder / f"{split}_questions.json", json.dumps({**head, "questions": asked}))
    write(folder / f"{split}_annotations.json", json.dumps({**head, "annotations": given}))
    for i in {i for _, i, _, _ in questions}:
        picture = Image.new("RGB", (64, 48), (i, i, i))
        picture.save(folder / "coco" / split / f"COCO_{split}_{i:012d}.jpg")
    return okvqa_argv(folder, split)


def okvqa_argv(folder, *splits):
    files = [
        [str(folder / f"{split}_{kind}.json") for split in splits]
        for kind in ("questions", "annotations")
    ]
    return [
        "okvqa",
        "--questions",
        *files[0],
        "--annotations",
        *files[1],
        "--image_folder",
        str(folder / "coco"),
    ]


ASKED = [  # 20 questions about 10 pictures
    (
        25_000 + n,
        n % 10,
        f"Was ist {n} 🐸 <s>?",
        ["x", "frog", f"{n}", "été", "été", "frog"] + ["été"] * (n % 2) + ["x"] * (n % 3 == 0),
    )
    for n in range(20)
]


def test_okvqa_rows_are_the_raw_files_and_no_picture_is_on_both_sides(
    tmp_path,
):  # traps 1, 2, 3, 33
    argv = write_vqa(tmp_path, "train2014", ASKED)
    assert data.main([*argv, "--out", str(tmp_path / "a" / "b"), "--val_fraction", "0.3"]) == 0
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
    assert data.main([*argv, "--out", str(tmp_path / "own"), "--val_fraction", "0.3"]) == 0
    shutil.make_archive(str(tmp_path / "coco"), "zip", tmp_path / "coco")
    argv[-1] = str(tmp_path / "coco.zip")
    assert data.main([*argv, "--out", str(tmp_path / "zip"), "--val_fraction", "0.3"]) == 0
    for name in ("train.json", "validation.json"):
        text = (tmp_path / "a/b" / name).read_text()
        assert (tmp_path / "zip" / name).read_text() == text
        assert (tmp_path / "own" / name).read_text() == text.replace("train2014/", "")


def test_okvqa_writes_the_same_bytes_whatever_the_hash_seed(tmp_path):  # trap 2
    argv = [*write_vqa(tmp_path, "train2014", ASKED), "--val_fraction", "0.4"]
    for out, seed in (("a", "0"), ("b", "1")):
        assert data.main([*argv, "--out", str(tmp_path / out), "--seed", seed]) == 0
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
    assert data.main([*argv, "--out", str(tmp_path / "out")]) == 0
    counts = [
        len(json.loads((tmp_path / "out" / f"{n}.json").read_text()))
        for n in ("train", "validation")
    ]
    assert (
        counts == [12, 8]
        and "train.json: 12 questions about 10 pictures" in capsys.readouterr().out
    )
    twice = okvqa_argv(tmp_path, "train2014", "train2014")
    assert data.main([*twice, "--out", str(tmp_path / "twice")]) == 2
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
    assert data.main([*argv, "--out", str(tmp_path / "out"), *(more or [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and re.search(says, err), err
    assert sorted(tmp_path.rglob("*")) == before


def faulty_rows(folder, **options):
    """Rows, a good one and one of each fault, in a .json or .jsonl, and pictures in a folder or .zip."""
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
def test_check_finds_what_training_would_stumble_over(
    tiny, tmp_path, capsys, place, full
):  # traps 32, 33; troubles 20, 21
    rows = write(tmp_path / "rows.json", json.dumps(faulty_rows(tmp_path)))
    shutil.make_archive(str(tmp_path / "p"), "zip", tmp_path / "p")
    argv = [
        "--data_path",
        str(rows),
        "--image_folder",
        str(tmp_path / place),
        "--model_max_length",
        "700",
    ]
    argv += ["--model_name_or_path", str(tiny)]
    assert data.main(["check", *argv, *["--full"] * full]) == 1
    out, err = capsys.readouterr()
    faults = [line for line in out.splitlines() if line.startswith(str(rows))]
    wanted = [
        r"row 2 \(id gone\): picture .*gone.jpg",
        *[r"row 3 \(id 0\): picture cut.jpg: not one that can be read"] * full,
        r"row 4 \(id both\): the row has 1\d+ tokens, and .* would cut off a picture: raise it",
        r"row 4 \(id both\): picture text.jpg: not one that can be read",
        r"row 4 \(id both\): picture .*gone.jpg",
        r"row 5 \(id no placeholder\): 1 picture\(s\) but 0 <image>",
        r"row 6 \(id mute\): there is no gpt turn",
        r"row 8 \(id nothing left\): the row has .* tokens, and nothing is left .* raise it",
        r"row 9: expected",
    ]
    assert len(faults) == len(wanted) and all(map(re.search, wanted, faults)), out
    assert err == "" and "Traceback" not in out
    dataset = data.open_dataset(rows, tmp_path / place, tiny, max_length=700, on_bad_record="skip")
    items = [dataset[i] for i in range(10)]
    bad = [i for i in range(10) if items[i]["fault"]]  # training's verdict is that of a full check
    assert bad == [2, 3, 4, 5, 6, 8, 9]
    assert not full or sorted({int(re.search(r"row (\d+)", f)[1]) for f in faults}) == bad
    good = [items[i] for i in (0, 1, 7)]
    assert good[2]["cut"] > 0 and re.search(r"cut +3 rows .* at 700 tokens", out)
    report = dict(line.split(None, 1) for line in out.splitlines()[len(faults) :])
    assert report["rows"] == "10, 3 of them text-only" and report["faults"].startswith(
        f"{len(faults)}: mend"
    )
    assert (report["turns"], report["pictures"]) == ("16", "7")
    assert report["ids"] == "1 of them repeated, the first '0'"


def test_check_reports_the_tokens_that_training_sees(toy, tiny, capsys):
    argv = ["--data_path", str(toy / "train.json"), "--image_folder", str(toy / "images")]
    assert data.main(["check", *argv]) == 0
    assert "tokens" not in capsys.readouterr().out  # no model, no tokens
    assert data.main(["check", *argv, "--model_name_or_path", str(tiny)]) == 0
    report = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    dataset = data.open_dataset(toy / "train.json", toy / "images", tiny)
    batch = data.Collator(dataset.image_token_id, 576)(
        list(map(dataset.__getitem__, range(len(dataset))))
    )
    lengths = batch["lengths"]
    shares = [f"{s} % have up to {np.percentile(lengths, s):,.0f}" for s in (50, 90, 99)]
    assert report["tokens"] == ", ".join([*shares, f"the longest row {max(lengths):,}"])
    assert (
        report["supervised"]
        == f"{(batch['labels'] != IGNORE).sum() / sum(lengths):.1%} of the tokens"
    )
    assert report["cut"].startswith("0 rows (0.00%)") and report["faults"] == "0"


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


# --- damaged files ---


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


WHOLE_JSON = json.dumps(
    [row(["hi", "yes"], id="007"), row(["ä", "\ud83d"], id=3), 5, [], row(["x", ""])], indent=1
)
damages = st.lists(
    st.tuples(
        st.integers(0, 2000),
        st.integers(0, 6),
        st.one_of(
            st.binary(max_size=4),
            st.sampled_from(
                [
                    b",",
                    b"[",
                    b"]",
                    b"{",
                    b"}",
                    b'"',
                    b"\n",
                    b"\\",
                    b"\0",
                    b"\xef\xbb\xbf",
                    b"NaN",
                    b"1e999",
                    b"\xff",
                ]
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


def damage(content, changes):
    for at, length, new in changes:
        at %= len(content) + 1
        content = content[:at] + new + content[at + length :]
    return content


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


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(damages, st.booleans())
def test_damaged_zip_gives_whole_files_or_one_clear_error(workdir, changes, deflated):
    files = {"a.jpg": encoded(noise(20, 10), "JPEG"), "b/ü.png": b"x" * 300}
    with zipfile.ZipFile(workdir / "z.zip", "w", zipfile.ZIP_DEFLATED * deflated) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path = write(workdir / "z.zip", damage((workdir / "z.zip").read_bytes(), changes))
    for name, content in files.items():
        try:
            assert data.Pictures(path).read(name) == content
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)


# --- model.py ---


QUESTION = "What is in the picture?"
SENTENCES = [QUESTION, "A red circle, a blue square.", "USER: hello ASSISTANT: hi"] * 9
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.3,
)
VISION = dict(SMALL, num_hidden_layers=3, image_size=28, patch_size=14)  # 4 tokens a picture


@functools.cache
def small_tokenizer(family):
    """Llama's kind: BOS, unk, pieces, no pad. Qwen2's: bytes, pad, no BOS."""
    bpe = Tokenizer(models.BPE())
    if family == "llama":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        bpe.train_from_iterator(
            SENTENCES, trainers.BpeTrainer(vocab_size=330, special_tokens=special)
        )
        trained = json.loads(bpe.to_str())["model"]
        return LlamaTokenizer(vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=llava.CHATML,
    )


def parts(path, family="qwen2", tied=False, spare_rows=0, dtype=torch.float32, **tokens):
    """Folders (vision, text) of a small random CLIP tower and language model, with a tokenizer."""
    torch.manual_seed(0)
    tokenizer, kind = small_tokenizer(family), {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    config = kind(
        **SMALL,
        vocab_size=len(tokenizer) + spare_rows,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path / "text")
    tokenizer.save_pretrained(path / "text")
    edit(path / "text/tokenizer_config.json", **tokens)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).to(dtype).save_pretrained(path / "vision")
    return path / "vision", path / "text"


def built(path, family="qwen2", kind="mlp2x_gelu", aspect_ratio="pad", **options):
    """A LLaVA folder made by our `build`; its projector is as large as the rest."""
    version = "v1" if family == "llama" else "own"
    llava.build(*parts(path, family, **options), path / "llava", kind, version, aspect_ratio)
    change_tensors(
        path / "llava",
        lambda t: t.update(
            {k: torch.randn_like(v) * 0.3 for k, v in t.items() if "projector" in k}
        ),
    )
    return path / "llava"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(a built folder, its model) that no test changes."""
    folder = built(tmp_path_factory.mktemp("good"))
    return folder, llava.from_pretrained(folder).eval()


def tensors_of(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def change_tensors(folder, change):
    tensors = {k: v.clone() for k, v in tensors_of(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def theirs(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def mixed_batch(image_token_id, side="right"):
    """Rows with no, one and two pictures: input_ids, pixel_values, labels, attention_mask."""
    generator, rows, labels = torch.Generator().manual_seed(1), [], []
    for length, pictures in ((9, 0), (6, 1), (5, 2)):
        row = torch.randint(3, 250, (length,), generator=generator)
        for i in range(pictures):
            row = torch.cat([row[: 1 + 5 * i], torch.full((4,), image_token_id), row[1 + 5 * i :]])
        labels.append(torch.where(torch.arange(len(row)) < len(row) - 3, -100, row))
        rows.append(row)
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    return (
        pad(rows),
        torch.randn(3, 3, 28, 28, generator=generator),
        pad(labels, padding_value=-100),
        pad([torch.ones_like(row) for row in rows]),
    )


def gradients(model, *batches):
    """{name: gradient} of the summed loss over batches of (input_ids, pixel_values, labels)."""
    model.zero_grad()
    for batch in batches:
        model(*batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def refused(capsys, *argv):
    """What `main` says when it refuses: one line on stderr, nothing on stdout, exit status 2."""
    capsys.readouterr()
    assert llava.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("model.py: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("way", ["saved by transformers", "as on the hub", "saved by us"])
@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True)])
def test_logits_loss_and_greedy_tokens_equal_transformers(tmp_path, family, tied, way):
    folder = built(tmp_path, family, tied=tied)
    if way != "saved by us":
        reference = theirs(folder)
        (folder / "model.safetensors").unlink()
        reference.save_pretrained(folder, max_shard_size="30kB")
    if way == "as on the hub":
        tensors = {
            re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v
            for k, v in tensors_of(folder).items()
        }
        for file in folder.glob("model*"):
            file.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference, model = theirs(folder), llava.from_pretrained(folder).eval()
    image = model.config.image_token_id
    ids, pixels, labels, mask = mixed_batch(image)
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels)
        logits = model.language_model(inputs_embeds=model.embed(ids, pixels)).logits
        loss, right = model(ids, pixels, labels)
    assert expected.logits.std() > 0.5  # not so small that anything is equal
    torch.testing.assert_close(logits[mask > 0], expected.logits[mask > 0], atol=1e-5, rtol=0)
    supervised = labels[:, 1:] >= 0
    assert abs(loss / supervised.sum() - expected.loss) < 1e-6
    assert right == (expected.logits.argmax(-1)[:, :-1] == labels[:, 1:])[supervised].sum()

    ids, pixels, _, mask = mixed_batch(image, "left")
    options = dict(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=[image],
    )
    free = reference.generate(**options)[:, ids.shape[1] :]
    eos = [free[0, 3].item(), free[1, 5].item()]
    expected = reference.generate(**options, eos_token_id=eos, pad_token_id=eos[0])
    new = model.generate(ids, pixels, mask, max_new_tokens=8, eos_token_id=eos)
    assert new.tolist() == expected[:, ids.shape[1] :].tolist() != free.tolist()


@pytest.mark.parametrize("family, aspect_ratio", [("llama", "square"), ("qwen2", "pad")])
def test_auto_processor_on_our_folders_gives_our_ids_and_pixels(tmp_path, family, aspect_ratio):
    folder = built(tmp_path, family, aspect_ratio=aspect_ratio)
    text, image_id = ChatText(AutoTokenizer.from_pretrained(folder)), len(small_tokenizer(family))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    expected = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    said = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    ids = torch.tensor(text.ids_and_labels(said, prompt=True)[0])
    ids = ids.repeat_interleave(torch.where(ids == image_id, 4, 1))
    assert ids.tolist() == expected["input_ids"][0].tolist() and (ids == image_id).sum() == 4
    transform = PictureTransform.from_pretrained(folder)
    pixels = transform(image)
    assert transform.aspect_ratio == aspect_ratio
    np.testing.assert_allclose(pixels, expected["pixel_values"][0].numpy(), atol=1e-5)


def test_scatter_equals_a_splice_by_hand_and_a_336_tower_has_576_patches(good):
    model = good[1]
    ids, pixels, _, _ = mixed_batch(model.config.image_token_id)
    table = model.language_model.get_input_embeddings()
    f = model.multi_modal_projector(model.vision_tower(pixels))
    assert f.shape == (3, 4, 32) and model.tokens_per_picture == 4
    rows = [
        table(ids[0]),
        torch.cat([table(ids[1, :1]), f[0], table(ids[1, 5:])]),
        torch.cat([table(ids[2, :1]), f[1], table(ids[2, 5:6]), f[2], table(ids[2, 10:])]),
    ]
    assert torch.equal(model.embed(ids, pixels), torch.stack(rows))
    with torch.device("meta"):
        config = LlavaConfig(vision_config=CLIPVisionConfig(**dict(VISION, image_size=336)))
        tower = llava.VisionTower(config)(torch.empty(1, 3, 336, 336))
    assert tower.shape == (1, 576, 32)


def test_every_weight_gets_a_gradient_and_rows_without_pictures_give_the_projector_zeros(good):
    model = good[1]
    ids, pixels, labels, _ = mixed_batch(model.config.image_token_id)
    found = gradients(model, (ids, pixels, labels))  # a missing gradient has no .clone()
    assert all(g.abs().max() > 0 for g in found.values())
    found = gradients(model, (ids[:1], pixels[:0], labels[:1]))
    assert all((g == 0).all() for k, g in found.items() if not k.startswith("language_model."))
    assert found["language_model.lm_head.weight"].abs().max() > 0
    found = gradients(model, (ids, pixels, torch.full_like(labels, -100)))
    assert all((g == 0).all() for g in found.values())


def test_padding_and_the_split_into_micro_batches_change_no_gradient(good):
    model = llava.from_pretrained(good[0], torch.float64)
    ids, pixels, labels, mask = mixed_batch(model.config.image_token_id)
    pixels = pixels.double()
    whole = gradients(model, (ids, pixels, labels))
    padded = gradients(
        model, (F.pad(ids, (0, 7), value=5), pixels, F.pad(labels, (0, 7), value=-100))
    )
    pictures = (pixels[:0], pixels[:1], pixels[1:])
    rows = [(i[m > 0][None], p, l[m > 0][None]) for i, p, l, m in zip(ids, pictures, labels, mask)]
    one_by_one = gradients(model, *reversed(rows))
    for name, gradient in whole.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-10, rtol=0)
        torch.testing.assert_close(one_by_one[name], gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind, count", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projectors_round_trip_and_only_mlp2x_gelu_is_named_as_transformers_does(
    tmp_path, kind, count
):
    folder = built(tmp_path, kind=kind)
    model, config = llava.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    saved = {k: v for k, v in tensors_of(folder).items() if k.startswith("multi_modal_projector")}
    x = expected = torch.randn(2, 4, 32)
    for i in range(1, count + 1):
        expected = F.linear(
            F.gelu(expected) if i > 1 else expected,
            *(saved.pop(f"multi_modal_projector.linear_{i}.{leaf}") for leaf in ("weight", "bias")),
        )
    assert torch.equal(model.multi_modal_projector(x), expected) and not saved
    assert (config["architectures"] == ["LlavaForConditionalGeneration"]) == (count == 2)


def test_projectors_have_the_published_numbers_of_parameters():
    for width, count in ((2560, 9_180_160), (4096, 20_979_712)):
        with torch.device("meta"):
            projector = llava.Projector("mlp2x_gelu", 1024, width)
        assert sum(p.numel() for p in projector.parameters()) == count


@pytest.mark.parametrize("form", ["bare", "with level", "with text tower", "bin", "sharded"])
def test_build_takes_towers_in_every_form_and_keeps_the_layer_it_never_runs(tmp_path, form):
    vision, text = parts(tmp_path)
    tower = CLIPVisionModel.from_pretrained(vision).eval()
    bare = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    level = {f"vision_model.{k}": v for k, v in bare.items()}
    if form in ("bare", "with level"):
        change_tensors(vision, lambda t: (t.clear(), t.update(bare if form == "bare" else level)))
    elif form == "with text tower":
        small = dict(SMALL, vocab_size=99)
        CLIPModel(CLIPConfig(vision_config=VISION, text_config=small)).save_pretrained(vision)
        change_tensors(vision, lambda t: t.update(level))
    else:
        (vision / "model.safetensors").unlink()
        buffer = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        torch.save(level | buffer, vision / "pytorch_model.bin") if form == "bin" else (
            tower.save_pretrained(vision, max_shard_size="20kB")
        )
    model = llava.build(vision, text, tmp_path / "llava").eval()
    prefix = "vision_tower.vision_model."
    saved = {
        k.removeprefix(prefix): v
        for k, v in tensors_of(tmp_path / "llava").items()
        if k.startswith(prefix)
    }
    assert saved.keys() == bare.keys() and all(torch.equal(saved[k], bare[k]) for k in bare)
    assert not any(re.search(r"layers\.2|post_layer", k) for k in model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.vision_tower(pixels), expected, atol=1e-6, rtol=0)


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


def test_a_saved_folder_is_the_loaded_one_to_the_bit_in_the_dtype_of_the_file(tmp_path):
    folder = built(tmp_path, dtype=torch.bfloat16)
    model, before = llava.from_pretrained(folder, torch.float32), tensors_of(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    new, old_umask = tmp_path / "new", os.umask(0o022)
    llava.save_pretrained(model, new, folder)
    os.umask(old_umask)
    after = tensors_of(new)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[k], after[k]) for k in before)
    for file in new.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file
        same = file.read_bytes() == (folder / file.name).read_bytes()
        assert same or file.suffix == ".safetensors", file
    masters = {"multi_modal_projector.linear_1.bias": torch.ones(32)}
    llava.save_pretrained(model, tmp_path / "trained", folder, state=masters)
    trained = tensors_of(tmp_path / "trained")
    assert [k for k in before if not torch.equal(before[k], trained[k])] == list(masters)


def test_parts_of_different_dtypes_work_together(tmp_path):
    vision, text = parts(tmp_path, dtype=torch.bfloat16)
    change_tensors(vision, lambda t: t.update({k: v.float() for k, v in t.items()}))
    model = llava.build(vision, text, tmp_path / "llava")
    assert torch.isfinite(model(*mixed_batch(model.config.image_token_id)[:3])[0])


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


def test_buffers_that_no_file_holds_equal_those_of_a_model_made_normally(tmp_path):
    folder = built(tmp_path, "llama", dtype=torch.bfloat16)
    ours = dict(llava.from_pretrained(folder).named_buffers())
    normal = dict(llava.Llava(LlavaConfig.from_pretrained(folder)).named_buffers())
    assert ours.keys() == normal.keys() and any("inv_freq" in k for k in ours)
    assert all(torch.equal(ours[k], b) and ours[k].dtype == b.dtype for k, b in normal.items())


def test_loading_maps_the_weights_and_does_not_copy_them(tmp_path):
    def private_megabytes():
        gc.collect()
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000

    folder = built(tmp_path, tied=True, spare_rows=800_000)  # 32 wide, fp32
    assert (folder / "model.safetensors").stat().st_size > 100e6
    before = private_megabytes()
    model = llava.from_pretrained(folder)
    assert private_megabytes() - before < 30 and next(model.parameters()).device.type == "cpu"


def test_what_keeps_less_computes_what_transformers_does_and_leaves_other_layers_alone():
    def layers(family, *names):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        return [getattr(module, name) for name in names]

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    for family, mlp, norm in (("llama", "LlamaMLP", "LlamaRMSNorm"), ("qwen3", "Qwen3MLP", "Qwen3RMSNorm"),
                              ("mistral", "MistralMLP", "MistralRMSNorm")):  # fmt: skip
        mlp, norm = layers(family, mlp, norm)
        theirs = nn.Sequential(mlp(config), norm(16))
        nn.init.normal_(theirs[1].weight)
        ours = copy.deepcopy(theirs)
        llava.keep_less(ours)
        assert all("forward" in vars(layer) for layer in ours)
        x = torch.randn(2, 3, 16, requires_grad=True)
        outputs = [model(x) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs)
        towards = torch.randn(2, 3, 16)
        found, expected = (
            torch.autograd.grad(out, [x, *model.parameters()], towards)
            for out, model in zip(outputs, (ours, theirs))
        )
        torch.testing.assert_close(found, expected)
    # These have a dropout, multipliers, a weight of 1 + w, an activation of their own.
    others = layers("seed_oss", "SeedOssMLP") + layers("falcon_h1", "FalconH1MLP")
    assert not {llava.body(layer) for layer in others} & {llava.body(llava.LlamaMLP)}
    assert llava.body(*layers("gemma", "GemmaRMSNorm")) != llava.body(llava.LlamaRMSNorm)
    relu = nn.Sequential(llava.LlamaMLP(LlamaConfig(hidden_size=16, num_attention_heads=2, hidden_act="relu")))
    llava.keep_less(relu)
    assert "forward" not in vars(relu[0])


@pytest.mark.parametrize("length, causal", [(2, True), (128, True), (300, True), (300, False)])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_the_backward_pass_of_attention_is_torchs(length, causal, kv_heads):
    """Two rows and six heads, in blocks of 128 queries."""
    q, k, v = (
        torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, kv_heads, kv_heads)
    )
    ours = llava.CPUAttention.apply(q, k, v, 0.3, causal)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    assert torch.equal(ours, torchs)
    towards = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(out, (q, k, v), towards) for out in (ours, torchs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offset", [0, 30])
def test_the_backward_pass_of_attention_is_exact_in_bf16(offset):
    """Scores reach the hundreds where keys have large biases, as Qwen2's do: bf16 rounds these to 1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 8) for heads in (4, 2, 2))
    q, k = q * (3 if offset else 1), k + offset * torch.randn(1, 2, 1, 8)
    tensors = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    towards = torch.randn(2, 4, 300, 8).bfloat16()

    def run(attend, tensors, *options):
        return torch.autograd.grad(attend(*tensors, *options), tensors, towards.to(tensors[0].dtype))

    torchs = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    exact = run(torchs, [t.detach().double().requires_grad_() for t in tensors])
    for mine, theirs, true in zip(
        run(llava.CPUAttention.apply, tensors, 8**-0.5, True), run(torchs, tensors), exact
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() < max(1.1 * (theirs - true).norm(), 0.01 * true.norm())


def test_only_training_in_bf16_without_a_mask_has_a_backward_pass_of_its_own(tmp_path, monkeypatch):
    calls, apply = [], llava.CPUAttention.apply
    monkeypatch.setattr(llava.CPUAttention, "apply", lambda *args: calls.append(args[3:]) or apply(*args))
    for dtype in (torch.bfloat16, torch.float32):
        model = llava.from_pretrained(built(tmp_path / str(dtype)), dtype)
        ids, pixels, labels, mask = mixed_batch(model.config.image_token_id, "left")
        pixels = pixels.to(dtype)
        with torch.no_grad():
            model(ids, pixels, labels)
        assert not calls
        parts = model.vision_tower.vision_model.config, model.config.text_config
        expected = [
            ((part.hidden_size // part.num_attention_heads) ** -0.5, causal)
            for part, causal in zip(parts, (False, True))
            for _ in range(part.num_hidden_layers)
        ]
        model(ids, pixels, labels)[0].backward()
        assert calls == expected * (dtype == torch.bfloat16)
        calls.clear()
        model.vision_tower.requires_grad_(False)
        model.language_model(inputs_embeds=model.embed(ids, pixels), attention_mask=mask)
        assert not calls


def test_attention_is_ours_where_transformers_chose_torchs_and_the_family_is_known(tmp_path):
    names = {"clip": "llava", "qwen2": "llava", "llama": "llava", "phi3": "sdpa", "qwen3 eager": "eager"}
    config = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, vocab_size=32, pad_token_id=0)  # fmt: skip
    for name, expected in names.items():
        family, _, wanted = name.partition(" ")
        if family == "clip":
            model = AutoModel.from_config(CLIPVisionConfig(hidden_size=16, num_attention_heads=2))
        else:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **config), attn_implementation=wanted or None
            )
        llava.use_faster_attention(model)
        assert model.config._attn_implementation == expected
        assert "_attn_implementation" not in model.config.to_json_string()


def test_the_image_token_is_never_generated(tmp_path):
    model = llava.from_pretrained(built(tmp_path)).eval()
    ids, pixels, _, mask = (x[-2:] for x in mixed_batch(model.config.image_token_id, "left"))
    ids, mask = ids[1:], mask[1:]
    with torch.no_grad():
        hidden = model.language_model.base_model(inputs_embeds=model.embed(ids, pixels))[0]
        head = model.language_model.lm_head
        head.weight[model.config.image_token_id] = 100 * hidden[0, -1]
        assert head(hidden[0, -1]).argmax() == model.config.image_token_id
    new = model.generate(ids, pixels, mask, max_new_tokens=5, eos_token_id=[3])
    assert not (new == model.config.image_token_id).any()


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


def test_chat_with_a_published_folder_whose_template_ends_no_answer_takes_a_version(tmp_path, capsys):
    folder = built(tmp_path)
    (folder / "chat_template.jinja").write_text(LLAVA_HF)
    ask = ["chat", "--model_name_or_path", str(folder), "--max_new_tokens", "4", "--prompt", QUESTION]
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


BIAS = "multi_modal_projector.linear_1.bias"
FAULTS = {  # what is changed in config.json, or done to the folder > what the one line must name
    "other kind": (dict(model_type="qwen2"), "qwen2"),
    "no kind": (dict(model_type="nonesuch"), "nonesuch"),
    "activation": (dict(projector_hidden_act="relu"), "relu"),
    "list of layers": (dict(vision_feature_layer=[-2, -1]), "vision_feature_layer"),
    "layer from the front": (dict(vision_feature_layer=1), "vision_feature_layer"),
    "layer before the first": (dict(vision_feature_layer=-9), "vision_feature_layer"),
    "strategy": (dict(vision_feature_select_strategy="max"), "vision_feature_select_strategy"),
    "no projector bias": (dict(multimodal_projector_bias=False), "multimodal_projector_bias"),
    "other projector": (dict(mm_projector_type="mlp"), "mm_projector_type"),
    "image id beyond": (dict(image_token_index=9999), "9999"),
    "head not tied": (dict(tie_word_embeddings=True), "lm_head"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "damaged": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors"),
    "damaged bin": (lambda f: instead(f, "pytorch_model.bin", "damaged"), "pytorch_model.bin"),
    "broken index": (lambda f: instead(f, "model.safetensors.index.json", "[]"), "index.json"),
    "odd index": (
        lambda f: instead(f, "model.safetensors.index.json", '{"weight_map": [1]}'),
        "index.json",
    ),
    "bin of numbers": (
        lambda f: instead(f, "pytorch_model.bin", "") or torch.save({"a": 1}, f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "odd config": (dict(text_config=5), "config.json"),
    "no heads": (dict(vision_config={"model_type": "clip_vision_model", "num_attention_heads": 0}), "config.json"),
    "odd tokenizer": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    "absent shard": (
        lambda f: instead(f, "model.safetensors.index.json", '{"weight_map": {"a": "gone"}}'),
        "gone",
    ),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(BIAS)), BIAS),
    "unexpected": (lambda f: change_tensors(f, lambda t: t.update(other=torch.ones(1))), "other"),
    "mis-shaped": (lambda f: change_tensors(f, lambda t: t.update({BIAS: t[BIAS][1:]})), BIAS),
}


def instead(folder, name, content):
    (folder / "model.safetensors").rename(folder / name).write_text(content)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_model_folder_is_refused_in_one_line(good, tmp_path, capsys, fault):
    folder, (change, named) = shutil.copytree(good[0], tmp_path / "folder"), FAULTS[fault]
    edit(folder / "config.json", **change) if isinstance(change, dict) else change(folder)
    assert named in refused(capsys, "chat", "--model_name_or_path", folder, "--prompt", "hello")


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


def test_saving_refuses_what_exists_and_a_failed_save_leaves_nothing(good, tmp_path, monkeypatch):
    folder, model = good
    for out in (folder, folder / ".." / folder.name, tmp_path):
        with pytest.raises(ValueError, match="exists already"):
            llava.save_pretrained(model, out, folder)
    monkeypatch.setattr(llava, "copy_side_files", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llava.save_pretrained(model, tmp_path / "out", folder)
    assert not list(tmp_path.iterdir())


# --- lora.py ---


BLOCKS = r"model\.language_model\.layers\.\d+\..+"  # every linear layer of the decoder's blocks
PROJECTOR = "model.multi_modal_projector"


def tiny_llava(seed=0, device="cpu", **text):
    # Widths that 64 divides: bitsandbytes 0.50 unpacks rows of others wrongly on a CPU with AVX512.
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100,
            "num_attention_heads": 4, "num_key_value_heads": 2} | text  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28,
              "num_attention_heads": 2, "patch_size": 14, "projection_dim": 32}  # fmt: skip
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision),
                         image_token_id=99, image_seq_length=4)  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        return LlavaForConditionalGeneration(config).eval()


def batch():
    g = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 98, (2, 12), generator=g)
    input_ids[:, 1:5] = 99
    return {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=g)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits.float()


def adapt(model, seed=0, train_projector=True, **options):
    """Adapters on the decoder's blocks of a tiny LLaVA, as if they had been trained for a while."""
    options = {"r": 4, "alpha": 8} | options
    names = lora.inject(model, BLOCKS, **options)
    model.get_submodule(PROJECTOR).requires_grad_(train_projector)
    torch.manual_seed(100 + seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape).to(p.dtype)
    return names


def quantize(model):
    weights = dict(model.named_parameters())
    return lora.quantize(model, BLOCKS, weights, compute_dtype=torch.float32)


def saved(model, out, base=None, **options):
    options = {"rename": llava.transformers_name, "modules_to_save": [PROJECTOR]} | options
    lora.save(model, out, base, **options)
    return out


def three_steps(model, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(3):
        loss = model.train()(**batch(), labels=batch()["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def close(a, b, tolerance):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


# --- the arithmetic ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_from_the_base_bit_for_bit(dtype):
    model = tiny_llava().to(dtype)
    before = model.eval()(input_ids=batch()["input_ids"][:, 5:]).logits
    names = lora.inject(model, BLOCKS, r=4, alpha=8, dropout=0.5)
    after = model.train()(input_ids=batch()["input_ids"][:, 5:]).logits
    assert torch.equal(before, after) and len(names) == 14
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora.lora_{m}" for n in names for m in "AB"}
    assert all(model.get_parameter(n).dtype == dtype for n in trains)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_gradients_and_files_equal_pefts(use_rslora, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_llava(), tiny_llava()
    lora.inject(ours, BLOCKS, r=4, alpha=8, use_rslora=use_rslora)
    ours.get_submodule(PROJECTOR).requires_grad_(True)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora, modules_to_save=[PROJECTOR],
                             target_modules=BLOCKS + "_proj")  # fmt: skip
    theirs = peft.get_peft_model(theirs, config)
    in_peft = {}  # our parameter name > PEFT's parameter
    for name, p in theirs.base_model.model.named_parameters():
        name = re.sub(r"\.(lora_[AB])\.default\.weight", r".lora.\1", name)
        in_peft[name.replace("modules_to_save.default.", "")] = p
    trains = [n for n, p in ours.named_parameters() if p.requires_grad]
    for name in trains:
        in_peft[name].data.copy_(ours.get_parameter(name).data)
    assert abs(three_steps(ours) - three_steps(theirs)) < 1e-6
    for name in trains:
        close(ours.get_parameter(name).grad, in_peft[name].grad, 1e-6)
    close(logits(ours), logits(theirs), 1e-5)
    saved(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for key in a:
        close(a[key], b[key], 1e-6)


def test_scale_is_alpha_over_r_or_over_its_root():
    linear = nn.Linear(8, 8)
    assert lora.LoRA(linear, 32, 8, 0.0, False).scale == 0.25
    assert lora.LoRA(linear, 16, 8, 0.0, True).scale == 2.0


def test_A_starts_as_pefts_and_B_at_zero():
    adapter = lora.LoRA(nn.Linear(256, 32), 64, 8, 0.0, False)
    assert 0.99 / 16 < adapter.lora_A.abs().max() <= 1 / 16  # uniform up to 1 / sqrt(in)
    assert not adapter.lora_B.any()


def test_dropout_acts_in_training_only():
    model = nn.Sequential(nn.Linear(64, 64))
    lora.inject(model, "0", r=4, alpha=8, dropout=0.5)
    nn.init.normal_(model[0].lora.lora_B)
    x = torch.randn(2, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_zeros_a_share_of_each_layers_input_by_chance_and_changes_no_expectation():
    x, p = torch.ones(500, 1001, dtype=torch.float64), 0.05
    first, second = (lora.put_zeros(x, lora.draw_zeros(x, p)) for _ in range(2))
    assert set(first.unique().tolist()) == {0, 1} and x.all()
    for dropped in (first, second):  # 500,500 numbers: 1e-3 is more than three deviations
        assert abs(1 - dropped.mean().item() - p) < 1e-3
    assert abs((first + second == 0).double().mean().item() - p**2) < 4e-4  # independent
    neighbours = ((first[:, 1:] == 0) & (first[:, :-1] == 0)).double().mean().item()
    assert abs(neighbours - p**2) < 4e-4
    model = nn.Sequential(nn.Linear(1001, 3, dtype=torch.float64))
    lora.inject(model, "0", r=2, alpha=2, dropout=p)
    nn.init.normal_(model[0].lora.lora_B)
    noisy = torch.stack([model.train()(x).mean(0) for _ in range(20)]).mean(0)
    torch.testing.assert_close(noisy, model.eval()(x).mean(0), rtol=0, atol=2e-2)


def test_gradients_under_dropout_are_those_of_its_output():
    model = nn.Sequential(nn.Linear(30, 3, dtype=torch.float64)).train()
    lora.inject(model, "0", r=2, alpha=2, dropout=0.3)
    nn.init.normal_(model[0].lora.lora_B)
    x = torch.randn(2, 5, 30, dtype=torch.float64, requires_grad=True)

    def output(x, *weights):
        torch.manual_seed(0)
        return model(x)

    assert torch.autograd.gradcheck(output, (x, model[0].lora.lora_A, model[0].lora.lora_B))


def test_any_way_of_calling_an_adapted_layer_gives_the_gradients_of_plain_torch():
    """Layers that read one tensor: checkpointed apart, by keyword, twice, with no row, frozen."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)

        def forward(self, x, apart):
            a, b = [functools.partial(checkpoint, layer, use_reentrant=False) if apart else layer
                    for layer in (self.a, self.b)]  # fmt: skip
            return a(x) + b(x) * self.a(input=x)

    torch.manual_seed(0)
    model, x = Pair().double(), torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    lora.inject(model, "a|b", r=2, alpha=4)
    for p in model.parameters():
        nn.init.normal_(p)
    weights = [layer.weight + 2 * layer.lora.lora_B @ layer.lora.lora_A for layer in (model.a, model.b)]
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    a, b = F.linear(x, weights[0], model.a.bias), F.linear(x, weights[1])
    expected = torch.autograd.grad((a + b * a).square().sum(), trained)
    for apart in (False, True):
        found = torch.autograd.grad(model(x, apart).square().sum(), trained)
        torch.testing.assert_close(found, expected)
    assert model(x[:0], False).shape == (0, 3, 6)
    for layer in (model.a, model.b):  # recomputed, it falls on the same numbers
        layer.lora.dropout.p = 0.5
    torch.manual_seed(1)
    (once,) = torch.autograd.grad(model(x, False).sum(), [model.a.lora.lora_A])
    torch.manual_seed(1)
    (apart,) = torch.autograd.grad(model(x, True).sum(), [model.a.lora.lora_A])
    torch.testing.assert_close(once, apart)


def test_autocast_takes_an_adapted_layer_as_it_takes_the_layer():
    model = nn.Sequential(nn.Linear(8, 6))
    lora.inject(model, "0", r=2, alpha=4, dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 8, requires_grad=True))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and model[0].lora.lora_B.grad.dtype == torch.float32


def test_fp32_adapters_over_a_bf16_base():
    model = tiny_llava().bfloat16()
    lora.inject(model, BLOCKS, r=4, alpha=8, dtype=torch.float32)
    out = model(input_ids=batch()["input_ids"][:, 5:]).logits
    out.float().sum().backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert out.dtype == torch.bfloat16 and {p.grad.dtype for p in adapters} == {torch.float32}


@pytest.mark.parametrize("nf4", [False, True])
def test_gradients_under_checkpointing_are_the_same(nf4):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    if nf4:
        weights = dict(block.named_parameters())
        lora.quantize(block, r"\d", weights, compute_dtype=torch.float32)
    lora.inject(block, r"\d", r=4, alpha=8)
    x = torch.randn(3, 64)
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        block.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters() if p.requires_grad])
    assert len(grads[0]) == 4 and all(map(torch.equal, *grads))
    assert block[0].lora.lora_B.grad.abs().sum() > 0


# --- which layers, how many ---


def test_no_adapter_under_the_vision_tower_nor_on_head_or_projector():
    names = lora.inject(tiny_llava(), BLOCKS, r=2, alpha=4)
    assert lora.fold(names).splitlines() == [
        f"2 x model.language_model.layers.*.{leaf}"
        for leaf in "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj".split()
    ]


@pytest.mark.parametrize(
    "layers, r, adapters, projector, text",
    [
        (BLOCKS, 128, 319_815_680, 20_979_712, {"hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}),
        (BLOCKS + r"\.(q|k|v|o)_proj", 32, 26_214_400, 9_180_160, {"hidden_size": 2560,
         "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 20,
         "num_key_value_heads": 20}),
    ],
)  # fmt: skip
def test_counts_with_the_real_shapes(layers, r, adapters, projector, text):
    vision = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    lora.inject(model, layers, r=r, alpha=2 * r)
    assert lora.count(p for p in model.parameters() if p.requires_grad) == adapters
    assert lora.count(model.get_submodule(PROJECTOR).parameters()) == projector


# --- nf4 ---


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_nf4_layer_is_the_linear_layer_of_its_dequantized_weight(dtype, bias, storage):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64, dtype=dtype), torch.randn(96) if bias else None
    layer = lora.nf4_linear(weight, bias, compute_dtype=dtype, quant_storage=storage)
    W = lora.dequantized(layer)
    assert W.dtype == dtype and 0.01 < (W - weight).norm() / weight.norm() < 0.15
    x = torch.randn(5, 64, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = layer(a), F.linear(b, W, layer.bias)
    (ya.square().sum() + yb.square().sum()).backward()
    assert torch.equal(ya, yb) and torch.equal(a.grad, b.grad)
    assert bias is None or torch.equal(layer.bias, bias.to(dtype))
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.weight.quant_state.nested  # double quantization
    assert lora.true_shape(layer.weight) == (96, 64) and layer.weight.nbytes == 96 * 64 // 2


def test_only_the_decoders_blocks_are_quantized_and_counts_stay_true():
    model = tiny_llava()
    before = lora.count(model.parameters())
    names = quantize(model)
    quantized = {n for n, p in model.named_parameters() if lora.is_nf4(p)}
    assert quantized == {f"{n}.weight" for n in names} and len(names) == 14
    assert lora.count(model.parameters()) == before > sum(p.numel() for p in model.parameters())
    start = logits(model)
    lora.inject(model, BLOCKS, r=4, alpha=8)
    assert torch.equal(logits(model), start)
    losses = [three_steps(model) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]


def test_an_evaluation_leaves_an_nf4_layer_as_it_was(monkeypatch):
    import bitsandbytes as bnb

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)  # on whatever CPU this runs
    layer = lora.nf4_linear(torch.randn(64, 64), compute_dtype=torch.float32)
    before = lora.dequantized(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    assert torch.equal(lora.dequantized(layer), before)
    close(x.grad, before.sum(0).expand(2, -1), 1e-5)


LOAD = """
import re, sys, threading, time, torch, lora
from safetensors.torch import load_file
from torch import nn

def anonymous_bytes():  # not the pages of the mapped file, which the system may drop at any time
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(1024, 1024, False, dtype=torch.bfloat16) for _ in range(64)])
lora.nf4_linear(torch.randn(64, 64))  # loads the libraries
tensors = load_file(sys.argv[1])
start = peak = anonymous_bytes()
threading.Thread(target=watch, daemon=True).start()
if sys.argv[2] == "4":
    lora.quantize(model, r"\\d+", tensors)
else:
    model.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
print((peak - start) >> 20)
"""


def test_a_model_in_4_bits_leaves_no_file_mapped(tmp_path):
    def mapped():
        gc.collect()
        return str(folder) in Path("/proc/self/maps").read_text()

    folder = built(tmp_path, dtype=torch.bfloat16)  # Qwen2's, with biases
    model = llava.open_model(folder, None, 16, torch.bfloat16, "cpu")
    assert mapped()
    del model
    model = llava.open_model(folder, None, 4, torch.bfloat16, "cpu")
    assert not mapped() and model.aside


def test_loading_in_4_bits_never_holds_the_16_bit_model(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": torch.randn(1024, 1024).bfloat16() for i in range(64)}, file)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    peak = {}
    for bits in ("16", "4"):
        command = [sys.executable, "-c", LOAD, str(file), bits]
        peak[bits] = int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    print(f"128 MiB of bf16 weights: peak {peak['16']} MiB as they are, {peak['4']} MiB in 4 bits")
    assert peak["16"] > 120 and peak["4"] < 64  # 34 packed, and 18 of scratch for one weight


# --- files ---


def test_peft_loads_our_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    adapt(model, use_rslora=True)
    saved(model, tmp_path / "adapter", tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(tiny_llava(), tmp_path / "adapter")
    close(logits(theirs), logits(model), 1e-5)
    assert (logits(model) - logits(tiny_llava())).abs().max() > 1e-2
    adapted = {n for n, _ in theirs.named_modules() if n.endswith("lora_A.default")}
    assert len(adapted) == 14 and not any("vision" in n for n in adapted)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], BLOCKS + "_proj"])
def test_we_load_pefts_adapter(targets, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, init_lora_weights=False,
                             target_modules=targets, modules_to_save=[PROJECTOR[6:]])  # fmt: skip
    theirs = peft.get_peft_model(tiny_llava(), config)
    for p in theirs.get_submodule(f"base_model.model.{PROJECTOR}").parameters():
        p.data += 0.1
    theirs.save_pretrained(tmp_path)
    model = tiny_llava()
    loaded = lora.load(model, tmp_path, rename=llava.transformers_name)
    close(logits(model), logits(theirs), 1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == loaded.keys()
    assert model.model.language_model.layers[0].self_attn.q_proj.lora.dropout.p == 0.1


def test_we_load_an_adapter_with_the_names_of_older_transformers(tmp_path):
    model = tiny_llava()
    adapt(model)
    tensors = load_file(saved(model, tmp_path) / lora.WEIGHTS)
    older = [("model.language_model.", "language_model.model."), (PROJECTOR, PROJECTOR[6:])]
    for new, old in older:
        tensors = {k.replace(f"base_model.model.{new}", f"base_model.model.{old}"): t
                   for k, t in tensors.items()}  # fmt: skip
    save_file(tensors, tmp_path / lora.WEIGHTS)
    other = tiny_llava()
    lora.load(other, tmp_path, rename=llava.transformers_name)
    assert torch.equal(logits(other), logits(model))


def test_saved_and_loaded_is_the_same_and_holds_the_fp32_masters(tmp_path):
    model = tiny_llava().bfloat16()
    adapt(model)
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    master = {n: p.data.float() * (1 + 2**-12) for n, p in trains.items()}
    saved(model, tmp_path, tensors=master)
    other = tiny_llava().bfloat16()
    loaded = lora.load(other, tmp_path)
    assert loaded.keys() == master.keys() and all(torch.equal(loaded[n], master[n]) for n in master)
    assert torch.equal(logits(other), logits(model))
    assert {p.name for p in tmp_path.iterdir()} == {lora.CONFIG, lora.WEIGHTS}
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # safetensors alone writes 600


def test_what_trains_and_would_not_be_saved_is_an_error(tmp_path):
    model = tiny_llava()
    adapt(model)
    with pytest.raises(AssertionError, match="projector.linear_1.weight trains but is not saved"):
        lora.save(model, tmp_path)
    stubs = {name: torch.empty(0) for name, _ in model.named_parameters()}  # as under ZeRO-3
    with pytest.raises(AssertionError, match="is sharded"):
        saved(model, tmp_path, tensors=stubs)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_survives_dtype_shards_and_spelling(tmp_path):
    base = tiny_llava().bfloat16()
    base.save_pretrained(tmp_path / "a")
    base.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    old_llava_folder(tmp_path / "a", tmp_path / "c")
    base.float().save_pretrained(tmp_path / "d")
    folders = [lora.read_folder(tmp_path / name) for name in "abcd"]
    prints = {lora.fingerprint(tensors, llava.transformers_name) for tensors in folders}
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert prints == {lora.fingerprint(dict(base.named_parameters()))}
    base.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    assert lora.fingerprint(dict(base.named_parameters())) not in prints


def old_llava_folder(folder, out):
    """The folder with the tower's keys spelled as llava-hf's are, and a buffer that they carry."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    old = ("vision_tower.", "vision_tower.vision_model.")
    tensors = {name.replace(*old): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


# --- merge ---


@pytest.mark.parametrize("kind", ["one file", "shards", "old spelling"])
def test_merged_equals_adapted(kind, tmp_path):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    tiny_llava().save_pretrained(base, max_shard_size="100KB" if kind == "shards" else "5GB")
    if kind == "old spelling":
        base = base.rename(tmp_path / "new")
        old_llava_folder(base, base := tmp_path / "old")
    (base / "tokenizer.json").write_text("{}")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    adapt(model)
    saved(model, adapter, base)
    before = lora.fingerprint(lora.read_folder(base))
    lora.merge(base, adapter, out, llava.transformers_name)
    assert {p.name for p in base.iterdir()} == {p.name for p in out.iterdir()}
    merged = LlavaForConditionalGeneration.from_pretrained(out)
    close(logits(merged), logits(model), 1e-5)
    assert lora.fingerprint(lora.read_folder(base)) == before
    assert not list(tmp_path.glob("*.part"))


def test_merge_keeps_the_dtype(tmp_path):
    model = tiny_llava().bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapt(model)
    saved(model, tmp_path / "adapter", tmp_path / "base")
    adapter_tensors = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    assert {t.dtype for t in adapter_tensors.values()} == {torch.float32}
    lora.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", llava.transformers_name)
    (tmp_path / "any file").touch()
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (tmp_path / "any file").stat().st_mode
    a, b = (lora.read_folder(tmp_path / f) for f in ("base", "out"))
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.bfloat16}
    changed = {llava.transformers_name(k) for k in a if not torch.equal(a[k], b[k])}
    assert len(changed) == 14 + 4  # blocks, projector
    assert all(re.match(BLOCKS, k) or k.startswith(PROJECTOR) for k in changed)


def test_merging_twice_or_into_another_base_is_refused(tmp_path):
    base, other, adapter, out = (tmp_path / n for n in ("base", "other", "adapter", "out"))
    tiny_llava().save_pretrained(base)
    tiny_llava(seed=1).save_pretrained(other)
    model = tiny_llava()
    adapt(model)
    saved(model, adapter, base)
    lora.merge(base, adapter, out, llava.transformers_name)
    for wrong in (out, other):
        with pytest.raises(ValueError, match="trained on other weights"):
            lora.merge(wrong, adapter, tmp_path / "again", llava.transformers_name)
        with pytest.raises(ValueError, match="trained on other weights"):
            lora.load(tiny_llava(), adapter, wrong, llava.transformers_name)
    lora.load(tiny_llava(), adapter, base, llava.transformers_name)
    assert not (tmp_path / "again").exists()


def test_a_qlora_merges_exactly_into_the_dequantized_base_and_says_how_far_it_is(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llava().save_pretrained(base)
    model = tiny_llava()
    quantize(model)
    lora.inject(model, r".*language_model.*\.(q|v)_proj", r=4, alpha=8)  # 4 of the 14 in 4 bits
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    saved(model, adapter, base, modules_to_save=[])
    assert json.loads((adapter / "adapter_config.json").read_text())["bits"] == 4
    for dequantize, tolerance in ((True, 1e-5), (False, 1e9)):
        out = tmp_path / f"out{dequantize}"
        lora.merge(base, adapter, out, llava.transformers_name, dequantize)
        merged = LlavaForConditionalGeneration.from_pretrained(out)
        close(logits(merged), logits(model), tolerance)
    assert (logits(merged) - logits(model)).abs().max() > 1e-3
    lines = [line for line in capsys.readouterr().out.splitlines() if "off by" in line]
    assert len(lines) == 2 * 14
    as_it_is, by_dequantizing = map(float, re.findall(r"by (\S+) ", lines[0]))
    assert 0.01 < as_it_is < 0.2 and by_dequantizing < 1e-6
    reloaded = tiny_llava()
    quantize(reloaded)
    lora.load(reloaded, adapter, base, llava.transformers_name)
    assert torch.equal(logits(reloaded), logits(model))


# --- bad input ---


def test_inject_refuses_r_of_0_and_patterns_without_a_match():
    model = tiny_llava()
    with pytest.raises(ValueError, match="r is 0"):
        lora.inject(model, BLOCKS, r=0, alpha=8)
    with pytest.raises(ValueError, match="dropout 1: "):
        lora.inject(model, BLOCKS, r=4, alpha=8, dropout=1)
    with pytest.raises(ValueError, match="'q_proj' matches no linear layer's whole path .one is"):
        lora.inject(model, "q_proj", r=4, alpha=8)
    with pytest.raises(ValueError, match="not a regular expression"):
        lora.inject(model, "*q_proj", r=4, alpha=8)
    with pytest.raises(ValueError, match="matches no linear layer"):
        lora.inject(nn.MultiheadAttention(8, 2), "out_proj", r=4, alpha=8)
    assert all(p.requires_grad for p in model.parameters())


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"


def edit_tensors(adapter, edit):
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def edit_config(adapter, **entries):
    config = json.loads((adapter / "adapter_config.json").read_text()) | entries
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def drop_layer(tensors):
    del tensors[Q.format("A")], tensors[Q.format("B")]


DAMAGES = {
    "q_proj.lora_A.weight is missing": lambda a: edit_tensors(a, lambda t: t.pop(Q.format("A"))) ,
    "q_proj.lora_B.weight is missing": lambda a: edit_tensors(a, lambda t: t.pop(Q.format("B"))),
    "q_proj.lora_[AB].weight is missing": lambda a: edit_tensors(a, drop_layer),
    r"linear_1.bias is missing": lambda a: edit_tensors(
        a, lambda t: t.pop(f"base_model.model.{PROJECTOR}.linear_1.bias")),
    "layers.7.x.lora_A.weight has no place in this base": lambda a: edit_tensors(
        a, lambda t: t.update({Q.format("A").replace("0.self_attn.q_proj", "7.x"): torch.ones(4)})),
    r"q_proj.lora_A.weight is \(4, 65\), but \(4, 64\) for this base": lambda a: edit_tensors(
        a, lambda t: t.update({Q.format("A"): torch.zeros(4, 65)})),
    "r cannot be 4.0": lambda a: edit_config(a, r=4.0),
    "lora_alpha cannot be nan": lambda a: edit_config(a, lora_alpha=float("nan")),
    "lora_dropout cannot be 5": lambda a: edit_config(a, lora_dropout=5),
    "use_rslora cannot be 'no'": lambda a: edit_config(a, use_rslora="no"),
    "target_modules cannot be 5": lambda a: edit_config(a, target_modules=5),
    "modules_to_save cannot be .*list": lambda a: edit_config(a, modules_to_save=[["list"]]),
    "quantized cannot be 5": lambda a: edit_config(a, quantized=5),
    "alpha_pattern .* is not supported": lambda a: edit_config(a, alpha_pattern={"q_proj": 2}),
    "init_lora_weights pissa is not supported": lambda a: edit_config(a, init_lora_weights="pissa"),
    "peft_type IA3 is not supported": lambda a: edit_config(a, peft_type="IA3"),
    "is not JSON": lambda a: (a / "adapter_config.json").write_text("{"),
    "is damaged": lambda a: (a / "adapter_model.safetensors").write_bytes(b"123"),
    "not found": lambda a: (a / "adapter_config.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line_and_nothing_is_written(message, tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    adapt(model)
    adapter = saved(model, tmp_path / "adapter", tmp_path / "base")
    DAMAGES[message](adapter)
    for use in (
        lambda: lora.load(tiny_llava(), adapter, rename=llava.transformers_name),
        lambda: lora.merge(tmp_path / "base", adapter, tmp_path / "out", llava.transformers_name),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_a_larger_model_names_the_first_key_and_both_shapes(tmp_path):
    large = tiny_llava(hidden_size=128, num_hidden_layers=3)
    adapt(large)
    saved(large, tmp_path)
    with pytest.raises(ValueError, match=r"layers.0.*is \(.*128.*but \(.*64"):
        lora.load(tiny_llava(), tmp_path)


@pytest.mark.parametrize("others, alone", [("x = 1", True), ("import no_such_package", False)])
def test_merging_beside_a_model_py_of_another_project_needs_none_of_ours(tmp_path, others, alone):
    """What ours cannot import is an error, however."""
    shutil.copy(HERE / "lora.py", tmp_path)
    (tmp_path / "model.py").write_text(others)
    argv = [sys.executable, "lora.py", "merge", "--model_name_or_path", "a", "--adapter", "b", "--out", "c"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (2 if alone else 1)
    assert ("error: a has no model.safetensors" if alone else "no_such_package") in done.stderr


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


# --- pasted elsewhere ---

PASTED = """
import subprocess, sys, torch, lora
assert not {"peft", "transformers", "deepspeed", "bitsandbytes", "model"} & set(sys.modules)
from torch import nn
from pathlib import Path
from safetensors.torch import load_file, save_file

def plain():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)), torch.randn(2, 5, 32)

def causal_lm():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=50,
                         num_attention_heads=4, num_key_value_heads=2)
    return Qwen2ForCausalLM(config), torch.arange(20).view(2, 10)

def forward(model, x):
    y = model(x)
    return getattr(y, "logits", y)

for make, targets, whole in ((plain, r".*\\.linear[12]", "1"), (causal_lm, r".*_proj", "lm_head")):
    model, x = make()
    base, adapter, out = (Path(make.__name__ + end) for end in ("", "-lora", "-merged"))
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    lora.inject(model, targets, r=4, alpha=8)
    model.get_submodule(whole).requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = forward(model.train(), x).square().mean()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    lora.save(model, adapter, base, modules_to_save=[whole])
    loaded = make()[0]
    lora.load(loaded, adapter, base)
    command = [sys.executable, "lora.py", "merge", "--model_name_or_path", str(base)]
    subprocess.run(command + ["--adapter", str(adapter), "--out", str(out)], check=True)
    merged = make()[0]
    merged.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        a, b, c, d = (forward(m.eval(), x) for m in (model, loaded, merged, make()[0]))
    assert torch.equal(a, b) and (a - c).abs().max() < 1e-5 and (a - d).abs().max() > 1e-2
"""


def test_the_file_alone_adapts_models_that_have_nothing_to_do_with_llava(tmp_path):
    shutil.copy(Path(lora.__file__), tmp_path)
    subprocess.run([sys.executable, "-c", PASTED], cwd=tmp_path, check=True)


# --- train.py ---


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small LLaVA (28-pixel pictures, 4 tokens each) and rows of every kind for it."""
    root = tmp_path_factory.mktemp("world")
    built(root)
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), np.uint8)).save(
            root / f"images/{i}.png"
        )
    turns = [
        ("What is in the picture?", "A red circle."),
        ("Hello", "A blue square, a circle."),
        ("hi?", "no"),
    ]
    rows = []
    for i in range(12):
        pictures = [1, 0, 2, 1][i % 4]
        asked = turns[: 1 + i % 3]
        rows.append(
            {
                "id": f"r{i}",
                "image": [f"{(i + j) % 12}.png" for j in range(pictures)],
                "conversations": [
                    {
                        "from": who,
                        "value": "<image>\n" * (pictures * (k == 0 and who == "human")) + words,
                    }
                    for k, turn in enumerate(asked)
                    for who, words in zip(("human", "gpt"), turn)
                ],
            }
        )
    captions = [
        {
            "id": f"c{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": f"circle {i}"},
            ],
        }
        for i in range(12)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def argv_of(world, out, **flags):
    flags = {
        "model_name_or_path": world / "llava",
        "data_path": world / "rows.json",
        "image_folder": world / "images",
        "output_dir": out,
        "train_type": "full",
        "bf16": False,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "eval_samples": 2,
        "max_new_tokens": 4,
        "dataloader_num_workers": 0,
    } | flags
    return [
        word
        for key, value in flags.items()
        if value is not None
        for word in (f"--{key}", str(value))
    ]


def run(world, out, **flags):
    """Trains through main(argv) and returns (exit status, standard output, error output)."""
    argv = argv_of(world, out, **flags)
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = train.main(argv)
    return status, output.getvalue(), error.getvalue()


def metrics_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses_of(out):
    return [m["loss"] for m in metrics_of(out) if "loss" in m]


def weights_of(out):
    return {
        k: v
        for file in (Path(out) / "final").glob("*.safetensors")
        for k, v in load_file(file).items()
    }


def test_any_split_of_a_window_gives_the_same_gradients(world):
    """Micro-batches, their order, padding, ranks: float64, 1e-10. Checkpointing changes nothing either."""
    rows = data.open_dataset(world / "rows.json", world / "images", world / "llava")
    steps = data.plan_epoch(rows.records.lengths, rows.records.has_picture, 12, 0, 0, False)

    def gradients(accumulation, world_size=1, reverse=False, checkpointing=False):
        model = llava.from_pretrained(world / "llava", torch.float64).train()
        if checkpointing:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
        batches = [
            collate([rows[i] for i in batch])
            for rank in range(world_size)
            for batch in data.micro_batches(steps, accumulation, world_size, rank)
        ]
        tokens = sum((b["labels"] >= 0).sum() for b in batches)
        for b in reversed(batches) if reverse else batches:
            (model(b["input_ids"], b["pixel_values"], b["labels"])[0] / tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients(1)
    assert whole.norm() > 1e-3
    for split in (
        dict(accumulation=12),
        dict(accumulation=3, reverse=True),
        dict(accumulation=2, world_size=3),
        dict(accumulation=1, checkpointing=True),
    ):
        assert (gradients(**split) - whole).abs().max() < 1e-10, split


def test_the_loop_is_plain_adamw_with_clipping_and_schedule(world, tmp_path):
    """Six steps of the program against ten lines of torch; 3 x 4 accumulated = 12 at once."""
    status, *_ = run(
        world, tmp_path / "a", gradient_accumulation_steps=3, weight_decay=0.1, mm_projector_lr=3e-3
    )
    assert status == 0
    model = llava.from_pretrained(world / "llava", torch.float32)
    rows = data.open_dataset(world / "rows.json", world / "images", world / "llava")
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "lr": 3e-3 if "projector" in name else 1e-2,
                "weight_decay": 0.1 if p.ndim > 1 else 0,
            }
            for name, p in named
        ]
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, 6)
    losses = []
    for _ in range(6):
        b = collate([rows[i] for i in range(12)])
        loss = model(b["input_ids"], b["pixel_values"], b["labels"])[0] / (b["labels"] >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), scheduler.step()
        losses.append(loss.item())
    assert losses_of(tmp_path / "a") == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]
    saved = weights_of(tmp_path / "a")
    for name, p in named:
        if "lm_head" not in name:
            assert (saved[name] - p).abs().max() < 2e-4, name


def test_schedules_are_those_of_transformers():
    for kind, make in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make(optimizer, 3, 20)
        for step in range(20):
            assert train.schedule(step, 20, 3, kind) == pytest.approx(
                scheduler.get_last_lr()[0], abs=1e-12
            )
            optimizer.step(), scheduler.step()
    assert train.schedule(5, 20, 3, "constant") == 1


@pytest.mark.parametrize(
    "train_type, moved",
    [
        ("projector", {"multi_modal_projector"}),
        ("freeze_vision", {"multi_modal_projector", "language_model"}),
        ("full", {"multi_modal_projector", "language_model", "vision_tower"}),
    ],
)
def test_each_train_type_moves_its_modules_and_no_other(world, tmp_path, train_type, moved):
    """Traps 16, 17, 18. Every weight of a moving module moves (but k_proj.bias, which softmax ignores)."""
    captions = {"data_path": world / "captions.json"} if train_type == "projector" else {}
    assert (
        run(world, tmp_path / "a", train_type=train_type, max_steps=2, warmup_ratio=0, **captions)[
            0
        ]
        == 0
    )
    before, after = load_file(world / "llava" / "model.safetensors"), weights_of(tmp_path / "a")
    assert before.keys() == after.keys()
    built_tower = llava.from_pretrained(world / "llava").state_dict()
    for name in before:
        should = (
            name.split(".")[0] in moved and name in built_tower and not name.endswith("k_proj.bias")
        )
        same = torch.equal(before[name], after[name])
        assert same != should or name.endswith("k_proj.bias"), name


STAGE_1 = dict(train_type="projector")
LORA = dict(train_type="use_lora", lora_r=4, lora_alpha=8, learning_rate=1e-2, mm_projector_lr=1e-3)
OWN = dict(lora_r=None, lora_alpha=None)  # what an adapter that is there has already


@pytest.mark.parametrize("kind", [{}, {"bf16": True}, LORA, {**LORA, "bits": 4}, STAGE_1])
def test_a_run_that_was_interrupted_equals_one_that_was_not(world, tmp_path, kind):
    """Trap 40: bit for bit, losses and weights, in the middle of an epoch, dropout included."""
    flags = (
        dict(
            data_path=world / "captions.json" if kind == STAGE_1 else world / "rows.json",
            save_steps=2,
            save_total_limit=-1,
            per_device_train_batch_size=2,
            validation_data_path=world / "captions.json"
            if kind == STAGE_1
            else world / "rows.json",
        )
        | kind
    )
    assert run(world, tmp_path / "a", **flags)[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for gone in ("final", "checkpoint-6"):
        shutil.rmtree(tmp_path / "b" / gone)
    (tmp_path / "b" / "checkpoint-7.part").mkdir()  # what a run leaves that dies while it saves
    status, output, _ = run(world, tmp_path / "b", **flags, resume_from_checkpoint="latest")
    assert status == 0 and "checkpoint-4" in output
    assert (
        losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
        and len(losses_of(tmp_path / "a")) == 6
    )
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [m for m in metrics_of(tmp_path / "a") if "eval_loss" in m] == [
        m for m in metrics_of(tmp_path / "b") if "eval_loss" in m
    ]
    assert run(world, tmp_path / "b", **flags, resume_from_checkpoint="latest")[1].endswith(
        "complete\n"
    )


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(world, tmp_path):
    flags = dict(max_steps=40, per_device_train_batch_size=2, dataloader_num_workers=1)
    assert run(world, tmp_path / "a", **flags)[0] == 0
    argv = argv_of(world, tmp_path / "b", **flags)
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *argv], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("5/40"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    assert 5 <= int(train.checkpoints(tmp_path / "b")[-1].name.split("-")[1]) < 40
    assert run(world, tmp_path / "b", **flags, resume_from_checkpoint="latest")[0] == 0
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def parsed(train_type, *more):
    """The arguments that follow from the flags that a run cannot do without, and more."""
    needed = "--model_name_or_path x --data_path x --output_dir x --train_type".split()
    return train.parse([*needed, train_type, *more])


def test_bf16_keeps_fp32_masters_and_sums(world):
    """Small gradients survive accumulation, and updates too small for bf16 are not lost."""
    model = llava.from_pretrained(world / "llava", torch.bfloat16)
    args = parsed("projector")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "multi_modal_projector.linear_1.weight")
    engine = train.Plain(model, args)
    weight = model.multi_modal_projector.linear_1.weight
    for _ in range(300):  # bf16 alone would stop at 256 + 1 = 256
        engine.backward(weight.float().sum(), last=False)
    (master,) = engine.masters.values()
    assert (
        master.grad.unique().item() == 300 and weight.grad is None and master.dtype == torch.float32
    )
    before = master.clone()
    for _ in range(20):
        engine.backward(weight.float().sum(), last=True)
        engine.step(1e-3)
    assert (master < before).all() and torch.equal(weight, master.to(torch.bfloat16))


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
        world,
        tmp_path / "b",
        validation_data_path=tmp_path / "rows.json",
        on_bad_record="skip",
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
    dark = [greys(sheet)[420:] < 200 for sheet in (plain, wrong)]  # the two words, less their colour
    assert (dark[0] != dark[1]).sum() > 100
    for some in (answers, [answers[2] | long] * 3, [answers[1]], []):
        pixels = greys(train.draw_samples(some, rows, "title"))
        for k in range(4):  # what is between the columns of cards stays white
            assert (pixels[96:, 528 * k + 2 : 528 * k + 44] == 255).all()
        assert (pixels[-6:] == 255).all()
    assert train.draw_samples(answers, rows, "").size == train.draw_samples(answers[:12], rows, "").size


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
    monkeypatch.setattr(
        train, "draw_samples", lambda *args: drawn.append(draw(*args)) or drawn[-1]
    )
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
    assert not list((tmp_path / "a").glob("*.part")) and max(map(len, output.split("\n")[:-5])) <= 80


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
    monkeypatch.setitem(sys.modules, "wandb" if kind == "wandb" else "torch.utils.tensorboard", module)
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
# --- many processes ---


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def server():
    """Forks processes that have imported everything already: a launch takes a second, not ten."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    context.set_forkserver_preload(["deepspeed", "test_smoke"])
    return context


def be_rank(rank, ranks, port, argv, report, limit_bytes):
    """What the launcher has a process do. limit_bytes is the size from which its files fail to grow."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCH_EXTENSIONS_DIR"] = os.devnull  # nothing is compiled: killed, it leaves a lock
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    sys.exit(train.main(argv))


def start(world, out, ranks=1, limits={}, target=be_rank, **flags):
    """The processes of a run, started; what rank r prints goes to the file OUT-r.txt."""
    argv, port = argv_of(world, out, **flags), free_port()
    processes = [
        server().Process(
            target=target, args=(r, ranks, port, argv, f"{out}-{r}.txt", limits.get(r))
        )
        for r in range(ranks)
    ]
    for r, process in enumerate(processes):
        Path(f"{out}-{r}.txt").unlink(missing_ok=True)
        process.start()
    return processes


def end(processes, seconds=120):
    """Their exit statuses; fails if they hang."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    hang = [process for process in processes if process.is_alive()]
    for process in hang:
        process.kill()
    assert not hang, f"{len(hang)} of {len(processes)} processes hang"
    return [process.exitcode for process in processes]


def launch(world, out, ranks=1, limits={}, target=be_rank, **flags):
    """(exit statuses, all that was printed) of a run by `ranks` processes."""
    statuses = end(start(world, out, ranks, limits, target, **flags))
    return statuses, "".join(Path(f"{out}-{r}.txt").read_text() for r in range(ranks))


def wait_for(condition, processes, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and any(process.is_alive() for process in processes):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.002)


def lines_in(path):
    return path.read_text().count("\n") if path.is_file() else 0


ZERO = {stage: {"deepspeed": HERE / f"ds_zero{stage}.json"} for stage in (2, 3)}
STILL = {"lora_dropout": 0}  # ranks draw different masks
KINDS = {
    "projector": STAGE_1 | {"learning_rate": 1e-3},
    "freeze_vision": {"train_type": "freeze_vision", "learning_rate": 1e-3},
    "full": {"train_type": "full", "learning_rate": 1e-3},
    "lora": LORA | STILL | {"learning_rate": 1e-3},
    "qlora": LORA | STILL | {"learning_rate": 1e-3, "bits": 4},
}


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    """The folder of a run without DeepSpeed, of 8 rows a step, made once for each kind."""
    root = tmp_path_factory.mktemp("one")

    @functools.cache
    def made(kind, steps, bf16=False, micro=8, stage=2):
        out = root / f"{kind}-{steps}-{bf16}-{micro}-{stage}"
        split = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro)
        with rounding_like_a_rank(stage):
            status, output, error = run(world, out, **zero_flags(world, kind, steps, bf16), **split)
        assert status == 0, error
        (out / "output.txt").write_text(output)
        return out

    return made


@contextlib.contextmanager
def rounding_like_a_rank(stage):
    """In bf16 a sum's order shows. A rank has one thread. Under ZeRO-3 each module gets tensors of its
    own, so that their gradients meet in another order, and linear layers round before the bias, too.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    def own(module, inputs):
        return tuple(x.view_as(x) if torch.is_tensor(x) else x for x in inputs)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if stage == 3:
            patch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
            hook = torch.nn.modules.module.register_module_forward_pre_hook(own)
            stack.callback(hook.remove)
        yield
    torch.set_num_threads(threads)


def zero_flags(world, kind, steps, bf16):
    rows = world / ("captions.json" if kind == "projector" else "rows.json")
    return (
        {
            "data_path": rows,
            "validation_data_path": rows,
            "bf16": bf16,
            "max_steps": steps,
            "eval_steps": steps,
            "eval_samples": 2,
            "max_new_tokens": 6,
            "per_device_eval_batch_size": 1,
            "warmup_ratio": 0,
            "weight_decay": 0.1,
        }
        | KINDS[kind]
        | ({"learning_rate": 1e-4} if bf16 else {})
    )


# Stage, offload, ranks, train type, accumulation, bf16.
ALL = [
    (stage, offload, ranks, kind, accumulation, bf16)
    for stage in (2, 3)
    for offload in ("none", "optimizer", "all")[:stage]
    for ranks in (2, 1)
    for kind in KINDS
    for accumulation in (4, 1)
    for bf16 in (False, True)
]


def pairwise(cases):
    """Few of the cases, in which any two values stand together that do so in one of all."""
    pairs = lambda case: set(itertools.combinations(enumerate(case), 2))  # noqa: E731
    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


@pytest.mark.parametrize(
    "stage, offload, ranks, kind, accumulation, bf16, steps",
    [(*case, 3) for case in pairwise(ALL)]
    + [(2, "none", 2, "full", 4, True, 3)]  # the shortest that sees sums of gradients in bf16
    + [pytest.param(*case, 10, marks=pytest.mark.long) for case in ALL],
)
def test_many_processes_equal_one(
    world, one_process, tmp_path, stage, offload, ranks, kind, accumulation, bf16, steps
):
    """ZeRO-2, ZeRO-3 and offloads, rows of every kind, ranks without a picture, clipping at work: losses,
    weights, evaluation, answers are those of plain torch in one process (users' troubles 4, 8, 14, 19).
    """
    micro, many = 8 // ranks // accumulation, tmp_path / "many"
    # In fp32 however the rows are split; bf16 rounds a batch as it is.
    one = one_process(kind, steps, True, micro, stage) if bf16 else one_process(kind, steps)
    statuses, output = launch(
        world, many, ranks, **zero_flags(world, kind, steps, bf16), **ZERO[stage], offload=offload,
        per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert statuses == [0] * ranks, output
    tolerance = 1e-3 if bf16 else 1e-5
    assert losses_of(one) == pytest.approx(losses_of(many), abs=tolerance)
    assert max(m["grad_norm"] for m in metrics_of(many) if "loss" in m) > 1  # clipped
    a, b = weights_of(one), weights_of(many)
    assert a.keys() == b.keys()
    # Keys' biases are left out: softmax ignores them, so AdamW scales up what rounding leaves of zero.
    off = {k: (a[k].float() - b[k].float()).abs().max().item() for k in a if "k_proj.bias" not in k}
    assert max(off.values()) < tolerance, max(off, key=off.get)
    ours, theirs = (
        [m["eval_loss"] for m in metrics_of(x) if "eval_loss" in m] for x in (one, many)
    )
    assert ours == pytest.approx(theirs, abs=tolerance)
    said = [(x / "predictions.jsonl").read_text().splitlines() for x in (one, many)]
    assert sorted(said[0]) == sorted(said[1])
    module = r"^(?:vision_tower|multi_modal|language_model).*$"
    ours, theirs = (
        re.findall(module, text, re.M) for text in ((one / "output.txt").read_text(), output)
    )
    assert ours == theirs and len(ours) == 3  # the table of parameters


def test_zero_3_casts_what_the_file_holds_in_another_dtype(world, tmp_path):
    """Its weights stay mapped, in the file's dtype, until they are partitioned."""
    folder = built(tmp_path, dtype=torch.bfloat16)
    flags = LORA | STILL | {"model_name_or_path": folder, "max_steps": 3, "eval_samples": 0}
    assert run(world, tmp_path / "a", **flags)[0] == 0
    statuses, output = launch(world, tmp_path / "b", **flags, **ZERO[3])
    assert statuses == [0], output
    assert losses_of(tmp_path / "a") == pytest.approx(losses_of(tmp_path / "b"), abs=1e-5)


def be_measured(rank, ranks, port, argv, at_start, loaded, report):
    """Reports MiB of masters and moments, and of weights, that a process holds. It waits `at_start` before
    it loads the model, and says when all have `loaded` it.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = train.parse(argv)
    config = train.deepspeed_config(args)
    train.start_processes(args)
    stage = config["zero_optimization"]["stage"]
    config["zero_optimization"]["reduce_bucket_size"] = 10**6  # 4 bytes each, twice: not in question
    for _ in ("measured before", "go"):
        at_start.wait(100)
    model = train.load_model(args, Path(args.model_name_or_path), "cpu", stage)
    engine = train.ZeRO(model, args, config)
    torch.distributed.barrier()
    loaded.set()
    size = model.config.vision_config.image_size
    ids = torch.ones(1, 8, dtype=torch.long)
    loss, _ = engine.forward(ids, torch.zeros(0, 3, size, size), ids)
    engine.backward(loss, True)
    engine.step(1.0)
    adam = engine.optimizer.optimizer  # DeepSpeed's around torch's
    held = [p for group in adam.param_groups for p in group["params"]]
    held += [x for state in adam.state.values() for x in state.values() if x.ndim]
    weights = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    report.put(
        [sum(x.numel() * x.element_size() for x in tensors) / 2**20 for tensors in (held, weights)]
    )
    torch.distributed.barrier()


def proportional(processes):
    """MiB that processes hold together, of their own and mapped from files: PSS, in which a page that n
    processes share counts 1/n for each. They stand still meanwhile, so that it is of one moment.
    """
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    texts = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in processes]
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    return [
        sum(int(re.search(rf"{key}: +(\d+)", text)[1]) for text in texts) / 2**10
        for key in ("Pss_Anon", "Pss_File")
    ]


def measured(folder, stage, ranks, train_type):
    """MiB: what each process holds, [(masters and moments, weights)], and by how much that of all
    together grew at most while the model was loaded, [of their own, mapped from the file].
    """
    argv = argv_of(folder.parent, folder.parent / "out", **ZERO[stage], train_type=train_type)
    at_start, loaded = server().Barrier(ranks + 1), server().Event()
    report, port = server().Queue(), free_port()
    processes = [
        server().Process(
            target=be_measured, args=(r, ranks, port, argv, at_start, loaded, report)
        )
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    at_start.wait(100)
    before = peak = proportional(processes)
    at_start.wait(100)
    while not loaded.wait(0.02):
        assert all(process.is_alive() for process in processes)
        peak = list(map(max, peak, proportional(processes)))
    held = [report.get(timeout=200) for _ in processes]
    assert end(processes) == [0] * ranks
    return held, [high - low for high, low in zip(peak, before)]


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    """A LLaVA of 1 GB in fp32: random weights, the language model almost all of it."""
    root = tmp_path_factory.mktemp("gigabyte")
    vision, text = parts(root)
    config = Qwen2Config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=320, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(text)
    llava.build(vision, text, root / "llava")
    return root / "llava"


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_of_a_process_falls_with_their_number(gigabyte, ranks):
    """ZeRO-2 partitions masters and moments, ZeRO-3 the weights too; while a model is loaded for it no
    process has a copy of its own, but maps the file, whose pages all share: two processes cost no more
    than one (measured: 1, 2, 4 have 1577, 1296, 1604 MiB of their own and map 1006, for a model of 986).
    """
    size = (gigabyte / "model.safetensors").stat().st_size / 2**20
    assert 900 < size < 1100
    adam, weights = zip(*measured(gigabyte, 2, ranks, "freeze_vision")[0])
    print(f"\nZeRO-2, {ranks}: optimizer {max(adam):.0f} MiB, weights {max(weights):.0f} MiB")
    assert max(adam) == pytest.approx(3 * size / ranks, rel=0.01)
    held, (own, mapped) = measured(gigabyte, 3, ranks, "projector")
    weights = max(weights for _, weights in held)
    print(f"ZeRO-3, {ranks}: weights {weights:.0f} MiB; while loading all have {own:.0f} MiB of their own, "
          f"{mapped:.0f} MiB of the file")  # fmt: skip
    assert weights == pytest.approx(size / ranks, rel=0.05)
    # Together: the model once as it is partitioned, once as it is mapped; some buffers of each process.
    assert own < size + 650 * ranks and mapped < size + 50


@pytest.mark.long
def test_the_launcher_starts_what_equals_one_process(world, one_process, tmp_path):  # trap 41
    flags = zero_flags(world, "full", 3, False) | ZERO[2] | {"per_device_train_batch_size": 4}
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port"]
    command = [*launcher, free_port(), HERE / "train.py", *argv_of(world, tmp_path / "a", **flags)]
    threads = {"OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], check=True, env={**os.environ, **threads}, timeout=200)
    one = losses_of(one_process("full", 3))
    assert losses_of(tmp_path / "a") == pytest.approx(one, abs=1e-5)


def test_a_users_error_under_the_launcher_is_its_status_and_one_line(world, tmp_path):
    """Which stands alone among all that the launcher prints."""
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port"]
    flags = ZERO[2] | {"data_path": tmp_path / "missing.json"}
    command = [*launcher, free_port(), HERE / "train.py", *argv_of(world, tmp_path / "a", **flags)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "missing.json" in line]
    (ours,) = [line for line in lines if line.startswith("train.py: ")]
    assert done.returncode == 2 and "no such file" in ours.lower() and "Traceback" not in done.stderr


def be_rank_on_a_node_without_the_data(rank, *args):
    if rank == 1:
        os.chdir("/")
    be_rank(rank, *args)


def test_what_is_wrong_for_all_ranks_or_for_one_is_said_once(world, tmp_path, monkeypatch):
    """And none waits for another. A path is wrong for one rank only if nodes differ."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    wrong = [
        ({"model_name_or_path": tmp_path / "no model"}, "no model"),
        ({"validation_data_path": tmp_path / "no rows.json"}, "no rows.json"),
        ({"output_dir": tmp_path / "full"}, "not empty"),
        ({"deepspeed": tmp_path / "ds.json"}, "needs a stage, 2 or 3"),
    ]
    for flags, says in wrong:
        statuses, output = launch(world, tmp_path / "a", 2, **ZERO[2] | flags)
        lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert statuses == [2, 2] and len(lines) == 1 and says in lines[0], output
        assert "Traceback" not in output
    monkeypatch.chdir(world)
    flags = ZERO[2] | {"data_path": "rows.json"}
    statuses, output = launch(
        world, tmp_path / "a", 2, target=be_rank_on_a_node_without_the_data, **flags
    )
    assert statuses == [2, 2] and output.count("train.py: ") == 1 and "rows.json" in output, output
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_fewer_records_than_processes_and_a_bad_one_stop_nobody_or_all(world, tmp_path, stage):
    """Trap 32: the one row that there is falls to one of two ranks, to the other falls none."""
    rows = json.loads((world / "rows.json").read_text())[:1]
    for name, image in (("good", "0.png"), ("bad", "missing.png")):
        rows[0]["image"] = [image]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = ZERO[stage] | {
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "train_type": "projector",
    }
    flags |= {"validation_data_path": tmp_path / "good.json", "version": "own"}
    good = tmp_path / "good.json"
    statuses, output = launch(world, tmp_path / "a", 2, data_path=good, **flags)
    assert statuses == [0, 0], output
    assert [m["samples_per_s"] > 0 for m in metrics_of(tmp_path / "a") if "loss" in m] == [
        True,
        True,
    ]
    assert lines_in(tmp_path / "a" / "predictions.jsonl") == 3  # one question, asked three times
    two = json.loads(good.read_text()) + json.loads((tmp_path / "bad.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps(two))
    statuses, output = launch(world, tmp_path / "b", 2, data_path=tmp_path / "two.json", **flags)
    assert statuses == [2, 2] and output.count("train.py: ") == 1 and "row 1 (id r0)" in output


def test_ranks_whose_answers_end_at_different_lengths_wait_for_one_another(world, tmp_path):
    """Under ZeRO-3, after learning the rows by heart: answers of 1 to 7 words, one a batch."""
    flags = {"learning_rate": 1e-2, "max_steps": 60, "per_device_train_batch_size": 12}
    assert run(world, tmp_path / "a", **flags)[0] == 0
    flags |= {"model_name_or_path": tmp_path / "a" / "final", "max_steps": 1, "learning_rate": 0}
    flags |= {"validation_data_path": world / "rows.json", "max_new_tokens": 12, "eval_samples": 3}
    flags |= {"per_device_eval_batch_size": 1, "train_type": "projector", "version": "own"}
    assert run(world, tmp_path / "b", **flags)[0] == 0
    flags |= ZERO[3] | {"per_device_train_batch_size": 6}
    statuses, output = launch(world, tmp_path / "c", 2, **flags)
    assert statuses == [0, 0], output
    one, two = ((tmp_path / x / "predictions.jsonl").read_text().splitlines() for x in "bc")
    assert sorted(one) == sorted(two)
    assert len({len(json.loads(line)["prediction"]) for line in one}) > 1


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The folder of a run with a checkpoint at each step, and its flags: on one process, or ZeRO-2."""
    root = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def made(ranks):
        flags = LORA | dict(save_steps=1, max_steps=8, save_total_limit=-1)
        flags |= dict(per_device_train_batch_size=4 // ranks) | (ZERO[2] if ranks > 1 else {})
        statuses, output = launch(world, root / f"{ranks}", ranks, **flags)
        assert statuses == [0] * ranks, output
        return root / f"{ranks}", flags

    return made


def same_end(a, b):
    a_weights, b_weights = weights_of(a), weights_of(b)
    assert losses_of(a) == losses_of(b) and a_weights.keys() == b_weights.keys()
    assert all(torch.equal(a_weights[name], b_weights[name]) for name in a_weights)


def cut_back(run_folder, out, step):
    """A copy of a run, as it was after the checkpoint of a step."""
    shutil.copytree(run_folder, out)
    shutil.rmtree(out / "final")
    for path in train.checkpoints(out):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_a_run_comes_to_the_same_end(
    world, undisturbed, tmp_path, ranks, kills
):
    """SIGKILL at random moments, every other one while a checkpoint is written. Users' trouble 5."""
    whole, flags = undisturbed(ranks)
    out, draw, at = tmp_path / "a", random.Random(ranks), []
    flags = flags | {"resume_from_checkpoint": "latest"}
    parts = lambda: set(out.glob("checkpoint-*.part"))  # noqa: E731
    while len(at) < kills:
        stale, before = parts(), lines_in(out / "metrics.jsonl")
        processes = start(world, out, ranks, **flags)
        if len(at) % 2:
            wait_for(lambda: parts() - stale, processes)
            time.sleep(draw.uniform(0, 0.02))
        else:
            wait_for(lambda: lines_in(out / "metrics.jsonl") > before, processes)
            time.sleep(draw.uniform(0, 0.1))
        moment = "save" if parts() - stale else "step"
        for process in processes:
            process.kill()
        if -signal.SIGKILL in end(processes):
            at.append(moment)
        else:  # it was at its end
            same_end(whole, out)
            shutil.rmtree(out)
    assert kills == 3 or "save" in at
    statuses, output = launch(world, out, ranks, **flags)
    assert statuses == [0] * ranks, output
    same_end(whole, out)
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("way", ["signal", "file"])
def test_asked_to_stop_all_ranks_save_at_the_same_step(world, undisturbed, tmp_path, way):
    whole, flags = undisturbed(2)
    flags, out = flags | {"save_steps": -1}, tmp_path / "a"
    processes = start(world, out, 2, **flags)
    wait_for(lambda: lines_in(out / "metrics.jsonl") >= 2, processes)
    if way == "signal":
        os.kill(processes[1].pid, signal.SIGTERM)  # to one of them only
    else:
        (out / "stop").touch()
    assert end(processes) == [3, 3]
    (stopped,) = train.checkpoints(out)
    assert stopped.name == f"checkpoint-{metrics_of(out)[-1]['step']}"
    statuses, output = launch(world, out, 2, **flags, resume_from_checkpoint="latest")
    assert statuses == [0, 0], output
    same_end(whole, out)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_is_named_and_latest_takes_the_one_before(
    world, undisturbed, tmp_path, ranks
):
    whole, flags = undisturbed(ranks)
    cut_back(whole, tmp_path / "a", 4)
    damaged = {
        4: "rng-0.pt",
        3: "progress.json",
        2: "state*.pt" if ranks == 1 else "state/*_1_*.pt",
    }
    for step, name in damaged.items():
        (file,) = (tmp_path / "a" / f"checkpoint-{step}").glob(name)
        content = bytearray(file.read_bytes())
        if step == 4:  # a bit turns over, in the middle of a tensor
            content[len(content) // 2] ^= 1
        file.write_bytes(content if step == 4 else content[:-1])
        damaged[step] = file
    for step, file in damaged.items():
        folder = tmp_path / "a" / f"checkpoint-{step}"
        statuses, output = launch(
            world, tmp_path / "a", ranks, **flags, resume_from_checkpoint=folder
        )
        assert statuses == [2] * ranks and output.count("train.py: ") == 1
        (line,) = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert f"{file}: damaged" in line
    statuses, output = launch(
        world, tmp_path / "a", ranks, **flags, resume_from_checkpoint="latest"
    )
    assert statuses == [0] * ranks and output.count("passed over") == 3, output
    assert f"resumed from {tmp_path}/a/checkpoint-1" in output
    same_end(whole, tmp_path / "a")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", ["full", "unwritable", "blocked"])
def test_a_write_that_fails_on_one_rank_stops_all_with_one_line(
    world, undisturbed, tmp_path, ranks, fault
):
    """And the checkpoint before it is whole. A disk is full here for files above some size."""
    whole, flags = undisturbed(ranks)
    out = tmp_path / "a"
    cut_back(whole, out, 4)
    flags = flags | {"resume_from_checkpoint": "latest"}
    last = ranks - 1
    if fault == "unwritable":  # a folder is in the way of what only this rank writes
        (out / "checkpoint-5.part" / f"rng-{last}.pt").mkdir(parents=True)
    if fault == "blocked":
        (out / "checkpoint-5.part").touch()
    limits = {last: 20_000} if fault == "full" else {}
    statuses, output = launch(world, out, ranks, limits, **flags)
    lines = [line for line in output.splitlines() if "train.py: " in line]
    assert statuses == [2] * ranks and len(lines) == 1, output
    assert "checkpoint-5.part" in lines[0] and "not written" in lines[0]
    assert "Traceback" not in output
    assert train.checkpoints(out)[-1].name == "checkpoint-4"
    shutil.rmtree(out / "checkpoint-5.part") if fault == "unwritable" else None
    (out / "checkpoint-5.part").unlink() if fault == "blocked" else None
    assert launch(world, out, ranks, **flags)[0] == [0] * ranks
    same_end(whole, out)


@pytest.mark.parametrize(
    "stage, offload, kind, bf16, was, now",
    [
        (2, "none", "full", False, 2, 1),
        (2, "optimizer", "lora", True, 1, 2),
        (3, "none", "qlora", True, 2, 1),
        (3, "all", "full", False, 1, 2),
    ],
)
def test_another_number_of_processes_goes_on_to_the_same_end(
    world, tmp_path, stage, offload, kind, bf16, was, now
):
    """If a step keeps its rows. Groups of weights have rates and decay of their own, which must come back."""
    whole, out = tmp_path / "a", tmp_path / "b"
    flags = zero_flags(world, kind, 6, bf16) | ZERO[stage] | dict(offload=offload, eval_samples=0)
    flags |= dict(save_steps=3, weight_decay=0.1, mm_projector_lr=3e-4, per_device_train_batch_size=2)
    statuses, output = launch(world, whole, was, **flags, gradient_accumulation_steps=2 // was)
    assert statuses == [0] * was, output
    cut_back(whole, out, 3)
    flags["resume_from_checkpoint"] = "latest"
    statuses, output = launch(world, out, now, **flags, gradient_accumulation_steps=2)
    if now == 2:
        assert statuses == [2, 2] and output.count("train.py: ") == 1
        assert "of 4 rows a step, not 8" in output
        flags["gradient_accumulation_steps"] = 1
        statuses, output = launch(world, out, now, {0: 20_000}, **flags)  # a disk full of rewriting it
        assert statuses == [2, 2] and output.count("train.py: ") == 1, output
        assert "checkpoint-3.universal/state: not written" in output
        statuses, output = launch(world, out, now, **flags)
    assert statuses == [0] * now, output
    assert f"written by {was} processes, and these are {now}" in output
    assert losses_of(whole) == pytest.approx(losses_of(out), abs=1e-5)
    a, b = weights_of(whole), weights_of(out)
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a if "k_proj.bias" not in k)
    left = {path.name for path in out.iterdir() if path.is_dir()}
    assert left == {"best", "checkpoint-3", "checkpoint-6", "final"}
    assert json.loads((out / "checkpoint-6" / "progress.json").read_text())["world"] == now


def test_an_aspect_ratio_that_was_trained_with_is_saved(world, tmp_path):
    """What transformers' processor does with the saved folder is what training did."""
    assert run(world, tmp_path / "a", image_aspect_ratio="square", max_steps=1)[0] == 0
    image = Image.open(world / "images" / "3.png")
    pixels = AutoProcessor.from_pretrained(tmp_path / "a" / "final").image_processor(image)[
        "pixel_values"
    ][0]
    for ratio, same in (("square", True), ("pad", False)):
        ours = PictureTransform.from_pretrained(world / "llava", ratio)(image)
        assert (np.abs(ours - pixels).max() < 1e-5) == same
    assert PictureTransform.from_pretrained(tmp_path / "a" / "final").aspect_ratio == "square"


def test_two_stages_follow_each_other(world, tmp_path):
    """Stage 1 leaves the folder's template alone; stage 2 saves the one that it trains with, and chat uses it (trap 38)."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert (
        run(world, one, train_type="projector", data_path=world / "captions.json", max_steps=2)[0]
        == 0
    )
    template = lambda folder: (folder / "chat_template.jinja").read_text()  # noqa: E731
    assert template(one / "final") == template(world / "llava")
    assert run(world, two, model_name_or_path=one / "final", version="v1", max_steps=2)[0] == 0
    assert "ASSISTANT" in template(two / "final") and "ASSISTANT" not in template(one / "final")
    text = ChatText(AutoTokenizer.from_pretrained(two / "final"))
    assert "USER: hi ASSISTANT:" in text.render([{"role": "user", "content": "hi"}], prompt=True)


def test_text_only_rows_train_and_evaluate(world, tmp_path):
    rows = [r for r in json.loads((world / "rows.json").read_text()) if not r["image"]]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    status, output, error = run(
        world,
        tmp_path / "a",
        data_path=tmp_path / "text.json",
        image_folder=None,
        validation_data_path=tmp_path / "text.json",
        per_device_train_batch_size=2,
    )
    assert status == 0, error
    assert losses_of(tmp_path / "a")[-1] < losses_of(tmp_path / "a")[0]


def test_a_bad_record_stops_the_run_or_is_skipped_and_counted(world, tmp_path):
    """Trap 32. Skipped, it weighs nothing: the run equals one whose row has no supervised token."""
    rows = json.loads((world / "rows.json").read_text())
    rows[5]["image"] = "missing.png"
    rows[5]["conversations"][0]["value"] = "<image>\nWhat?"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows[6]["kinds"] = ["one of two"]  # not what ours means: an extra key, like any other
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for workers in (0, 1):
        status, _, error = run(
            world,
            tmp_path / f"a{workers}",
            data_path=tmp_path / "rows.json",
            dataloader_num_workers=workers,
        )
        assert (
            status == 2
            and error.count("\n") == 1
            and "row 5 (id r5)" in error
            and "missing.png" in error
        )
    status, _, error = run(
        world,
        tmp_path / "b",
        data_path=tmp_path / "rows.json",
        on_bad_record="skip",
        max_steps=3,
        validation_data_path=tmp_path / "rows.json",
        eval_samples=-1,
    )
    assert status == 0 and error.count("skipped: ") >= 3
    assert sum(m.get("samples_per_s", 0) > 0 for m in metrics_of(tmp_path / "b")) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_records(world, tmp_path):
    shutil.copytree(world / "llava", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    status, _, error = run(world, tmp_path / "a", model_name_or_path=tmp_path / "nan")
    assert (
        status == 2
        and "the loss is nan" in error
        and "id r" in error
        and not (tmp_path / "a" / "final").exists()
    )
    flags = {"eval_only": True, "train_type": None, "validation_data_path": world / "rows.json"}
    status, _, error = run(world, None, model_name_or_path=tmp_path / "nan", **flags)
    assert status == 2 and error.endswith("rows.json: the loss on its rows is nan\n")


def test_a_weight_that_should_train_and_gets_no_gradient_stops_the_run(
    world, tmp_path, monkeypatch
):
    """Trap 17."""
    load = train.load_model

    def with_an_idle_weight(*args):
        model = load(*args)
        model.multi_modal_projector.idle = nn.Parameter(torch.zeros(2))
        return model

    monkeypatch.setattr(train, "load_model", with_an_idle_weight)
    status, _, error = run(world, tmp_path / "a")
    assert (
        status == 2 and "idle should train, but its gradient is missing" in error
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(train_type="adapter"), "invalid choice"),
        (dict(bf16="maybe"), "neither True nor False"),
        (dict(data_path="no.json"), "no.json"),
        (dict(model_name_or_path="nowhere"), "nowhere"),
        (dict(image_folder="nowhere"), "nowhere"),
        (dict(image_folder=None), "--image_folder"),
        (dict(resume_from_checkpoint="nowhere", output_dir="HELD"), "nowhere"),
        (dict(output_dir="HELD"), "--resume_from_checkpoint latest"),
        (
            dict(output_dir="HELD", resume_from_checkpoint="latest", learning_rate=1),
            "--learning_rate",
        ),
        (dict(output_dir="OTHER"), "no run"),
        (dict(output_dir="SOURCE"), "the model comes from there"),
        (dict(output_dir="BLOCKED"), "not written"),
        (dict(deepspeed="no.json"), "no.json"),
        (dict(resume_from_checkpoint="nowhere"), "no run there"),
        (dict(eval_only=True, validation_data_path="rows.json", output_dir="OTHER"), "no run"),
        (dict(per_device_train_batch_size=0), "is not from 1"),
        (dict(learning_rate="nan"), "is not from 0"),
        (dict(num_train_epochs=-1), "is not from"),
        (dict(train_type="use_lora", lora_target_modules=".*q_proj"), "decoder's layers only"),
        (dict(train_type="use_lora", image_aspect_ratio="square"), "no place for another"),
        (dict(model_max_length=8), "model_max_length"),
        (dict(offload="optimizer"), "needs --deepspeed"),
        (dict(deepspeed=HERE / "ds_zero2.json", offload="all"), "use ds_zero3.json"),
        (dict(data_path=None), "--data_path is needed"),
        (dict(early_stopping_patience=2), "needs --validation_data_path"),
        (dict(lora_r=4, train_type="projector"), "--lora_r is for a new adapter"),
        (dict(lora_r=0, train_type="use_lora"), "is not from 1"),
        (dict(lora_alpha="nan", train_type="use_lora"), "is not from"),
        (dict(validation_data_path=""), "--validation_data_path is empty"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(world, tmp_path, flags, says):
    """Traps 9, 16, 35. Exit status 2, as argparse's own."""
    (tmp_path / "held").mkdir()
    args = run(world, tmp_path / "held2", max_steps=1) if "HELD" in flags.values() else None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    if args:
        shutil.rmtree(tmp_path / "held2" / "final")
    flags = {"max_steps": 1, "warmup_ratio": 0.03} | flags
    flags["output_dir"] = {
        "HELD": tmp_path / "held2",
        "OTHER": tmp_path / "other",
        "SOURCE": world / "llava",
        "BLOCKED": tmp_path / "other" / "thesis.tex" / "run",
    }.get(flags.get("output_dir"), tmp_path / "new")
    before = sorted(world.rglob("*")), sorted(tmp_path.rglob("*"))
    try:
        status, _, text = run(world, **{"out": flags.pop("output_dir")}, **flags)
    except SystemExit as stop:
        status, text = stop.code, says
    assert status == 2 and says in text and text.count("\n") <= 1
    assert before == (sorted(world.rglob("*")), sorted(tmp_path.rglob("*")))


def test_flags_of_llavas_scripts_are_taken_where_they_change_nothing(capsys):
    argv = [
        "--model_name_or_path=x",
        "--data_path",
        "x",
        "--output_dir",
        "x",
        "--train_type",
        "full",
    ]
    same = ["--lazy_preprocess", "True", "--lora_enable=False", "--mm_vision_select_layer", "-2"]
    assert vars(train.parse(argv + same)) == vars(train.parse(argv))
    with pytest.raises(SystemExit) as stop:
        train.parse([*argv, "--lora_enable", "True"])
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(
        "--lora_enable True: use --train_type use_lora\n"
    )


def test_published_defaults():
    """facts: LLaVA-1.5's scripts."""
    args = parsed("projector", "--local_rank=3")  # trap 41: the launcher's flag
    assert (args.learning_rate, args.version, args.warmup_ratio, args.weight_decay) == (
        1e-3,
        "plain",
        0.03,
        0,
    )
    assert (args.lr_scheduler_type, args.model_max_length, args.max_grad_norm) == (
        "cosine",
        2048,
        1.0,
    )
    assert args.per_device_train_batch_size == 32 and not args.gradient_checkpointing
    args = parsed("use_lora")
    assert (args.learning_rate, args.mm_projector_lr, args.lora_r, args.lora_alpha) == (
        2e-4,
        2e-5,
        128,
        256,
    )
    assert args.per_device_train_batch_size == 16 and args.gradient_checkpointing
    args = parsed("freeze_vision", "--mm_projector_lr", "1e-4", "--bf16")
    assert (args.learning_rate, args.mm_projector_lr, args.mm_vision_tower_lr, args.bf16) == (
        2e-5,
        1e-4,
        2e-5,
        True,
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [{"train_type": "full"}, LORA, LORA | {"bits": 4}])
def test_what_trains_has_one_dtype(world, kind, bf16):  # trap 22
    args = train.parse(argv_of(world, "out", **kind | {"bf16": bf16}))
    model = train.load_model(args, world / "llava", "cpu")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}


def test_deepspeed_files_leave_the_batch_to_the_flags(tmp_path):
    """Traps 24 to 26: no "auto", no key that DeepSpeed does not know, bf16 on, clipping from the flags;
    a file that says otherwise is refused.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (2, 3):
        file = HERE / f"ds_zero{stage}.json"
        assert "auto" not in file.read_text()
        config = train.deepspeed_config(parsed("full", "--bf16", "True", "--deepspeed", str(file)))
        assert (
            config["gradient_clipping"] == 1.0
            and config["bf16"]["enabled"]
            and config["zero_optimization"]["stage"] == stage
        )
        known = DeepSpeedZeroConfig.model_fields
        assert config["zero_optimization"].keys() <= {*known, *(f.alias for f in known.values())}
        assert "scheduler" not in config
        assert json.loads(file.read_text())["bf16"] == {"enabled": True}
        looser = parsed("full", "--max_grad_norm", "3", "--deepspeed", str(file))
        assert train.deepspeed_config(looser)["gradient_clipping"] == 3
        (tmp_path / "bad.json").write_text(
            json.dumps({**json.loads(file.read_text()), "gradient_clipping": 2})
        )
        with pytest.raises(ValueError, match="gradient_clipping"):
            train.deepspeed_config(parsed("full", "--bf16", "True", "--deepspeed", str(tmp_path / "bad.json")))


def test_flops_are_those_of_the_closed_form(world):
    model = llava.from_pretrained(world / "llava")
    batch = {
        "input_ids": torch.zeros(2, 30),
        "pixel_values": torch.zeros(3, 3, 28, 28),
        "labels": torch.where(torch.arange(30) < 20, -100, 1).expand(2, 30),
    }
    D, F, V, L, T, N, P = 32, 48, model.config.text_config.vocab_size, 2, 60, 3, 5
    decoder = (
        2 * T * L * (2 * D * D + 2 * D * D // 2 + 3 * D * F)
    )  # two of four heads are key-value heads
    tower = 2 * N * P * (2 * (4 * D * D + 2 * D * F) + 3 * 14 * 14 * D)
    attention = 4 * N * P * P * D * 2, 2 * 2 * 30 * 30 * D * L
    projector, head = 2 * N * 4 * 2 * D * D, 2 * 20 * D * V
    for p in model.parameters():
        p.requires_grad_(False)
    forward = tower + projector + decoder + head + sum(attention)
    assert train.count_flops(model, train.count_weights(model), batch) == forward
    model.multi_modal_projector.requires_grad_(True)
    assert (
        train.count_flops(model, train.count_weights(model), batch)
        == forward + 2 * projector + decoder + head + 2 * attention[1]
    )


@pytest.mark.parametrize("bits", [16, 4])
def test_a_trained_adapter_is_the_same_model_in_peft_and_merged(world, tmp_path, bits):
    """Users' troubles 7, 9, 12: what `evaluate` saw is what PEFT and transformers run."""
    from peft import PeftModel

    status, output, error = run(
        world,
        tmp_path / "a",
        **LORA
        | dict(
            bits=bits, save_steps=2, validation_data_path=world / "rows.json", save_total_limit=-1
        ),
    )
    assert status == 0 and "2 x language_model.model.layers.*.self_attn.q_proj" in output, error
    adapter = tmp_path / "a" / "final"
    assert (tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    (adapter / "chat_template.jinja").write_text(llava.CHATML + "{# trained #}")
    merge = [
        "merge",
        "--model_name_or_path",
        str(world / "llava"),
        "--adapter",
        str(adapter),
        "--out",
        str(tmp_path / "m"),
    ]
    assert lora.main(merge + ["--dequantize"] * (bits == 4)) == 0
    assert (tmp_path / "m" / "chat_template.jinja").read_text().endswith("{# trained #}")
    rows = data.open_dataset(world / "rows.json", world / "images", world / "llava")
    merged = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    ).eval()
    b = data.Collator(merged.config.image_token_id, 4)([rows[i] for i in range(12)])
    ours = llava.open_model(world / "llava", adapter, bits, torch.float32, "cpu").eval()
    with torch.no_grad():
        loss = ours(b["input_ids"], b["pixel_values"], b["labels"])[0] / (b["labels"] >= 0).sum()
        inputs = {key: b[key] for key in ("input_ids", "pixel_values", "labels")}
        logits = merged(**inputs).logits
        assert merged(**inputs).loss.item() == pytest.approx(loss.item(), abs=1e-5)
        if bits == 16:
            base = LlavaForConditionalGeneration.from_pretrained(
                world / "llava", dtype=torch.float32
            )
            theirs = PeftModel.from_pretrained(base, adapter).eval()(**inputs).logits
            assert (theirs - logits).abs().max() < 1e-4 and theirs.abs().max() > 1
    last = [m["eval_loss"] for m in metrics_of(tmp_path / "a") if "eval_loss" in m][-1]
    status, output, _ = run(
        world,
        None,
        train_type=None,
        data_path=None,
        eval_only=True,
        bits=bits,
        adapter=adapter,
        validation_data_path=world / "rows.json",
    )
    assert f"loss {last:.4f}" in output


def test_an_adapter_goes_on_learning_and_4_bits_are_for_lora_only(world, tmp_path):
    assert run(world, tmp_path / "a", **LORA | dict(max_steps=3))[0] == 0
    assert (
        run(
            world,
            tmp_path / "b",
            **LORA | OWN | dict(max_steps=3, adapter=tmp_path / "a" / "final", warmup_ratio=0),
        )[0]
        == 0
    )
    assert losses_of(tmp_path / "b")[0] < losses_of(tmp_path / "a")[0]
    adapter = dict(adapter=tmp_path / "a" / "final")
    shapes = [LORA | adapter | OWN | one for one in (dict(lora_r=128), dict(use_rslora=False))]
    for wrong in (dict(bits=8), dict(bits=4), adapter, *shapes):
        with pytest.raises(SystemExit) as stop:
            run(world, tmp_path / "c", **wrong)
        assert stop.value.code == 2
    status, _, error = run(world, tmp_path / "c", **LORA | dict(lora_target_modules="nothing"))
    assert status == 2 and "nothing" in error and not (tmp_path / "c").exists()


def test_an_adapter_that_trains_more_than_is_kept_is_refused(world, tmp_path):
    assert run(world, tmp_path / "a", **LORA | dict(max_steps=1))[0] == 0
    adapter, more = tmp_path / "a" / "final", "model.language_model.embed_tokens"
    config = json.loads((adapter / lora.CONFIG).read_text())
    config["modules_to_save"].append(more)
    (adapter / lora.CONFIG).write_text(json.dumps(config))
    tensors = load_file(adapter / lora.WEIGHTS)
    source = lora.read_folder(world / "llava")
    tensors[f"{lora.PREFIX}{more}.weight"] = source[llava.EMBEDDINGS].float()
    save_file(tensors, adapter / lora.WEIGHTS)
    status, _, error = run(world, tmp_path / "b", **LORA | OWN | dict(adapter=adapter))
    assert status == 2 and "embed_tokens.weight whole" in error and not (tmp_path / "b").exists()


def test_a_damaged_run_is_named_and_a_half_written_checkpoint_passed_over(world, tmp_path):
    flags = dict(save_steps=2, save_total_limit=-1)
    assert run(world, tmp_path / "a", **flags)[0] == 0
    shutil.rmtree(tmp_path / "a" / "final")
    (tmp_path / "a" / "checkpoint-9").mkdir()
    (tmp_path / "a" / "checkpoint-final-2").mkdir()
    assert train.checkpoints(tmp_path / "a")[-1].name == "checkpoint-6"
    assert run(world, tmp_path / "a", **flags, resume_from_checkpoint="latest")[0] == 0
    shutil.rmtree(tmp_path / "a" / "final")
    (tmp_path / "a" / "run.json").write_text("[]")
    status, _, error = run(world, tmp_path / "a", **flags, resume_from_checkpoint="latest")
    assert status == 2 and "run.json" in error and error.count("\n") == 1


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("file", ["state.pt", "rng-0.pt", "pytorch_model.bin"])
def test_code_in_a_file_of_weights_is_not_run(world, tmp_path, capsys, file):
    made = tmp_path / "made"
    if file == "pytorch_model.bin":
        vision, text = parts(tmp_path)
        (text / "model.safetensors").unlink()
        torch.save({"weight": Code(made)}, text / file)
        flags = ["--vision_tower", vision, "--language_model", text, "--out", tmp_path / "a"]
        assert file in refused(capsys, "build", *flags)
    else:
        flags = dict(save_steps=2, max_steps=2)
        assert run(world, tmp_path / "a", **flags)[0] == 0
        shutil.rmtree(tmp_path / "a" / "final")
        folder = tmp_path / "a" / "checkpoint-2"
        content = torch.load(folder / file, weights_only=True)
        torch.save({**content, "more": Code(made)}, folder / file)
        progress = json.loads((folder / "progress.json").read_text())
        progress["files"][file] = (folder / file).stat().st_size
        (folder / "progress.json").write_text(json.dumps(progress))
        with pytest.raises(pickle.UnpicklingError):
            run(world, tmp_path / "a", **flags, resume_from_checkpoint="latest")
    assert not made.exists()


def test_a_dry_run_measures_the_heaviest_step_and_writes_nothing(world, tmp_path):
    out = tmp_path / "run"
    status, printed, _ = run(world, out, dry_run=True, max_steps=100, validation_data_path=world / "rows.json")
    assert status == 0 and not out.exists()
    line = printed.splitlines()[-1]
    assert re.fullmatch(
        r"dry run: peak [\d.]+ GiB, of it [\d.]+ before .*; 100 steps take \d+:\d\d:\d\d, .*", line
    )
    lengths = np.array([10, 20, 30, 40])
    trial = train.Trial(np.array([[2, 3], [0, 1]]), lengths, 50, "cpu")
    assert trial.plan.tolist() == [[2, 3], [2, 3], [0, 1]]
    trial.seconds = [99, 7, 3]  # 0.1 seconds a token, and 50 tokens a step on average
    said = trial.report({"gradients": 3 * 2**30, "moments": 2 * 2**30})
    assert "50 steps take 0:04:10" in said and "5.00 gradients and moments" in said


@pytest.mark.long
def test_a_dry_run_is_right_within_15_percent(tmp_path):
    """Peak and total time against those of the run itself, each in its own process."""
    llava.build_tiny(tmp_path / "model", data.toy_words(200))
    data.toy(tmp_path / "toy", 240, 0)
    argv = [sys.executable, HERE / "train.py", "--model_name_or_path", tmp_path / "model", "--train_type", "full"]
    argv += ["--data_path", tmp_path / "toy/train.json", "--image_folder", tmp_path / "toy/images"]
    argv += ["--output_dir", tmp_path / "run", "--per_device_train_batch_size", "8"]
    said = subprocess.run([*argv, "--dry_run"], capture_output=True, text=True, check=True).stdout
    peak, takes = re.search(r"peak ([\d.]+) GiB.* take ([\d:]+),", said).groups()
    seconds = sum(int(part) * 60**i for i, part in enumerate(reversed(takes.split(":"))))
    subprocess.run(argv, check=True, capture_output=True)
    lines = metrics_of(tmp_path / "run")
    assert float(peak) == pytest.approx(lines[-1]["peak_gib"], rel=0.15)
    assert seconds == pytest.approx(sum(8 / line["samples_per_s"] for line in lines), rel=0.15)


@pytest.mark.parametrize("gpu", [False, True])
def test_out_of_memory_is_one_line_with_the_next_flag_to_try(world, tmp_path, monkeypatch, gpu):
    def forward(*_):
        if gpu:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.empty(2**60)

    monkeypatch.setattr(llava.Llava, "forward", forward)
    for n, (flags, says) in enumerate(
        [
            (
                {},
                "--per_device_train_batch_size 2 --gradient_accumulation_steps 2",
            ),
            (
                {"per_device_train_batch_size": 3},
                "--per_device_train_batch_size 1 --gradient_accumulation_steps 3",
            ),
            (
                {"per_device_train_batch_size": 1, "gradient_checkpointing": False},
                "try --gradient_checkpointing",
            ),
            ({"per_device_train_batch_size": 1, "train_type": "use_lora"}, "try --bits 4"),
            ({"per_device_train_batch_size": 1}, "ds_zero3.json"),
            (
                {
                    "data_path": None,
                    "train_type": None,
                    "output_dir": None,
                    "validation_data_path": world / "rows.json",
                    "eval_only": True,
                },
                "--per_device_eval_batch_size 8",
            ),
        ]
    ):
        status, _, error = run(world, tmp_path / str(n), **flags)
        assert status == 2 and error.count("\n") == 1 and says in error
    monkeypatch.setattr(llava.Llava, "forward", lambda *_: 1 / torch.zeros(2)[5])
    with pytest.raises(IndexError):
        run(world, tmp_path / "other")


# --- taken alone, and changed ---

ALONE = {  # ten lines each that know nothing of the other files, and what they print
    "model": (
        """
import torch, model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
llava = model.Llava(LlavaConfig(
    vision_config=CLIPVisionConfig(**shape, image_size=28, patch_size=14),
    text_config=LlamaConfig(**shape, vocab_size=50), image_token_index=49))
ids, picture = torch.tensor([[1, 49, 49, 49, 49, 5, 6, 7, 2]]), torch.randn(1, 3, 28, 28)
optimizer = torch.optim.AdamW(llava.parameters(), lr=1e-2)
for _ in range(30):
    llava(ids, picture, labels=ids.where(ids < 49, -100))[0].backward()
    optimizer.step(), optimizer.zero_grad()
print(llava.generate(ids[:, :6], picture, torch.ones(1, 6), eos_token_id=[2]).tolist())
""",
        "[[6, 7, 2]]",
    ),
    "data": (
        """
import json, data
from PIL import Image
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
tokenizer.add_tokens("<image>", special_tokens=True)
Image.new("RGB", (40, 30), "red").save("red.png")
turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A circle."}]
json.dump([{"image": "red.png", "conversations": turns}], open("rows.json", "w"))
text, transform = data.ChatText(tokenizer, "chatml_direct"), data.PictureTransform(28, [.5] * 3, [.5] * 3, "pad")
rows = data.LlavaDataset(data.Records("rows.json"), data.Pictures("."), text, transform, 4)
batch = data.Collator(text.image_token_id, 4)([rows[0], rows[0]])
labels = batch["labels"][1]
print(batch["pixel_values"].shape, tokenizer.decode(labels[labels >= 0]))
""",
        "torch.Size([2, 3, 28, 28]) A circle.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_file_alone_in_an_empty_folder_does_its_work(name, tmp_path):  # lora.py: see PASTED
    script, printed = ALONE[name]
    shutil.copy(HERE / f"{name}.py", tmp_path)
    if name == "data":
        small_tokenizer("qwen2").save_pretrained(tmp_path)
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=alone, text=True, stdout=subprocess.PIPE)
    assert run.returncode == 0 and run.stdout.strip() == printed


def changed(module, lines, *edits):
    """A module of ours with text replaced, as a newcomer would, in `lines` new or other lines."""
    before = after = Path(module.__file__).read_text()
    for old, new in edits:
        assert after.count(old) == 1, f"{old} is not in {module.__name__} once"
        after = after.replace(old, new)
    difference = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    assert sum(line[0] == "+" and line[:3] != "+++" for line in difference) == lines
    other = types.ModuleType(f"changed_{module.__name__}")
    exec(compile(after, module.__file__, "exec"), vars(other))
    return other


def test_change_another_projector_takes_three_lines(world, tmp_path, monkeypatch):
    other = changed(
        llava,
        3,
        (
            '        self.add_module("linear_1"',
            '        if kind == "norm_linear":\n'
            '            self.add_module("norm", nn.LayerNorm(width_in))\n'
            '        self.add_module("linear_1"',
        ),
        ('r"linear|mlp', 'r"linear|norm_linear|mlp'),
    )
    monkeypatch.setattr(train, "llava", other)
    other.build(*parts(tmp_path), tmp_path / "llava", "norm_linear")
    assert run(world, tmp_path / "a", model_name_or_path=tmp_path / "llava", max_steps=2)[0] == 0
    model, saved = other.from_pretrained(tmp_path / "a/final"), weights_of(tmp_path / "a")
    norm = model.multi_modal_projector.norm
    assert torch.equal(norm.weight, saved["multi_modal_projector.norm.weight"])
    assert (norm.weight != 1).any() and model.config.architectures == ["LlavaWith_norm_linear"]


def test_change_the_towers_last_layer_alone_trains_by_one_line(world, tmp_path, monkeypatch):
    other = changed(
        train,
        1,
        ('"full": (["vision_tower"', '"full": (["vision_tower.vision_model.encoder.layers.1."'),
    )
    monkeypatch.setitem(globals(), "train", other)
    assert run(world, tmp_path / "a", max_steps=2)[0] == 0
    before, after = tensors_of(world / "llava"), weights_of(tmp_path / "a")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in moved if name.startswith("vision_tower")}
    assert tower and all(".layers.1." in name for name in tower)
    assert {name.split(".")[0] for name in moved} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def test_change_llama_3s_template_is_taken_as_it_is_and_takes_six_lines_to_name(tmp_path):
    tokenizer = byte_level()
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = marks[0], marks[-1]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A", special_tokens=[(marks[0], tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = LLAMA_3
    turns = [("What is it?", "A frog."), ("On what?", "A leaf.")]
    messages = [{"role": "system", "content": "Answer the questions."}, *messages_of(turns)]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert expected.count(tokenizer.bos_token_id) == 1  # trap 44
    ids, labels = ChatText(tokenizer).ids_and_labels(messages)
    assert ids == expected
    taught = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(taught) == "A frog.<|eot_id|>A leaf.<|eot_id|>"

    named = """_TEMPLATES = {
    "llama_3": (
        "Answer the questions.",
        "{{ BOS }}{%- for turn in [{'role': 'system', 'content': system}] + turns -%}"
        "{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' }}"
        "{{ turn.content + '<|eot_id|>' }}{%- endfor -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"),
"""
    other = changed(data, 6, ("_TEMPLATES = {\n", named))
    text = other.ChatText(tokenizer, "llama_3")
    assert text.ids_and_labels(messages[1:]) == (ids, labels) and "llama_3" in other.VERSIONS


def test_change_a_lora_target_is_a_flag(world, tmp_path):
    target = r"language_model\..*\.(q_proj|up_proj)"
    assert run(world, tmp_path / "a", **LORA, lora_target_modules=target, max_steps=1)[0] == 0
    adapter = load_file(tmp_path / "a/final/adapter_model.safetensors")
    found = {name.split(".")[-3] for name in adapter if "lora_A" in name}
    assert found == {"q_proj", "up_proj"}


def siglip(path):
    """A folder of a small SigLIP with its text tower: no CLS, 42 pixels, so 9 tokens a picture."""
    vision = {k: v for k, v in VISION.items() if k != "initializer_range"} | {"image_size": 42}
    text = {k: v for k, v in SMALL.items() if k != "initializer_range"} | {"vocab_size": 99}
    config = SiglipConfig(vision_config=vision, text_config=text)
    SiglipModel(config).save_pretrained(path)
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(means))
    return path


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_change_siglip_in_place_of_clip_is_a_flag_and_equals_transformers(
    world, tmp_path, aspect_ratio
):
    vision, folder = siglip(tmp_path / "siglip"), tmp_path / "llava"
    llava.build(vision, parts(tmp_path)[1], folder, aspect_ratio=aspect_ratio)
    trained = tmp_path / "a/final"
    assert run(world, tmp_path / "a", model_name_or_path=folder, max_steps=2)[0] == 0
    given = {k: v for k, v in load_file(vision / "model.safetensors").items() if "vision" in k}
    saved = {k.removeprefix("vision_tower."): v for k, v in tensors_of(trained).items()}
    assert given.keys() == {k for k in saved if k.startswith("vision_model.")}
    unused = [k for k in given if re.search(r"layers\.2|post_layer|head", k)]
    assert len(unused) > 20 and all(torch.equal(saved[k], given[k]) for k in unused)

    reference, model = theirs(trained), llava.from_pretrained(trained).eval()
    rows = data.open_dataset(world / "rows.json", world / "images", trained)
    batch = data.Collator(rows.image_token_id, model.tokens_per_picture)([rows[0], rows[2]])
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    assert rows.tokens_per_picture == model.tokens_per_picture == 9 and pixels.shape[2:] == (42, 42)
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=model.embed(ids, pixels)).logits
        expected = reference(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    image = Image.open(world / "images/0.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    theirs_says = AutoProcessor.from_pretrained(trained).apply_chat_template(
        [{"role": "user", "content": content}], **options
    )
    assert (theirs_says["input_ids"] == rows.image_token_id).sum() == 9
    ours = PictureTransform.from_pretrained(trained)(image)
    np.testing.assert_allclose(ours, theirs_says["pixel_values"][0].numpy(), atol=1e-5)


# --- run.sh ---

# Stand-ins for what run.sh starts. Each writes its command line to $CALLS; srun starts its command once for
# each task, as the real one does, and the launcher waits for the file `stop` where it is told to.
STANDINS = {
    "python": """case "$2" in
        *find_spec*) exit 0 ;;
        *device_count*) echo counted >> "$CALLS"; echo "$GPUS"; exit ;;
        esac""",
    "scontrol": '[ "$1" = requeue ] || printf "node%s\\n" $(seq "$SLURM_NNODES")',
    "sbatch": """nodes=1
        while [[ $1 == --* ]]; do [[ $1 != --nodes=* ]] || nodes=${1#*=}; shift; done
        GPUS=4 SLURM_NNODES=$nodes SLURM_JOB_ID=1 SLURM_JOB_NODELIST=x exec bash "$@" """,
    "srun": """tasks=1
        while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || tasks=${1#*=}; shift; done
        for ((i = 0; i < tasks; i++)); do SLURM_NODEID=$i "$@" & done
        status=0
        for job in $(jobs -p); do wait "$job" || status=$?; done
        exit "$status" """,
    "deepspeed": """[ -f train.py ] || exit 1
        [ -n "${WAIT:-}" ] || exit 0
        trap 'echo signalled >> "$CALLS"; exit 1' TERM INT HUP USR1
        while [ "$1" != --output_dir ]; do shift; done
        echo waiting >> "$CALLS"
        for first in yes no; do  # train.py takes an earlier run's file away when it begins to look
            until [ -e "$2/stop" ]; do mkdir -p "$2"; sleep 0.1; done
            [ "$first" = no ] || rm "$2/stop"
        done
        exit 3""",
    "ssh": 'case "$*" in *"hostname -I") echo 127.0.0.1 ;; esac',
    "pdsh": """shift 3  # ssh hands no environment on, and PATH is the login shell's
        IFS=, read -ra hosts <<< "$2"; shift 2
        for i in "${!hosts[@]}"; do
            env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${*//%n/$i}" &
        done
        for job in $(jobs -p); do wait "$job" || status=$?; done
        exit "${status:-0}" """,
}
SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"}
STAGES = {"MODEL": "llava", "FINETUNE_DATA": "b.json", "FINETUNE_IMAGES": "images"}


@pytest.fixture
def shell(tmp_path):
    """start(**environment): run.sh among the stand-ins; calls(name): the command lines of one of them."""
    log, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    for name, script in STANDINS.items():
        (programs / name).write_text(
            '#!/bin/bash\nline=$(printf "%q " "${0##*/}" "$@"); echo "$line" >> "$CALLS"\n' + script
        )
        (programs / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "CUDA"))}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept |= {"PATH": path, "CALLS": str(log), "GPUS": "0"}

    def start(script=HERE / "run.sh", **environment):
        return subprocess.Popen(
            ["bash", script],
            env=kept | {"OUT": str(tmp_path / "out")} | environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's jobs ignore it
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )

    def calls(name):
        lines = log.read_text().splitlines()
        return [words[1:] for words in map(shlex.split, lines) if words[0] == name]

    return start, calls


def launched(words):
    """(the flags of the launcher, those of train.py), each as its own parser reads them."""
    from deepspeed.launcher import runner

    launcher = runner.parse_args(words)
    assert launcher.user_script == "train.py"
    return launcher, train.parse(launcher.user_args)


@pytest.mark.parametrize(
    "environment, processes, config",
    [  # processes: what the launcher is told, -1 as many as there are GPUs, None no launcher
        ({}, None, None),
        ({"GPUS": "4"}, -1, "ds_zero2.json"),
        ({"GPUS": "8", "DEEPSPEED_CONFIG": "ds_zero3.json"}, -1, "ds_zero3.json"),
        ({"GPUS": "8", "NUM_GPUS": "2"}, 2, "ds_zero2.json"),
        ({"GPUS": "8", "DEEPSPEED_CONFIG": "none"}, None, None),
        ({"DEEPSPEED_CONFIG": "ds_zero3.json"}, 1, "ds_zero3.json"),
        ({"NUM_GPUS": "2"}, 2, "ds_zero2.json"),
        ({"HOSTFILE": "hosts"}, -1, "ds_zero2.json"),
        ({"GPUS": "4", "SLURM_NNODES": "1"} | SLURM, -1, "ds_zero2.json"),
    ],
)
def test_run_sh_launches_what_the_machine_has(shell, environment, processes, config):
    start, calls = shell
    assert start(**STAGES, **environment).wait() == 0
    alone = [words for words in calls("python") if words[0] == "train.py"]
    assert len(calls("counted")) == ("NUM_GPUS" not in environment) and not calls("srun")
    if processes is None:
        assert len(alone) == 1 and train.parse(alone[0][1:]).train_type == "freeze_vision"
        return
    (words,) = calls("deepspeed")
    launcher, args = launched(words)
    assert not alone and (launcher.num_gpus, args.deepspeed) == (processes, config)
    assert launcher.hostfile == environment.get("HOSTFILE", "/job/hostfile")
    assert launcher.master_port == (13456 if "SLURM_JOB_ID" in environment else 29500)


def test_slurm_starts_one_launcher_on_each_node_and_all_meet_at_the_first(shell, tmp_path):
    """Trap 34. sbatch runs a copy of the script that lies elsewhere, in a job with 4 tasks a node, say."""
    from deepspeed.launcher import runner

    start, calls = shell
    script = tmp_path / "slurm_script"
    shutil.copy(HERE / "run.sh", script)
    job = SLURM | {"SLURM_NNODES": "3", "SLURM_NTASKS": "12", "SLURM_SUBMIT_DIR": str(HERE)}
    stage1 = {"PRETRAIN_DATA": "a.json", "PRETRAIN_IMAGES": "images"}
    assert start(script, **STAGES, **stage1, **job, NUM_GPUS="4").wait() == 0
    assert len(calls("srun")) == 2 and len(calls("deepspeed")) == 6  # of two stages
    assert all("--cpus-per-task=8" in words for words in calls("srun"))
    for stage in ("stage1", "stage2"):
        found = [launched(words) for words in calls("deepspeed")]
        found = [launcher for launcher, args in found if args.output_dir.endswith(stage)]
        assert sorted(launcher.node_rank for launcher in found) == [0, 1, 2]
        assert all(launcher.no_ssh and launcher.master_addr == "node1" for launcher in found)
        assert {launcher.master_port for launcher in found} == {13456}
        hosts = [runner.fetch_hostfile(launcher.hostfile) for launcher in found]
        assert all(dict(pool) == {"node1": 4, "node2": 4, "node3": 4} for pool in hosts)


def test_the_header_for_slurm_is_a_comment_to_bash():
    lines = (HERE / "run.sh").read_text().splitlines()
    header = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert all(line.startswith("#") for line in lines[: header[-1] + 1])  # it ends at a command
    options = " ".join(lines[i].removeprefix("#SBATCH ") for i in header).split()
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    assert {"--ntasks-per-node=1", "--gpus-per-node=a100:4"} <= set(options)


@pytest.mark.parametrize("signal_name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_reaches_the_run_as_the_file_stop_alone_and_a_warned_job_is_queued_again(
    shell, tmp_path, signal_name
):
    """Sent to the whole process group, as Ctrl-C is. The second start goes on through both stages."""
    start, calls = shell
    environment = (
        STAGES | SLURM | {"PRETRAIN_DATA": "a.json", "PRETRAIN_IMAGES": "images", "GPUS": "4"}
    )
    process = start(**environment, WAIT="yes")
    while not (tmp_path / "calls").exists() or not calls("waiting"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, getattr(signal, signal_name))
    assert process.wait(timeout=60) == 3 and not calls("signalled") and len(calls("deepspeed")) == 1
    requeued = [words for words in calls("scontrol") if words[0] == "requeue"]
    assert requeued == ([["requeue", "123456"]] if signal_name == "SIGUSR1" else [])
    assert not (tmp_path / "out/stage1/stop").exists()
    process = start(**environment)
    assert process.wait() == 0 and process.stdout.read().endswith("out/stage2/final\n")
    args = [launched(words)[1] for words in calls("deepspeed")]
    assert [Path(a.output_dir).name for a in args] == ["stage1", "stage1", "stage2"]
    assert all(a.resume_from_checkpoint == "latest" for a in args)


def test_another_tower_in_the_same_folder_and_a_missing_variable_are_refused(shell, tmp_path):
    start, calls = shell
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model.txt").write_text("clip+qwen+own\n")
    parts = {"VISION_TOWER": "siglip", "LANGUAGE_MODEL": "qwen"}
    for wrong in ({"TRAIN_TYPE": "use_lora"}, {"MODEL": "m", "BITS": "9"}, {"MODEL": "m", "TRAIN_TYPE": "x"}):
        assert start(**wrong).wait() == 2
    assert start(**parts).wait() == 2
    assert start(VISION_TOWER="clip", LANGUAGE_MODEL="qwen").wait() == 0
    assert start(PRETRAIN_DATA="a.json", OUT=str(tmp_path / "new")).wait() == 1  # no tower
    assert not (tmp_path / "new").exists()


def test_help_names_every_variable_that_run_sh_reads_and_an_unknown_command_shows_it():
    text = (HERE / "run.sh").read_text()
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd="/")
    shown = run(["bash", HERE / "run.sh", "help"])
    read = set(re.findall(r"\$\{([A-Z]+_?[A-Z]+):[-+]", text)) - {"MASTER_PORT"}
    read = {name for name in read if not name.startswith("SLURM")} | {"VISION_TOWER"}
    assert shown.returncode == 0 and read <= set(re.findall(r"^  ([A-Z_]+)  ", shown.stdout, re.M))
    wrong = run(["bash", HERE / "run.sh", "hlep"])
    assert wrong.returncode == 2 and wrong.stderr == shown.stdout and not wrong.stdout


SLOW = """
def slowly(save):
    def slow(engine, folder, *rest):
        save(engine, folder, *rest)
        (folder.parent / "saving").touch()
        time.sleep(SECONDS)
    return slow
Plain.save, ZeRO.save = slowly(Plain.save), slowly(ZeRO.save)
"""


@pytest.mark.parametrize(
    "signal_name, seconds, ranks, environment",
    [
        ("SIGTERM", 3, 1, {"DEEPSPEED_CONFIG": "none"}),
        # The launcher would have killed its ranks by then, had the signal reached it.
        pytest.param("SIGTERM", 35, 2, {"NUM_GPUS": "2"}, marks=pytest.mark.long),
        pytest.param(  # two nodes, a launcher on each
            "SIGUSR1", 3, 2, {"NUM_GPUS": "1", "SLURM_NNODES": "2"} | SLURM, marks=pytest.mark.long
        ),
        pytest.param("SIGINT", 3, 2, {"HOSTFILE": "hosts"}, marks=pytest.mark.long),
    ],
)
def test_both_stages_end_as_an_undisturbed_process_does_though_stopped_in_a_slow_save(
    world, shell, tmp_path, signal_name, seconds, ranks, environment
):
    """What two ranks make equals what one makes, to 1e-5. (Spaces in the folder's name pdsh does not take.)"""
    start, calls = shell
    out = tmp_path / "out"
    folder = tmp_path / ("folder" if "HOSTFILE" in environment else "a folder with spaces")
    folder.mkdir()
    (folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    for path in [*HERE.glob("*.py"), *HERE.glob("*.json"), HERE / "run.sh"]:
        shutil.copy(path, folder)
    code, main = (folder / "train.py").read_text(), 'if __name__ == "__main__":'
    (folder / "train.py").write_text(
        code.replace(main, SLOW.replace("SECONDS", str(seconds)) + main)
    )
    for name in ("python", "deepspeed"):  # the real ones
        (tmp_path / "bin" / name).unlink()
    (tmp_path / "bin/scontrol").write_text(STANDINS["scontrol"].replace("node%s", "127.0.0.%s"))
    flags = {"learning_rate": 1e-3, "save_steps": 2, "bf16": False, "dataloader_num_workers": 0}
    flags |= {"max_steps": 4, "seed": 1}
    text = " ".join(f"--{name} {value}" for name, value in flags.items())
    text += f" --per_device_train_batch_size {4 // ranks}"
    environment = environment | {
        "MODEL": str(world / "llava"),
        "PRETRAIN_DATA": str(world / "captions.json"),
        "FINETUNE_DATA": str(world / "rows.json"),
        "PRETRAIN_IMAGES": str(world / "images"),
        "FINETUNE_IMAGES": str(world / "images"),
        "PRETRAIN_ARGS": text,
        "FINETUNE_ARGS": text,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = start(folder / "run.sh", **environment)
    while not (out / "stage2/saving").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, getattr(signal, signal_name))
    assert process.wait(timeout=300) == 3
    assert train.checkpoints(out / "stage2")[-1].name == "checkpoint-3"
    assert not list(out.glob("*/*.part")) and not (out / "stage2/final").exists()
    assert start(folder / "run.sh", **environment).wait(timeout=300) == 0
    source = world / "llava"
    for stage, train_type, rows in (
        ("stage1", "projector", "captions"),
        ("stage2", "freeze_vision", "rows"),
    ):
        data_path, reference = world / f"{rows}.json", tmp_path / f"{stage} undisturbed"
        kind = dict(model_name_or_path=source, data_path=data_path, train_type=train_type)
        assert run(world, reference, **flags, **kind)[0] == 0
        a, b = weights_of(reference), weights_of(out / stage)
        off = [(a[k] - b[k]).abs().max() for k in a if ranks == 1 or not k.endswith("k_proj.bias")]
        assert max(off) <= (1e-5 if ranks > 1 else 0), stage
        assert losses_of(reference) == pytest.approx(losses_of(out / stage), abs=1e-5)
        source = reference / "final"


def wheel(folder, version):
    """A package without dependencies, which pip installs without a network."""
    name = f"thing-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr("thing.py", f"version = '{version}'")
        head = f"Metadata-Version: 2.1\nName: thing\nVersion: {version}\n"
        archive.writestr(f"{name}.dist-info/METADATA", head)
        wheel = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{name}.dist-info/WHEEL", wheel)
        archive.writestr(f"{name}.dist-info/RECORD", "")
    (folder / "requirements.txt").write_text(f"./{name}-py3-none-any.whl\n")


def test_set_up_installs_only_when_the_requirements_have_changed(tmp_path):
    """In a fresh environment of its own, in a folder with spaces in its name."""
    folder, programs = tmp_path / "a folder with spaces", tmp_path / "bin"
    folder.mkdir(), programs.mkdir()
    (programs / "python").write_text("#!/bin/sh\nexit 1")  # no packages there
    (programs / "python3").symlink_to(Path(sys.base_prefix, "bin/python3"))
    (programs / "python").chmod(0o755)
    shutil.copy(HERE / "run.sh", folder)
    (folder / "train.py").touch()
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "MODEL": "x"}
    for version, installs in (("1.0", 1), ("1.0", 0), ("2.0", 1)):
        wheel(folder, version)
        run = subprocess.run(
            ["bash", folder / "run.sh"],
            env=environment | {"DEEPSPEED_CONFIG": "none", "NUM_GPUS": "0"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and run.stderr.count("installing") == installs, run.stderr
        own = [folder / ".venv/bin/python", "-c", "import thing; print(thing.version)"]
        assert subprocess.check_output(own, text=True, cwd=tmp_path).strip() == version


def test_every_run_sh_line_of_the_readme_starts_what_it_says(shell, tmp_path):
    """Among the stand-ins; the flags that train.py is given are those that it knows."""
    start, calls = shell
    text = re.sub(r"\\\n\s*", "", (HERE / "README.md").read_text())
    lines = re.findall(r"^    ((?:[A-Z_]+=.*)?\b(?:bash|sbatch) .*run\.sh.*)$", text, re.M)
    assert len(lines) >= 7
    for line in lines:
        (tmp_path / "calls").unlink(missing_ok=True)
        command = line.split("   ")[0]  # what follows is said about it
        many = "sbatch" in command or "HOSTFILE" in command
        (tmp_path / "line.sh").write_text(f"cd {HERE}\n{command}")
        assert start(tmp_path / "line.sh", **STAGES if many else {}).wait() == 0, command
        found = [launched(words)[1].output_dir for words in calls("deepspeed")]
        nodes = int((re.findall(r"--nodes=(\d+)", command) or [1])[0])
        assert len(found) == nodes * len(set(found)) and bool(found) == many, command
        assert len(set(found)) == many + ("PRETRAIN_DATA" in command) * many, command


def test_the_readme_explains_each_key_of_the_deepspeed_files_and_no_other():
    """Trap 24: DeepSpeed's own class refuses a key that is spelt wrong."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    text = (HERE / "README.md").read_text().partition("The keys of both files")[2]
    text = text.partition("Rows of a micro-batch")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) ?\| (.*?) ?\| \w", text, re.M)
    for column, name in ((1, "ds_zero2.json"), (2, "ds_zero3.json")):
        config = json.loads((HERE / name).read_text())
        flat = config.pop("zero_optimization")
        assert DeepSpeedZeroConfig(**flat).stage == int(name[7])
        for key, value in config.items():
            inner = isinstance(value, dict)
            flat |= {f"{key}.{k}": v for k, v in value.items()} if inner else {key: value}
        assert {row[0]: json.loads(row[column]) for row in rows if row[column]} == flat


def readme_commands():
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    return [
        line.split(None, 1) for line in re.findall(r"^    ((?:python|deepspeed) .*)$", text, re.M)
    ]


def test_every_command_of_the_readme_runs(world, tmp_path, monkeypatch, capsys):
    """On small stand-ins that bear the names of the large models; what `deepspeed` starts runs as one process here."""
    monkeypatch.chdir(tmp_path)
    vision, text = parts(tmp_path / "parts")
    for source, name in (
        (vision, "openai/clip-vit-large-patch14-336"),
        (text, "Qwen/Qwen1.5-4B-Chat"),
        (text, "lmsys/vicuna-7b-v1.5"),
        (world / "llava", "llava-hf/llava-1.5-7b-hf"),
    ):
        shutil.copytree(source, tmp_path / name)
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.make_archive(str(tmp_path / "images"), "zip", world / "images")
    shutil.copy(world / "images" / "1.png", tmp_path / "photo.jpg")
    for name, source in (
        ("chat", "captions"),
        ("blip_laion_cc_sbu_558k", "captions"),
        ("instruct", "rows"),
        ("llava_v1_5_mix665k", "rows"),
        ("validation", "rows"),
    ):
        shutil.copy(world / f"{source}.json", tmp_path / f"{name}.json")
    write_vqa(tmp_path, "train2014", ASKED)
    for name in ("OpenEnded_mscoco_train2014_questions", "mscoco_train2014_annotations"):
        (tmp_path / f"train2014_{name.split('_')[-1]}.json").rename(tmp_path / f"{name}.json")
    ran = []
    for program, line in readme_commands():
        file, *argv = shlex.split(line)
        if program == "deepspeed":
            at = argv.index("--deepspeed")
            assert (HERE / argv[at + 1]).is_file()
            del argv[at : at + 2]
        if file == "train.py":
            argv += [
                "--max_steps",
                "1",
                "--dataloader_num_workers",
                "0",
                "--max_new_tokens",
                "2",
                "--bf16",
                "False",
            ]
        if "chat" in argv:
            argv += ["--max_new_tokens", "2"]
        if "okvqa" in argv:
            argv += ["--val_fraction", "0.3"]  # of 10 pictures
        if file == "bench.py":  # what it was asked for, less of it, and the last flag counts
            monkeypatch.setattr(bench, "run", in_this_process)
            argv += "--shape tiny --cases projector --mix caption --micro_batch 1 --peers".split()
            argv += "--steps 1 --rounds 1 --product 64 --workers 0".split()
        modules = {"train.py": train, "model.py": llava, "data.py": data, "lora.py": lora, "bench.py": bench}
        capsys.readouterr()
        assert modules[file].main(argv) == 0, (line, capsys.readouterr().err)
        if "show" in argv:  # its output stands below it
            printed = capsys.readouterr().out.split()
            assert " ".join(printed) in " ".join((HERE / "README.md").read_text().split())
        ran.append(file)
    assert Counter(ran)["train.py"] >= 3 and set(ran) == {
        "train.py",
        "model.py",
        "data.py",
        "lora.py",
        "bench.py",
    }


# --- bench.py ---


@pytest.fixture(scope="session")
def bench_work(tmp_path_factory):
    """The tiny model, rows and an adapter without dropout, which draws differently on each side."""
    work = tmp_path_factory.mktemp("bench")
    model = bench.make_model("tiny", torch.float32, work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.LORA, "dropout", 0.0)
        bench.make_adapter(model, work / "adapter")
    for mix in ("caption", "instruction"):
        bench.make_rows(mix, 6, work)
    return work


def in_this_process(job):
    with contextlib.redirect_stdout(io.StringIO()):
        return bench.run_job({**job, "out": tempfile.mkdtemp() + "/run"})


@pytest.mark.parametrize("case", bench.CASES)
def test_both_sides_of_the_bench_take_the_same_steps(bench_work, case):
    """The loss after equal steps is Trainer's and PEFT's, so their speed is compared at equal work."""
    job = {
        "case": case,
        "mix": "instruction",
        "micro_batch": 2,
        "steps": 3,
        "dtype": "fp32",
        "workers": 0,
        "work": str(bench_work),
        "model": str(bench_work / "tiny"),
    }
    ours, peer = (in_this_process({**job, "side": side}) for side in ("ours", "peer"))
    assert len(ours["losses"]) >= 3
    if case == "generate":
        assert ours["losses"] == peer["losses"]
    else:
        np.testing.assert_allclose(ours["losses"], peer["losses"], rtol=2e-3 if case == "qlora" else 1e-4)
    assert len(ours["seconds"]) == len(peer["seconds"]) and ours["peak_gib"] > 0


def test_the_bench_prints_a_table_and_adds_to_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", in_this_process)
    argv = ["--shape", "tiny", "--cases", "projector", "--mix", "620", "--steps", "2", "--micro_batch", "1"]
    argv += ["--rounds", "1", "--product", "64", "--workers", "0", "--json", str(tmp_path / "b.json")]
    for peers in (["peer", "checkpointing"], []):
        capsys.readouterr()
        assert bench.main([*argv, "--work", str(tmp_path), "--peers", *peers]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    lines = {line["side"]: line for line in found["table"]}
    assert [line["runs"] for line in lines.values()] == [2, 1, 1]
    ours, peer = lines["ours"], lines["peer"]
    assert peer["speed_ratio"] == pytest.approx(ours["samples_per_s"] / peer["samples_per_s"])
    assert ours["last"] == pytest.approx(peer["last"], rel=1e-4)
    assert 560 < ours["tokens_per_s"] / ours["samples_per_s"] < 680
    assert "checkpointing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--mix", "long"])
    assert "--mix long" in capsys.readouterr().err
