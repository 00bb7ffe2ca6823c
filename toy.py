"""The built-in data: pictures of shapes, words about them and questions.

python toy.py data --out out/toy
"""

import collections
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cli import Parser, command, number
from data import IMAGE, image_list

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


@command
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    data = parser.add_subparsers(dest="command", required=True).add_parser("data")
    data.add_argument("--out", required=True, help="folder to write to")
    data.add_argument("--scenes", type=number(int, 1), default=8000, help="rows of stage 2")
    data.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    toy(Path(args.out), args.scenes, args.seed)


if __name__ == "__main__":
    sys.exit(main())
