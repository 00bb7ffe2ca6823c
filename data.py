"""From a JSON record and a picture to a batch: everything that LLaVA does before the model.

A record, in LLaVA's format, and what becomes of it:

    {"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt",   "value": "A frog."}]}

      > picture   RGB, padded or cropped to a square, 336 x 336, normalised        (3, 336, 336)
      > text      the chat template rendered; ids, and labels: only answers count  (t,), (t,)
      > batch     each <image> id becomes 576 placeholders, rows padded on the right
                  input_ids, labels (B, T) int64; pixel_values (N, 3, 336, 336) float32

Labels are unshifted, as Hugging Face has them: the model compares position t with label t + 1.

    python data.py toy  --out out/toy
    python data.py show --model_name_or_path out/model --data_path out/toy/train.json --image_folder out/toy/images

Sources: LLaVA's record format, templates and masks (github.com/haotian-liu/LLaVA, llava/conversation.py and
llava/train/train.py), CLIP's preprocessing (github.com/openai/CLIP, clip/clip.py).
"""

import argparse
import io
import json
import os
import random
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

IMAGE = "<image>"  # one in the text for each picture of the row
IGNORE = -100      # the label of a position that no loss looks at


# --- pictures ---


class PictureTransform:
    """Turns a picture into the tower's input, as CLIP's (`square`) and LLaVA's (`pad`) processors do.

    pad     the picture is centred on a square of the mean colour, then resized: nothing is lost
    square  its short side is resized, then the centre is cut out: the ends of the long side are lost
    """

    def __init__(self, size: int, mean: list[float], std: list[float], aspect_ratio: str):
        self.size, self.aspect_ratio = size, aspect_ratio
        self.background = tuple(int(255 * m) for m in mean)
        mean, std = np.float32(mean), np.float32(std)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    @classmethod
    def from_pretrained(cls, folder: str | Path, aspect_ratio: str | None = None) -> "PictureTransform":
        """Reads the processor files of a model folder; `aspect_ratio` overrides what they say."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (path := Path(folder) / name).is_file():
                config = json.loads(path.read_text())
                config = config.get("image_processor", config)
                if "image_mean" in config:
                    break
        else:
            raise FileNotFoundError(f"{folder}: no preprocessor_config.json, which says how pictures are prepared")
        size = config.get("crop_size") or config["size"]
        size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        own = "pad" if config.get("do_pad") else "square"
        return cls(size, config["image_mean"], config["image_std"], aspect_ratio or own)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(3, size, size) float32, normalised."""
        width, height = image.size
        if self.aspect_ratio == "pad" and width != height:
            side = max(width, height)
            canvas = Image.new("RGB", (side, side), self.background)
            canvas.paste(image, ((side - width) // 2, (side - height) // 2))
            image, width, height = canvas, side, side
        # Resizing and then cropping is resizing the box that the crop comes from, at a fraction of the cost.
        ratio = self.size / min(width, height)
        wide, high = max(self.size, int(width * ratio)), max(self.size, int(height * ratio))
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        x, y = width / wide, height / high  # source pixels for a pixel of the result
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image, np.float32) * self.scale + self.shift  # (size, size, 3)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))            # (3, size, size)


def decode_picture(data: bytes) -> Image.Image:
    """The picture as RGB, first frame; ValueError where it is damaged, too large or no picture."""
    try:
        image = Image.open(io.BytesIO(data))
        # Padding makes a square of the longer side, so that is what must fit into memory.
        if max(image.size) ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many: make it smaller")
        return image.convert("RGB")
    except (Exception, Image.DecompressionBombError) as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"not a readable picture ({error})") from None


class Pictures:
    """A folder of pictures, or a .zip of them read in place; `read(name)` gives a file's bytes.

    The zip's directory is read once and kept as plain numbers, and `os.pread` has no file position, so worker
    processes forked from this one share both.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.archive = None
        if self.path.is_file():
            if not zipfile.is_zipfile(self.path):
                raise ValueError(f"--image_folder {path}: neither a folder nor a .zip")
            with zipfile.ZipFile(self.path) as archive:
                self.entries = {i.filename: (i.header_offset, i.compress_size, i.compress_type, i.CRC)
                                for i in archive.infolist() if not i.is_dir()}
            self.archive = os.open(self.path, os.O_RDONLY)
        elif not self.path.is_dir():
            raise FileNotFoundError(f"--image_folder {path}: no such folder or .zip")

    def read(self, name: str) -> bytes:
        """The bytes of one picture; FileNotFoundError, or ValueError where the archive is damaged."""
        if self.archive is None:
            try:
                return (self.path / name).read_bytes()
            except (OSError, ValueError) as error:
                raise FileNotFoundError(f"picture {self.path / name}: {error.__class__.__name__}") from None
        if name not in self.entries:
            raise FileNotFoundError(f"picture {name}: not in {self.path}")
        offset, size, method, crc = self.entries[name]
        # A local header is 30 bytes and two strings, whose lengths are its last two fields.
        header = os.pread(self.archive, 30, offset)
        start = offset + 30 + sum(struct.unpack("<2H", header[26:])) if len(header) == 30 else offset
        data = os.pread(self.archive, size, start)
        try:
            data = zlib.decompress(data, -15) if method == zipfile.ZIP_DEFLATED else data
        except zlib.error as error:
            raise ValueError(f"picture {name} in {self.path}: {error}") from None
        if zlib.crc32(data) != crc:
            raise ValueError(f"picture {name} in {self.path}: damaged (checksum)")
        return data


# --- text ---

# LLaVA's conversation templates as Jinja, to the character (llava/conversation.py): the default system text and the
# rest. BOS stands for the model's start token, or nothing.
_TEMPLATES = {
    "v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        "{{ BOS + system + ' ' }}{%- for turn in turns -%}{%- if turn.role == 'user' -%}"
        "{{ 'USER: ' + turn.content + ' ' }}{%- else -%}{{ 'ASSISTANT: ' + turn.content + eos_token }}"
        "{%- endif -%}{%- endfor -%}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"),
    "llava_llama_2": (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language.",
        "{%- for turn in turns -%}{%- if turn.role == 'user' -%}{{ BOS + '[INST] ' }}{%- if loop.first and system -%}"
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{%- endif -%}{{ turn.content + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + turn.content + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"),
    "chatml_direct": (
        "Answer the questions.",
        "{{ BOS + '<|im_start|>system\n' + system + '<|im_end|>' }}{%- for turn in turns -%}"
        "{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' }}{%- endfor -%}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"),
}
VERSIONS = ["plain", *_TEMPLATES, "own"]

# Put in front of a template, this lets it take content as a string and as a list of parts, whichever it knows.
_EITHER_CONTENT = (
    "{%- set both = namespace(messages=[], text='') -%}{%- for message in messages -%}{%- set both.text = '' -%}"
    "{%- for part in ([{'text': message.content}] if message.content is string else message.content) -%}"
    "{%- set both.text = both.text + ('<image>\n' if part.type == 'image' else part.text) -%}{%- endfor -%}"
    "{%- set both.messages = both.messages + [dict(message, content=CONTENT)] -%}{%- endfor -%}"
    "{%- set messages = both.messages -%}")
_AS_STRING = _EITHER_CONTENT.replace("CONTENT", "both.text")
_AS_PARTS = _EITHER_CONTENT.replace("CONTENT", "[{'type': 'text', 'text': both.text}]")


def chat_template(version: str, tokenizer) -> str:
    """The Jinja template of one of LLaVA's `--version` names, for this tokenizer."""
    system, body = _TEMPLATES[version]
    return ("{%- set own = messages[0].role == 'system' -%}{%- set turns = messages[1:] if own else messages -%}"
            f"{{%- set system = messages[0].content if own else {json.dumps(system)} -%}}"
            + body.replace("BOS", "bos_token" if starts_with_bos(tokenizer) else "''"))


def starts_with_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a start token first. Only ids tell: `add_bos_token` and `bos_token` mislead."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


class ChatText:
    """From a conversation to token ids and labels: the one contract for training, chat and evaluation.

    The template is rendered as a whole and the whole string is tokenized, so the ids are those that
    `apply_chat_template` gives anyone. Labels come from positions in that string, never from comparing ids:

        <|im_start|>user\\n<image>\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\nA frog.<|im_end|>\\n
        ........................... prompt, ignored .......................^^^^^^^^^^^^^^^^^..
                                                                           supervised: answer and end token
    """

    # Control strings inside a record's text are rendered as characters that no text has, and so pass through
    # template and tokenizer without a meaning; their plain spelling is put back among the ids.
    LEAD = "\U0010FFFD"

    def __init__(self, tokenizer, version: str = "own"):
        if version not in VERSIONS:
            raise ValueError(f"--version {version}: offered are {', '.join(VERSIONS)}")
        self.tokenizer, self.version = tokenizer, version
        self.bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
        if version in _TEMPLATES:
            tokenizer.chat_template = chat_template(version, tokenizer)
        control = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        control = sorted(control | set(tokenizer.all_special_tokens) | {IMAGE}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)))
        self.stand_in = {text: chr(ord(self.LEAD) - 1 - i) for i, text in enumerate(control)}
        self.spelling = {}  # stand-in > (its ids, the ids of the control string as plain text), made on demand
        if version == "plain":
            self.stop_ids = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
        else:
            self._adopt_template()

    def _adopt_template(self):
        """Lets the template take both kinds of content, refuses one that cannot teach, and finds what ends an answer."""
        template = self.tokenizer.chat_template
        if not template:
            raise ValueError("the model folder has no chat template: name one with --version v1")
        probe = [{"role": "user", "content": "Qx7"}, {"role": "assistant", "content": "Ax7"}]
        if not template.startswith((_AS_STRING, _AS_PARTS)):
            self.tokenizer.chat_template = _AS_STRING + template
            try:
                knows_strings = "Qx7" in self.render(probe[:1])
            except ValueError:
                knows_strings = False
            self.tokenizer.chat_template = (_AS_STRING if knows_strings else _AS_PARTS) + template
        text, spans = self.layout(probe)
        ids = self.encode(text[:spans[-1][1]])
        self.stop_ids = sorted({ids[-1], self.tokenizer.eos_token_id} - {None})

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """The template's text for `messages`; with `prompt` it ends where an answer begins."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def layout(self, messages: list[dict], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the spans (start, end) in it that are supervised, one for each answer."""
        if self.version == "plain":
            caption = "" if prompt else messages[-1]["content"] + "\n"
            return IMAGE + caption, [] if prompt else [(len(IMAGE), len(IMAGE + caption))]
        text, spans = self.render(messages, prompt), []
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:k], prompt=True)
                if not text.startswith(before):
                    raise ValueError("the chat template's generation prompt does not begin its rendering of an "
                                     "answer: name another with --version v1")
                end = self.control.search(text, len(before))
                if not end or text[len(before):end.start()].strip() != message["content"].strip():
                    raise ValueError("the chat template puts no end token behind an answer, so the model would never "
                                     "learn to stop: name another with --version v1")
                spans.append((len(before), end.end()))
            elif message["role"] == "system" and message["content"].strip() not in text:
                raise ValueError("the chat template drops the system turn: remove it, or name another template "
                                 "with --version v1")
        return text, spans

    def ids_and_labels(self, messages: list[dict], prompt: bool = False) -> tuple[list[int], list[int]]:
        """Token ids (t,) with one <image> id for each picture, and labels (t,): the id, or -100.

        They grow together, span by span, so a prompt's ids always begin the ids of any conversation it begins.
        """
        text, spans = self.layout([{**m, "content": self._protect(m)} for m in messages], prompt)
        ids, labels, done = [], [], 0
        for start, end in [*spans, (len(text), len(text))]:
            ids = self._extend(ids, text, done, start)
            labels += [IGNORE] * (len(ids) - len(labels))
            ids = self._extend(ids, text, start, end)
            labels += ids[len(labels):]
            done = end
        return ids, labels

    def _extend(self, ids: list[int], text: str, start: int, end: int) -> list[int]:
        """The ids of text[:end], given those of text[:start]: the tokenizer's own, unless a token would straddle."""
        if start == end and ids:
            return ids
        whole = self.encode(text[:end])
        return whole if whole[:len(ids)] == ids else ids + self._tail(self.encode, text[start:end])

    def encode(self, text: str) -> list[int]:
        """The tokenizer's ids for a rendered text, with exactly one start token where the model has one."""
        ids = self._tokenize(text)
        ids = ids if ids[:1] == self.bos else self.bos + ids
        for control, char in self.stand_in.items():
            if char in text:
                ids = self._spell_out(ids, control, char, text.count(char))
        return ids

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _tail(self, encode, text: str) -> list[int]:
        """The ids of a text in the midst of another, without what a tokenizer puts in front of a string."""
        lead, ids = encode(self.LEAD), encode(self.LEAD + text)
        if not lead or ids[:len(lead)] != lead:
            raise ValueError(f"this tokenizer cannot encode {text!r} as plain text: remove it from the record")
        return ids[len(lead):]

    def _spell_out(self, ids: list[int], control: str, char: str, count: int) -> list[int]:
        """`ids` with the plain spelling of `control` at the `count` places where its stand-in is."""
        if char not in self.spelling:  # cut in two, a control string is ordinary text
            plain = self._tail(self._tokenize, control[:1]) + self._tail(self._tokenize, control[1:])
            self.spelling[char] = self._tail(self._tokenize, char), plain
        stand_in, plain = self.spelling[char]
        out, i = [], 0
        while i < len(ids):
            found = ids[i:i + len(stand_in)] == stand_in
            out += plain if found else ids[i:i + 1]
            i += len(stand_in) if found else 1
            count -= found
        if count:
            raise ValueError(f"this tokenizer cannot encode {control!r} as plain text: remove it from the record")
        return out

    def _protect(self, message: dict) -> str:
        """The text of a turn with every control string replaced by its stand-in: a record is never control."""
        keep = IMAGE if message["role"] == "user" else None
        if any(char in message["content"] for char in (self.LEAD, *self.stand_in.values())):
            raise ValueError("the text has characters of Unicode's last private plane: remove them")
        return self.control.sub(lambda m: m[0] if m[0] == keep else self.stand_in[m[0]], message["content"])

# --- records ---


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def parse_record(row: dict) -> tuple[list[dict], list[str]]:
    """The turns as {role, content} and the names of the pictures; ValueError with the fix where the row is wrong."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise ValueError('expected {"id", "image", "conversations": [{"from": "human" or "gpt", "value": "..."}, ...]}')
    unknown = [t.get("from") for t in turns if not isinstance(t.get("from"), str) or t["from"] not in ROLES]
    if unknown:
        raise ValueError(f'"from": {unknown[0]!r} is not a role: use human and gpt (and system, first)')
    messages = [{"role": ROLES[t["from"]], "content": t["value"]} for t in turns]
    dialogue = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if dialogue and dialogue[-1]["role"] == "user":  # a question without an answer teaches nothing
        dialogue = dialogue[:-1]
        messages = messages[:-1]
    if not dialogue:
        raise ValueError("there is no gpt turn, so there is nothing to learn: add an answer")
    for i, message in enumerate(dialogue):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"turn {i + 1} is {message['role']}'s: human and gpt must alternate, human first")
    images = row.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) for name in images):
        raise ValueError('"image" is neither a file name nor a list of file names')
    count = sum(m["content"].count(IMAGE) for m in messages if m["role"] == "user")
    if count != len(images):
        raise ValueError(f"{len(images)} picture(s) but {count} {IMAGE} in the human turns: "
                         f'write one {IMAGE} where each picture belongs, and name each in "image"')
    return messages, images


class Records:
    """The rows of a .json or .jsonl file, packed in one buffer.

    Worker processes share a buffer for good; a list of dicts they would copy page by page, because reading a Python
    object writes its reference count. `lengths` estimates each row's tokens from its characters, for the sampler.
    """

    def __init__(self, path: str | Path, tokens_per_picture: int = 576):
        self.path = Path(path)
        packed, self.lengths, self.has_picture = [], [], []
        for row in self._rows():
            turns = row.get("conversations") if isinstance(row, dict) else None
            text = sum(len(str(t.get("value"))) for t in turns if isinstance(t, dict)) if isinstance(turns, list) else 0
            images = row.get("image") if isinstance(row, dict) else None
            pictures = len(images) if isinstance(images, list) else int(images is not None)
            self.lengths.append(text // 4 + pictures * tokens_per_picture + 1)
            self.has_picture.append(pictures > 0)
            packed.append(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        if not packed:
            raise ValueError(f"{self.path}: no rows")
        self.lengths, self.has_picture = np.array(self.lengths), np.array(self.has_picture)
        self.ends = np.cumsum([len(row) for row in packed])
        self.buffer = np.frombuffer(b"".join(packed), np.uint8)

    def _rows(self):
        if not self.path.is_file():
            raise FileNotFoundError(f"--data_path {self.path}: no such file")
        line = 0
        try:
            if self.path.suffix == ".jsonl":
                with open(self.path, encoding="utf-8") as file:
                    for line, text in enumerate(file):
                        if text.strip():
                            yield json.loads(text)
                return
            rows = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}: line {line + error.lineno}: not JSON ({error.msg})") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{self.path}: not JSON ({error})") from None
        if not isinstance(rows, list):
            raise ValueError(f"{self.path}: expected a list of rows, found {type(rows).__name__}")
        yield from rows

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict:
        start = self.ends[i - 1] if i else 0
        return json.loads(self.buffer[start:self.ends[i]].tobytes().decode("utf-8", "surrogatepass"))

    def where(self, i: int) -> str:
        row = self[i]
        return f"{self.path}: row {i} (id {row.get('id')})" if isinstance(row, dict) else f"{self.path}: row {i}"


# --- rows and batches ---


class LlavaDataset(torch.utils.data.Dataset):
    """Rows as tensors. Item i is a dict: input_ids, labels (t,) int64 with one <image> id for each picture,
    pixel_values (n, 3, S, S) float32, row (its number), cut (tokens lost to `max_length`), fault (None, or why it
    was skipped). Item -1, and a skipped row, is a row of weight 0: it keeps a place and counts for nothing.

    max_length counts tokens after each picture has become `tokens_per_picture` of them. on_bad_record is `stop` (a
    ValueError or FileNotFoundError names the row) or `skip`.
    """

    def __init__(self, records, pictures, text, transform, tokens_per_picture, max_length=2048, on_bad_record="stop"):
        self.records, self.pictures, self.text, self.transform = records, pictures, text, transform
        self.tokens_per_picture, self.max_length, self.on_bad_record = tokens_per_picture, max_length, on_bad_record
        self.image_token_id = text.tokenizer.convert_tokens_to_ids(IMAGE)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        if i < 0:
            return self.weightless(i, None)
        try:
            return self.load(i)
        except (ValueError, FileNotFoundError) as error:
            if self.on_bad_record == "skip":
                return self.weightless(i, f"{self.records.where(i)}: {error}")
            raise type(error)(f"{self.records.where(i)}: {error}") from None

    def weightless(self, i: int, fault: str | None) -> dict:
        return {"input_ids": torch.zeros(1, dtype=torch.long), "labels": torch.full((1,), IGNORE), "row": i,
                "pixel_values": torch.zeros(0, 3, self.transform.size, self.transform.size), "cut": 0, "fault": fault}

    def load(self, i: int) -> dict:
        messages, names = parse_record(self.records[i])
        ids, labels = self.text.ids_and_labels(check_plain(messages, names) if self.text.version == "plain" else messages)
        ids, labels, cut = self.truncate(torch.tensor(ids), torch.tensor(labels))
        pixels = [torch.from_numpy(self.transform(decode(self.pictures, name))) for name in names]
        pixels = torch.stack(pixels) if pixels else self.weightless(i, None)["pixel_values"]
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "row": i, "cut": cut, "fault": None}

    def truncate(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Cuts a row that is longer than `max_length` at its end; never through, or in front of, a picture."""
        width = torch.where(ids == self.image_token_id, self.tokens_per_picture, 1).cumsum(0)
        keep = width <= self.max_length
        if (ids[~keep] == self.image_token_id).any():
            raise ValueError(f"the row has {width[-1]} tokens, and --model_max_length {self.max_length} would cut off a "
                             "picture: raise it, or split the row")
        if not (labels[keep] != IGNORE).any():
            raise ValueError(f"nothing is left to learn from at --model_max_length {self.max_length}, as the row has "
                             f"{width[-1]} tokens: raise it")
        return ids[keep], labels[keep], int((~keep).sum())


def check_plain(messages: list[dict], names: list[str]) -> list[dict]:
    if len(messages) != 2 or len(names) != 1:
        raise ValueError("--version plain takes one human and one gpt turn with one picture: name another template")
    return messages


def decode(pictures: Pictures, name: str) -> Image.Image:
    data = pictures.read(name)
    try:
        return decode_picture(data)
    except ValueError as error:
        raise ValueError(f"picture {name}: {error}") from None


def open_dataset(data_path, image_folder, model_folder, version="own", aspect_ratio=None, max_length=2048,
                 on_bad_record="stop", text=None) -> LlavaDataset:
    """The rows of a file as a model's folder wants them: its tokenizer and template, its pictures, its token counts."""
    config = json.loads((Path(model_folder) / "config.json").read_text())
    vision = config["vision_config"]
    tokens_per_picture = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens_per_picture += config.get("vision_feature_select_strategy") == "full"  # the CLS token
    records = Records(data_path, tokens_per_picture)
    if records.has_picture.any() and not image_folder:
        raise ValueError(f"{data_path} has pictures: say where with --image_folder")
    text = text or ChatText(AutoTokenizer.from_pretrained(model_folder), version)
    return LlavaDataset(records, Pictures(image_folder) if image_folder else None, text,
                        PictureTransform.from_pretrained(model_folder, aspect_ratio), tokens_per_picture, max_length,
                        on_bad_record)


class Collator:
    """Makes a batch of rows: each <image> id becomes `tokens_per_picture` of them, and rows are padded on the right.

    input_ids, labels (B, T) int64; pixel_values (N, 3, S, S), in the order of the <image> ids. There is no attention
    mask: causal attention never looks at what comes after, and what stands in padded positions has no label.
    """

    def __init__(self, image_token_id: int, tokens_per_picture: int):
        self.image_token_id, self.tokens_per_picture = image_token_id, tokens_per_picture

    def __call__(self, rows: list[dict]) -> dict:
        input_ids, labels = [], []
        for row in rows:
            is_image = row["input_ids"] == self.image_token_id
            assert is_image.sum() == len(row["pixel_values"]), (
                f"row {row['row']}: {is_image.sum()} {IMAGE} ids for {len(row['pixel_values'])} pictures")
            times = torch.where(is_image, self.tokens_per_picture, 1)
            input_ids.append(row["input_ids"].repeat_interleave(times))  # (T,)
            labels.append(row["labels"].repeat_interleave(times))        # an <image> has no label, nor have its copies
        pad = torch.nn.utils.rnn.pad_sequence
        return {"input_ids": pad(input_ids, batch_first=True),                        # (B, T)
                "labels": pad(labels, batch_first=True, padding_value=IGNORE),        # (B, T)
                "pixel_values": torch.cat([row["pixel_values"] for row in rows]),     # (N, 3, S, S)
                "lengths": [len(ids) for ids in input_ids], "rows": [row["row"] for row in rows],
                "cut": sum(row["cut"] > 0 for row in rows), "faults": [row["fault"] for row in rows if row["fault"]]}


def plan_epoch(lengths, has_picture, global_batch: int, seed: int, epoch: int, by_modality: bool) -> np.ndarray:
    """The rows of each optimizer step, (steps, global_batch) int64, longest first; -1 where rows are missing.

    A function of its arguments alone, so ranks, restarts and other splits into micro-batches agree. With
    `by_modality` a step has rows of one kind (with pictures, or without) and of similar length. The step with the
    longest row is the first of epoch 0: what does not fit into memory shows at once.
    """
    rng = np.random.default_rng([seed, epoch])
    groups = [np.flatnonzero(has_picture), np.flatnonzero(~has_picture)] if by_modality else [np.arange(len(lengths))]
    steps = []
    for group in groups:
        rows = rng.permutation(group)
        if by_modality:  # sort inside stretches of 32 steps: alike within a step, random from epoch to epoch
            stretch = 32 * global_batch
            parts = [rows[i:i + stretch] for i in range(0, len(rows), stretch)]
            rows = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts] or [rows])
        rows = np.append(rows, np.full(-len(rows) % global_batch, -1)).reshape(-1, global_batch)
        steps.append(rows)
    steps = rng.permutation(np.concatenate(steps))  # (steps, global_batch)
    size = np.where(steps < 0, 0, lengths[steps])
    steps = np.take_along_axis(steps, np.argsort(-size, axis=1, kind="stable"), axis=1)
    if epoch == 0:
        heaviest = size.max(axis=1).argmax()
        steps[[0, heaviest]] = steps[[heaviest, 0]]
    return steps


class WindowSampler:
    """Yields this rank's micro-batches, `accumulation` of them for each optimizer step, from `start_step` on.

    Neighbours in length share a micro-batch, and ranks take neighbours, so padding and waiting are least.
    """

    def __init__(self, steps: np.ndarray, accumulation: int, world: int, rank: int, start_step: int = 0):
        self.rows = steps.reshape(len(steps), accumulation, world, -1)[start_step:, :, rank]

    def __len__(self) -> int:
        return self.rows.shape[0] * self.rows.shape[1]

    def __iter__(self):
        yield from (rows.tolist() for step in self.rows for rows in step)


# --- commands ---


COLOURS = {"red": (214, 40, 40), "green": (50, 160, 60), "blue": (40, 80, 210), "yellow": (240, 200, 30)}
SIZES = {"tiny": 13, "small": 20, "large": 29, "huge": 39}  # radius in pixels
SHAPES = {
    "circle": None,
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "cross": [(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32), (0.32, 1), (-0.32, 1),
              (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)],
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


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, colour: str, x: float, y: float, radius: float):
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    else:
        draw.polygon([(x + dx * radius, y + dy * radius) for dx, dy in SHAPES[shape]], fill=COLOURS[colour])


class ToyWorld:
    """Pictures of shapes, words about them, and questions: all that the built-in recipe trains on.

    Every answer to a question of one kind is equally likely and says nothing about the other kinds, so what a model
    gets right beyond a guess it has seen in the picture.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count = folder, random.Random(seed), 0

    def scene(self) -> dict:
        """A few shapes, all alike, in one corner."""
        choose = self.rng.choice
        return {"colour": choose(list(COLOURS)), "shape": choose(list(SHAPES)), "size": choose(list(SIZES)),
                "position": choose(POSITIONS), "number": choose(NUMBERS)}

    def words(self, scene: dict) -> str:
        plural = {"cross": "crosses"}.get(scene["shape"], scene["shape"] + "s")
        shape = scene["shape"] if scene["number"] == "one" else plural
        return f"{scene['number']} {scene['size']} {scene['colour']} {shape} in the {scene['position']}"

    def picture(self, *shapes: tuple) -> str:
        """Draws shapes (shape, colour, size, cell column 0..3, cell row 0..3) and returns the file's name."""
        image = Image.new("RGB", (336, 336), (self.rng.randint(225, 255),) * 3)
        draw = ImageDraw.Draw(image)
        for shape, colour, size, column, row in shapes:
            free = 42 - SIZES[size]
            x, y = (84 * cell + 42 + self.rng.uniform(-free, free) for cell in (column, row))
            draw_shape(draw, shape, colour, x, y, SIZES[size])
        self.count += 1
        name = f"{self.count:06d}.png"
        image.save(self.folder / "images" / name, compress_level=1)
        return name

    def picture_of(self, scene: dict) -> str:
        corner = POSITIONS.index(scene["position"])
        cells = self.rng.sample([(c, r) for c in (0, 1) for r in (0, 1)], 1 + NUMBERS.index(scene["number"]))
        return self.picture(*((scene["shape"], scene["colour"], scene["size"], c + 2 * (corner % 2), r + 2 * (corner // 2))
                              for c, r in cells))

    def questions_about_one(self):
        """(words, pictures, [(kind, question, answer)]): one scene, five questions."""
        scene = self.scene()
        kinds = self.rng.sample(list(QUESTIONS), len(QUESTIONS))
        return [self.words(scene)], [scene], [(kind, self.rng.choice(QUESTIONS[kind]), scene[kind]) for kind in kinds]

    def questions_about_two(self):
        """Two scenes in two pictures, told apart by what one has and the other has not."""
        first, second = self.scene(), self.scene()
        asked = []
        for kind in self.rng.sample(["colour", "shape", "position"], 3):
            if first[kind] != second[kind]:
                which = self.rng.randrange(2)
                asked.append(("which", f"Which picture has {kind} {(first, second)[which][kind]}?", ("first", "second")[which]))
        return ([self.words(first), self.words(second)], [first, second], asked) if asked else self.questions_about_two()

    def questions_about_relation(self):
        """Two different shapes side by side, or one above the other."""
        a, b = self.rng.sample(list(SHAPES), 2)
        colours = self.rng.sample(list(COLOURS), 2)
        where = self.rng.choice(["left", "right", "above", "below"])
        near, far, line = 0, self.rng.choice([2, 3]), self.rng.randrange(4)
        cells = [(near, line), (far, line)] if where in ("left", "right") else [(line, near), (line, far)]
        cells = cells if where in ("left", "above") else cells[::-1]
        words = f"a {colours[0]} {a} and a {colours[1]} {b}, the {a} {where}"
        shapes = [(a, colours[0], "large", *cells[0]), (b, colours[1], "large", *cells[1])]
        return [words], [shapes], [("relation", f"Where is the {a}, seen from the {b}?", where)]

    def row(self, kind: str, asked, turns_before: str, images: list[str]) -> dict:
        conversations = []
        for i, (_, question, answer) in enumerate(asked):
            conversations += [{"from": "human", "value": (turns_before if i == 0 else "") + question},
                              {"from": "gpt", "value": answer}]
        row = {"id": f"{kind}-{self.rng.getrandbits(40):010x}", "image": images, "conversations": conversations,
               "kinds": [kind for kind, _, _ in asked]}
        if len(images) < 2:
            row["image"] = images[0] if images else None
        return {key: value for key, value in row.items() if value is not None}

    def reading(self) -> dict:
        """A row without a picture: a scene in words, and questions about it."""
        make = self.rng.choices([self.questions_about_one, self.questions_about_two, self.questions_about_relation], [7, 2, 1])[0]
        words, _, asked = make()
        return self.row("read", asked, "".join(f"{w}\n" for w in words), [])

    def caption(self) -> dict:
        words, scenes, _ = self.questions_about_one()
        return self.row("caption", [("caption", "Describe the picture.", words[0])], f"{IMAGE}\n",
                        [self.picture_of(scenes[0])])

    def instruction(self) -> dict:
        """A row as in visual instruction tuning: mostly one picture and five questions."""
        kind = self.rng.choices(["one", "two", "relation", "read"], [70, 12, 12, 6])[0]
        if kind == "read":
            return self.reading()
        words, scenes, asked = getattr(self, f"questions_about_{kind}")()
        images = [self.picture(*s) if isinstance(s, list) else self.picture_of(s) for s in scenes]
        return self.row(kind, asked, f"{IMAGE}\n" * len(images), images)


def toy_words(rows: int = 1000) -> list[str]:
    """What the toy world says, for a tokenizer to learn its vocabulary from."""
    world = ToyWorld(Path(), seed=0)
    return ["user\n", "assistant\n"] * rows + [t["value"] for _ in range(rows) for t in world.reading()["conversations"]]


def toy(out: Path, scenes: int, seed: int):
    """Writes the built-in data: reading.json, captions.json, train.json, validation sets, images/."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    world = ToyWorld(out, seed)
    held_out = max(160, scenes // 40)
    makers = {"reading": world.reading, "captions": world.caption, "train": world.instruction}
    sets = {name: [make() for _ in range(scenes)] for name, make in makers.items()}
    sets |= {f"{name}_validation": [make() for _ in range(held_out)] for name, make in makers.items()}
    sets["validation"] = sets.pop("train_validation")
    # The same questions with the pictures of other rows: who still answers them has not looked.
    by_count = {n: [r.get("image") for r in sets["validation"] if len(image_list(r)) == n] for n in (1, 2)}
    turned = {n: iter(images[len(images) // 2:] + images[:len(images) // 2]) for n, images in by_count.items()}
    sets["validation_shuffled"] = [{**r, "image": next(turned[len(image_list(r))])} if "image" in r else r
                                   for r in sets["validation"]]
    for name, rows in sets.items():
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    return sets



def image_list(row: dict) -> list[str]:
    images = row.get("image")
    return [] if images is None else images if isinstance(images, list) else [images]


def show(dataset: LlavaDataset, i: int, as_json: bool):
    """Prints a row as the model gets it: its pictures, and its tokens with their ids; supervised ones stand out."""
    item = dataset[i]
    batch = Collator(dataset.image_token_id, dataset.tokens_per_picture)([item])
    if as_json:
        print(json.dumps({key: batch[key][0].tolist() for key in ("input_ids", "labels")}))
        return
    colour = sys.stdout.isatty()
    print(f"{dataset.records.where(i)}: {len(item['pixel_values'])} pictures, {batch['input_ids'].shape[1]} tokens, "
          f"{(item['labels'] != IGNORE).sum()} of them supervised, {item['cut']} cut off")
    for pixels in item["pixel_values"] if colour else []:
        print(thumbnail(dataset.transform, pixels.numpy()))
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist()):
        text = dataset.text.tokenizer.decode([token]).replace("\n", "\\n\n")
        text = f"{IMAGE} x {dataset.tokens_per_picture}" if token == dataset.image_token_id else text
        before, after = ("\033[30;42m", "\033[0m") if colour else ("[", "]")
        text = text if label == IGNORE else before + text.rstrip("\n") + after + "\n" * text.endswith("\n")
        print(text, end=f"\033[2m{token}\033[0m " if colour else f"/{token} ")
    print()


def thumbnail(transform: PictureTransform, pixels: np.ndarray, width: int = 48) -> str:
    """What the tower sees, as coloured half blocks for a terminal: two pixels to a character."""
    rgb = (pixels.transpose(1, 2, 0) - transform.shift) / transform.scale
    rgb = np.asarray(Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).resize((width, width))).tolist()
    return "\n".join("".join("\033[38;2;{};{};{}m\033[48;2;{};{};{}m▀".format(*top, *bottom) for top, bottom in zip(*rows))
                     + "\033[0m" for rows in zip(rgb[::2], rgb[1::2]))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("toy", help="write the built-in data")
    command.add_argument("--out", required=True, help="folder to write to")
    command.add_argument("--scenes", type=int, default=4000, help="rows of each training set")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("show", help="print a row as the model gets it")
    command.add_argument("--model_name_or_path", required=True, help="a LLaVA folder: its tokenizer, template, picture size")
    command.add_argument("--data_path", required=True)
    command.add_argument("--image_folder", help="a folder of pictures, or a .zip")
    command.add_argument("--version", choices=VERSIONS, default="own", help="the template")
    command.add_argument("--image_aspect_ratio", choices=["pad", "square"])
    command.add_argument("--model_max_length", type=int, default=2048, help="tokens of a row, pictures included")
    command.add_argument("--index", type=int, default=0, help="which row, from 0")
    command.add_argument("--json", action="store_true", help="input_ids and labels, for machines")
    args = parser.parse_args(argv)
    try:
        if args.command == "toy":
            toy(Path(args.out), args.scenes, args.seed)
        else:
            show(open_dataset(args.data_path, args.image_folder, args.model_name_or_path, args.version,
                              args.image_aspect_ratio, args.model_max_length), args.index, args.json)
    except (ValueError, FileNotFoundError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
