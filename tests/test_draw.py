"""The pictures of a run: samples.png and curves.png."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont
from tiny import open_dataset

import draw

WORDS = ["Wörter", "数字", "🙂", "a", "frog.", "x" * 99, "\u0007", "don't", "</s>", "(left)"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(WORDS), max_size=30), st.integers(100, 500), st.integers(1, 4))
def test_text_in_pictures_is_wrapped_and_escaped(words, width, most):
    font = ImageFont.load_default(26)
    lines = draw.wrap("\n".join(words), font, width, most)
    assert len(lines) <= most and all(font.getlength(line) <= width for line in lines)
    shown = draw.wrap(" ".join(words), font, width, 10**6)
    whole = "".join(words).encode("unicode_escape").decode()
    assert "".join(shown).replace(" ", "") == whole
    assert whole.isascii() and (len(shown) <= most or lines[-1].endswith("..."))


def test_text_beyond_ascii_is_drawn_where_a_font_has_it(monkeypatch):
    try:
        ImageFont.truetype(draw.DEJAVU)
        shown = r"é – я \u6570\u5b57"  # it has no Chinese
    except OSError:
        shown = r"\xe9 \u2013 \u044f \u6570\u5b57"
    text = "é – я 数字"
    assert draw.visible(text, draw.font_for(text)) == shown
    monkeypatch.setattr(draw, "DEJAVU", "nowhere.ttf")
    assert draw.visible(text, draw.font_for(text)).isascii()


def greys(picture):
    return np.asarray(picture.convert("L")).astype(int)


def test_the_sheet_tells_right_from_wrong_without_colour(world):
    """And nothing leaves its place, however long a text is."""
    dataset = open_dataset(world / "rows.json", world / "images", world / "llava")

    def sheet(answers):
        return draw.samples(answers, dataset.records, dataset.pictures)

    long = {"question": "<image>\n" + "why " * 99, "answer": "y" * 400, "prediction": "数" * 200}
    one = {"row": 0, "question": "What?", "answer": "a", "prediction": "a", "right": True}
    answers = [one | {"row": i % 12} for i in range(30)]
    plain, wrong = sheet([one]), sheet([one | {"right": False}])
    assert plain.tobytes() == sheet([one | {"right": False, "vqa_accuracy": 0.3}]).tobytes()
    dark = [greys(x)[420:] < 200 for x in (plain, wrong)]  # the two words, less their colour
    assert (dark[0] != dark[1]).sum() > 100
    assert sheet([one | {"right": False, "cut": True}]).tobytes() != wrong.tobytes()
    for some in (answers, [answers[2] | long] * 3, [answers[1]], []):
        pixels = greys(sheet(some))
        for k in range(4):  # what is between the columns of cards stays white
            assert (pixels[96:, 528 * k + 2 : 528 * k + 44] == 255).all()
        assert (pixels[-6:] == 255).all()
    assert sheet(answers).size == sheet(answers[:12]).size


def test_curves_are_drawn_of_any_run():
    def metrics(steps, loss):
        trained = [{"step": s, "loss": loss(s), "token_accuracy": 0.5} for s in range(1, steps + 1)]
        found = {"eval_loss": 2 * loss(steps), "eval_token_accuracy": 1.0, "eval_exact_match": 0.0}
        return [{"step": 0, **found}, *trained, {"step": steps, **found, "eval_vqa_accuracy": 0.3}]

    for rows in (
        metrics(3000, lambda s: 8 / s),
        metrics(1, lambda s: 0.0),
        metrics(10, lambda s: 1e7),
        [{"step": 0, "eval_loss": 1.0, "eval_token_accuracy": 0.0}],
        [{"step": s, "loss": 1.0, "token_accuracy": 0.0} for s in (1, 2)],
    ):
        pixels = greys(draw.curves(rows))
        blank = np.ones(pixels.shape, bool)  # nothing but legends, labels and panels
        blank[10:612, 4:1750] = False
        blank[100:520, 860:890] = True  # between the panels
        assert (pixels[blank] == 255).all() and (pixels[130:530, 102:840] < 200).any()
    longer = draw.curves(metrics(3000, lambda s: 8 / s + 0.1 * (s % 2)))
    assert longer.tobytes() != draw.curves(metrics(3000, lambda s: 8 / s)).tobytes()
