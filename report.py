"""What people see of a training run.

    before step 1    which modules train, the arithmetic of batches and memory
    each step        one line, metrics.jsonl
    each evaluation  its figures and a few answers; metrics.jsonl, predictions.jsonl with all
                     answers, curves.png and samples.png (draw.py)
    the end          what was reached, where it lies, what to do with it

The files are in the run's folder, and `--report_to tensorboard` or `wandb` gets the same.

    python report.py OUTPUT_DIR           draws curves.png and samples.png again

    log = Log(out, run_id, step, flags)   # of a run that begins, or goes on after `step`
    log.step({"step": 1, "loss": 2.5, ..})
    log.evaluation({"step": 1, "eval_loss": 2.4, ..}, answers, dataset.records, dataset.pictures)
"""

import collections
import datetime
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
import data
import draw
import lora

# --- before step 1 ---


def show_modules(model):
    """Prints what trains."""
    print(f"{'module':<24}{'parameters':>16}{'trainable':>16}  dtype")
    for name, part in model.named_children():
        trainable = lora.count(p for p in part.parameters() if p.requires_grad)
        dtype = str(next(part.parameters()).dtype).removeprefix("torch.")
        print(f"{name:<24}{lora.count(part.parameters()):>16,}{trainable:>16,}  {dtype}")


def fold(names: list[str]) -> str:
    """Paths of layers in a few lines, such as "32 x model.layers.*.self_attn.q_proj"."""
    counts = collections.Counter(re.sub(r"\d+", "*", name) for name in names)
    return "\n".join(f"{n} x {path}" for path, n in counts.items())


def show_batches(micro: int, accumulation: int, world: int, rows: int, per_epoch: int, total: int):
    """Prints what a step is, and how many there are."""
    print(
        f"batch: {micro} rows x {accumulation} accumulated x {world} processes = "
        f"{micro * accumulation * world} rows a step\n"
        f"steps: {rows:,} rows, {per_epoch:,} steps an epoch, {total:,} in all"
    )
    if torch.cuda.device_count() > world:
        print(
            f"GPUs: {world} of {torch.cuda.device_count()}; `deepspeed train.py --deepspeed "
            "ds_zero2.json` and the same flags use all"
        )


def memory(model, world: int, stage: int, masters: bool) -> dict:
    """What a process holds between steps, by arithmetic: {what: bytes}.

    ZeRO partitions among `world` processes: stage 2 what the optimizer needs, 3 the weights too.
    """
    weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    trained = lora.count(p for p in model.parameters() if p.requires_grad)
    trained /= world if stage >= 2 else 1
    sizes = {"weights": weights / (world if stage == 3 else 1), "gradients": 4 * trained}
    return sizes | {"masters": 4 * trained * masters, "moments": 8 * trained}


# What --offload keeps in the host's memory.
ON_HOST = {"none": [], "optimizer": ["gradients", "masters", "moments"]}
ON_HOST["all"] = ["weights", *ON_HOST["optimizer"]]


def show_memory(sizes: dict, offload: str = "none"):
    """Prints `sizes`, and on a GPU whether they exceed its memory, without any activations."""
    away = ON_HOST[offload]
    shown = ", ".join(f"{what} {size / 2**20:,.1f} MiB" for what, size in sizes.items())
    print(f"memory: {shown}" + (f"; on the host: {', '.join(away)}" if away else ""), flush=True)
    if not torch.cuda.is_available():
        return
    room = torch.cuda.get_device_properties().total_memory
    here = sum(size for what, size in sizes.items() if what not in away)
    if here > room:
        print(
            f"this does not fit: {here / 2**30:,.1f} GiB, and the GPU has {room / 2**30:,.1f}; try "
            "`deepspeed train.py --deepspeed ds_zero3.json` on more GPUs (each has a share), with "
            "--offload optimizer or all, or --train_type use_lora --bits 4",
            flush=True,
        )


def before_step_1(run, args):
    """Prints what trains, the arithmetic of batches, and of memory."""
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    world, stage = run.engine.world, run.engine.stage
    show_modules(run.model)
    show_batches(micro, accumulation, world, len(run.rows), run.per_epoch, run.total)
    masters = args.bf16 or stage > 0  # DeepSpeed has fp32 masters of fp32 weights too
    show_memory(memory(run.model, world, stage, masters), args.offload)


def less_memory(args) -> str:
    """The next flag to try where a run does not fit: those that cost nothing, or least, first."""
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows > 1:
        fewer = rows // 2 if rows % 2 == 0 else 1
        return (
            f"--per_device_train_batch_size {fewer} --gradient_accumulation_steps "
            f"{accumulation * rows // fewer}: the same steps in smaller pieces"
        )
    if not args.gradient_checkpointing:
        return "--gradient_checkpointing: less memory, a third more time"
    if args.train_type == "use_lora" and args.bits == 16:
        return "--bits 4: the frozen layers in a quarter of the memory"
    return "`deepspeed train.py --deepspeed ds_zero3.json`, --offload optimizer, or a smaller model"


def peak(device: str) -> dict:
    """The most memory held so far, {name: GiB}: on a GPU what tensors took, and what torch took
    from the device for them; else by this process.
    """
    if device == "cuda":
        sizes = {"peak_gib": torch.cuda.max_memory_allocated()}
        sizes["reserved_gib"] = torch.cuda.max_memory_reserved()
        return {name: size / 2**30 for name, size in sizes.items()}
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def dry_run(seconds: list, plan, lengths, total: int, device: str):
    """Prints what the first steps of a `plan` (steps, rows), which took so many seconds each, say
    of a run of `total` steps.
    """
    tokens = np.where(plan < 0, 0, lengths[plan]).sum(axis=1)  # of each step, about
    tried = slice(min(1, len(seconds) - 1), len(seconds))  # the first one warms up
    whole = sum(seconds[tried]) / tokens[tried].sum() * tokens.mean() * total
    sizes = [f"{name.removesuffix('_gib')} {gib:.2f} GiB" for name, gib in peak(device).items()]
    duration = datetime.timedelta(seconds=math.ceil(whole))
    print(f"dry run: {', '.join(sizes)}; {total:,} steps take {duration}, without evaluations")


# --- each step ---


def speed(supervised, tokens, padded, rows, seconds: float, waited: float, device: str) -> dict:
    """The figures of a step that took so many tokens (with padding: `padded`), rows and seconds."""
    return {
        "tokens_per_s": tokens / seconds,
        "samples_per_s": rows / seconds,
        "supervised": supervised / tokens,
        "padded": 1 - tokens / padded,
        "waiting": waited / seconds,
        **peak(device),
    }


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
        speed, gib = (f"{x:.{int(x < 10)}f}" for x in (m["tokens_per_s"] / 1000, m["peak_gib"]))
        text = (
            f"loss {m['loss']:.3f} lr{m['lr']:.0e} {speed}k/s sup{m['supervised']:.0%} "
            f"pad{m['padded']:.0%} wait{m['waiting']:.0%} {gib}G"
        )
        self.set_description_str(text, refresh=False)
        self.update()
        if log and self.disable:
            print(f"{m['step']}/{self.total} {text}", flush=True)


# --- each evaluation ---


def shares(metrics: dict, kind: str = "") -> str:
    """The figures that are shares, of all questions or of one kind of them, as text."""
    names = [f"eval_{name}{kind}" for name in ("token_accuracy", "exact_match", "vqa_accuracy")]
    found = {name: metrics[name] for name in names if name in metrics}
    return ", ".join(
        f"{name.removeprefix('eval_').removesuffix(kind).replace('_', ' ')} {share:.1%}"
        for name, share in found.items()
    )


NOTHING = "(nothing to show)"  # an answer that is empty, or control characters


def printable(text: str) -> str:
    """On one line, of at most 80 characters, none of which moves a terminal's cursor."""
    text = "".join(c if c.isprintable() else " " for c in text.replace(data.IMAGE, ""))
    return textwrap.shorten(text, 80, placeholder="...") or NOTHING


def show_evaluation(metrics: dict, answers: list[dict], of: str = ""):
    """Prints an evaluation: its figures, a line for each kind of question, and a few answers."""
    loss = f"{of or 'step ' + str(metrics['step'])}: validation loss {metrics['eval_loss']:.4f}"
    lines, kinds = [f"{loss}, {shares(metrics)}"], [told.get("kind") for told in answers]
    for kind in sorted(set(kinds) - {None}):
        lines.append(f"{kind:<12} {kinds.count(kind):>6,} questions: {shares(metrics, '/' + kind)}")
    for told in answers[:: max(1, len(answers) // 4)][:4]:
        line = f"{printable(told['question'])} > {printable(told['prediction'])}"
        line += " (cut)" if "cut" in told else ""
        lines.append(line if told["right"] else f"{line} (not {printable(told['answer'])})")
    for n, line in enumerate(lines):
        indent = "  " if n else ""
        tqdm.write(textwrap.fill(line, 80, initial_indent=indent, subsequent_indent="    "))


# --- files and trackers ---


class Silent:
    """A log, or a tracker, that shows nothing."""

    def __init__(self, *_):
        pass

    def step(self, *_):
        pass

    def evaluation(self, *_):
        pass

    def close(self):
        pass


class TensorBoard(Silent):
    def __init__(self, out: Path, run_id: str, step: int, flags: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def step(self, metrics):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()

    def evaluation(self, metrics, answers, sheet):
        lines = [f"{a['question']} > {a['prediction']} ({a['answer']})" for a in answers]
        self.writer.add_text("answers", "\n\n".join(lines), metrics["step"])
        self.writer.add_image("samples", np.asarray(sheet), metrics["step"], dataformats="HWC")
        self.step(metrics)

    def close(self):
        self.writer.close()


class WandB(Silent):
    def __init__(self, out: Path, run_id: str, step: int, flags: dict):
        import wandb

        self.wandb, options = wandb, {"id": run_id, "resume": "allow", "config": flags}
        try:
            self.run = wandb.init(project="llava", name=out.name, dir=out, **options)
        except wandb.Error as error:
            raise ValueError(
                f"--report_to wandb: {cli.one_line(error)} (WANDB_MODE=offline needs no account)"
            ) from None

    def step(self, metrics):
        self.run.log(metrics, step=metrics["step"])

    def evaluation(self, metrics, answers, sheet):
        columns = ["id", "question", "answer", "prediction", "right"]
        table = self.wandb.Table(columns, [[str(a[key]) for key in columns] for a in answers])
        self.step({**metrics, "answers": table, "samples": self.wandb.Image(sheet)})

    def close(self):
        self.run.finish()


def is_installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of that name, as wandb leaves, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


TRACKERS = {"none": Silent, "tensorboard": TensorBoard, "wandb": WandB}


def read_lines(path: Path) -> list[dict]:
    """The objects in a .jsonl file, without a last one that was cut short.

    Split at newlines alone: answers may hold what Python takes for other ends of lines.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def append(path: Path, *rows: dict):
    # Half a surrogate pair is no UTF-8; so written, it is JSON's escape for it.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Log:
    """The log of a run in `out`; one that goes on after `step` drops the lines after it."""

    def __init__(self, out: Path, run_id: str, step: int, flags: dict):
        self.out, self.report_to = out, flags["report_to"]
        self.metrics, self.predictions = out / "metrics.jsonl", out / "predictions.jsonl"
        for path in (self.metrics, self.predictions):
            kept = [row for row in read_lines(path) if row["step"] <= step]
            with cli.written(path) as part:
                append(part, *kept)
        self.tracker = TRACKERS[self.report_to](out, run_id, step, flags)

    def step(self, metrics: dict):
        append(self.metrics, metrics)
        self.tell(self.tracker.step, metrics)

    def evaluation(self, metrics: dict, answers: list[dict], records, pictures):
        append(self.metrics, metrics)
        append(self.predictions, *({"step": metrics["step"], **a} for a in answers))
        sheet = draw.write(self.out, read_lines(self.metrics), answers, records, pictures)
        self.tell(self.tracker.evaluation, metrics, answers, sheet)

    def close(self):
        self.tell(self.tracker.close)

    def tell(self, call, *args):
        """Tells the tracker; whatever its library raises is a line for the user."""
        try:
            call(*args)
        except Exception as error:
            reason = f"{type(error).__name__}: {cli.one_line(error)}"
            raise ValueError(f"--report_to {self.report_to}: {reason}") from None


# --- the end ---


def command(script: str, *words) -> str:
    """A call of one of the project's scripts as it can be pasted, in lines of 80 columns."""
    here, found = Path(__file__).resolve().parent, shutil.which("python")
    python = sys.executable
    if Path(sys.prefix).parent.resolve().is_relative_to(here):  # run.sh's, on its own PATH alone
        python = os.path.relpath(python)
    elif found and Path(found).parent == Path(python).parent:
        python = "python"
    script = os.path.relpath(here / script)
    parts = [f"  {shlex.quote(python)} {shlex.quote(script)}"]
    for word in map(str, words):
        if word.startswith("--"):
            parts.append(word)
        else:
            parts[-1] += f" {shlex.quote(word)}"
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > 76:
            lines.append("     ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines)


def last_words(flags: dict, step: int, total_steps: int, evaluations: list):
    """Prints what was reached, where it lies, and the commands to talk to it and to merge it.

    evaluations: [(step, validation loss)]. A `best` that somebody has removed is not named.
    """
    out, losses, early = Path(flags["output_dir"]), [loss for _, loss in evaluations], ""
    best = losses.index(min(losses)) if losses else None
    if step < total_steps:
        early = f" of {total_steps}: {len(losses) - 1 - best} evaluations without a better loss"
    print(f"done after step {step}{early}:\n  {out}/final")
    folder = out / "final"
    if losses:
        reached = f"best at step {evaluations[best][0]}: validation loss {losses[best]:.4f}"
        gains = {"first": losses[0] - losses[best], "last": losses[-1] - losses[best]}
        better = [f"{gain:.4f} below the {end}" for end, gain in gains.items() if gain]
        print(f"{reached}, " + ",\n".join(better) if better else reached)
        if (out / "best").is_dir():
            print(f"  {out}/best")
            folder = out / "best" if evaluations[best][0] < step else folder
    bits, model = ["--bits", 4] if flags["bits"] == 4 else [], ["--model_name_or_path", folder]
    if flags["train_type"] != "use_lora":
        print("talk to it:", command("chat.py", *model), sep="\n")
        return
    model = ["--model_name_or_path", flags["model_name_or_path"], "--adapter", folder]
    print("talk to it, or merge it:", command("chat.py", *model, *bits), sep="\n")
    print(command("merge.py", *model, "--out", out / "merged"))
    if bits:
        print("  (with --dequantize: into the 4-bit values that it was trained on)")


# --- the command ---


@cli.command
def main(argv=None):
    parser = cli.Parser(description="Draws curves.png and samples.png of a run again.")
    parser.add_argument("output_dir", type=Path, help="the folder of train.py, or of evaluate.py")
    out = parser.parse_args(argv).output_dir
    metrics = read_lines(out / "metrics.jsonl")
    evaluated = [m["step"] for m in metrics if "eval_loss" in m]
    if not evaluated:
        raise ValueError(f"{out}: no metrics.jsonl with an evaluation there, so no run to draw")
    flags = json.loads((out / "run.json").read_text())["args"]
    answers = [a for a in read_lines(out / "predictions.jsonl") if a["step"] == evaluated[-1]]
    records = data.Records(flags["validation_data_path"])
    pictures = data.Pictures(flags["image_folder"]) if flags["image_folder"] else None
    draw.write(out, metrics, answers, records, pictures)
    print(f"{out}/curves.png, {out}/samples.png")


if __name__ == "__main__":
    sys.exit(main())
