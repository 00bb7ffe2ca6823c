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
import functools
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data
import fast
import lora
import model as llava
import report
from cli import BOOLEAN, Parser, number, one_line, written
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


def trained_whole(model, train_type: str | None) -> list[str]:
    """The parts that train whole. PEFT keeps a part frozen where it has adapters, and so do we."""
    parts = TRAIN_TYPES[train_type][0] if train_type else []
    adapted = [name for name, p in model.named_modules() if isinstance(p, lora.LoRA)]
    return [part for part in parts if not any(name.startswith(part) for name in adapted)]


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
            lora.paths_of(args.lora_target_modules, llava.DECODER),
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
    trained = tuple(trained_whole(model, args.train_type))
    for name, p in model.named_parameters():
        trains = name.startswith(trained) or ".lora." in name
        if args.train_type and p.requires_grad and args.adapter and not trains:
            raise ValueError(
                f"--adapter {args.adapter}: trains {name} whole, which is not kept "
                "here: merge it, and train a new adapter on that"
            )
        p.requires_grad_(trains)
    return fast.enable(model)


def write_result(model, args, text, source: Path, state: dict, folder: Path):
    """What was trained, as a new folder: an adapter in PEFT's format, or else a whole model."""
    if args.train_type != "use_lora":  # `plain` is for training only: it is no folder's template
        with written(folder) as part:
            llava.save_pretrained(
                model, part, source, text.chat_template, state, args.image_aspect_ratio
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    llava.copy_side_files(source, folder)  # tokenizer and processor, for who has the adapter alone
    if text.chat_template:
        llava.write_template(text.chat_template, folder)
    whole, name = trained_whole(model, args.train_type), args.model_name_or_path
    lora.save(model, folder, source, llava.transformers_name, whole, state, name)


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


class Agreed(ValueError):
    """An error that every rank raises, so that none waits for another; rank 0 says it."""


def gather(rows: list) -> list:
    """The lists of all ranks, as one."""
    if not dist.is_initialized():
        return rows
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, rows)
    return [row for share in shares for row in share]


def agree(faults: list[str]):
    """Every rank stops with the first fault that any of them has."""
    if faults := gather(faults):
        raise Agreed(faults[0])


def together(do, *args):
    """do(*args) on every rank; what is wrong for one of them, or for all, stops all in one line."""
    result, faults = None, []
    try:
        result = do(*args)
    except (ValueError, OSError) as error:
        faults.append(one_line(error))
    agree(faults)
    return result


class Plain(OneProcess):
    """Does in plain torch what DeepSpeed does: fp32 gradients and masters of bf16 weights."""

    def __init__(self, model, args):
        self.model, self.max_grad_norm = model, args.max_grad_norm or math.inf  # 0: no clipping
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in trained.items()
        }
        self.optimizer = make_optimizer(self.masters, args)
        self.copies = [
            (self.masters[name], p) for name, p in trained.items() if p is not self.masters[name]
        ]
        for master, p in self.copies:
            p.register_post_accumulate_grad_hook(functools.partial(self._collect, master))

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
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _copy_masters(self):
        for master, p in self.copies:
            p.copy_(master)

    def state(self, frozen: bool = True) -> dict:
        """{name: fp32 tensor} of all that trains."""
        return {name: master.detach() for name, master in self.masters.items()}

    def save(self, folder: Path, attempt):
        attempt(
            torch.save,
            {"weights": self.state(), "optimizer": self.optimizer.state_dict()},
            folder / "state.pt",
        )

    def load(self, folder: Path, world: int):
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        for name, master in self.state().items():
            master.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self._copy_masters()


class ZeRO(OneProcess):
    """Many processes, DeepSpeed's engine inside. Each holds its share of gradients, masters and
    moments (stage 2), and of the weights too (stage 3).
    """

    def __init__(self, model, args, config: dict):
        import deepspeed

        self.model, self.deepspeed = model, deepspeed
        if config["zero_optimization"]["stage"] == 3:
            self.partition(config, torch.bfloat16 if args.bf16 else torch.float32)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(trained, args), config=config
        )
        self.engine._copy_recovery_script = lambda folder: None  # a write that could fail unheard
        self.optimizer = self.engine.optimizer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

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

    def gather(self, items: list) -> list:
        return gather(items)

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
                state[name] = self.deepspeed.utils.safe_get_full_fp32_param(p).cpu()
            elif frozen and hasattr(p, "ds_id"):
                with self.deepspeed.zero.GatheredParameters([p]):
                    state[name] = p.detach().to("cpu", copy=True)
            if self.rank > 0:
                state.clear()
        return state

    def save(self, folder: Path, attempt):
        """NOTE: its ranks wait for one another, so a write that fails must not raise in there."""
        self.engine.checkpoint_engine.save = lambda state_dict, path: attempt(
            torch.save, state_dict, path
        )
        self.engine.save_checkpoint(
            str(folder), tag="state", exclude_frozen_parameters=True, save_latest=False
        )

    def load(self, folder: Path, world: int):
        """NOTE: DeepSpeed unpickles its files, so only checkpoints of this very run come here."""
        if world == self.world:
            self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
        else:
            self._load_universal(folder)

    def _load_universal(self, folder: Path):
        """What another number of processes wrote, through DeepSpeed's form for any number."""
        universal, attempt = folder.with_suffix(".universal"), Attempts()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        if self.rank == 0:
            attempt(make_universal, folder / "state", universal / "state")
        agree(attempt.faults)
        self.engine._config.load_universal_checkpoint = True
        self.engine.load_checkpoint(str(universal), tag="state")
        # Stage 3 has given all groups what the first one has, and one counter of steps to all.
        for group, own in zip(self.optimizer.param_groups, groups):
            group.update(own)
        for p, state in self.optimizer.state.items():
            state["step"] = state["step"].to(p.device, copy=True)
        dist.barrier()  # all have read it
        if self.rank == 0:
            shutil.rmtree(universal)


def make_universal(state: Path, out: Path):
    """Writes what DeepSpeed's processes have saved anew: whole, in a folder for each weight."""
    shutil.rmtree(out, ignore_errors=True)  # of a run that died meanwhile
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--inject_missing_state",
            "--input_folder",
            state,
            "--output_folder",
            out,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().split("\n")[-1])


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

# Flags that may differ between a run and its continuation: they change nothing that is learnt, as
# long as a step has as many rows.
FREE_FLAGS = {
    "output_dir",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "per_device_eval_batch_size",
    "local_rank",
    "report_to",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first."""
    steps = {
        int(path.name.split("-")[1]): path
        for path in out.iterdir()
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "progress.json").is_file()
    }
    return [steps[step] for step in sorted(steps)]


def check_empty(out: Path):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--output_dir {out}: not empty, and no run; name a new folder")


def rows_a_step(args) -> int:
    """The rows of a global batch."""
    return (
        args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * int(os.environ["WORLD_SIZE"])
    )


def open_run(args) -> tuple[str, list[Path]]:
    """The id of the run in `output_dir`, and the checkpoints to resume from, the best one last.

    Raises ValueError where `output_dir` is the source, another run's, or something else.
    """
    out = Path(args.output_dir)
    if out.resolve() == Path(args.model_name_or_path).resolve():
        raise ValueError(f"--output_dir {out}: the model comes from there; name a new folder")
    if not (out / "run.json").is_file():
        check_empty(out)
        if args.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"--output_dir {out}: no run there to resume from {args.resume_from_checkpoint}"
            )
        return secrets.token_hex(8), []
    if args.resume_from_checkpoint is None:
        raise ValueError(
            f"--output_dir {out} holds a run: resume it with --resume_from_checkpoint "
            "latest, or name a new folder"
        )
    run = llava.read_json(out / "run.json")
    for name, value in vars(args).items():
        if name not in FREE_FLAGS and run.get("args", {}).get(name) != value:
            raise ValueError(
                f"--output_dir {out} holds a run with --{name} "
                f"{run['args'].get(name)}, not {value}: name a new folder"
            )
    if run.get("rows_a_step") != rows_a_step(args):
        raise ValueError(
            f"--output_dir {out} holds a run of {run.get('rows_a_step')} rows a step, "
            f"not {rows_a_step(args)}: change --gradient_accumulation_steps"
        )
    if args.resume_from_checkpoint == "latest":
        return run["id"], checkpoints(out)
    return run["id"], [Path(args.resume_from_checkpoint)]


class Attempts:
    """What one rank does for itself, a write mostly, whose failure (a full disk, say) is kept until
    all ranks hear of it and stop together: one that raised alone would leave the others waiting.
    The one `except` in the loop.
    """

    def __init__(self):
        self.faults = []

    def __call__(self, do, *args, **options):
        """do(*args), whose last argument is the path that it writes to; None where that fails."""
        try:
            return do(*args, **options)
        except Exception as error:  # --report_to hands on whatever its library raises
            reason = f"{type(error).__name__}: {one_line(error)[:200]}"
            self.faults.append(
                f"{args[-1]}: not written ({reason}); the checkpoints before it stay"
            )


def save_checkpoint(engine, out: Path, progress: dict, limit: int, attempt, write=None):
    """All that a run needs to resume bit for bit, written aside, then renamed; `limit` are kept.

    `write(state, folder)` makes that of a LoRA run a complete adapter, too.
    """
    target = out / f"checkpoint-{progress['step']}"
    part = target.with_suffix(".part")
    attempt(os.makedirs, part / "state", exist_ok=True)
    agree(attempt.faults)
    engine.save(part, attempt)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    rng = {"cpu": torch.get_rng_state(), "cuda": cuda}
    attempt(torch.save, rng, part / f"rng-{engine.rank}.pt")
    state = engine.state(frozen=False) if write else None  # on every rank: it gathers
    if write and engine.rank == 0:
        attempt(write, state, part)
    agree(attempt.faults)  # every rank has written its share
    if engine.rank == 0:
        attempt(publish_checkpoint, progress, limit, target)
    agree(attempt.faults)


def publish_checkpoint(progress: dict, limit: int, target: Path):
    """Names the files of a checkpoint, whole now, renames it, and removes the oldest ones."""
    part = target.with_suffix(".part")
    files = {
        str(path.relative_to(part)): path.stat().st_size for path in sorted(part.rglob("*.pt"))
    }
    replace_file(json.dumps({**progress, "files": files}), part / "progress.json")
    replace_folder(part, target)
    for old in checkpoints(target.parent)[:-limit] if limit > 0 else []:
        shutil.rmtree(old)  # cut short, it is a damaged one, which `load_checkpoint` passes over


def damage(folder: Path, rank: int, world: int) -> list[str]:
    """What is wrong with a checkpoint, as far as this rank's part of its files shows.

    What torch saves is a zip with a checksum of each tensor. Nothing is unpickled before this.
    """
    path = folder / "progress.json"
    try:
        sizes = llava.read_json(path)["files"]
        for name in sorted(sizes)[rank::world]:
            path = folder / name
            if path.stat().st_size != sizes[name]:
                raise ValueError(f"not {sizes[name]} bytes long")
            with zipfile.ZipFile(path) as file:
                if wrong := file.testzip():
                    raise ValueError(f"the checksum of {wrong} is wrong")
    except Exception as error:  # whatever a damaged file brings about
        return [f"{path}: damaged ({one_line(error)})"]
    return []


def load_checkpoint(engine, folders: list[Path], run_id: str, seed: int) -> dict:
    """Restores the last of these checkpoints that is whole, and returns its progress.

    If other processes wrote it, as to their number, these draw dropout from `seed` and the step.
    """
    for folder in reversed(folders):
        missing = not (folder / "progress.json").is_file()
        agree([f"--resume_from_checkpoint {folder}: no checkpoint there"] if missing else [])
        faults = gather(damage(folder, engine.rank, engine.world))
        if not faults:
            break
        if folder == folders[0]:
            agree(faults)
        print(f"{faults[0]}: passed over")
    progress = llava.read_json(folder / "progress.json")
    del progress["files"]
    foreign = progress["run"] != run_id
    agree(
        [f"--resume_from_checkpoint {folder}: another run's; it takes only its own"]
        if foreign
        else []
    )
    engine.load(folder, progress["world"])
    if progress["world"] == engine.world:
        rng = torch.load(folder / f"rng-{engine.rank}.pt", map_location="cpu", weights_only=True)
        torch.set_rng_state(rng["cpu"])
        if rng["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    else:
        print(
            f"written by {progress['world']} processes, and these are {engine.world}: dropout is "
            "drawn anew"
        )
        torch.manual_seed(seed + engine.rank + progress["step"])
        progress["world"] = engine.world
    print(f"resumed from {folder}")
    return progress


def save_result(write, state: dict, out: Path):
    """Has write(state, folder) make a folder beside `out`, and renames it."""
    part = out.with_name(out.name + ".new")
    shutil.rmtree(part, ignore_errors=True)  # of a run that died while it saved
    write(state, part)
    replace_folder(part, out)


def replace_folder(part: Path, out: Path):
    """Renames `part`, written whole, to `out`, whose earlier content goes away."""
    gone = out.with_name(out.name + ".old")
    shutil.rmtree(gone, ignore_errors=True)
    if out.exists():
        out.rename(gone)
    part.rename(out)  # at once: deleting the old one takes its time
    shutil.rmtree(gone, ignore_errors=True)


def replace_file(content: str, path: Path):
    """Writes a text whole, or leaves the file as it was."""
    part = path.with_name(path.name + ".part")
    part.write_text(content)
    part.replace(path)


def begin_run(args, run_id: str, out: Path):
    """The folder of a run, with what `open_run` looks for."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists():
        run = {"id": run_id, "rows_a_step": rows_a_step(args), "args": vars(args)}
        replace_file(json.dumps(run, indent=2), out / "run.json")


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
        agree(
            [
                f"{name} should train, but its gradient is "
                f"{'missing' if finite is None else 'not finite'}"
                for name, finite in self.finite.items()
                if not finite
            ]
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
        f"{fault} (`python check.py` lists all such rows, --on_bad_record skip goes on "
        "without them)"
    )


def handle_faults(faults: list[str], everywhere: int, args):
    """Stops every rank if one has a row that could not be used, or says which are skipped."""
    if everywhere and args.on_bad_record == "stop":
        agree([unusable(fault) for fault in faults])
    for fault in faults:
        tqdm.write(f"skipped: {fault}", file=sys.stderr)  # from any rank


def since_best(progress: dict) -> int:
    """The evaluations since that with the lowest loss: 0 where the last one is the best so far."""
    losses = [loss for _, loss in progress["evaluations"]]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def check_finite(what: str, value: float, progress: dict, window: list[dict], rows):
    """Stops the run, before anything is saved, and names the records of the window."""
    if not math.isfinite(value):
        mine = [rows.where(i) for batch in window for i in batch["rows"] if i >= 0]
        raise Agreed(
            f"step {progress['step'] + 1}: the {what} is {value}; its records: "
            f"{'; '.join(gather(mine))}. The last checkpoint stays"
        )


def training_mode(model):
    """Dropout where it is asked for; the tower stays in eval mode, as when it learnt to see."""
    model.train()
    model.vision_tower.eval()


def check_rows(rows: data.LlavaDataset, on_bad_record: str):
    """Says before step 1, not days later, which rows cannot be used."""
    bad = rows.records.bad_rows
    fault = rows[bad[0] if bad else 0]["fault"]  # of a good one, also of its picture
    if fault and (on_bad_record == "stop" or len(bad) == len(rows)):
        raise ValueError(f"{len(bad) or 1} of {len(rows)} rows are bad: {unusable(fault)}")
    if bad:
        tqdm.write(f"{len(bad)} of {len(rows)} rows are bad, the first: {fault}", file=sys.stderr)


def open_rows(args, source: Path):
    """The text contract, and the rows to train on and to evaluate on (None where not given)."""
    config, tokenizer = llava.read_config(source), llava.open_tokenizer(source, args.adapter)
    if config.model_type != "llava":
        raise ValueError(f"--model_name_or_path {source}: not a LLaVA folder: build.py makes one")
    text, sets = data.ChatText(tokenizer, args.version), []
    for path in (args.data_path, args.validation_data_path):
        if not path:
            sets.append(None)
            continue
        rows = data.open_dataset(
            path,
            args.image_folder,
            source,
            config,
            tokenizer,
            aspect_ratio=args.image_aspect_ratio,
            max_length=args.model_max_length,
            on_bad_record="skip",
            text=text,
        )
        check_rows(rows, args.on_bad_record)
        sets.append(rows)
    return text, *sets


def train(args, config: dict | None, signals: list) -> int:
    """Trains, or resumes, with DeepSpeed's `config` or alone; 0 when it is done, 3 when it
    was asked to stop: by `signals`, which fills as they come, or by a file `stop` in `output_dir`.
    """
    torch.manual_seed(args.seed)
    device, out = "cuda" if torch.cuda.is_available() else "cpu", Path(args.output_dir)
    source = together(llava.resolve, args.model_name_or_path)
    run_id, found = together(open_run, args)
    if (out / "final").is_dir():
        print(f"{out}: this run is complete")
        return 0
    text, train_set, eval_set = together(open_rows, args, source)
    stage = config["zero_optimization"]["stage"] if config else 0
    model = together(load_model, args, source, device, stage)
    torch.manual_seed(args.seed + int(os.environ["RANK"]))  # each rank drops out differently
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
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
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
    progress = {
        "run": run_id,
        "world": engine.world,
        "step": 0,
        "skipped": 0,
        "cut": 0,
        "evaluations": [],
    }  # step and loss of each
    if found:
        progress = load_checkpoint(engine, found, run_id, args.seed)
    attempt, log, stop_file = Attempts(), report.Silent(), out / "stop"
    if engine.rank == 0 and not trial:
        attempt(begin_run, args, run_id, out)
        step = progress["step"] if found else -1
        log = attempt(lambda out: report.Log(out, run_id, step, vars(args)), out) or log
        attempt(Path.unlink, stop_file, missing_ok=True)  # an earlier run's
    agree(attempt.faults)
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
        attempt(lambda out: log.evaluation(metrics, answers, *seen), out)
        progress["evaluations"].append([progress["step"], metrics["eval_loss"]])
        if since_best(progress) == 0:
            save("best")
        training_mode(model)

    def over():
        patience = args.early_stopping_patience or math.inf
        return progress["step"] == total_steps or since_best(progress) >= patience

    def save(name):
        state = engine.state(frozen=args.train_type != "use_lora")  # on every rank: it gathers
        if engine.rank == 0:
            attempt(save_result, write, state, out / name)
        agree(attempt.faults)

    if eval_set and not found:
        validate()
    steps = windows(progress["step"])
    while not over() and not stopping:
        # The whole window is fetched first: its loss is divided by all its supervised tokens.
        began = time.perf_counter()
        window = next(steps)
        waited = time.perf_counter() - began
        faults = [fault for batch in window for fault in batch["faults"]]
        supervised, tokens, padded, count, cut, skipped, stopping, failed = engine.sum(
            *numbers_of(window),
            len(faults),
            bool(signals) or stop_file.exists(),
            len(attempt.faults),
        )
        if failed:
            agree(attempt.faults)
        handle_faults(faults, skipped, args)

        sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens right
        # DeepSpeed averages gradients over ranks; * world turns the average back into a sum.
        for i, batch in enumerate(window):
            loss, right = engine.forward(*to_device(batch, device))
            engine.backward(loss * engine.world / max(supervised, 1), i == accumulation - 1)
            sums += torch.stack([loss.detach(), right])
        loss, right = (x / max(supervised, 1) for x in engine.sum(*sums.tolist()))
        check_finite("loss", loss, progress, window, rows)
        if first_window:
            first_window.check()
            first_window = None  # once is enough
        factor = schedule(progress["step"], total_steps, warmup_steps, args.lr_scheduler_type)
        grad_norm = engine.step(factor)
        check_finite("norm of the gradient", grad_norm, progress, window, rows)
        progress["step"] += 1
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
            attempt(lambda out: log.step(metrics), out)
        if trial:
            trial.seconds.append(seconds)
        if eval_set and (step % eval_steps == 0 or step == total_steps):
            validate()
        if step in (steps_per_epoch, total_steps) and progress["skipped"] + progress["cut"]:
            tqdm.write(f"{progress['skipped']} rows were skipped, {progress['cut']} cut short")
        if not trial and (stopping or args.save_steps > 0 and step % args.save_steps == 0):
            save_checkpoint(
                engine,
                out,
                progress,
                args.save_total_limit,
                attempt,
                write if args.train_type == "use_lora" else None,
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
    attempt(lambda out: log.close(), out)
    agree(attempt.faults)
    report.last_words(vars(args), progress["step"], total_steps, progress["evaluations"])
    return 0


# --- commands ---


# Flags of LLaVA's own scripts: the value that holds here anyway, and what to use for another.
LLAVA_FLAGS = {
    "--lora_enable": ("False", "--train_type use_lora"),
    "--tune_mm_mlp_adapter": ("False", "--train_type projector"),
    "--freeze_backbone": ("False", "--train_type projector"),
    "--pretrain_mm_mlp_adapter": (None, "the folder of stage 1 as --model_name_or_path"),
    "--vision_tower": (None, "`python build.py`, once"),
    "--mm_projector_type": (None, "`python build.py`, once"),
    "--mm_vision_select_layer": ("-2", "vision_feature_layer in config.json"),
    "--mm_use_im_start_end": ("False", "a template; pictures have no such tokens here"),
    "--mm_use_im_patch_token": ("False", "a template; pictures have no such tokens here"),
    "--lazy_preprocess": ("True", "nothing: rows are always prepared as they are needed"),
    "--fp16": ("False", "--bf16"),
}


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
    add("--max_steps", type=int, default=-1, help="optimizer steps; -1: as the epochs say")
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
    add("--seed", type=int, default=42, help="of order and dropout")
    add(
        "--dataloader_num_workers",
        type=number(int, 0),
        help="processes that prepare batches",
        default=min(4, len(os.sched_getaffinity(0))),
    )
    # evaluation, saving, logging
    add("--dry_run", **flag, default=False, help="measure memory and time, and write nothing")
    add("--per_device_eval_batch_size", type=count, help="rows; default: as in training")
    add("--eval_steps", type=int, default=-1, help="steps between evaluations; -1: every epoch")
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
    add("--save_steps", type=int, default=500, help="steps between checkpoints; -1: none")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept; -1: all")
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
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.deepspeed:
        import deepspeed

        # gloo will do: compiling this, a run that is killed leaves a lock, and all later ones wait.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()
    elif os.environ["WORLD_SIZE"] != "1":
        raise ValueError("many processes need --deepspeed ds_zero2.json, or ds_zero3.json")
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all


def main(argv=None) -> int:
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signals, handlers = [], {}
    try:
        start_processes(args)
        config = together(deepspeed_config, args) if args.deepspeed else None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            handlers[number] = signal.signal(number, lambda number, _: signals.append(number))
        return train(args, config, signals)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, Agreed):
            print(f"train.py: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        print(f"train.py: out of memory: {less_memory(args)}", file=sys.stderr)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
