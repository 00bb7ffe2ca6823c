"""What all commands share: flags, one-line errors with status 2, results that are whole or absent.

@command
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=number(int, 1), default=8, help="rows of a batch")
    parser.add_argument("--full", **BOOLEAN, default=False, help="read everything")
    args = parser.parse_args(argv)
    with written(args.out) as part:
        part.write_text("...")
"""

import argparse
import contextlib
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and a flag is never abbreviated."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str):
        first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
        self.exit(2, f"{self.prog}: {message}\n" if first else None)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


BOOLEAN = {"type": boolean, "nargs": "?", "const": True}  # --flag, --flag True, --flag False


def number(kind: type, low, high=math.inf):
    """An argument type: a number of `kind`, int or float, from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # nor nan
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return parse


def count_or_off(text: str) -> int:
    """An argument type: a number from 1, or -1."""
    return -1 if text == "-1" else number(int, 1)(text)


def one_line(text) -> str:
    return " ".join(str(text).split())


def lacks_memory(error: Exception) -> bool:
    full = "out of memory|can't allocate memory"
    return isinstance(error, RuntimeError) and re.search(full, str(error)) is not None


def in_words(error: Exception, less_memory: str = "") -> str:
    """What a user is told of a mistake: a ValueError, what the system says of files, no memory.
    All else, a bug or a library's, is raised again with its traceback.
    """
    text = str(error)
    if isinstance(error, (EOFError, ConnectionError)) or "DataLoader worker" in text:
        return "a process that prepares rows has died (killed?): try --dataloader_num_workers 0"
    if less_memory and lacks_memory(error):
        return f"out of memory: try {less_memory}"
    if not isinstance(error, (ValueError, OSError, SafetensorError)):
        raise error
    return text


def folded(text: str, stream) -> str:
    """A line as it is in a log file; in a terminal it breaks between words, at 80 columns."""
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 80, **whole) if stream.isatty() else text


def command(main):
    """Makes `main(argv)` return a status: what it returns, 0 for None, 2 for a user's mistake,
    which is shown as one line.
    """
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None) -> int:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where we fork workers
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say that it looks
        try:
            return main(argv) or 0
        except Exception as error:
            print(folded(f"{name}: {one_line(in_words(error))}", sys.stderr), file=sys.stderr)
            return 2

    return run


def check_new(out: str | Path) -> Path:
    """The path of a result, where nothing may be yet; ValueError if there is."""
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; name a new folder")
    return Path(out)


def cores() -> int:
    """The cores that this process may use: a container or SLURM may have made them fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


def find_device() -> str:
    """cuda or cpu. ValueError where torch does not see a GPU that is there: what is meant for it
    must not spend days on the CPU.
    """
    # Read when a GPU's memory is first asked for. Rows differ in length: freed pieces do not fit.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if torch.cuda.is_available():
        return "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and (found := unseen_gpu()):
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        raise ValueError(
            f"torch {torch.__version__} sees no GPU, but {found}: it is built for {cuda} (13.0 "
            "needs driver 580). https://download.pytorch.org/whl has builds for other drivers, as "
            "cu126; to use the CPU all the same: CUDA_VISIBLE_DEVICES= (empty)"
        )
    return "cpu"


@contextlib.contextmanager
def written(path: str | Path):
    """A path beside `path` to write a file or a folder to: renamed to `path` at the end.

    So `path` is whole or, after an error, as it was. An older file or folder there is replaced.
    """
    path = Path(path)
    part, old = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.old")
    remove(part)  # of a process that died
    try:
        yield part
        if path.is_dir():  # a rename does not replace a folder
            remove(old)
            path.rename(old)
        part.replace(path)
        remove(old)
    finally:
        remove(part)


def remove(path: Path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
