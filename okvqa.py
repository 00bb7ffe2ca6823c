"""Turns OK-VQA's and VQAv2's raw files into LLaVA's rows, to train on and to validate with.

    {"question_id": 51606, "image_id": 51606, "question": "What could block the washer's door?"}
    {"question_id": 51606, "image_id": 51606, "answers": [{"answer": "oven"}, ... ten of them]}

    > {"id": "51606", "image": "COCO_train2014_000000051606.jpg", "conversations": [
          {"from": "human", "value": "<image>\\nWhat could block the washer's door?\\nAnswer .."},
          {"from": "gpt",   "value": "oven"}], "answers": ["oven", ..]}

The answer to learn is the commonest of the ten that people gave, of several such the first, and
never an empty one; all ten are kept for the score (vqa.py). No picture is in both train.json
and validation.json.

    python okvqa.py --questions OpenEnded_mscoco_train2014_questions.json \\
        --annotations mscoco_train2014_annotations.json --image_folder coco --out okvqa

Sources: okvqa.allenai.org/download.html, visualqa.org/download.html; LLaVA-1.5 (arXiv:2310.03744)
for how it asks for short answers.
"""

import json
import random
import sys
from pathlib import Path

from cli import Parser, check_new, command, number, written
from data import IMAGE, Pictures

SHORT_ANSWER = "Answer the question using a single word or phrase."


def read(path: str, key: str, take) -> tuple[list, str]:
    """take(item) for each item of the list `key` of a raw file; the name of its split of COCO."""
    content = Path(path).read_bytes()
    try:
        content = json.loads(content)
        return [take(item) for item in content[key]], str(content["data_subtype"])
    except Exception as error:  # KeyError, TypeError ...: any other JSON
        raise ValueError(
            f"{path}: not {key} as OK-VQA and VQAv2 publish them ({type(error).__name__}: {error})"
        ) from None


def question(raw: dict) -> tuple:
    return (int(raw["question_id"]), int(raw["image_id"])), raw["question"].strip()


def annotation(raw: dict) -> tuple:
    answers = [given["answer"].strip() for given in raw["answers"]]
    return (int(raw["question_id"]), int(raw["image_id"])), answers


def vqa_rows(questions: str, annotations: str, pictures: Pictures) -> list[dict]:
    """A row for each question of a pair of files, in their order."""
    asked, split = read(questions, "questions", question)
    answered, _ = read(annotations, "annotations", annotation)
    given = dict(answered)
    ids = {key for (key, _), _ in asked}
    if len(ids) < len(asked) or len(given) < len(answered):
        raise ValueError(f"{questions}, {annotations}: a question_id stands twice in one of them")
    rows, missing = [], []
    for (key, image), words in asked:
        answers = given.get((key, image), [])
        said = [answer for answer in answers if answer]
        if not said:
            raise ValueError(
                f"{annotations}: no answer to question {key} of {questions}, about picture {image}"
            )
        if not words or IMAGE in words:
            raise ValueError(f"{questions}: question {key} is {words!r}: remove it")
        name = f"COCO_{split}_{image:012d}.jpg"
        found = next(filter(pictures.find, (name, f"{split}/{name}")), None)
        if not found:
            missing.append(name)
        turns = [
            {"from": "human", "value": f"{IMAGE}\n{words}\n{SHORT_ANSWER}"},
            {"from": "gpt", "value": max(said, key=answers.count)},
        ]
        row = {"id": str(key), "image": found or name, "conversations": turns}
        rows.append(row | {"answers": answers})
    if missing:
        raise FileNotFoundError(
            f"{questions}: {len(missing)} of {len(rows)} questions have no picture in "
            f"{pictures.path}, the first {missing[0]}: get COCO's {split}, or name the folder or "
            ".zip that holds it"
        )
    return rows


def hold_out(rows: list[dict], share: float, seed: int) -> tuple[list, list]:
    """Rows to train on, and those about a `share` of the pictures, to validate with."""
    names = sorted({row["image"] for row in rows})
    random.Random(seed).shuffle(names)
    held_out = set(names[: round(len(names) * share)])
    train = [row for row in rows if row["image"] not in held_out]
    return train, [row for row in rows if row["image"] in held_out]


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add, files = parser.add_argument, {"required": True, "nargs": "+", "metavar": "F"}
    add("--questions", **files, help="raw .json to train on; a second one, if given, validates")
    add("--annotations", **files, help="the raw answers to each of them")
    add("--image_folder", required=True, help="COCO's pictures, a folder or .zip")
    add("--out", required=True, help="folder to write")
    share = "share of the pictures to validate with, where that has no file of its own"
    add("--val_fraction", type=number(float, 0, 1), default=0.05, help=share)
    add("--seed", type=int, default=0, help="of which pictures these are")
    args = parser.parse_args(argv)
    if not len(args.questions) == len(args.annotations) <= 2:
        parser.error("--questions and --annotations take one file each, or two")
    return args


@command
def main(argv=None):
    args = parse(argv)
    out, pictures = check_new(args.out), Pictures(args.image_folder)
    sets = [vqa_rows(*pair, pictures) for pair in zip(args.questions, args.annotations)]
    train, validation = sets if len(sets) == 2 else hold_out(*sets, args.val_fraction, args.seed)
    if not train or not validation:
        raise ValueError(
            f"{len(train)} questions to train on and {len(validation)} to validate with, at "
            f"--val_fraction {args.val_fraction}: neither may be empty"
        )
    images = [{row["image"] for row in rows} for rows in (train, validation)]
    if both := sorted(images[0] & images[1]):
        raise ValueError(f"{args.questions[1]}: {both[0]} is a picture of {args.questions[0]}, too")
    with written(out) as part:
        part.mkdir(parents=True)
        for name, rows, seen in zip(("train", "validation"), (train, validation), images):
            (part / f"{name}.json").write_text(json.dumps(rows, indent=1))
            print(f"{out / name}.json: {len(rows):,} questions about {len(seen):,} pictures")


if __name__ == "__main__":
    sys.exit(main())
