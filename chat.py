r"""Talk to a model about pictures.

    messages [{role, content}], pixels [(3, S, S)]
      > ids (1, T), 576 of them for each <image>     data.ChatText: the same text as in training
      > new ids                                      model.Llava.generate
      > the answer, which joins the messages

    model, text = open_model(folder).eval(), ChatText(open_tokenizer(folder))
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    answer = reply(model, text, messages, [pixels], max_new_tokens=64)

    python chat.py --model_name_or_path out/stage2/final --image photo.jpg
    python chat.py --model_name_or_path out/stage2/final --image photo.jpg --prompt "What is it?"

The second prints the answer, alone, on stdout. In a conversation /image FILE shows it a picture,
/clear begins anew, Ctrl-C stops an answer, and Ctrl-D ends.
"""

import math
import readline  # noqa: F401  gives `input` a history and keys that edit
import shlex
import sys
from pathlib import Path

import torch
from transformers import TextStreamer

import fast
from cli import Parser, command, find_device, folded, number, one_line
from data import IMAGE, VERSIONS, ChatText, PictureTransform, decode_picture
from evaluate import open_model
from model import Llava, open_tokenizer, resolve
from report import NOTHING, printable

HELP = "/image FILE shows one, /clear begins anew, Ctrl-C ends an answer, Ctrl-D all"


def reply(model: Llava, text: ChatText, messages: list[dict], pixels: list, **options) -> str:
    """The answer to a conversation whose pictures are `pixels`; options of Llava.generate."""
    device, config = next(model.parameters()).device, model.config
    ids = torch.tensor(text.ids_and_labels(messages, prompt=True)[0], device=device)
    times = torch.where(ids == config.image_token_id, model.tokens_per_picture, 1)
    ids = ids.repeat_interleave(times)[None]  # (1, T)
    limit = getattr(config.text_config, "max_position_embeddings", math.inf)
    if ids.shape[1] >= limit:
        raise ValueError(f"{ids.shape[1]} tokens, and the language model learnt {limit} positions")
    pictures = torch.stack(pixels) if pixels else torch.zeros(0, 3, 1, 1)
    new = model.generate(ids, pictures.to(device), torch.ones_like(ids), text.stop_ids, **options)
    return text.tokenizer.decode(new[0], skip_special_tokens=True).strip()


class Printed(TextStreamer):
    """Prints an answer while it comes, and keeps it: Ctrl-C may stop it anywhere."""

    words = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.words += text
        super().on_finalized_text(text, stream_end)

    def stop(self) -> str:
        self.end()
        return self.words.strip()


def files_in(text: str) -> list[str]:
    r"""The files that a terminal pastes: `a b.png`, `"a b.png"`, `a\ b.png`, or several."""
    if Path(text).expanduser().is_file():
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its other
        return [text]


class Conversation:
    """What was said and shown so far, and pictures for the next question."""

    def __init__(self, model: Llava, text: ChatText, transform: PictureTransform, options: dict):
        self.model, self.text, self.transform, self.options = model, text, transform, options
        self.clear()

    def clear(self):
        self.messages, self.pixels, self.new = [], [], []

    def show(self, file: str | Path):
        try:
            content = Path(file).expanduser().read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"picture {file}: no such file") from None
        picture = self.transform(decode_picture(content, str(file)))
        self.new.append(torch.as_tensor(picture))

    def ask(self, question: str, **options) -> str:
        """The answer. It joins the conversation, as far as it came if Ctrl-C stopped it."""
        if IMAGE not in question:
            question = f"{IMAGE}\n" * len(self.new) + question
        if question.count(IMAGE) != len(self.new):
            count = question.count(IMAGE)
            raise ValueError(f"{count} {IMAGE} in the question, {len(self.new)} shown")
        messages = [*self.messages, {"role": "user", "content": question}]
        pixels = self.pixels + self.new
        try:
            answer = reply(self.model, self.text, messages, pixels, **self.options, **options)
        except KeyboardInterrupt:
            if "streamer" not in options:
                raise
            answer = options["streamer"].stop()
        content = answer
        while self.text.control.search(content):  # </s> and the like, spelt out
            content = self.text.control.sub("", content)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        self.pixels, self.new = pixels, []
        if printable(answer) == NOTHING:
            print(NOTHING, file=sys.stderr)
        return answer

    def take(self, line: str):
        """Does what a line says: a command, or a question, whose answer is printed as it comes."""
        name, _, rest = line.partition(" ")
        if name == "/image" and rest:
            for file in files_in(rest):
                self.show(file)
        elif line == "/clear":
            self.clear()
        elif line == "/help":
            print(HELP, file=sys.stderr)
        elif line.startswith("/"):
            raise ValueError(f"{line}: {HELP}")
        else:
            tokenizer = self.text.tokenizer
            self.ask(line, streamer=Printed(tokenizer, skip_prompt=True, skip_special_tokens=True))


def read_line() -> str | None:
    """What is typed next; nothing after Ctrl-C, None after Ctrl-D."""
    try:
        return input("> ").strip()
    except (KeyboardInterrupt, EOFError) as key:
        print()
        return "" if isinstance(key, KeyboardInterrupt) else None


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add, templates = parser.add_argument, [version for version in VERSIONS if version != "plain"]
    add("--model_name_or_path", required=True, help="a LLaVA folder, or hub id")
    add("--adapter", help="an adapter that was trained on it")
    add("--version", default="own", choices=templates, help="the template; own: the folder's")
    add("--bits", type=int, choices=[16, 4], default=16, help="4: the decoder in nf4")
    add("--image", nargs="*", default=[], metavar="F", help="pictures to begin with")
    add("--prompt", help="one question; its answer, alone, goes to stdout")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="0 is greedy")
    add("--top_p", type=number(float, 0, 1), default=1.0, help="share of probability to draw from")
    add("--max_new_tokens", type=number(int, 1), default=512, help="tokens of an answer at most")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args, device = parse(argv), find_device()
    folder = resolve(args.model_name_or_path)
    text = ChatText(open_tokenizer(folder, args.adapter), args.version)
    dtype = torch.bfloat16 if device == "cuda" else None
    model = fast.enable(open_model(folder, args.adapter, args.bits, dtype, device)).eval()
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    conversation = Conversation(model, text, PictureTransform.from_pretrained(folder), options)
    for file in args.image:
        conversation.show(file)
    if args.prompt is not None:
        print(conversation.ask(args.prompt))
        return
    print(HELP, file=sys.stderr)
    while (line := read_line()) is not None:
        try:
            if line:
                conversation.take(line)
        except (ValueError, OSError) as error:  # costs no more than a line that says so
            print(folded(one_line(error), sys.stderr), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
