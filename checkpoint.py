"""Save and resume a run: one format for any engine and any number of processes.

    OUTPUT_DIR/run.json                      the run's id, and what must stay the same
    OUTPUT_DIR/checkpoint-N/progress.json    step, evaluations ..., each other file with its size
    OUTPUT_DIR/checkpoint-N/state-*.safetensors

A step of AdamW changes three tensors for each weight that trains, and nothing else:

    weight.NAME    exp_avg.NAME    exp_avg_sq.NAME        in fp32, whole, not partitioned

The order of rows follows from seed and step, and so does dropout, as the loop seeds the generator
at each step. So a run goes on from these alone, whatever its engine and number of processes:

    run_id = open_run(out, same, resume)
    lock = begin(out, run_id, same, flags)          # on rank 0; open as long as the run lives
    progress = load(engine, out, resume, run_id)    # None: there is nothing to resume from
    save(engine, out, progress, limit=2)            # every few steps

An engine (engines.py) has `rank`, `world`, `gather(list)` (the lists of all ranks as one),
`trained` (a dict whose keys name the weights) and

    get(name, part)           the whole tensor, on every rank: it may gather
    put(name, part, value)    sets this rank's share of it
    refresh(step)             copies the weights to where the model computes with them
"""

import fcntl
import hashlib
import json
import re
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PARTS = ("weight", "exp_avg", "exp_avg_sq")
SHARD_BYTES = 10**9  # of a file
FORMAT = 2  # 1 was torch's and DeepSpeed's own files


# --- a run's folder ---

# Flags of train.py that may differ between a run and its continuation. How the rows of a step are
# split is free, their number is not; of files the content counts; pictures are not compared.
FREE_FLAGS = """output_dir resume_from_checkpoint dataloader_num_workers logging_steps save_steps
    save_total_limit on_bad_record per_device_eval_batch_size local_rank report_to data_path
    validation_data_path image_folder per_device_train_batch_size gradient_accumulation_steps
    gradient_checkpointing deepspeed offload dry_run eval_samples max_new_tokens""".split()


def what_must_stay(flags: dict, rows_a_step: int, base: str) -> dict:
    """{name in messages: value} of all that makes a run what it is; `base` is a fingerprint."""
    same = {f"--{name}": value for name, value in flags.items() if name not in FREE_FLAGS}
    for name in ("model_name_or_path", "adapter"):
        same[f"--{name}"] = flags[name] and str(Path(flags[name]).resolve())
    same["--per_device_train_batch_size x accumulation x processes"] = rows_a_step
    same["a base (its weights)"] = base
    for name in ("data_path", "validation_data_path"):
        path = flags[name]
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"--{name} {path}: no such file")
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
        same[f"the rows of {name}"] = digest
    return same


def open_run(out: Path, same: dict, resume: str | None) -> str:
    """The id of the run in a folder, or a new one.

    same: {name in messages: value} of all that must not change between a run and its continuation.
    resume: None for a new run, else `latest` or the path of a checkpoint.
    """
    where = f"--output_dir {out}"
    if not (out / "run.json").is_file():
        ours = {"lock", "run.json.part"}  # of a run that was killed as it began
        if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
            raise ValueError(f"{where}: not empty, and no run; name a new folder")
        if resume not in (None, "latest"):
            raise ValueError(f"{where}: no run there to resume from {resume}")
        return secrets.token_hex(8)
    if not checkpoints(out) and not (out / "final").exists():
        return secrets.token_hex(8)  # it ended before it had learnt anything that lasts
    if resume is None:
        advice = "resume it with --resume_from_checkpoint latest, or name a new folder"
        raise ValueError(f"{where} holds a run: {advice}")
    run = json.loads((out / "run.json").read_text())
    if run.get("format") != FORMAT:
        advice = "name a new folder (its best and final models load as ever)"
        raise ValueError(f"{where}: its run was saved in the format of another version; {advice}")
    for name, value in same.items():
        was = run["same"].get(name)
        if was != value:
            change = f"{was}, not {value}" if name.startswith("--") else "that is another one now"
            advice = "a run goes on as it began: change it back, or name a new folder"
            raise ValueError(f"{where} holds a run with {name} {change}; {advice}")
    return run["id"]


def begin(out: Path, run_id: str, same: dict, flags: dict):
    """Makes a run's folder, if it is new; keeps other runs out while the file returned is open."""
    out.mkdir(parents=True, exist_ok=True)
    file = lock(out)
    for part in out.glob("*.part"):  # the run was killed while it saved
        if part.is_dir():
            shutil.rmtree(part)
    if not checkpoints(out):
        shutil.rmtree(out / "best", ignore_errors=True)  # of a run that is begun anew
    run = {"format": FORMAT, "id": run_id, "same": same, "args": flags}  # report.py reads these
    (out / "run.json.part").write_text(json.dumps(run, indent=2))
    (out / "run.json.part").rename(out / "run.json")
    return file


def lock(out: Path):
    """A file that only one process has open and locked. Its lock ends with the process, however
    that ends, and no forked worker inherits it: it is never stale.
    """
    file = open(out / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"--output_dir {out}: a run is going on there, wait for its end") from None
    except OSError:
        pass  # a file system without locks
    return file


# --- checkpoints ---


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the oldest first."""
    found = [path for path in out.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def save(engine, out: Path, progress: dict, limit: int = -1, also=None):
    """Writes a checkpoint under another name, every rank its share of whole tensors; renames it.
    The newest `limit` are kept (-1: all). `also(folder)` may add files; every rank calls it.
    """
    target = out / f"checkpoint-{progress['step']}"
    part = target.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    written = write_share(engine, part)
    if also:
        also(part)
    written = engine.gather(written)  # all have written
    if engine.rank == 0:
        publish(part, target, written, progress)
        older = [folder for folder in checkpoints(out) if step_of(folder) <= progress["step"]]
        for folder in older[:-limit] if limit > 0 else []:
            shutil.rmtree(folder)


def write_share(engine, folder: Path) -> list[str]:
    """Gathers each tensor, and writes every world-th; returns the names of this rank's files."""
    keys = [(name, part) for name in engine.trained for part in PARTS]
    mine, gathered, written = {}, 0, []
    for i, (name, part) in enumerate(keys):
        tensor = engine.get(name, part)
        gathered += tensor.nbytes
        if i % engine.world == engine.rank:
            mine[f"{part}.{name}"] = tensor.cpu()
        # All write at the same time: one that wrote alone would keep the others waiting.
        if gathered >= SHARD_BYTES * engine.world or i == len(keys) - 1:
            written.append(f"state-{i:06}-{engine.rank}.safetensors")
            write_tensors(mine, folder / written[-1])
            mine, gathered = {}, 0
    return written


def write_tensors(tensors: dict, file: Path):
    file.touch()
    mode = file.stat().st_mode  # as the umask has it: safetensors makes files private
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # which does not name the file
        raise OSError(f"{file}: not written ({error}); earlier checkpoints stay") from None
    file.chmod(mode)


def publish(part: Path, target: Path, written: list[str], progress: dict):
    """Makes the folder `part` the checkpoint `target`, if all files that ranks wrote are there."""
    for name in written:
        if not (part / name).is_file():
            advice = "--output_dir must be on a disk that all nodes share"
            raise FileNotFoundError(f"{part / name}: written on another node only; {advice}")
    files = {file.name: file.stat().st_size for file in part.iterdir()}
    (part / "progress.json").write_text(json.dumps({**progress, "files": files}))
    if target.exists():
        shutil.rmtree(target)  # damaged: this run was resumed from an older one
    part.rename(target)


def load(engine, out: Path, resume: str, run_id: str) -> dict | None:
    """Puts the newest whole checkpoint, or the one that `resume` names, into the engine; returns
    its progress; None for a run that was stopped before its first one.
    """
    # Rank 0 chooses for all: on a network's disk nodes may see a folder at different moments.
    (folder,) = engine.gather([choose(out, resume, run_id)] if engine.rank == 0 else [])
    if folder is None:
        return None
    missing = {f"{part}.{name}" for name in engine.trained for part in PARTS}
    for path in folder.glob("state-*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                part, name = key.split(".", 1)
                engine.put(name, part, file.get_tensor(key))
                missing.remove(key)
    assert not missing, f"{folder} lacks {min(missing)}"
    progress = json.loads((folder / "progress.json").read_text())
    engine.refresh(progress["step"])
    print(f"resumed from {folder}")
    return progress


def choose(out: Path, resume: str, run_id: str) -> Path | None:
    """The checkpoint to resume from; prints what is wrong with those that are passed over."""
    folders = checkpoints(out) if resume == "latest" else [Path(resume)]
    for folder in reversed(folders):
        wrong = fault(folder, run_id)
        if wrong is None:
            return folder
        if folder == folders[0]:
            raise ValueError(f"{wrong}; there is no other checkpoint to resume from")
        print(f"{wrong}: passed over")
    return None


def fault(folder: Path, run_id: str) -> str | None:
    """What is wrong with a checkpoint: it lacks a file, has a short one, or is another run's."""
    path = folder / "progress.json"
    try:
        progress = json.loads(path.read_text())
        for name, size in progress["files"].items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{path}: {path.stat().st_size} bytes, not {size}"
    except (OSError, ValueError) as error:
        return f"{path}: {'missing' if isinstance(error, OSError) else 'damaged'}"
    return None if progress["run"] == run_id else f"{folder}: another run's checkpoint"
