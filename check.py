"""A data set before it is trained on: all rows, or one row as the model gets it.

    python check.py --data_path train.json --image_folder images --model_name_or_path out/model
    python check.py --data_path train.json --image_folder images --model_name_or_path out/model \\
        --index 7

Of all rows it prints how many there are and how long, and what is wrong, faults of one kind
together; the exit status is 1 if there are any. A fault is what training would stop at:

    rows        665,298, 40,688 of them text-only
    ..
    tokens      50 % up to 771, 90 % up to 1,122, 99 % up to 1,834, the longest 2,048
    ..
    faults      34 rows, 1 kind
      34 rows, such as row 2 (id 0017), row 8 (id 0043): picture coco/1.jpg: not in images

Of one row it prints pictures and tokens with their ids; those that are learnt stand out.
"""

import contextlib
import functools
import io
import json
import os
import re
import sys
import unicodedata
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import model as llava
from cli import BOOLEAN, Parser, command, cores, folded, number

HEADER_BYTES = 2**16  # of a picture, enough to see what it is


class Check(torch.utils.data.Dataset):
    """Item i is what can be known about row i: (repr of its id, figures, faults).

    figures  numbers of turns, pictures, tokens, tokens kept, tokens supervised; 0 where not known
    faults   what is wrong, a line each
    `dataset` is the rows as a model wants them, or None: then there are no tokens. Of a picture the
    beginning is read, or, if `full`, all of it decoded.
    """

    def __init__(self, records, pictures, dataset: data.LlavaDataset | None, full: bool):
        self.records, self.pictures, self.dataset, self.full = records, pictures, dataset, full

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple:
        row, figures, names, faults = self.records[i], [0] * 5, [], []
        try:
            messages, names = data.parse_record(row)
            figures[:2] = len(messages), len(names)
            if self.dataset:
                ids, labels = self.dataset.text.ids_and_labels(messages)
                more = len(names) * (self.dataset.tokens_per_picture - 1)
                figures[2] = len(ids) + more
                keep = self.dataset.fit(ids, labels)
                learnt = sum(label != data.IGNORE for label in labels[:keep])
                figures[3:] = keep + more, learnt
        except ValueError as error:
            faults.append(str(error))
        for name in names:
            try:
                self.look_at(name)
            except FileNotFoundError as error:
                faults.append(str(error) + self.hint(name))
            except ValueError as error:
                faults.append(str(error))
        return repr(row.get("id") if isinstance(row, dict) else None), figures, faults

    def look_at(self, name: str):
        """Raises what training would, as far as it looks: ValueError or FileNotFoundError."""
        if not self.full:
            with contextlib.suppress(Exception):  # a longer header, or a fault: see it all
                beginning = self.pictures.read(name, HEADER_BYTES)
                return Image.open(io.BytesIO(beginning))
        return data.decode_picture(self.pictures.read(name), name)

    @functools.cached_property
    def loose_names(self) -> dict[str, str]:
        """The names that there are, by their `loose` forms."""
        if self.pictures.archive:
            names = self.pictures.archive.namelist()
        else:
            files = (path for path in self.pictures.path.rglob("*") if path.is_file())
            names = [path.relative_to(self.pictures.path).as_posix() for path in files]
        return {loose(name): name for name in names}

    def hint(self, name: str) -> str:
        other = self.loose_names.get(loose(name))
        return (
            f" (it has {other!r}, the same name in another case or Unicode form)" if other else ""
        )


def loose(name: str) -> str:
    """What remains of a name without case and Unicode's forms."""
    return unicodedata.normalize("NFC", name).casefold()


def kind_of(fault: str) -> str:
    """A fault without names and numbers: equal for faults of one kind."""
    return re.sub(r"picture .*?: |'[^']*'|\"[^\"]*\"|\d[\d,]*", "#", fault)


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def check_rows(check: Check) -> tuple[np.ndarray, Counter, dict]:
    """The figures of all rows, how often each id stands, and {kind: {says: a fault, rows}}."""
    ids, figures, kinds = Counter(), [], {}
    # Forked, as the rows are read once. One for a few rows would cost more than it saves.
    workers = min(cores(), len(check) // 64) if hasattr(os, "sched_getaffinity") else 0
    batches = torch.utils.data.DataLoader(
        check,
        batch_size=64,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    found = (item for batch in batches for item in batch)
    bar = tqdm(found, total=len(check), unit=" rows", dynamic_ncols=True, disable=None)
    for i, (name, numbers, faults) in enumerate(bar):
        ids[name] += 1
        figures.append(numbers)
        for fault in faults:
            rows = kinds.setdefault(kind_of(fault), {"says": fault, "rows": []})["rows"]
            if rows[-1:] != [i]:
                rows.append(i)
    return np.array(figures), ids, kinds


def report(check: Check, max_length: int, positions: int) -> int:
    """Prints what all rows are like and what is wrong with them; returns 1 if anything is."""
    records = check.records
    figures, ids, kinds = check_rows(check)
    turns, images, tokens, kept, supervised = figures.T
    text_only = ((images == 0) & (turns > 0)).sum()
    print(f"rows        {len(records):,}, {text_only:,} of them text-only")
    print(f"turns       {turns.sum():,}\npictures    {images.sum():,}")
    known = tokens[tokens > 0]
    if known.size:
        shares = [f"{s} % up to {np.percentile(known, s):,.0f}" for s in (50, 90, 99)]
        print(f"tokens      {', '.join(shares)}, the longest {known.max():,}")
        cut = (known > max_length).sum()
        print(f"cut         {cut:,} rows ({cut / len(known):.2%}) at {max_length:,} tokens")
        print(f"supervised  {supervised.sum() / max(kept.sum(), 1):.1%} of the tokens")
        if beyond := (kept > positions).sum():
            limit = f"{positions:,} that the model knows: --model_max_length {positions}"
            print(f"positions   {beyond:,} rows are longer than the {limit}")
    repeated = [name for name, times in ids.items() if times > 1 and name != repr(None)]
    first = f", the first {repeated[0]}" if repeated else ""
    print(f"ids         {len(repeated):,} of them repeated{first}")
    bad = {i for kind in kinds.values() for i in kind["rows"]}
    found = f"{plural(len(bad), 'row')}, {plural(len(kinds), 'kind')}" if bad else "0"
    print(f"faults      {found}")
    for kind in kinds.values():
        rows = kind["rows"]
        examples = ", ".join(records.where(i).removeprefix(f"{records.path}: ") for i in rows[:3])
        line = f"  {plural(len(rows), 'row')}, such as {examples}: {kind['says']}"
        print(folded(line.encode("utf-8", "backslashreplace").decode(), sys.stdout))
    if len(bad) == len(records):
        print("Every row is bad: look first at the form of the file, and at the flags")
    elif bad:
        print("Mend or remove these rows, or train with --on_bad_record skip")
    return int(len(bad) > 0)


def show(dataset: data.LlavaDataset, i: int, as_json: bool):
    """Prints a row as the model gets it: pictures, tokens with ids; supervised ones stand out."""
    if not 0 <= i < len(dataset):
        raise ValueError(f"--index {i}: {dataset.records.path} has rows 0 to {len(dataset) - 1}")
    item = dataset[i]
    batch = data.Collator(dataset.image_token_id, dataset.tokens_per_picture)([item])
    if as_json:
        print(json.dumps({key: batch[key][0].tolist() for key in ("input_ids", "labels")}))
        return
    colour = sys.stdout.isatty()
    learnt = int((item["labels"] != data.IGNORE).sum())
    print(
        f"{dataset.records.where(i)}: {len(item['pixel_values'])} picture(s), {batch['lengths'][0]} "
        f"tokens, {learnt} of them supervised, {item['cut']} cut off"
    )
    for pixels in item["pixel_values"] if colour else []:
        print(thumbnail(dataset.transform, pixels.numpy()))
    before, after = ("\033[30;42m", "\033[0m") if colour else ("[", "]")
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist()):
        text = dataset.text.tokenizer.decode([token]).replace("\n", "\\n")
        if token == dataset.image_token_id:
            text = f"{data.IMAGE} x {dataset.tokens_per_picture}"
        text = text if label == data.IGNORE else before + text + after
        print(text, end=f"\033[2m{token}\033[0m " if colour else f"/{token} ")
    print()


def thumbnail(transform: data.PictureTransform, pixels: np.ndarray, width: int = 48) -> str:
    """What the tower sees, as coloured half blocks for a terminal: two pixels to a character."""
    rgb = (pixels.transpose(1, 2, 0) * transform.std + transform.mean) * 255
    rgb = Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).resize((width, width))
    rgb = np.asarray(rgb).tolist()
    block, lines = "\033[38;2;{};{};{}m\033[48;2;{};{};{}m▀", []
    for upper, lower in zip(rgb[::2], rgb[1::2]):
        lines.append("".join(block.format(*a, *b) for a, b in zip(upper, lower)) + "\033[0m")
    return "\n".join(lines)


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True, help="the rows: .json or .jsonl")
    add("--image_folder", help="their pictures: a folder, or a .zip")
    add("--model_name_or_path", help="a LLaVA folder, or hub id; without one no tokens are counted")
    add("--version", choices=data.VERSIONS, default="own", help="the template")
    add("--model_max_length", type=number(int, 1), default=2048, help="tokens, pictures included")
    add("--image_aspect_ratio", choices=["pad", "square"], help="instead of the folder's")
    add("--full", **BOOLEAN, default=False, help="decode each picture whole")
    add("--index", type=int, help="one row, from 0, as the model gets it")
    add("--json", **BOOLEAN, default=False, help="with --index: input_ids and labels, for machines")
    return parser.parse_args(argv)


@command
def main(argv=None) -> int:
    args, dataset, positions = parse(argv), None, 0
    if args.json and args.index is None:
        raise ValueError("--json is for one row: name it with --index")
    if args.index is not None and not args.model_name_or_path:
        raise ValueError("--index shows tokens: name their model with --model_name_or_path")
    if args.model_name_or_path:
        folder = llava.resolve(args.model_name_or_path)
        config = llava.read_config(folder)
        if config.model_type != "llava":
            raise ValueError(f"{folder}: not a LLaVA folder: build.py makes one")
        positions = config.text_config.max_position_embeddings
        text = data.ChatText(llava.open_tokenizer(folder), args.version)
        options = {"aspect_ratio": args.image_aspect_ratio, "max_length": args.model_max_length}
        paths = args.data_path, args.image_folder, folder
        dataset = data.open_dataset(*paths, config, text, **options)
    if args.index is not None:
        return show(dataset, args.index, args.json)
    if dataset:
        records, pictures = dataset.records, dataset.pictures
    else:
        records = data.Records(args.data_path)
        pictures = data.Pictures(args.image_folder) if args.image_folder else None
    if records.has_picture.any() and not pictures:
        raise ValueError(f"{args.data_path} has pictures: say where with --image_folder")
    return report(Check(records, pictures, dataset, args.full), args.model_max_length, positions)


if __name__ == "__main__":
    sys.exit(main())
