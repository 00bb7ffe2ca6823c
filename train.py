"""The training loop of LLaVA: two stages, one process or many.

    projector       stage 1: the projector alone, on captions (template `plain`)
    freeze_vision   stage 2: projector and language model, on instructions
    full            stage 2, and the vision tower too
    use_lora        stage 2, of the language model only low-rank adapters; --bits 4 makes it QLoRA

    python train.py --model_name_or_path DIR --train_type projector --data_path F --image_folder DIR
                    --output_dir DIR
    deepspeed train.py --deepspeed ds_zero2.json (the same flags)

An optimizer step sees one window: the rows of a global batch, as `gradient_accumulation_steps`
micro-batches on each of `world` processes. Its loss is

    sum over all supervised tokens of the window / their number

so any split of the same rows, and any padding, gives the same gradients. `train` is the loop; what
it calls stands above it.

With --bf16, weights and activations are bf16, gradients are added up in fp32, and what trains has
an fp32 master copy, which the optimizer updates and checkpoints hold. Without it all is fp32.

Sources: LLaVA-1.5's recipes (github.com/haotian-liu/LLaVA, scripts/v1_5), the schedules of
transformers/optimization.py, ZeRO (arXiv:1910.02054).
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import importlib.util
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import checkpoint
import data
import lora
import model as llava
import report
from cli import BOOLEAN, Parser, number, written
from evaluate import OneProcess, evaluate, open_model, show

# How the names of what trains whole begin, and the recipe of LLaVA-1.5: learning rate, rows of a
# micro-batch, template. Its global batch is 256 rows in stage 1 and 128 in stage 2, on eight GPUs.
TRAIN_TYPES = {
    "projector": (["multi_modal_projector"], 1e-3, 32, "plain"),
    "freeze_vision": (["multi_modal_projector", "language_model"], 2e-5, 16, "own"),
    "full": (["vision_tower", "multi_modal_projector", "language_model"], 2e-5, 16, "own"),
    "use_lora": (["multi_modal_projector"], 2e-4, 16, "own"),
}
LORA_PROJECTOR_LR = 2e-5  # published too: the projector has learnt already, the adapters have not
NEW_ADAPTER = {
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "lora_target_modules": llava.DECODER,
    "use_rslora": False,
}


# --- model, schedule, parameter groups ---


def load_model(args, source: Path, device: str, stage: int = 0):
    """The model as the flags want it: in 4 bits or not, with an adapter or not, what trains set.

    For ZeRO's stage 3 its weights stay mapped from the file, and in the file's dtype, until
    `ZeRO.partition` takes them.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    storage = dtype if stage == 3 else torch.uint8  # ZeRO-3 cannot partition bytes
    as_on_disk = stage == 3 and args.bits == 16 and not args.adapter
    if stage == 3 and args.bits == 16:
        device = "cpu"  # mapped from the file, until DeepSpeed takes this rank's share of it
    model = open_model(
        source, args.adapter, args.bits, None if as_on_disk else dtype, device, storage
    )
    if args.train_type == "use_lora":
        lora.base_fingerprint(source, llava.transformers_name)  # fail now, not at a save
        own = data.PictureTransform.from_pretrained(source).aspect_ratio
        if args.image_aspect_ratio not in (None, own):
            raise ValueError(
                f"--image_aspect_ratio {args.image_aspect_ratio}: {source} has {own}, "
                "and an adapter has no place for another"
            )
    if args.train_type == "use_lora" and not args.adapter:
        names = lora.inject(
            model,
            args.lora_target_modules,
            args.lora_r,
            args.lora_alpha,
            args.lora_dropout,
            args.use_rslora,
            dtype,
        )
        outside = [name for name in names if not re.fullmatch(llava.DECODER, name)]
        if outside:
            raise ValueError(
                f"--lora_target_modules {args.lora_target_modules}: matches "
                f"{outside[0]}; adapters are for the decoder's layers only"
            )
        print(lora.fold(names))
    trained = tuple(TRAIN_TYPES[args.train_type][0] if args.train_type else [])
    for name, p in model.named_parameters():
        trains = name.startswith(trained) or ".lora." in name
        if args.train_type and p.requires_grad and args.adapter and not trains:
            raise ValueError(
                f"--adapter {args.adapter}: trains {name} whole, which is not kept "
                "here: merge it, and train a new adapter on that"
            )
        p.requires_grad_(trains)
    return model


def write_result(model, args, text, source: Path, state: dict, folder: Path):
    """What was trained, as a new folder: an adapter in PEFT's format, or else a whole model."""
    if args.train_type != "use_lora":  # `plain` is for training only: it is no folder's template
        llava.save_pretrained(
            model, folder, source, text.chat_template, state, args.image_aspect_ratio
        )
        return
    lora.save(model, folder, source, llava.transformers_name, ["multi_modal_projector"], state)
    if text.chat_template:
        (folder / "chat_template.jinja").write_text(text.chat_template)


def schedule(step: int, total_steps: int, warmup_steps: int, kind: str) -> float:
    """The factor on the learning rates at `step`, from 0: linear warm-up, then as `kind` says."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[kind]


def make_optimizer(parameters: dict, args) -> torch.optim.AdamW:
    """AdamW over {name: parameter}: a learning rate for each part, no decay but on matrices."""
    rates = {
        "vision_tower": args.mm_vision_tower_lr,
        "language_model": args.learning_rate,
        "multi_modal_projector": args.mm_projector_lr,
    }
    groups = {}
    for name, p in parameters.items():
        is_matrix = len(lora.true_shape(p)) > 1  # ZeRO-3 leaves none of a weight's dimensions
        groups.setdefault((name.split(".")[0], is_matrix), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "lr": rates[part],
                "base_lr": rates[part],
                "weight_decay": args.weight_decay * is_matrix,
            }
            for (part, is_matrix), params in groups.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )


def set_learning_rates(optimizer, factor: float):
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


# --- engines: plain torch or DeepSpeed, by the same calls ---


def make_moments(adamw, weights):
    """AdamW makes them in its first step; a checkpoint is to be put into them before that."""
    for p in weights:
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }


class Plain(OneProcess):
    """Does in plain torch what DeepSpeed does: fp32 gradients and masters of bf16 weights."""

    def __init__(self, model, args):
        self.model, self.max_grad_norm = model, args.max_grad_norm or math.inf  # 0: no clipping
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in self.weights.items()
        }  # the masters
        self.optimizer = make_optimizer(self.trained, args)
        make_moments(self.optimizer, self.trained.values())
        for name, p in self.weights.items():
            if p is not self.trained[name]:
                p.register_post_accumulate_grad_hook(
                    functools.partial(self._collect, self.trained[name])
                )

    @staticmethod
    def _collect(master, p):
        """Adds a bf16 gradient to its fp32 sum as soon as it is complete, and frees it."""
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def forward(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss, last: bool):
        loss.backward()

    def step(self, factor: float) -> float:
        """One update at `factor` times the learning rates; the gradient's norm before clipping."""
        set_learning_rates(self.optimizer, factor)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _copy_masters(self):
        for name, p in self.weights.items():
            if p is not self.trained[name]:
                p.copy_(self.trained[name])

    def state(self, frozen: bool = True) -> dict:
        """{name: fp32 tensor} of all that trains."""
        return {name: master.detach() for name, master in self.trained.items()}

    def get(self, name: str, part: str):
        master = self.trained[name]
        return master.detach() if part == "weight" else self.optimizer.state[master][part]

    def put(self, name: str, part: str, value):
        self.get(name, part).copy_(value)

    def refresh(self, step: int):
        for state in self.optimizer.state.values():
            state["step"].fill_(step)
        self._copy_masters()


class ZeRO(OneProcess):
    """Many processes, DeepSpeed's engine inside. Each holds its share of gradients, masters and
    moments (stage 2), and of the weights too (stage 3).

    NOTE: where names are DeepSpeed's private ones a comment says so; they are those of 0.19.8.
    """

    def __init__(self, model, args, config: dict):
        import deepspeed

        self.model, self.deepspeed = model, deepspeed
        self.stage = config["zero_optimization"]["stage"]
        if self.stage == 3:
            self.partition(config, torch.bfloat16 if args.bf16 else torch.float32)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(self.trained, args), config=config
        )
        self.optimizer = self.engine.optimizer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        make_moments(self.optimizer.optimizer, self._masters())
        if self.stage == 2:  # it would link moments with weights after the first group's first step
            self.optimizer._lazy_init_hp_params_optimizer_state()  # private

    def _masters(self) -> list:
        """The flat tensors that this rank's AdamW updates, one or several for each of its groups."""
        if self.stage == 2:
            return self.optimizer.single_partition_of_fp32_groups  # private
        return self.optimizer.fp32_partitioned_groups_flat  # private

    def partition(self, config: dict, dtype):
        """Partitions the weights among the ranks, one weight at a time.

        NOTE: `initialize` alone would move the whole model to every device and broadcast that of
        rank 0 over it. One weight at a time is copied here, just before it is partitioned, so all
        ranks of a machine share the pages of the file.
        """
        for module in reversed(list(self.model.modules())):  # children first
            for p in module.parameters(recurse=False):
                if not hasattr(p, "ds_id"):
                    p.data = p.data.clone() if lora.is_nf4(p) else p.data.to(dtype, copy=True)
            if any(not hasattr(p, "ds_id") for p in module.parameters()):
                self.deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to("cuda" if torch.cuda.is_available() else "cpu")

    def sum(self, *numbers):
        total = torch.tensor(numbers, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, rows: list) -> list:
        shares = [None] * self.world
        dist.all_gather_object(shares, rows)
        return [row for share in shares for row in share]

    def forward(self, *inputs):
        return self.engine(*inputs)

    def backward(self, loss, last: bool):
        """Sets the end of a window: DeepSpeed would divide the loss and count by itself."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, factor: float) -> float:
        set_learning_rates(self.optimizer, factor)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self, frozen: bool = True) -> dict:
        """As Plain's, gathered weight by weight, whole on rank 0 and empty elsewhere; with the
        `frozen` ones where stage 3 has partitioned these too.
        """
        state = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                whole = self.get(name, "weight")
                state.update({name: whole.cpu()} if self.rank == 0 else {})
            elif frozen and hasattr(p, "ds_id"):
                with self.deepspeed.zero.GatheredParameters([p]):
                    state.update({name: p.detach().to("cpu", copy=True)} if self.rank == 0 else {})
        return state

    def get(self, name: str, part: str):
        utils, p = self.deepspeed.utils, self.trained[name]
        if part == "weight":
            return utils.safe_get_full_fp32_param(p)
        return utils.safe_get_full_optimizer_state(p, part)

    def put(self, name: str, part: str, value):
        p, key = self.trained[name], None if part == "weight" else part
        if self.stage == 2:
            p.set_full_hp_param(value, key)  # private
            return
        # safe_set_full_... would want a size that the number of ranks divides.
        size = p.ds_tensor.numel()  # private; of this rank's share, the last one is padded
        share = value.flatten()[size * self.rank : size * (self.rank + 1)]
        share = torch.nn.functional.pad(share, (0, size - len(share)))
        self.optimizer.set_local_hp_param(share, p, key)  # private

    def refresh(self, step: int):
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(step)
        if self.stage == 2:
            self.optimizer.update_lp_params()  # private
            return
        self.optimizer.checkpoint_event_prologue()  # private
        for i in range(len(self._masters())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)  # private
        self.optimizer.checkpoint_event_epilogue()  # private


OFFLOADED = {
    "none": [],
    "optimizer": ["offload_optimizer"],
    "all": ["offload_optimizer", "offload_param"],
}


def deepspeed_config(args) -> dict:
    """The file of --deepspeed and, from the flags, what it must leave to them."""
    if not Path(args.deepspeed).is_file():
        raise FileNotFoundError(f"--deepspeed {args.deepspeed}: no such file")
    config = llava.read_json(Path(args.deepspeed))
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (2, 3):
        raise ValueError(f"--deepspeed {args.deepspeed}: zero_optimization needs a stage, 2 or 3")
    if args.offload == "all" and zero["stage"] == 2:
        raise ValueError(
            f"--offload all: {args.deepspeed} is ZeRO-2, which partitions no weights; "
            "use ds_zero3.json, or --offload optimizer"
        )
    memory = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero = {**zero, **{section: memory for section in OFFLOADED[args.offload]}}
    flags = {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
    }
    for key in (*flags, "train_batch_size", "optimizer", "scheduler", "fp16"):
        if key in config:
            raise ValueError(f"--deepspeed {args.deepspeed}: remove {key}, the flags decide it")
    return {**config, **flags, "zero_optimization": zero, "bf16": {"enabled": args.bf16}}


# --- a run on disk ---

# Flags that may differ between a run and its continuation: where things go and how often, and what
# changes nothing that is learnt as long as a step has as many rows. Of two files (the rows) the
# content counts, not the path.
FREE_FLAGS = {
    "output_dir",
    "resume_from_checkpoint",
    "dry_run",
    "data_path",
    "validation_data_path",
    "image_folder",
    "dataloader_num_workers",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
    "on_bad_record",
    "per_device_eval_batch_size",
    "local_rank",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "deepspeed",
    "offload",
}


def rows_a_step(args) -> int:
    """The rows of a global batch."""
    return (
        args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * int(os.environ["WORLD_SIZE"])
    )


def what_must_stay(args, source: Path) -> dict:
    """{name in messages: value} of all that makes a run what it is."""
    same = {f"--{name}": value for name, value in vars(args).items() if name not in FREE_FLAGS}
    same["--model_name_or_path"] = str(source.resolve())
    same["--adapter"] = args.adapter and str(Path(args.adapter).resolve())
    same["rows a step (micro batch x accumulation x processes)"] = rows_a_step(args)
    same["a base whose weights hash to"] = lora.base_fingerprint(source, llava.transformers_name)
    same["a --data_path whose content hashes to"] = hash_of(args.data_path)
    same["a --validation_data_path whose content hashes to"] = (
        args.validation_data_path and hash_of(args.validation_data_path)
    )
    return same


def hash_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the loop ---


class FirstWindow:
    """Proves once that what should train does: each of its weights gets a finite gradient."""

    def __init__(self, model):
        self.finite = {name: None for name, p in model.named_parameters() if p.requires_grad}
        self.hooks = [
            model.get_parameter(name).register_hook(functools.partial(self._note, name))
            for name in self.finite
        ]

    def _note(self, name: str, gradient):
        self.finite[name] = self.finite[name] is not False and bool(gradient.isfinite().all())

    def check(self):
        for name, finite in self.finite.items():
            if not finite:
                raise ValueError(
                    f"{name} should train, but its gradient is "
                    f"{'missing' if finite is None else 'not finite'}"
                )
        for hook in self.hooks:
            hook.remove()


def to_device(batch: dict, device) -> tuple:
    return tuple(
        batch[key].to(device, non_blocking=True) for key in ("input_ids", "pixel_values", "labels")
    )


def numbers_of(window: list[dict]) -> tuple:
    """Supervised tokens, tokens, the same with padding, rows, rows cut short."""
    return (
        sum((batch["labels"] >= 0).sum().item() for batch in window),
        sum(sum(batch["lengths"]) for batch in window),
        sum(batch["labels"].numel() for batch in window),
        sum(row >= 0 for batch in window for row in batch["rows"]),
        sum(batch["cut"] for batch in window),
    )


def unusable(fault: str) -> str:
    return (
        f"{fault} (`python data.py check` lists all such rows, --on_bad_record skip goes on "
        "without them)"
    )


def handle_faults(faults: list[str], args):
    """Stops where a row could not be used, or says which are skipped."""
    if faults and args.on_bad_record == "stop":
        raise ValueError(unusable(faults[0]))
    for fault in faults:
        tqdm.write(f"skipped: {fault}", file=sys.stderr)  # from any rank


def since_best(progress: dict) -> int:
    """The evaluations since that with the lowest loss: 0 where the last one is the best so far."""
    losses = [loss for _, loss in progress["evaluations"]]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def check_finite(what: str, value: float, progress: dict, window: list[dict], rows, engine):
    """Stops the run, before anything is saved, and names the records of the window."""
    if not math.isfinite(value):  # on all ranks alike
        mine = [rows.where(i) for batch in window for i in batch["rows"] if i >= 0]
        raise ValueError(
            f"step {progress['step'] + 1}: the {what} is {value}; its records: "
            f"{'; '.join(engine.gather(mine))}. The last checkpoint stays"
        )


def seed_of(args, step: int, rank: int) -> int:
    """Of what is drawn in a step: dropout. So no generator's state needs to be saved."""
    return int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1, np.uint64)[0])


def training_mode(model):
    """Dropout where it is asked for; the tower stays in eval mode, as when it learnt to see."""
    model.train()
    model.vision_tower.eval()


def open_rows(args, source: Path):
    """The text contract, and the rows to train on and to evaluate on (None where not given)."""
    text = data.ChatText(llava.open_tokenizer(source, args.adapter), args.version)
    sets = []
    for path in (args.data_path, args.validation_data_path):
        sets.append(
            path
            and data.open_dataset(
                path,
                args.image_folder,
                source,
                args.version,
                args.image_aspect_ratio,
                args.model_max_length,
                "skip",
                text,
            )
        )
        if path and args.on_bad_record == "stop" and (fault := sets[-1][0]["fault"]):
            raise ValueError(unusable(fault))  # a look at one row, before any is written
    return text, *sets


def train(args, source: Path, config: dict | None, signals: list, at_end) -> int:
    """Trains, or resumes, with DeepSpeed's `config` or alone; 0 when it is done, 3 when it
    was asked to stop: by `signals`, which fills as they come, or by a file `stop` in `output_dir`.
    What is to be closed however the run ends goes to the ExitStack `at_end`.
    """
    torch.manual_seed(args.seed)
    device, out = "cuda" if torch.cuda.is_available() else "cpu", Path(args.output_dir)
    if out.resolve() == source.resolve():
        raise ValueError(f"--output_dir {out}: the model comes from there; name a new folder")
    same = what_must_stay(args, source)
    run_id = checkpoint.open_run(out, same, args.resume_from_checkpoint)
    if (out / "final").is_dir():
        print(f"{out}: this run is complete")
        return 0
    text, train_set, eval_set = open_rows(args, source)
    stage = config["zero_optimization"]["stage"] if config else 0
    model = load_model(args, source, device, stage)
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    if args.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = ZeRO(model, args, config) if config else Plain(model, args)

    # The arithmetic of batches and steps.
    rows, accumulation = train_set.records, args.gradient_accumulation_steps
    steps_of = functools.partial(
        data.plan_epoch,
        rows.lengths,
        rows.has_picture,
        rows_a_step(args),
        args.seed,
        by_modality=args.group_by_modality_length,
    )
    steps_per_epoch = len(steps_of(0))
    total_steps = math.ceil(steps_per_epoch * args.num_train_epochs)
    total_steps = args.max_steps if args.max_steps > 0 else total_steps
    # At the step after the last one of warm-up the rate is above zero: there is such a step.
    warmup_steps = min(math.ceil(args.warmup_ratio * total_steps), total_steps - 1)
    eval_steps = args.eval_steps if args.eval_steps > 0 else steps_per_epoch
    masters = args.bf16 or stage > 0  # DeepSpeed has fp32 masters of fp32 weights too
    held = report.memory(model, lora.count, engine.world, stage, masters)
    report.show_modules(model, lora.count)
    micro = args.per_device_train_batch_size
    report.show_batches(micro, accumulation, engine.world, len(rows), steps_per_epoch, total_steps)
    report.show_memory(held, args.offload)
    trial = report.Trial(steps_of(0), rows.lengths, total_steps) if args.dry_run else None
    if trial:
        steps_of, eval_set = lambda epoch: trial.plan, None
        total_steps = steps_per_epoch = len(trial.plan)

    # The run begins, or is resumed.
    progress, stop_file = None, out / "stop"
    if engine.rank == 0 and not trial:
        locked = checkpoint.begin(out, run_id, same)  # noqa: F841  open, and so locked, until the end
        stop_file.unlink(missing_ok=True)  # an earlier run's
    if args.resume_from_checkpoint and not trial:
        progress = checkpoint.load(engine, out, args.resume_from_checkpoint, run_id)
    resumed = progress is not None
    progress = progress or {
        "run": run_id,
        "step": 0,
        "supervised": 0,
        "skipped": 0,
        "cut": 0,
        "evaluations": [],
    }  # step and loss of each
    log = report.Silent()
    if engine.rank == 0 and not trial:
        log = report.Log(out, run_id, progress["step"] if resumed else -1, vars(args))
        at_end.callback(log.close)
    write = functools.partial(write_result, model, args, text, source)
    bar = report.Progress(total_steps, progress["step"], engine.rank)
    first_window, stopping = FirstWindow(model), False
    training_mode(model)

    def windows(step):
        """The micro-batches of this rank for each step from `step` on, epoch after epoch."""
        epoch, start = divmod(step, steps_per_epoch)
        while True:
            micro = data.micro_batches(
                steps_of(epoch), accumulation, engine.world, engine.rank, start
            )
            batches = iter(
                data.loader(
                    train_set, micro, collate, args.dataloader_num_workers, device == "cuda"
                )
            )
            yield from zip(*[batches] * accumulation)  # as many at a time
            epoch, start = epoch + 1, 0

    def validate():
        metrics, answers = evaluate(
            model,
            eval_set,
            engine,
            collate,
            batch_size=args.per_device_eval_batch_size,
            eval_samples=args.eval_samples,
            max_new_tokens=args.max_new_tokens,
            workers=args.dataloader_num_workers,
            on_bad_record=args.on_bad_record,
            device=device,
            step=progress["step"],
        )
        show(metrics, answers)
        seen = eval_set.records, eval_set.pictures
        log.evaluation(metrics, answers, *seen)
        progress["evaluations"].append([progress["step"], metrics["eval_loss"]])
        if since_best(progress) == 0:
            save("best")
        training_mode(model)

    def over():
        patience = args.early_stopping_patience or math.inf
        return progress["step"] >= total_steps or since_best(progress) >= patience

    def save(name):
        state = engine.state(frozen=args.train_type != "use_lora")  # on every rank: it gathers
        if engine.rank == 0:
            with written(out / name) as folder:
                write(state, folder)

    def add_adapter(folder):
        state = engine.state(frozen=False)  # on every rank: it gathers
        if engine.rank == 0:
            write(state, folder)

    if eval_set and not resumed:
        validate()
    steps = windows(progress["step"])
    while not over() and not stopping:
        # The whole window is fetched first: its loss is divided by all its supervised tokens.
        began = time.perf_counter()
        window = next(steps)
        waited = time.perf_counter() - began
        faults = [fault for batch in window for fault in batch["faults"]]
        handle_faults(faults, args)
        supervised, tokens, padded, count, cut, skipped, stopping = engine.sum(
            *numbers_of(window), len(faults), bool(signals) or stop_file.exists()
        )

        torch.manual_seed(seed_of(args, progress["step"], engine.rank))
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens right
        # DeepSpeed averages gradients over ranks; * world turns the average back into a sum.
        for i, batch in enumerate(window):
            loss, right = engine.forward(*to_device(batch, device))
            engine.backward(loss * engine.world / max(supervised, 1), i == accumulation - 1)
            sums += torch.stack([loss.detach(), right])
        loss, right = (x / max(supervised, 1) for x in engine.sum(*sums.tolist()))
        check_finite("loss", loss, progress, window, rows, engine)
        if first_window:
            first_window.check()
            first_window = None  # once is enough
        factor = schedule(progress["step"], total_steps, warmup_steps, args.lr_scheduler_type)
        grad_norm = engine.step(factor)
        check_finite("norm of the gradient", grad_norm, progress, window, rows, engine)
        progress["step"] += 1
        progress["supervised"] += int(supervised)
        progress["skipped"] += int(skipped)
        progress["cut"] += int(cut)

        step, seconds = progress["step"], time.perf_counter() - began
        metrics = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "token_accuracy": right,
            "lr": max(group["lr"] for group in engine.optimizer.param_groups),
            "grad_norm": grad_norm,
            "tokens_per_s": tokens / seconds,
            "samples_per_s": count / seconds,
            "supervised": supervised / tokens,
            "padded": 1 - tokens / padded,
            "waiting": waited / seconds,
            **report.peak(device),
        }
        to_log = step % args.logging_steps == 0 or step == total_steps
        bar.show(metrics, to_log)
        if to_log:
            log.step(metrics)
        if trial:
            trial.seconds.append(seconds)
        if eval_set and (step % eval_steps == 0 or step == total_steps):
            validate()
        if step in (steps_per_epoch, total_steps) and progress["skipped"] + progress["cut"]:
            tqdm.write(f"{progress['skipped']} rows were skipped, {progress['cut']} cut short")
        if step in (steps_per_epoch, total_steps) and not progress["supervised"] and not trial:
            raise ValueError(
                f"{args.data_path}: after {step} steps the model has learnt from no "
                "token: no row could be used (`python data.py check` says why)"
            )
        if not trial and (stopping or args.save_steps > 0 and step % args.save_steps == 0):
            checkpoint.save(
                engine,
                out,
                progress,
                args.save_total_limit,
                add_adapter if args.train_type == "use_lora" else None,
            )
    bar.close()
    if not over():
        print(
            f"stopped after step {progress['step']} of {total_steps}: the same command goes on, "
            "train.py's with --resume_from_checkpoint latest"
        )
        return 3
    if trial:
        trial.show(device)
        return 0
    save("final")
    report.last_words(vars(args), progress["step"], total_steps, progress["evaluations"])
    return 0


# --- commands ---


# Flags of LLaVA's own scripts: the value that holds here anyway, and what to use for another.
LLAVA_FLAGS = {
    "--lora_enable": ("False", "--train_type use_lora"),
    "--tune_mm_mlp_adapter": ("False", "--train_type projector"),
    "--freeze_backbone": ("False", "--train_type projector"),
    "--pretrain_mm_mlp_adapter": (None, "the folder of stage 1 as --model_name_or_path"),
    "--vision_tower": (None, "`python model.py build`, once"),
    "--mm_projector_type": (None, "`python model.py build`, once"),
    "--mm_vision_select_layer": ("-2", "vision_feature_layer in config.json"),
    "--mm_use_im_start_end": ("False", "a template; pictures have no such tokens here"),
    "--mm_use_im_patch_token": ("False", "a template; pictures have no such tokens here"),
    "--lazy_preprocess": ("True", "nothing: rows are always prepared as they are needed"),
    "--fp16": ("False", "--bf16"),
}


def count_or_off(text: str) -> int:
    return -1 if text == "-1" else number(int, 1)(text)


def parse(argv) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add, flag = parser.add_argument, BOOLEAN
    count, rate, share = number(int, 1), number(float, 0, 1e3), number(float, 0, 1)
    # model and data
    add("--model_name_or_path", required=True, help="a LLaVA folder, or a hub id")
    add("--data_path", help=".json or .jsonl in LLaVA's format")
    add("--validation_data_path", help="rows to evaluate on")
    add("--image_folder", help="a folder of pictures, or a .zip, read in place")
    add("--output_dir", help="where checkpoints, metrics and the trained model go")
    add("--version", choices=data.VERSIONS, help="template; plain for projector, else own")
    add("--image_aspect_ratio", choices=["pad", "square"], help="default: as the model's folder")
    add("--model_max_length", type=count, default=2048, help="tokens of a row, with its pictures'")
    add("--on_bad_record", choices=["stop", "skip"], default="stop", help="rows that do not work")
    # what trains, and how
    add("--train_type", choices=list(TRAIN_TYPES), help="what trains")
    add("--bits", type=int, choices=[16, 4], default=16, help="4: the decoder in nf4 (QLoRA)")
    add("--adapter", help="an adapter to train on from")
    add("--lora_r", type=number(int, 1, 2**16), help="rank of a new adapter")
    add("--lora_alpha", type=number(float, 1e-6, 1e6), help="its output counts alpha / r times")
    add("--lora_dropout", type=number(float, 0, 0.99), help="share of its inputs that is dropped")
    add("--lora_target_modules", help="regular expression on whole paths")
    add("--use_rslora", **flag, help="alpha / sqrt(r) instead of alpha / r")
    add("--num_train_epochs", type=number(float, 1e-6, 1e6), default=1.0, help="passes over rows")
    add("--max_steps", type=count_or_off, default=-1, help="optimizer steps; -1: as the epochs say")
    add("--per_device_train_batch_size", type=count, help="rows of a micro-batch")
    add("--gradient_accumulation_steps", type=count, default=1, help="micro-batches of a step")
    add("--learning_rate", type=rate, help="default: LLaVA-1.5's for the train type")
    add("--mm_projector_lr", type=rate, help="the projector's own learning rate")
    add("--mm_vision_tower_lr", type=rate, help="the tower's own learning rate")
    add("--lr_scheduler_type", choices=["cosine", "linear", "constant"], default="cosine")
    add("--warmup_ratio", type=share, default=0.03, help="share of steps with a rising rate")
    add("--weight_decay", type=rate, default=0.0, help="AdamW's, on matrices only")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="of clipping; 0: none")
    add("--bf16", **flag, default=torch.cuda.is_available(), help="default: where there is a GPU")
    add("--tf32", **flag, default=False, help="fp32 products of matrices in TensorFloat-32")
    add("--gradient_checkpointing", **flag, help="less memory, more time; default: not in stage 1")
    add("--group_by_modality_length", **flag, default=False, help="like rows share a step")
    add("--seed", type=number(int, 0), default=42, help="of order and dropout")
    add(
        "--dataloader_num_workers",
        type=number(int, 0),
        help="processes that prepare batches",
        default=min(4, len(os.sched_getaffinity(0))),
    )
    # evaluation, saving, logging
    add("--dry_run", **flag, default=False, help="measure memory and time, and write nothing")
    add("--per_device_eval_batch_size", type=count, help="rows; default: as in training")
    add(
        "--eval_steps",
        type=count_or_off,
        default=-1,
        help="steps between evaluations; -1: every epoch",
    )
    add(
        "--eval_samples",
        type=number(int, -1),
        default=32,
        help="rows whose questions are asked; -1: all",
    )
    add(
        "--early_stopping_patience",
        type=count,
        help="evaluations without a better loss before it stops; default: it never does",
    )
    add("--max_new_tokens", type=count, default=64, help="tokens of an answer")
    add("--save_steps", type=count_or_off, default=500, help="steps between checkpoints; -1: none")
    add("--save_total_limit", type=count_or_off, default=2, help="checkpoints kept; -1: all")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="a checkpoint, or latest")
    add("--logging_steps", type=count, default=1, help="steps between lines of metrics.jsonl")
    add(
        "--report_to",
        choices=["none", "tensorboard", "wandb"],
        default="none",
        help="figures, answers and the sheet also go there; WANDB_MODE=offline needs no account",
    )
    # many processes
    add("--deepspeed", help="ds_zero2.json or ds_zero3.json")
    add(
        "--offload",
        choices=list(OFFLOADED),
        default="none",
        help="to the host's memory: the optimizer, or (with ds_zero3.json) the weights too",
    )
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    for name, (same, _) in LLAVA_FLAGS.items():
        add(name, nargs="?", const="True", default=same, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, (same, instead) in LLAVA_FLAGS.items():
        if (value := vars(args).pop(name.removeprefix("--"))) != same:
            parser.error(f"{name} {value}: use {instead}")
    for wrong, message in contradictions(args):
        if wrong:
            parser.error(message)
    _, published, micro, version = TRAIN_TYPES[args.train_type or "freeze_vision"]
    given = args.learning_rate if args.learning_rate is not None else published
    defaults = {
        "version": version,
        "learning_rate": published,
        "per_device_train_batch_size": micro,
        "mm_projector_lr": LORA_PROJECTOR_LR if args.train_type == "use_lora" else given,
        "mm_vision_tower_lr": given,
        "gradient_checkpointing": args.train_type != "projector",
        **({} if args.adapter else NEW_ADAPTER),
    }
    defaults["per_device_eval_batch_size"] = args.per_device_train_batch_size or micro
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def is_installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of that name, as wandb leaves, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def contradictions(args) -> list[tuple]:
    """(whether it is so, what to say of it) of flags that are missing or do not go together."""
    needed = ["data_path", "output_dir", "train_type"]
    reports, whole = args.report_to != "none", args.train_type not in (None, "use_lora")
    return [
        *((not getattr(args, name), f"--{name} is needed") for name in needed),
        *((value == "", f"--{name} is empty: leave it out") for name, value in vars(args).items()),
        *(
            (
                getattr(args, name) is not None and (args.adapter or args.train_type != "use_lora"),
                f"--{name} is for a new adapter (--train_type use_lora without --adapter): leave it out",
            )
            for name in NEW_ADAPTER
        ),
        (
            whole and (args.bits == 4 or args.adapter),
            f"--train_type {args.train_type} trains the base: --bits 4 and --adapter are for "
            "use_lora",
        ),
        (
            reports and not is_installed(args.report_to),
            f"--report_to {args.report_to}: not installed, `pip install {args.report_to}`",
        ),
        (reports and not args.output_dir, "--report_to needs --output_dir"),
        (
            args.early_stopping_patience and not args.validation_data_path,
            "--early_stopping_patience needs --validation_data_path",
        ),
        (
            args.offload != "none" and not args.deepspeed,
            f"--offload {args.offload} needs --deepspeed ds_zero2.json, or ds_zero3.json",
        ),
    ]


def less_memory(args) -> str:
    """The next flag to try where a run does not fit: those that cost nothing, or least, first."""
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows > 1:
        fewer = rows // 2 if rows % 2 == 0 else 1
        return (
            f"try --per_device_train_batch_size {fewer} --gradient_accumulation_steps "
            f"{accumulation * rows // fewer}: the same steps in smaller pieces"
        )
    if not args.gradient_checkpointing:
        return "try --gradient_checkpointing: less memory, a third more time"
    if args.train_type == "use_lora" and args.bits == 16:
        return "try --bits 4: the frozen layers in a quarter of the memory"
    if not args.deepspeed:
        return "try `deepspeed train.py --deepspeed ds_zero3.json`: each process has a part"
    return "try --train_type use_lora --bits 4, a smaller model, or more processes"


def keep_memory():
    """Has glibc keep freed memory, which each step would otherwise take anew from the system, page
    by page: on a CPU it shortens a step of `full` by a quarter, and one of LoRA by 6 %.
    """
    TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, -1)  # never
        # Above this a tensor is mapped by itself, as ever; older ones take no more than the second.
        library.mallopt(MMAP_THRESHOLD, 2**30) or library.mallopt(MMAP_THRESHOLD, 2**25)


TIMEOUT = datetime.timedelta(hours=1)  # as rank 0 may write for long, while the others wait


def start_processes(args):
    """Sets up this process, and joins the launcher's others; without a launcher it is alone."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.deepspeed:
        import deepspeed

        # gloo will do: compiling this, a run that is killed leaves a lock, and all later ones wait.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(timeout=TIMEOUT)
    elif os.environ["WORLD_SIZE"] != "1":
        raise ValueError("many processes need --deepspeed ds_zero2.json, or ds_zero3.json")
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all


PATIENCE_SECONDS = 4


def say(error: str):
    """Prints why this rank ends. What is wrong for all is rank 0's to say: by the time that another
    one speaks here, rank 0 would have ended it (see `be_a_rank`).
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(PATIENCE_SECONDS + int(os.environ["LOCAL_RANK"]) / 4)
    print(f"train.py: {f'rank {rank}: ' if rank > 0 else ''}{error}", file=sys.stderr, flush=True)


def main(argv=None) -> int:
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signals = []
    try:
        # Before the processes meet: one may download for longer than the others would wait.
        source = llava.resolve(args.model_name_or_path)
        config = deepspeed_config(args) if args.deepspeed else None
        start_processes(args)
        with contextlib.ExitStack() as at_end:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                handler = signal.signal(number, lambda number, _: signals.append(number))
                at_end.callback(signal.signal, number, handler)
            status = train(args, source, config, signals, at_end)
        if dist.is_initialized():  # a rank that fails must not: NCCL would wait for the others
            dist.destroy_process_group()
        return status
    except (ValueError, OSError, SafetensorError) as error:
        say(llava.one_line(error))
        return 2
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            say(
                "a process that prepares rows has died (killed, or out of memory?): try "
                "--dataloader_num_workers 0"
            )
        elif re.search("out of memory|can't allocate memory", str(error)):
            say(f"out of memory: {less_memory(args)}")
        else:
            raise
        return 2


def program_of(pid: int) -> bytes:
    """What a process runs, without its flags; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0--")[0]
    return b""


def other_ranks() -> list[int]:
    """Those of this machine: the children of the same parent that run the same program."""
    files = Path(f"/proc/{os.getppid()}/task").glob("*/children")
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    mine = program_of(os.getpid())
    return [pid for pid in pids if pid != os.getpid() and program_of(pid) == mine]


def kill_soon(pids: list[int]):
    time.sleep(1)  # the launcher takes the status of the first that it sees end
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def be_a_rank():
    """main() as one of several processes. One that fails tells no other, as those may wait for it in
    a collective for ever; it just ends, and ends the others of this machine. The launcher would do so
    by SIGTERM, which is a wish to stop here, and wait 30 seconds for each.
    """
    try:
        status = main()
    except Exception as error:
        traceback.print_exc()
        say(f"{type(error).__name__}: {llava.one_line(error)}")
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 2:
        end = multiprocessing.get_context("fork").Process(target=kill_soon, args=(other_ranks(),))
        end.start()
        os._exit(2)  # no teardown: NCCL's would wait for the others
    sys.exit(status)


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        be_a_rank()
    sys.exit(main())
