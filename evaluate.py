"""How good a LLaVA is: the loss on rows that it has not learnt from, and its answers.

    rows of a batch  > input_ids, labels (B, T)   > loss of each label, share predicted right
    their pictures   > vision tower, projector    (N, P, D), once for the loss and all questions
    each answer      > what stands before it (t,) > generate > prediction, beside the row's answer

A question is asked with the true turns before it as its context, as in training. A prediction is
right if it equals the row's answer, or what the labels of that answer decode to (tokenizers may
normalise). What a template puts in front of every answer, as an empty <think> block, is part of
neither; under `plain` first lines are compared.

Two keys of a row are for evaluation only: `kinds`, a name for each of its questions, gives each
kind figures of its own; `answers`, ten people's to its only question, gives vqa.py's score.

    python evaluate.py --model_name_or_path DIR [--adapter DIR] --validation_data_path F
                       --image_folder DIR [--output_dir DIR]

    model = open_model(folder)
    text = data.ChatText(llava.open_tokenizer(folder))
    config = llava.read_config(folder)
    dataset = data.open_dataset(rows, images, folder, config, text, on_bad_record="skip")
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    options = dict(eval_samples=-1, max_new_tokens=64, workers=0, on_bad_record="stop")
    metrics, answers = evaluate(
        model, dataset, engines.OneProcess(), collate, batch_size=16, device="cpu", **options)
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cli
import data
import engines
import fast
import lora
import model as llava
import order
import report
import vqa


def open_model(
    folder, adapter=None, bits=16, dtype=None, device="cpu", quant_storage=torch.uint8
) -> llava.Llava:
    """The model of a folder, with its decoder in 4 bits and with an adapter, where asked for."""
    folder = llava.resolve(folder)
    options = {"device": device, "quant_storage": quant_storage, "target_modules": llava.DECODER}
    quantize = functools.partial(lora.quantize, compute_dtype=dtype or torch.float32, **options)
    model = llava.from_pretrained(folder, dtype, device, quantize if bits == 4 else None)
    if adapter:
        lora.load(model, adapter, llava.open_weights(folder), llava.transformers_name)
    return model


def stop_or_skip(faults: list[str], on_bad_record: str):
    """Raises ValueError for the first fault, or says that its row is skipped."""
    for fault in faults:
        if on_bad_record == "stop":
            advice = "`python check.py`, with the same --version, lists such rows, "
            advice += "--on_bad_record skip passes over"
            raise ValueError(f"{fault} ({advice})")
        tqdm.write(cli.folded(f"skipped: {fault}", sys.stderr), file=sys.stderr)


def open_rows(args, path: str | None, source: Path, text) -> data.LlavaDataset | None:
    """The rows of a file, by the flags that train.py has too. Faults in the text of a row are
    found here; of the pictures only row 0's are tried, as a folder may be the wrong one.
    """
    if path is None:
        return None
    config = llava.read_config(source)
    options = {"aspect_ratio": args.image_aspect_ratio, "max_length": args.model_max_length}
    folders = args.image_folder, source
    rows = data.open_dataset(path, *folders, config, text, on_bad_record="skip", **options)
    limit = getattr(config.text_config, "max_position_embeddings", math.inf)
    if min(rows.records.lengths.max(), args.model_max_length) > limit:  # the lengths are estimates
        print(f"{path}: rows longer than the {limit:,} positions that the language model learnt")
    bad = rows.records.bad_rows
    fault = rows[bad[0] if bad else 0]["fault"]
    if fault and args.on_bad_record == "stop":
        stop_or_skip([fault], "stop")
    if len(bad) == len(rows):
        raise ValueError(f"{path}: none of its rows can be used, such as: {fault}")
    if bad:
        print(f"{path}: {len(bad):,} of {len(rows):,} rows are skipped: check.py lists them")
    return rows


# --- questions and answers ---


@dataclasses.dataclass
class Question:
    """An answer of a row, to be asked for."""

    place: tuple  # row, and which of its answers
    ids: torch.Tensor  # (t,) what stands before the answer
    features: torch.Tensor  # (n, P, D) of the pictures in there
    right: list  # a prediction that is one of these is right
    people: list  # what ten people answered, or nothing
    shown: dict  # {row, id, question, answer}, and kind where the row names it


def composed(text: str) -> str:
    """A letter and its accent as one character, however they were typed."""
    return unicodedata.normalize("NFC", text)


class Judge:
    """Compares answers, without what the template of `text` puts in front of each."""

    def __init__(self, text: data.ChatText):
        self.text, self.added = text, ""
        question = {"role": "user", "content": f"{data.IMAGE}\n?"}
        _, labels = text.ids_and_labels([question, {"role": "assistant", "content": "7"}])
        self.added = self.decode([i for i in labels if i != data.IGNORE]).rpartition("7")[0]

    def decode(self, ids) -> str:
        return self.compared(self.text.tokenizer.decode(ids, skip_special_tokens=True))

    def compared(self, answer: str) -> str:
        answer = answer.split("\n")[0] if self.text.version == "plain" else answer
        return answer.strip().removeprefix(self.added.strip()).strip()

    def judge(self, question: Question, ids: list[int]) -> dict:
        """{row, id, question, answer, prediction, right}, and what else there is to say."""
        prediction = self.decode(ids)
        told = {**question.shown, "prediction": prediction}
        told["right"] = composed(prediction) in map(composed, question.right)
        if not set(ids) & set(self.text.stop_ids):
            told["cut"] = True  # by --max_new_tokens
        if question.people:
            told["vqa_accuracy"] = vqa.accuracy(prediction, question.people)
        return told


def strings(record: dict, key: str) -> list[str]:
    """The list of strings under an optional key; anything else there is not meant for us."""
    found = record.get(key)
    return found if isinstance(found, list) and all(isinstance(x, str) for x in found) else []


def questions_of(dataset, judge: Judge, row: int, ids, labels, features):
    """Yields the questions of a row; ids, labels (T,), and features (n, P, D), are the row's."""
    record = dataset.records[row]
    turns, _ = data.parse_record(record)
    at = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    kinds, people = strings(record, "kinds"), strings(record, "answers")
    if len(at) > 1 or len(people) < 4:  # of fewer, three others could never agree
        people = []
    supervised = (labels != data.IGNORE).int()
    edges = torch.nn.functional.pad(supervised, (1, 1)).diff().nonzero().view(-1, 2)
    for k, (start, end) in enumerate(edges.tolist()):  # as many as --model_max_length has left
        question, answer = turns[at[k] - 1]["content"], turns[at[k]]["content"].strip()
        shown = {"row": row, "id": record.get("id"), "question": question, "answer": answer}
        if len(kinds) == len(at):
            shown["kind"] = kinds[k]
        right = [judge.compared(answer), judge.decode(labels[start:end])]
        pictures = (ids[:start] == dataset.image_token_id).sum() // dataset.tokens_per_picture
        yield Question((row, k), ids[:start], features[:pictures], right, people, shown)


class Asker:
    """Asks the questions of the first `rows` rows, `size` at a time.

    Under ZeRO-3 a process that generates waits until all others do: those that have nothing to ask
    take part in each call.
    """

    def __init__(self, model, dataset, engine, rows: int, size: int, max_new_tokens: int):
        self.model, self.dataset, self.engine = model, dataset, engine
        self.rows, self.size, self.max_new_tokens = rows, size, max_new_tokens
        self.judge, self.waiting, self.answers = Judge(dataset.text), [], []

    def take(self, batch: dict, features: tuple):
        """The questions of a batch, whose pictures have these features."""
        rows = zip(batch["rows"], batch["input_ids"], batch["labels"], features)
        for row, ids, labels, seen in rows:
            if 0 <= row < self.rows and (labels != data.IGNORE).any():  # neither empty nor skipped
                self.waiting += questions_of(self.dataset, self.judge, row, ids, labels, seen)
        self.nothing = Question((-1, 0), torch.tensor([0]), features[0][:0], [], [], {})
        self.ask(self.size)

    def ask(self, least: int):
        """Until no process has `least` questions waiting."""
        while max(self.engine.gather([len(self.waiting)])) >= least:
            asked = self.waiting[: self.size] or [self.nothing]
            del self.waiting[: self.size]
            for question, ids in zip(asked, self.generate(asked)):
                if question is not self.nothing:
                    self.answers.append((question.place, self.judge.judge(question, ids)))

    def generate(self, questions: list[Question]) -> list[list[int]]:
        """The new ids of each, greedily. Prompts are padded on the left, with a mask."""
        features = torch.cat([question.features for question in questions])
        prompts = [question.ids.to(features.device) for question in questions]
        masks = [torch.ones_like(ids) for ids in prompts]
        new = self.model.generate(
            pad_sequence(prompts, batch_first=True, padding_side="left"),
            features,
            pad_sequence(masks, batch_first=True, padding_side="left"),
            self.dataset.text.stop_ids,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            synced_gpus=self.engine.world > 1,
        )
        return new.tolist()


# --- the evaluation ---


def plan(dataset, size: int, engine) -> list[list[int]]:
    """This process's batches of at most `size` rows; rows about the same pictures share one.

    All processes have equally many batches: row -1 is empty.
    """
    groups, batches = {}, [[]]
    for row in range(len(dataset)):
        try:
            _, names = data.parse_record(dataset.records[row])
        except (ValueError, RecursionError):  # which is said when it is loaded
            names = []
        groups.setdefault(tuple(names) or row, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            if len(batches[-1]) + len(some) > size:
                batches.append([])
            batches[-1] += some
    batches += [[-1]] * (-len(batches) % engine.world)
    return batches[engine.rank :: engine.world]


def look(model, dataset, batch: dict, device) -> tuple:
    """The features (n, P, D) of each row's pictures; a picture goes through the tower once."""
    is_image = batch["input_ids"] == dataset.image_token_id
    counts = (is_image.sum(1) // dataset.tokens_per_picture).tolist()
    names = []
    for row, count in zip(batch["rows"], counts):
        if count:  # neither empty nor skipped
            names += data.parse_record(dataset.records[row])[1]
    distinct = list(dict.fromkeys(names))
    pixel_values = batch["pixel_values"][[names.index(name) for name in distinct]]
    features = model.features(pixel_values.to(device))
    return features[[distinct.index(name) for name in names]].split(counts)


@contextlib.contextmanager
def advice_where_memory_ends(batch_size: int):
    try:
        yield
    except RuntimeError as error:
        if not cli.lacks_memory(error):
            raise
        fewer = f"--per_device_eval_batch_size {max(1, batch_size // 2)}"
        raise ValueError(f"out of memory in an evaluation: try {fewer}") from None


def figures(path: Path, loss, right, tokens, answers: list[dict]) -> dict:
    """The means that metrics.jsonl has of an evaluation: over the tokens of a file's rows, over the
    answers, and over those to each kind of question, as eval_exact_match/colour.
    """
    if not tokens or not math.isfinite(loss):
        fault = f"the loss on its rows is {loss}" if tokens else "none of its rows can be used"
        raise ValueError(f"{path}: {fault}")
    scores = {"eval_loss": [loss / tokens], "eval_token_accuracy": [right / tokens]}
    for told in answers:
        for name, key in (("eval_exact_match", "right"), ("eval_vqa_accuracy", "vqa_accuracy")):
            if key in told:
                scores.setdefault(name, []).append(told[key])
            if key in told and "kind" in told:
                scores.setdefault(f"{name}/{told['kind']}", []).append(told[key])
    return {name: sum(found) / len(found) for name, found in scores.items()}


def options_of(args, device: str) -> dict:
    """What `evaluate` takes of the flags, which train.py has too."""
    return {
        "batch_size": args.per_device_eval_batch_size,
        "eval_samples": args.eval_samples,
        "max_new_tokens": args.max_new_tokens,
        "workers": args.dataloader_num_workers,
        "on_bad_record": args.on_bad_record,
        "device": device,
    }


@torch.no_grad()
def evaluate(
    model,
    dataset,
    engine,
    collate,
    *,
    batch_size,
    eval_samples,
    max_new_tokens,
    workers,
    on_bad_record,
    device,
    step=0,
) -> tuple[dict, list[dict]]:
    """({name: figure}, [{row, id, question, answer, prediction, right}]): loss and token accuracy
    over all rows, and greedy answers to the questions of the first `eval_samples` (-1: of all);
    the same on any number of processes. `step` is the one that the model is at.

    Open the dataset with on_bad_record="skip". Raises ValueError for the first bad row where the
    argument here is "stop", and where no row can be used or the loss is not finite.
    """
    model.eval()
    dataset, rows = copy.copy(dataset), len(dataset) if eval_samples < 0 else eval_samples
    dataset.picture = functools.lru_cache(batch_size)(dataset.picture)  # a batch's, in each worker
    asker = Asker(model, dataset, engine, rows, batch_size, max_new_tokens)
    batches, sums = plan(dataset, batch_size, engine), np.zeros(3)  # loss, right, tokens
    with advice_where_memory_ends(batch_size):
        for batch in order.loader(dataset, batches, collate, workers, device == "cuda"):
            stop_or_skip(batch["faults"], on_bad_record)
            features, labels = look(model, dataset, batch, device), batch["labels"].to(device)
            loss, right = model(batch["input_ids"].to(device), torch.cat(features), labels)
            sums += loss.item(), right.item(), (labels >= 0).sum().item()
            asker.take(batch, features)
        asker.ask(1)
    answers = [told for _, told in sorted(engine.gather(asker.answers), key=lambda pair: pair[0])]
    found = figures(dataset.records.path, *engine.sum(*sums.tolist()), answers)
    return {"step": step} | found, answers


# --- the command ---


def parse(argv):
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add, count = parser.add_argument_group("model").add_argument, cli.number(int, 1)
    gpu = torch.cuda.is_available()
    add("--model_name_or_path", required=True, help="a LLaVA folder, or hub id")
    add("--adapter", help="an adapter that was trained on it")
    add("--bits", type=int, choices=[16, 4], default=16, help="4: the decoder in nf4")
    add("--bf16", **cli.BOOLEAN, default=gpu, help="or else fp32; default: where there is a GPU")
    add = parser.add_argument_group("data").add_argument
    add("--validation_data_path", required=True, help="rows, .json or .jsonl")
    add("--image_folder", help="a folder of pictures, or a .zip, read in place")
    add("--version", choices=data.VERSIONS, default="own", help="template; own: the folder's")
    add("--image_aspect_ratio", choices=["pad", "square"], help="default: as the model's folder")
    add("--model_max_length", type=count, default=2048, help="tokens of a row, with its pictures'")
    add("--on_bad_record", choices=["stop", "skip"], default="stop", help="rows that do not work")
    workers = min(4, cli.cores())
    add("--dataloader_num_workers", type=cli.number(int, 0), default=workers, help="processes")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_samples", type=cli.number(int, -1), default=-1, help="rows to ask about; -1: all")
    add("--max_new_tokens", type=count, default=64, help="tokens of an answer")
    add("--per_device_eval_batch_size", type=count, default=16, help="rows of a batch")
    add("--output_dir", help="a new folder for metrics.jsonl and predictions.jsonl")
    return parser.parse_args(argv)


def write(folder: Path, flags: dict, metrics: dict, answers: list[dict]):
    """What report.py reads, as of a run."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"args": flags}, indent=2))
    report.append(folder / "metrics.jsonl", metrics)
    report.append(folder / "predictions.jsonl", *({"step": 0, **a} for a in answers))


@cli.command
def main(argv=None):
    args = parse(argv)
    if args.output_dir:
        cli.check_new(args.output_dir)
    folder = llava.resolve(args.model_name_or_path)
    text = data.ChatText(llava.open_tokenizer(folder, args.adapter), args.version)
    dataset = open_rows(args, args.validation_data_path, folder, text)
    device = cli.find_device()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = fast.enable(open_model(folder, args.adapter, args.bits, dtype, device))
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    options = options_of(args, device)
    metrics, answers = evaluate(model, dataset, engines.OneProcess(), collate, **options)
    report.show_evaluation(metrics, answers, args.validation_data_path)
    if args.output_dir:
        with cli.written(args.output_dir) as part:
            write(part, vars(args), metrics, answers)


if __name__ == "__main__":
    sys.exit(main())
