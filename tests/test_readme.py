"""What the README says and invites to: its commands, its tables, files taken alone or changed."""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import (
    LORA,
    PICTURES,
    ROWS,
    STAGES,
    changed,
    in_this_process,
    launched,
    run,
    weights_of,
)
from safetensors.torch import load_file
from tiny import (
    ASKED,
    HERE,
    QUESTION,
    SMALL,
    VISION,
    byte_level,
    messages_of,
    noise,
    open_dataset,
    parts,
    small_tokenizer,
    tensors_of,
    theirs,
    write,
    write_vqa,
)
from tokenizers import processors
from transformers import AutoProcessor, SiglipConfig, SiglipModel

import bench
import build
import data
import evaluate
import model as llava
import train
from data import IGNORE, IMAGE, ChatText, PictureTransform

README = (HERE / "README.md").read_text()


def test_the_formatter_changes_nothing():
    command = [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", HERE]
    assert subprocess.run(command).returncode == 0


LIBRARIES = [
    "data",
    "model",
    "lora",
    "fast",
    "checkpoint",
    "cli",
    "order",
    "vqa",
]  # nothing of the project
OTHERS = [
    "engines",
    "ranks",
    "draw",
    "report",
    "evaluate",
    "merge",
    "build",
    "check",
    "okvqa",
    "chat",
]


def test_imports_run_one_way_only():
    """And so each library works alone."""
    files = [*LIBRARIES, *OTHERS, "train", "toy", "bench"]
    assert sorted(files) == sorted(
        path.stem for path in HERE.glob("*.py") if "test" not in path.name
    )
    for n, name in enumerate(files):
        source = (HERE / f"{name}.py").read_text()
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)) & set(files)
        assert imported <= set(files[:n] if n >= len(LIBRARIES) else []), name


ALONE = {  # ten lines each that know nothing of the other files, and what they print
    "model": (
        """
import torch, model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
llava = model.Llava(LlavaConfig(
    vision_config=CLIPVisionConfig(**shape, image_size=28, patch_size=14),
    text_config=LlamaConfig(**shape, vocab_size=50), image_token_index=49))
ids, picture = torch.tensor([[1, 49, 49, 49, 49, 5, 6, 7, 2]]), torch.randn(1, 3, 28, 28)
optimizer = torch.optim.AdamW(llava.parameters(), lr=1e-2)
for _ in range(30):
    llava(ids, picture, labels=ids.where(ids < 49, -100))[0].backward()
    optimizer.step(), optimizer.zero_grad()
print(llava.generate(ids[:, :6], picture, torch.ones(1, 6), eos_token_id=[2]).tolist())
""",
        "[[6, 7, 2]]",
    ),
    "data": (
        """
import json, data
from PIL import Image
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
tokenizer.add_tokens("<image>", special_tokens=True)
Image.new("RGB", (40, 30), "red").save("red.png")
turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A circle."}]
json.dump([{"image": "red.png", "conversations": turns}], open("rows.json", "w"))
text, transform = data.ChatText(tokenizer, "chatml_direct"), data.PictureTransform(28, [.5] * 3, [.5] * 3, "pad")
rows = data.LlavaDataset(data.Records("rows.json"), data.Pictures("."), text, transform, 4, 2048, "stop")
batch = data.Collator(text.image_token_id, 4)([rows[0], rows[0]])
labels = batch["labels"][1]
print(batch["pixel_values"].shape, tokenizer.decode(labels[labels >= 0]))
""",
        "torch.Size([2, 3, 28, 28]) A circle.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_file_alone_in_an_empty_folder_does_its_work(name, tmp_path):  # lora.py: in test_lora.py
    script, printed = ALONE[name]
    shutil.copy(HERE / f"{name}.py", tmp_path)
    if name == "data":
        small_tokenizer("qwen2").save_pretrained(tmp_path)
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=alone, text=True, stdout=subprocess.PIPE)
    assert run.returncode == 0 and run.stdout.strip() == printed


def test_change_another_projector_takes_three_lines(world, tmp_path, monkeypatch):
    other = changed(
        llava,
        3,
        (
            '        self.add_module("linear_1"',
            '        if kind == "norm_linear":\n'
            '            self.add_module("norm", nn.LayerNorm(width_in))\n'
            '        self.add_module("linear_1"',
        ),
        ('r"linear|mlp', 'r"linear|norm_linear|mlp'),
    )
    monkeypatch.setattr(train, "llava", other)
    monkeypatch.setattr(evaluate, "llava", other)
    monkeypatch.setattr(build, "llava", other)
    build.build(*parts(tmp_path), tmp_path / "llava", "norm_linear")
    assert run(world, tmp_path / "a", model_name_or_path=tmp_path / "llava", max_steps=2)[0] == 0
    model, saved = other.from_pretrained(tmp_path / "a/final"), weights_of(tmp_path / "a")
    norm = model.multi_modal_projector.norm
    assert torch.equal(norm.weight, saved["multi_modal_projector.norm.weight"])
    assert (norm.weight != 1).any() and model.config.architectures == ["LlavaWith_norm_linear"]


def test_change_the_towers_last_layer_alone_trains_by_one_line(world, tmp_path, monkeypatch):
    other = changed(
        train,
        1,
        ('"full": (["vision_tower"', '"full": (["vision_tower.vision_model.encoder.layers.1"'),
    )
    monkeypatch.setattr("processes.train", other)
    assert run(world, tmp_path / "a", max_steps=2)[0] == 0
    before, after = tensors_of(world / "llava"), weights_of(tmp_path / "a")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in moved if name.startswith("vision_tower")}
    assert tower and all(".layers.1." in name for name in tower)
    assert {name.split(".")[0] for name in moved} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


def test_the_towers_last_layer_trains_and_is_kept_beside_adapters(world, tmp_path, monkeypatch):
    layer = "vision_tower.vision_model.encoder.layers.1"
    whole = '"use_lora": (["multi_modal_projector"'
    other = changed(train, 1, (whole, f'{whole}, "{layer}"'))
    monkeypatch.setattr("processes.train", other)
    status, _, error = run(world, tmp_path / "a", **LORA, max_steps=2)
    assert status == 0, error
    before = evaluate.open_model(world / "llava").state_dict()
    after = evaluate.open_model(world / "llava", tmp_path / "a/final").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = tuple(f"{part}." for part in ("multi_modal_projector", layer))
    assert moved and all(name.startswith(parts) for name in moved)
    assert {part for part in parts for name in moved if name.startswith(part)} == set(parts)


LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def test_change_llama_3s_template_takes_six_lines_to_name(tmp_path):
    tokenizer = byte_level()
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = marks[0], marks[-1]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A", special_tokens=[(marks[0], tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = LLAMA_3
    turns = [("What is it?", "A frog."), ("On what?", "A leaf.")]
    messages = [{"role": "system", "content": "Answer the questions."}, *messages_of(turns)]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert expected.count(tokenizer.bos_token_id) == 1
    ids, labels = ChatText(tokenizer).ids_and_labels(messages)
    assert ids == expected
    taught = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(taught) == "A frog.<|eot_id|>A leaf.<|eot_id|>"

    named = """TEMPLATES = {
    "llama_3": (
        "Answer the questions.",
        "{%- for turn in [{'role': 'system', 'content': system}] + turns -%}"
        "{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' }}"
        "{{ turn.content + '<|eot_id|>' }}{%- endfor -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"),
"""
    other = changed(data, 6, ("\nTEMPLATES = {\n", "\n" + named))
    text = other.ChatText(tokenizer, "llama_3")
    assert text.ids_and_labels(messages[1:]) == (ids, labels) and "llama_3" in other.VERSIONS


def test_change_a_lora_target_is_a_flag(world, tmp_path):
    target = r"language_model\..*\.(q_proj|up_proj)"
    assert run(world, tmp_path / "a", **LORA, lora_target_modules=target, max_steps=1)[0] == 0
    adapter = load_file(tmp_path / "a/final/adapter_model.safetensors")
    found = {name.split(".")[-3] for name in adapter if "lora_A" in name}
    assert found == {"q_proj", "up_proj"}


def siglip(path):
    """A folder of a small SigLIP with its text tower: no CLS, 42 pixels, so 9 tokens a picture."""
    vision = {k: v for k, v in VISION.items() if k != "initializer_range"} | {"image_size": 42}
    text = {k: v for k, v in SMALL.items() if k != "initializer_range"} | {"vocab_size": 99}
    config = SiglipConfig(vision_config=vision, text_config=text)
    SiglipModel(config).save_pretrained(path)
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(means))
    return path


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_change_siglip_is_a_flag_and_equals_transformers(world, tmp_path, aspect_ratio):
    vision, folder = siglip(tmp_path / "siglip"), tmp_path / "llava"
    build.build(vision, parts(tmp_path)[1], folder, aspect_ratio=aspect_ratio)
    trained = tmp_path / "a/final"
    assert run(world, tmp_path / "a", model_name_or_path=folder, max_steps=2)[0] == 0
    given = {k: v for k, v in load_file(vision / "model.safetensors").items() if "vision" in k}
    saved = {k.removeprefix("vision_tower."): v for k, v in tensors_of(trained).items()}
    assert given.keys() == {k for k in saved if k.startswith("vision_model.")}
    unused = [k for k in given if re.search(r"layers\.2|post_layer|head", k)]
    assert len(unused) > 20 and all(torch.equal(saved[k], given[k]) for k in unused)

    reference, model = theirs(trained), llava.from_pretrained(trained).eval()
    rows = open_dataset(world / "rows.json", world / "images", trained)
    batch = data.Collator(rows.image_token_id, model.tokens_per_picture)([rows[0], rows[2]])
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    assert rows.tokens_per_picture == model.tokens_per_picture == 9 and pixels.shape[2:] == (42, 42)
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=model.embed(ids, pixels)).logits
        expected = reference(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    image = Image.open(world / "images/0.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    theirs_says = AutoProcessor.from_pretrained(trained).apply_chat_template(
        [{"role": "user", "content": content}], **options
    )
    assert (theirs_says["input_ids"] == rows.image_token_id).sum() == 9
    ours = PictureTransform.from_pretrained(trained)(image)
    np.testing.assert_allclose(ours, theirs_says["pixel_values"][0].numpy(), atol=1e-5)


def test_every_run_sh_line_starts_what_it_says(shell, tmp_path):
    """Among the stand-ins; the flags that train.py is given are those that it knows."""
    start, calls = shell
    text = (HERE / "README.md").read_text() + (HERE / "cluster.md").read_text()
    text = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^    ((?:[A-Z_]+=.*)?\b(?:bash|sbatch) .*run\.sh.*)$", text, re.M)
    assert len(lines) >= 7
    for line in lines:
        (tmp_path / "calls").unlink(missing_ok=True)
        command = re.sub(r"(_DATA|HOSTFILE)=\S+", rf"\1={ROWS}", line.split("   ")[0])  # then words
        command = re.sub(r"_IMAGES=\S+", f"_IMAGES={PICTURES}", command)
        many = "sbatch" in command or "HOSTFILE" in command
        (tmp_path / "line.sh").write_text(f"cd {HERE}\n{command}")
        assert start(tmp_path / "line.sh", **STAGES if many else {}).wait() == 0, command
        found = [launched(words)[1].output_dir for words in calls("deepspeed")]
        nodes = int((re.findall(r"--nodes=(\d+)", command) or [1])[0])
        assert len(found) == nodes * len(set(found)) and bool(found) == many, command
        assert len(set(found)) == many + ("PRETRAIN_DATA" in command) * many, command


def test_the_four_core_files_are_as_short_as_promised():
    claim = re.search(r"([\d,]+) lines without the blank ones: (.*)\.", README)
    files = [line for name in re.findall(r"`(\w+\.py)`", claim[2]) for line in open(HERE / name)]
    assert claim[2].count("`") == 8  # the four
    assert sum(not line.isspace() for line in files) <= int(claim[1].replace(",", ""))


def readme_commands():
    """Those of README.md and bench.md, and cluster.md's recipes; test_cluster.py has its others."""
    recipes = (HERE / "cluster.md").read_text().split("\n## ")[1]
    assert recipes.startswith("Recipes")
    text = README + recipes + (HERE / "bench.md").read_text()
    text = text.replace("\\\n", " ")
    return [
        line.split(None, 1) for line in re.findall(r"^    ((?:python|deepspeed) .*)$", text, re.M)
    ]


def test_every_command_of_the_readme_runs(world, tmp_path, monkeypatch, capsys):
    """On small stand-ins that bear the names of the large models; what `deepspeed` starts runs as one process here."""
    monkeypatch.chdir(tmp_path)
    vision, text = parts(tmp_path / "parts")
    for source, name in (
        (vision, "openai/clip-vit-large-patch14-336"),
        (text, "Qwen/Qwen1.5-4B-Chat"),
        (text, "lmsys/vicuna-7b-v1.5"),
        (world / "llava", "llava-hf/llava-1.5-7b-hf"),
    ):
        shutil.copytree(source, tmp_path / name)
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.make_archive(str(tmp_path / "images"), "zip", world / "images")
    shutil.copy(world / "images" / "1.png", tmp_path / "photo.jpg")
    for name, source in (
        ("chat", "captions"),
        ("blip_laion_cc_sbu_558k", "captions"),
        ("train", "rows"),
        ("llava_v1_5_mix665k", "rows"),
        ("validation", "rows"),
    ):
        shutil.copy(world / f"{source}.json", tmp_path / f"{name}.json")
    write_vqa(tmp_path, "train2014", ASKED)
    for name in ("OpenEnded_mscoco_train2014_questions", "mscoco_train2014_annotations"):
        (tmp_path / f"train2014_{name.split('_')[-1]}.json").rename(tmp_path / f"{name}.json")
    ran = []
    for program, line in readme_commands():
        file, *argv = shlex.split(line)
        if program == "deepspeed":
            at = argv.index("--deepspeed")
            assert (HERE / argv[at + 1]).is_file()
            del argv[at : at + 2]
        if file == "train.py":
            argv += [
                "--max_steps",
                "1",
                "--dataloader_num_workers",
                "0",
                "--max_new_tokens",
                "2",
                "--bf16",
                "False",
            ]
        if file in ("chat.py", "evaluate.py"):
            argv += ["--max_new_tokens", "2"]
        if file == "okvqa.py":
            argv += ["--val_fraction", "0.3"]  # of 10 pictures
        if file == "bench.py":  # what it was asked for, less of it, and the last flag counts
            monkeypatch.setattr(bench, "run", in_this_process)
            argv += "--shape tiny --cases projector --mix caption --micro_batch 1 --peers".split()
            argv += "--steps 1 --rounds 1 --product 64 --workers 0".split()
        capsys.readouterr()
        script = importlib.import_module(file.removesuffix(".py"))
        assert script.main(argv) == 0, (line, capsys.readouterr().err)
        if "--index" in argv and "out/tiny" in argv:  # its output stands below it
            printed = capsys.readouterr().out.split()
            assert " ".join(printed) in " ".join((HERE / "README.md").read_text().split())
        ran.append(file)
    assert Counter(ran)["train.py"] >= 3 and set(ran) == {
        "train.py",
        "build.py",
        "toy.py",
        "okvqa.py",
        "chat.py",
        "check.py",
        "merge.py",
        "bench.py",
        "evaluate.py",
        "report.py",
    }


def snippet(before):
    """The indented lines of the README that follow a sentence."""
    lines = README[README.index(before) + len(before) :].lstrip("\n").splitlines()
    return "\n".join(line[4:] for line in itertools.takewhile(lambda x: x[:4] == "    ", lines))


def run_snippet(folder, before, **names):
    code = snippet(before)
    assert code
    exec("import csv, json, random\nfrom pathlib import Path\n" + code, names)
    return [data.parse_record(json.loads(json.dumps(r))) for r in names["rows"]], names["rows"]


def test_the_readmes_snippets_make_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    items = [
        {
            "image": noise(9, 9),
            "question": "What?",
            "choices": ["x", "A frog."],
            "correct_choice_idx": 1,
        }
    ]
    hub = types.SimpleNamespace(load_dataset=lambda name, split: items)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    write(tmp_path / "train.csv", 'image,question,answer\n0.png,What?,"A frog."\n')
    wanted = [
        {"role": "user", "content": f"{IMAGE}\nWhat?"},
        {"role": "assistant", "content": "A frog."},
    ]
    for before in (
        "or out of Hugging Face `datasets` (install it, make `images`):",
        "the columns `image`, `question`, `answer`:",
    ):
        parsed, _ = run_snippet(tmp_path, before)
        assert parsed == [(wanted, ["0.png"])]
        assert data.decode_picture(Path("images/0.png").read_bytes()).size == (9, 9)
    for i in range(40):
        write(tmp_path / f"images/{i}.jpg", b"")
        write(tmp_path / f"images/{i}.txt", f"a frog {i}\n")
    parsed, rows = run_snippet(tmp_path, "has its caption in `a.txt`:")
    assert sorted(m[1]["content"] for m, _ in parsed) == sorted(f"a frog {i}" for i in range(40))
    run_snippet(tmp_path, "(split by picture where one has many rows):", rows=rows)
    train, held_out = (json.loads(Path(f"{n}.json").read_text()) for n in ("train", "validation"))
    assert len(held_out) == 2 and len(train) == 38
    assert sorted(r["image"] for r in train + held_out) == sorted(r["image"] for r in rows)


def test_the_readme_shows_both_forms_of_a_row(tmp_path):
    forms = README[
        README.index('    {"id": "7", "image"') : README.index("The first is LLaVA's and")
    ]
    decoder, found = json.JSONDecoder(), []
    for start in re.finditer(r'^    \{"(id|images)"', forms, re.MULTILINE):
        found.append(data.parse_record(decoder.raw_decode(forms[start.start() + 4 :])[0]))
    assert len(found) == 2 and found[0] == found[1]
