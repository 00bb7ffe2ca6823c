"""How tests call the commands: in this process, in many, by run.sh among stand-ins."""

import contextlib
import difflib
import functools
import io
import json
import multiprocessing
import os
import resource
import runpy
import shlex
import socket
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import HERE

import bench
import evaluate
import train


def words_of(flags):
    return [
        word
        for key, value in flags.items()
        if value is not None
        for word in (f"--{key}", str(value))
    ]


def flags_of(world, out):
    """What train.py and evaluate.py are both told."""
    return {
        "model_name_or_path": world / "llava",
        "image_folder": world / "images",
        "output_dir": out,
        "bf16": False,
        "max_new_tokens": 4,
        "dataloader_num_workers": 0,
    }


def argv_of(world, out, **flags):
    defaults = {
        "data_path": world / "rows.json",
        "train_type": "full",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "eval_samples": 2,
    }
    return words_of(flags_of(world, out) | defaults | flags)


def called(main, argv):
    """(exit status, standard output, error output) of a command."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = main(argv)
    return status, output.getvalue(), error.getvalue()


def evaluated(world, out, **flags):
    """Evaluates through main(argv); as `called`."""
    flags = flags_of(world, out) | {"validation_data_path": world / "rows.json"} | flags
    return called(evaluate.main, words_of(flags))


def run(world, out, **flags):
    """Trains through main(argv); as `called`."""
    return called(train.main, argv_of(world, out, **flags))


def metrics_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses_of(out):
    return [m["loss"] for m in metrics_of(out) if "loss" in m]


def weights_of(out):
    return {
        k: v
        for file in (Path(out) / "final").glob("*.safetensors")
        for k, v in load_file(file).items()
    }


STAGE_1 = dict(train_type="projector")


LORA = dict(train_type="use_lora", lora_r=4, lora_alpha=8, learning_rate=1e-2, mm_projector_lr=1e-3)


OWN = dict(lora_r=None, lora_alpha=None)  # what an adapter that is there has already


def parsed(train_type, *more):
    """The arguments that follow from the flags that a run cannot do without, and more."""
    needed = "--model_name_or_path x --data_path x --output_dir x --train_type".split()
    return train.parse([*needed, train_type, *more])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def server():
    """Forks processes that have imported everything already: a launch takes a second, not ten."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE}/tests:{os.environ.get('PYTHONPATH', '')}"
    context.set_forkserver_preload(["deepspeed", "processes"])
    return context


def be_rank(rank, ranks, jobs, limit_bytes=None):
    """What the launcher has a process do, for each job: (port, flags of train.py, report).

    limit_bytes is the size from which its files fail to grow.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["TORCH_EXTENSIONS_DIR"] = os.devnull  # nothing is compiled: killed, it leaves a lock
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    for i, (port, argv, report) in enumerate(jobs, 1):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        report = os.open(f"{report}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(report, stream)
        sys.stdout, sys.argv = sys.__stdout__, [str(HERE / "train.py"), *argv]
        try:
            with pytest.MonkeyPatch.context() as patch:
                if i < len(jobs):  # the last one ends the process group: DeepSpeed wants but one
                    patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code or i == len(jobs):
                raise


def start(world, out, ranks=1, limits={}, target=be_rank, **flags):
    """The processes of a run, started; what rank r prints goes to the file OUT-r.txt."""
    return start_all(ranks, [(free_port(), argv_of(world, out, **flags), out)], limits, target)


def start_all(ranks, jobs, limits={}, target=be_rank):
    processes = [
        server().Process(target=target, args=(r, ranks, jobs, limits.get(r))) for r in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes, seconds=120):
    """Their exit statuses; fails if they hang."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    hang = [process for process in processes if process.is_alive()]
    for process in hang:
        process.kill()
    assert not hang, f"{len(hang)} of {len(processes)} processes hang"
    return [process.exitcode for process in processes]


def printed(out, ranks):
    return "".join(Path(f"{out}-{r}.txt").read_text() for r in range(ranks))


def launch(world, out, ranks=1, limits={}, target=be_rank, **flags):
    """(exit statuses, all that was printed) of a run by `ranks` processes."""
    statuses = end(start(world, out, ranks, limits, target, **flags))
    return statuses, printed(out, ranks)


def launch_all(world, ranks, runs, seconds=240):
    """Runs {folder: flags}, one after the other, by the same `ranks` processes; all must succeed."""
    jobs = [(free_port(), argv_of(world, out, **flags), out) for out, flags in runs.items()]
    statuses = end(start_all(ranks, jobs), seconds)
    texts = [printed(out, ranks) for _, _, out in jobs if Path(f"{out}-0.txt").exists()]
    assert statuses == [0] * ranks, texts[-1]


def lines_in(path):
    return path.read_text().count("\n") if path.is_file() else 0


ZERO = {stage: {"deepspeed": HERE / f"ds_zero{stage}.json"} for stage in (2, 3)}


STILL = {"lora_dropout": 0}  # ranks draw different masks


KINDS = {
    "projector": STAGE_1 | {"learning_rate": 1e-3},
    "freeze_vision": {"train_type": "freeze_vision", "learning_rate": 1e-3},
    "full": {"train_type": "full", "learning_rate": 1e-3},
    "lora": LORA | STILL | {"learning_rate": 1e-3},
    "qlora": LORA | STILL | {"learning_rate": 1e-3, "bits": 4},
}


def zero_flags(world, kind, steps, bf16):
    rows = world / ("captions.json" if kind == "projector" else "rows.json")
    return (
        {
            "data_path": rows,
            "validation_data_path": rows,
            "bf16": bf16,
            "max_steps": steps,
            "eval_steps": steps,
            "eval_samples": 2,
            "max_new_tokens": 6,
            "per_device_eval_batch_size": 1,
            "warmup_ratio": 0,
            "weight_decay": 0.1,
        }
        | KINDS[kind]
        | ({"learning_rate": 1e-4} if bf16 else {})
    )


def changed(module, lines, *edits):
    """A module of ours with text replaced, as a newcomer would, in `lines` new or other lines."""
    before = after = Path(module.__file__).read_text()
    for old, new in edits:
        assert after.count(old) == 1, f"{old} is not in {module.__name__} once"
        after = after.replace(old, new)
    difference = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    assert sum(line[0] == "+" and line[:3] != "+++" for line in difference) == lines
    other = types.ModuleType(f"changed_{module.__name__}")
    exec(compile(after, module.__file__, "exec"), vars(other))
    return other


# Stand-ins for what run.sh starts. Each writes its command line to $CALLS. A run makes a checkpoint where $SAVES
# says so, fails with $FAILS, waits for the file `stop` with $WAIT, or else is done.
RUN = """
while [ "$1" != --output_dir ]; do shift; done
mkdir -p "$2" ${SAVES:+"$2/checkpoint-$SAVES"}
[ -z "${FAILS:-}" ] || exit "$FAILS"
[ -n "${WAIT:-}" ] || { mkdir -p "$2/final"; exit 0; }
trap 'echo signalled >> "$CALLS"; exit 1' TERM INT HUP USR1
echo waiting >> "$CALLS"
if [ "${SLURM_NODEID:-0}" = 0 ]; then  # train.py takes an earlier run's file away when it begins to look
    until [ -e "$2/stop" ]; do sleep 0.1; done
    rm "$2/stop"
fi
until [ -e "$2/stop" ]; do sleep 0.1; done
[ "${SLURM_NODEID:-0}" = 0 ] || sleep "$WAIT"
exit 3"""


# As the real one: tasks end when they end; for one that fails, or SIGTERM, all processes of all tasks are told by
# SIGTERM (and killed after KillWait); the status is the highest of theirs, that of a signal 128 more.
SRUN = """
import contextlib, itertools, os, psutil, signal, subprocess, sys, time
flags = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
ranks = range(int(next(word[9:] for word in flags if word.startswith("--ntasks="))))
tasks = [subprocess.Popen(sys.argv[1 + len(flags):], start_new_session=True,
                          env={**os.environ, "SLURM_STEP_ID": "0", "SLURM_NODEID": str(i)}) for i in ranks]
told = []
def tell(number):
    told.append(time.monotonic())
    for task in tasks:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(task.pid).children(recursive=True), task]:
                process.send_signal(number)
signal.signal(signal.SIGTERM, lambda number, frame: tell(number))
while any(task.poll() is None for task in tasks):
    time.sleep(0.02)
    if "--kill-on-bad-exit=1" in flags and any(task.poll() for task in tasks):
        if not told:
            tell(signal.SIGTERM)
        elif time.monotonic() > told[0] + 1:
            tell(signal.SIGKILL)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))"""


STANDINS = {
    "python": f"""case "$*" in
        "-m pip install"*) exit 0 ;;
        *device_count*) echo counted >> "$CALLS"; echo "$GPUS"; exit ;;
        *pthread_sigmask*) exec {sys.executable} "$@" ;;
        train.py*) {RUN} ;;
        esac""",
    "scontrol": """case "$1" in
        show) [ "$2" = job ] && echo "   Command=$COMMAND" || printf "node%s\\n" $(seq "$SLURM_NNODES") ;;
        esac""",
    "sbatch": """nodes=1
        while [[ $1 == --* ]]; do [[ $1 != --nodes=* ]] || nodes=${1#*=}; shift; done
        GPUS=4 SLURM_NNODES=$nodes SLURM_JOB_ID=1 SLURM_JOB_NODELIST=x exec bash "$@" """,
    "srun": f'exec {sys.executable} -c {shlex.quote(SRUN)} "$@"',
    "deepspeed": f"[ -f train.py ] || exit 1\n{RUN}",
    "ssh": 'case "$*" in *"hostname -I") echo 127.0.0.1 ;; esac',
    "pdsh": """shift 3  # ssh hands no environment on, and PATH is the login shell's
        IFS=, read -ra hosts <<< "$2"; shift 2
        for i in "${!hosts[@]}"; do
            env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${*//%n/$i}" &
        done
        for job in $(jobs -p); do wait "$job" || status=$?; done
        exit "${status:-0}" """,
}


ROWS = str(HERE / "ds_zero2.json")  # a file that is there: the stand-ins do not read it
PICTURES = str(HERE / "assets")
STAGES = {"MODEL": "llava", "FINETUNE_DATA": ROWS, "FINETUNE_IMAGES": PICTURES}


def launched(words):
    """(the flags of the launcher, those of train.py), each as its own parser reads them."""
    from deepspeed.launcher import runner

    launcher = runner.parse_args(words)
    assert launcher.user_script == "train.py"
    return launcher, train.parse(launcher.user_args)


def in_this_process(job):
    with contextlib.redirect_stdout(io.StringIO()):
        return bench.run_job({**job, "out": tempfile.mkdtemp() + "/run"})
