"""From a JSON record and a picture to a batch: everything that LLaVA does before the model.

A record, in LLaVA's format, and what becomes of it:

    {"id": "7", "image": "7.png",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                       {"from": "gpt",   "value": "A frog."}]}

      > picture   RGB, padded or cropped to a square, 336 x 336, normalised        (3, 336, 336)
      > text      the chat template rendered; ids, and labels: only answers count  (t,), (t,)
      > batch     each <image> id becomes 576 placeholders, rows padded on the right
                  input_ids, labels (B, T) int64; pixel_values (N, 3, 336, 336) float32

Labels are unshifted, as Hugging Face has them: the model compares position t with label t + 1.

    python data.py toy   --out out/toy
    python data.py show  --model_name_or_path out/model --data_path out/toy/train.json \\
                         --image_folder out/toy/images
    python data.py check --data_path out/toy/train.json --image_folder out/toy/images
    python data.py okvqa --questions F --annotations F --image_folder DIR --out DIR

Sources: LLaVA's record format, templates and masks (github.com/haotian-liu/LLaVA,
llava/conversation.py and llava/train/train.py), CLIP's preprocessing (github.com/openai/CLIP,
clip/clip.py).
"""

import argparse
import collections
import contextlib
import gc
import io
import json
import os
import random
import re
import signal
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

IMAGE = "<image>"  # one in the text for each picture of the row
IGNORE = -100  # the label of a position that no loss looks at


# --- pictures ---


class PictureTransform:
    """A picture as the tower's input, as LLaVA's (`pad`) and CLIP's (`square`) processors make it.

    pad     it is centred on a square of the mean colour, then resized: nothing is lost
    square  its short side is resized, then the centre is cut out: the long side loses its ends
    """

    def __init__(self, size: int, mean: list[float], std: list[float], aspect_ratio: str):
        self.size, self.aspect_ratio = size, aspect_ratio
        self.background = tuple(int(255 * m) for m in mean)
        mean, std = np.float32(mean), np.float32(std)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        levels = np.arange(256, dtype=np.float32)[:, None]
        self.table = (levels * self.scale + self.shift).T  # (3, 256): what each byte becomes

    @classmethod
    def from_pretrained(cls, folder: str | Path, aspect_ratio: str | None = None):
        """As a model folder's processor files say; `aspect_ratio` overrides theirs."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            if not (path := Path(folder) / name).is_file():
                continue
            try:
                config = json.loads(path.read_bytes())
                config = config.get("image_processor", config)
                if "image_mean" not in config:
                    continue
                size = config.get("crop_size") or config["size"]
                if not isinstance(size, int):
                    size = size.get("height") or size["shortest_edge"]
                pads, crops = config.get("do_pad"), config.get("do_center_crop", True)
                made = cls(
                    size,
                    config["image_mean"],
                    config["image_std"],
                    aspect_ratio or ("pad" if pads else "square"),
                )
            except Exception as error:  # as many as there are other kinds of JSON
                raise ValueError(
                    f"{path}: does not say how pictures are prepared ({error!r})"
                ) from None
            if not pads and not (crops and config.get("crop_size")):
                raise ValueError(
                    f"{path}: pictures are neither padded (do_pad) nor cropped "
                    "(crop_size), which is how they become square here"
                )
            return made
        raise FileNotFoundError(
            f"{folder}: no preprocessor_config.json, which says how pictures are prepared"
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(3, size, size) float32, normalised."""
        if self.aspect_ratio == "pad":
            image = pad(image, self.background)
        else:  # of a long strip the middle will do
            image = centre(image, *(min(n, 16 * min(image.size)) for n in image.size))
        resized = [self.size * n // min(image.size) for n in image.size]
        image = centre(image.resize(resized, Image.Resampling.BICUBIC), self.size, self.size)
        channels = np.asarray(image).transpose(2, 0, 1)
        return np.stack([table[channel] for table, channel in zip(self.table, channels)])


def centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad(image: Image.Image, background: tuple) -> Image.Image:
    """The picture in the middle of a square; a long strip, whose square is huge, made smaller."""
    side = max(image.size)
    if side**2 > 4 * image.width * image.height + 2**24:
        image = image.resize([max(1, n * 4096 // side) for n in image.size])
        side = 4096
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def decode_picture(data: bytes, name: str = "") -> Image.Image:
    """The picture as RGB, first frame; ValueError where it is damaged, too large or no picture.

    Not with JPEG's scaled decoding (`Image.draft`): pictures of 640 x 480, as COCO's, are too small
    for it, and of larger ones it changes pixels by up to 0.4 standard deviations.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything
        reason = str(error).split(" <")[0]
        raise ValueError(f"picture {name}: not one that can be read ({reason})") from None


class Pictures:
    """A folder of pictures, or a .zip of them read in place; `read(name)` gives a file's bytes.

    The zip's directory is read once, into sorted arrays, and `os.pread` has no file position, so
    worker processes forked from this one share both for good (see `Records`).
    """

    def __init__(self, path: str | Path):
        self.path, self.archive = Path(path), None
        if self.path.is_file():
            gc.disable()  # it would go through the entries again and again: a quarter of the time
            try:
                with zipfile.ZipFile(self.path) as archive:
                    files = archive.infolist()
                names = np.array([file.filename.encode() for file in files], "S")
                entries = np.array(
                    [
                        (file.header_offset, file.compress_size, file.compress_type, file.CRC)
                        for file in files
                    ],
                    np.int64,
                ).reshape(-1, 4)
                order = names.argsort(kind="stable")
                self.names, self.entries = names[order], entries[order]
            except Exception as error:  # zipfile, too, raises nearly anything
                raise ValueError(
                    f"--image_folder {path}: neither a folder nor a whole .zip ({error})"
                ) from None
            finally:
                gc.enable()
            self.archive = os.open(self.path, os.O_RDONLY)
        elif not self.path.is_dir():
            raise FileNotFoundError(f"--image_folder {path}: no such folder or .zip")

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_file() if self.archive is None else self.find(name) >= 0

    def find(self, name: str) -> int:
        """The place of a name among the zip's, the last of equal ones; -1 where there is none."""
        name = name.encode("utf-8", "surrogatepass")
        at = int(self.names.searchsorted(name, side="right")) - 1
        return at if at >= 0 and self.names[at] == name else -1

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """A file's bytes, or what its first `at_most` hold; FileNotFoundError, or ValueError if the
        zip is damaged, or packed as few are.
        """
        if self.archive is None:
            try:
                if not (self.path / name).is_file():  # or a pipe, which is read for ever
                    raise FileNotFoundError
                with open(self.path / name, "rb") as file:
                    return file.read(at_most)
            except (OSError, ValueError) as error:
                reason = type(error).__name__
                raise FileNotFoundError(f"picture {self.path / name}: {reason}") from None
        if (at := self.find(name)) < 0:
            raise FileNotFoundError(f"picture {name}: not in {self.path}")
        offset, size, method, crc = self.entries[at].tolist()
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"picture {name} in {self.path}: packed by method {method}; zip it "
                "with deflate, or without compression"
            )
        try:
            # A local header is 30 bytes and two strings, whose lengths are its last two fields.
            strings = struct.unpack("<2H", os.pread(self.archive, 30, offset)[26:])
            part = size if at_most is None else min(size, at_most)
            data = os.pread(self.archive, part, offset + 30 + sum(strings))
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-15).decompress(data)
        except (OSError, MemoryError, struct.error, zlib.error) as error:
            raise ValueError(f"picture {name} in {self.path}: damaged ({error})") from None
        if part == size and zlib.crc32(data) != crc:
            raise ValueError(f"picture {name} in {self.path}: damaged (checksum)")
        return data


# --- text ---

# LLaVA's conversation templates as Jinja, to the character (llava/conversation.py): the default
# system text and the rest. BOS stands for the model's start token, or nothing.
_TEMPLATES = {
    "v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "{{ BOS + system + ' ' }}"
        "{%- for turn in turns -%}"
        "{%- if turn.role == 'user' -%}{{ 'USER: ' + turn.content + ' ' }}"
        "{%- else -%}{{ 'ASSISTANT: ' + turn.content + eos_token }}{%- endif -%}"
        "{%- endfor -%}"
        "{{ 'ASSISTANT:' if add_generation_prompt else '' }}",
    ),
    "llava_llama_2": (
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural "
        "language.",
        "{%- for turn in turns -%}"
        "{%- if turn.role == 'user' -%}{{ BOS + '[INST] ' }}"
        "{%- if loop.first and system -%}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{%- endif -%}"
        "{{ turn.content + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + turn.content + ' ' + eos_token }}{%- endif -%}"
        "{%- endfor -%}",
    ),
    "chatml_direct": (
        "Answer the questions.",
        "{{ BOS + '<|im_start|>system\n' + system + '<|im_end|>' }}"
        "{%- for turn in turns -%}"
        "{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' }}"
        "{%- endfor -%}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
    ),
}
VERSIONS = ["plain", *_TEMPLATES, "own"]

# Prefixes of a template that make each message's content a string, or a list of parts, whichever
# the template expects.
_AS_STRING = (
    "{%- set both = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- set both.text = '' -%}"
    "{%- set string = message.content is string -%}"
    "{%- for part in ([{'text': message.content}] if string else message.content) -%}"
    "{%- set both.text = both.text + ('<image>\n' if part.type == 'image' else part.text) -%}"
    "{%- endfor -%}"
    "{%- set both.messages = both.messages + [dict(message, content=both.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = both.messages -%}"
)
_AS_PARTS = _AS_STRING.replace("content=both.text", "content=[{'type': 'text', 'text': both.text}]")


def chat_template(version: str, has_bos: bool) -> str:
    """The Jinja template of one of LLaVA's `--version` names."""
    system, body = _TEMPLATES[version]
    return (
        "{%- set own = messages[0].role == 'system' -%}"
        "{%- set turns = messages[1:] if own else messages -%}"
        f"{{%- set system = messages[0].content if own else {json.dumps(system)} -%}}"
        + body.replace("BOS", "bos_token" if has_bos else "''")
    )


class ChatText:
    r"""From a conversation to token ids and labels: the contract for training, chat and evaluation.

    The template is rendered as a whole and the whole string is tokenized, so the ids are those that
    `apply_chat_template` gives anyone (in two pieces where a token would straddle the edge of an
    answer). Labels come from positions in that string, never from comparing ids:

    <|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA frog.<|im_end|>\n
    .......................... prompt, ignored ........................^^^^^^^^^^^^^^^^^..
                                                                       answer and end token
    """

    # Inserted after each character of a control string in a record, so that neither template nor
    # tokenizer takes it for one; its ids are taken out again.
    CUT = "\U0010ffff"  # no character

    def __init__(self, tokenizer, version: str = "own"):
        if version not in VERSIONS:
            raise ValueError(f"--version {version}: known are {', '.join(VERSIONS)}")
        if IMAGE not in tokenizer.get_added_vocab():
            raise ValueError(f"the tokenizer has no token {IMAGE}: `model.py build` adds it")
        self.tokenizer, self.version, self.chat_template = tokenizer, version, None
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        first = tokenizer("a").input_ids[:1]  # only ids tell: `add_bos_token` misleads
        self.bos = first if first == [tokenizer.bos_token_id] else []
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        control = sorted({*special, *tokenizer.all_special_tokens, IMAGE}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)))
        once, twice = (tokenizer(self.CUT * n, add_special_tokens=False).input_ids for n in (1, 2))
        self.cut_ids = twice[len(once) :]
        if version == "plain":
            pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            self.stop_ids = [i for i, piece in enumerate(pieces) if "\n" in piece]
        else:
            own = tokenizer.chat_template and tokenizer.get_chat_template()  # of several, one
            self.adopt_template(own if version == "own" else chat_template(version, bool(self.bos)))

    def adopt_template(self, template: str | None):
        """Lets it take strings and parts, refuses what cannot teach, finds what ends an answer.

        `chat_template` is what a folder gets; `template` renders here, where content is a string.
        """
        if not template:
            raise ValueError("the model folder has no chat template: name one with --version v1")
        probe = [
            {"role": role, "content": text}
            for role, text in (
                ("user", "Q1x"),
                ("assistant", "A1x"),
                ("user", "Q2x"),
                ("assistant", "A2x"),
            )
        ]
        own = template.removeprefix(_AS_STRING).removeprefix(_AS_PARTS)
        self.template = own
        try:
            knows_strings = "Q1x" in self.render(probe[:1])
        except ValueError:
            knows_strings = False
        self.chat_template = (_AS_STRING if knows_strings else _AS_PARTS) + own
        self.template = own if knows_strings else self.chat_template
        text, edges = self.layout(probe)
        ends = {self.encode(text[:end])[-1] for end in edges[1::2]}
        self.stop_ids = sorted(ends | {self.tokenizer.eos_token_id} - {None})

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """The template's text for `messages`; with `prompt` it ends where an answer begins."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def layout(self, messages: list[dict], prompt: bool = False) -> tuple[str, list[int]]:
        """The rendered text, and where answers begin and end in it: (text, [from, to, from ..])."""
        if self.version == "plain":
            if len(messages) != 2 or messages[0]["content"].count(IMAGE) != 1:
                raise ValueError(
                    "--version plain takes one human and one gpt turn with one "
                    "picture: name another template"
                )
            text = IMAGE + messages[1]["content"] + "\n"
            return text, [len(IMAGE), len(text)]
        text, edges = self.render(messages, prompt), []
        for k, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant":
                before = self.render(messages[:k], prompt=True)
                if not text.startswith(before):
                    raise ValueError(
                        "the chat template's generation prompt does not begin its "
                        "rendering of an answer: name another with --version v1"
                    )
                end = self.control.search(text, len(before))
                if not end:
                    raise ValueError(
                        "the chat template puts no end token after an answer, so the "
                        "model would never learn to stop: name another with "
                        "--version v1"
                    )
                if not text[len(before) : end.start()].rstrip().endswith(content):
                    raise ValueError(
                        "the chat template changes an answer, or puts no end token "
                        "after it: name another with --version v1"
                    )
                edges += [len(before), end.end()]
            elif content not in text:
                raise ValueError(
                    f"the chat template drops the {message['role']} turn: remove it, "
                    "or name another template with --version v1"
                )
        return text, edges

    def ids_and_labels(self, messages: list[dict], prompt: bool = False) -> tuple[list, list]:
        """Token ids (t,) with one <image> id for each picture, and labels (t,): the id, or -100.

        They grow together, from edge to edge, so a prompt's ids always begin the ids of any
        conversation that it begins.
        """
        text, edges = self.layout([{**m, "content": self.protect(m)} for m in messages], prompt)
        ids, labels, start = [], [], 0
        for k, end in enumerate([*edges, len(text)]):
            whole = self.encode(text[:end])
            if whole[: len(ids)] == ids:
                ids = whole
            else:  # a token would straddle the edge: the rest by itself, as if in mid-text
                ids = ids + self.encode(self.CUT + text[start:end])[len(self.encode(self.CUT)) :]
            labels += ids[len(labels) :] if k % 2 else [IGNORE] * (len(ids) - len(labels))
            start = end
        return ids, labels

    def encode(self, text: str) -> list[int]:
        """The tokenizer's ids, with one start token where the model has one, and without cuts."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        ids = ids if ids[:1] == self.bos else self.bos + ids
        if cuts := text.count(self.CUT):
            as_text, cut = "".join(map(chr, ids)), "".join(map(chr, self.cut_ids))
            if not cut or as_text.count(cut) != cuts:
                raise ValueError(
                    "this tokenizer cannot encode a control string (</s>, <image> ..) "
                    "as plain text: remove it from the row"
                )
            ids = list(map(ord, as_text.replace(cut, "")))
        return ids

    def protect(self, message: dict) -> str:
        """The text of a turn with every control string cut, but for a human's <image>."""
        if re.search("[\ud800-\udfff\U0010ffff]", message["content"]):
            raise ValueError(
                "the text has half a surrogate pair or U+10FFFF in it, which is no "
                "character: remove it"
            )
        keep = IMAGE if message["role"] == "user" else None
        return self.control.sub(
            lambda m: m[0] if m[0] == keep else self.CUT.join([*m[0], ""]), message["content"]
        )


# --- records ---


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def parse_record(row: dict) -> tuple[list[dict], list[str]]:
    """The turns as {role, content} and the pictures' names; ValueError, with the fix, if wrong."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns
    ):
        raise ValueError(
            'expected {"id", "image", "conversations": [{"from": "human" or "gpt", '
            '"value": "..."}, ...]}'
        )
    for turn in turns:
        if turn.get("from") not in list(ROLES):  # a list takes what has no hash, too
            raise ValueError(
                f'"from": {turn.get("from")!r} is no role: use human and gpt (and system, first)'
            )
    messages = [{"role": ROLES[t["from"]], "content": t["value"]} for t in turns]
    first = int(bool(messages) and messages[0]["role"] == "system")
    for i, message in enumerate(messages[first:]):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(
                f"turn {first + i + 1} is {turns[first + i]['from']}'s: human and gpt "
                "must alternate, human first"
            )
    if messages and messages[-1]["role"] == "user":  # a question without an answer teaches nothing
        messages.pop()
    if len(messages) == first:
        raise ValueError("there is no gpt turn, so there is nothing to learn: add an answer")
    images = image_list(row)
    if not all(isinstance(name, str) for name in images):
        raise ValueError('"image" is neither a file name nor a list of file names')
    count = sum(m["content"].count(IMAGE) for m in messages if m["role"] == "user")
    if count != len(images):
        raise ValueError(
            f"{len(images)} picture(s) but {count} {IMAGE} in the human turns: write "
            f'one {IMAGE} where each picture belongs, and name each in "image"'
        )
    return messages, images


def image_list(row: dict) -> list[str]:
    images = row.get("image")
    return [] if images is None else images if isinstance(images, list) else [images]


def read_rows(path: Path):
    """Yields (row, its JSON text) of a .json or .jsonl file; ValueError names the wrong line.

    Rows are parsed one by one: as Python objects, all at once, they would take many times the room.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data_path {path}: no such file")
    content, line = path.read_bytes(), 0
    try:
        if path.suffix == ".jsonl":
            for line, text in enumerate(content.split(b"\n")):
                if text.strip():
                    yield json.loads(text), text
        else:
            yield from read_list(content.decode(json.detect_encoding(content), "surrogatepass"))
    except (ValueError, RecursionError) as error:  # or not UTF-8, or beyond Python's limits
        line, reason = line + getattr(error, "lineno", 1), getattr(error, "msg", error)
        if isinstance(error, UnicodeDecodeError) and path.suffix != ".jsonl":
            line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}: line {line}: not JSON rows ({reason})") from None


def read_list(text: str):
    """Yields (value, its own text) of a JSON list, as strict as json.loads."""
    decode = json.JSONDecoder().raw_decode
    space = "[ \t\n\r]*"
    separator = re.compile(rf"{space}(?:,{space}|(\]{space}\Z))").match  # group 1: it was the last
    found = re.match(rf"{space}\[{space}(\]{space}\Z)?", text)
    if not found:
        raise ValueError(f"expected a list of rows, found {type(json.loads(text)).__name__}")
    while not found[1]:
        value, end = decode(text, found.end())
        yield value, text[found.end() : end].encode("utf-8", "surrogatepass")
        found = separator(text, end)
        if not found:
            raise json.JSONDecodeError("expected a comma, or ] and the end", text, end)


def text_bytes(row) -> int:
    """The bytes of a row's turns; 0 where it is wrong, which is not for here to say."""
    try:
        return sum(len(turn["value"].encode("utf-8", "replace")) for turn in row["conversations"])
    except (TypeError, KeyError, AttributeError):
        return 0


class Records:
    """The rows of a .json or .jsonl file, packed in one buffer.

    Worker processes share a buffer for good; a list of dicts they would copy page by page, because
    reading a Python object writes its reference count. `lengths` estimates each row's tokens, four
    bytes of text to one, for the sampler.
    """

    def __init__(self, path: str | Path, tokens_per_picture: int = 576):
        self.path = Path(path)
        buffer, ends, lengths, pictures = bytearray(), [], [], []
        for row, text in read_rows(self.path):
            images = len(image_list(row)) if isinstance(row, dict) else 0
            lengths.append(text_bytes(row) // 4 + images * tokens_per_picture)
            pictures.append(images > 0)
            buffer += text
            ends.append(len(buffer))
        if not ends:
            raise ValueError(f"{self.path}: no rows")
        self.lengths, self.has_picture = np.array(lengths), np.array(pictures)
        self.ends, self.buffer = np.array(ends), np.frombuffer(buffer, np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict:
        return json.loads(self.buffer[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())

    def where(self, i: int) -> str:
        try:
            name = f" (id {self[i].get('id')})"
        except (AttributeError, RecursionError):  # no object, or nested too deep to be read here
            name = ""
        return f"{self.path}: row {i}{name.encode('utf-8', 'backslashreplace').decode()}"


# --- rows and batches ---


class LlavaDataset(torch.utils.data.Dataset):
    """Rows as tensors. Item i is a dict:

    input_ids, labels (t,) int64   one <image> id for each picture
    pixel_values (n, 3, S, S)      float32
    row, cut, fault                number; tokens lost to `max_length`; None, or why it was skipped

    Item -1, and a skipped row, has one token and no label: it fills the batch and adds nothing to
    the loss.
    `max_length` counts tokens after each picture has become `tokens_per_picture` of them.
    `on_bad_record` is `stop` (a ValueError names the row) or `skip`.
    """

    def __init__(
        self,
        records,
        pictures,
        text,
        transform,
        tokens_per_picture,
        max_length=2048,
        on_bad_record="stop",
    ):
        self.records, self.pictures, self.text, self.transform = records, pictures, text, transform
        self.tokens_per_picture, self.max_length = tokens_per_picture, max_length
        self.on_bad_record, self.image_token_id = on_bad_record, text.image_token_id

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        fault = None
        if i >= 0:
            try:
                return self.load(i)
            except (ValueError, FileNotFoundError, RecursionError) as error:
                fault = f"{self.records.where(i)}: {error}"
            if self.on_bad_record == "stop":
                raise ValueError(fault)
        return self.item(i, [0], [IGNORE], [], fault=fault)

    def item(self, i: int, ids, labels, pixels, cut: int = 0, fault: str | None = None) -> dict:
        size = self.transform.size
        pixels = np.array(pixels, np.float32).reshape(-1, 3, size, size)  # n may be 0
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": torch.from_numpy(pixels),
            "row": i,
            "cut": cut,
            "fault": fault,
        }

    def load(self, i: int) -> dict:
        messages, names = parse_record(self.records[i])
        ids, labels = self.text.ids_and_labels(messages)
        keep = self.fit(ids, labels)
        pixels = [self.picture(name) for name in names]
        return self.item(i, ids[:keep], labels[:keep], pixels, cut=len(ids) - keep)

    def picture(self, name: str) -> np.ndarray:
        """(3, S, S) float32: one of the pictures, as the tower gets it."""
        return self.transform(decode_picture(self.pictures.read(name), name))

    def fit(self, ids: list[int], labels: list[int]) -> int:
        """How many ids fit into `max_length`. What is cut off is the end, wherever that falls, but
        all pictures and at least one label must stay, else a ValueError.
        """
        widths = np.where(np.array(ids) == self.image_token_id, self.tokens_per_picture, 1).cumsum()
        keep = int((widths <= self.max_length).sum())
        if self.image_token_id in ids[keep:]:
            raise ValueError(
                f"the row has {widths[-1]} tokens, and --model_max_length "
                f"{self.max_length} would cut off a picture: raise it"
            )
        if all(label == IGNORE for label in labels[:keep]):
            raise ValueError(
                f"the row has {widths[-1]} tokens, and nothing is left to learn from "
                f"at --model_max_length {self.max_length}: raise it"
            )
        return keep


def open_files(data_path, image_folder, tokens_per_picture=576):
    """The records, and the pictures (None where no row has any)."""
    records = Records(data_path, tokens_per_picture)
    if records.has_picture.any() and not image_folder:
        raise ValueError(f"{data_path} has pictures: say where with --image_folder")
    return records, Pictures(image_folder) if image_folder else None


def open_dataset(
    data_path,
    image_folder,
    model_folder,
    version="own",
    aspect_ratio=None,
    max_length=2048,
    on_bad_record="stop",
    text=None,
) -> LlavaDataset:
    """The rows of a file as a model's folder wants them: its template, its pictures, its counts."""
    if not (Path(model_folder) / "config.json").is_file():
        raise FileNotFoundError(f"--model_name_or_path {model_folder}: no config.json there")
    try:
        config = AutoConfig.from_pretrained(model_folder)
    except Exception as error:  # its checks, too, raise nearly anything
        raise ValueError(
            f"--model_name_or_path {model_folder}/config.json: {' '.join(str(error).split())}"
        ) from None
    if config.model_type != "llava":
        raise ValueError(
            f"--model_name_or_path {model_folder}: not a LLaVA folder, but "
            f"{config.model_type}: make one with `model.py build`"
        )
    vision = config.vision_config  # one token for each patch, and CLIP's CLS where it is kept
    tokens_per_picture = (vision.image_size // vision.patch_size) ** 2
    tokens_per_picture += vision.model_type == "clip_vision_model"
    tokens_per_picture -= config.vision_feature_select_strategy == "default"
    records, pictures = open_files(data_path, image_folder, tokens_per_picture)
    if not text:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_folder)
        except Exception as error:  # as above
            raise ValueError(f"{model_folder}: its tokenizer cannot be read ({error!r})") from None
        text = ChatText(tokenizer, version)
    if text.image_token_id != config.image_token_id:
        raise ValueError(
            f"{model_folder}: {IMAGE} is {text.image_token_id} for the tokenizer, but "
            f"{config.image_token_id} in config.json"
        )
    transform = PictureTransform.from_pretrained(model_folder, aspect_ratio)
    return LlavaDataset(
        records, pictures, text, transform, tokens_per_picture, max_length, on_bad_record
    )


class Collator:
    """Makes a batch: each <image> id becomes `tokens_per_picture`, rows are padded on the right.

    input_ids, labels (B, T) int64; pixel_values (N, 3, S, S), in the order of the <image> ids.
    There is no attention mask: causal attention never looks at what comes after, and what stands in
    padded positions has no label.
    """

    def __init__(self, image_token_id: int, tokens_per_picture: int):
        self.image_token_id, self.tokens_per_picture = image_token_id, tokens_per_picture

    def __call__(self, rows: list[dict]) -> dict:
        input_ids, labels = [], []
        for row in rows:
            is_image = row["input_ids"] == self.image_token_id
            wanted, given = int(is_image.sum()), len(row["pixel_values"])
            assert wanted == given, f"row {row['row']}: {wanted} {IMAGE} ids for {given} pictures"
            times = torch.where(is_image, self.tokens_per_picture, 1)
            input_ids.append(row["input_ids"].repeat_interleave(times))  # (T,)
            labels.append(row["labels"].repeat_interleave(times))  # (T,), -100 at pictures
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(input_ids, batch_first=True),  # (B, T)
            "labels": pad(labels, batch_first=True, padding_value=IGNORE),  # (B, T)
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),  # (N, 3, S, S)
            "lengths": [len(ids) for ids in input_ids],
            "rows": [row["row"] for row in rows],
            "cut": sum(row["cut"] > 0 for row in rows),
            "faults": [row["fault"] for row in rows if row["fault"]],
        }


def plan_epoch(lengths, has_picture, global_batch: int, seed: int, epoch: int, by_modality: bool):
    """The rows of each optimizer step: (steps, global_batch) int64, each with its
    longest row first, -1 for none.

    A function of its arguments alone, so ranks, restarts and other splits into micro-batches agree.
    With `by_modality` a step has rows of one kind (with pictures, or without), of similar length.
    The step with the longest row is the first of epoch 0: what exceeds the memory shows at once.
    """
    rng = np.random.default_rng([seed, epoch])
    with_picture, without = np.flatnonzero(has_picture), np.flatnonzero(~has_picture)
    steps = []
    for group in [with_picture, without] if by_modality else [np.arange(len(lengths))]:
        rows = rng.permutation(group)
        if by_modality and len(rows):  # by length, give or take 5 %: other mates in each epoch
            size = lengths[rows]
            rows = rows[np.argsort(-size + rng.uniform(-0.05, 0.05, len(rows)) * size.mean())]
        missing = np.full(-len(rows) % global_batch, -1)
        steps.append(np.append(rows, missing).reshape(-1, global_batch))
    steps = rng.permutation(np.concatenate(steps))  # (steps, global_batch)
    size = np.where(steps < 0, 0, lengths[steps])
    steps = np.take_along_axis(steps, np.argsort(-size, axis=1, kind="stable"), axis=1)
    if epoch == 0:
        heaviest = size.max(axis=1).argmax()
        steps[[0, heaviest]] = steps[[heaviest, 0]]
    return steps


def micro_batches(steps: np.ndarray, accumulation: int, world: int, rank: int, start: int = 0):
    """This rank's micro-batches, lists of rows, `accumulation` of them for each step from `start`.

    Neighbours in length share a micro-batch, and ranks take neighbours: padding and waiting are
    least.
    """
    micro = steps.shape[1] // (accumulation * world)
    rows = steps[start:].reshape(-1, accumulation, world, micro)[:, :, rank]
    return rows.reshape(-1, micro).tolist()


def ignore_signals(worker: int):
    """A worker goes on when its whole group is asked to stop: the run wants its last window."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def loader(dataset, batches: list, collate, workers: int, pin_memory: bool):
    """Batches, prepared by worker processes; forked ones share the rows with this one."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the default would draw from dropout's
        pin_memory=pin_memory,
    )


# --- commands ---


COLOURS = {
    "red": (214, 40, 40),
    "green": (50, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (215, 180, 20),
}
SIZES = {"tiny": 14, "small": 21, "large": 30, "huge": 40}  # radius in pixels
SHAPES = {  # corners, for a radius of 1
    "circle": [],
    "ring": [],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "bar": [(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)],
}
NUMBERS = ["one", "two", "three", "four"]
POSITIONS = ["top left", "top right", "bottom left", "bottom right"]
QUESTIONS = {
    "colour": ["What colour are the shapes?", "Which colour do you see?"],
    "shape": ["What shape is shown?", "Which shape do you see?"],
    "size": ["What size are the shapes?", "How big are the shapes?"],
    "position": ["Where are the shapes?", "In which corner are the shapes?"],
    "number": ["How many shapes are there?", "Count the shapes."],
}
COMPARISONS = {
    "colour": "In which picture are the shapes {}?",
    "shape": "Which picture has a {}?",
    "position": "In which picture are the shapes in the {}?",
}


class ToyWorld:
    """Pictures of shapes, words about them and questions: what the built-in recipe trains on.

    A scene is a few shapes, all alike, in one corner. Each answer to a question of one kind is as
    likely as the others and says nothing about other kinds, so what a model gets right beyond a
    guess, it has seen.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count, self.deck = folder, random.Random(seed), 0, []

    def scene(self) -> dict:
        choices = {
            "colour": list(COLOURS),
            "shape": list(SHAPES),
            "size": list(SIZES),
            "position": POSITIONS,
            "number": NUMBERS,
        }
        return {kind: self.rng.choice(answers) for kind, answers in choices.items()}

    def words(self, scene: dict) -> str:
        ending = "" if scene["number"] == "one" else "s"
        return "{number} {size} {colour} {shape}{ending} in the {position}".format(
            ending=ending, **scene
        )

    def shapes(self, scene: dict) -> list[tuple]:
        """What to draw: (shape, colour, size, column, row of 4 x 4) each."""
        corner, count = POSITIONS.index(scene["position"]), 1 + NUMBERS.index(scene["number"])
        cells = [(x + 2 * (corner % 2), y + 2 * (corner // 2)) for y in (0, 1) for x in (0, 1)]
        return [(scene["shape"], scene["colour"], scene["size"], *cell) for cell in cells[:count]]

    def draw(self, shapes: list[tuple]) -> str:
        """Writes a picture of shapes; its file name."""
        image = Image.new("RGB", (336, 336), (self.rng.randint(225, 255),) * 3)
        pen = ImageDraw.Draw(image)
        for shape, colour, size, *cell in shapes:
            radius = SIZES[size]
            free = min(8, 42 - radius)
            x, y = (84 * c + 42 + self.rng.uniform(-free, free) for c in cell)
            box = (x - radius, y - radius, x + radius, y + radius)
            if shape == "circle":
                pen.ellipse(box, fill=COLOURS[colour])
            elif shape == "ring":
                pen.ellipse(box, outline=COLOURS[colour], width=round(0.45 * radius))
            else:
                corners = [(x + dx * radius, y + dy * radius) for dx, dy in SHAPES[shape]]
                pen.polygon(corners, fill=COLOURS[colour])
        self.count += 1
        name = f"{self.count:06d}.png"
        image.save(self.folder / "images" / name, compress_level=1)
        return name

    # Each of these gives (descriptions, shapes of each picture, [(kind, question, answer)]).

    def one(self):
        scene, kinds = self.scene(), self.rng.sample(list(QUESTIONS), len(QUESTIONS))
        asked = [(kind, self.rng.choice(QUESTIONS[kind]), scene[kind]) for kind in kinds]
        return [self.words(scene)], [self.shapes(scene)], asked

    def two(self):
        scenes, asked = (self.scene(), self.scene()), []
        for kind in self.rng.sample(list(COMPARISONS), len(COMPARISONS)):
            which = self.rng.randrange(2)
            if scenes[0][kind] != scenes[1][kind]:
                question = COMPARISONS[kind].format(scenes[which][kind])
                asked.append(("comparison", question, ("first", "second")[which]))
        if not asked:  # the two are alike
            return self.two()
        return [self.words(scene) for scene in scenes], list(map(self.shapes, scenes)), asked

    def relation(self):
        (a, b), (red, blue) = (self.rng.sample(list(x), 2) for x in (SHAPES, COLOURS))
        where, line = self.rng.choice(["left", "right", "above", "below"]), self.rng.randrange(4)
        cells = [(0, line), (3, line)] if where in ("left", "right") else [(line, 0), (line, 3)]
        cells = cells if where in ("left", "above") else cells[::-1]
        words = f"a {red} {a} and a {blue} {b}, the {a} {where}"
        shapes = [(a, red, "large", *cells[0]), (b, blue, "large", *cells[1])]
        return [words], [shapes], [("relation", f"Where is the {a}, seen from the {b}?", where)]

    def row(self, asked: list[tuple], pictures: list, words: str = "") -> dict:
        """A record: pictures, or words, then questions and answers."""
        images = [self.draw(shapes) for shapes in pictures]
        turns = [
            {"from": who, "value": said}
            for _, *turn in asked
            for who, said in zip(("human", "gpt"), turn)
        ]
        turns[0]["value"] = f"{IMAGE}\n" * len(images) + words + turns[0]["value"]
        image = {"image": images[0] if len(images) == 1 else images} if images else {}
        return {
            "id": f"{self.rng.getrandbits(40):010x}",
            **image,
            "conversations": turns,
            "kinds": [kind for kind, *_ in asked],
        }

    def reading(self) -> dict:
        """Scenes in words, or the loose words of one, and questions: for who cannot read yet."""
        make = self.rng.choices([self.one, self.two, self.relation], [7, 2, 1])[0]
        words, _, asked = make()
        if make == self.one and self.rng.random() < 0.7:
            facts = [answer for _, _, answer in self.rng.sample(asked, len(asked))]
            asked = [("caption", "Describe the picture.", words[0])] * self.rng.randrange(2) + asked
            words = [" ".join(f" {fact}" for fact in facts)]
        asked = [("reading", *turn) for _, *turn in asked]  # no picture is needed for these
        return self.row(asked, [], "".join(f"{line}\n" for line in words))

    def caption(self) -> dict:
        words, pictures, _ = self.one()
        return self.row([("caption", "Describe the picture.", words[0])], pictures)

    def instruction(self) -> dict:
        """As in visual instruction tuning: mostly one picture and several questions about it."""
        if not self.deck:  # so the shares hold in every 100 rows
            kinds = [self.one, self.two, self.relation, None]
            self.deck = self.rng.sample(kinds, counts=[79, 12, 4, 5], k=100)
        make = self.deck.pop()
        if make is None:
            return self.reading()
        _, pictures, asked = make()
        return self.row(asked, pictures)


def toy_words(rows: int = 1000) -> list[str]:
    """What the toy world says, for a tokenizer to learn its vocabulary from."""
    world = ToyWorld(Path(), seed=0)
    said = [turn["value"] for _ in range(rows) for turn in world.reading()["conversations"]]
    return ["user", "assistant"] * rows + said


def toy(out: Path, scenes: int, seed: int):
    """Writes the built-in data: three sets of rows, `scenes` in the largest, each with a held-out
    one of 160.
    """
    if os.path.lexists(out):
        raise ValueError(f"--out {out}: exists already; name a new folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    world = ToyWorld(part, seed)
    sets = {}
    for name, make, count in (
        ("reading", world.reading, -(-scenes // 2)),
        ("captions", world.caption, -(-scenes // 4)),
        ("train", world.instruction, scenes),
    ):
        sets[name] = [make() for _ in range(count)]
        sets[f"{name}_validation"] = [make() for _ in range(160)]
    rows = sets["train_validation"]
    # The same questions with other rows' pictures: who still answers has not looked.
    shuffled = sets["train_shuffled"] = list(rows)
    for count in (1, 2):
        alike = [i for i, row in enumerate(rows) if len(image_list(row)) == count]
        for i, other in zip(alike, np.roll(alike, -(len(alike) // 2))):
            shuffled[i] = rows[i] | {"image": rows[other]["image"]}
    for name, content in sets.items():
        (part / f"{name}.json").write_text(json.dumps(content, indent=1))
    (part / "baseline.json").write_text(json.dumps(question_only(sets["train"], rows)))
    part.rename(out)


def question_only(train: list[dict], rows: list[dict]) -> dict:
    """{kind: share right} of always giving the training set's commonest answer to a question."""

    def turns(rows):
        for row in rows:
            said = [turn["value"].replace(f"{IMAGE}\n", "") for turn in row["conversations"]]
            yield from zip(row["kinds"], said[::2], said[1::2])

    seen, right = collections.defaultdict(collections.Counter), collections.defaultdict(list)
    for _, question, answer in turns(train):
        seen[question][answer] += 1
    for kind, question, answer in turns(rows):
        guess = seen[question].most_common(1)
        right[kind].append(bool(guess) and guess[0][0] == answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def show(dataset: LlavaDataset, i: int, as_json: bool):
    """Prints a row as the model gets it: pictures, tokens with ids; supervised ones stand out."""
    if not 0 <= i < len(dataset):
        raise ValueError(f"--index {i}: {dataset.records.path} has rows 0 to {len(dataset) - 1}")
    item = dataset[i]
    batch = Collator(dataset.image_token_id, dataset.tokens_per_picture)([item])
    if as_json:
        print(json.dumps({key: batch[key][0].tolist() for key in ("input_ids", "labels")}))
        return
    colour = sys.stdout.isatty()
    pictures = len(item["pixel_values"])
    print(
        f"{dataset.records.where(i)}: {pictures} picture{'s' * (pictures != 1)}, "
        f"{batch['lengths'][0]} tokens, {(item['labels'] != IGNORE).sum()} of them supervised, "
        f"{item['cut']} cut off"
    )
    for pixels in item["pixel_values"] if colour else []:
        print(thumbnail(dataset.transform, pixels.numpy()))
    before, after = ("\033[30;42m", "\033[0m") if colour else ("[", "]")
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist()):
        text = dataset.text.tokenizer.decode([token]).replace("\n", "\\n")
        if token == dataset.image_token_id:
            text = f"{IMAGE} x {dataset.tokens_per_picture}"
        text = text if label == IGNORE else before + text + after
        print(text, end=f"\033[2m{token}\033[0m " if colour else f"/{token} ")
    print()


def thumbnail(transform: PictureTransform, pixels: np.ndarray, width: int = 48) -> str:
    """What the tower sees, as coloured half blocks for a terminal: two pixels to a character."""
    rgb = (pixels.transpose(1, 2, 0) - transform.shift) / transform.scale
    rgb = Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).resize((width, width))
    rgb = np.asarray(rgb).tolist()
    block = "\033[38;2;{};{};{}m\033[48;2;{};{};{}m▀"
    lines = [
        "".join(block.format(*above, *below) for above, below in zip(*rows)) + "\033[0m"
        for rows in zip(rgb[::2], rgb[1::2])
    ]
    return "\n".join(lines)


class Check(torch.utils.data.Dataset):
    """Item i is what `data.py check` finds out about row i: (repr of its id, figures, faults).

    figures  numbers of turns, pictures, tokens, tokens kept, tokens supervised; 0 where not known
    faults   what is wrong, a line each
    `rows` is the set as a model wants it, or None: then there are no tokens. Of a picture the
    header is read, or, if `full`, all of it decoded.
    """

    def __init__(self, records: Records, pictures: Pictures, rows: LlavaDataset | None, full: bool):
        self.records, self.pictures, self.rows, self.full = records, pictures, rows, full

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple:
        row, figures, names, errors = None, [0] * 5, [], []
        try:
            row = self.records[i]
            messages, names = parse_record(row)
            figures[:2] = len(messages), len(names)
            if self.rows:
                ids, labels = self.rows.text.ids_and_labels(messages)
                more = len(names) * (self.rows.tokens_per_picture - 1)
                figures[2] = len(ids) + more
                keep = self.rows.fit(ids, labels)
                figures[3:] = keep + more, sum(label != IGNORE for label in labels[:keep])
        except (ValueError, RecursionError) as error:
            errors.append(error)
        for name in names:
            try:
                self.look_at(name)
            except (ValueError, FileNotFoundError) as error:
                errors.append(error)
        return (
            repr(row.get("id") if isinstance(row, dict) else None),
            figures,
            [f"{self.records.where(i)}: {error}" for error in errors],
        )

    def look_at(self, name: str):
        """Raises what training would, as far as it looks: ValueError or FileNotFoundError."""
        if not self.full:
            with contextlib.suppress(Exception):  # a longer header, or a fault: see it all
                return Image.open(io.BytesIO(self.pictures.read(name, at_most=2**16)))
        decode_picture(self.pictures.read(name), name)


def check(args) -> int:
    """Prints the faults of all rows and a report; the number of faults. Every core takes part."""
    files, rows, max_length = (args.data_path, args.image_folder), None, args.model_max_length
    if args.model_name_or_path:
        rows = open_dataset(*files, args.model_name_or_path, args.version, max_length=max_length)
    records, pictures = (rows.records, rows.pictures) if rows else open_files(*files)
    ids, figures, count = collections.Counter(), [], 0
    batches = torch.utils.data.DataLoader(
        Check(records, pictures, rows, args.full),
        batch_size=64,
        collate_fn=list,
        num_workers=len(os.sched_getaffinity(0)),
        multiprocessing_context="fork",
    )
    with tqdm(total=len(records), unit=" rows", dynamic_ncols=True, disable=None) as bar:
        for batch in batches:
            for name, numbers, faults in batch:
                ids[name] += name != "None"  # a row needs no id
                figures.append(np.array(numbers, np.int32))
                count += len(faults)
                for fault in faults:
                    bar.write(fault.encode("utf-8", "backslashreplace").decode())
            bar.update(len(batch))
    turns, images, tokens, kept, supervised = np.array(figures).T
    print(
        f"rows        {len(records):,}, {(~records.has_picture).sum():,} of them text-only\n"
        f"turns       {turns.sum():,}\npictures    {images.sum():,}"
    )
    if (known := tokens[tokens > 0]).size:
        shares = ", ".join(
            f"{share} % have up to {np.percentile(known, share):,.0f}" for share in (50, 90, 99)
        )
        cut = (known > max_length).sum()
        print(
            f"tokens      {shares}, the longest row {known.max():,}\n"
            f"cut         {cut:,} rows ({cut / len(known):.2%}) at {max_length:,} tokens\n"
            f"supervised  {supervised.sum() / max(kept.sum(), 1):.1%} of the tokens"
        )
    repeated = [name for name, times in ids.items() if times > 1]
    print(
        f"ids         {len(repeated):,} of them repeated"
        + "".join(f", the first {name}" for name in repeated[:1])
    )
    print(
        f"faults      {count:,}"
        + (": mend or remove these rows, or train with --on_bad_record skip" if count else "")
    )
    return count


# Of OK-VQA and VQAv2 as they are published. LLaVA-1.5 asks for short answers with these words.
SHORT_ANSWER = "Answer the question using a single word or phrase."


def read_vqa(path: str, key: str, take) -> tuple[dict, list]:
    """A raw file and, for each item of its list `key`, take(item)."""
    content = Path(path).read_bytes()
    try:
        content = json.loads(content)
        return content, [take(item) for item in content[key]]
    except Exception as error:  # as many as there are other kinds of JSON
        raise ValueError(
            f"{path}: not {key} as OK-VQA and VQAv2 publish them ({type(error).__name__}: {error})"
        ) from None


def vqa_rows(questions: str, annotations: str, pictures: Pictures) -> list[dict]:
    """A row for each question: the answer to learn is the commonest of the ten that people gave,
    the first of several such. All ten are kept under `answers`, for scoring.
    """
    content, asked = read_vqa(
        questions,
        "questions",
        lambda q: (int(q["question_id"]), int(q["image_id"]), q["question"].strip()),
    )
    _, answered = read_vqa(
        annotations,
        "annotations",
        lambda a: (
            (int(a["question_id"]), int(a["image_id"])),
            [x["answer"].strip() for x in a["answers"]],
        ),
    )
    given, split = dict(answered), str(content["data_subtype"])  # as train2014: COCO's folder, too
    rows, missing = [], []
    if len({number for number, *_ in asked}) < len(asked) or len(given) < len(answered):
        raise ValueError(f"{questions}, {annotations}: a question_id stands twice in one of them")
    for number, image, question in asked:
        if not given.get((number, image)):
            raise ValueError(
                f"{annotations}: no answer to question {number} of {questions}, about "
                f"picture {image}"
            )
        if not question or IMAGE in question:
            raise ValueError(f"{questions}: question {number} is {question!r}: remove it")
        name = f"COCO_{split}_{image:012d}.jpg"
        found = [place for place in (name, f"{split}/{name}") if place in pictures]
        missing += [] if found else [name]
        answers = given[number, image]
        rows.append(
            {
                "id": str(number),
                "image": (found or [name])[0],
                "conversations": [
                    {"from": "human", "value": f"{IMAGE}\n{question}\n{SHORT_ANSWER}"},
                    {"from": "gpt", "value": max(answers, key=answers.count)},
                ],
                "answers": answers,
            }
        )
    if missing:
        raise FileNotFoundError(
            f"{questions}: {len(missing)} of {len(rows)} questions have no "
            f"picture in {pictures.path}, the first {missing[0]}: get COCO's "
            f"{split}, or name the folder or .zip that holds it"
        )
    return rows


def okvqa(args):
    """Writes train.json and validation.json; no picture is in both."""
    out, pictures = Path(args.out), Pictures(args.image_folder)
    if os.path.lexists(out):
        raise ValueError(f"--out {out}: exists already; name a new folder")
    if not len(args.questions) == len(args.annotations) <= 2:
        raise ValueError(
            "--questions and --annotations take one file each, or two: to train on, "
            "and to validate with"
        )
    train, *more = [vqa_rows(*files, pictures) for files in zip(args.questions, args.annotations)]
    names = sorted({row["image"] for row in train})
    if more:
        held_out = {row["image"] for row in more[0]}
        if both := held_out.intersection(names):
            raise ValueError(
                f"{args.questions[1]}: {min(both)} is a picture of {args.questions[0]}, too"
            )
    else:
        random.Random(args.seed).shuffle(names)
        held_out = set(names[: round(len(names) * min(max(args.val_fraction, 0), 1))])
    rows = train + sum(more, [])
    train, validation = (
        [row for row in rows if (row["image"] in held_out) == held] for held in (False, True)
    )
    if not train or not validation:
        raise ValueError(
            f"{len(train)} questions to train on and {len(validation)} to validate "
            f"with, at --val_fraction {args.val_fraction}: neither may be empty"
        )
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, rows in (("train", train), ("validation", validation)):
        (part / f"{name}.json").write_text(json.dumps(rows, indent=1))
        print(
            f"{out / name}.json: {len(rows):,} questions about "
            f"{len({row['image'] for row in rows}):,} pictures"
        )
    part.rename(out)


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("toy", help="write the built-in data")
    command.add_argument("--out", required=True, help="folder to write to")
    command.add_argument("--scenes", type=int, default=8000, help="rows of stage 2")
    command.add_argument("--seed", type=int, default=0)
    for name, what in (
        ("show", "print a row as the model gets it"),
        ("check", "read all rows and pictures; say what is wrong with them"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument(
            "--model_name_or_path",
            required=name == "show",
            help="a LLaVA folder; check counts no tokens without one",
        )
        command.add_argument("--data_path", required=True, help=".json or .jsonl in LLaVA's format")
        command.add_argument("--image_folder", help="a folder of pictures, or a .zip")
        command.add_argument("--version", choices=VERSIONS, default="own", help="the template")
        command.add_argument(
            "--model_max_length", type=int, default=2048, help="tokens of a row, pictures included"
        )
    commands.choices["check"].add_argument(
        "--full", action="store_true", help="decode each picture whole"
    )
    command = commands.choices["show"]
    command.add_argument("--image_aspect_ratio", choices=["pad", "square"])
    command.add_argument("--index", type=int, default=0, help="which row, from 0")
    command.add_argument("--json", action="store_true", help="input_ids and labels, for machines")
    command = commands.add_parser("okvqa", help="OK-VQA's or VQAv2's raw files to LLaVA's format")
    command.add_argument(
        "--questions",
        required=True,
        nargs="+",
        metavar="F",
        help="raw .json to train on, and, if it is not to be split, to validate",
    )
    command.add_argument(
        "--annotations",
        required=True,
        nargs="+",
        metavar="F",
        help="the raw answers to each of them",
    )
    command.add_argument("--image_folder", required=True, help="COCO's pictures, a folder or .zip")
    command.add_argument("--out", required=True, help="folder to write to")
    command.add_argument(
        "--val_fraction",
        type=float,
        default=0.05,
        help="share of the pictures whose questions go into validation.json",
    )
    command.add_argument("--seed", type=int, default=0, help="of which pictures these are")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    try:
        if args.command == "toy":
            if args.scenes < 1:
                raise ValueError(f"--scenes {args.scenes}: must be at least 1")
            toy(Path(args.out), args.scenes, args.seed)
        elif args.command == "okvqa":
            okvqa(args)
        elif args.command == "show":
            dataset = open_dataset(
                args.data_path,
                args.image_folder,
                args.model_name_or_path,
                args.version,
                args.image_aspect_ratio,
                args.model_max_length,
            )
            show(dataset, args.index, args.json)
        else:
            return int(check(args) > 0)
    except (ValueError, OSError) as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
