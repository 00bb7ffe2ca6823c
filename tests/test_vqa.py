"""The VQA score, beside what the official program gives."""

import random
import re

import pytest
from tiny import HERE

import vqa

NORMALISED = """A frog. > frog; an apple, the pear > apple pear; two > 2; None > 0; 1,000 > 1000
    3.5 > 3.5; 3. > 3; U.S.A. > usa; dont > don't; couldnt've > couldn't've; couldntve > couldntve
    twas > 'twas; its > its; it's 5:30 > it's 5:30; red/blue > red blue; red / blue > red blue
    t-shirt > t shirt; wi-fi, 4g > wi fi 4g; somebody'd > somebodyd; eleven > eleven"""


def test_answers_are_normalised_as_officially():
    for line in re.split("[;\n]", NORMALISED):
        answer, same = line.split(" > ")
        assert vqa.normalise(answer.strip()) == same


def test_the_lines_of_the_docstring_hold():
    lines = re.findall(r"^    (.*?\))  +(.*)$", vqa.__doc__, re.M)
    assert len(lines) == 2
    for call, value in lines:
        assert eval(call, vars(vqa).copy()) == pytest.approx(eval(value)), call


def test_accuracy_leaves_one_answer_out():
    for count, score in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        people = ["The frog!"] * count + [f"toad {i}" for i in range(10 - count)]
        said = "The frog!" if count == 10 else "frog"
        assert vqa.accuracy(said, people) == pytest.approx(score), count
        by_hand = [min(1, (people[:i] + people[i + 1 :]).count("The frog!") / 3) for i in range(10)]
        assert vqa.accuracy(said, people) == pytest.approx(sum(by_hand) / 10)
    assert vqa.accuracy("frog", ["The frog!"] * 10) == 0  # all the same: as it is


PIECES = """frog yes no Two none ten eleven 1,000 3.5 3. U.S.A. 5:30 red/blue t-shirt (left) dont don't
    somebody'd somebodyd id've youdve y'alld've ow's'at oclock its it's a an The wi-fi what? x;y "so" [b]
    Größe 数字 .5 ........................................ 1,2-3 {c} a_b x=y c++ <d> e@f `g h! \\i"""


def pairs_of(seed, count):
    """[(prediction, ten people's answers)]: a few answers, each written in several ways."""
    rng = random.Random(seed)
    ways = [
        str.upper,
        str.lower,
        lambda text: text + ".",
        lambda text: "the " + text,
        lambda text: text.replace("'", ""),
        lambda text: text.replace(" ", "-"),
        lambda text: text.replace(" ", "\n"),
        lambda text: text.replace(" ", " , "),
        lambda text: f" {text}\t",
        lambda text: text + "!",
    ]

    def written(meant):
        return rng.choice(ways)(meant) if rng.random() < 0.5 else meant

    pairs = []
    for _ in range(count):
        meant = [
            " ".join(rng.choices(PIECES.split(), k=rng.randint(1, 3)))
            for _ in range(rng.randint(1, 4))
        ]
        people = [written(rng.choice(meant)) for _ in range(10)]
        if rng.random() < 0.25:
            people = people[:1] * 10
        pairs.append((written(rng.choice(meant + people)), people))
    return pairs


def test_scores_are_the_official_ones():
    """tests/vqa_scores.txt has what vqaEval.py of github.com/GT-Vision-Lab/VQA (Python 2.7) gives
    2,000 pairs: a digit each, tenths, and X for 1.
    """
    scores = (HERE / "tests" / "vqa_scores.txt").read_text().replace("\n", "")
    pairs = pairs_of(0, 2000)
    assert len(scores) == 2000 and {*scores} == {*"0369X"}
    for (said, people), score in zip(pairs, scores):
        expected = 1 if score == "X" else int(score) / 10
        assert vqa.accuracy(said, people) == pytest.approx(expected), (said, people)
