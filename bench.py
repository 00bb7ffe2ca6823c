"""Speed and memory of this project, side by side with what people use instead.

The peer is transformers' LlavaForConditionalGeneration with its Trainer, adamw_torch and PEFT's
defaults, without checkpointing; `plain` is this project without fast.py. All sides get the same
model folder, batches, precision, learning rates and, for LoRA, the same adapter to start from; each
runs in its own process, in turn (ours, peer, ours, peer ..), and the medians count. The loss after
the same steps stands beside the speed, so that no speed is bought with wrong numbers (dropout draws
differently on the two sides).

    python bench.py --shape tiny --rounds 1               four minutes on two cores
    python bench.py --shape 135m --dtype bf16 --steps 3   an hour; the table of bench.md
    python bench.py --shape 7b ...                        on a GPU: see cluster.md

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

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import cli
import data
import evaluate
import fast
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
PEERS = ["peer", "plain", "checkpointing", "fp32_folder"]
OURS = ("ours", "plain")  # the sides that are this project
TEXT = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
TOWER = "hidden_size num_hidden_layers num_attention_heads intermediate_size"
SHAPES = {  # the language model's TEXT and vocabulary, the TOWER's
    "tiny": None,
    "135m": ((576, 30, 9, 3, 1536, 49152), (768, 12, 12, 3072)),
    "7b": ((4096, 32, 32, 32, 11008, 32064), (1024, 24, 16, 4096)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE, LORA = "2e-4", {"r": 128, "alpha": 256, "dropout": 0.05}


# --- what both sides get ---


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(shape: str, dtype, out: Path):
    """A LLaVA folder with random weights, of 336 pixels and 576 tokens a picture."""
    toy.make_model(out / "tiny", toy.toy_words(200))
    if not SHAPES[shape]:
        return out / "tiny"
    sizes, tower = SHAPES[shape]
    text = dict(zip([*TEXT.split(), "vocab_size"], sizes)) | {"max_position_embeddings": 4096}
    text = transformers.LlamaConfig(**text, tie_word_embeddings=shape == "135m")
    vision = dict(zip(TOWER.split(), tower)) | {"image_size": 336, "patch_size": 14}
    vision = transformers.CLIPVisionConfig(**vision)
    torch.manual_seed(0)
    with torch.device(device()):  # a GPU draws 7B in seconds
        words = transformers.AutoModelForCausalLM.from_config(text, dtype=dtype)
        sight = transformers.AutoModel.from_config(vision, dtype=dtype)
    words.save_pretrained(out / "text")
    sight.save_pretrained(out / "vision")
    del words, sight
    torch.cuda.empty_cache()  # the runs need the GPU's memory
    tokenizer = llava.open_tokenizer(out / "tiny")  # that of the tiny model: words do not matter
    tokenizer.save_pretrained(out / "text")
    build(out / "vision", out / "text", out / "model")
    return out / "model"


def turns_of(mix: str, rng) -> list[tuple]:
    """The words of each question and answer of a row."""
    if mix == "caption":
        return [(1, rng.randint(6, 14))]
    if mix.isdigit():
        return [(1, int(mix) - 590)]
    return [(rng.randint(4, 14), rng.randint(1, 40)) for _ in range(rng.randint(1, 4))]


def make_rows(mix: str, rows: int, out: Path):
    """Random rows with one picture each: a short caption, questions and answers, or, where `mix` is
    a number, about that many tokens.
    """
    rng, noise = random.Random(0), np.random.default_rng(0)
    (out / "images").mkdir(exist_ok=True)
    records = []
    for i in range(rows):
        pixels = noise.integers(0, 255, (480, 640, 3), dtype=np.uint8)
        data.Image.fromarray(pixels).save(out / f"images/{i}.jpg")
        turns = []
        for turn in turns_of(mix, rng):
            for who, count in zip(("human", "gpt"), turn):
                words = rng.choices(["red", "blue", "circle", "one", "left"], k=count)
                turns.append({"from": who, "value": " ".join(words)})
        turns[0]["value"] = f"{data.IMAGE}\n" + turns[0]["value"]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
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
    work, (flags, _) = job["work"], CASES[job["case"]]
    adapter = ["--adapter", f"{work}/adapter"] if "use_lora" in flags else []
    paths = ["--data_path", f"{work}/{job['mix']}.json", "--image_folder", f"{work}/images"]
    paths += ["--model_name_or_path", job["model"], "--output_dir", job["out"]]
    more = (
        f"--max_steps {job['steps']} --per_device_train_batch_size {job['micro_batch']} "
        f"--learning_rate {RATE} --mm_projector_lr {RATE} --lr_scheduler_type constant "
        f"--warmup_ratio 0 --save_steps -1 --model_max_length 4096 --bf16 {job['dtype'] == 'bf16'} "
        f"--gradient_checkpointing {job['gradient_checkpointing']} "
        f"--dataloader_num_workers {job['workers']}"
    )
    return [*flags, *adapter, *paths, *more.split()]


# --- the work in a step ---


def count_weights(model) -> list[tuple]:
    """(weights that multiply, those of them that train) of tower, projector, decoder and head."""
    decoder, head = model.language_model.base_model, model.language_model.get_output_embeddings()
    counts = []
    for part in (model.vision_tower, model.multi_modal_projector, decoder, head):
        modules = [m for m in part.modules() if not isinstance(m, torch.nn.Embedding)]
        weights = [w for m in modules for w in m.parameters(recurse=False)]
        weights = [w for w in weights if len(lora.true_shape(w)) > 1]
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
    looks = 4 * pictures * patches**2 * tower.hidden_size * tower.num_hidden_layers
    reads = 2 * rows * width**2 * decoder.hidden_size * decoder.num_hidden_layers  # causal: half
    # Of each part: its tokens, and the operations of attention's two products.
    parts = [(pictures * patches, looks), (pictures * model.tokens_per_picture, 0)]
    parts += [(rows * width, reads), (supervised, 0)]
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
    load_model, enable, flops = train.load_model, fast.enable, []

    def load_and_count(*args):
        model = load_model(*args)
        weights = count_weights(model)
        count = lambda _, batch: flops.append(count_flops(model, weights, *batch))
        model.register_forward_pre_hook(count)
        return model

    train.load_model = load_and_count
    fast.enable = enable if job["side"] == "ours" else lambda model: model
    status = train.main(flags_of(job))
    train.load_model, fast.enable = load_model, enable
    assert status == 0
    steps, rows = report.read_lines(Path(job["out"]) / "metrics.jsonl"), job["micro_batch"]
    return {
        "seconds": [rows / step["samples_per_s"] for step in steps],
        "tokens": [rows * step["tokens_per_s"] / step["samples_per_s"] for step in steps],
        "flops": flops,
        "losses": [step["loss"] for step in steps],
    }


def masked(batch: dict) -> dict:
    """A batch as transformers' collators make it: with a mask, and nothing of ours."""
    lengths, width = torch.tensor(batch["lengths"]), batch["input_ids"].shape[1]
    mask = (torch.arange(width)[None] < lengths[:, None]).long()  # (B, T)
    kept = {key: batch[key] for key in ("input_ids", "labels", "pixel_values")}
    return kept | {"attention_mask": mask}


def open_peer(job: dict):
    """transformers' LLaVA, with what trains set, PEFT where the case is LoRA."""
    from peft import PeftModel, prepare_model_for_kbit_training

    flags, trained = CASES[job["case"]]
    options = {"dtype": torch.float32 if job["side"] == "fp32_folder" else DTYPES[job["dtype"]]}
    if job["case"] == "qlora":
        parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        nf4 |= {"bnb_4bit_compute_dtype": options["dtype"], "llm_int8_skip_modules": parts}
        packed = transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
        options["quantization_config"] = packed
    model = transformers.LlavaForConditionalGeneration.from_pretrained(job["model"], **options)
    if job["case"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if "use_lora" in flags:
        return PeftModel.from_pretrained(model, Path(job["work"]) / "adapter", is_trainable=True)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in trained))
    return model


def run_peer(job: dict) -> dict:
    """The same steps by transformers' Trainer."""
    args, model, times = train.parse(flags_of(job)), open_peer(job), []
    rows = open_rows(job, args.version)
    plan = order.plan_epoch(rows.records, job["micro_batch"], args.seed, 0, False)
    collator = data.Collator(rows.image_token_id, rows.tokens_per_picture)

    class SameBatches(transformers.Trainer):
        def get_train_dataloader(self):
            batches = order.micro_batches(plan, 1, 1, 0)
            collate = lambda some: masked(collator(some))
            return order.loader(rows, batches, collate, job["workers"], device() == "cuda")

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    options = {"max_steps": job["steps"], "per_device_train_batch_size": job["micro_batch"]}
    options |= {"learning_rate": float(RATE), "lr_scheduler_type": "constant"}
    options |= {"optim": "adamw_torch", "bf16": job["dtype"] == "bf16", "logging_steps": 1}
    options |= {"gradient_checkpointing": job["side"] == "checkpointing", "disable_tqdm": True}
    options |= {"use_cpu": device() == "cpu", "report_to": "none", "save_strategy": "no"}
    options = transformers.TrainingArguments(job["out"], **options)
    trainer = SameBatches(model, options, train_dataset=rows, callbacks=[Clock()])
    times.append(time.perf_counter())
    trainer.train()
    return {
        "seconds": [after - before for before, after in itertools.pairwise(times)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def answers_of(model, batch: dict, text, peer: bool) -> list[str]:
    """Greedy answers to the first question of each row: of our model, or of transformers'."""
    starts = [(labels != data.IGNORE).nonzero()[0].item() for labels in batch["labels"]]
    prompts = [ids[:start] for ids, start in zip(batch["input_ids"], starts)]
    left = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(prompts, **left).to(device())
    mask = pad_sequence([torch.ones_like(some) for some in prompts], **left).to(device())
    pixels, options = batch["pixel_values"].to(device()), {"max_new_tokens": 16, "do_sample": False}
    if peer:
        options |= {"eos_token_id": text.stop_ids, "pad_token_id": text.stop_ids[0]}
        new = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, **options)
        new = new[:, ids.shape[1] :]
    else:
        new = model.generate(ids, pixels, mask, text.stop_ids, **options)
    return text.tokenizer.batch_decode(new, skip_special_tokens=True)


def loss_of(model, batch: dict, peer: bool) -> float:
    if peer:
        return model(**{key: x.to(device()) for key, x in masked(batch).items()}).loss.item()
    inputs = (batch[key].to(device()) for key in ("input_ids", "pixel_values", "labels"))
    loss, _ = model(*inputs)
    return (loss / (batch["labels"] >= 0).sum()).item()


@torch.no_grad()
def run_without_training(job: dict) -> dict:
    """Seconds of each batch, and the loss over its rows or the answers to its questions."""
    peer, size, rows = job["side"] not in OURS, job["micro_batch"], open_rows(job)
    if peer:
        model = open_peer(job).to(device())
    else:
        model = evaluate.open_model(Path(job["model"]), dtype=DTYPES[job["dtype"]], device=device())
    model = fast.enable(model.eval()) if job["side"] == "ours" else model.eval()
    collate = data.Collator(rows.image_token_id, rows.tokens_per_picture)
    batches = [range(i, i + size) for i in range(0, len(rows) - size + 1, size)]
    loader = order.loader(rows, batches, collate, job["workers"], device() == "cuda")
    seconds, results = [], []
    for batch in itertools.islice(loader, job["steps"]):
        began = time.perf_counter()
        if job["case"] == "generate":
            results += answers_of(model, batch, rows.text, peer)
        else:
            results.append(loss_of(model, batch, peer))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": results}


# --- the table ---


def run(job: dict) -> dict:
    """What one side does in a process of its own."""
    with tempfile.TemporaryDirectory(dir=job["work"]) as out:
        command = [sys.executable, __file__, "--job", json.dumps(job | {"out": f"{out}/run"})]
        quiet = os.environ | {"TQDM_DISABLE": "1"}
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_job(job: dict) -> dict:
    """In that process: the job's result, and the most memory that it held."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    work = run_ours if job["side"] in OURS else run_peer
    if job["case"] in ("evaluate", "generate"):
        work = run_without_training
    return work(job) | {"peak_gib": report.peak(device())["peak_gib"]}


def best_rate(dtype, n: int) -> float:
    """FLOP/s of the best of ten products of n x n matrices."""
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU, too
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def middle(runs: list[dict], name: str) -> float:
    """The median over steps but the first, then over runs."""
    return statistics.median(statistics.median(run[name][1:] or run[name]) for run in runs)


def line_of(ours: list[dict], beside: list[dict], rate: float) -> dict:
    """What the table shows of our runs, and of another side's beside them (or nothing)."""
    job, seconds = ours[0]["job"], middle(ours, "seconds")
    line = {"case": job["case"], "rows": f"{job['mix']} x {job['micro_batch']}"}
    line["samples/s"] = f"{job['micro_batch'] / seconds:.3f}"
    peak = statistics.median(run["peak_gib"] for run in ours)
    line |= {"peak GiB": f"{peak:.2f}", "tokens/s": "", "rate": ""}
    if "flops" in ours[0]:
        line["tokens/s"] = f"{middle(ours, 'tokens') / seconds:.1f}"
        line["rate"] = f"{middle(ours, 'flops') / seconds / rate:.0%}"
    last = "last loss or answer"
    if not beside:
        return line | {last: last_of(ours)}
    other = statistics.median(run["peak_gib"] for run in beside)
    faster = middle(beside, "seconds") / seconds
    line |= {"beside": beside[0]["job"]["side"], "faster": f"{faster:.2f}"}
    return line | {"memory": f"{peak / other:.2f}", last: f"{last_of(ours)}, {last_of(beside)}"}


def last_of(runs: list[dict]) -> str:
    last = runs[-1]["losses"][-1]
    return last[:20].replace("|", "\\|") if isinstance(last, str) else f"{last:.5f}"


def show(lines: list[dict]):
    """Prints them as a table in Markdown."""
    print(f"| {' | '.join(lines[0])} |\n|{'---|' * len(lines[0])}")
    for line in lines:
        print(f"| {' | '.join(line.values())} |", flush=True)


def parse(argv):
    parser, bf16 = Parser(description=__doc__.splitlines()[0]), torch.cuda.is_available()
    add, mixes = parser.add_argument, ["caption", "instruction"]
    add("--shape", choices=list(SHAPES), default="tiny", help="which model")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what it does")
    peers = "fp32_folder: fp32 weights, autocast; no name: ours alone"
    add("--peers", nargs="*", choices=PEERS, default=PEERS[:1], help=peers)
    add("--mix", nargs="+", default=mixes, help="rows: caption, instruction, or a number of tokens")
    add("--micro_batch", nargs="+", type=int, default=[4], help="rows of a step; of generate, too")
    add("--steps", type=int, default=4, help="steps of a run; the first does not count")
    add("--rounds", type=int, default=3, help="runs of each side")
    add("--dtype", choices=list(DTYPES), default="bf16" if bf16 else "fp32", help="of the products")
    add("--gradient_checkpointing", action="store_true", help="ours; --peers checkpointing: theirs")
    add("--workers", type=int, default=2, help="processes that prepare batches")
    add("--product", type=int, default=4096, help="side of the matrices that tell the rate")
    add("--work", help="folder for model and rows, kept and used again; default: a temporary one")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for mix in args.mix:
        if mix not in mixes and not mix.isdigit():
            parser.error(f"--mix {mix}: caption, instruction, or a number of tokens")
    return args


def bench(args, work: Path) -> list[dict]:
    """Makes model and rows, runs the sides in turn, prints and returns the lines of the table."""
    model = work / ("tiny" if args.shape == "tiny" else "model")
    if not model.exists():
        make_model(args.shape, DTYPES[args.dtype], work)
        make_adapter(model, work / "adapter")
    for mix in args.mix:
        make_rows(mix, max(args.steps * max(args.micro_batch), 16), work)
    rate, lines = best_rate(DTYPES[args.dtype], args.product), []
    same = {name: getattr(args, name) for name in ("steps", "dtype", "gradient_checkpointing")}
    same |= {"workers": args.workers, "work": str(work), "model": str(model)}
    for case, mix, rows in itertools.product(args.cases, args.mix, args.micro_batch):
        job, runs = same | {"case": case, "mix": mix, "micro_batch": rows}, {}
        for side in ["ours", *args.peers] * args.rounds:
            mine = job | {"side": side}
            runs.setdefault(side, []).append({"job": mine, **run(mine)})
        for beside in args.peers or [None]:
            lines.append(line_of(runs["ours"], runs.get(beside, []), rate))
            print("  ".join(lines[-1].values()), file=sys.stderr, flush=True)
    print(f"{machine()}; {args.dtype}, {rate / 1e9:,.0f} GFLOP/s in products of matrices\n")
    show(lines)
    return lines


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
