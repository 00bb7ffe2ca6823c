"""The VQA score of an answer: how far it agrees with the ten people who were asked the same.

    accuracy("2 dogs.", ["two dogs"] * 2 + ["dogs"] * 8)        0.6
    normalise("It's on the Table, isnt it?")                    "it's on table isn't it"

Source: github.com/GT-Vision-Lab/VQA, vqaEval.py, to the letter, with its slips:
published scores have them too.
"""

import re

# An apostrophe that is missing in one of these is put back. `somebody'd` loses its own: a slip.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've"""
CONTRACTIONS = {"somebody'd": "somebodyd"}
for whole in CONTRACTED.split():
    for apostrophe in re.finditer("'", whole):
        CONTRACTIONS[whole[: apostrophe.start()] + whole[apostrophe.end() :]] = whole
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def normalise(answer: str) -> str:
    """In lower case, without articles and most punctuation; numbers up to ten as digits."""
    text = answer
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        loose = f"{mark} " in answer or f" {mark}" in answer or re.search("[0-9],[0-9]", answer)
        text = text.replace(mark, "" if loose else " ")
    text = re.sub(r"\.(?![0-9])", "", text, count=32)  # officially a flag stands where a count does
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def accuracy(prediction: str, answers: list[str]) -> float:
    """How far people agree: min(1, matches / 3), averaged over the sets that leave one of their
    `answers` (ten in VQA) out. Where all wrote the same, the official score normalises nothing.
    """
    texts = [re.sub("[\n\t]", " ", text).strip() for text in (prediction, *answers)]
    if len(set(texts[1:])) > 1:
        texts = [normalise(text) for text in texts]
    same = [text == texts[0] for text in texts[1:]]
    return sum(min(1, (sum(same) - one) / 3) for one in same) / len(same)
