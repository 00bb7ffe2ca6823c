"""What the tests share: tokenizers, small models, rows, and processes."""

import base64
import contextlib
import difflib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
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
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import bench
import data
import evaluate
import lora
import model as llava
import train
from build import build
from data import IMAGE
from toy import CHATML
from toy import main as make_toy

HERE = Path(train.__file__).parent
torch.set_num_threads(1)  # sums in one order: processes and this one agree to the bit


def pytest_configure(config):
    """Hides the GPUs, but from the tests of the mark `gpu`: equalities hold to a CPU's precision."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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


@pytest.fixture(
    params=[*TOKENIZERS, *(pytest.param(name, marks=pytest.mark.long) for name in REAL)]
)
def tokenizer(request):
    return {**TOKENIZERS, **REAL}[request.param]()


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A LLaVA folder as `toy.py model` writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    assert make_toy(["model", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The built-in data, less of it."""
    folder = tmp_path_factory.mktemp("toy") / "a"
    assert make_toy(["data", "--out", str(folder), "--scenes", "200"]) == 0
    return folder


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
        ["x", "frog", f"{n}", "été", "été", "frog"] + ["été"] * (n % 2) + ["x"] * (n % 3 == 0),
    )
    for n in range(20)
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


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
    """Two rows with a picture each for `tiny_llava`."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 98, (2, 12), generator=generator)
    input_ids[:, 1:5] = 99
    pixel_values = torch.randn(2, 3, 28, 28, generator=generator)
    return {"input_ids": input_ids, "pixel_values": pixel_values}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits.float()


def close(a, b, tolerance):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


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


def fingerprint_of(folder):
    return lora.fingerprint(llava.open_weights(folder), llava.transformers_name)


def saved(model, out, base=None, **options):
    options = {"rename": llava.transformers_name, "modules_to_save": [PROJECTOR]} | options
    lora.save(model, out, base and fingerprint_of(base), **options)
    return out


def old_llava_folder(folder, out):
    """The folder with the tower's keys spelled as llava-hf's are, and a buffer that they carry."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    old = ("vision_tower.", "vision_tower.vision_model.")
    tensors = {name.replace(*old): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


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


def words_of(flags):
    return [
        word
        for key, value in flags.items()
        if value is not None
        for word in (f"--{key}", str(value))
    ]


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
    return words_of(flags)


def called(main, argv):
    """(exit status, standard output, error output) of a command."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = main(argv)
    return status, output.getvalue(), error.getvalue()


def evaluated(world, out, **flags):
    """Evaluates through main(argv); as `called`."""
    flags = {
        "model_name_or_path": world / "llava",
        "validation_data_path": world / "rows.json",
        "image_folder": world / "images",
        "output_dir": out,
        "bf16": False,
        "max_new_tokens": 4,
        "dataloader_num_workers": 0,
    } | flags
    return called(evaluate.main, words_of(flags))


def run(world, out, **flags):
    """Trains through main(argv); as `called`."""
    return called(train.main, argv_of(world, out, **flags))


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


STAGE_1 = dict(train_type="projector")

LORA = dict(train_type="use_lora", lora_r=4, lora_alpha=8, learning_rate=1e-2, mm_projector_lr=1e-3)

OWN = dict(lora_r=None, lora_alpha=None)  # what an adapter that is there has already


def parsed(train_type, *more):
    """The arguments that follow from the flags that a run cannot do without, and more."""
    needed = "--model_name_or_path x --data_path x --output_dir x --train_type".split()
    return train.parse([*needed, train_type, *more])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def server():
    """Forks processes that have imported everything already: a launch takes a second, not ten."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE}/tests:{os.environ.get('PYTHONPATH', '')}"
    context.set_forkserver_preload(["deepspeed", "conftest"])
    return context


def be_rank(rank, ranks, jobs, limit_bytes=None):
    """What the launcher has a process do, for each job: (port, flags of train.py, report).

    limit_bytes is the size from which its files fail to grow.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["TORCH_EXTENSIONS_DIR"] = os.devnull  # nothing is compiled: killed, it leaves a lock
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    for i, (port, argv, report) in enumerate(jobs, 1):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        report = os.open(f"{report}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(report, stream)
        sys.stdout, sys.argv = sys.__stdout__, [str(HERE / "train.py"), *argv]
        try:
            with pytest.MonkeyPatch.context() as patch:
                if i < len(jobs):  # the last one ends the process group: DeepSpeed wants but one
                    patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code or i == len(jobs):
                raise


def start(world, out, ranks=1, limits={}, target=be_rank, **flags):
    """The processes of a run, started; what rank r prints goes to the file OUT-r.txt."""
    return start_all(ranks, [(free_port(), argv_of(world, out, **flags), out)], limits, target)


def start_all(ranks, jobs, limits={}, target=be_rank):
    processes = [
        server().Process(target=target, args=(r, ranks, jobs, limits.get(r))) for r in range(ranks)
    ]
    for process in processes:
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


@pytest.fixture(autouse=True)
def no_process_is_left():
    """What a test that failed has started and not ended."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


def printed(out, ranks):
    return "".join(Path(f"{out}-{r}.txt").read_text() for r in range(ranks))


def launch(world, out, ranks=1, limits={}, target=be_rank, **flags):
    """(exit statuses, all that was printed) of a run by `ranks` processes."""
    statuses = end(start(world, out, ranks, limits, target, **flags))
    return statuses, printed(out, ranks)


def launch_all(world, ranks, runs, seconds=240):
    """Runs {folder: flags}, one after the other, by the same `ranks` processes; all must succeed."""
    jobs = [(free_port(), argv_of(world, out, **flags), out) for out, flags in runs.items()]
    statuses = end(start_all(ranks, jobs), seconds)
    texts = [printed(out, ranks) for _, _, out in jobs if Path(f"{out}-0.txt").exists()]
    assert statuses == [0] * ranks, texts[-1]


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


# Stand-ins for what run.sh starts. Each writes its command line to $CALLS. A run makes a checkpoint where $SAVES
# says so, fails with $FAILS, waits for the file `stop` with $WAIT, or else is done.
RUN = """
while [ "$1" != --output_dir ]; do shift; done
mkdir -p "$2" ${SAVES:+"$2/checkpoint-$SAVES"}
[ -z "${FAILS:-}" ] || exit "$FAILS"
[ -n "${WAIT:-}" ] || { mkdir -p "$2/final"; exit 0; }
trap 'echo signalled >> "$CALLS"; exit 1' TERM INT HUP USR1
echo waiting >> "$CALLS"
if [ "${SLURM_NODEID:-0}" = 0 ]; then  # train.py takes an earlier run's file away when it begins to look
    until [ -e "$2/stop" ]; do sleep 0.1; done
    rm "$2/stop"
fi
until [ -e "$2/stop" ]; do sleep 0.1; done
[ "${SLURM_NODEID:-0}" = 0 ] || sleep "$WAIT"
exit 3"""

# As the real one: tasks end when they end; for one that fails, or SIGTERM, all processes of all tasks are told by
# SIGTERM (and killed after KillWait); the status is the highest of theirs, that of a signal 128 more.
SRUN = """
import contextlib, itertools, os, psutil, signal, subprocess, sys, time
flags = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
ranks = range(int(next(word[9:] for word in flags if word.startswith("--ntasks="))))
tasks = [subprocess.Popen(sys.argv[1 + len(flags):], start_new_session=True,
                          env={**os.environ, "SLURM_STEP_ID": "0", "SLURM_NODEID": str(i)}) for i in ranks]
told = []
def tell(number):
    told.append(time.monotonic())
    for task in tasks:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(task.pid).children(recursive=True), task]:
                process.send_signal(number)
signal.signal(signal.SIGTERM, lambda number, frame: tell(number))
while any(task.poll() is None for task in tasks):
    time.sleep(0.02)
    if "--kill-on-bad-exit=1" in flags and any(task.poll() for task in tasks):
        if not told:
            tell(signal.SIGTERM)
        elif time.monotonic() > told[0] + 1:
            tell(signal.SIGKILL)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))"""

STANDINS = {
    "python": f"""case "$*" in
        "-m pip install"*) exit 0 ;;
        *device_count*) echo counted >> "$CALLS"; echo "$GPUS"; exit ;;
        *pthread_sigmask*) exec {sys.executable} "$@" ;;
        train.py*) {RUN} ;;
        esac""",
    "scontrol": """case "$1" in
        show) [ "$2" = job ] && echo "   Command=$COMMAND" || printf "node%s\\n" $(seq "$SLURM_NNODES") ;;
        esac""",
    "sbatch": """nodes=1
        while [[ $1 == --* ]]; do [[ $1 != --nodes=* ]] || nodes=${1#*=}; shift; done
        GPUS=4 SLURM_NNODES=$nodes SLURM_JOB_ID=1 SLURM_JOB_NODELIST=x exec bash "$@" """,
    "srun": f'exec {sys.executable} -c {shlex.quote(SRUN)} "$@"',
    "deepspeed": f"[ -f train.py ] || exit 1\n{RUN}",
    "ssh": 'case "$*" in *"hostname -I") echo 127.0.0.1 ;; esac',
    "pdsh": """shift 3  # ssh hands no environment on, and PATH is the login shell's
        IFS=, read -ra hosts <<< "$2"; shift 2
        for i in "${!hosts[@]}"; do
            env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${*//%n/$i}" &
        done
        for job in $(jobs -p); do wait "$job" || status=$?; done
        exit "${status:-0}" """,
}

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
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a shell's jobs ignore it
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=open(tmp_path / "errors", "w"),
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


def in_this_process(job):
    with contextlib.redirect_stdout(io.StringIO()):
        return bench.run_job({**job, "out": tempfile.mkdtemp() + "/run"})
