"""The training loop of LLaVA: two stages, any of the train types, one process.

    projector       stage 1: the projector alone, on captions                 --version plain
    freeze_vision   stage 2: projector and language model, on instructions
    full            the vision tower too

    python train.py --model_name_or_path DIR --data_path F --image_folder DIR --output_dir DIR --train_type projector
    python train.py --model_name_or_path DIR --validation_data_path F --image_folder DIR --eval_only

What an optimizer step is:

    window = the rows of one global batch, in `gradient_accumulation_steps` micro-batches
    loss   = sum over all supervised tokens of the window / their number
    so that any split of the same rows into micro-batches, and any padding, gives the same gradients.

Precision: with --bf16, weights and activations are bf16; gradients are added up in fp32, and what trains has an fp32
master copy that the optimizer updates. Without it everything is fp32.

Sources: the recipes of LLaVA-1.5 (github.com/haotian-liu/LLaVA, scripts/v1_5), the schedule of transformers' optimization.py.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import secrets
import signal
import sys
import time
from pathlib import Path

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
            groups.setdefault((name.split(".")[0], p.ndim > 1), []).append(p)
    return [{"params": params, "lr": rates[part], "base_lr": rates[part], "name": part,
             "weight_decay": args.weight_decay if decay else 0.0} for (part, decay), params in groups.items()]


# --- engine ---


class Plain:
    """One process. Does in plain torch what DeepSpeed's engine does: fp32 gradients and masters for bf16 weights."""

    rank, world = 0, 1

    def __init__(self, model, groups: list[dict], args):
        self.model, self.max_grad_norm, self.base_lr = model, args.max_grad_norm, groups[0]["base_lr"]
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


class ZeRO:
    """Many processes, DeepSpeed's engine inside: what a process holds of gradients, masters and moments (stage 2), and of
    the weights too (stage 3), is its share.
    """

    def __init__(self, model, groups: list[dict], args):
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        self.model, self.base_lr, self.gather = model, groups[0]["base_lr"], safe_get_full_fp32_param
        config = json.loads(Path(args.deepspeed).read_text())
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                    "gradient_clipping", "optimizer", "scheduler"):
            if key in config:
                raise ValueError(f"--deepspeed {args.deepspeed}: {key} is set there; leave it to the flags of train.py")
        config |= {"train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
                   "gradient_accumulation_steps": args.gradient_accumulation_steps,
                   "gradient_clipping": args.max_grad_norm, "bf16": {"enabled": args.bf16}}
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def forward(self, *inputs):
        return self.engine(*inputs)

    def backward(self, loss, last: bool):
        """Where the accumulation ends is said by hand: the engine's own count knows nothing of windows."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def all_reduce(self, *numbers):
        total = torch.tensor(numbers, dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def step(self, factor: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> dict:
        """As `Plain.state`, gathered weight by weight; whole on rank 0, empty on the others. Frozen ones that stage 3 has
        partitioned are gathered too.
        """
        import deepspeed

        state = {}
        for name, p in self.model.named_parameters():
            if not p.requires_grad and not hasattr(p, "ds_id"):
                continue
            with deepspeed.zero.GatheredParameters([p], enabled=not p.requires_grad):
                weight = self.gather(p) if p.requires_grad else p.data
                if self.rank == 0:
                    state[name] = weight.detach().to("cpu", copy=True)
        return state

    def save(self, folder: Path):
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path):
        """DeepSpeed unpickles its own files: only checkpoints of this very run come here."""
        self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)


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
        take_faults([batch], args)
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


# --- a run on disk ---

# Flags that may differ between a run and its continuation: they change nothing that is learnt.
FREE_FLAGS = {"resume_from_checkpoint", "dataloader_num_workers", "logging_steps", "save_steps", "save_total_limit",
              "per_device_eval_batch_size", "local_rank"}


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first."""
    return sorted(out.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))


def open_run(args) -> tuple[str, Path | None]:
    """The id of the run in `output_dir` and the checkpoint to go on from; ValueError where another run lives there."""
    out, flags = Path(args.output_dir), {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    if out.resolve() == Path(args.model_name_or_path).resolve():
        raise ValueError(f"--output_dir {out}: that is the source of the model; name a new folder")
    if not (out / "run.json").is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--output_dir {out}: not empty, and no run of this program; name a new folder")
        return secrets.token_hex(8), None
    run = json.loads((out / "run.json").read_text())
    if args.resume_from_checkpoint is None:
        raise ValueError(f"--output_dir {out} holds a run: go on with --resume_from_checkpoint latest, or name a new folder")
    for name, value in flags.items():
        if run["args"].get(name) != value:
            raise ValueError(f"--output_dir {out} holds a run with --{name} {run['args'].get(name)}, not {value}: "
                             "give the same flags, or name a new folder")
    if args.resume_from_checkpoint == "latest":
        return run["id"], next(reversed(checkpoints(out)), None)
    return run["id"], Path(args.resume_from_checkpoint)


def save_checkpoint(engine, out: Path, progress: dict, limit: int):
    """All that a run needs to go on bit for bit, written aside, then renamed; `limit` are kept."""
    target = out / f"checkpoint-{progress['step']}"
    part = target.with_suffix(".part")
    part.mkdir(exist_ok=True)
    engine.save(part)
    torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
               part / f"rng-{engine.rank}.pt")
    engine.all_reduce(0)  # every rank has written its share
    if engine.rank == 0:
        (part / "progress.json").write_text(json.dumps(progress))
        llava.replace_folder(part, target)
        for old in checkpoints(out)[:-limit] if limit > 0 else []:
            llava.remove_folder(old)
    engine.all_reduce(0)


def load_checkpoint(engine, folder: Path, run_id: str) -> dict:
    """Restores what `save_checkpoint` wrote, and returns its progress."""
    if not (folder / "progress.json").is_file():
        raise FileNotFoundError(f"--resume_from_checkpoint {folder}: no checkpoint there")
    progress = json.loads((folder / "progress.json").read_text())
    if progress["run"] != run_id:
        raise ValueError(f"--resume_from_checkpoint {folder}: that is another run's; only its own can go on")
    engine.load(folder)
    rng = torch.load(folder / f"rng-{engine.rank}.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    torch.cuda.set_rng_state_all(rng["cuda"])
    return progress


class Log:
    """metrics.jsonl and predictions.jsonl. A run that goes on from `step` takes back the lines behind it."""

    def __init__(self, out: Path, step: int, rank: int):
        self.out, self.rank = out, rank
        for path in (out / "metrics.jsonl", out / "predictions.jsonl") if rank == 0 else ():
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))

    def write(self, name: str, *rows: dict):
        if self.rank > 0:
            return
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1, and a file `stop` in the output folder, ask the loop to save and end: no more."""

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self):
        self.signalled, self.file = False, None
        self.before = [signal.signal(number, self._set) for number in self.signals]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.signals, self.before):
            signal.signal(number, handler)

    def _set(self, *_):
        self.signalled = True

    def watch(self, out: Path):
        self.file = out / "stop"
        self.file.unlink(missing_ok=True)  # an earlier run's

    def __bool__(self):
        return self.signalled or self.file.exists()


# --- what people see ---


def describe(model, args, steps_per_epoch: int, total_steps: int, rows: int, world: int):
    """Prints what trains, the batch arithmetic, and the memory that follows from both."""
    print(f"{'module':<24}{'parameters':>16}{'trainable':>16}  dtype")
    for name, part in model.named_children():
        count, trainable = (sum(p.numel() for p in part.parameters() if p.requires_grad or every) for every in (True, False))
        print(f"{name:<24}{count:>16,}{trainable:>16,}  {str(next(part.parameters()).dtype).removeprefix('torch.')}")
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    print(f"batch: {micro} rows x {accumulation} accumulated x {world} processes = {micro * accumulation * world} rows a step")
    print(f"steps: {rows:,} rows, {steps_per_epoch:,} steps an epoch, {total_steps:,} in all")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {"weights": weights, "masters": 4 * training * args.bf16, "gradients": 4 * training, "moments": 8 * training}
    print("memory: " + ", ".join(f"{what} {size / 2**30:.2f} GiB" for what, size in sizes.items()), flush=True)


def count_flops(model, batch: dict) -> int:
    """Floating-point operations of a training step on a batch: two for each weight and token in the forward pass, two
    where a gradient passes through, two where the weight trains; attention's products likewise. Recomputation is not
    counted, nor what is never run.
    """
    (rows, width), (pictures, *_) = batch["input_ids"].shape, batch["pixel_values"].shape
    vision, text = model.config.vision_config, model.config.text_config
    patches, supervised = model.tokens_per_picture + 1, (batch["labels"][:, 1:] >= 0).sum().item()
    head = model.language_model.get_output_embeddings()
    parts = [  # module, tokens, products of attention with the values and keys of all tokens before
        (model.vision_tower, pictures * patches,
         4 * pictures * patches**2 * vision.hidden_size * model.vision_tower.vision_model.config.num_hidden_layers),
        (model.multi_modal_projector, pictures * patches, 0),
        (model.language_model.base_model, rows * width, 2 * rows * width**2 * text.hidden_size * text.num_hidden_layers),
        (head, supervised, 0)]
    total, gradient = 0, False
    for part, tokens, attention in parts:
        weights = [m.weight for m in part.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        size = sum(w.numel() for w in weights)
        training = sum(w.numel() for w in weights if w.requires_grad)
        gradient = gradient or training > 0
        total += (2 * size * tokens + attention) * (1 + gradient) + 2 * training * tokens + attention * gradient
    return total


def matmul_rate(device: str, dtype) -> float:
    """The device's own best rate in products of square matrices, in FLOP/s: what MFU is a share of."""
    n, seconds = 4096 if device == "cuda" else 512, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def peak_gib(device: str) -> float:
    """The most memory held so far: on the GPU where there is one, else by this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def window_metrics(model, window: list[dict], seconds: float, waited: float, rate: float) -> dict:
    """Speed and shape of one optimizer step."""
    real, padded = sum(sum(b["lengths"]) for b in window), sum(b["input_ids"].numel() for b in window)
    supervised = sum((b["labels"] >= 0).sum().item() for b in window)
    return {"tokens_per_s": real / seconds, "samples_per_s": sum(row >= 0 for b in window for row in b["rows"]) / seconds,
            "mfu": sum(count_flops(model, b) for b in window) / seconds / rate, "supervised": supervised / real,
            "padding": 1 - real / padded, "waiting": waited / seconds}


class Progress:
    """One line that moves in a terminal, and whole lines in a log file."""

    def __init__(self, total: int, done: int, rank: int):
        self.bar = tqdm(total=total, initial=done, disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True,
                        bar_format="{n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}")

    def show(self, m: dict, log: bool):
        text = (f"loss {m['loss']:.3f} lr {m['lr']:.1e} {m['tokens_per_s']:.0f} tok/s sup {m['supervised']:.0%} "
                f"pad {m['padding']:.0%} wait {m['waiting']:.0%} mfu {m['mfu']:.0%} {m['peak_gib']:.1f}G")
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if log and self.bar.disable:
            print(f"{m['step']}/{self.bar.total} {text}", flush=True)


def report(step: int, metrics: dict, predictions: list[dict]):
    """Prints an evaluation: its figures, and a few questions with the answer expected and the one given."""
    kinds = {name.split("/")[1]: value for name, value in metrics.items() if "/" in name}
    tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name))
    tqdm.write("".join(f"  {kind} {value:.1%}" for kind, value in kinds.items())) if kinds else None
    for p in predictions[:: max(1, len(predictions) // 4)][:4]:
        asked, given = p["question"].splitlines()[-1][:44], p["prediction"][:24]
        tqdm.write(f"  {'right' if p['right'] else 'WRONG'}  {asked} > {given}" + ("" if p["right"] else f" (not {p['answer'][:24]})"))


# --- the loop ---


class FirstWindow:
    """Proves once that what should train does: a finite gradient for each of its weights, and none for the frozen ones."""

    def __init__(self, model):
        self.model, self.finite = model, {}
        self.hooks = [p.register_hook(lambda gradient, name=name: self._note(name, gradient))
                      for name, p in model.named_parameters() if p.requires_grad]

    def _note(self, name: str, gradient):
        self.finite[name] = self.finite.get(name, True) and bool(torch.isfinite(gradient).all())

    def check(self):
        for name, p in self.model.named_parameters():
            if p.requires_grad and not self.finite.get(name, False):
                raise ValueError(f"{name} should train, but its gradient is {'not finite' if name in self.finite else 'missing'}")
            assert p.requires_grad or p.grad is None, f"{name} is frozen, but has a gradient"
        for hook in self.hooks:
            hook.remove()


def training_mode(model):
    """Dropout where it is asked for; the tower stays in eval mode, as it was when it learnt to see."""
    model.train()
    model.vision_tower.eval()


def take_faults(batches: list[dict], args) -> int:
    """How many rows of these batches could not be used; the first stops the run unless `--on_bad_record skip`."""
    faults = [fault for batch in batches for fault in batch["faults"]]
    if faults and args.on_bad_record == "stop":
        raise ValueError(f"{faults[0]} (or go on without such rows: --on_bad_record skip)")
    for fault in faults:
        tqdm.write(f"skipped: {fault}")
    return len(faults)


def train(args, stop: StopRequest) -> int:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    source = llava.resolve(args.model_name_or_path)
    text = data.ChatText(AutoTokenizer.from_pretrained(source), args.version)
    train_set, eval_set = (path and data.open_dataset(
        path, args.image_folder, source, args.version, args.image_aspect_ratio, args.model_max_length, "skip", text)
        for path in (args.data_path, args.validation_data_path))
    model = llava.from_pretrained(source, dtype, device)
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    if args.eval_only:
        metrics, predictions = evaluate(model, eval_set, collate, args, device)
        report(0, metrics, predictions)
        return 0

    run_id, checkpoint = open_run(args)
    out = Path(args.output_dir)
    if (out / "final").is_dir():
        print(f"{out}: this run is complete")
        return 0
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] in TRAIN_TYPES[args.train_type]["modules"])
    if args.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = (ZeRO if args.deepspeed else Plain)(model, parameter_groups(model, args), args)

    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = train_set.records
    steps_of = lambda epoch: data.plan_epoch(  # noqa: E731
        rows.lengths, rows.has_picture, micro * accumulation * engine.world, args.seed, epoch, args.group_by_modality_length)
    steps_per_epoch = len(steps_of(0))
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
    describe(model, args, steps_per_epoch, total_steps, len(rows), engine.world)

    progress = {"run": run_id, "step": 0, "skipped": 0, "cut": 0}
    if checkpoint:
        progress = load_checkpoint(engine, checkpoint, run_id)
        print(f"going on from {checkpoint}")
    if engine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps({"id": run_id, "args": vars(args)}, indent=2))
    stop.watch(out)
    log, bar = Log(out, progress["step"], engine.rank), Progress(total_steps, progress["step"], engine.rank)
    rate, first_window = matmul_rate(device, dtype), FirstWindow(model)

    def validate():
        metrics, predictions = evaluate(model, eval_set, collate, args, device)
        log.write("metrics.jsonl", {"step": progress["step"], **metrics})
        log.write("predictions.jsonl", *({"step": progress["step"], **p} for p in predictions))
        report(progress["step"], metrics, predictions)

    if eval_set and progress["step"] == 0:
        validate()
    stopping = False
    while progress["step"] < total_steps and not stopping:
        epoch, start = divmod(progress["step"], steps_per_epoch)
        batches = iter(DataLoader(
            train_set, batch_sampler=data.WindowSampler(steps_of(epoch), accumulation, engine.world, engine.rank, start),
            collate_fn=collate, num_workers=args.dataloader_num_workers, pin_memory=device == "cuda",
            multiprocessing_context="fork" if args.dataloader_num_workers else None))
        for _ in range(min(steps_per_epoch - start, total_steps - progress["step"])):
            # The whole window is fetched first, because its loss is divided by the number of its supervised tokens.
            began = time.perf_counter()
            window = [next(batches) for _ in range(accumulation)]
            waited = time.perf_counter() - began
            progress["skipped"] += take_faults(window, args)
            progress["cut"] += sum(batch["cut"] for batch in window)
            supervised = sum((batch["labels"] >= 0).sum().item() for batch in window)
            supervised, stopping = engine.all_reduce(supervised, int(bool(stop)))

            training_mode(model)
            loss = 0.0
            for i, batch in enumerate(window):
                loss_sum, _ = engine.forward(*to_device(batch, device))
                engine.backward(loss_sum * engine.world / max(supervised, 1), last=i == accumulation - 1)
                loss += loss_sum.detach()
            loss, = engine.all_reduce(loss.item() / max(supervised, 1))
            if not math.isfinite(loss):
                raise ValueError(f"step {progress['step'] + 1}: the loss is {loss}. Its records: "
                                 f"{[rows.where(r) for batch in window for r in batch['rows'] if r >= 0]}")
            first_window = first_window and first_window.check()
            factor = schedule(progress["step"], total_steps, warmup_steps, args.lr_scheduler_type)
            grad_norm = engine.step(factor)
            progress["step"] += 1

            step, finished = progress["step"], progress["step"] == total_steps
            metrics = {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": engine.base_lr * factor,
                       "grad_norm": grad_norm, "peak_gib": peak_gib(device),
                       **window_metrics(model, window, time.perf_counter() - began, waited, rate)}
            bar.show(metrics, step % args.logging_steps == 0 or finished)
            if step % args.logging_steps == 0 or finished:
                log.write("metrics.jsonl", metrics)
            if eval_set and (step % args.eval_steps == 0 if args.eval_steps > 0 else step % steps_per_epoch == 0 or finished):
                validate()
            if step == steps_per_epoch and (progress["skipped"] or progress["cut"]):
                tqdm.write(f"in this epoch {progress['skipped']} rows were skipped, {progress['cut']} cut at their end")
            if stopping or args.save_steps > 0 and step % args.save_steps == 0:
                save_checkpoint(engine, out, progress, args.save_total_limit)
            if stopping:
                break
    bar.bar.close()
    if progress["step"] < total_steps:
        print(f"stopped after step {progress['step']} of {total_steps}: go on with --resume_from_checkpoint latest")
        return 3
    template, state = None if args.version == "plain" else text.tokenizer.chat_template, engine.state()
    if engine.rank == 0:
        llava.save_pretrained(model, out / "final", source, template, state)
    print(f"done: {out / 'final'}\n  python model.py chat --model_name_or_path {out / 'final'} --image FILE")
    return 0


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
    add("--data_path", help=".json or .jsonl in LLaVA's format")
    add("--validation_data_path", help="rows to evaluate on")
    add("--image_folder", help="a folder of pictures, or a .zip, read in place")
    add("--output_dir", help="where checkpoints, metrics and the trained model go")
    add("--version", choices=data.VERSIONS, help="the template; plain for projector, else the folder's own")
    add("--image_aspect_ratio", choices=["pad", "square"], help="how pictures become square; the folder's own")
    add("--model_max_length", type=int, default=2048, help="tokens of a row, pictures included; longer answers are cut")
    add("--on_bad_record", choices=["stop", "skip"], default="stop", help="what a row that cannot be used does")
    # what trains, and how
    add("--train_type", choices=list(TRAIN_TYPES), help="what trains")
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
    add("--eval_only", **flag, default=False, help="evaluate, and train nothing")
    add("--eval_steps", type=int, default=-1, help="steps between evaluations; -1: every epoch")
    add("--eval_samples", type=int, default=32, help="rows whose questions are answered; -1: all")
    add("--max_new_tokens", type=int, default=64, help="tokens of an answer")
    add("--save_steps", type=int, default=500, help="steps between checkpoints; -1: none")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept; -1: all")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="a checkpoint folder of this run, or latest")
    add("--logging_steps", type=int, default=1, help="steps between lines of metrics.jsonl")
    # many processes
    add("--deepspeed", help="ds_zero2.json or ds_zero3.json")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    args = parser.parse_args(argv)
    needed = ("validation_data_path",) if args.eval_only else ("data_path", "output_dir", "train_type")
    for name in needed:
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed")
    recipe = TRAIN_TYPES[args.train_type or "freeze_vision"]
    for name, default in (("version", recipe["version"]), ("learning_rate", recipe["learning_rate"])):
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name in ("mm_projector_lr", "mm_vision_tower_lr"):
        if getattr(args, name) is None:
            setattr(args, name, args.learning_rate)
    return args


def start_processes(args):
    """Joins the launcher's processes; alone, this is one of one."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 29500)):
        os.environ.setdefault(name, str(value))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.deepspeed:
        import deepspeed

        if not Path(args.deepspeed).is_file():
            raise FileNotFoundError(f"--deepspeed {args.deepspeed}: no such file")
        deepspeed.init_distributed()
    elif int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError("several processes need --deepspeed ds_zero2.json (or ds_zero3.json)")


def main(argv=None) -> int:
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        start_processes(args)
        with StopRequest() as stop, open(os.devnull, "w") as quiet:
            with contextlib.redirect_stdout(quiet if int(os.environ["RANK"]) else sys.stdout):
                return train(args, stop)
    except (ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
