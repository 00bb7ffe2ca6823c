"""A run in two pictures: losses and accuracies over its steps, and some of its answers.

    curves(metrics)                                        # the lines of a run's metrics.jsonl
    samples(answers, dataset.records, dataset.pictures)    # what evaluate.py gives

Either is an image of Pillow's; `write` puts both into a run's folder.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import cli
import data

# Right and wrong, and the lines of the curves, differ in more than their colour.
INK, GREY, MAT, GOOD, BAD, BLUE = "#1a1a1a", "#606060", "#c4c8cc", "#00795c", "#c44601", "#0b62a4"
LOSSES = {  # a line's name, its colour, the corners of its marks (0: no marks)
    "loss": ("training", BLUE, 0),
    "eval_loss": ("validation", BAD, 24),
}
ACCURACIES = {
    "token_accuracy": ("training tokens", BLUE, 0),
    "eval_token_accuracy": ("validation tokens", BAD, 24),
    "eval_exact_match": ("exact match", GOOD, 4),
    "eval_vqa_accuracy": ("VQA", INK, 3),
}
DEJAVU = "DejaVuSans.ttf"
LADDER = [k * 10.0**e for e in range(-3, 9) for k in (1, 2, 5)]  # where ticks may stand


def font_for(text: str):
    """Pillow's own font, which has ASCII alone; for other text DejaVu Sans where it is installed."""
    try:
        return ImageFont.load_default(26) if text.isascii() else ImageFont.truetype(DEJAVU, 24)
    except OSError:
        return ImageFont.load_default(26)


def visible(text: str, font) -> str:
    """A text with escapes for control characters and for what the font cannot show."""
    lacking, shown = bytes(font.getmask("\uffff")), []
    for c in text:
        plain = c.isspace() or c.isprintable() and bytes(font.getmask(c)) != lacking
        shown.append(c if plain else c.encode("unicode_escape").decode())
    return "".join(shown)


def wrap(text: str, font, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` pixels; a word that is wider is broken."""
    lines = [""]
    for word in visible(text, font).split():
        pieces = [word] if font.getlength(word) <= width else word  # or letter by letter
        for n, piece in enumerate(pieces):
            longer = f"{lines[-1]} {piece}" if lines[-1] and n == 0 else lines[-1] + piece
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-3] + "..."]


def is_right(answer: dict) -> bool:
    """Whether it is the row's answer or, if people were asked, one of theirs."""
    return answer.get("vqa_accuracy", answer["right"]) > 0


def samples(answers: list[dict], records, pictures, title: str = "") -> Image.Image:
    """A sheet of up to twelve questions with their pictures, what was expected and predicted."""
    shown = [answers[i * len(answers) // 12] for i in range(12)] if len(answers) > 12 else answers
    sheet, y = Image.new("RGB", (1632, 3200), "white"), 96
    title += f"{sum(map(is_right, answers)):,} of {len(answers):,} answers are right"
    ImageDraw.Draw(sheet).text((48, 24), title, INK, ImageFont.load_default(26))
    for k in range(0, len(shown), 3):
        cards = enumerate(shown[k : k + 3])
        y = 48 + max(draw_card(sheet, 48 + 528 * i, y, a, records, pictures) for i, a in cards)
    return sheet.crop((0, 0, sheet.width, y))


def draw_card(sheet, x: int, y: int, answer: dict, records, pictures) -> int:
    """One question, 480 pixels wide, below its first eight pictures; returns where it ends."""
    pen = ImageDraw.Draw(sheet)
    names = data.parse_record(records[answer["row"]])[1][:8]
    pen.rectangle((x, y, x + 479, y + 319), MAT)
    for k, name in enumerate(names):
        picture, width = data.decode_picture(pictures.read(name), name), 480 // len(names)
        picture = ImageOps.pad(picture, (width - 8, 312), color=MAT)
        sheet.paste(picture, (x + k * width + 4, y + 4))
    if not names:
        pen.text((x + 240, y + 160), "no picture", INK, ImageFont.load_default(26), "mm")
    y += 328
    verdict, colour = ("right", GOOD) if is_right(answer) else ("wrong", BAD)
    verdict += ", cut" if "cut" in answer else ""
    for text, ink in (
        (answer["question"].replace(data.IMAGE, " "), INK),
        (f"expected: {answer['answer']}", GREY),
        (f"{verdict}: {answer['prediction'] or '(empty)'}", colour),
    ):
        font = font_for(text)
        lines = wrap(text, font, 480, 3)
        pen.multiline_text((x, y), "\n".join(lines), ink, font, spacing=8)
        y += 34 * len(lines)
    return y


def curves(metrics: list[dict]) -> Image.Image:
    """Losses, on a log scale, and accuracies over steps; a vertical line where the loss is best."""
    sheet = Image.new("RGB", (1760, 620), "white")
    values = [m[key] for m in metrics for key in LOSSES if key in m]
    low = max(n for n in LADDER if n <= max(min(values), LADDER[0]))
    high = min((n for n in LADDER if n > max(low, *values)), default=max(values))

    def log_scale(loss):
        return math.log(max(loss, low) / low) / math.log(high / low)

    ticks = {n: f"{n:g}" for n in LADDER if low <= n <= high}
    draw_panel(sheet, 100, "loss (log scale)", metrics, LOSSES, ticks, log_scale)
    ticks = {n / 100: f"{n}%" for n in range(0, 101, 20)}
    draw_panel(sheet, 970, "accuracy", metrics, ACCURACIES, ticks, float)
    return sheet


def draw_panel(sheet, left: int, title: str, metrics: list[dict], lines: dict, ticks: dict, scale):
    """Axes, legend and lines of some figures, 740 x 400 pixels; ticks {value: label}, and `scale`
    makes of a value its share of the height.
    """
    pen, font, last = ImageDraw.Draw(sheet), ImageFont.load_default(24), metrics[-1]["step"] or 1

    def at(step, value):
        return left + 740 * step / last, 530 - 400 * scale(value)

    pen.text((left, 20), title, INK, font)
    for value, label in ticks.items():
        pen.line([at(0, value), at(last, value)], "#dddddd", 2)
        pen.text((left - 12, at(0, value)[1]), label, INK, font, "rm")
    for step in range(0, last + 1, int(next(n for n in LADDER if n >= max(1, last / 6)))):
        pen.text((at(step, 1)[0], 542), f"{step:,}", INK, font, "ma")
    pen.text((left + 370, 580), "step", INK, font, "ma")
    if losses := [(m["eval_loss"], m["step"]) for m in metrics if "eval_loss" in m]:
        best = min(losses)[1]
        pen.line([at(best, value) for value in ticks], GREY, 2)
        label = f"best loss at step {best:,} (vertical line)"
        pen.text((left + 740, 20), label, GREY, font, "ra")
    x = left
    for key, line in lines.items():
        if found := [(m["step"], m[key]) for m in metrics if key in m]:
            x += 60 + draw_line(pen, x, font, found, *line, at)


def draw_line(pen, x: int, font, found: list[tuple], name: str, colour: str, corners: int, at):
    """A line of (step, value) and its entry in the legend, at x; the width of its name.

    Training's values, which have no marks, are many and noisy: means of neighbours are drawn.
    """
    share = 1 if corners else len(found) // 120 + 1
    groups = [np.mean(found[k : k + share], axis=0) for k in range(0, len(found), share)]
    for points in [at(*group) for group in groups], [(x + 6, 78), (x + 26, 78)]:
        pen.line(points, colour, 3)
        for point in points if corners else ():
            pen.regular_polygon((*point, 8), corners, fill=colour)
    pen.text((x + 44, 64), name, INK, font)
    return font.getlength(name)


def write(out: Path, metrics: list[dict], answers: list[dict], records, pictures) -> Image.Image:
    """Writes curves.png of a run, and samples.png of its newest evaluation; returns the latter."""
    newest = [m for m in metrics if "eval_loss" in m][-1]
    title = f"step {newest['step']:,}: validation loss {newest['eval_loss']:.4f}, "
    sheet = samples(answers, records, pictures, title)
    for name, image in (("curves.png", curves(metrics)), ("samples.png", sheet)):
        with cli.written(out / name) as part:
            image.save(part, "PNG")
    return sheet
