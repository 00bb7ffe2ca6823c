"""The whole way once, small: data, a model, each train type, a resume, a merge, an answer.

    python -m pytest test_smoke.py

It reads as an example of use: each step is a command that a user would type, and what it leaves is
compared with transformers' own LLaVA. What must hold in detail stands in tests/.
"""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import chat
import merge
import model
import toy
import train

QUESTION = "What colour are the shapes?"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the built-in data and a tiny LLaVA, made by two commands."""
    folder = tmp_path_factory.mktemp("work")
    assert toy.main(["data", "--out", f"{folder}/toy", "--scenes", "16"]) == 0
    assert toy.main(["model", "--out", f"{folder}/model"]) == 0
    return folder


def train_two_steps(work, train_type, *flags, source="model", out=None):
    rows = "captions" if train_type == "projector" else "train"
    command = f"""--train_type {train_type} --model_name_or_path {work}/{source}
        --data_path {work}/toy/{rows}.json --image_folder {work}/toy/images
        --output_dir {work}/{out or train_type} --max_steps 2 --per_device_train_batch_size 2
        --bf16 False --dataloader_num_workers 0 --warmup_ratio 0"""
    return train.main([*command.split(), *flags])


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def prompt_and_picture(work):
    """What people give transformers' processor: the text of a question, and its picture."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    processor = AutoProcessor.from_pretrained(work / "model")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    picture = Image.open(next((work / "toy/images").glob("*.png")))
    return processor, processor(images=picture, text=prompt, return_tensors="pt")


@pytest.mark.parametrize("train_type", ["projector", "freeze_vision", "full"])
def test_two_steps_leave_a_folder_for_transformers(work, train_type):
    assert train_two_steps(work, train_type) == 0
    _, inputs = prompt_and_picture(work)
    ours = model.from_pretrained(work / train_type / "final").eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(work / train_type / "final").eval()
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    with torch.no_grad():
        loss, _ = ours(inputs["input_ids"], inputs["pixel_values"], labels)
        expected = theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(loss / 4, expected, rtol=1e-5, atol=1e-5)
    before = model.from_pretrained(work / "model").state_dict()
    moved = {
        name.split(".")[0]
        for name, tensor in ours.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    trained = {"multi_modal_projector"}
    trained |= {"language_model"} if train_type != "projector" else set()
    trained |= {"vision_tower"} if train_type == "full" else set()
    assert moved == trained


@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_is_merged_and_then_answers_as_before(work, bits, capsys):
    flags = ["--bits", str(bits), "--lora_r", "4", "--lora_alpha", "8", "--learning_rate", "0.005"]
    assert train_two_steps(work, "use_lora", *flags, out=f"lora{bits}") == 0
    base, adapter = f"{work}/model", f"{work}/lora{bits}/final"
    flags = ["--model_name_or_path", base, "--adapter", adapter]
    flags += ["--dequantize"] if bits == 4 else []
    assert merge.main([*flags, "--out", f"{work}/merged{bits}"]) == 0
    picture = str(next((work / "toy/images").glob("*.png")))
    ask = ["--image", picture, "--prompt", QUESTION, "--max_new_tokens", "8"]
    answers = []
    for chosen in (
        ["--model_name_or_path", f"{work}/merged{bits}"],
        ["--model_name_or_path", base, "--adapter", adapter, "--bits", str(bits)],
    ):
        capsys.readouterr()
        assert chat.main([*ask, *chosen]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()


def test_a_resumed_run_comes_to_the_same_weights(work):
    out = work / "resumed"
    assert train_two_steps(work, "full", "--save_steps", "1", out="resumed") == 0
    weights = model.from_pretrained(out / "final").state_dict()
    losses = [line["loss"] for line in metrics_of(out)]
    for folder in ("final", "checkpoint-2"):  # as if it had been killed in its second step
        shutil.rmtree(out / folder)
    assert (
        train_two_steps(
            work, "full", "--save_steps", "1", "--resume_from_checkpoint", "latest", out="resumed"
        )
        == 0
    )
    assert [line["loss"] for line in metrics_of(out)] == losses
    for name, tensor in model.from_pretrained(out / "final").state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_an_answer_is_the_one_that_transformers_gives(work, capsys):
    processor, inputs = prompt_and_picture(work)
    theirs = LlavaForConditionalGeneration.from_pretrained(work / "full" / "final").eval()
    new = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    picture = str(next((work / "toy/images").glob("*.png")))
    ask = ["--image", picture, "--prompt", QUESTION, "--max_new_tokens", "8"]
    assert chat.main(["--model_name_or_path", f"{work}/full/final", *ask]) == 0
    assert capsys.readouterr().out.strip() == expected.strip()
