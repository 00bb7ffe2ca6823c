"""Merging: what is written is what was trained, or as far from it as is printed.

python -m pytest tests/test_merge.py
"""

import json
import re
import shutil

import peft
import pytest
import torch
from adapted import (
    BLOCKS,
    PROJECTOR,
    adapt,
    close,
    fingerprint_of,
    logits_of,
    old_llava_folder,
    saved,
    tiny_llava,
)
from processes import LORA, metrics_of, run
from safetensors.torch import load_file, save_file
from tiny import edit, open_dataset, theirs
from transformers import LlavaForConditionalGeneration

import data
import lora
import model as llava
from evaluate import open_model
from merge import main, merge


def words_of(base, adapter, out, *more):
    words = ["--model_name_or_path", base, "--adapter", adapter, "--out", out, *more]
    return [str(word) for word in words]


@pytest.fixture
def pair(tmp_path):
    """The folder of a small LLaVA, of an adapter for it, and the model that has it."""
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    adapt(model)
    return tmp_path / "base", saved(model, tmp_path / "adapter", tmp_path / "base"), model


@pytest.mark.parametrize("kind", ["one file", "shards", "old spelling"])
def test_merged_equals_adapted(kind, tmp_path):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    tiny_llava().save_pretrained(base, max_shard_size="100KB" if kind == "shards" else "5GB")
    if kind == "old spelling":
        base = base.rename(tmp_path / "new")
        old_llava_folder(base, base := tmp_path / "old")
    (base / "tokenizer.json").write_text("{}")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    adapt(model)
    saved(model, adapter, base)
    before = fingerprint_of(base)
    merge(base, adapter, out, llava.transformers_name)
    assert {p.name for p in base.iterdir()} == {p.name for p in out.iterdir()}
    merged = LlavaForConditionalGeneration.from_pretrained(out)
    close(logits_of(merged), logits_of(model), 1e-5)
    assert fingerprint_of(base) == before
    assert not list(tmp_path.glob("*.part"))


def test_merge_keeps_the_dtype(tmp_path):
    model = tiny_llava().bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapt(model)
    saved(model, tmp_path / "adapter", tmp_path / "base")
    adapter_tensors = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    assert {t.dtype for t in adapter_tensors.values()} == {torch.float32}
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", llava.transformers_name)
    (tmp_path / "any file").touch()
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (
        tmp_path / "any file"
    ).stat().st_mode
    a, b = (llava.open_weights(tmp_path / f) for f in ("base", "out"))
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.bfloat16}
    changed = {llava.transformers_name(k) for k in a if not torch.equal(a[k], b[k])}
    assert len(changed) == 14 + 4  # blocks, projector
    assert all(re.match(BLOCKS, k) or k.startswith(PROJECTOR) for k in changed)


def test_merging_twice_or_into_another_base_is_refused(pair, tmp_path):
    base, adapter, _ = pair
    other, out = tmp_path / "other", tmp_path / "out"
    tiny_llava(seed=1).save_pretrained(other)
    merge(base, adapter, out, llava.transformers_name)
    for wrong in (out, other):
        with pytest.raises(ValueError, match="trained on other weights"):
            merge(wrong, adapter, tmp_path / "again", llava.transformers_name)
        with pytest.raises(ValueError, match="trained on other weights"):
            lora.load(tiny_llava(), adapter, llava.open_weights(wrong), llava.transformers_name)
    lora.load(tiny_llava(), adapter, llava.open_weights(base), llava.transformers_name)
    assert not (tmp_path / "again").exists()
    tensors, about = lora.read_tensors(adapter / lora.WEIGHTS)
    save_file(tensors, adapter / lora.WEIGHTS)
    edit(adapter / lora.CONFIG, **about)  # as earlier versions wrote it
    with pytest.raises(ValueError, match="trained on other weights"):
        lora.load(tiny_llava(), adapter, llava.open_weights(other), llava.transformers_name)


@pytest.mark.parametrize("beside", ["left over", "damaged", "foreign"])
def test_files_that_the_index_does_not_name_count_nowhere(pair, tmp_path, beside):
    _, adapter, model = pair
    base = tmp_path / "sharded"
    tiny_llava().save_pretrained(base, max_shard_size="100KB")
    rename, before = llava.transformers_name, fingerprint_of(base)
    name = "model-00009-of-00009.safetensors"
    if beside == "left over":  # of another model, in the same folder
        tiny_llava(seed=1).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other/model.safetensors", base / name)
    elif beside == "damaged":
        (base / name).write_bytes(b"123")
    else:
        shutil.copy(adapter / lora.WEIGHTS, base / "model.fp16.safetensors")
    assert fingerprint_of(base) == before
    merge(base, adapter, tmp_path / "out", rename)
    files = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert files == set(index["weight_map"].values()) and len(files) > 2
    lora.load(again := tiny_llava(), adapter, llava.open_weights(base), rename)
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for other in (again, merged):
        close(logits_of(other), logits_of(model), 1e-5)


def test_an_index_beside_a_single_file_is_another_models(pair, tmp_path):
    base, adapter, model = pair
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    merge(base, adapter, tmp_path / "out", llava.transformers_name)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    close(logits_of(merged), logits_of(model), 1e-5)


@pytest.fixture
def qlora(tmp_path):
    """As `pair`, over 4 bits: 4 of the 14 layers in 4 bits have an adapter."""
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    lora.quantize(model, BLOCKS, dict(model.named_parameters()), compute_dtype=torch.float32)
    lora.inject(model, r".*language_model.*\.(q|v)_proj", r=4, alpha=8)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return (
        tmp_path / "base",
        saved(model, tmp_path / "adapter", tmp_path / "base", modules_to_save=[]),
        model,
    )


def test_a_qlora_merges_exactly_into_the_dequantized_base(qlora, tmp_path, capsys):
    base, adapter, model = qlora
    assert len(lora.read_adapter(adapter, model=tiny_llava())[0]["quantized"]) == 14
    for flags, tolerance in ((["--dequantize"], 1e-5), ([], 1e9)):
        out = tmp_path / f"out{len(flags)}"
        assert main(words_of(base, adapter, out, "--verbose", *flags)) == 0
        merged = LlavaForConditionalGeneration.from_pretrained(out)
        close(logits_of(merged), logits_of(model), tolerance)
    assert (logits_of(merged) - logits_of(model)).abs().max() > 1e-3
    lines = capsys.readouterr().out.splitlines()[-17:]  # 14 layers, the summary, both choices
    as_it_is, exact = zip(*(map(float, line.split(": ")[1].split(", ")) for line in lines[:14]))
    assert 0.01 < min(as_it_is) < max(as_it_is) < 0.2 and max(exact) < 1e-6
    said = [
        [float(x) for x in re.findall(r"largest (\S+), mean (\S+)", line)[0]] for line in lines[14:]
    ]
    assert said[0] == said[1] == pytest.approx([max(as_it_is), sum(as_it_is) / 14], rel=0.1)
    assert said[2][0] == max(exact)
    assert lines[15].startswith("  without --dequantize: ") and " with --dequantize: " in lines[16]


def test_a_qlora_is_loaded_over_the_same_4_bits(qlora):
    base, adapter, model = qlora
    again = tiny_llava()
    lora.quantize(again, BLOCKS, dict(again.named_parameters()), compute_dtype=torch.float32)
    lora.load(again, adapter, llava.open_weights(base), llava.transformers_name)
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_command_says_in_one_line_how_far_it_went(pair, tmp_path, capsys):
    base, adapter, _ = pair
    base = tmp_path / "bf16"
    tiny_llava().bfloat16().save_pretrained(base)
    save_file(load_file(adapter / lora.WEIGHTS), adapter / lora.WEIGHTS)  # as PEFT's say no base
    assert main(words_of(base, adapter, tmp_path / "out")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    largest, mean = map(float, re.search(r"14 layers.*largest (\S+), mean (\S+)", line).groups())
    assert 2**-10 < mean <= largest < 2**-8  # bf16 keeps 8 bits


@pytest.mark.parametrize(
    "flags, changes, says",
    [
        (["--dequantize"], {}, "adapter was not trained over 4 bits: leave --dequantize out"),
        ([], {"adapter": "none"}, "none: no adapter_config.json, so no adapter"),
        ([], {"base": "none"}, "none: no such folder here"),
        ([], {"out": "base"}, "base: exists already"),
    ],
)
def test_the_command_refuses_in_one_line(pair, tmp_path, capsys, flags, changes, says):
    names = {"base": "base", "adapter": "adapter", "out": "out"} | changes
    before = sorted(tmp_path.rglob("*"))
    assert main(words_of(*(tmp_path / name for name in names.values()), *flags)) == 2
    out, error = capsys.readouterr()
    assert error.startswith("merge.py: ") and says in error and error.count("\n") == 1 and not out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_in_4_bits_is_refused_by_its_name(pair, tmp_path, capsys):
    base, adapter, _ = pair
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert main(words_of(base, adapter, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "config.json: quantization_config" in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="quantization_config"):
        open_model(base, adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [16, 4])
def test_a_trained_adapter_is_the_same_merged_and_in_peft(world, tmp_path, bits):
    rows, base = world / "rows.json", world / "llava"
    flags = LORA | {
        "bits": bits,
        "save_steps": 2,
        "save_total_limit": -1,
        "validation_data_path": rows,
    }
    status, output, error = run(world, tmp_path / "a", **flags)
    assert status == 0 and "2 x language_model.model.layers.*.self_attn.q_proj" in output, error
    assert (tmp_path / "a/checkpoint-2" / lora.WEIGHTS).is_file()
    adapter, merged = tmp_path / "a/final", tmp_path / "merged"
    template = (adapter / "chat_template.jinja").read_text() + "{# trained #}"
    (adapter / "chat_template.jinja").write_text(template)
    assert main(words_of(base, adapter, merged, *["--dequantize"] * (bits == 4))) == 0
    assert (merged / "chat_template.jinja").read_text() == template
    model = theirs(merged)
    rows = open_dataset(rows, world / "images", base)
    batch = data.Collator(model.config.image_token_id, 4)([rows[i] for i in range(12)])
    inputs = {key: batch[key] for key in ("input_ids", "pixel_values", "labels")}
    with torch.no_grad():
        found = model(**inputs)
        evaluated = [m["eval_loss"] for m in metrics_of(tmp_path / "a") if "eval_loss" in m]
        assert found.loss.item() == pytest.approx(evaluated[-1], abs=1e-5)
        if bits == 16:
            in_peft = peft.PeftModel.from_pretrained(theirs(base), adapter).eval()
            close(in_peft(**inputs).logits, found.logits, 1e-4)
