"""One process of several: how it meets the others, and how it ends without leaving them hanging.

    join(use_deepspeed=True)  # the launcher's environment says which rank this is, and of how many
    ...
    leave()                   # all together: after success, or a stop
    sys.exit(run(main))       # in place of main(): one that fails ends the other ranks at once

A launcher (deepspeed, srun, torchrun) starts the processes. One that fails says so in a line, and
nothing collective follows: the others may be waiting for it in a collective, where they would stay.
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import cli

TIMEOUT = datetime.timedelta(hours=1)  # rank 0 may write for long, while the others wait
HEAD_START_SECONDS = 4  # rank 0 speaks first


def join(use_deepspeed: bool):
    """Sets up this process, and joins the launcher's others; without a launcher it is alone."""
    with socket.socket() as free:  # a port that no other run on this machine has
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if cli.find_device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if use_deepspeed:
        import deepspeed

        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`")  # its call
        # Not DeepSpeed's own shared-memory library: a run that is killed while it compiles leaves a
        # lock, at which all later runs wait. gloo is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(timeout=TIMEOUT)
    elif os.environ["WORLD_SIZE"] != "1":
        raise ValueError("many processes need --deepspeed ds_zero2.json, or ds_zero3.json")
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all


def leave():
    """Ends the process group, once all ranks are done: the launcher kills the others 30 s after the
    first that leaves with another status than 0, and a run that was stopped leaves with 3.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def after_rank_0(text: str) -> str:
    """What a rank that fails says. Rank 0 says it at once; another waits, and where all have the same
    fault, the `end` of rank 0 has killed it by then, on rank 0's machine.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return text
    time.sleep(HEAD_START_SECONDS + 2 * int(os.environ["LOCAL_RANK"]))
    return f"rank {rank}: {text}"


def program_of(pid: int) -> bytes:
    """What a process runs, without its flags; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0--")[0]
    return b""


def end():
    """Ends this process, which has failed, and the other ranks of its machine.

    The launcher would send them SIGTERM, which is a wish to save and stop here, and wait for 30 s.
    """
    lists = Path(f"/proc/{os.getppid()}/task").glob("*/children")  # of the launcher's threads
    pids = [int(pid) for file in lists for pid in file.read_text().split()]
    mine = program_of(os.getpid())  # a launcher has children that are no ranks, too
    ranks = [pid for pid in pids if pid != os.getpid() and program_of(pid) == mine]
    if os.fork() == 0:  # outlives this process, whose status the launcher is to see first
        time.sleep(1)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os._exit(2)  # no teardown: NCCL's would wait for the others


def run(main) -> int:
    """main() of a command, as one of several processes where a launcher has started them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return main()
    try:
        status = main()
    except Exception as error:
        traceback.print_exc()
        text = after_rank_0(f"{type(error).__name__}: {error}")
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 2:
        end()
    return status
