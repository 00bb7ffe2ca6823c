"""Training LLaVA: two stages, one process or many, one loop.

    projector       stage 1: the projector alone, on captions (template `plain`)
    freeze_vision   stage 2: projector and language model, on instructions
    full            stage 2, and the vision tower too
    use_lora        stage 2, of the language model only low-rank adapters; --bits 4 makes it QLoRA

    python train.py --model_name_or_path DIR --train_type projector --data_path F --image_folder DIR
                    --output_dir DIR
    deepspeed train.py --deepspeed ds_zero2.json (the same flags)

An optimizer step sees one window: the rows of a global batch, as `gradient_accumulation_steps`
micro batches on each of `world` processes. Its loss is

    sum over all supervised tokens of the window / their number

so any split of the same rows, and any padding, gives the same gradients, but for dropout. An engine
(engines.py) steps: plain torch, or DeepSpeed's ZeRO where --deepspeed names its file. SIGTERM,
SIGINT, SIGUSR1 and a file OUTPUT_DIR/stop ask a run to save after its step and end with status 3.

With --bf16, weights and activations are bf16, gradients are added up in fp32, and what trains has
an fp32 master copy, which the optimizer updates and checkpoints hold. Without it all is fp32.

Sources: LLaVA-1.5's recipes (github.com/haotian-liu/LLaVA, scripts/v1_5), the schedules of
transformers/optimization.py, ZeRO (arXiv:1910.02054).
"""

import argparse
import contextlib
import functools
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import cli
import data
import engines
import evaluate
import fast
import lora
import model as llava
import order
import ranks
import report

# --- the recipe of each train type ---

# What trains whole (use_lora's adapters come on top), and LLaVA-1.5's learning rate, rows of a
# micro batch, and template. Its global batch is 256 rows in stage 1, 128 in stage 2, on eight GPUs.
TRAIN_TYPES = {
    "projector": (["multi_modal_projector"], 1e-3, 32, "plain"),
    "freeze_vision": (["multi_modal_projector", "language_model"], 2e-5, 16, "own"),
    "full": (["vision_tower", "multi_modal_projector", "language_model"], 2e-5, 16, "own"),
    "use_lora": (["multi_modal_projector"], 2e-4, 16, "own"),
}
SCHEDULES = {  # after the warm-up: the share of the learning rate, by the share of steps done
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
LORA_PROJECTOR_LR = 2e-5  # published too: the projector has learnt already, the adapters have not
NEW_ADAPTER = {
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "lora_target_modules": llava.DECODER,
    "use_rslora": False,
}


# --- the flags ---


def parse(argv) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    number, count, rate = cli.number, cli.number(int, 1), cli.number(float, 0, 1e3)
    count_or_off, group = cli.count_or_off, parser.add_argument_group
    gpu, cores = torch.cuda.is_available(), cli.cores()

    add = group("model and data").add_argument
    add("--model_name_or_path", required=True, help="a LLaVA folder, or a hub id")
    add("--data_path", required=True, help="rows, .json or .jsonl")
    add("--validation_data_path", help="rows to evaluate on")
    add("--image_folder", help="a folder of pictures, or a .zip, read in place")
    add("--output_dir", required=True, help="where checkpoints, figures and the model go")
    add("--version", choices=data.VERSIONS, help="template; default plain for projector, else own")
    add("--image_aspect_ratio", choices=["pad", "square"], help="default: as the model's folder")
    add("--model_max_length", type=count, default=2048, help="tokens of a row, with its pictures'")
    add("--on_bad_record", choices=["stop", "skip"], default="stop", help="rows that do not work")

    add = group("what trains").add_argument
    add("--train_type", required=True, choices=list(TRAIN_TYPES), help="projector is stage 1")
    add("--bits", type=int, choices=[16, 4], default=16, help="4: the decoder in nf4 (QLoRA)")
    add("--adapter", help="an adapter to go on from, in place of a new one")
    add("--lora_r", type=number(int, 1, 2**16), help="rank; default 128")
    add("--lora_alpha", type=number(float, 1e-6, 1e6), help="output counts alpha / r; default 256")
    add("--lora_dropout", type=number(float, 0, 0.99), help="share of inputs; default 0.05")
    add("--lora_target_modules", help="names, as q_proj,v_proj, or a regex on paths; default all")
    add("--use_rslora", **cli.BOOLEAN, help="alpha / sqrt(r) instead of alpha / r")

    add = group("optimizer and schedule").add_argument
    add("--num_train_epochs", type=number(float, 1e-6, 1e6), default=1.0, help="passes over rows")
    add("--max_steps", type=count_or_off, default=-1, help="optimizer steps; -1: as epochs say")
    add("--per_device_train_batch_size", type=count, help="rows of a micro batch; default 16 or 32")
    add("--gradient_accumulation_steps", type=count, default=1, help="micro batches of a step")
    add("--learning_rate", type=rate, help="default: LLaVA-1.5's for the train type")
    add("--mm_projector_lr", type=rate, help="default: the same; with use_lora 2e-5")
    add("--mm_vision_tower_lr", type=rate, help="default: the same")
    add("--lr_scheduler_type", choices=list(SCHEDULES), default="cosine", help="after the warm-up")
    add("--warmup_ratio", type=number(float, 0, 1), default=0.03, help="share of all steps")
    add("--weight_decay", type=rate, default=0.0, help="AdamW's, on matrices only")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="of clipping; 0: none")
    add("--group_by_modality_length", **cli.BOOLEAN, default=False, help="like rows share a step")
    add("--seed", type=number(int, 0), default=42, help="of order and dropout")

    add = group("memory and speed").add_argument
    add("--bf16", **cli.BOOLEAN, default=gpu, help="else fp32; default where there is a GPU")
    add("--tf32", **cli.BOOLEAN, default=False, help="fp32 products of matrices in TensorFloat-32")
    add("--gradient_checkpointing", **cli.BOOLEAN, help="default: on, but not in stage 1")
    add("--dataloader_num_workers", type=number(int, 0), default=min(4, cores), help="processes")
    add("--deepspeed", help="ds_zero2.json or ds_zero3.json, under the deepspeed launcher")
    offloaded = "to the host's memory: the optimizer, or (ZeRO-3) the weights too"
    add("--offload", choices=list(engines.OFFLOADED), default="none", help=offloaded)
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    add("--dry_run", **cli.BOOLEAN, default=False, help="measure memory and time, write nothing")

    add = group("evaluation, saving, logging").add_argument
    add("--per_device_eval_batch_size", type=count, help="rows; default as in training")
    add("--eval_steps", type=count_or_off, default=-1, help="steps between; -1: every epoch")
    add("--eval_samples", type=number(int, -1), default=32, help="rows to ask about; -1: all")
    add("--early_stopping_patience", type=count, help="evaluations without a better loss")
    add("--max_new_tokens", type=count, default=64, help="tokens of an answer")
    add("--save_steps", type=count_or_off, default=500, help="steps between; -1: none")
    add("--save_total_limit", type=count_or_off, default=2, help="checkpoints kept; -1: all")
    resumed = "a checkpoint, or latest, which begins where there is none"
    add("--resume_from_checkpoint", nargs="?", const="latest", help=resumed)
    add("--logging_steps", type=count, default=1, help="steps between lines of metrics.jsonl")
    add("--report_to", choices=list(report.TRACKERS), default="none", help="a tracker of figures")

    args = parser.parse_args(argv)
    resume = args.resume_from_checkpoint
    args.resume_from_checkpoint = {"True": "latest", "False": None}.get(resume, resume)  # Trainer's
    for message in contradictions(args):
        parser.error(message)
    fill_in(args)
    return args


def contradictions(args):
    """What to say of flags that would train something else in silence."""
    new_adapter = args.train_type == "use_lora" and not args.adapter
    for_new = [f"--{name}" for name in NEW_ADAPTER if getattr(args, name) is not None]
    empty = [f"--{name}" for name, value in vars(args).items() if value == ""]
    if empty:
        yield f"{' '.join(empty)} is empty: leave it out"
    if for_new and not new_adapter:
        only = "a new adapter (--train_type use_lora without --adapter)"
        yield f"{' '.join(for_new)} is for {only}: leave it out"
    if args.train_type != "use_lora" and (args.bits == 4 or args.adapter):
        yield f"--train_type {args.train_type}: --bits 4 and --adapter are for use_lora"
    if args.train_type == "use_lora" and args.image_aspect_ratio:
        yield "--image_aspect_ratio: an adapter sees pictures as its base does: leave it out"
    if args.early_stopping_patience and not args.validation_data_path:
        yield "--early_stopping_patience needs --validation_data_path"
    if args.offload != "none" and not args.deepspeed:
        yield f"--offload {args.offload} needs --deepspeed ds_zero2.json, or ds_zero3.json"
    if args.deepspeed and not report.is_installed("deepspeed"):
        yield "--deepspeed needs the package deepspeed, which is for Linux: leave it out"
    if args.report_to != "none" and not report.is_installed(args.report_to):
        yield f"--report_to {args.report_to}: not installed, `pip install {args.report_to}`"


def fill_in(args):
    """The defaults that depend on other flags."""
    _, published, micro, version = TRAIN_TYPES[args.train_type]
    rate = published if args.learning_rate is None else args.learning_rate
    defaults = {
        "version": version,
        "learning_rate": rate,
        "mm_projector_lr": LORA_PROJECTOR_LR if args.train_type == "use_lora" else rate,
        "mm_vision_tower_lr": rate,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": args.per_device_train_batch_size or micro,
        "gradient_checkpointing": args.train_type != "projector",
    }
    if not args.adapter:
        defaults |= NEW_ADAPTER
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


# --- the model: what trains, and how it is saved ---


def trained_whole(model, train_type: str) -> tuple:
    """The parts that train whole. PEFT keeps a part frozen where it has adapters, and so do we."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, lora.LoRA)]
    parts = TRAIN_TYPES[train_type][0]
    return tuple(
        part for part in parts if not any(lora.is_inside(name, [part]) for name in adapted)
    )


def add_adapters(model, args, dtype):
    targets = lora.paths_of(args.lora_target_modules, llava.DECODER)
    options = args.lora_r, args.lora_alpha, args.lora_dropout, args.use_rslora
    names = lora.inject(model, targets, *options, dtype)
    for word in args.lora_target_modules.split(","):
        if word.isidentifier() and not any(name.endswith(f".{word}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            fault = f"{word} is no layer of the decoder, as {known}"
            raise ValueError(f"--lora_target_modules: {fault}")
    outside = [name for name in names if not re.fullmatch(llava.DECODER, name)]
    if outside:
        where = f"--lora_target_modules {args.lora_target_modules}: matches {outside[0]}"
        raise ValueError(f"{where}; adapters are for the decoder's layers only")
    print(report.fold(names))


def load_model(args, source: Path, device: str, stage: int = 0):
    """The model as the flags want it: in 4 bits or not, with an adapter or not, what trains set.

    For ZeRO-3 its weights stay mapped from the file until `ZeRO.partition` takes them.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    storage = dtype if stage == 3 else torch.uint8  # ZeRO-3 cannot partition bytes
    kept, place = dtype, device
    if stage == 3 and args.bits == 16:
        kept, place = (dtype if args.adapter else None), "cpu"  # None: as in the file
    model = evaluate.open_model(source, args.adapter, args.bits, kept, place, storage)
    if args.train_type == "use_lora" and not args.adapter:
        add_adapters(model, args, dtype)
    trained = trained_whole(model, args.train_type)
    for name, p in model.named_parameters():
        trains = lora.is_inside(name, trained) or ".lora." in name
        if args.adapter and p.requires_grad and not trains:
            advice = "merge it, and train a new adapter on that"
            raise ValueError(f"--adapter {args.adapter}: it trains {name} whole; {advice}")
        p.requires_grad_(trains)
    if args.gradient_checkpointing:
        decoder = model.language_model  # of its layers the inputs alone are kept
        older_name = decoder.gradient_checkpointing_enable
        getattr(decoder, "activation_checkpointing_enable", older_name)({"use_reentrant": False})
    return fast.enable(model)  # without this line all numbers are the same, only slower


@functools.cache
def base_fingerprint(source: Path) -> str:
    return lora.fingerprint(llava.open_weights(source), llava.transformers_name)


def write_result(model, args, text, source: Path, state: dict, folder: Path):
    """What was trained, in a folder: an adapter in PEFT's format, or else a whole model."""
    if args.train_type != "use_lora":  # `plain` is for training only: it is no folder's template
        ratio = args.image_aspect_ratio
        llava.save_pretrained(model, folder, source, text.chat_template, state, ratio)
        return
    folder.mkdir(parents=True, exist_ok=True)
    llava.copy_side_files(source, folder)  # tokenizer and processor, for people who have it alone
    if text.chat_template:
        llava.write_template(text.chat_template, folder)
    whole, typed = trained_whole(model, args.train_type), args.model_name_or_path
    base = base_fingerprint(source)
    lora.save(model, folder, base, llava.transformers_name, whole, state, typed)


# --- optimizer and schedule ---


def make_optimizer(parameters: dict, args) -> torch.optim.AdamW:
    """AdamW over {name: parameter}: a learning rate for each part, decay on matrices only."""
    rates = {
        "vision_tower": args.mm_vision_tower_lr,
        "multi_modal_projector": args.mm_projector_lr,
        "language_model": args.learning_rate,
    }
    groups = {}
    for name, p in parameters.items():
        part = name.split(".")[0]
        is_matrix = len(lora.true_shape(p)) > 1  # ZeRO-3 leaves none of a weight's dimensions
        new = {"params": [], "lr": rates[part], "base_lr": rates[part]}
        new["weight_decay"] = args.weight_decay * is_matrix
        groups.setdefault((part, is_matrix), new)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.999), eps=1e-8, fused=True)


def open_engine(model, args, config: dict | None):
    """What the loop steps with; config is that of --deepspeed, which many processes need."""
    maker = functools.partial(make_optimizer, args=args)
    if config:
        return engines.ZeRO(model, maker, config)
    return engines.Plain(model, maker, args.max_grad_norm)


def schedule(step: int, total_steps: int, warmup_steps: int, kind: str) -> float:
    """The factor on the learning rates at `step`, from 0: linear warm-up, then as `kind` says."""
    if step < warmup_steps:
        return step / warmup_steps
    return SCHEDULES[kind]((step - warmup_steps) / max(1, total_steps - warmup_steps))


# --- what a run is ---


def rows_a_step(args) -> int:
    """The rows of a global batch."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return rows * int(os.environ["WORLD_SIZE"])


def training_mode(model):
    """Dropout where it is asked for; the tower stays in eval mode, as when it learnt to see."""
    model.train()
    model.vision_tower.eval()


class Run:
    """What a run consists of, made from its flags; it begins, or goes on from a checkpoint."""

    def __init__(self, args, source: Path, config: dict | None, run_id: str, same: dict):
        self.args, self.source, self.out = args, source, Path(args.output_dir)
        self.device = cli.find_device()
        self.text = data.ChatText(llava.open_tokenizer(source, args.adapter), args.version)
        self.rows = evaluate.open_rows(args, args.data_path, source, self.text)
        self.validation = evaluate.open_rows(args, args.validation_data_path, source, self.text)
        stage = config["zero_optimization"]["stage"] if config else 0
        self.model = load_model(args, source, self.device, stage)
        image_token_id = self.model.config.image_token_id
        self.collate = data.Collator(image_token_id, self.model.tokens_per_picture)
        self.engine = open_engine(self.model, args, config)
        self.per_epoch = len(self.plan(0))  # steps
        self.total = math.ceil(self.per_epoch * args.num_train_epochs)
        self.total = args.max_steps if args.max_steps > 0 else self.total
        report.before_step_1(self, args)
        tried = min(5, self.per_epoch, self.total)  # of --dry_run: the heaviest step comes first
        self.last_step = tried if args.dry_run else self.total
        self.begin(run_id, same)

    def plan(self, epoch: int):
        """The rows of each step of an epoch: (steps, rows)."""
        args, rows = self.args, rows_a_step(self.args)
        by_modality = args.group_by_modality_length
        return order.plan_epoch(self.rows.records, rows, args.seed, epoch, by_modality)

    def begin(self, run_id: str, same: dict):
        self.progress = {"run": run_id, "step": 0, "supervised": 0, "skipped": 0, "cut": 0}
        self.progress["evaluations"] = []  # step and loss of each
        self.log, args = report.Silent(), self.args
        if args.dry_run:
            return
        if self.engine.rank == 0:
            self.lock = checkpoint.begin(self.out, run_id, same, vars(args))  # open until the end
            (self.out / "stop").unlink(missing_ok=True)  # an earlier run's
        if args.resume_from_checkpoint:
            found = checkpoint.load(self.engine, self.out, args.resume_from_checkpoint, run_id)
            self.progress = found or self.progress
        if self.engine.rank == 0:
            self.log = report.Log(self.out, run_id, self.progress["step"] or -1, vars(args))

    def windows(self):
        """This rank's micro-batches of each optimizer step that is left."""
        args, engine = self.args, self.engine
        place = self.per_epoch, self.progress["step"]
        share = args.gradient_accumulation_steps, engine.world, engine.rank
        options = self.collate, args.dataloader_num_workers, self.device == "cuda"
        return order.windows(self.plan, *place, *share, self.rows, *options)

    def validate(self):
        rows, step = self.validation, self.progress["step"]
        options = evaluate.options_of(self.args, self.device) | {"step": step}
        metrics, answers = evaluate.evaluate(self.model, rows, self.engine, self.collate, **options)
        report.show_evaluation(metrics, answers)
        self.log.evaluation(metrics, answers, rows.records, rows.pictures)
        self.progress["evaluations"].append([step, metrics["eval_loss"]])
        if self.since_best() == 0:
            self.keep("best")
        training_mode(self.model)

    def since_best(self) -> int:
        """The evaluations since that with the lowest loss: 0 where the last is the best so far."""
        losses = [loss for _, loss in self.progress["evaluations"]]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def write(self, folder: Path | None):
        """Writes what has been trained so far; every rank calls it, as it gathers."""
        state = self.engine.state(frozen=self.args.train_type != "use_lora")
        if self.engine.rank == 0:
            write_result(self.model, self.args, self.text, self.source, state, folder)

    def keep(self, name: str):
        """Writes it to a folder of that name, or nothing."""
        writes = self.engine.rank == 0
        with cli.written(self.out / name) if writes else contextlib.nullcontext() as part:
            self.write(part)

    def save(self):
        """A checkpoint; that of a LoRA run is a complete adapter, too."""
        also = self.write if self.args.train_type == "use_lora" else None
        limit = self.args.save_total_limit
        checkpoint.save(self.engine, self.out, self.progress, limit, also)

    def check_finite(self, loss: float, norm: float, window: list[dict]):
        """Stops all ranks, before anything is saved, and names the records of the window."""
        if not math.isfinite(loss + norm):
            rows = [self.rows.records.where(i) for b in window for i in b["rows"] if i >= 0]
            found = f"the loss is {loss}, the norm of the gradient {norm}"
            where = f"step {self.progress['step'] + 1}: {found}; not saved; its records: "
            raise ValueError(where + "; ".join(self.engine.gather(rows)))

    def check_learning(self):
        """At the end of the first epoch, and of all: has it learnt from anything?"""
        step, progress = self.progress["step"], self.progress
        if step not in (self.per_epoch, self.total):
            return
        if progress["skipped"] + progress["cut"]:
            tqdm.write(f"{progress['skipped']} rows were skipped, {progress['cut']} cut short")
        if not progress["supervised"]:
            fault = f"after {step} steps it has learnt from no token, as no row could be used"
            raise ValueError(f"{self.args.data_path}: {fault}: `python check.py` says why")


def make_run(args, source: Path, config: dict | None) -> Run | None:
    """The run of these flags, or None where it is complete."""
    if args.dry_run:
        return Run(args, source, config, run_id="", same={})
    out, flags = Path(args.output_dir), vars(args) | {"model_name_or_path": source}
    same = checkpoint.what_must_stay(flags, rows_a_step(args), base_fingerprint(source))
    run_id = checkpoint.open_run(out, same, args.resume_from_checkpoint)
    if (out / "final").is_dir():
        print(f"{out}: this run is complete")
        return None
    return Run(args, source, config, run_id, same)


# --- the loop ---


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def train(run: Run, args, signals: list) -> int:
    """Trains; 0 when it is done, 3 when it was asked to stop: by `signals`, which fills as they
    come, or by a file `stop` in `output_dir`.
    """
    out, engine, progress, stopping, durations = run.out, run.engine, run.progress, False, []
    patience = args.early_stopping_patience or math.inf
    if run.validation and not progress["step"] and not args.dry_run:
        run.validate()
    training_mode(run.model)
    # The rate is 0 in the first step of a warm-up; at least one step must come after it.
    warmup = min(math.ceil(args.warmup_ratio * run.total), run.total - 1)
    bar = report.Progress(run.total, progress["step"], engine.rank)
    windows = run.windows()

    while progress["step"] < run.last_step and run.since_best() < patience and not stopping:
        # One window is this rank's micro batches of one optimizer step. All are fetched before any
        # runs: the loss is divided by all their supervised tokens, on all ranks.
        began = time.perf_counter()
        window = next(windows)
        waited = time.perf_counter() - began
        for batch in window:
            evaluate.stop_or_skip(batch["faults"], args.on_bad_record)
        asked = bool(signals) or (out / "stop").exists()
        totals = engine.sum(*order.numbers_of(window), asked)
        supervised, tokens, padded, rows, cut, skipped, stopping = totals  # of all ranks

        # Dropout: a resumed run draws the same, so no generator's state is ever saved.
        torch.manual_seed(seed_of(args.seed, progress["step"], engine.rank))
        sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # loss, tokens right
        for i, batch in enumerate(window):
            inputs = (batch[key].to(run.device) for key in ("input_ids", "pixel_values", "labels"))
            loss, right = engine.forward(*inputs)  # sums over supervised positions
            # DeepSpeed averages gradients over ranks: * world makes the average a sum again.
            engine.backward(loss * engine.world / max(supervised, 1), last=i == len(window) - 1)
            sums += torch.stack([loss.detach(), right])
        loss, right = (total / max(supervised, 1) for total in engine.sum(*sums.tolist()))
        factor = schedule(progress["step"], run.total, warmup, args.lr_scheduler_type)
        norm = engine.step(factor)  # clips, then AdamW; not where the norm is not finite
        run.check_finite(loss, norm, window)

        step = progress["step"] = progress["step"] + 1
        for name, more in (("supervised", supervised), ("cut", cut), ("skipped", skipped)):
            progress[name] += int(more)
        lr = max(group["lr"] for group in engine.optimizer.param_groups)
        metrics = {"step": step, "epoch": step / run.per_epoch, "loss": loss, "lr": lr}
        metrics |= {"token_accuracy": right, "grad_norm": norm}
        durations.append(seconds := time.perf_counter() - began)
        metrics |= report.speed(supervised, tokens, padded, rows, seconds, waited, run.device)
        due = step % args.logging_steps == 0 or step == run.total
        bar.show(metrics, due)
        if due:
            run.log.step(metrics)
        if args.dry_run:
            continue
        eval_steps = args.eval_steps if args.eval_steps > 0 else run.per_epoch
        evaluates = run.validation and (step % eval_steps == 0 or step == run.total)
        if evaluates and stopping:
            run.save()  # first, as an evaluation may outlast the grace of who asked
        if evaluates:
            run.validate()
        run.check_learning()
        if stopping or (args.save_steps > 0 and step % args.save_steps == 0):
            run.save()  # where it was saved above, again: now with the evaluation

    bar.close()
    if args.dry_run:
        lengths = run.rows.records.lengths
        report.dry_run(durations, run.plan(0), lengths, run.total, run.device)
        return 0
    if stopping and progress["step"] < run.total:
        print(f"stopped after step {progress['step']} of {run.total}: the same command goes on,")
        print("train.py's with --resume_from_checkpoint latest")
        return 3
    run.keep("final")
    report.last_words(vars(args), progress["step"], run.total, progress["evaluations"])
    return 0


# --- the command ---


@cli.command
def main(argv=None):
    args, signals, handlers = parse(argv), [], {}
    try:
        # Before the processes meet: one may download for longer than the others would wait.
        source = llava.resolve(args.model_name_or_path)
        config = engines.deepspeed_config(args) if args.deepspeed else None
        ranks.join(bool(args.deepspeed))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            handlers[number] = signal.signal(number, lambda *_: signals.append("stop"))
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        torch.manual_seed(args.seed)  # of new adapters
        run, status = make_run(args, source, config), 0
        if run:
            with contextlib.closing(run.log):
                status = train(run, args, signals)
        ranks.leave()
        return status
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for each worker that dies
        text = cli.in_words(error, report.less_memory(args))
        raise ValueError(ranks.after_rank_0(text)) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(ranks.run(main))
