"""OK-VQA's and VQAv2's raw files to rows.

python okvqa.py --questions F --annotations F --image_folder DIR --out DIR
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

from cli import Parser, command
from data import IMAGE, Pictures

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


@command
def main(argv=None):
    command = Parser(description=__doc__.splitlines()[0])
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
    okvqa(command.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
