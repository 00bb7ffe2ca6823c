"""Tokenizers, models and rows, made on the spot and small, in the real formats."""

import base64
import functools
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
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
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import data
import model as llava
import train
from build import build
from data import IMAGE
from toy import CHATML

HERE = Path(train.__file__).parent


torch.set_num_threads(1)  # sums in one order: processes and this one agree to the bit
os.environ["OMP_NUM_THREADS"] = "1"  # accelerate would set another number


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
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
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


LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def messages_of(turns, system=None):
    messages = [
        {"role": r, "content": t} for turn in turns for r, t in zip(("user", "assistant"), turn)
    ]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


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


def row(turns, **more):
    names = ["human", "gpt"]
    return {
        "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)],
        **more,
    }


def open_dataset(rows, images, folder, **options):
    text = options.pop("text", None) or data.ChatText(llava.open_tokenizer(folder))
    return data.open_dataset(rows, images, folder, llava.read_config(folder), text, **options)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
    pictures = ["--image_folder", str(folder / "coco")]
    return ["--questions", *files[0], "--annotations", *files[1], *pictures]


ASKED = [  # 20 questions about 10 pictures
    (
        25_000 + n,
        n % 10,
        f"Was ist {n} 🐸 <s>?",
        ["", "x", "frog", f"{n}", "été", "été", "frog"]
        + ["été"] * (n % 2)
        + ["x", ""] * (n % 3 == 0),
    )
    for n in range(20)
]


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
        chat_template=CHATML,
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
    build(*parts(path, family, **options), path / "llava", kind, version, aspect_ratio)
    change_tensors(
        path / "llava",
        lambda t: t.update(
            {k: torch.randn_like(v) * 0.3 for k, v in t.items() if "projector" in k}
        ),
    )
    return path / "llava"


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


def refused(capsys, script, *argv):
    """What a command says when it refuses: one line on stderr, nothing on stdout, status 2."""
    capsys.readouterr()
    try:
        status, name = script.main([str(a) for a in argv]), Path(script.__file__).name
    except SystemExit as stop:  # a flag is wrong
        status, name = stop.code, Path(sys.argv[0]).name
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith(name), err
    return err
