"""Speed and memory of this project, side by side with what people use instead.

The peer is transformers' LlavaForConditionalGeneration with its Trainer, adamw_torch and PEFT's
defaults, without checkpointing. Both sides get the same model folder, batches, precision, learning
rates and, for LoRA, the same adapter to start from; each runs in its own process, in turn (ours,
peer, ours, peer ..), and the medians count. The loss after the same steps stands beside the speed,
so that no speed is bought with wrong numbers (dropout draws differently on the two sides).

    python bench.py --shape tiny                          two minutes on two cores
    python bench.py --shape 135m --json bench.json        an hour; adds to what bench.json holds
    python bench.py --shape 135m --cases use_lora --peers --micro_batch 1 4 16 --mix 600 1200 2048
    python bench.py --shape 7b --cases use_lora qlora --micro_batch 16 --steps 8 --gradient_checkpointing
        --peers checkpointing    on a GPU, with 30 GB of disk; cluster.md has what it must show

Weights and rows are random, made on the spot. peak is the most memory that a process held (on a GPU
the most that torch allocated there), rate the share of the device's rate in products of 4096 x 4096
matrices in the run's dtype; `count_flops` says what counts as work.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as transformers_logging

import cli
import data
import evaluate
import lora
import model as llava
import order
import report
import toy
import train
from build import build
from cli import Parser

# Flags of train.py, and what of transformers' LLaVA trains where it is not an adapter.
CASES = {
    "projector": (["--train_type", "projector", "--version", "own"], ["multi_modal_projector"]),
    "use_lora": (["--train_type", "use_lora"], []),
    "qlora": (["--train_type", "use_lora", "--bits", "4"], []),
    "full": (["--train_type", "full"], [""]),
    "evaluate": ([], []),
    "generate": ([], []),
}
PEERS = ["peer", "checkpointing", "fp32_folder"]
SHAPES = {  # language model: width, layers, heads, key-value heads, MLP, vocabulary; then the tower
    "tiny": None,
    "135m": ((576, 30, 9, 3, 1536, 49152), (768, 12, 12, 3072)),
    "7b": ((4096, 32, 32, 32, 11008, 32064), (1024, 24, 16, 4096)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE, LORA = "2e-4", {"r": 128, "alpha": 256, "dropout": 0.05}


# --- what both sides get ---


def make_model(shape: str, dtype, out: Path):
    """A LLaVA folder with random weights, of 336 pixels and 576 tokens a picture."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    toy.make_model(out / "tiny", toy.toy_words(200))
    if not SHAPES[shape]:
        return out / "tiny"
    (width, layers, heads, kv_heads, mlp, words), tower = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")  # draws 7B in seconds
    text = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=words,
            num_key_value_heads=kv_heads,
            intermediate_size=mlp,
            max_position_embeddings=4096,
            tie_word_embeddings=shape == "135m",
        )
    )
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=tower[0],
            num_hidden_layers=tower[1],
            num_attention_heads=tower[2],
            intermediate_size=tower[3],
            image_size=336,
            patch_size=14,
        )
    )
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for part, name in ((text, "text"), (vision, "vision")):
        part.save_pretrained(out / name)
    tokenizer = llava.open_tokenizer(out / "tiny")  # that of the tiny model: words do not matter
    tokenizer.save_pretrained(out / "text")
    build(out / "vision", out / "text", out / "model")
    return out / "model"


def make_rows(mix: str, rows: int, out: Path):
    """Random rows with one picture each: a short caption, questions and answers, or, where `mix` is
    a number, about that many tokens.
    """
    rng = random.Random(0)
    (out / "images").mkdir(exist_ok=True)

    def words(count):
        return " ".join(rng.choice(["red", "blue", "circle", "one", "left"]) for _ in range(count))

    records = []
    for i in range(rows):
        noise = torch.randint(
            0, 255, (480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)
        )
        data.Image.fromarray(noise.numpy()).save(out / f"images/{i}.jpg")
        turns = (
            [(1, rng.randint(6, 14))]
            if mix == "caption"
            else [(rng.randint(4, 14), rng.randint(1, 40)) for _ in range(rng.randint(1, 4))]
        )
        if mix.isdigit():
            turns = [(1, int(mix) - 590)]
        said = [
            {"from": who, "value": words(n)}
            for turn in turns
            for who, n in zip(("human", "gpt"), turn)
        ]
        said[0]["value"] = f"{data.IMAGE}\n" + said[0]["value"]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": said})
    (out / f"{mix}.json").write_text(json.dumps(records))


def make_adapter(folder: Path, out: Path):
    """An adapter as it is before training, for both sides to start from."""
    torch.manual_seed(0)
    model = llava.from_pretrained(folder)
    lora.inject(model, llava.DECODER, **LORA)
    model.multi_modal_projector.requires_grad_(True)
    lora.save(model, out, None, llava.transformers_name, ["multi_modal_projector"])


def flags_of(job: dict) -> list[str]:
    """The flags of train.py for a job: what one side runs in one process."""
    flags, _ = CASES[job["case"]]
    rows, lora_flags = str(Path(job["work"]) / f"{job['mix']}.json"), []
    if "use_lora" in flags:
        lora_flags = ["--adapter", str(Path(job["work"]) / "adapter")]
    more = ["--data_path", rows, "--output_dir", job["out"], "--max_steps", str(job["steps"])]
    return [
        *flags,
        *lora_flags,
        *more,
        "--model_name_or_path",
        job["model"],
        "--image_folder",
        str(Path(job["work"]) / "images"),
        "--learning_rate",
        RATE,
        "--mm_projector_lr",
        RATE,
        "--lr_scheduler_type",
        "constant",
        "--warmup_ratio",
        "0",
        "--per_device_train_batch_size",
        str(job["micro_batch"]),
        "--save_steps",
        "-1",
        "--model_max_length",
        "4096",
        "--gradient_checkpointing",
        str(job["gradient_checkpointing"]),
        "--bf16",
        str(job["dtype"] == "bf16"),
        "--dataloader_num_workers",
        str(job["workers"]),
    ]


# --- the work in a step ---


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


def count_flops(model, weights: list[tuple], input_ids, pixel_values, labels) -> int:
    """Floating-point operations of a training step on a batch; `weights`: of `count_weights`.

    For each weight and token two in the forward pass, two where a gradient passes on, two where the
    weight trains; attention's products likewise. What is recomputed, or never run, does not count.
    """
    (rows, width), pictures = input_ids.shape, len(pixel_values)
    tower, decoder = model.vision_tower.vision_model.config, model.config.text_config
    patches = model.vision_tower.vision_model.embeddings.num_positions  # with CLIP's CLS
    supervised = (labels >= 0).sum().item()
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


# --- the two sides ---


def open_rows(job: dict, version: str = "own") -> data.LlavaDataset:
    source, folder = Path(job["model"]), Path(job["work"])
    config, tokenizer = llava.read_config(source), llava.open_tokenizer(source)
    paths = folder / f"{job['mix']}.json", folder / "images", source
    text = data.ChatText(tokenizer, version)
    return data.open_dataset(*paths, config, text, max_length=4096)


def run_ours(job: dict) -> dict:
    """Seconds and losses of each step: of train.py itself, as anyone would start it."""
    load_model, flops = train.load_model, []

    def load_and_count(*args):
        model = load_model(*args)
        weights = count_weights(model)
        model.register_forward_pre_hook(
            lambda _, batch: flops.append(count_flops(model, weights, *batch))
        )
        return model

    train.load_model = load_and_count
    status, train.load_model = train.main(flags_of(job)), load_model
    assert status == 0
    lines = (Path(job["out"]) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    rows = job["micro_batch"]
    return {
        "seconds": [rows / step["samples_per_s"] for step in steps],
        "tokens": [rows * step["tokens_per_s"] / step["samples_per_s"] for step in steps],
        "flops": flops,
        "losses": [step["loss"] for step in steps],
        "waiting": statistics.median(step["waiting"] for step in steps[1:] or steps),
    }


def with_mask(collate):
    """A batch as transformers' collators make it: with a mask, and nothing of ours."""

    def collate_rows(rows):
        batch = collate(rows)
        lengths, width = torch.tensor(batch["lengths"]), batch["input_ids"].shape[1]
        mask = (torch.arange(width)[None] < lengths[:, None]).long()  # (B, T)
        return {
            "attention_mask": mask,
            **{key: batch[key] for key in ("input_ids", "labels", "pixel_values")},
        }

    return collate_rows


def open_peer(job: dict):
    """transformers' LLaVA, with what trains set, PEFT where the case is LoRA."""
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    flags, trained = CASES[job["case"]]
    options = {"dtype": torch.float32 if job["side"] == "fp32_folder" else DTYPES[job["dtype"]]}
    if job["case"] == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[job["dtype"]],
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
    model = LlavaForConditionalGeneration.from_pretrained(job["model"], **options)
    if job["case"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if "use_lora" in flags:
        return PeftModel.from_pretrained(model, Path(job["work"]) / "adapter", is_trainable=True)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in trained))
    return model


def run_peer(job: dict) -> dict:
    """The same steps by transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    args, model, times = train.parse(flags_of(job)), open_peer(job), []
    rows = open_rows(job, args.version)
    plan = order.plan_epoch(rows.records, job["micro_batch"], args.seed, 0, False)
    collate = with_mask(data.Collator(rows.image_token_id, rows.tokens_per_picture))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    class SameBatches(Trainer):
        def get_train_dataloader(self):
            batches = order.micro_batches(plan, 1, 1, 0)
            return order.loader(rows, batches, collate, job["workers"], device == "cuda")

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    trainer = SameBatches(
        model,
        TrainingArguments(
            job["out"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro_batch"],
            learning_rate=float(RATE),
            lr_scheduler_type="constant",
            optim="adamw_torch",
            bf16=job["dtype"] == "bf16",
            use_cpu=device == "cpu",
            report_to="none",
            logging_steps=1,
            gradient_checkpointing=job["side"] == "checkpointing",
            save_strategy="no",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            disable_tqdm=True,
        ),
        train_dataset=rows,
        callbacks=[Clock()],
    )
    times.append(time.perf_counter())
    trainer.train()
    return {
        "seconds": [b - a for a, b in zip(times, times[1:])],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def answers_of(model, batch: dict, text, ours: bool, device) -> list[str]:
    """Greedy answers to the first question of each row: of our model, or of transformers'."""
    starts = [(labels != data.IGNORE).nonzero()[0].item() for labels in batch["labels"]]
    prompts = [ids[:start] for ids, start in zip(batch["input_ids"], starts)]
    masks = [torch.ones_like(ids) for ids in prompts]
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_side="left").to(device)
        for rows in (prompts, masks)
    )
    pixels, options = batch["pixel_values"].to(device), {"max_new_tokens": 16, "do_sample": False}
    if ours:
        new = model.generate(ids, pixels, mask, text.stop_ids, **options)
    else:
        options |= {"eos_token_id": text.stop_ids, "pad_token_id": text.stop_ids[0]}
        new = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, **options)
        new = new[:, ids.shape[1] :]
    return text.tokenizer.batch_decode(new, skip_special_tokens=True)


@torch.no_grad()
def run_without_training(job: dict) -> dict:
    """Seconds of each batch, and the loss over its rows or the answers to its questions."""
    ours, device = job["side"] == "ours", "cuda" if torch.cuda.is_available() else "cpu"
    source, size = Path(job["model"]), job["micro_batch"]
    dataset = open_rows(job)
    if ours:
        model = evaluate.open_model(source, dtype=DTYPES[job["dtype"]], device=device)
    else:
        model = open_peer(job).to(device)
    model.eval()
    collate = data.Collator(dataset.image_token_id, dataset.tokens_per_picture)
    batches = [range(i, i + size) for i in range(0, len(dataset) - size + 1, size)]
    loader = order.loader(dataset, batches, collate, job["workers"], device == "cuda")
    seconds, results = [], []
    for batch in itertools.islice(loader, job["steps"]):
        began = time.perf_counter()
        if job["case"] == "generate":
            results += answers_of(model, batch, dataset.text, ours, device)
        elif ours:
            loss, _ = model(
                *(batch[key].to(device) for key in ("input_ids", "pixel_values", "labels"))
            )
            results.append((loss / (batch["labels"] >= 0).sum()).item())
        else:
            inputs = with_mask(lambda batch: batch)(batch)
            results.append(model(**{k: v.to(device) for k, v in inputs.items()}).loss.item())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": results}


# --- the table ---


def run(job: dict) -> dict:
    """What one side does in a process of its own: medians over steps, without the first of them."""
    with tempfile.TemporaryDirectory(dir=job["work"]) as out:
        result = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps(job | {"out": f"{out}/run"})],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
    if result.returncode:
        raise RuntimeError(f"{job}: exit status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def run_job(job: dict) -> dict:
    """In that process: the job's result, and the most memory that it held."""
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    if job["case"] in ("evaluate", "generate"):
        result = run_without_training(job)
    else:
        result = (run_ours if job["side"] == "ours" else run_peer)(job)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return result | {"peak_gib": report.peak(device)["peak_gib"]}


def best_rate(dtype, n: int) -> float:
    """FLOP/s of the best of ten products of n x n matrices."""
    device, seconds = "cuda" if torch.cuda.is_available() else "cpu", []
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(10):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU, too
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def summarise(runs: list[dict], rate: float) -> list[dict]:
    """A line of the table for each case, side, mix and size, from all its runs."""
    groups = {}
    for run in runs:
        key = tuple(run["job"][name] for name in ("case", "mix", "micro_batch", "side"))
        groups.setdefault(key, []).append(run)
    lines = []
    for (case, mix, rows, side), found in groups.items():
        ours = groups.get((case, mix, rows, "ours"), found)
        # A step's seconds: the median over steps but the first, then over runs.
        seconds = statistics.median(
            statistics.median(r["seconds"][1:] or r["seconds"]) for r in found
        )
        peak = statistics.median(r["peak_gib"] for r in found)
        line = {
            "case": case,
            "mix": mix,
            "micro_batch": rows,
            "side": side,
            "runs": len(found),
            "samples_per_s": rows / seconds,
            "peak_gib": peak,
            "last": found[-1]["losses"][-1],
            "waiting": found[-1].get("waiting"),
        }
        if "tokens" in ours[0]:
            tokens, flops = (
                statistics.median(ours[0][name][1:] or ours[0][name])
                for name in ("tokens", "flops")
            )
            line |= {"tokens_per_s": tokens / seconds, "rate": flops / seconds / rate}
        lines.append(line)
    first = {(x["case"], x["mix"], x["micro_batch"]): x for x in lines if x["side"] == "ours"}
    for line in lines:
        ours = first.get((line["case"], line["mix"], line["micro_batch"]))
        if ours and ours is not line:  # ours is so many times faster, in that share of the memory
            line["speed_ratio"] = ours["samples_per_s"] / line["samples_per_s"]
            line["memory_ratio"] = ours["peak_gib"] / line["peak_gib"]
    return lines


def show(lines: list[dict]):
    """Prints the table."""
    print(
        f"{'case':<11}{'rows':<14}{'B':>3}  {'side':<14}{'samples/s':>10}{'tokens/s':>10}"
        f"{'peak GiB':>10}{'rate':>7}{'speed':>8}{'memory':>8}  last loss or answer"
    )
    for x in lines:
        cells = [f"{x['samples_per_s']:10.3f}"] + [
            f"{x[name]:{form}}" if x.get(name) is not None else " " * int(form.split(".")[0])
            for name, form in (
                ("tokens_per_s", "10.1f"),
                ("peak_gib", "10.2f"),
                ("rate", "7.1%"),
                ("speed_ratio", "8.2f"),
                ("memory_ratio", "8.2f"),
            )
        ]
        last = x["last"] if isinstance(x["last"], str) else f"{x['last']:.5f}"
        print(
            f"{x['case']:<11}{x['mix']:<14}{x['micro_batch']:>3}  {x['side']:<14}"
            + "".join(cells)
            + f"  {last[:40]}"
        )


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="tiny", help="which model")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what it does")
    add("--peers", nargs="*", choices=PEERS, default=PEERS[:1], help="none: ours alone")
    add(
        "--mix",
        nargs="+",
        default=["caption", "instruction"],
        help="rows: caption, instruction, or a number of tokens",
    )
    add("--micro_batch", nargs="+", type=int, default=[4], help="rows of a step; of generate, too")
    add("--steps", type=int, default=4, help="steps of a run; the first does not count")
    add("--rounds", type=int, default=3, help="runs of each side")
    add(
        "--dtype",
        choices=list(DTYPES),
        default="bf16" if torch.cuda.is_available() else "fp32",
        help="bf16 is what a GPU, or a CPU with AMX, is for",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="ours; the peer's is --peers checkpointing",
    )
    add("--workers", type=int, default=2, help="processes that prepare batches")
    add("--product", type=int, default=4096, help="side of the matrices that tell the rate")
    add("--json", help="file of results; those that it holds already count too")
    add("--work", help="folder for model and rows, kept and used again; default: a temporary one")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for mix in args.mix:
        if mix not in ("caption", "instruction") and not mix.isdigit():
            parser.error(f"--mix {mix}: caption, instruction, or a number of tokens")
    return args


def bench(args, work: Path) -> dict:
    """Makes model and rows, runs the sides in turn, prints and returns the results."""
    model = work / ("tiny" if args.shape == "tiny" else "model")
    if not model.exists():
        make_model(args.shape, DTYPES[args.dtype], work)
        make_adapter(model, work / "adapter")
    for mix in args.mix:
        make_rows(mix, max(args.steps * max(args.micro_batch), 16), work)
    rate = best_rate(DTYPES[args.dtype], args.product)
    found = {
        "machine": machine(),
        "shape": args.shape,
        "dtype": args.dtype,
        "flops_per_s": rate,
        "runs": [],
    }
    if args.json and Path(args.json).is_file():
        found["runs"] = json.loads(Path(args.json).read_text())["runs"]
    for case, mix, rows in itertools.product(args.cases, args.mix, args.micro_batch):
        for side in ["ours", *args.peers] * args.rounds:
            job = {
                "case": case,
                "mix": mix,
                "micro_batch": rows,
                "side": side,
                "steps": args.steps,
                "dtype": args.dtype,
                "gradient_checkpointing": args.gradient_checkpointing,
                "workers": args.workers,
                "work": str(work),
                "model": str(model),
            }
            found["runs"].append({"job": job, **run(job)})
            found["table"] = summarise(found["runs"], rate)
            if args.json:
                with cli.written(args.json) as part:
                    part.write_text(json.dumps(found, indent=1))
    print(f"{found['machine']}; {args.dtype}, {rate / 1e9:,.0f} GFLOP/s in products of matrices")
    show(found["table"])
    return found


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{cli.cores()} cores of {names[0] if names else 'a CPU'}"


def main(argv=None) -> int:
    args = parse(argv)
    if args.job:
        print(json.dumps(run_job(json.loads(args.job))))
        return 0
    with tempfile.TemporaryDirectory() as work:
        bench(args, Path(args.work or work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
