"""The training loop of LLaVA: two stages, one process or many.

    projector       stage 1: the projector alone, on captions (template `plain`)
    freeze_vision   stage 2: projector and language model, on instructions
    full            stage 2, and the vision tower too
    use_lora        stage 2, of the language model only low-rank adapters; --bits 4 makes it QLoRA

    python train.py --model_name_or_path DIR --train_type projector --data_path F --image_folder DIR
                    --output_dir DIR
    deepspeed train.py --deepspeed ds_zero2.json (the same flags)
    python train.py --model_name_or_path DIR --eval_only --validation_data_path F --image_folder DIR

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
import ctypes
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data
import lora
import model as llava
from cli import BOOLEAN, Parser, number

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
    model = llava.open_model(
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
        faults.append(llava.one_line(error))
    agree(faults)
    return result


class Alone:
    """One process: the sums over all ranks are its own."""

    rank, world = 0, 1

    def all_reduce(self, *numbers):
        return numbers


class Plain(Alone):
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


class ZeRO(Alone):
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

    def all_reduce(self, *numbers):
        total = torch.tensor(numbers, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.tolist()

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


# --- evaluation ---

# What the VQA score takes for the same: contractions without one of their apostrophes, numbers.
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've""".split()
    for i, letter in enumerate(word)
    if letter == "'"
}
ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}


def normalise(answer: str) -> str:
    """An answer as the VQA score compares it: no case, articles, nor punctuation but ' and : and
    decimal points (github.com/GT-Vision-Lab/VQA, vqaEval.py).
    """
    text = kept = " ".join(answer.split())
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        loose = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        kept = kept.replace(mark, "" if loose else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", kept).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """How far people agree: min(1, matches / 3), averaged over the sets that leave one of their
    answers (ten in VQA) out.
    """
    same = [normalise(answer) == normalise(prediction) for answer in answers]
    return sum(min(1, (sum(same) - one) / 3) for one in same) / len(same)


class Questions(Dataset):
    """Each answer in the first `count` rows as a question: its item is what stands before it."""

    def __init__(self, rows: data.LlavaDataset, count: int):
        self.rows, self.asked = rows, []
        for i in range(count):
            try:
                turns, _ = data.parse_record(rows.records[i])
            except ValueError:  # counted, or raised, with the losses already
                continue
            answers = sum(turn["role"] == "assistant" for turn in turns)
            self.asked += [(i, k) for k in range(answers)]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, j: int) -> dict:
        if j < 0:
            return self.rows[-1]
        i, k = self.asked[j]
        item = self.rows[i]
        supervised = item["labels"] != data.IGNORE
        starts = (supervised & ~supervised.roll(1)).nonzero().flatten().tolist()
        if k >= len(starts):  # cut off by --model_max_length
            return self.rows[-1]
        ids = item["input_ids"][: starts[k]]
        pictures = item["pixel_values"][: (ids == self.rows.image_token_id).sum()]
        return {**item, "input_ids": ids, "labels": ids, "pixel_values": pictures, "row": j}

    def expected(self, j: int) -> dict:
        """{row, id, question, answer}; kind too where the row has `kinds`, one for each question,
        and answers where it has `answers`, of many people to its only question.
        """
        i, k = self.asked[j]
        row = self.rows.records[i]
        turns, _ = data.parse_record(row)
        at = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        kinds, answers = strings(row, "kinds"), strings(row, "answers")
        more = {"kind": kinds[k]} if len(kinds) == len(at) else {}
        if len(at) == 1 and len(answers) > 3:  # of fewer, three others could never agree
            more["answers"] = answers
        return {
            "row": i,
            "id": row.get("id"),
            "question": turns[at[k] - 1]["content"],
            "answer": turns[at[k]]["content"].strip(),
            **more,
        }


def strings(row: dict, key: str) -> list[str]:
    """The list of strings under an optional key; anything else there is not what ours means."""
    found = row.get(key)
    return found if isinstance(found, list) and all(isinstance(x, str) for x in found) else []


def eval_batches(dataset, engine, args, collate, device):
    """This rank's batches; rows of weight 0 fill up, so that all ranks have equally many."""
    share = args.per_device_eval_batch_size * engine.world
    rows = np.pad(np.arange(len(dataset)), (0, -len(dataset) % share), constant_values=-1)
    batches = data.micro_batches(rows.reshape(-1, share), 1, engine.world, engine.rank)
    return loader(dataset, batches, collate, args, device)


@torch.no_grad()
def evaluate(model, dataset, engine, collate, args, device, step=0) -> tuple[dict, list[dict]]:
    """Token-weighted loss and accuracy over all rows, and greedy answers to the questions of the
    first `eval_samples`: ({name: figure}, [{row, id, question, answer, prediction, right}]); the
    same on any number of processes. `step` is the one that the model is at.

    An answer is asked for with the true turns before it as its context, as in training.
    """
    model.eval()
    sums, faults = np.zeros(3), []  # loss, tokens predicted right, tokens
    for batch in eval_batches(dataset, engine, args, collate, device):
        faults += batch["faults"]  # why rows could not be used
        loss, right = model(*to_device(batch, device))
        sums += loss.item(), right.item(), (batch["labels"] >= 0).sum().item()
    loss, right, tokens, faulty = engine.all_reduce(*sums.tolist(), len(faults))
    handle_faults(faults, faulty, args)
    if not tokens or not math.isfinite(loss):
        raise Agreed(
            f"{dataset.records.path}: "
            + (f"the loss on its rows is {loss}" if tokens else "none of its rows can be used")
        )
    metrics = {"step": step, "eval_loss": loss / tokens, "eval_token_accuracy": right / tokens}
    count = len(dataset) if args.eval_samples < 0 else min(args.eval_samples, len(dataset))
    questions = Questions(dataset, count)
    answers = []
    for batch in eval_batches(questions, engine, args, collate, device):
        answers += answer(model, batch, questions, engine, args, device)
    answers = [a for _, a in sorted(gather(answers), key=lambda pair: pair[0])]
    scores = {}
    for a in answers:
        scores.setdefault("eval_exact_match", []).append(a["right"])
        if "kind" in a:
            scores.setdefault(f"eval_exact_match/{a['kind']}", []).append(a["right"])
        if "vqa_accuracy" in a:
            scores.setdefault("eval_vqa_accuracy", []).append(a["vqa_accuracy"])
    means = {name: sum(some) / len(some) for name, some in sorted(scores.items())}
    return metrics | means, answers


def answer(model, batch: dict, questions: Questions, engine, args, device) -> list[tuple]:
    """Greedy answers to a batch of questions, with their numbers: [(j, {id, question, ...})]."""
    prompts = [ids[:n] for ids, n in zip(batch["input_ids"], batch["lengths"])]
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_side="left").to(device)
        for rows in (prompts, [torch.ones_like(ids) for ids in prompts])
    )
    text = questions.rows.text
    new = model.generate(
        ids,
        batch["pixel_values"].to(device),
        mask,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=text.stop_ids,
        do_sample=False,
        synced_gpus=engine.world > 1,
    )
    answers = []
    for j, words in zip(batch["rows"], text.tokenizer.batch_decode(new, skip_special_tokens=True)):
        if j >= 0:
            words = (words.split("\n")[0] if text.version == "plain" else words).strip()
            said = {**questions.expected(j), "prediction": words}
            said["right"] = words == said["answer"]
            if "answers" in said:
                said["vqa_accuracy"] = vqa_accuracy(words, said.pop("answers"))
            answers.append((j, said))
    return answers


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
            reason = f"{type(error).__name__}: {llava.one_line(error)[:200]}"
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
        return [f"{path}: damaged ({llava.one_line(error)})"]
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


def replace_file(content: str | Image.Image, path: Path):
    """Writes a text or a picture whole, or leaves the file as it was."""
    part = path.with_name(path.name + ".part")
    part.write_text(content) if isinstance(content, str) else content.save(part, "PNG")
    part.replace(path)


# --- what people see ---


def describe(
    model, args, steps_per_epoch: int, total_steps: int, rows: int, world: int, held: dict
):
    """Prints what trains, the batch arithmetic, and what memory of a process follows from both."""
    print(f"{'module':<24}{'parameters':>16}{'trainable':>16}  dtype")
    for name, part in model.named_children():
        count = lora.count(part.parameters())
        trainable = lora.count(p for p in part.parameters() if p.requires_grad)
        dtype = str(next(part.parameters()).dtype).removeprefix("torch.")
        print(f"{name:<24}{count:>16,}{trainable:>16,}  {dtype}")
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    print(
        f"batch: {micro} rows x {accumulation} accumulated x {world} processes = "
        f"{micro * accumulation * world} rows a step"
    )
    print(f"steps: {rows:,} rows, {steps_per_epoch:,} steps an epoch, {total_steps:,} in all")
    print(
        "memory: " + ", ".join(f"{what} {size / 2**20:,.1f} MiB" for what, size in held.items()),
        flush=True,
    )


def bytes_held(model, args, world: int, stage: int) -> dict:
    """What a process holds between steps, by arithmetic, {what: bytes}.

    ZeRO partitions among `world` processes: stage 2 what the optimizer needs, 3 the weights too.
    """
    weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    training = lora.count(p for p in model.parameters() if p.requires_grad)
    training /= world if stage >= 2 else 1
    weights /= world if stage == 3 else 1
    masters = args.bf16 or stage > 0  # DeepSpeed has fp32 masters of fp32 weights too
    return {
        "weights": weights,
        "masters": 4 * training * masters,
        "gradients": 4 * training,
        "moments": 8 * training,
    }


def count_weights(model) -> list[tuple]:
    """(weights that multiply, those of them that train) of tower, projector, decoder and head."""
    counts = []
    for part in (
        model.vision_tower,
        model.multi_modal_projector,
        model.language_model.base_model,
        model.language_model.get_output_embeddings(),
    ):
        weights = [
            w
            for m in part.modules()
            for w in m.parameters(recurse=False)
            if lora.true_shape(w)[1:] and not isinstance(m, torch.nn.Embedding)
        ]
        counts.append((lora.count(weights), lora.count(w for w in weights if w.requires_grad)))
    return counts


def count_flops(model, weights: list[tuple], batch: dict) -> int:
    """Floating-point operations of a training step on a batch; `weights`: of `count_weights`.

    For each weight and token two in the forward pass, two where a gradient passes on, two where the
    weight trains; attention's products likewise. What is recomputed, or never run, does not count.
    """
    (rows, width), pictures = batch["input_ids"].shape, len(batch["pixel_values"])
    tower, decoder = model.vision_tower.vision_model.config, model.config.text_config
    patches = model.vision_tower.vision_model.embeddings.num_positions  # with CLIP's CLS
    supervised = (batch["labels"] >= 0).sum().item()
    parts = [  # tokens, operations of attention's two products (half of them if causal)
        (
            pictures * patches,
            4 * pictures * patches**2 * tower.hidden_size * tower.num_hidden_layers,
        ),
        (pictures * model.tokens_per_picture, 0),
        (rows * width, 2 * rows * width**2 * decoder.hidden_size * decoder.num_hidden_layers),
        (supervised, 0),
    ]
    total, gradient = 0, False
    for (count, training), (tokens, attention) in zip(weights, parts):
        passing = 2 * tokens * count
        gradient = gradient or training > 0
        total += passing + attention + gradient * (passing + 2 * attention) + 2 * tokens * training
    return total


def matmul_rate(device: str, dtype) -> float:
    """The device's best rate in products of square matrices, in FLOP/s: what MFU is a share of.

    Ten products are timed at once, so that a GPU's start and wait hardly count.
    """
    n, seconds = 4096 if device == "cuda" else 512, []
    own = torch.Generator(device)  # the default would draw from dropout's
    a = torch.randn(n, n, generator=own, device=device, dtype=dtype)
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - began)
    return 20 * n**3 / min(seconds)


def peak_gib(device: str) -> float:
    """The most memory held so far: on the GPU where there is one, else by this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Progress(tqdm):
    """One line that moves in a terminal, whole lines in a log file; either has 80 columns."""

    def __init__(self, total: int, done: int, rank: int):
        super().__init__(
            total=total,
            initial=done,
            dynamic_ncols=True,
            disable=rank > 0 or not sys.stderr.isatty(),
            bar_format="{n_fmt}/{total_fmt} {remaining} {desc}",
        )

    def show(self, m: dict, log: bool):
        speed, peak = (f"{x:.{int(x < 10)}f}" for x in (m["tokens_per_s"] / 1000, m["peak_gib"]))
        text = (
            f"loss {m['loss']:.3f} lr{m['lr']:.0e} {speed}k/s "
            f"sup{m['supervised']:.0%} pad{m['padded']:.0%} wait{m['waiting']:.0%} "
            f"mfu{m['mfu']:.0%} {peak}G"
        )
        self.set_description_str(text, refresh=False)
        self.update()
        if log and self.disable:
            print(f"{m['step']}/{self.total} {text}", flush=True)


def visible(text: str, lacks=lambda character: False) -> str:
    """A text with escapes for control characters and the like, and for what a font `lacks`."""
    return "".join(
        c
        if c.isspace() or c.isprintable() and not lacks(c)
        else c.encode("unicode_escape").decode()
        for c in text
    )


def headline(m: dict) -> str:
    """The figures of an evaluation in a line, but for those of single kinds of questions."""
    shares = [
        f"{name.removeprefix('eval_').replace('_', ' ')} {value:.1%}"
        for name, value in m.items()
        if name not in ("step", "eval_loss") and "/" not in name
    ]
    return ", ".join([f"step {m['step']}: validation loss {m['eval_loss']:.4f}", *shares])


def report(m: dict, answers: list[dict]):
    """Prints an evaluation: its figures, and a few questions with what was said and expected."""
    texts = [headline(m)]
    if kinds := [f"{name.split('/')[1]} {value:.1%}" for name, value in m.items() if "/" in name]:
        texts.append(", ".join(kinds))
    for a in answers[:: max(1, len(answers) // 4)][:4]:
        question, expected, said = (
            textwrap.shorten(visible(a[key].replace(data.IMAGE, "")), 80, placeholder="...")
            for key in ("question", "answer", "prediction")
        )
        texts.append(f"{question} > {said}" + ("" if a["right"] else f" (not {expected})"))
    for k, text in enumerate(texts):
        tqdm.write(textwrap.fill(text, 80, initial_indent="  " * (k > 0), subsequent_indent="    "))


# samples.png and curves.png: right and wrong, and the lines, differ in more than colour.
INK, GREY, MAT, GOOD, BAD, BLUE = "#1a1a1a", "#606060", "#c4c8cc", "#00795c", "#c44601", "#0b62a4"
LOSSES = {
    "loss": ("training", BLUE, 0),  # a line's name, its colour, the corners of its marks
    "eval_loss": ("validation", BAD, 24),
}
ACCURACIES = {
    "token_accuracy": ("training tokens", BLUE, 0),
    "eval_token_accuracy": ("validation tokens", BAD, 24),
    "eval_exact_match": ("exact match", GOOD, 4),
    "eval_vqa_accuracy": ("VQA", INK, 3),
}
LADDER = [k * 10.0**e for e in range(-3, 9) for k in (1, 2, 5)]  # where ticks may stand


def wrap(text: str, font, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` pixels; what the font cannot show is written as escapes."""
    lacking, lines = bytes(font.getmask("\uffff")), [""]
    for word in visible(text, lambda c: bytes(font.getmask(c)) == lacking).split():
        for piece in [word] if font.getlength(word) <= width else word:  # or letter by letter
            longer = lines[-1] + " " * (piece == word) + piece if lines[-1] else piece
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-3] + "..."]


def draw_samples(answers: list[dict], rows: data.LlavaDataset, title: str) -> Image.Image:
    """A sheet of up to twelve questions with their pictures, what was expected and predicted."""
    shown = [answers[i * len(answers) // 12] for i in range(12)] if len(answers) > 12 else answers
    sheet, y = Image.new("RGB", (1632, 3200), "white"), 96
    ImageDraw.Draw(sheet).text((48, 24), title, INK, ImageFont.load_default(26))
    for k in range(0, len(shown), 3):
        y = 48 + max(
            draw_card(sheet, 48 + 528 * i, y, a, rows) for i, a in enumerate(shown[k : k + 3])
        )
    return sheet.crop((0, 0, sheet.width, y))


def draw_card(sheet, x: int, y: int, a: dict, rows: data.LlavaDataset) -> int:
    """One question, 480 pixels wide, below its first eight pictures; returns where it ends.

    An answer with a VQA score above zero counts as right.
    """
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    names = data.image_list(rows.records[a["row"]])[:8]
    pen.rectangle((x, y, x + 479, y + 319), MAT)
    for k, name in enumerate(names):
        picture, width = data.decode_picture(rows.pictures.read(name), name), 480 // len(names)
        picture = ImageOps.pad(picture, (width - 8, 312), color=MAT)
        sheet.paste(picture, (x + k * width + 4, y + 4))
    if not names:
        pen.text((x + 240, y + 160), "no picture", INK, font, "mm")
    y += 328
    right = a.get("vqa_accuracy", a["right"]) > 0
    for text, colour in (
        (a["question"].replace(data.IMAGE, " "), INK),
        (f"expected: {a['answer']}", GREY),
        (f"{'right' if right else 'wrong'}: {a['prediction']}", GOOD if right else BAD),
    ):
        lines = wrap(text, font, 480, 3)
        pen.multiline_text((x, y), "\n".join(lines), colour, font, spacing=8)
        y += 34 * len(lines)
    return y


def draw_curves(metrics: list[dict]) -> Image.Image:
    """Losses, on a log scale, and accuracies over steps; an upright line where the loss is best."""
    sheet = Image.new("RGB", (1760, 620), "white")
    values = [m[key] for m in metrics for key in LOSSES if key in m]
    low = max(n for n in LADDER if n <= max(min(values), LADDER[0]))
    high = min(n for n in LADDER if n > max(low, *values))

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
    best = min((m["eval_loss"], m["step"]) for m in metrics if "eval_loss" in m)[1]
    pen.line([at(best, value) for value in ticks], GREY, 2)
    pen.text((left + 740, 20), f"best loss at step {best:,} (upright line)", GREY, font, "ra")
    x = left
    for key, (name, colour, corners) in lines.items():
        if found := [(m["step"], m[key]) for m in metrics if key in m]:
            share = 1 if corners else len(found) // 120 + 1  # training's are many, and noisy: means
            groups = [np.mean(found[k : k + share], axis=0) for k in range(0, len(found), share)]
            for points in [at(*group) for group in groups], [(x + 6, 78), (x + 26, 78)]:
                pen.line(points, colour, 3)
                for point in points if corners else ():
                    pen.regular_polygon((*point, 8), corners, fill=colour)
            pen.text((x + 40, 64), name, INK, font)
            x += 60 + font.getlength(name)


def open_reporter(args, run_id: str, step: int, out: Path):
    """A function (figures, answers, sheet) that shows these in TensorBoard, in Weights & Biases or
    nowhere, for a run that resumes from `step`.
    """
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

        def tell(m, answers, sheet):
            for name, value in m.items():
                writer.add_scalar(name, value, m["step"])
            if sheet:
                writer.add_text(
                    "answers",
                    "\n\n".join(
                        f"{a['question']} > {a['prediction']} ({a['answer']})" for a in answers
                    ),
                    m["step"],
                )
                writer.add_image("samples", np.asarray(sheet), m["step"], dataformats="HWC")
            writer.flush()
    elif args.report_to == "wandb":
        import wandb

        try:
            run = wandb.init(
                project="llava",
                name=out.name,
                dir=out,
                id=run_id,
                resume="allow",
                config=vars(args),
            )
        except wandb.Error as error:
            raise ValueError(
                f"--report_to wandb: {llava.one_line(error)} (WANDB_MODE=offline needs no account)"
            ) from None
        columns = ["id", "question", "answer", "prediction", "right"]

        def tell(m, answers, sheet):
            if sheet:
                rows = [[str(a[key]) for key in columns] for a in answers]
                m = {**m, "answers": wandb.Table(columns, rows), "samples": wandb.Image(sheet)}
            run.log(m, step=m["step"])
    else:

        def tell(*_):
            pass

    return tell


def append(path: Path, *rows: dict):
    # Half a surrogate pair is no UTF-8; so written, it is JSON's escape for it.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def whole_lines(path: Path) -> list[str]:
    """Split at "\n" alone: answers may hold other ends of lines. The last may be cut short."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def open_log(args, run_id: str, step: int, attempt, out: Path):
    """Begins the folder of a run, or takes back the lines after `step`, from which it resumes.

    Returns log(m, answers, rows), which shows a step's figures, or an evaluation's with its answers
    to questions on `rows`, to all who look: files, pictures, --report_to.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists():  # what `open_run` looks for
        run = {"id": run_id, "rows_a_step": rows_a_step(args), "args": vars(args)}
        replace_file(json.dumps(run, indent=2), out / "run.json")
    for path in (out / "metrics.jsonl", out / "predictions.jsonl"):
        kept = [line + "\n" for line in whole_lines(path) if json.loads(line)["step"] <= step]
        replace_file("".join(kept), path)
    tell = open_reporter(args, run_id, step, out)

    def show(m, answers, rows, out):
        sheet = None
        append(out / "metrics.jsonl", m)
        if rows:
            append(out / "predictions.jsonl", *({"step": m["step"], **a} for a in answers))
            sheet = draw_samples(answers, rows, headline(m))
            replace_file(sheet, out / "samples.png")
            metrics = [json.loads(line) for line in whole_lines(out / "metrics.jsonl")]
            replace_file(draw_curves(metrics), out / "curves.png")
        tell(m, answers, sheet)

    return lambda m, answers=(), rows=None: attempt(show, m, answers, rows, out)


def summarize(args, progress: dict, total_steps: int, source: Path):
    """Prints what was reached, where it lies, and what to do with it."""
    out, step, losses = args.output_dir, progress["step"], dict(progress["evaluations"])
    early = f" of {total_steps}: {since_best(progress)} evaluations without a better loss"
    print(f"done after step {step}{early if step < total_steps else ''}: {out}/final")
    best = min(losses, key=losses.get, default=step)
    if losses:
        (first, *_, last), lowest = losses.values(), losses[best]
        print(
            f"best at step {best}: validation loss {lowest:.4f}, {first - lowest:.4f} below the "
            f"first and {last - lowest:.4f} below the last:\n  {out}/best"
        )
    folder = f"{out}/{'best' if best < step else 'final'}"
    folder = f"{source} --adapter {folder}" if args.train_type == "use_lora" else folder
    print(f"  python model.py chat --model_name_or_path {folder} --image FILE")
    if args.train_type == "use_lora":
        print(f"  python lora.py merge --model_name_or_path {folder} --out {out}/merged")


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


class Trial:
    """--dry_run: the heaviest step twice (the first one allocates AdamW's moments), and a few more
    as they come; nothing is written.
    """

    def __init__(self, plan, lengths, total_steps: int, device: str):
        size = np.where(plan < 0, 0, lengths[plan]).sum(axis=1)  # tokens of each step, about
        tried = [0, *range(min(5, len(plan)))]
        self.plan, self.size, self.total_steps = plan[tried], size[tried], total_steps
        self.total, self.seconds = size.mean() * total_steps, []
        self.device, self.before = device, peak_gib(device)

    def report(self, held: dict) -> str:
        seconds = sum(self.seconds[1:]) / self.size[1:].sum() * self.total  # the first one warms up
        training = (held["gradients"] + held["moments"]) / 2**30
        peak = peak_gib(self.device)
        return (
            f"dry run: peak {peak:.2f} GiB, of it {self.before:.2f} before the first step, "
            f"{training:.2f} gradients and moments, {peak - self.before - training:.2f} "
            f"activations and logits; {self.total_steps:,} steps take "
            f"{datetime.timedelta(seconds=math.ceil(seconds))}, evaluations not counted"
        )


def to_device(batch: dict, device) -> tuple:
    return tuple(
        batch[key].to(device, non_blocking=True) for key in ("input_ids", "pixel_values", "labels")
    )


def loader(dataset, batches: list, collate, args, device) -> DataLoader:
    """Batches, prepared by worker processes; forked ones share the rows with this one."""
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the default would draw from dropout's
        pin_memory=device == "cuda",
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


def evaluate_only(args) -> int:
    """Evaluates a model, or a model and an adapter; writes figures to `output_dir`, if given."""
    out, source = args.output_dir and Path(args.output_dir), llava.resolve(args.model_name_or_path)
    if out:
        check_empty(out)
    _, _, rows = open_rows(args, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args, source, device)
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    metrics, answers = evaluate(model, rows, Alone(), collate, args, device)
    report(metrics, answers)
    if out:
        attempt = Attempts()
        if log := attempt(open_log, args, secrets.token_hex(8), -1, attempt, out):
            log(metrics, answers, rows)
        agree(attempt.faults)
    return 0


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
    held = bytes_held(model, args, engine.world, stage)
    describe(model, args, steps_per_epoch, total_steps, len(rows), engine.world, held)
    trial = Trial(steps_of(0), rows.lengths, total_steps, device) if args.dry_run else None
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
    attempt, log, stop_file = Attempts(), lambda *_: None, out / "stop"
    if engine.rank == 0 and not trial:
        log = attempt(open_log, args, run_id, progress["step"] if found else -1, attempt, out)
        attempt(Path.unlink, stop_file, missing_ok=True)  # an earlier run's
    agree(attempt.faults)
    write = functools.partial(write_result, model, args, text, source)
    bar = Progress(total_steps, progress["step"], engine.rank)
    rate, weights = matmul_rate(device, next(model.parameters()).dtype), count_weights(model)
    first_window, stopping = FirstWindow(model), False
    training_mode(model)

    def windows(step):
        """The micro-batches of this rank for each step from `step` on, epoch after epoch."""
        epoch, start = divmod(step, steps_per_epoch)
        while True:
            micro = data.micro_batches(
                steps_of(epoch), accumulation, engine.world, engine.rank, start
            )
            batches = iter(loader(train_set, micro, collate, args, device))
            yield from zip(*[batches] * accumulation)  # as many at a time
            epoch, start = epoch + 1, 0

    def validate():
        metrics, answers = evaluate(
            model, eval_set, engine, collate, args, device, progress["step"]
        )
        report(metrics, answers)
        log(metrics, answers, eval_set)
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
        supervised, tokens, padded, count, cut, skipped, stopping, failed = engine.all_reduce(
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
        loss, right = (x / max(supervised, 1) for x in engine.all_reduce(*sums.tolist()))
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
            "mfu": sum(count_flops(model, weights, batch) for batch in window) / seconds / rate,
            "peak_gib": peak_gib(device),
        }
        to_log = step % args.logging_steps == 0 or step == total_steps
        bar.show(metrics, to_log)
        if to_log:
            log(metrics)
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
            f"stopped after step {progress['step']} of {total_steps}: resume with "
            "--resume_from_checkpoint latest"
        )
        return 3
    if trial:
        print(trial.report(held))
        return 0
    save("final")
    summarize(args, progress, total_steps, source)
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


def cores() -> int:
    """The cores that this process may use, which a container or SLURM may have made fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
    add("--adapter", help="an adapter to evaluate, or to train on from")
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
        default=min(4, cores()),
    )
    # evaluation, saving, logging
    add("--eval_only", **flag, default=False, help="evaluate, and train nothing")
    add("--dry_run", **flag, default=False, help="measure memory and time, and write nothing")
    add("--per_device_eval_batch_size", type=count, default=16, help="rows of a batch")
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
    needed = (
        ["validation_data_path"] if args.eval_only else ["data_path", "output_dir", "train_type"]
    )
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
        (
            args.eval_only and (args.dry_run or args.resume_from_checkpoint),
            "--eval_only trains nothing: leave --dry_run and --resume_from_checkpoint out",
        ),
        (
            args.eval_only and args.deepspeed,
            "--eval_only is for one process: leave --deepspeed out",
        ),
    ]


def less_memory(args) -> str:
    """The next flag to try where a run does not fit: those that cost nothing, or least, first."""
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if args.eval_only:
        return f"try --per_device_eval_batch_size {max(1, args.per_device_eval_batch_size // 2)}"
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


def unseen_gpu() -> str:
    """What shows that this machine, or job, has a GPU, or nothing."""
    query = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    if shutil.which("nvidia-smi"):
        found = subprocess.run(query.split(), capture_output=True, text=True)
        if found.returncode == 0 and found.stdout:
            name, driver = found.stdout.splitlines()[0].rsplit(", ", 1)
            return f"nvidia-smi lists {name}, driver {driver}"
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if given != "0":
        return f"SLURM gave this job {given} GPU(s) on this node"
    return "there is /dev/nvidia0" if os.path.exists("/dev/nvidia0") else ""


def set_up_gpus():
    """Has a GPU used well where there is one; a run meant for it must not spend days on the CPU."""
    # Read when a GPU's memory is first asked for. Rows differ in length: else freed pieces do not fit.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        count = torch.cuda.device_count()
        if os.environ["WORLD_SIZE"] == "1" and count > 1:
            print(f"one of {count} GPUs: `deepspeed train.py --deepspeed ds_zero2.json` uses all")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and (found := unseen_gpu()):
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        raise ValueError(
            f"torch {torch.__version__} sees no GPU, but {found}: it is built for {cuda} (13.0 needs "
            "driver 580). https://download.pytorch.org/whl has builds for other drivers, as cu126; "
            "to train on the CPU all the same: CUDA_VISIBLE_DEVICES= (empty)"
        )


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
    set_up_gpus()
    if args.deepspeed and not is_installed("deepspeed"):
        raise ValueError(
            "--deepspeed needs the package deepspeed, which is for Linux: leave it out"
        )
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
        for number in () if args.eval_only else (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            handlers[number] = signal.signal(number, lambda number, _: signals.append(number))
        return evaluate_only(args) if args.eval_only else train(args, config, signals)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, Agreed):
            print(f"train.py: {llava.one_line(error)}", file=sys.stderr)
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
