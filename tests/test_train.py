"""The loop, its flags and recipes, beside plain torch and transformers' schedules."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LORA, argv_of, losses_of, metrics_of, parsed, run, weights_of
from safetensors.torch import load_file
from tiny import HERE, open_dataset
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

import data
import engines
import model as llava
import order
import train
from data import ChatText, PictureTransform


def test_any_split_of_a_window_gives_the_same_gradients(world):
    """Micro-batches, their order, padding, ranks: float64, 1e-10. Checkpointing changes nothing either."""
    rows = open_dataset(world / "rows.json", world / "images", world / "llava")
    steps = order.plan_epoch(rows.records, 12, 0, 0, False)

    def gradients(accumulation, world_size=1, reverse=False, checkpointing=False):
        model = llava.from_pretrained(world / "llava", torch.float64).train()
        if checkpointing:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
        batches = [
            collate([rows[i] for i in batch])
            for rank in range(world_size)
            for batch in order.micro_batches(steps, accumulation, world_size, rank)
        ]
        tokens = sum((b["labels"] >= 0).sum() for b in batches)
        for b in reversed(batches) if reverse else batches:
            (model(b["input_ids"], b["pixel_values"], b["labels"])[0] / tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients(1)
    assert whole.norm() > 1e-3
    for split in (
        dict(accumulation=12),
        dict(accumulation=3, reverse=True),
        dict(accumulation=2, world_size=3),
        dict(accumulation=1, checkpointing=True),
    ):
        assert (gradients(**split) - whole).abs().max() < 1e-10, split


def test_the_loop_is_plain_adamw_with_clipping_and_schedule(world, tmp_path):
    """Six steps of the program against ten lines of torch; 3 x 4 accumulated = 12 at once."""
    status, *_ = run(
        world, tmp_path / "a", gradient_accumulation_steps=3, weight_decay=0.1, mm_projector_lr=3e-3
    )
    assert status == 0
    model = llava.from_pretrained(world / "llava", torch.float32)
    rows = open_dataset(world / "rows.json", world / "images", world / "llava")
    collate = data.Collator(model.config.image_token_id, model.tokens_per_picture)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "lr": 3e-3 if "projector" in name else 1e-2,
                "weight_decay": 0.1 if p.ndim > 1 else 0,
            }
            for name, p in named
        ]
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, 6)
    losses = []
    for _ in range(6):
        b = collate([rows[i] for i in range(12)])
        loss = model(b["input_ids"], b["pixel_values"], b["labels"])[0] / (b["labels"] >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), scheduler.step()
        losses.append(loss.item())
    assert losses_of(tmp_path / "a") == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]
    saved = weights_of(tmp_path / "a")
    for name, p in named:
        if "lm_head" not in name:
            assert (saved[name] - p).abs().max() < 2e-4, name


@pytest.mark.gpu
def test_a_gpu_takes_the_steps_of_a_cpu(world, tmp_path):
    assert torch.cuda.is_available()
    assert run(world, tmp_path / "gpu")[0] == 0
    argv = map(str, argv_of(world, tmp_path / "cpu"))
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, HERE / "train.py", *argv], env=hidden, check=True)
    np.testing.assert_allclose(losses_of(tmp_path / "gpu"), losses_of(tmp_path / "cpu"), rtol=1e-3)


def test_schedules_are_those_of_transformers():
    for kind, make in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make(optimizer, 3, 20)
        for step in range(20):
            assert train.schedule(step, 20, 3, kind) == pytest.approx(
                scheduler.get_last_lr()[0], abs=1e-12
            )
            optimizer.step(), scheduler.step()
    assert train.schedule(5, 20, 3, "constant") == 1


@pytest.mark.parametrize(
    "train_type, moved",
    [
        ("projector", {"multi_modal_projector"}),
        ("freeze_vision", {"multi_modal_projector", "language_model"}),
        ("full", {"multi_modal_projector", "language_model", "vision_tower"}),
    ],
)
def test_each_train_type_moves_its_modules_and_no_other(world, tmp_path, train_type, moved):
    """Every weight of a moving module moves (but k_proj.bias, which softmax ignores)."""
    captions = {"data_path": world / "captions.json"} if train_type == "projector" else {}
    assert (
        run(world, tmp_path / "a", train_type=train_type, max_steps=2, warmup_ratio=0, **captions)[
            0
        ]
        == 0
    )
    before, after = load_file(world / "llava" / "model.safetensors"), weights_of(tmp_path / "a")
    assert before.keys() == after.keys()
    built_tower = llava.from_pretrained(world / "llava").state_dict()
    for name in before:
        should = (
            name.split(".")[0] in moved and name in built_tower and not name.endswith("k_proj.bias")
        )
        same = torch.equal(before[name], after[name])
        assert same != should or name.endswith("k_proj.bias"), name


def test_bf16_keeps_fp32_masters_and_sums(world):
    """Small gradients survive accumulation, and updates too small for bf16 are not lost."""
    model = llava.from_pretrained(world / "llava", torch.bfloat16)
    args = parsed("projector")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "multi_modal_projector.linear_1.weight")
    engine = train.open_engine(model, args, None)
    weight = model.multi_modal_projector.linear_1.weight
    for _ in range(300):  # bf16 alone would stop at 256 + 1 = 256
        engine.backward(weight.float().sum(), last=False)
    (master,) = engine.trained.values()
    assert (
        master.grad.unique().item() == 300 and weight.grad is None and master.dtype == torch.float32
    )
    before = master.clone()
    for _ in range(20):
        engine.backward(weight.float().sum(), last=True)
        engine.step(1e-3)
    assert (master < before).all() and torch.equal(weight, master.to(torch.bfloat16))


def test_an_aspect_ratio_that_was_trained_with_is_saved(world, tmp_path):
    """What transformers' processor does with the saved folder is what training did."""
    assert run(world, tmp_path / "a", image_aspect_ratio="square", max_steps=1)[0] == 0
    image = Image.open(world / "images" / "3.png")
    pixels = AutoProcessor.from_pretrained(tmp_path / "a" / "final").image_processor(image)[
        "pixel_values"
    ][0]
    for ratio, same in (("square", True), ("pad", False)):
        ours = PictureTransform.from_pretrained(world / "llava", ratio)(image)
        assert (np.abs(ours - pixels).max() < 1e-5) == same
    assert PictureTransform.from_pretrained(tmp_path / "a" / "final").aspect_ratio == "square"


def test_two_stages_follow_each_other(world, tmp_path):
    """Stage 1 leaves the folder's template alone; stage 2 saves the one that it trains with, and chat uses it."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert (
        run(world, one, train_type="projector", data_path=world / "captions.json", max_steps=2)[0]
        == 0
    )
    template = lambda folder: (folder / "chat_template.jinja").read_text()  # noqa: E731
    assert template(one / "final") == template(world / "llava")
    assert run(world, two, model_name_or_path=one / "final", version="v1", max_steps=2)[0] == 0
    assert "ASSISTANT" in template(two / "final") and "ASSISTANT" not in template(one / "final")
    text = ChatText(AutoTokenizer.from_pretrained(two / "final"))
    assert "USER: hi ASSISTANT:" in text.render([{"role": "user", "content": "hi"}], prompt=True)


def test_text_only_rows_train_and_evaluate(world, tmp_path):
    rows = [r for r in json.loads((world / "rows.json").read_text()) if not r["image"]]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    status, output, error = run(
        world,
        tmp_path / "a",
        data_path=tmp_path / "text.json",
        image_folder=None,
        validation_data_path=tmp_path / "text.json",
        per_device_train_batch_size=2,
    )
    assert status == 0, error
    assert losses_of(tmp_path / "a")[-1] < losses_of(tmp_path / "a")[0]


def test_a_bad_record_stops_or_is_skipped_and_counted(world, tmp_path):
    """Skipped, it weighs nothing: the run equals one whose row has no supervised token."""
    rows = json.loads((world / "rows.json").read_text())
    rows[5]["image"] = "missing.png"
    rows[5]["conversations"][0]["value"] = "<image>\nWhat?"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows[6]["kinds"] = ["one of two"]  # not what ours means: an extra key, like any other
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for workers in (0, 1):
        status, _, error = run(
            world,
            tmp_path / f"a{workers}",
            data_path=tmp_path / "rows.json",
            dataloader_num_workers=workers,
        )
        assert (
            status == 2
            and error.count("\n") == 1
            and "row 5 (id r5)" in error
            and "missing.png" in error
        )
    status, _, error = run(
        world,
        tmp_path / "b",
        data_path=tmp_path / "rows.json",
        on_bad_record="skip",
        max_steps=3,
        validation_data_path=tmp_path / "rows.json",
        eval_samples=-1,
    )
    assert status == 0 and error.count("skipped: ") >= 3
    assert sum(m.get("samples_per_s", 0) > 0 for m in metrics_of(tmp_path / "b")) == 3


def test_a_loss_that_is_not_finite_names_its_records(world, tmp_path):
    shutil.copytree(world / "llava", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    status, _, error = run(world, tmp_path / "a", model_name_or_path=tmp_path / "nan")
    assert (
        status == 2
        and "the loss is nan" in error
        and "id r" in error
        and not (tmp_path / "a" / "final").exists()
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(train_type="adapter"), "invalid choice"),
        (dict(bf16="maybe"), "neither True nor False"),
        (dict(data_path="no.json"), "no.json"),
        (dict(model_name_or_path="nowhere"), "nowhere"),
        (dict(image_folder="nowhere"), "nowhere"),
        (dict(image_folder=None), "--image_folder"),
        (dict(resume_from_checkpoint="nowhere", output_dir="HELD"), "nowhere"),
        (dict(output_dir="HELD"), "--resume_from_checkpoint latest"),
        (
            dict(output_dir="HELD", resume_from_checkpoint="latest", learning_rate=1),
            "--learning_rate",
        ),
        (dict(output_dir="OTHER"), "no run"),
        (dict(output_dir="SOURCE"), "not empty, and no run"),
        (dict(output_dir="BLOCKED"), "thesis.tex"),
        (dict(deepspeed="no.json"), "no.json"),
        (dict(resume_from_checkpoint="nowhere"), "no run there"),
        (dict(per_device_train_batch_size=0), "is not from 1"),
        (dict(learning_rate="nan"), "is not from 0"),
        (dict(num_train_epochs=-1), "is not from"),
        (dict(train_type="use_lora", lora_target_modules=".*q_proj"), "decoder's layers only"),
        (dict(train_type="use_lora", image_aspect_ratio="square"), "as its base does"),
        (dict(model_max_length=8), "model_max_length"),
        (dict(offload="optimizer"), "needs --deepspeed"),
        (dict(deepspeed=HERE / "ds_zero2.json", offload="all"), "use ds_zero3.json"),
        (dict(data_path=None), "required: --data_path"),
        (dict(early_stopping_patience=2), "needs --validation_data_path"),
        (dict(lora_r=4, train_type="projector"), "--lora_r is for a new adapter"),
        (dict(lora_r=0, train_type="use_lora"), "is not from 1"),
        (dict(lora_alpha="nan", train_type="use_lora"), "is not from"),
        (dict(validation_data_path=""), "--validation_data_path is empty"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(world, tmp_path, flags, says):
    """Exit status 2, as argparse's own."""
    (tmp_path / "held").mkdir()
    args = (
        run(world, tmp_path / "held2", max_steps=1, save_steps=1)
        if "HELD" in flags.values()
        else None
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    if args:
        shutil.rmtree(tmp_path / "held2" / "final")
    flags = {"max_steps": 1, "warmup_ratio": 0.03} | flags
    flags["output_dir"] = {
        "HELD": tmp_path / "held2",
        "OTHER": tmp_path / "other",
        "SOURCE": world / "llava",
        "BLOCKED": tmp_path / "other" / "thesis.tex" / "run",
    }.get(flags.get("output_dir"), tmp_path / "new")
    before = sorted(world.rglob("*")), sorted(tmp_path.rglob("*"))
    try:
        status, _, text = run(world, **{"out": flags.pop("output_dir")}, **flags)
    except SystemExit as stop:
        status, text = stop.code, says
    assert status == 2 and says in text and text.count("\n") <= 1
    assert before == (sorted(world.rglob("*")), sorted(tmp_path.rglob("*")))


def test_published_defaults():
    """facts: LLaVA-1.5's scripts."""
    args = parsed("projector", "--local_rank=3")  # the launcher's flag
    assert (args.learning_rate, args.version, args.warmup_ratio, args.weight_decay) == (
        1e-3,
        "plain",
        0.03,
        0,
    )
    assert (args.lr_scheduler_type, args.model_max_length, args.max_grad_norm) == (
        "cosine",
        2048,
        1.0,
    )
    assert args.per_device_train_batch_size == 32 and not args.gradient_checkpointing
    args = parsed("use_lora")
    assert (args.learning_rate, args.mm_projector_lr, args.lora_r, args.lora_alpha) == (
        2e-4,
        2e-5,
        128,
        256,
    )
    assert args.per_device_train_batch_size == 16 and args.gradient_checkpointing
    args = parsed("freeze_vision", "--mm_projector_lr", "1e-4", "--bf16")
    assert (args.learning_rate, args.mm_projector_lr, args.mm_vision_tower_lr, args.bf16) == (
        2e-5,
        1e-4,
        2e-5,
        True,
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [{"train_type": "full"}, LORA, LORA | {"bits": 4}])
def test_what_trains_has_one_dtype(world, kind, bf16):
    args = train.parse(argv_of(world, "out", **kind | {"bf16": bf16}))
    model = train.load_model(args, world / "llava", "cpu")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}


def test_deepspeed_files_leave_the_batch_to_the_flags(tmp_path):
    """No "auto", no key that DeepSpeed does not know, bf16 on, clipping from the flags;
    a file that says otherwise is refused.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (2, 3):
        file = HERE / f"ds_zero{stage}.json"
        assert "auto" not in file.read_text()
        config = engines.deepspeed_config(
            parsed("full", "--bf16", "True", "--deepspeed", str(file))
        )
        assert (
            config["gradient_clipping"] == 1.0
            and config["bf16"]["enabled"]
            and config["zero_optimization"]["stage"] == stage
        )
        known = DeepSpeedZeroConfig.model_fields
        assert config["zero_optimization"].keys() <= {*known, *(f.alias for f in known.values())}
        assert "scheduler" not in config
        assert json.loads(file.read_text())["bf16"] == {"enabled": True}
        looser = parsed("full", "--max_grad_norm", "3", "--deepspeed", str(file))
        assert engines.deepspeed_config(looser)["gradient_clipping"] == 3
        (tmp_path / "bad.json").write_text(
            json.dumps({**json.loads(file.read_text()), "gradient_clipping": 2})
        )
        with pytest.raises(ValueError, match="gradient_clipping"):
            engines.deepspeed_config(
                parsed("full", "--bf16", "True", "--deepspeed", str(tmp_path / "bad.json"))
            )


@pytest.mark.parametrize("gpu", [False, True])
def test_out_of_memory_names_the_next_flag_to_try(world, tmp_path, monkeypatch, gpu):
    def forward(*_):
        if gpu:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.empty(2**60)

    monkeypatch.setattr(llava.Llava, "forward", forward)
    for n, (flags, says) in enumerate(
        [
            ({}, "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"),
            (
                {"per_device_train_batch_size": 3},
                "--per_device_train_batch_size 1 --gradient_accumulation_steps 3",
            ),
            (
                {"per_device_train_batch_size": 1, "gradient_checkpointing": False},
                "try --gradient_checkpointing",
            ),
            ({"per_device_train_batch_size": 1, "train_type": "use_lora"}, "try --bits 4"),
            ({"per_device_train_batch_size": 1}, "ds_zero3.json"),
        ]
    ):
        status, _, error = run(world, tmp_path / str(n), **flags)
        assert status == 2 and error.count("\n") == 1 and says in error
    monkeypatch.setattr(llava.Llava, "forward", lambda *_: 1 / torch.zeros(2)[5])
    with pytest.raises(IndexError):
        run(world, tmp_path / "other")


def test_dropout_differs_between_steps_ranks_and_seeds():
    numbers = itertools.product((42, 43), range(5), range(5))
    assert len({train.seed_of(*three) for three in numbers}) == 50


def test_a_run_of_one_step_learns(world, tmp_path):
    for total in (1, 2):
        flags = dict(max_steps=total, warmup_ratio=1)
        assert run(world, tmp_path / f"{total}", **flags)[0] == 0
        assert max(m["lr"] for m in metrics_of(tmp_path / f"{total}")) == pytest.approx(1e-2)
    before, after = load_file(world / "llava/model.safetensors"), weights_of(tmp_path / "1")
    name = "multi_modal_projector.linear_1.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("flag", ["max_steps", "save_total_limit", "save_steps", "eval_steps"])
def test_zero_is_no_number_of_steps(world, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        train.main(argv_of(world, tmp_path / "a", **{flag: 0}))
    assert f"--{flag}: 0 is" in capsys.readouterr().err
