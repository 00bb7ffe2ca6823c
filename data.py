"""From a row of JSON and its picture to a batch: everything that LLaVA does before the model.

    {"id": "7", "image": "7.png",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                       {"from": "gpt",   "value": "A frog."}]}

      > picture   as a viewer shows it, made square, 336 x 336, normalised          (3, 336, 336)
      > text      the chat template rendered; ids, and labels: answers alone count  (t,), (t,)
      > batch     each <image> id becomes 576 placeholders, rows padded on the right
                  input_ids, labels (B, T) int64; pixel_values (N, 3, 336, 336) float32

Labels are unshifted, as Hugging Face has them: the model compares position t with label t + 1.

One row, by hand (`folder` is a LLaVA model's; pictures may also lie in a .zip):

    text, transform = ChatText(tokenizer), PictureTransform.from_pretrained(folder)
    records, pictures = Records("train.json"), Pictures("images")
    messages, names = parse_record(records[0])
    input_ids, labels = text.ids_and_labels(messages)
    pixel_values = [transform(decode_picture(pictures.read(name), name)) for name in names]

All rows of a file, as batches (in what order, and prepared by which processes, says order.py):

    dataset = open_dataset("train.json", "images", folder, config, text)
    collate = Collator(dataset.image_token_id, tokens_per_picture=576)
    batch = collate([dataset[0], dataset[1]])

Sources: LLaVA's rows, templates and masks (github.com/haotian-liu/LLaVA, llava/conversation.py and
llava/train/train.py), CLIP's preprocessing (github.com/openai/CLIP, clip/clip.py).
"""

import contextlib
import io
import json
import os
import re
import warnings
import zipfile
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

IMAGE = "<image>"  # one in the text for each picture of the row
IGNORE = -100  # the label of a position that no loss looks at


# --- a picture > the tower's input ---

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long texts harm no picture

# What people have in place of a picture: how its file begins, and what to do.
NO_PICTURES = [
    (rb"\Z", "the file is empty: get it again"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "it is HEIC: convert it to JPEG"),
    (rb"\s*<(!doctype html|html|\?xml)", "it is a web page: the download failed, get it again"),
    (rb"version https://git-lfs", "it is a Git LFS pointer: run `git lfs pull` in its folder"),
]


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; a broken block says nothing."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def to_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits by 257; of 32, and floats, from lowest to highest: Pillow clips at 255."""
    sixteen = image.mode.startswith("I;16")
    if not sixteen and image.mode not in ("I", "F"):
        return image
    values = np.ma.masked_invalid(np.asarray(image, np.float64))
    low, high = (0, 65535) if sixteen else (values.min(), values.max())
    grey = (values - low) * 255 / (high - low)  # a constant's 0 / 0 is masked, as nan and inf are
    return Image.fromarray(np.ma.filled(grey, 0).round().astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """In RGB, what is transparent laid on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def decode_picture(data: bytes, name: str = "") -> Image.Image:
    """What any viewer shows: the first frame, upright, on white, in RGB; or a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they name no file, and what cannot be read raises
            image = Image.open(io.BytesIO(data))
            image.load()
            return on_white(to_8_bits(upright(image)))
    except Image.DecompressionBombError:
        reason = "it has too many pixels: shrink it"
    except Exception as error:  # Pillow's decoders raise nearly anything
        known = [what for begin, what in NO_PICTURES if re.match(begin, data, re.DOTALL | re.I)]
        reason = known[0] if known else str(error).split(" <")[0]
    raise ValueError(f"picture {name}: not one that can be read ({reason})")


def centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class PictureTransform:
    """A picture as the tower's input, as LLaVA's (`pad`) and CLIP's (`square`) processors make it.

    pad     it is centred on a square of the mean colour, then resized: nothing is lost
    square  its short side is resized, then the centre is cut out: the long side loses its ends
    """

    def __init__(self, size: int, mean: list[float], std: list[float], aspect_ratio: str):
        self.size, self.aspect_ratio = size, aspect_ratio
        self.mean, self.std = np.float32(mean), np.float32(std)
        self.background = tuple(int(255 * m) for m in mean)

    @classmethod
    def from_pretrained(cls, folder: str | Path, aspect_ratio: str | None = None):
        """As a model folder's processor files say; `aspect_ratio` overrides theirs."""
        config = {}
        for name in ("processor_config.json", "preprocessor_config.json"):
            path = Path(folder) / name
            found = json.loads(path.read_bytes()) if path.is_file() else {}
            config |= found.get("image_processor", found)
        size, pads = config.get("crop_size") or config.get("size"), config.get("do_pad")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        crops = config.get("crop_size") and config.get("do_center_crop", True)
        if not size or not (pads or crops) or "image_mean" not in config:
            wanted = "image_mean, and do_pad or crop_size to make pictures square"
            raise ValueError(f"{folder}: no preprocessor_config.json that has {wanted}")
        aspect_ratio = aspect_ratio or ("pad" if pads else "square")
        return cls(size, config["image_mean"], config["image_std"], aspect_ratio)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(3, size, size) float32, normalised."""
        longest = 32 * min(image.size)  # of a longer strip the middle: its square would be huge
        image = centre(image, min(image.width, longest), min(image.height, longest))
        if self.aspect_ratio == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), self.background)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        resized = [self.size * n // min(image.size) for n in image.size]
        image = centre(image.resize(resized, Image.Resampling.BICUBIC), self.size, self.size)
        pixels = np.asarray(image).transpose(2, 0, 1).copy() / np.float32(255)  # (3, S, S)
        pixels -= self.mean[:, None, None]  # in place, channels first: 8 times as fast
        pixels /= self.std[:, None, None]
        return pixels


class Pictures:
    """A folder of pictures, or a .zip of them that is read in place."""

    def __init__(self, path: str | Path):
        self.path, self.archive, self.process = Path(path), None, os.getpid()
        if not self.path.is_dir():
            try:
                self.archive = zipfile.ZipFile(self.path)
            except Exception as error:  # zipfile, too, raises nearly anything
                wanted = "neither a folder nor a whole .zip"
                raise ValueError(f"--image_folder {path}: {wanted} ({error})") from None

    def find(self, name: str) -> str | None:
        r"""The name as the folder or zip has it: a row may say .\a.png or .//a.png for a.png."""
        name = os.path.normpath(name.replace("\\", "/"))
        if self.archive:
            return name if name in self.archive.NameToInfo else None
        return name if os.path.isfile(self.path / name) else None

    def read(self, name: str, at_most: int = -1) -> bytes:
        """A file's bytes, or the first `at_most` of them; FileNotFoundError or ValueError."""
        found = self.find(name)
        if found is None:
            url = ": that is a URL, download it first" if re.match(r"\w+://", name) else ""
            raise FileNotFoundError(f"picture {name}: not in {self.path}{url}")
        if self.archive and self.process != os.getpid():
            # A forked worker shares the zip's directory, which takes seconds to read, but must not
            # share the file: of two that move one position each would get the other's bytes.
            self.archive.fp, self.process = open(self.path, "rb"), os.getpid()
        try:
            file = self.archive.open(found) if self.archive else open(self.path / found, "rb")
            with file:
                return file.read(at_most)
        except Exception as error:  # zipfile's decompressors raise nearly anything
            raise ValueError(f"picture {name} in {self.path}: damaged ({error})") from None


# --- a conversation > ids and labels ---

# LLaVA's conversation templates (llava/conversation.py) as Jinja, equal to the character. Of each,
# the system text where a row has none, and how `system` and `turns` are written. BOS is one inside
# a conversation, for models that have it: the tokenizer puts the first in front.
TEMPLATES = {
    "v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "{{ system }} {% for turn in turns %}{% if turn.role == 'user' %}USER: {{ turn.content }} "
        "{% else %}ASSISTANT: {{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{{ 'ASSISTANT:' if add_generation_prompt else '' }}",
    ),
    "llava_llama_2": (
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural "
        "language.",
        "{% for turn in turns %}{% if turn.role == 'user' %}{{ '' if loop.first else BOS }}[INST] "
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' }}"
        "{{ turn.content }} [/INST]{% else %} {{ turn.content }} {{ eos_token }}{% endif %}"
        "{% endfor %}",
    ),
    "chatml_direct": (
        "Answer the questions.",
        "<|im_start|>system\n{{ system }}<|im_end|>{% for turn in turns %}"
        "<|im_start|>{{ turn.role + '\n' + turn.content }}<|im_end|>{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
    ),
}
SYSTEM_AND_TURNS = (
    "{% set own = messages[0].role == 'system' %}"
    "{% set turns = messages[1:] if own else messages %}"
    "{% set system = messages[0].content if own else DEFAULT %}"
)
VERSIONS = ["plain", *TEMPLATES, "own"]  # --version; plain has no template, own is the folder's

# Stands in front of any template, so that it takes contents as strings and as lists of parts, and a
# question's only picture goes first, as in training. AS_PARTS is for templates that want parts.
# (It is for other programs, which read our folders: a first reading may pass over it.)
AS_STRINGS = (
    "{% set all = namespace(messages=[], text='') %}"
    "{% for message in messages %}"
    "{% set all.text = message.content if message.content is string else '' %}"
    "{% for part in ([] if message.content is string else message.content) %}"
    "{% set all.text = all.text + ('<image>\n' if part.type == 'image' else part.text) %}"
    "{% endfor %}"
    "{% if message.role == 'user' and all.text.count('<image>') == 1 %}"
    "{% set all.text = ('<image>\n' + all.text.replace('<image>', '').strip()).strip() %}"
    "{% endif %}"
    "{% set all.messages = all.messages + [dict(message, content=all.text)] %}"
    "{% endfor %}"
    "{% set messages = all.messages %}"
)
AS_PARTS = AS_STRINGS.replace("content=all.text", "content=[{'type': 'text', 'text': all.text}]")

ANOTHER = "name another template, such as --version v1"


class ChatText:
    r"""From a conversation to token ids and labels: the contract for training, chat and evaluation.

    The template is rendered once, for the whole conversation, and that text is tokenized once, so
    the ids are those that `apply_chat_template` gives anyone. Labels come from positions in the
    text, never from comparing ids; a token that starts inside an answer is learnt:

    <|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA frog.<|im_end|>\n
    .......................... prompt, ignored ........................^^^^^^^^^^^^^^^^^..
                                                                       answer and end token

    chat_template is what a model folder is given, None for `plain`; stop_ids end an answer.
    """

    def __init__(self, tokenizer, version: str = "own"):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is slow: it has no offsets of tokens")
        self.tokenizer, self.version, self.chat_template = tokenizer, version, None
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        if self.image_token_id in (None, 0, tokenizer.unk_token_id):  # 0 is what pads
            raise ValueError(f"the tokenizer needs a special token {IMAGE}, which is not its id 0")
        first = tokenizer("a").input_ids[:1]  # BOS or not? `add_bos_token` misleads, ids do not
        self.bos = first if first == [tokenizer.bos_token_id] else []
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        control = sorted({*special, *tokenizer.all_special_tokens, IMAGE}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)))  # of two, the longer is found
        if version == "plain":
            pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            self.stop_ids = [i for i, piece in enumerate(pieces) if "\n" in piece]
        elif version == "own":
            own = tokenizer.chat_template and tokenizer.get_chat_template()  # of several, one
            self.use_template(own)
        else:
            system, turns = TEMPLATES[version]
            head = SYSTEM_AND_TURNS.replace("DEFAULT", json.dumps(system))
            self.use_template(head + turns.replace("BOS", "bos_token" if self.bos else "''"))

    def use_template(self, template: str | None):
        """Finds on two questions how it begins and ends an answer; ValueError if it cannot teach.

        A message's content reaches it as it wants it, as a string or as parts.
        """
        if not template:
            raise ValueError("the model folder has no chat template: name one with --version v1")
        template = template.removeprefix(AS_STRINGS).removeprefix(AS_PARTS)
        probe = [("user", "Q1x"), ("assistant", "A1x"), ("user", "Q2x"), ("assistant", "A2x")]
        probe = [{"role": role, "content": content} for role, content in probe]
        asked = ""
        for prefix in (AS_STRINGS, AS_PARTS):
            self.chat_template = prefix + template
            with contextlib.suppress(ValueError):  # one that wants parts may refuse strings
                asked = self.render(probe[:1], prompt=True)
            if "Q1x" in asked:
                break
        self.begin = asked.partition("Q1x")[2]  # stands between a question and its answer
        _, labels = self.ids_and_labels(probe)
        ends = {i for i, after in zip(labels, [*labels[1:], IGNORE]) if after == IGNORE != i}
        self.stop_ids = sorted(ends | {self.tokenizer.eos_token_id} - {None})

    def prepare(self, messages: list[dict]) -> list[dict]:
        """The turns as they are rendered, a question's only picture first, as LLaVA's
        preprocess_multimodal has it.

        ValueError where a turn says what only templates may, as </s> or an answer's <image>.
        """
        prepared = []
        for message in messages:
            role, content = message["role"], message["content"]
            found = self.control.search(content.replace(IMAGE, " ") if role == "user" else content)
            if found:
                raise ValueError(f"the {role}'s text holds {found[0]}, a control string: remove it")
            if role == "user" and content.count(IMAGE) == 1:
                content = f"{IMAGE}\n{content.replace(IMAGE, '').strip()}".strip()
            elif role == "assistant":
                # Empty lines in front would become one token with the template's newline.
                content = re.sub(r"\A\s*[\r\n]", "", content)
            prepared.append({"role": role, "content": content})
        pictures = [message["content"].count(IMAGE) for message in prepared]
        if self.version == "plain" and pictures != [1, 0]:
            raise ValueError("--version plain takes one picture and one answer, in stage 1")
        return prepared

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """The template's text for `messages`; with `prompt` it ends where an answer begins."""
        options = {"chat_template": self.chat_template, "add_generation_prompt": prompt}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def find_answers(self, text: str, messages: list[dict]) -> list[tuple[int, int]]:
        """Where each answer begins and ends in the rendered text, walked along turn by turn.

        It begins behind its question and what stands there in a generation prompt (`self.begin`, of
        `use_template`), and ends with the first control string that follows: its end token.
        """
        at, answers = 0, []
        for n, message in enumerate(messages):
            role, content = message["role"], message["content"].strip()  # many templates strip
            place = text.find(content, at)
            behind = place + len(content)
            begin, end = text.find(self.begin, behind), self.control.search(text, at)
            shown = text[at : end.start()] if end else text[at:]
            fault = ""
            if role == "assistant" and not (end and shown.rstrip().endswith(content)):
                fault = f"makes {shown[:60]!r} of the answer {content[:60]!r}, or does not end it"
            elif place < 0 or (role == "user" and begin < 0):
                fault = f"drops the {role} turn, or begins its answer unlike its generation prompt"
            if fault:
                raise ValueError(f"the chat template {fault}: {ANOTHER}")
            if role == "user":
                at = begin + len(self.begin)
            elif role == "assistant":
                answers.append((at, end.end()))
                at = end.end()
            elif messages[n + 1]["content"].strip() in text[behind:]:
                at = behind  # else the system turn stands, as Mistral's, before the last question
        return answers

    def ids_and_labels(self, messages: list[dict], prompt: bool = False) -> tuple[list, list]:
        """Token ids (t,) with one <image> id for each picture; labels (t,), the ids or IGNORE.

        With `prompt` the ids end where an answer begins, and nothing has a label.
        """
        messages = self.prepare(messages)
        if self.version == "plain":  # picture and caption: the question is left out
            text = IMAGE + messages[1]["content"] + "\n"
            answers = [(len(IMAGE), len(text))]
        else:
            text = self.render(messages, prompt)
            answers = [] if prompt else self.find_answers(text, messages)
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, labels = tokens.input_ids, [IGNORE] * len(tokens.input_ids)
        starts = [start for start, _ in tokens.offset_mapping]
        for begin, end in answers:
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            start, stop = tokens.offset_mapping[first - 1]
            if text[begin:stop].strip():  # the token before reaches into the answer
                raise ValueError(f"{text[start:stop]!r} is one token, half an answer's: {ANOTHER}")
            labels[first:last] = ids[first:last]
        bos = [] if ids[:1] == self.bos else self.bos
        return bos + ids, [IGNORE] * len(bos) + labels


# --- a row > turns and the names of its pictures ---

ROW = (
    '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
    '{"from": "gpt", "value": "A frog."}]}'
)
ROLES = {"human": "user", "gpt": "assistant"}
NOT_READ = ["video", "videos", "audio", "audios"]
MISNAMED = ["image_path", "image_paths", "image_file", "image_url", "image_urls", "img", "picture"]


def read_content(content) -> tuple[str | None, list[str]]:
    """What a turn says, its parts joined as AS_STRINGS joins them, and the pictures that they name;
    (None, []) if it is no text.
    """
    if isinstance(content, str):
        return content, []
    text, names = "", []
    try:
        for part in content:
            image = part["type"] == "image"
            text += f"{IMAGE}\n" if image else part["text"]
            names += [part[key] for key in ("image", "path", "url") if image and part.get(key)]
    except (TypeError, KeyError):
        return None, []
    return text, names


def check_row(row: dict, talk: list[dict], pictures: list):
    """Raises ValueError for what would be wrong in silence, and what people really get wrong."""
    roles, due = [turn["role"] for turn in talk], ["user", "assistant"] * (len(talk) // 2)
    ignored = [key for key in NOT_READ + MISNAMED * (not pictures) if row.get(key)]
    nameless = [name for name in pictures if not (name and isinstance(name, str))]
    wanted = sum(turn["content"].count(IMAGE) for turn in talk if turn["role"] == "user")
    given = len(pictures)
    faults = [
        (not talk, "there is no gpt turn, so nothing to learn: add an answer"),
        (roles != due, "human and gpt (or user and assistant) must alternate, human first"),
        (ignored, f'{ignored} would be ignored: pictures stand in "image", and only they are read'),
        (nameless, f'"image" holds {nameless}: no file names, so mend or remove them'),
        (given != wanted, f"{given} picture(s) but {wanted} {IMAGE} in questions: write one each"),
    ]
    for wrong, what in faults:
        if wrong:
            raise ValueError(what)


def parse_record(row: dict) -> tuple[list[dict], list[str]]:
    """The turns as {role, content} and the pictures' names; ValueError, with the fix, if wrong.

    Turns stand under `conversations` (LLaVA, ShareGPT) or `messages` (TRL, LLaMA-Factory). A gpt
    turn before the first question is dropped, as LLaVA does, and so is a last question.
    """
    turns = row.get("conversations") or row.get("messages") if isinstance(row, dict) else None
    if not (turns and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
        raise ValueError(f"expected a row such as {ROW}, or one with messages")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    messages, pictures = [], []
    for found in (row.get("image"), row.get("images")):
        if found is not None:
            pictures += found if isinstance(found, list) else [found]
    for n, turn in enumerate(turns, 1):
        content, names = read_content(turn.get("value", turn.get("content")))
        if content is None or re.search("[\ud800-\udfff]", content):  # half a character
            raise ValueError(f"turn {n}: neither a string in UTF-8 nor parts of text and images")
        role = turn.get("from", turn.get("role"))
        messages.append({"role": ROLES.get(str(role), role), "content": content})
        pictures += names
    first = int(messages[0]["role"] == "system")
    system, talk = messages[:first], messages[first:]
    if talk and talk[0]["role"] == "assistant":
        talk = talk[1:]
    if talk and talk[-1]["role"] == "user":  # a question without an answer teaches nothing
        talk = talk[:-1]
    check_row(row, talk, pictures)
    return system + talk, pictures


def read_rows(path: Path) -> list:
    """The rows of a file: a JSON list, or one object a line; ValueError names the wrong line."""
    # What is not UTF-8 becomes half a character, for which check_row names the row.
    content, rows, before = path.read_text("utf-8-sig", "surrogateescape"), [], 0
    try:
        if content[:64].lstrip().startswith("["):
            return json.loads(content)
        for before, line in enumerate(content.split("\n")):
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except json.JSONDecodeError as error:
        where = f"{path}: line {before + error.lineno}: not JSON ({error.msg})"
    raise ValueError(f"{where}; wanted are rows, in a list or one a line, such as {ROW}")


class Records:
    """The rows of a .json or .jsonl file, encoded again into one buffer.

    Forked workers share a buffer for good; a list of dicts they would copy page by page, because
    reading a Python object writes its reference count.

    lengths       an estimate of each row's tokens, four bytes of text to one
    has_picture   whether a row has pictures
    bad_rows      the numbers of those that are wrong, or that `prepare` (ChatText's) refuses
    """

    def __init__(self, path: str | Path, tokens_per_picture: int = 576, prepare=None):
        self.path, self.bad_rows = Path(path), []
        buffer, ends, lengths, pictures = bytearray(), [0], [], []
        for i, row in enumerate(read_rows(self.path)):
            messages, names = [], []
            try:
                messages, names = parse_record(row)
                if prepare:
                    prepare(messages)
            except ValueError:  # raised again where the row is loaded
                self.bad_rows.append(i)
            text = sum(len(message["content"].encode()) for message in messages)
            lengths.append(text // 4 + len(names) * tokens_per_picture)
            pictures.append(len(names) > 0)
            buffer += json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
            ends.append(len(buffer))
        if not lengths:
            raise ValueError(f"{self.path}: no rows")
        self.lengths, self.has_picture = np.array(lengths), np.array(pictures)
        self.ends, self.buffer = np.array(ends), np.frombuffer(buffer, np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict:
        return json.loads(self.buffer[self.ends[i] : self.ends[i + 1]].tobytes())

    def where(self, i: int) -> str:
        """The file, the number of a row, and its id if it has one."""
        row = self[i]
        name = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.path}: row {i}{name.encode('utf-8', 'backslashreplace').decode()}"


# --- rows > a batch ---


@dataclass
class LlavaDataset(torch.utils.data.Dataset):
    """Rows as tensors. Item i is a dict:

    input_ids, labels (t,) int64   one <image> id for each picture
    pixel_values (n, 3, S, S)      float32
    row, cut, fault                number; tokens lost to `max_length`; None, or why it was skipped

    Item -1, and a skipped row, is one token without a label: it fills a batch, and teaches nothing.
    """

    records: Records
    pictures: Pictures | None
    text: ChatText
    transform: PictureTransform
    tokens_per_picture: int
    max_length: int = 2048  # tokens, after each picture has become `tokens_per_picture` of them
    on_bad_record: str = "stop"  # a ValueError names the row; or "skip"

    def __post_init__(self):
        self.image_token_id = self.text.image_token_id

    def __len__(self) -> int:
        return len(self.records)

    def picture(self, name: str) -> np.ndarray:
        """(3, S, S) float32: one of the pictures, as the tower gets it."""
        return self.transform(decode_picture(self.pictures.read(name), name))

    def fit(self, ids: list[int], labels: list[int]) -> int:
        """How many ids fit into `max_length`; ValueError if a picture does not, or no label."""
        widths = np.where(np.array(ids) == self.image_token_id, self.tokens_per_picture, 1).cumsum()
        keep = int((widths <= self.max_length).sum())
        if self.image_token_id in ids[keep:] or set(labels[:keep]) <= {IGNORE}:
            lost = "would cut off a picture, or leave nothing to learn from: raise it"
            raise ValueError(f"of {widths[-1]} tokens --model_max_length {self.max_length} {lost}")
        return keep

    def __getitem__(self, i: int) -> dict:
        ids, labels, pixels, cut, fault = [0], [IGNORE], [], 0, None
        try:
            if i >= 0:
                messages, names = parse_record(self.records[i])
                found = self.text.ids_and_labels(messages)
                keep = self.fit(*found)
                pixels = [self.picture(name) for name in names]
                cut = len(found[0]) - keep
                ids, labels = (part[:keep] for part in found)
        except (ValueError, OSError) as error:
            fault = f"{self.records.where(i)}: {error}"
            if self.on_bad_record == "stop":
                raise ValueError(fault) from None
        shape = -1, 3, self.transform.size, self.transform.size  # (n, 3, S, S), where n may be 0
        pixels = np.array(pixels, np.float32).reshape(shape)
        item = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        item["pixel_values"] = torch.from_numpy(pixels)
        return {**item, "row": i, "cut": cut, "fault": fault}


def open_dataset(
    data_path, image_folder, folder, config, text: ChatText, aspect_ratio=None, **limits
) -> LlavaDataset:
    """The rows of a file as a model's folder wants them: its pictures' size, its counts.

    `config` is the folder's LlavaConfig; `limits` are LlavaDataset's.
    """
    vision = config.vision_config  # one token for each patch, and CLIP's CLS where it is kept
    tokens_per_picture = (vision.image_size // vision.patch_size) ** 2
    tokens_per_picture += vision.model_type == "clip_vision_model"
    tokens_per_picture -= config.vision_feature_select_strategy == "default"
    transform = PictureTransform.from_pretrained(folder, aspect_ratio)
    records = Records(data_path, tokens_per_picture, text.prepare)
    if records.has_picture.any() and not image_folder:
        raise ValueError(f"{data_path} has pictures: say where with --image_folder")
    pictures = Pictures(image_folder) if image_folder else None
    return LlavaDataset(records, pictures, text, transform, tokens_per_picture, **limits)


class Collator:
    """Makes a batch: each <image> id becomes `tokens_per_picture`, rows are padded on the right.

    input_ids, labels (B, T) int64; pixel_values (N, 3, S, S), in the order of the <image> ids; not
    for the model: lengths, rows, cut, faults. There is no attention mask: causal attention never
    looks at what comes after, and what stands in padded positions has no label.
    """

    def __init__(self, image_token_id: int, tokens_per_picture: int):
        self.image_token_id, self.tokens_per_picture = image_token_id, tokens_per_picture

    def __call__(self, rows: list[dict]) -> dict:
        input_ids, labels = [], []
        for row in rows:
            is_image = row["input_ids"] == self.image_token_id  # (t,)
            wanted, given = int(is_image.sum()), len(row["pixel_values"])
            assert wanted == given, f"row {row.get('row')}: {wanted} <image> for {given} pictures"
            times = torch.where(is_image, self.tokens_per_picture, 1)
            input_ids.append(row["input_ids"].repeat_interleave(times))  # (T,)
            labels.append(row["labels"].repeat_interleave(times))  # (T,), -100 at pictures
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(input_ids, batch_first=True),  # (B, T)
            "labels": pad(labels, batch_first=True, padding_value=-100),  # (B, T)
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),  # (N, 3, S, S)
            "lengths": [len(ids) for ids in input_ids],
            "rows": [row.get("row") for row in rows],
            "cut": sum(row.get("cut", 0) > 0 for row in rows),
            "faults": [row["fault"] for row in rows if row.get("fault")],
        }
