"""The benchmark takes the same steps on both sides."""

import numpy as np
import pytest
import torch
from processes import in_this_process

import bench
import model as llava


def test_flops_are_those_of_the_closed_form(world):
    model = llava.from_pretrained(world / "llava")
    labels = torch.where(torch.arange(30) < 20, -100, 1).expand(2, 30)
    batch = torch.zeros(2, 30), torch.zeros(3, 3, 28, 28), labels
    D, F, V, L, T, N, P = 32, 48, model.config.text_config.vocab_size, 2, 60, 3, 5
    decoder = (
        2 * T * L * (2 * D * D + 2 * D * D // 2 + 3 * D * F)
    )  # two of four heads are key-value heads
    tower = 2 * N * P * (2 * (4 * D * D + 2 * D * F) + 3 * 14 * 14 * D)
    attention = 4 * N * P * P * D * 2, 2 * 2 * 30 * 30 * D * L
    projector, head = 2 * N * 4 * 2 * D * D, 2 * 20 * D * V
    for p in model.parameters():
        p.requires_grad_(False)
    forward = tower + projector + decoder + head + sum(attention)
    assert bench.count_flops(model, bench.count_weights(model), *batch) == forward
    model.multi_modal_projector.requires_grad_(True)
    assert (
        bench.count_flops(model, bench.count_weights(model), *batch)
        == forward + 2 * projector + decoder + head + 2 * attention[1]
    )


@pytest.fixture(scope="session")
def bench_work(tmp_path_factory):
    """The tiny model, rows and an adapter without dropout, which draws differently on each side."""
    work = tmp_path_factory.mktemp("bench")
    model = bench.make_model("tiny", torch.float32, work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.LORA, "dropout", 0.0)
        bench.make_adapter(model, work / "adapter")
    for mix in ("caption", "instruction"):
        bench.make_rows(mix, 6, work)
    return work


@pytest.mark.parametrize("case", bench.CASES)
def test_both_sides_of_the_bench_take_the_same_steps(bench_work, case):
    """The loss after equal steps is Trainer's and PEFT's, so their speed is compared at equal work."""
    job = {
        "case": case,
        "mix": "instruction",
        "micro_batch": 2,
        "steps": 3,
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "workers": 0,
        "work": str(bench_work),
        "model": str(bench_work / "tiny"),
    }
    ours, peer = (in_this_process({**job, "side": side}) for side in ("ours", "peer"))
    assert len(ours["losses"]) >= 3
    if case == "generate":
        assert ours["losses"] == peer["losses"]
    else:
        np.testing.assert_allclose(
            ours["losses"], peer["losses"], rtol=2e-3 if case == "qlora" else 1e-4
        )
    assert len(ours["seconds"]) == len(peer["seconds"]) and ours["peak_gib"] > 0


def test_the_bench_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", in_this_process)
    argv = "--shape tiny --cases projector --mix 620 --steps 2 --micro_batch 1 --rounds 2".split()
    argv += ["--product", "64", "--workers", "0", "--work", str(tmp_path)]
    assert bench.main([*argv, "--peers", "peer", "plain", "checkpointing"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names, _, *lines = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    peer, plain, checkpointing = (dict(zip(names, line)) for line in lines)
    assert [line["beside"] for line in (peer, plain, checkpointing)] == bench.PEERS[:3]
    assert peer["samples/s"] == plain["samples/s"] and float(peer["faster"]) > 0
    assert 560 < float(peer["tokens/s"]) / float(peer["samples/s"]) < 680
    for line in (peer, plain, checkpointing):
        ours, theirs = map(float, line["last loss or answer"].split(", "))
        assert ours == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(SystemExit):
        bench.main(["--mix", "long"])
    assert "--mix long" in capsys.readouterr().err


def test_a_line_of_the_table_has_medians_and_ratios():
    def runs(side, seconds, peak):
        job = {"case": "full", "mix": "caption", "micro_batch": 3, "side": side}
        return [
            {
                "job": job,
                "seconds": [9, s],
                "peak_gib": peak,
                "losses": [2.0],
                "tokens": [1, 60],
                "flops": [1, 30],
            }
            for s in seconds
        ]

    line = bench.line_of(runs("ours", [1, 2, 9], 1.0), runs("peer", [5, 4, 1], 4.0), rate=100.0)
    assert line["samples/s"] == "1.500" and line["tokens/s"] == "30.0" and line["rate"] == "15%"
    assert line["faster"] == "2.00" and line["memory"] == "0.25" and line["beside"] == "peer"
