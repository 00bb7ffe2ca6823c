"""The training loop of LLaVA: two stages, any of the train types, one process.

    projector       stage 1: the projector alone, on captions                 --version plain
    freeze_vision   stage 2: projector and language model, on instructions
    full            the vision tower too

    python train.py --model_name_or_path out/model --data_path captions.json --image_folder images \
        --train_type projector --output_dir out/stage1

What an optimizer step is:

    window = the rows of one global batch, in `gradient_accumulation_steps` micro-batches
    loss   = sum over all supervised tokens of the window / their number
    so that any split of the same rows into micro-batches, and any padding, gives the same gradients.

Precision: with --bf16, weights and activations are bf16; gradients are added up in fp32, and what trains has an fp32
master copy that the optimizer updates. Without it everything is fp32.

Sources: the recipes of LLaVA-1.5 (github.com/haotian-liu/LLaVA, scripts/v1_5), the schedule of transformers' optimization.py.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import data
import model as llava

# What trains, and LLaVA-1.5's published recipe for it (scripts/v1_5: pretrain.sh, finetune.sh).
TRAIN_TYPES = {
    "projector": {"modules": ["multi_modal_projector"], "learning_rate": 1e-3, "version": "plain"},
    "freeze_vision": {"modules": ["multi_modal_projector", "language_model"], "learning_rate": 2e-5, "version": "own"},
    "full": {"modules": ["vision_tower", "multi_modal_projector", "language_model"], "learning_rate": 2e-5, "version": "own"},
}


# --- schedule, parameter groups ---


def schedule(step: int, total_steps: int, warmup_steps: int, kind: str) -> float:
    """The factor on the learning rate at `step` (from 0): a linear warm-up, then cosine, linear or constant."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[kind]


def parameter_groups(model, args) -> list[dict]:
    """AdamW's groups: a learning rate for each part, no weight decay on norms and biases (all that is not a matrix)."""
    rates = {"vision_tower": args.mm_vision_tower_lr, "multi_modal_projector": args.mm_projector_lr,
             "language_model": args.learning_rate}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.split(".")[0], p.ndim > 1
            groups.setdefault(key, []).append(p)
    return [{"params": params, "lr": rates[part], "base_lr": rates[part], "name": part,
             "weight_decay": args.weight_decay if decay else 0.0} for (part, decay), params in groups.items()]


# --- engine ---


class Plain:
    """One process. Does in plain torch what DeepSpeed's engine does: fp32 gradients and masters for bf16 weights."""

    rank, world = 0, 1

    def __init__(self, model, groups: list[dict], max_grad_norm: float):
        self.model, self.max_grad_norm = model, max_grad_norm
        self.params = [p for group in groups for p in group["params"]]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.params]
        master_of = {p: m for p, m in zip(self.params, self.masters)}
        for p, master in master_of.items():
            if p is not master:
                p.register_post_accumulate_grad_hook(lambda p, master=master: self._collect(p, master))
        groups = [{**group, "params": [master_of[p] for p in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)

    @staticmethod
    def _collect(p, master):
        """Adds a bf16 gradient to the fp32 sum as soon as it is complete, and frees it."""
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad += p.grad
        p.grad = None

    def forward(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss, last: bool):
        loss.backward()

    def all_reduce(self, *numbers):
        return numbers

    def step(self, factor: float) -> float:
        """One update, with the learning rates times `factor`; the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.publish()
        return norm.item()

    @torch.no_grad()
    def publish(self):
        """Copies the masters into the model's weights."""
        for p, master in zip(self.params, self.masters):
            if p is not master:
                p.copy_(master)

    def state(self) -> dict:
        """Everything that trains, by name, in fp32: what checkpoints and saved folders hold."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {names[p]: master.detach() for p, master in zip(self.params, self.masters)}

    def save(self, folder: Path):
        torch.save({"weights": self.state(), "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder: Path):
        saved = torch.load(folder / "state.pt", weights_only=True)
        for (name, master), weight in zip(self.state().items(), saved["weights"].values(), strict=True):
            master.copy_(weight)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.publish()


# --- evaluation ---


def to_device(batch: dict, device) -> tuple:
    return tuple(batch[key].to(device, non_blocking=True) for key in ("input_ids", "pixel_values", "labels"))


@torch.no_grad()
def evaluate(model, dataset, collate, args, device) -> tuple[dict, list[dict]]:
    """Token-weighted loss and accuracy over all rows, and generated answers to the questions of `eval_samples` rows.

    An answer is asked for with the true turns before it as its context, as in training.
    """
    model.eval()
    loss, right, tokens = 0.0, 0, 0
    loader = DataLoader(dataset, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
    for batch in loader:
        batch_loss, batch_right = model(*to_device(batch, device))
        loss, right = loss + batch_loss.item(), right + batch_right.item()
        tokens += (batch["labels"][:, 1:] != data.IGNORE).sum().item()
    metrics = {"eval_loss": loss / max(tokens, 1), "eval_token_accuracy": right / max(tokens, 1)}
    count = len(dataset) if args.eval_samples < 0 else min(args.eval_samples, len(dataset))
    predictions = [p for batch in questions(dataset, count, args.per_device_eval_batch_size)
                   for p in answer(model, batch, dataset, collate, args, device)]
    if predictions:
        metrics["eval_exact_match"] = sum(p["right"] for p in predictions) / len(predictions)
        for kind in sorted({p["kind"] for p in predictions if "kind" in p}):
            of_kind = [p["right"] for p in predictions if p.get("kind") == kind]
            metrics[f"eval_exact_match/{kind}"] = sum(of_kind) / len(of_kind)
    return metrics, predictions


def questions(dataset, count: int, batch_size: int):
    """Batches of questions: each answer of a row is one, and what stands before it in the row is its prompt."""
    batch = []
    for i in range(count):
        item, row = dataset[i], dataset.records[i]
        supervised = item["labels"] != data.IGNORE
        starts = (supervised & ~supervised.roll(1)).nonzero().flatten().tolist()
        turns = row["conversations"]
        pairs = [(h["value"], g["value"]) for h, g in zip(turns, turns[1:]) if g["from"] == "gpt"]
        for k, (start, (question, expected)) in enumerate(zip(starts, pairs)):
            ids = item["input_ids"][:start]
            pictures = (ids == dataset.image_token_id).sum()
            kind = {"kind": row["kinds"][k]} if "kinds" in row else {}
            batch.append(({"id": row.get("id"), "question": question, "answer": expected, **kind},
                          {**item, "input_ids": ids, "labels": ids, "pixel_values": item["pixel_values"][:pictures]}))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def answer(model, batch, dataset, collate, args, device) -> list[dict]:
    """Greedy answers to a batch of questions, as [{id, question, answer, prediction, right}]."""
    inputs = collate([item for _, item in batch])
    lengths, (_, width) = torch.tensor(inputs["lengths"]), inputs["input_ids"].shape
    shift = torch.arange(width)[None] - (width - lengths)[:, None]  # (B, T): from padding on the right to the left
    ids = inputs["input_ids"].gather(1, shift.clamp(min=0))
    ids[shift < 0] = 0
    new = model.generate(ids.to(device), inputs["pixel_values"].to(device), (shift >= 0).long().to(device),
                         max_new_tokens=args.max_new_tokens, eos_token_id=dataset.text.stop_ids)
    answers = []
    for (asked, _), text in zip(batch, dataset.text.tokenizer.batch_decode(new, skip_special_tokens=True)):
        prediction = text.split("\n")[0].strip() if dataset.text.version == "plain" else text.strip()
        answers.append({**asked, "prediction": prediction, "right": prediction == asked["answer"].strip()})
    return answers


# --- checkpoints ---

# Flags that may differ between a run and its continuation: they change nothing that is learnt.
FREE_FLAGS = {"resume_from_checkpoint", "dataloader_num_workers", "logging_steps", "save_steps", "save_total_limit",
              "per_device_eval_batch_size", "local_rank", "report_to", "dry_run"}


def open_run(args) -> tuple[str, Path | None]:
    """The id of the run that lives in `output_dir`, and the checkpoint to go on from; ValueError if it is another's."""
    out, flags = Path(args.output_dir), {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    if out.resolve() == Path(args.model_name_or_path).resolve():
        raise ValueError(f"--output_dir {out}: that is the source of the model; name a new folder")
    if not (out / "run.json").is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--output_dir {out}: not empty, and no run of this program; name a new folder")
        return f"{random.SystemRandom().getrandbits(64):016x}", None
    run = json.loads((out / "run.json").read_text())
    if args.resume_from_checkpoint is None:
        raise ValueError(f"--output_dir {out} holds a run: go on with --resume_from_checkpoint latest, or name a new folder")
    changed = [k for k, v in flags.items() if run["args"].get(k) != v]
    if changed:
        raise ValueError(f"--output_dir {out} holds a run with --{changed[0]} {run['args'].get(changed[0])}, not "
                         f"{flags[changed[0]]}: give the same flags, or name a new folder")
    if args.resume_from_checkpoint == "latest":
        found = sorted(out.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
        return run["id"], found[-1] if found else None
    return run["id"], Path(args.resume_from_checkpoint)


def save_checkpoint(engine, out: Path, progress: dict, limit: int):
    """Everything that a run needs to go on bit for bit, written aside and renamed; keeps the newest `limit`."""
    target = out / f"checkpoint-{progress['step']}"
    part = target.with_suffix(".part")
    part.mkdir(exist_ok=True)
    engine.save(part)
    torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, part / "rng.pt")
    (part / "progress.json").write_text(json.dumps(progress))
    llava.replace_folder(part, target)
    older = sorted(out.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    for path in older[:-limit] if limit > 0 else []:
        llava.remove_folder(path)


def load_checkpoint(engine, folder: Path, run_id: str) -> dict:
    """Restores what `save_checkpoint` wrote and returns its progress."""
    if not (folder / "progress.json").is_file():
        raise FileNotFoundError(f"--resume_from_checkpoint {folder}: no checkpoint there")
    progress = json.loads((folder / "progress.json").read_text())
    if progress["run"] != run_id:
        raise ValueError(f"--resume_from_checkpoint {folder}: from another run")
    engine.load(folder)
    rng = torch.load(folder / "rng.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    torch.cuda.set_rng_state_all(rng["cuda"])
    return progress


class Log:
    """metrics.jsonl and predictions.jsonl. A run that goes on from `step` takes back the lines behind it."""

    def __init__(self, out: Path, step: int):
        self.out = out
        for name in ("metrics.jsonl", "predictions.jsonl"):
            lines = (out / name).read_text().splitlines() if (out / name).exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            (out / name).write_text("".join(line + "\n" for line in kept))

    def write(self, name: str, *rows: dict):
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class FirstWindow:
    """Proves, once, that what should train does: every trainable weight gets a finite gradient."""

    def __init__(self, model):
        self.seen = {}
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.hooks = [p.register_hook(lambda g, name=name: self.seen.__setitem__(
            name, self.seen.get(name, True) & torch.isfinite(g).all())) for name, p in model.named_parameters() if p.requires_grad]

    def check(self):
        for name in self.names:
            if not self.seen.get(name, False):
                raise ValueError(f"{name} trains, but got {'a gradient that is not finite' if name in self.seen else 'no gradient'}")
        for hook in self.hooks:
            hook.remove()


# --- the loop ---


def describe(model, args, steps_per_epoch: int, total_steps: int, rows: int, world: int):
    """Prints what trains, the batch arithmetic, and the memory that follows from both."""
    print(f"{'module':<24}{'parameters':>16}{'trainable':>16}  dtype")
    for name, part in model.named_children():
        count = sum(p.numel() for p in part.parameters())
        trainable = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"{name:<24}{count:>16,}{trainable:>16,}  {str(next(part.parameters()).dtype).removeprefix('torch.')}")
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    print(f"batch: {micro} rows x {accumulation} accumulated x {world} processes = {micro * accumulation * world} rows a step")
    print(f"steps: {rows:,} rows, {steps_per_epoch:,} steps an epoch, {total_steps:,} in all")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    masters = 4 * training if args.bf16 else 0
    print("memory: " + ", ".join(f"{what} {size / 2**30:.2f} GiB" for what, size in (
        ("weights", weights), ("masters", masters), ("gradients", 4 * training), ("optimizer", 8 * training))), flush=True)


def train(args):
    torch.manual_seed(args.seed)
    run_id, checkpoint = open_run(args)
    out, device = Path(args.output_dir), "cuda" if torch.cuda.is_available() else "cpu"
    if (out / "final" / "config.json").is_file():
        print(f"{out}: this run is complete")
        return 0

    # Data, model, engine.
    source = llava.resolve(args.model_name_or_path)
    text = data.ChatText(AutoTokenizer.from_pretrained(source), args.version)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = llava.from_pretrained(source, dtype, device)
    trained = TRAIN_TYPES[args.train_type]["modules"]
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] in trained)
    if args.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_set, validation_set = (
        data.open_dataset(path, args.image_folder, source, args.version, args.image_aspect_ratio, args.model_max_length,
                          args.on_bad_record, text) if path else None for path in (args.data_path, args.validation_data_path))
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    engine = Plain(model, parameter_groups(model, args), args.max_grad_norm)

    # Batch arithmetic.
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    plan = lambda epoch: data.plan_epoch(  # noqa: E731
        train_set.records.lengths, train_set.records.has_picture, micro * accumulation * engine.world, args.seed, epoch,
        args.group_by_modality_length)
    steps_per_epoch = len(plan(0))
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
    describe(model, args, steps_per_epoch, total_steps, len(train_set), engine.world)

    # A run begins or goes on.
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists():
        (out / "run.json").write_text(json.dumps({"id": run_id, "args": vars(args)}, indent=2))
    progress = load_checkpoint(engine, checkpoint, run_id) if checkpoint else {"run": run_id, "step": 0, "skipped": 0, "cut": 0}
    log, stop, first_window = Log(out, progress["step"]), StopFlag(out), FirstWindow(model)

    def validate():
        metrics, predictions = evaluate(model, validation_set, collate, args, device)
        log.write("metrics.jsonl", {"step": progress["step"], **metrics})
        log.write("predictions.jsonl", *({"step": progress["step"], **p} for p in predictions))
        report(progress["step"], metrics, predictions)
        train_mode(model)

    if validation_set and not checkpoint:
        validate()
    train_mode(model)
    bar = tqdm(total=total_steps, initial=progress["step"], unit="step", disable=not sys.stderr.isatty())
    while progress["step"] < total_steps and not stop.requested:
        epoch, start = divmod(progress["step"], steps_per_epoch)
        sampler = data.WindowSampler(plan(epoch), accumulation, engine.world, engine.rank, start)
        batches = iter(DataLoader(train_set, batch_sampler=sampler, collate_fn=collate, pin_memory=device == "cuda",
                                  num_workers=args.dataloader_num_workers, prefetch_factor=4 if args.dataloader_num_workers else None))
        for _ in range(min(len(sampler) // accumulation, total_steps - progress["step"])):
            began = time.perf_counter()
            # The whole window is fetched first: its loss is divided by the number of its supervised tokens.
            window = [next(batches) for _ in range(accumulation)]
            waited = time.perf_counter() - began
            supervised = sum((batch["labels"][:, 1:] != data.IGNORE).sum().item() for batch in window)
            supervised, stop_requested = engine.all_reduce(supervised, stop.requested)
            loss = 0.0
            for i, batch in enumerate(window):
                loss_sum, _ = engine.forward(*to_device(batch, device))
                engine.backward(loss_sum * engine.world / max(supervised, 1), last=i == accumulation - 1)
                loss += loss_sum.detach()
            loss, = engine.all_reduce(loss.item() / max(supervised, 1))
            if not math.isfinite(loss):
                raise ValueError(f"step {progress['step'] + 1}: the loss is {loss}; its rows are "
                                 f"{[r for batch in window for r in batch['rows']]}. The last checkpoint stays")
            if first_window:
                first_window = first_window.check()
            factor = schedule(progress["step"], total_steps, warmup_steps, args.lr_scheduler_type)
            grad_norm = engine.step(factor)
            progress["step"] += 1

            for fault in [fault for batch in window for fault in batch["faults"]]:
                progress["skipped"] += 1
                tqdm.write(f"skipped: {fault}")
            progress["cut"] += sum(batch["cut"] for batch in window)
            seconds = time.perf_counter() - began
            rows = sum(len([r for r in batch["rows"] if r >= 0]) for batch in window)
            real = sum(sum(batch["lengths"]) for batch in window)
            padded = sum(batch["input_ids"].numel() for batch in window)
            metrics = {"step": progress["step"], "epoch": progress["step"] / steps_per_epoch, "loss": loss,
                       "lr": args.learning_rate * factor, "grad_norm": grad_norm, "tokens_per_s": real / seconds,
                       "samples_per_s": rows / seconds, "supervised": supervised / real, "padding": 1 - real / padded,
                       "waiting": waited / seconds, "peak_gib": peak_gib(device)}
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{metrics['tokens_per_s']:.0f}", refresh=False)
            if progress["step"] % args.logging_steps == 0 or progress["step"] == total_steps:
                log.write("metrics.jsonl", metrics)
                if bar.disable:
                    print(f"step {progress['step']}/{total_steps} loss {loss:.4f} lr {metrics['lr']:.2e} grad_norm {grad_norm:.2f} "
                          f"{metrics['tokens_per_s']:.0f} tokens/s waiting {metrics['waiting']:.0%}", flush=True)
            end_of_epoch = progress["step"] % steps_per_epoch == 0 or progress["step"] == total_steps
            if validation_set and (progress["step"] % args.eval_steps == 0 if args.eval_steps > 0 else end_of_epoch):
                validate()
            if stop_requested or args.save_steps > 0 and progress["step"] % args.save_steps == 0:
                save_checkpoint(engine, out, progress, args.save_total_limit)
            if stop_requested:
                break
    bar.close()
    if progress["step"] < total_steps:
        print(f"stopped at step {progress['step']}; go on with --resume_from_checkpoint latest")
        return 3
    keep_template = text.version not in ("plain",)
    llava.save_pretrained(model, out / "final", source, text.tokenizer.chat_template if keep_template else None, engine.state())
    print(f"done: {out / 'final'}\n  python model.py chat --model_name_or_path {out / 'final'} --image FILE")
    return 0


def train_mode(model):
    """Dropout on where it is trained; the tower stays in eval mode, as it was when it learnt to see."""
    model.train()
    model.vision_tower.eval()


class StopFlag:
    """SIGTERM, SIGINT and SIGUSR1, and a file `stop` in the output folder, ask the loop to save and end."""

    def __init__(self, out: Path):
        self.file, self.signalled = out / "stop", False
        self.file.unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.set)

    def set(self, *_):
        self.signalled = True

    @property
    def requested(self) -> bool:
        return self.signalled or self.file.exists()


def report(step: int, metrics: dict, predictions: list[dict]):
    """Prints an evaluation: its figures, and a few questions with the answer expected and the one given."""
    tqdm.write(f"step {step}: " + ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items()))
    for p in predictions[:: max(1, len(predictions) // 4)][:4]:
        tqdm.write(f"  {'right' if p['right'] else 'wrong'}  {p['question'].splitlines()[-1][:60]!r}: {p['prediction'][:60]!r}"
                   + ("" if p["right"] else f", expected {p['answer'][:60]!r}"))


def peak_gib(device: str) -> float:
    """The most memory held so far: of the GPU where there is one, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- commands ---


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = parser.add_argument, {"type": boolean, "nargs": "?", "const": True}
    # model and data
    add("--model_name_or_path", required=True, help="a LLaVA folder, or a hub id")
    add("--data_path", required=True, help=".json or .jsonl in LLaVA's format")
    add("--validation_data_path", help="rows to evaluate on")
    add("--image_folder", help="a folder of pictures, or a .zip, read in place")
    add("--output_dir", required=True, help="where checkpoints, metrics and the trained model go")
    add("--version", choices=data.VERSIONS, help="the template; plain for projector, else the folder's own")
    add("--image_aspect_ratio", choices=["pad", "square"], help="how pictures become square; the folder's own")
    add("--model_max_length", type=int, default=2048, help="tokens of a row, pictures included; longer answers are cut")
    add("--on_bad_record", choices=["stop", "skip"], default="stop", help="what a row that cannot be used does")
    # what trains, and how
    add("--train_type", choices=list(TRAIN_TYPES), required=True, help="what trains")
    add("--num_train_epochs", type=float, default=1.0, help="epochs")
    add("--max_steps", type=int, default=-1, help="optimizer steps; -1: as the epochs say")
    add("--per_device_train_batch_size", type=int, default=16, help="rows of a micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of an optimizer step")
    add("--learning_rate", type=float, help="of the language model, and of all that has no own; LLaVA's for the train type")
    add("--mm_projector_lr", type=float, help="learning rate of the projector")
    add("--mm_vision_tower_lr", type=float, help="learning rate of the vision tower")
    add("--lr_scheduler_type", choices=["cosine", "linear", "constant"], default="cosine", help="behind the warm-up")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps with a rising learning rate")
    add("--weight_decay", type=float, default=0.0, help="AdamW's, on matrices only")
    add("--max_grad_norm", type=float, default=1.0, help="gradients of a larger norm are scaled down to it")
    add("--bf16", **flag, default=torch.cuda.is_available(), help="bf16 weights and activations, fp32 masters")
    add("--gradient_checkpointing", **flag, default=False, help="recompute the decoder's activations: less memory, more time")
    add("--group_by_modality_length", **flag, default=False, help="rows of one kind and similar length in a step")
    add("--seed", type=int, default=42, help="of order and dropout")
    add("--dataloader_num_workers", type=int, default=4, help="processes that prepare batches")
    # evaluation, saving, logging
    add("--per_device_eval_batch_size", type=int, default=16, help="rows of an evaluation batch")
    add("--eval_steps", type=int, default=-1, help="steps between evaluations; -1: every epoch")
    add("--eval_samples", type=int, default=32, help="rows whose questions are answered; -1: all")
    add("--max_new_tokens", type=int, default=64, help="tokens of an answer")
    add("--save_steps", type=int, default=500, help="steps between checkpoints; -1: none")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept; -1: all")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="a checkpoint folder of this run, or latest")
    add("--logging_steps", type=int, default=1, help="steps between lines of metrics.jsonl")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    args = parser.parse_args(argv)
    recipe = TRAIN_TYPES[args.train_type]
    args.version = args.version or recipe["version"]
    args.learning_rate = recipe["learning_rate"] if args.learning_rate is None else args.learning_rate
    args.mm_projector_lr = args.learning_rate if args.mm_projector_lr is None else args.mm_projector_lr
    args.mm_vision_tower_lr = args.learning_rate if args.mm_vision_tower_lr is None else args.mm_vision_tower_lr
    return args


def main(argv=None) -> int:
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return train(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
