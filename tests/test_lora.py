"""LoRA and QLoRA beside plain torch: the layer, which layers, 4 bits, our files."""

import functools
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapted import (
    BLOCKS,
    PROJECTOR,
    adapt,
    batch,
    close,
    logits_of,
    old_llava_folder,
    saved,
    tiny_llava,
)
from safetensors.torch import load_file, save_file
from tiny import SMALL, built
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import evaluate
import lora
import model as llava
import report

# --- the layer ---


def three_steps(model, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(3):
        loss = model.train()(**batch(), labels=batch()["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


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


@pytest.mark.parametrize("use_rslora, scale", [(False, 8 / 16), (True, 8 / 4)])
def test_the_layer_adds_the_papers_product(use_rslora, scale):
    linear = nn.Linear(24, 12, dtype=torch.float64)
    expected = linear.weight.clone()
    lora.inject(model := nn.Sequential(linear), "0", r=16, alpha=8, use_rslora=use_rslora)
    nn.init.normal_(linear.lora.lora_B)
    expected += scale * linear.lora.lora_B @ linear.lora.lora_A
    x = torch.randn(5, 3, 24, dtype=torch.float64)
    close(model(x), F.linear(x, expected, linear.bias), 1e-12)


def test_A_starts_as_pefts_and_B_at_zero():
    adapter = lora.LoRA(nn.Linear(256, 32), 64, 8, 0.0, False)
    assert 0.99 / 16 < adapter.lora_A.abs().max() <= 1 / 16  # uniform up to 1 / sqrt(in)
    assert not adapter.lora_B.any()


def test_dropout_acts_on_the_adapters_input_in_training_only():
    model, p = nn.Sequential(nn.Linear(64, 64, dtype=torch.float64)), 0.25
    lora.inject(model, "0", r=4, alpha=8, dropout=p)
    adapter, x = model[0].lora, torch.randn(2, 64, dtype=torch.float64)
    nn.init.normal_(adapter.lora_B)
    plain = F.linear(x, model[0].weight, model[0].bias)
    torch.manual_seed(0)
    noisy = model.train()(x)
    torch.manual_seed(0)
    close(noisy, plain + 2 * F.dropout(x, p) @ adapter.lora_A.T @ adapter.lora_B.T, 1e-12)
    close(model.eval()(x), plain + 2 * x @ adapter.lora_A.T @ adapter.lora_B.T, 1e-12)


def test_any_way_of_calling_a_layer_gives_torchs_gradients():
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


def first_part():
    """The file's first part as somebody would paste it: these imports, nothing else of the file."""
    text = Path(lora.__file__).read_text()
    part = re.search(r"# --- LoRA.*?\n(.*?)# --- QLoRA", text, re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in part.splitlines()) <= 70
    pasted = {"__name__": "pasted"}
    exec(
        "import math, re\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn",
        pasted,
    )
    exec(part, pasted)
    return pasted


def vit():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=8, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return ViTForImageClassification(config), {"pixel_values": torch.randn(6, 3, 16, 16)}


def bert():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config), {"input_ids": torch.arange(48).view(6, 8)}


@pytest.mark.parametrize("make, targets", [(vit, r".*layers\.\d\..*"), (bert, r".*layer\.\d\..*")])
def test_the_first_part_pasted_alone_adapts_any_transformer(make, targets):
    torch.manual_seed(0)
    model, inputs = make()
    before = model.eval()(**inputs).logits
    names = first_part()["inject"](model, targets, r=4, alpha=16)
    assert torch.equal(model(**inputs).logits, before) and len(names) == 2 * 6
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(30):
        loss = model(**inputs, labels=torch.arange(6) % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and len(trained) == 2 * len(names)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


ALONE = """
import sys, torch
from collections import OrderedDict
from torch import nn
import lora
from lora import fingerprint, inject, load, save

assert not {"peft", "transformers", "deepspeed", "bitsandbytes", "model"} & set(sys.modules)

def block():
    torch.manual_seed(0)
    names = ("q_proj", "act", "v_proj")
    return nn.Sequential(OrderedDict(zip(names, (nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))))

def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()

x, model, fresh = torch.ones(2, 8), nn.Sequential(block()), nn.Sequential(block())
before = fresh(x)
code = lora.__doc__[lora.__doc__.index("    base ="):lora.__doc__.index("Sources")]
for line in code.strip().splitlines():
    exec("train(model)" if line.strip().startswith("...") else line.strip())
assert torch.equal(model(x), fresh(x)) and not torch.equal(model(x), before)
"""


def test_the_docstrings_lines_run_with_the_file_alone(tmp_path):
    shutil.copy(lora.__file__, tmp_path)
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)


def test_an_adapter_in_an_eval_model_drops_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    lora.inject(model, "0", 4, 8, dropout=0.5)
    nn.init.ones_(model[0].lora.lora_B)
    lora.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8)).eval()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    lora.load(fresh, tmp_path)
    x = torch.randn(99, 8)
    assert torch.equal(fresh(x), model.eval()(x))


def test_a_head_tied_to_the_embeddings_gets_no_adapter(tmp_path):
    for tied in (True, False):
        config = LlamaConfig(**SMALL, vocab_size=99, tie_word_embeddings=tied)
        model = LlamaForCausalLM(config)
        assert ("lm_head" in lora.inject(model, ".*", 4, 8)) == (not tied)
        lora.save(model, tmp_path)
        lora.load(LlamaForCausalLM(config), tmp_path)


def test_hooks_keep_torchs_encoder_off_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        before = model(x)
        lora.inject(model, r".*\.linear[12]", r=4, alpha=8)
        nn.init.normal_(model.layers[0].linear1.lora.lora_B)
        assert (model(x) - before).abs().max() > 0.01


# --- which layers, how many ---


def test_no_adapter_on_tower_head_or_projector():
    names = lora.inject(tiny_llava(), BLOCKS, r=2, alpha=4)
    assert report.fold(names).splitlines() == [
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


DECODER = r"model\.language_model\..+"


@pytest.mark.parametrize("names", ["q_proj", "q_proj,v_proj", "gate_proj,down_proj,o_proj"])
def test_names_and_an_expression_adapt_the_same_decoder_layers(names):
    expression = rf"{DECODER}\.({names.replace(',', '|')})"
    by_name = lora.inject(tiny_llava(), lora.paths_of(names, DECODER), r=2, alpha=4)
    assert by_name == lora.inject(tiny_llava(), expression, r=2, alpha=4)
    assert len(by_name) == 2 * len(names.split(",")) and not any("vision" in n for n in by_name)
    assert lora.paths_of(expression, DECODER) == expression


def test_a_target_that_adapts_nothing_is_refused():
    model = tiny_llava()
    with pytest.raises(ValueError, match="'q_proj' matches no linear layer's whole path .one is"):
        lora.inject(model, "q_proj", r=4, alpha=8)
    with pytest.raises(ValueError, match="matches no linear layer"):
        lora.inject(model, lora.paths_of("fc1", DECODER), r=4, alpha=8)  # the tower's
    with pytest.raises(ValueError, match="not a regular expression"):
        lora.inject(model, "*q_proj", r=4, alpha=8)
    with pytest.raises(ValueError, match="matches no linear layer"):  # its weight is only read
        lora.inject(nn.MultiheadAttention(8, 2), "out_proj", r=4, alpha=8)
    tied = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 8)})
    tied["c"].weight = tied["a"].weight
    with pytest.raises(ValueError, match="one is b"):  # which can be had
        lora.inject(tied, "c", r=4, alpha=8)
    assert all(p.requires_grad for p in model.parameters())


# --- 4 bits ---


def quantize(model):
    weights = dict(model.named_parameters())
    return lora.quantize(model, BLOCKS, weights, compute_dtype=torch.float32)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_nf4_layer_is_that_of_its_dequantized_weight(dtype, bias, storage):
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


def test_only_the_decoder_is_quantized_and_counts_stay_true():
    model = tiny_llava()
    before = lora.count(model.parameters())
    names = quantize(model)
    quantized = {n for n, p in model.named_parameters() if lora.is_nf4(p)}
    assert quantized == {f"{n}.weight" for n in names} and len(names) == 14
    assert lora.count(model.parameters()) == before > sum(p.numel() for p in model.parameters())
    start = logits_of(model)
    lora.inject(model, BLOCKS, r=4, alpha=8)
    assert torch.equal(logits_of(model), start)
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
    model = evaluate.open_model(folder, None, 16, torch.bfloat16, "cpu")
    assert mapped()
    del model
    model = evaluate.open_model(folder, None, 4, torch.bfloat16, "cpu")
    assert not mapped() and any(map(lora.is_nf4, model.parameters()))


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


# --- our files ---


def test_what_is_saved_and_loaded_holds_the_fp32_masters(tmp_path):
    model = tiny_llava().bfloat16()
    adapt(model)
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    master = {n: p.data.float() * (1 + 2**-12) for n, p in trains.items()}
    saved(model, tmp_path, tensors=master)
    other = tiny_llava().bfloat16()
    assert sorted(lora.load(other, tmp_path)) == sorted(master)
    on_disk = load_file(tmp_path / lora.WEIGHTS)
    assert len(on_disk) == len(master) and {t.dtype for t in on_disk.values()} == {torch.float32}
    first = "model.language_model.layers.0.self_attn.q_proj"
    key = f"base_model.model.{first}.lora_A.weight"
    assert torch.equal(on_disk[key], master[f"{first}.lora.lora_A"])
    assert torch.equal(logits_of(other), logits_of(model))
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
    folders = [llava.open_weights(tmp_path / name) for name in "abcd"]
    prints = {lora.fingerprint(tensors, llava.transformers_name) for tensors in folders}
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert prints == {lora.fingerprint(dict(base.named_parameters()))}
    base.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    assert lora.fingerprint(dict(base.named_parameters())) not in prints
