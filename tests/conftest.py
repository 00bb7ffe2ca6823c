"""What pytest is told, and the fixtures that tests share."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import STANDINS
from tiny import HERE, REAL, TOKENIZERS, built

import model as llava
from toy import main as make_toy


def pytest_configure(config):
    """Hides the GPUs, but from the tests of the mark `gpu`: equalities hold to a CPU's precision."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(
    params=[*TOKENIZERS, *(pytest.param(name, marks=pytest.mark.long) for name in REAL)]
)
def tokenizer(request):
    return {**TOKENIZERS, **REAL}[request.param]()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A LLaVA folder as `toy.py model` writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    assert make_toy(["model", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The built-in data, less of it."""
    folder = tmp_path_factory.mktemp("toy") / "a"
    assert make_toy(["data", "--out", str(folder), "--scenes", "200"]) == 0
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(a built folder, its model) that no test changes."""
    folder = built(tmp_path_factory.mktemp("good"))
    return folder, llava.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small LLaVA (28-pixel pictures, 4 tokens each) and rows of every kind for it."""
    root = tmp_path_factory.mktemp("world")
    built(root)
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), np.uint8)).save(
            root / f"images/{i}.png"
        )
    turns = [
        ("What is in the picture?", "A red circle."),
        ("Hello", "A blue square, a circle."),
        ("hi?", "no"),
    ]
    rows = []
    for i in range(12):
        pictures = [1, 0, 2, 1][i % 4]
        asked = turns[: 1 + i % 3]
        rows.append(
            {
                "id": f"r{i}",
                "image": [f"{(i + j) % 12}.png" for j in range(pictures)],
                "conversations": [
                    {
                        "from": who,
                        "value": "<image>\n" * (pictures * (k == 0 and who == "human")) + words,
                    }
                    for k, turn in enumerate(asked)
                    for who, words in zip(("human", "gpt"), turn)
                ],
            }
        )
    captions = [
        {
            "id": f"c{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": f"circle {i}"},
            ],
        }
        for i in range(12)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "captions.json").write_text(json.dumps(captions))
    return root


@pytest.fixture(autouse=True)
def no_process_is_left():
    """What a test that failed has started and not ended."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def shell(tmp_path):
    """start(**environment): run.sh among the stand-ins; calls(name): the command lines of one of them."""
    log, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    for name, script in STANDINS.items():
        (programs / name).write_text(
            '#!/bin/bash\nline=$(printf "%q " "${0##*/}" "$@"); echo "$line" >> "$CALLS"\n' + script
        )
        (programs / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "CUDA"))}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept |= {"PATH": path, "CALLS": str(log), "GPUS": "0"}

    def start(script=HERE / "run.sh", **environment):
        return subprocess.Popen(
            ["bash", script],
            env=kept | {"OUT": str(tmp_path / "out")} | environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a shell's jobs ignore it
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=open(tmp_path / "errors", "w"),
            text=True,
        )

    def calls(name):
        lines = log.read_text().splitlines()
        return [words[1:] for words in map(shlex.split, lines) if words[0] == name]

    return start, calls
