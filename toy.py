"""The built-in recipe's own data and model, made on the spot, so that `bash run.sh` needs nothing.

data   pictures of shapes, words about them, and questions, in LLaVA's rows:

           +---------------+    one picture   What colour are the shapes?          blue
           | o o           |                  How many shapes are there?           three
           | o             |    a pair        Where is the ring, seen from the bar?  left
           |               |    no picture    three small blue circles in the top left
           +---------------+                  What colour are the shapes?          blue

       Every answer to a question of one kind is as likely as the others, and says nothing about
       other kinds: what a model gets right beyond a guess, it has seen.

model  a LLaVA of 344,000 weights in the real format: CLIP's and Qwen2's architectures, 336 pixels,
       576 tokens. It stands in for models that must be downloaded, so its tokenizer is trained on
       the toy world's words, and its tower is given by hand what a real one has learnt.

    make_data(Path("out/toy"), scenes=8000, seed=0)
    make_model(Path("out/tiny"), toy_words())

    python toy.py data    --out out/toy
    python toy.py model   --out out/tiny
    python toy.py summary --out out/builtin        what run.sh prints at the end of its recipe
"""

import collections
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import report
from build import build
from cli import Parser, check_new, command, number, written
from data import IMAGE

# --- a world of shapes ---

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
ANSWERS = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
ANSWERS |= {"position": POSITIONS, "number": NUMBERS}
QUESTIONS = {
    "colour": ["What colour are the shapes?", "Which colour do you see?"],
    "shape": ["What shape is shown?", "Which shape do you see?"],
    "size": ["What size are the shapes?", "How big are the shapes?"],
    "position": ["Where are the shapes?", "In which corner are the shapes?"],
    "number": ["How many shapes are there?", "Count the shapes."],
}


def words_of(scene: dict) -> str:
    s = "" if scene["number"] == "one" else "s"
    return "{number} {size} {colour} {shape}{s} in the {position}".format(s=s, **scene)


def shapes_of(scene: dict) -> list[tuple]:
    """What to draw: (shape, colour, size, column, row of 4 x 4) each."""
    corner, count = POSITIONS.index(scene["position"]), 1 + NUMBERS.index(scene["number"])
    cells = [(x + 2 * (corner % 2), y + 2 * (corner // 2)) for y in (0, 1) for x in (0, 1)]
    return [(scene["shape"], scene["colour"], scene["size"], *cell) for cell in cells[:count]]


class ToyWorld:
    """A source of rows, all drawn from one seed; pictures go to `folder`/images.

    A scene is a few shapes, all alike, in one corner: {kind: answer}.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count, self.deck = folder, random.Random(seed), 0, []

    def scene(self) -> dict:
        return {kind: self.rng.choice(list(answers)) for kind, answers in ANSWERS.items()}

    def draw(self, shapes: list[tuple]) -> str:
        """Writes a picture of shapes; its file name."""
        image = Image.new("RGB", (336, 336), (self.rng.randint(225, 255),) * 3)
        pen = ImageDraw.Draw(image)
        for shape, colour, size, *cell in shapes:
            radius, fill = SIZES[size], COLOURS[colour]
            free = min(8, 42 - radius)
            x, y = (84 * c + 42 + self.rng.uniform(-free, free) for c in cell)
            box = (x - radius, y - radius, x + radius, y + radius)
            if shape == "circle":
                pen.ellipse(box, fill=fill)
            elif shape == "ring":
                pen.ellipse(box, outline=fill, width=round(0.45 * radius))
            else:
                pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in SHAPES[shape]], fill)
        self.count += 1
        name = f"{self.count:06d}.png"
        image.save(self.folder / "images" / name, compress_level=1)
        return name

    # What there is to ask about: (description, shapes of the picture, [(kind, question, answer)]).

    def one(self) -> tuple:
        scene, kinds = self.scene(), self.rng.sample(list(QUESTIONS), len(QUESTIONS))
        asked = [(kind, self.rng.choice(QUESTIONS[kind]), scene[kind]) for kind in kinds]
        return words_of(scene), shapes_of(scene), asked

    def relation(self) -> tuple:
        (a, b), (red, blue) = (self.rng.sample(list(x), 2) for x in (SHAPES, COLOURS))
        where, line = self.rng.choice(["left", "right", "above", "below"]), self.rng.randrange(4)
        cells = [(0, line), (3, line)] if where in ("left", "right") else [(line, 0), (line, 3)]
        if where in ("right", "below"):
            cells.reverse()
        words = f"a {red} {a} and a {blue} {b}, the {a} {where}"
        shapes = [(a, red, "large", *cells[0]), (b, blue, "large", *cells[1])]
        return words, shapes, [("relation", f"Where is the {a}, seen from the {b}?", where)]

    # Rows: a picture, or words in its place, then questions and answers.

    def row(self, asked: list[tuple], shapes: list[tuple] | None, words: str = "") -> dict:
        image, turns = {"image": self.draw(shapes)} if shapes else {}, []
        for _, question, answer in asked:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = (f"{IMAGE}\n" if shapes else words) + turns[0]["value"]
        row = {"id": f"{self.rng.getrandbits(40):010x}", **image, "conversations": turns}
        return row | {"kinds": [kind for kind, *_ in asked]}

    def reading(self) -> dict:
        """A scene in words, or its loose words: for a model that cannot read yet."""
        make = self.rng.choices([self.one, self.relation], [9, 1])[0]
        words, _, asked = make()
        if make == self.one and self.rng.random() < 0.7:
            facts = [answer for *_, answer in self.rng.sample(asked, len(asked))]
            asked = [("caption", "Describe the picture.", words)] * self.rng.randrange(2) + asked
            words = " ".join(f" {fact}" for fact in facts)
        asked = [("reading", *turn) for _, *turn in asked]  # no picture is needed for these
        return self.row(asked, None, f"{words}\n")

    def caption(self) -> dict:
        words, shapes, _ = self.one()
        return self.row([("caption", "Describe the picture.", words)], shapes)

    def instruction(self) -> dict:
        """As in visual instruction tuning: mostly a picture and several questions about it."""
        if not self.deck:  # so the shares hold in every 100 rows
            kinds = [self.one, self.relation, None]
            self.deck = self.rng.sample(kinds, counts=[90, 5, 5], k=100)
        make = self.deck.pop()
        if make is None:
            return self.reading()
        _, shapes, asked = make()
        return self.row(asked, shapes)


# --- python toy.py data ---


def shuffle_pictures(rows: list[dict]) -> list[dict]:
    """The same questions with other rows' pictures: a model that still answers has not looked."""
    shuffled, shown = list(rows), [i for i, row in enumerate(rows) if "image" in row]
    for i, other in zip(shown, np.roll(shown, -(len(shown) // 2))):
        shuffled[i] = rows[i] | {"image": rows[other]["image"]}
    return shuffled


def turns_of(rows: list[dict]):
    """(kind, question, answer) of each turn of rows, without the pictures' places."""
    for row in rows:
        said = [turn["value"].replace(f"{IMAGE}\n", "") for turn in row["conversations"]]
        yield from zip(row["kinds"], said[::2], said[1::2])


def question_only(train: list[dict], rows: list[dict]) -> dict:
    """{kind: share right} of always giving the training set's commonest answer to a question."""
    seen, right = collections.defaultdict(collections.Counter), collections.defaultdict(list)
    for _, question, answer in turns_of(train):
        seen[question][answer] += 1
    for kind, question, answer in turns_of(rows):
        guess = seen[question].most_common(1)
        right[kind].append(bool(guess) and guess[0][0] == answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def make_data(out: Path, scenes: int, seed: int):
    """Writes three sets of rows, `scenes` in the largest, each with one of 160 that is held out."""
    (out / "images").mkdir(parents=True)
    world, sets = ToyWorld(out, seed), {}
    for name, make, count in (
        ("reading", world.reading, -(-scenes // 2)),
        ("captions", world.caption, -(-scenes // 4)),
        ("train", world.instruction, scenes),
    ):
        sets[name] = [make() for _ in range(count)]
        sets[f"{name}_validation"] = [make() for _ in range(160)]
    rows = sets["train_validation"]
    sets["train_shuffled"] = shuffle_pictures(rows)
    sets["baseline"] = question_only(sets["train"], rows)
    for name, content in sets.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1))


# --- python toy.py model ---

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def toy_words(rows: int = 1000) -> list[str]:
    """What the toy world says, for a tokenizer to learn its vocabulary from."""
    world = ToyWorld(Path(), seed=0)
    said = [turn["value"] for _ in range(rows) for turn in world.reading()["conversations"]]
    return ["user", "assistant"] * rows + said


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Qwen's kind, with 512 tokens: bytes, no start token, ChatML."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@torch.no_grad()
def give_sight(tower):
    """Gives a fresh CLIP, by hand, a little of what a real one has learnt.

    Patch filters are the mean of each colour and low cosine waves of brightness, positions are
    sines and cosines. The first layer's MLP adds how strong each wave is, whatever its sign; the
    second layer's attention adds the mean over patches that are not white, or have edges.
    """
    first, second, _ = tower.encoder.layers  # LLaVA does not run the last one
    table, conv = tower.embeddings.position_embedding.weight, tower.embeddings.patch_embedding
    width, side = tower.embeddings.embed_dim, tower.embeddings.patch_size
    # The norm after the embeddings takes their scale away, but Adam's steps would soon wipe out
    # small ones: hence the 50.
    grid, n = (torch.arange(side) + 0.5) / side, width // 4 - 1
    # Channels 0 to 2 are colour; then come the waves, their strengths, and last the position.
    waves, strengths = slice(3, 3 + n), slice(20, 20 + n)
    conv.weight.zero_()
    conv.weight[range(3), range(3)] = 50 / side**2
    lowest = sorted((i + j, i, j) for i in range(6) for j in range(6))[1 : n + 1]
    for k, (_, *frequencies) in enumerate(lowest):
        pair = [torch.cos(torch.pi * f * grid) for f in frequencies]
        conv.weight[3 + k] = 50 / side**2 * torch.outer(*pair)
    rows = tower.embeddings.image_size // side
    angles = torch.pi * torch.outer(torch.arange(rows) / rows, 2.0 ** torch.arange(width // 16))
    steps = 50 * torch.cat([angles.sin(), angles.cos()], dim=1)  # (24, width / 8)
    place = [steps[:, None].expand(-1, rows, -1), steps[None].expand(rows, -1, -1)]
    table[1:] = 0
    table[1:, -width // 4 :] = torch.cat(place, dim=-1).flatten(0, 1)  # (576, width / 4)

    eye = torch.eye(width)
    first.mlp.fc1.weight[: 2 * n] = 4 * torch.cat([eye[waves], -eye[waves]])
    first.mlp.fc2.weight[:, : 2 * n] = eye[:, strengths].repeat(1, 2)
    look = second.self_attn
    for head, whiteness in enumerate([-0.4, -0.8]):  # the weaker one leaves room for amounts
        row = head * look.head_dim  # its query is a constant, its key says how white a patch is
        look.q_proj.weight[row], look.q_proj.bias[row] = 0, look.head_dim**0.5
        look.k_proj.weight[row], look.k_proj.weight[row, :3] = 0, whiteness
    look.k_proj.weight[0, strengths] = 0.8
    look.v_proj.weight.copy_(eye)
    look.out_proj.weight.copy_(eye)


def make_model(out: Path, words: list[str], seed: int = 0):
    """Writes the tiny LLaVA; its tokenizer learns its vocabulary from `words`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as work:
        tokenizer = make_tokenizer(words)
        tokenizer.save_pretrained(f"{work}/text")
        text = Qwen2Config(
            **shape,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
        Qwen2ForCausalLM(text).save_pretrained(f"{work}/text")
        vision = CLIPVisionConfig(**shape, num_hidden_layers=3, image_size=336, patch_size=14)
        tower = CLIPVisionModel(vision)
        give_sight(getattr(tower, "vision_model", tower))  # transformers has both layouts
        tower.save_pretrained(f"{work}/vision")
        build(f"{work}/vision", f"{work}/text", out)


# --- python toy.py summary ---

FIVE = list(QUESTIONS)  # the kinds that the recipe must answer


def print_stages(out: Path):
    print("\nstage      steps   minutes   held-out loss before > after")
    for stage in ("reading", "stage1", "stage2"):
        rows = report.read_lines(out / stage / "metrics.jsonl")
        losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
        began, ended = (os.stat(out / stage / name).st_mtime for name in ("run.json", "final"))
        minutes = (ended - began) / 60
        print(
            f"{stage:<9}{rows[-1]['step']:>7}{minutes:>10.1f}   {losses[0]:.3f} > {losses[-1]:.3f}"
        )


def print_answers(out: Path, answers: list[dict]):
    """Shares right: as trained, with other rows' pictures, and by the question alone."""
    seen = report.read_lines(out / "train_validation" / "metrics.jsonl")[0]
    shuffled = report.read_lines(out / "train_shuffled" / "metrics.jsonl")[0]
    by_question = json.loads((out / "toy" / "baseline.json").read_text())
    counts = collections.Counter(answer["kind"] for answer in answers)
    shares = {}
    for kind in [*FIVE, *sorted(set(counts) - set(FIVE))]:
        key = f"eval_exact_match/{kind}"
        shares[kind] = np.array([seen[key], shuffled[key], by_question[kind]])
    total = sum(counts[kind] for kind in FIVE)
    mean = sum(counts[kind] * shares[kind] for kind in FIVE) / total
    lines = [(kind, counts[kind], share) for kind, share in shares.items()]
    lines.append(("the first five", total, mean))
    print("\nheld-out answers   questions   right   pictures shuffled   question alone")
    for name, count, (right, turned, blind) in lines:
        print(f"{name:<18}{count:>10}{right:>8.1%}{turned:>20.1%}{blind:>17.1%}")


def print_summary(out: Path):
    """What the recipe reached, a conversation, and the command to go on with it.

    Paths are as seen from the folder where the command is to be pasted.
    """
    out = Path(os.path.relpath(out))
    answers = report.read_lines(out / "train_validation" / "predictions.jsonl")
    if not (out / "train_shuffled").is_dir():  # the last step's
        raise ValueError(f"{out}: the recipe was not run there to its end")
    print_stages(out)
    print_answers(out, answers)
    rows = json.loads((out / "toy" / "train_validation.json").read_text())
    row = next(row for row in rows if "image" in row)
    picture, model = out / "toy" / "images" / row["image"], out / "stage2" / "final"
    print(f"\na conversation about {picture}:")
    for answer in answers:
        if answer["id"] == row["id"]:
            print(f"  {answer['question'].splitlines()[-1]} > {answer['prediction']}")
    print(f"\nall of them: {out}/train_validation/predictions.jsonl\nto ask more:")
    print(report.command("chat.py", "--model_name_or_path", model, "--image", picture))


# --- the command ---


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write pictures and rows")
    data.add_argument("--scenes", type=number(int, 1), default=8000, help="rows of stage 2")
    data.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    model = commands.add_parser("model", help="write the tiny model")
    summary = commands.add_parser("summary", help="what a run of the built-in recipe reached")
    for add in (data.add_argument, model.add_argument):
        add("--out", required=True, help="folder to write")
    summary.add_argument("--out", required=True, help="folder of the recipe")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    if args.command == "summary":
        return print_summary(Path(args.out))
    with written(check_new(args.out)) as part:
        if args.command == "data":
            make_data(part, args.scenes, args.seed)
        else:
            make_model(part, toy_words())
    print(f"{args.out}: written")


if __name__ == "__main__":
    sys.exit(main())
