"""LoRA, 4 bits and PEFT's files, beside PEFT and plain torch."""

import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BLOCKS,
    HERE,
    LORA,
    OWN,
    PROJECTOR,
    adapt,
    built,
    losses_of,
    run,
    saved,
    tiny_llava,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lora
import model as llava


def batch():
    g = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 98, (2, 12), generator=g)
    input_ids[:, 1:5] = 99
    return {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=g)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits.float()


def quantize(model):
    weights = dict(model.named_parameters())
    return lora.quantize(model, BLOCKS, weights, compute_dtype=torch.float32)


def three_steps(model, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(3):
        loss = model.train()(**batch(), labels=batch()["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def close(a, b, tolerance):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_from_the_base_bit_for_bit(dtype):
    model = tiny_llava().to(dtype)
    before = model.eval()(input_ids=batch()["input_ids"][:, 5:]).logits
    names = lora.inject(model, BLOCKS, r=4, alpha=8, dropout=0.5)
    after = model.train()(input_ids=batch()["input_ids"][:, 5:]).logits
    assert torch.equal(before, after) and len(names) == 14
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora.lora_{m}" for n in names for m in "AB"}
    assert all(model.get_parameter(n).dtype == dtype for n in trains)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_gradients_and_files_equal_pefts(use_rslora, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_llava(), tiny_llava()
    lora.inject(ours, BLOCKS, r=4, alpha=8, use_rslora=use_rslora)
    ours.get_submodule(PROJECTOR).requires_grad_(True)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora, modules_to_save=[PROJECTOR],
                             target_modules=BLOCKS + "_proj")  # fmt: skip
    theirs = peft.get_peft_model(theirs, config)
    in_peft = {}  # our parameter name > PEFT's parameter
    for name, p in theirs.base_model.model.named_parameters():
        name = re.sub(r"\.(lora_[AB])\.default\.weight", r".lora.\1", name)
        in_peft[name.replace("modules_to_save.default.", "")] = p
    trains = [n for n, p in ours.named_parameters() if p.requires_grad]
    for name in trains:
        in_peft[name].data.copy_(ours.get_parameter(name).data)
    assert abs(three_steps(ours) - three_steps(theirs)) < 1e-6
    for name in trains:
        close(ours.get_parameter(name).grad, in_peft[name].grad, 1e-6)
    close(logits(ours), logits(theirs), 1e-5)
    saved(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for key in a:
        close(a[key], b[key], 1e-6)


def test_scale_is_alpha_over_r_or_over_its_root():
    linear = nn.Linear(8, 8)
    assert lora.LoRA(linear, 32, 8, 0.0, False).scale == 0.25
    assert lora.LoRA(linear, 16, 8, 0.0, True).scale == 2.0


def test_A_starts_as_pefts_and_B_at_zero():
    adapter = lora.LoRA(nn.Linear(256, 32), 64, 8, 0.0, False)
    assert 0.99 / 16 < adapter.lora_A.abs().max() <= 1 / 16  # uniform up to 1 / sqrt(in)
    assert not adapter.lora_B.any()


def test_dropout_acts_in_training_only():
    model = nn.Sequential(nn.Linear(64, 64))
    lora.inject(model, "0", r=4, alpha=8, dropout=0.5)
    nn.init.normal_(model[0].lora.lora_B)
    x = torch.randn(2, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_zeros_a_share_of_each_layers_input_by_chance_and_changes_no_expectation():
    x, p = torch.ones(500, 1001, dtype=torch.float64), 0.05
    first, second = (lora.put_zeros(x, lora.draw_zeros(x, p)) for _ in range(2))
    assert set(first.unique().tolist()) == {0, 1} and x.all()
    for dropped in (first, second):  # 500,500 numbers: 1e-3 is more than three deviations
        assert abs(1 - dropped.mean().item() - p) < 1e-3
    assert abs((first + second == 0).double().mean().item() - p**2) < 4e-4  # independent
    neighbours = ((first[:, 1:] == 0) & (first[:, :-1] == 0)).double().mean().item()
    assert abs(neighbours - p**2) < 4e-4
    model = nn.Sequential(nn.Linear(1001, 3, dtype=torch.float64))
    lora.inject(model, "0", r=2, alpha=2, dropout=p)
    nn.init.normal_(model[0].lora.lora_B)
    noisy = torch.stack([model.train()(x).mean(0) for _ in range(20)]).mean(0)
    torch.testing.assert_close(noisy, model.eval()(x).mean(0), rtol=0, atol=2e-2)


def test_gradients_under_dropout_are_those_of_its_output():
    model = nn.Sequential(nn.Linear(30, 3, dtype=torch.float64)).train()
    lora.inject(model, "0", r=2, alpha=2, dropout=0.3)
    nn.init.normal_(model[0].lora.lora_B)
    x = torch.randn(2, 5, 30, dtype=torch.float64, requires_grad=True)

    def output(x, *weights):
        torch.manual_seed(0)
        return model(x)

    assert torch.autograd.gradcheck(output, (x, model[0].lora.lora_A, model[0].lora.lora_B))


def test_any_way_of_calling_an_adapted_layer_gives_the_gradients_of_plain_torch():
    """Layers that read one tensor: checkpointed apart, by keyword, twice, with no row, frozen."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)

        def forward(self, x, apart):
            a, b = [functools.partial(checkpoint, layer, use_reentrant=False) if apart else layer
                    for layer in (self.a, self.b)]  # fmt: skip
            return a(x) + b(x) * self.a(input=x)

    torch.manual_seed(0)
    model, x = Pair().double(), torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    lora.inject(model, "a|b", r=2, alpha=4)
    for p in model.parameters():
        nn.init.normal_(p)
    weights = [
        layer.weight + 2 * layer.lora.lora_B @ layer.lora.lora_A for layer in (model.a, model.b)
    ]
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    a, b = F.linear(x, weights[0], model.a.bias), F.linear(x, weights[1])
    expected = torch.autograd.grad((a + b * a).square().sum(), trained)
    for apart in (False, True):
        found = torch.autograd.grad(model(x, apart).square().sum(), trained)
        torch.testing.assert_close(found, expected)
    assert model(x[:0], False).shape == (0, 3, 6)
    for layer in (model.a, model.b):  # recomputed, it falls on the same numbers
        layer.lora.dropout.p = 0.5
    torch.manual_seed(1)
    (once,) = torch.autograd.grad(model(x, False).sum(), [model.a.lora.lora_A])
    torch.manual_seed(1)
    (apart,) = torch.autograd.grad(model(x, True).sum(), [model.a.lora.lora_A])
    torch.testing.assert_close(once, apart)


def test_autocast_takes_an_adapted_layer_as_it_takes_the_layer():
    model = nn.Sequential(nn.Linear(8, 6))
    lora.inject(model, "0", r=2, alpha=4, dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 8, requires_grad=True))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and model[0].lora.lora_B.grad.dtype == torch.float32


def test_fp32_adapters_over_a_bf16_base():
    model = tiny_llava().bfloat16()
    lora.inject(model, BLOCKS, r=4, alpha=8, dtype=torch.float32)
    out = model(input_ids=batch()["input_ids"][:, 5:]).logits
    out.float().sum().backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert out.dtype == torch.bfloat16 and {p.grad.dtype for p in adapters} == {torch.float32}


@pytest.mark.parametrize("nf4", [False, True])
def test_gradients_under_checkpointing_are_the_same(nf4):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    if nf4:
        weights = dict(block.named_parameters())
        lora.quantize(block, r"\d", weights, compute_dtype=torch.float32)
    lora.inject(block, r"\d", r=4, alpha=8)
    x = torch.randn(3, 64)
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        block.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters() if p.requires_grad])
    assert len(grads[0]) == 4 and all(map(torch.equal, *grads))
    assert block[0].lora.lora_B.grad.abs().sum() > 0


def test_no_adapter_under_the_vision_tower_nor_on_head_or_projector():
    names = lora.inject(tiny_llava(), BLOCKS, r=2, alpha=4)
    assert lora.fold(names).splitlines() == [
        f"2 x model.language_model.layers.*.{leaf}"
        for leaf in "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj".split()
    ]


@pytest.mark.parametrize(
    "layers, r, adapters, projector, text",
    [
        (BLOCKS, 128, 319_815_680, 20_979_712, {"hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}),
        (BLOCKS + r"\.(q|k|v|o)_proj", 32, 26_214_400, 9_180_160, {"hidden_size": 2560,
         "intermediate_size": 6912, "num_hidden_layers": 40, "num_attention_heads": 20,
         "num_key_value_heads": 20}),
    ],
)  # fmt: skip
def test_counts_with_the_real_shapes(layers, r, adapters, projector, text):
    vision = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    lora.inject(model, layers, r=r, alpha=2 * r)
    assert lora.count(p for p in model.parameters() if p.requires_grad) == adapters
    assert lora.count(model.get_submodule(PROJECTOR).parameters()) == projector


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_nf4_layer_is_the_linear_layer_of_its_dequantized_weight(dtype, bias, storage):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64, dtype=dtype), torch.randn(96) if bias else None
    layer = lora.nf4_linear(weight, bias, compute_dtype=dtype, quant_storage=storage)
    W = lora.dequantized(layer)
    assert W.dtype == dtype and 0.01 < (W - weight).norm() / weight.norm() < 0.15
    x = torch.randn(5, 64, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = layer(a), F.linear(b, W, layer.bias)
    (ya.square().sum() + yb.square().sum()).backward()
    assert torch.equal(ya, yb) and torch.equal(a.grad, b.grad)
    assert bias is None or torch.equal(layer.bias, bias.to(dtype))
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.weight.quant_state.nested  # double quantization
    assert lora.true_shape(layer.weight) == (96, 64) and layer.weight.nbytes == 96 * 64 // 2


def test_only_the_decoders_blocks_are_quantized_and_counts_stay_true():
    model = tiny_llava()
    before = lora.count(model.parameters())
    names = quantize(model)
    quantized = {n for n, p in model.named_parameters() if lora.is_nf4(p)}
    assert quantized == {f"{n}.weight" for n in names} and len(names) == 14
    assert lora.count(model.parameters()) == before > sum(p.numel() for p in model.parameters())
    start = logits(model)
    lora.inject(model, BLOCKS, r=4, alpha=8)
    assert torch.equal(logits(model), start)
    losses = [three_steps(model) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]


def test_an_evaluation_leaves_an_nf4_layer_as_it_was(monkeypatch):
    import bitsandbytes as bnb

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)  # on whatever CPU this runs
    layer = lora.nf4_linear(torch.randn(64, 64), compute_dtype=torch.float32)
    before = lora.dequantized(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    assert torch.equal(lora.dequantized(layer), before)
    close(x.grad, before.sum(0).expand(2, -1), 1e-5)


LOAD = """
import re, sys, threading, time, torch, lora
from safetensors.torch import load_file
from torch import nn

def anonymous_bytes():  # not the pages of the mapped file, which the system may drop at any time
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(1024, 1024, False, dtype=torch.bfloat16) for _ in range(64)])
lora.nf4_linear(torch.randn(64, 64))  # loads the libraries
tensors = load_file(sys.argv[1])
start = peak = anonymous_bytes()
threading.Thread(target=watch, daemon=True).start()
if sys.argv[2] == "4":
    lora.quantize(model, r"\\d+", tensors)
else:
    model.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
print((peak - start) >> 20)
"""


def test_a_model_in_4_bits_leaves_no_file_mapped(tmp_path):
    def mapped():
        gc.collect()
        return str(folder) in Path("/proc/self/maps").read_text()

    folder = built(tmp_path, dtype=torch.bfloat16)  # Qwen2's, with biases
    model = llava.open_model(folder, None, 16, torch.bfloat16, "cpu")
    assert mapped()
    del model
    model = llava.open_model(folder, None, 4, torch.bfloat16, "cpu")
    assert not mapped() and model.aside


def test_loading_in_4_bits_never_holds_the_16_bit_model(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": torch.randn(1024, 1024).bfloat16() for i in range(64)}, file)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    peak = {}
    for bits in ("16", "4"):
        command = [sys.executable, "-c", LOAD, str(file), bits]
        peak[bits] = int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    print(f"128 MiB of bf16 weights: peak {peak['16']} MiB as they are, {peak['4']} MiB in 4 bits")
    assert peak["16"] > 120 and peak["4"] < 64  # 34 packed, and 18 of scratch for one weight


def test_peft_loads_our_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    adapt(model, use_rslora=True)
    saved(model, tmp_path / "adapter", tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(tiny_llava(), tmp_path / "adapter")
    close(logits(theirs), logits(model), 1e-5)
    assert (logits(model) - logits(tiny_llava())).abs().max() > 1e-2
    adapted = {n for n, _ in theirs.named_modules() if n.endswith("lora_A.default")}
    assert len(adapted) == 14 and not any("vision" in n for n in adapted)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], BLOCKS + "_proj"])
def test_we_load_pefts_adapter(targets, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, init_lora_weights=False,
                             target_modules=targets, modules_to_save=[PROJECTOR[6:]])  # fmt: skip
    theirs = peft.get_peft_model(tiny_llava(), config)
    for p in theirs.get_submodule(f"base_model.model.{PROJECTOR}").parameters():
        p.data += 0.1
    theirs.save_pretrained(tmp_path)
    model = tiny_llava()
    loaded = lora.load(model, tmp_path, rename=llava.transformers_name)
    close(logits(model), logits(theirs), 1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == loaded.keys()
    assert model.model.language_model.layers[0].self_attn.q_proj.lora.dropout.p == 0.1


def test_we_load_an_adapter_with_the_names_of_older_transformers(tmp_path):
    model = tiny_llava()
    adapt(model)
    tensors = load_file(saved(model, tmp_path) / lora.WEIGHTS)
    older = [("model.language_model.", "language_model.model."), (PROJECTOR, PROJECTOR[6:])]
    for new, old in older:
        tensors = {k.replace(f"base_model.model.{new}", f"base_model.model.{old}"): t
                   for k, t in tensors.items()}  # fmt: skip
    save_file(tensors, tmp_path / lora.WEIGHTS)
    other = tiny_llava()
    lora.load(other, tmp_path, rename=llava.transformers_name)
    assert torch.equal(logits(other), logits(model))


def test_saved_and_loaded_is_the_same_and_holds_the_fp32_masters(tmp_path):
    model = tiny_llava().bfloat16()
    adapt(model)
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    master = {n: p.data.float() * (1 + 2**-12) for n, p in trains.items()}
    saved(model, tmp_path, tensors=master)
    other = tiny_llava().bfloat16()
    loaded = lora.load(other, tmp_path)
    assert loaded.keys() == master.keys() and all(torch.equal(loaded[n], master[n]) for n in master)
    assert torch.equal(logits(other), logits(model))
    assert {p.name for p in tmp_path.iterdir()} == {lora.CONFIG, lora.WEIGHTS}
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # safetensors alone writes 600


def test_what_trains_and_would_not_be_saved_is_an_error(tmp_path):
    model = tiny_llava()
    adapt(model)
    with pytest.raises(AssertionError, match="projector.linear_1.weight trains but is not saved"):
        lora.save(model, tmp_path)
    stubs = {name: torch.empty(0) for name, _ in model.named_parameters()}  # as under ZeRO-3
    with pytest.raises(AssertionError, match="is sharded"):
        saved(model, tmp_path, tensors=stubs)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_survives_dtype_shards_and_spelling(tmp_path):
    base = tiny_llava().bfloat16()
    base.save_pretrained(tmp_path / "a")
    base.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    old_llava_folder(tmp_path / "a", tmp_path / "c")
    base.float().save_pretrained(tmp_path / "d")
    folders = [lora.read_folder(tmp_path / name) for name in "abcd"]
    prints = {lora.fingerprint(tensors, llava.transformers_name) for tensors in folders}
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert prints == {lora.fingerprint(dict(base.named_parameters()))}
    base.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    assert lora.fingerprint(dict(base.named_parameters())) not in prints


def old_llava_folder(folder, out):
    """The folder with the tower's keys spelled as llava-hf's are, and a buffer that they carry."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    old = ("vision_tower.", "vision_tower.vision_model.")
    tensors = {name.replace(*old): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


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
    before = lora.fingerprint(lora.read_folder(base))
    lora.merge(base, adapter, out, llava.transformers_name)
    assert {p.name for p in base.iterdir()} == {p.name for p in out.iterdir()}
    merged = LlavaForConditionalGeneration.from_pretrained(out)
    close(logits(merged), logits(model), 1e-5)
    assert lora.fingerprint(lora.read_folder(base)) == before
    assert not list(tmp_path.glob("*.part"))


def test_merge_keeps_the_dtype(tmp_path):
    model = tiny_llava().bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapt(model)
    saved(model, tmp_path / "adapter", tmp_path / "base")
    adapter_tensors = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    assert {t.dtype for t in adapter_tensors.values()} == {torch.float32}
    lora.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", llava.transformers_name)
    (tmp_path / "any file").touch()
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (
        tmp_path / "any file"
    ).stat().st_mode
    a, b = (lora.read_folder(tmp_path / f) for f in ("base", "out"))
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.bfloat16}
    changed = {llava.transformers_name(k) for k in a if not torch.equal(a[k], b[k])}
    assert len(changed) == 14 + 4  # blocks, projector
    assert all(re.match(BLOCKS, k) or k.startswith(PROJECTOR) for k in changed)


def test_merging_twice_or_into_another_base_is_refused(tmp_path):
    base, other, adapter, out = (tmp_path / n for n in ("base", "other", "adapter", "out"))
    tiny_llava().save_pretrained(base)
    tiny_llava(seed=1).save_pretrained(other)
    model = tiny_llava()
    adapt(model)
    saved(model, adapter, base)
    lora.merge(base, adapter, out, llava.transformers_name)
    for wrong in (out, other):
        with pytest.raises(ValueError, match="trained on other weights"):
            lora.merge(wrong, adapter, tmp_path / "again", llava.transformers_name)
        with pytest.raises(ValueError, match="trained on other weights"):
            lora.load(tiny_llava(), adapter, wrong, llava.transformers_name)
    lora.load(tiny_llava(), adapter, base, llava.transformers_name)
    assert not (tmp_path / "again").exists()


def test_a_qlora_merges_exactly_into_the_dequantized_base_and_says_how_far_it_is(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llava().save_pretrained(base)
    model = tiny_llava()
    quantize(model)
    lora.inject(model, r".*language_model.*\.(q|v)_proj", r=4, alpha=8)  # 4 of the 14 in 4 bits
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    saved(model, adapter, base, modules_to_save=[])
    assert json.loads((adapter / "adapter_config.json").read_text())["bits"] == 4
    for dequantize, tolerance in ((True, 1e-5), (False, 1e9)):
        out = tmp_path / f"out{dequantize}"
        lora.merge(base, adapter, out, llava.transformers_name, dequantize)
        merged = LlavaForConditionalGeneration.from_pretrained(out)
        close(logits(merged), logits(model), tolerance)
    assert (logits(merged) - logits(model)).abs().max() > 1e-3
    lines = [line for line in capsys.readouterr().out.splitlines() if "off by" in line]
    assert len(lines) == 2 * 14
    as_it_is, by_dequantizing = map(float, re.findall(r"by (\S+) ", lines[0]))
    assert 0.01 < as_it_is < 0.2 and by_dequantizing < 1e-6
    reloaded = tiny_llava()
    quantize(reloaded)
    lora.load(reloaded, adapter, base, llava.transformers_name)
    assert torch.equal(logits(reloaded), logits(model))


def test_inject_refuses_r_of_0_and_patterns_without_a_match():
    model = tiny_llava()
    with pytest.raises(ValueError, match="r is 0"):
        lora.inject(model, BLOCKS, r=0, alpha=8)
    with pytest.raises(ValueError, match="dropout 1: "):
        lora.inject(model, BLOCKS, r=4, alpha=8, dropout=1)
    with pytest.raises(ValueError, match="'q_proj' matches no linear layer's whole path .one is"):
        lora.inject(model, "q_proj", r=4, alpha=8)
    with pytest.raises(ValueError, match="not a regular expression"):
        lora.inject(model, "*q_proj", r=4, alpha=8)
    with pytest.raises(ValueError, match="matches no linear layer"):
        lora.inject(nn.MultiheadAttention(8, 2), "out_proj", r=4, alpha=8)
    assert all(p.requires_grad for p in model.parameters())


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"


def edit_tensors(adapter, edit):
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def edit_config(adapter, **entries):
    config = json.loads((adapter / "adapter_config.json").read_text()) | entries
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def drop_layer(tensors):
    del tensors[Q.format("A")], tensors[Q.format("B")]


DAMAGES = {
    "q_proj.lora_A.weight is missing": lambda a: edit_tensors(a, lambda t: t.pop(Q.format("A"))) ,
    "q_proj.lora_B.weight is missing": lambda a: edit_tensors(a, lambda t: t.pop(Q.format("B"))),
    "q_proj.lora_[AB].weight is missing": lambda a: edit_tensors(a, drop_layer),
    r"linear_1.bias is missing": lambda a: edit_tensors(
        a, lambda t: t.pop(f"base_model.model.{PROJECTOR}.linear_1.bias")),
    "layers.7.x.lora_A.weight has no place in this base": lambda a: edit_tensors(
        a, lambda t: t.update({Q.format("A").replace("0.self_attn.q_proj", "7.x"): torch.ones(4)})),
    r"q_proj.lora_A.weight is \(4, 65\), but \(4, 64\) for this base": lambda a: edit_tensors(
        a, lambda t: t.update({Q.format("A"): torch.zeros(4, 65)})),
    "r cannot be 4.0": lambda a: edit_config(a, r=4.0),
    "lora_alpha cannot be nan": lambda a: edit_config(a, lora_alpha=float("nan")),
    "lora_dropout cannot be 5": lambda a: edit_config(a, lora_dropout=5),
    "use_rslora cannot be 'no'": lambda a: edit_config(a, use_rslora="no"),
    "target_modules cannot be 5": lambda a: edit_config(a, target_modules=5),
    "modules_to_save cannot be .*list": lambda a: edit_config(a, modules_to_save=[["list"]]),
    "quantized cannot be 5": lambda a: edit_config(a, quantized=5),
    "alpha_pattern .* is not supported": lambda a: edit_config(a, alpha_pattern={"q_proj": 2}),
    "init_lora_weights pissa is not supported": lambda a: edit_config(a, init_lora_weights="pissa"),
    "peft_type IA3 is not supported": lambda a: edit_config(a, peft_type="IA3"),
    "is not JSON": lambda a: (a / "adapter_config.json").write_text("{"),
    "is damaged": lambda a: (a / "adapter_model.safetensors").write_bytes(b"123"),
    "not found": lambda a: (a / "adapter_config.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line_and_nothing_is_written(message, tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    adapt(model)
    adapter = saved(model, tmp_path / "adapter", tmp_path / "base")
    DAMAGES[message](adapter)
    for use in (
        lambda: lora.load(tiny_llava(), adapter, rename=llava.transformers_name),
        lambda: lora.merge(tmp_path / "base", adapter, tmp_path / "out", llava.transformers_name),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_a_larger_model_names_the_first_key_and_both_shapes(tmp_path):
    large = tiny_llava(hidden_size=128, num_hidden_layers=3)
    adapt(large)
    saved(large, tmp_path)
    with pytest.raises(ValueError, match=r"layers.0.*is \(.*128.*but \(.*64"):
        lora.load(tiny_llava(), tmp_path)


@pytest.mark.parametrize("others, alone", [("x = 1", True), ("import no_such_package", False)])
def test_merging_beside_a_model_py_of_another_project_needs_none_of_ours(tmp_path, others, alone):
    """What ours cannot import is an error, however."""
    shutil.copy(HERE / "lora.py", tmp_path)
    (tmp_path / "model.py").write_text(others)
    argv = [
        sys.executable,
        "lora.py",
        "merge",
        "--model_name_or_path",
        "a",
        "--adapter",
        "b",
        "--out",
        "c",
    ]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (2 if alone else 1)
    assert ("error: a has no model.safetensors" if alone else "no_such_package") in done.stderr


PASTED = """
import subprocess, sys, torch, lora
assert not {"peft", "transformers", "deepspeed", "bitsandbytes", "model"} & set(sys.modules)
from torch import nn
from pathlib import Path
from safetensors.torch import load_file, save_file

def plain():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)), torch.randn(2, 5, 32)

def causal_lm():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=50,
                         num_attention_heads=4, num_key_value_heads=2)
    return Qwen2ForCausalLM(config), torch.arange(20).view(2, 10)

def forward(model, x):
    y = model(x)
    return getattr(y, "logits", y)

for make, targets, whole in ((plain, r".*\\.linear[12]", "1"), (causal_lm, r".*_proj", "lm_head")):
    model, x = make()
    base, adapter, out = (Path(make.__name__ + end) for end in ("", "-lora", "-merged"))
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    lora.inject(model, targets, r=4, alpha=8)
    model.get_submodule(whole).requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = forward(model.train(), x).square().mean()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    lora.save(model, adapter, base, modules_to_save=[whole])
    loaded = make()[0]
    lora.load(loaded, adapter, base)
    command = [sys.executable, "lora.py", "merge", "--model_name_or_path", str(base)]
    subprocess.run(command + ["--adapter", str(adapter), "--out", str(out)], check=True)
    merged = make()[0]
    merged.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        a, b, c, d = (forward(m.eval(), x) for m in (model, loaded, merged, make()[0]))
    assert torch.equal(a, b) and (a - c).abs().max() < 1e-5 and (a - d).abs().max() > 1e-2
"""


def test_the_file_alone_adapts_models_that_have_nothing_to_do_with_llava(tmp_path):
    shutil.copy(Path(lora.__file__), tmp_path)
    subprocess.run([sys.executable, "-c", PASTED], cwd=tmp_path, check=True)


def test_an_adapter_goes_on_learning_and_4_bits_are_for_lora_only(world, tmp_path):
    assert run(world, tmp_path / "a", **LORA | dict(max_steps=3))[0] == 0
    assert (
        run(
            world,
            tmp_path / "b",
            **LORA | OWN | dict(max_steps=3, adapter=tmp_path / "a" / "final", warmup_ratio=0),
        )[0]
        == 0
    )
    assert losses_of(tmp_path / "b")[0] < losses_of(tmp_path / "a")[0]
    adapter = dict(adapter=tmp_path / "a" / "final")
    shapes = [LORA | adapter | OWN | one for one in (dict(lora_r=128), dict(use_rslora=False))]
    for wrong in (dict(bits=8), dict(bits=4), adapter, *shapes):
        with pytest.raises(SystemExit) as stop:
            run(world, tmp_path / "c", **wrong)
        assert stop.value.code == 2
    status, _, error = run(world, tmp_path / "c", **LORA | dict(lora_target_modules="nothing"))
    assert status == 2 and "nothing" in error and not (tmp_path / "c").exists()


def test_an_adapter_that_trains_more_than_is_kept_is_refused(world, tmp_path):
    assert run(world, tmp_path / "a", **LORA | dict(max_steps=1))[0] == 0
    adapter, more = tmp_path / "a" / "final", "model.language_model.embed_tokens"
    config = json.loads((adapter / lora.CONFIG).read_text())
    config["modules_to_save"].append(more)
    (adapter / lora.CONFIG).write_text(json.dumps(config))
    tensors = load_file(adapter / lora.WEIGHTS)
    source = lora.read_folder(world / "llava")
    tensors[f"{lora.PREFIX}{more}.weight"] = source[llava.EMBEDDINGS].float()
    save_file(tensors, adapter / lora.WEIGHTS)
    status, _, error = run(world, tmp_path / "b", **LORA | OWN | dict(adapter=adapter))
    assert status == 2 and "embed_tokens.weight whole" in error and not (tmp_path / "b").exists()
