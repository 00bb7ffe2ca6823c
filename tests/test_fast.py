"""fast.py beside what it stands in for: plain torch and transformers."""

import copy
import functools
import importlib
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from tiny import HERE, SMALL, VISION, mixed_batch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import fast
import lora
import model as llava

TEXT = dict(SMALL, num_key_value_heads=2, vocab_size=300)
BF16 = dict(atol=0, rtol=2**-7)  # of bf16's 8 digits the last one


def small_llava(text=LlamaConfig, vision=CLIPVisionConfig, dtype=torch.float32):
    shape = {name: value for name, value in VISION.items() if name != "initializer_range"}
    config = LlavaConfig(
        vision_config=vision(**shape),
        text_config=text(**TEXT),
        image_token_index=299,
        vision_feature_select_strategy="default" if vision is CLIPVisionConfig else "full",
    )
    torch.manual_seed(0)
    return llava.Llava(config).to(dtype)


def with_gradients(model, *inputs):
    """(outputs, {name: gradient}) of a loss that is the first of the outputs."""
    outputs = model(*inputs)
    outputs[0].backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


def far(found, expected):
    """How far two gradients are apart, beside the length of the second."""
    return ((found - expected).norm() / (expected.norm() + 1e-9)).item()


def in_an_empty_folder(folder, script, *files):
    for file in files:
        shutil.copy(HERE / file, folder)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


# --- all of it ---


@pytest.mark.parametrize("text", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("vision", [CLIPVisionConfig, SiglipVisionConfig])
def test_loss_and_gradients_of_llava_are_the_same(text, vision):
    model = small_llava(text, vision)
    other = fast.enable(copy.deepcopy(model))
    batch = mixed_batch(299)[:3]
    (loss, right), expected = with_gradients(model, *batch)
    (fast_loss, fast_right), found = with_gradients(other, *batch)
    torch.testing.assert_close(fast_loss, loss)
    assert fast_right == right
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_in_bf16_they_are_as_near_to_fp32():
    exact, plain = small_llava(), small_llava(dtype=torch.bfloat16)
    exact.load_state_dict(plain.state_dict())
    other = fast.enable(copy.deepcopy(plain))
    ids, pixels, labels, _ = mixed_batch(299)
    (loss, _), true = with_gradients(exact, ids, pixels, labels)
    (plain_loss, _), expected = with_gradients(plain, ids, pixels.bfloat16(), labels)
    (fast_loss, _), found = with_gradients(other, ids, pixels.bfloat16(), labels)
    assert abs(fast_loss - loss) < 2 * abs(plain_loss - loss) + 0.01 * loss
    for name in true:
        assert far(found[name], true[name]) < 1.5 * far(expected[name], true[name]) + 0.01, name


def test_greedy_words_are_the_same():
    model = small_llava().eval()
    ids, pixels, _, mask = mixed_batch(299, "left")
    options = dict(attention_mask=mask, eos_token_id=[2], max_new_tokens=8)
    expected = model.generate(ids, pixels, **options)
    assert torch.equal(fast.enable(model).generate(ids, pixels, **options), expected)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlavaForConditionalGeneration])
def test_models_of_transformers_have_the_same_loss(kind):
    config = LlamaConfig(**TEXT)
    if kind is LlavaForConditionalGeneration:
        config = small_llava().config
    torch.manual_seed(0)
    model = kind(config)
    ids, other = torch.randint(0, 290, (3, 7)), fast.enable(copy.deepcopy(model))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.3, -100)
    for options in ({}, {"num_items_in_batch": 5}, {"shift_labels": labels.roll(1)}):
        outputs = [m(input_ids=ids, labels=labels, **options) for m in (model, other)]
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
        for out in outputs:
            out.loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4)


def test_a_second_call_changes_nothing():
    once = fast.enable(small_llava())
    before = [vars(module).get("forward") for module in once.modules()]
    twice = fast.enable(once)
    assert before == [vars(module).get("forward") for module in twice.modules()]
    assert sum(forward is not None for forward in before) == 2 + 5  # MLPs, norms


WATCH = """
import re, threading, time, torch, fast

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def watch():
    while True:
        seen.append(anonymous_bytes())
        time.sleep(0.001)

seen = []
threading.Thread(target=watch, daemon=True).start()
"""
ALONE = """
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=32_000)).bfloat16()
ids = torch.randint(0, 32_000, (4, 512))
for enable in (lambda model: model, fast.enable):
    model = enable(model)
    model(input_ids=ids[:1, :8], labels=ids[:1, :8]).loss.backward()
    start = anonymous_bytes()
    seen.clear()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    print(loss.item(), (max(seen) - start) / 2**20)
"""


def test_alone_it_saves_memory_of_a_plain_llama(tmp_path):
    figures = in_an_empty_folder(tmp_path, WATCH + ALONE, "fast.py").split()
    loss, peak, fast_loss, fast_peak = (float(figure) for figure in figures)
    print(f"peak of a step {peak:.0f} MiB, with fast.py {fast_peak:.0f} MiB")
    assert fast_loss == pytest.approx(loss, rel=1e-3) and fast_peak < 0.4 * peak


# --- cross entropy ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, words", [(9, 2**21), (300, 50), (0, 50)])  # blocks of 4
def test_cross_entropy_in_parts_is_torchs(dtype, rows, words):
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, words)).to(dtype).requires_grad_()
    targets = torch.randint(0, words, (rows,))
    targets[::3] = -100
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    loss, right = fast.cross_entropy(logits * 1, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-6)
    assert right == (logits.argmax(-1) == targets).sum()
    (true,) = torch.autograd.grad(0.3 * expected, exact)
    (found,) = torch.autograd.grad(0.3 * loss, logits)
    assert found.dtype == dtype
    close = BF16 if dtype == torch.bfloat16 else dict(atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.double(), true, **close)


def test_logits_are_whole_until_backward_and_then_used_up():
    logits = torch.randn(5, 7, requires_grad=True) * 1
    before, targets = logits.detach().clone(), torch.arange(5)
    loss, _ = fast.cross_entropy(logits, targets)
    assert torch.equal(logits, before)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


PEAK = """
fast.keep_freed_memory()
head = torch.nn.Linear(64, 151_936, bias=False, dtype=torch.bfloat16).requires_grad_(False)
hidden = torch.randn(2000, 64, dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(0, 151_936, (2000,))
fast.cross_entropy(head(hidden[:8]), targets[:8])[0].backward()
start = anonymous_bytes()
seen.clear()
fast.cross_entropy(head(hidden), targets)[0].backward()
for memory in (max(seen), anonymous_bytes()):
    print((memory - start) / 2000 / 151_936)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the second is glibc's")
def test_the_loss_takes_3_bytes_a_logit_which_are_kept(tmp_path):
    peak, afterwards = in_an_empty_folder(tmp_path, WATCH + PEAK, "fast.py").split()
    print(f"{float(peak):.2f} bytes a logit")
    assert 1.9 < float(afterwards) <= float(peak) < 3


# --- LoRA ---


def adapted(*layers, dropout=0.0, dtype=None):
    """Linear layers with adapters that have learnt already."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    lora.inject(model, r"\d", r=2, alpha=4, dropout=dropout, dtype=dtype)
    for layer in model:
        nn.init.normal_(layer.lora.lora_B)
    return model


def test_adapters_give_the_same_outputs_and_gradients():
    model = adapted(nn.Linear(8, 6), nn.Linear(6, 6, bias=False)).double()
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = [model(x), *torch.autograd.grad(model(x).square().sum(), inputs)]
    fast.enable(model)
    found = [model(x), *torch.autograd.grad(model(x).square().sum(), inputs)]
    torch.testing.assert_close(found, expected)
    again = checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), inputs), tuple(found[1:]))
    assert model(x[:0]).shape == (0, 3, 6)


def test_dropout_by_index_zeros_a_share_by_chance():
    torch.manual_seed(0)
    x, p = torch.ones(500, 1001, dtype=torch.float64), 0.05
    first, second = (fast.put_zeros(x, fast.draw_zeros(x, p)) for _ in range(2))
    assert set(first.unique().tolist()) == {0, 1} and x.all()
    for dropped in (first, second):  # 500,500 numbers: 1e-3 is more than three deviations
        assert abs(1 - dropped.mean().item() - p) < 1e-3
    assert abs((first + second == 0).double().mean().item() - p**2) < 4e-4  # independent
    neighbours = ((first[:, 1:] == 0) & (first[:, :-1] == 0)).double().mean().item()
    assert abs(neighbours - p**2) < 4e-4


def test_how_many_are_dropped_varies_as_in_torchs_dropout():
    torch.manual_seed(0)
    x = torch.ones(1000, dtype=torch.float64)
    for p in (0.05, 0.5):
        dropped = [(fast.put_zeros(x, fast.draw_zeros(x, p)) == 0).sum() for _ in range(2000)]
        variance = torch.stack(dropped).double().var().item()
        assert variance == pytest.approx(1000 * p * (1 - p), rel=0.15)  # a binomial's


def test_dropout_has_the_mean_and_spread_of_torchs():
    torch.manual_seed(0)
    x, moments = torch.ones(20_000, 40, dtype=torch.float64), []
    model = adapted(nn.Linear(40, 3), dropout=0.3).double()
    for enable in (lambda model: model, fast.enable):
        model = enable(model.train())
        out = model(x)
        moments.append((out.mean(0), out.std(0)))
        assert torch.equal(model.eval()(x), model(x))
    torch.testing.assert_close(moments[1], moments[0], rtol=0.03, atol=0.03)


def test_gradients_under_dropout_are_those_of_its_output():
    model = fast.enable(adapted(nn.Linear(30, 3), dropout=0.3).double().train())
    x = torch.randn(2, 5, 30, dtype=torch.float64, requires_grad=True)

    def output(x, *weights):
        torch.manual_seed(0)
        return model(x)

    assert torch.autograd.gradcheck(output, (x, model[0].lora.lora_A, model[0].lora.lora_B))


def test_adapters_in_fp32_and_under_autocast_keep_dtypes():
    model = fast.enable(adapted(nn.Linear(8, 6).bfloat16(), dtype=torch.float32))
    out = model(torch.randn(4, 8).bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and model[0].lora.lora_B.grad.dtype == torch.float32
    model = fast.enable(adapted(nn.Linear(8, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 8, requires_grad=True))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and model[0].lora.lora_B.grad.dtype == torch.float32


# --- the norm and the MLP ---


def layer_of(family, name):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)


LAYER = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_norms_and_mlps_compute_what_transformers_does(family):
    mlp, norm = (layer_of(family.lower(), family + kind) for kind in ("MLP", "RMSNorm"))
    theirs = nn.Sequential(mlp(LAYER), norm(16))
    nn.init.normal_(theirs[1].weight)
    ours = fast.enable(copy.deepcopy(theirs))
    assert all("forward" in vars(layer) for layer in ours)
    x, towards = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16)
    found, expected = (
        [model(x), *torch.autograd.grad(model(x), [x, *model.parameters()], towards)]
        for model in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family, name", [("gemma", "GemmaRMSNorm"), ("seed_oss", "SeedOssMLP")])
def test_layers_of_other_families_stay_as_they_are(family, name):
    config = AutoConfig.for_model(family, hidden_size=16, intermediate_size=32)
    layer = layer_of(family, name)(16 if "Norm" in name else config)
    assert "forward" not in vars(fast.enable(layer))


def test_an_mlp_of_another_activation_stays_as_it_is():
    config = copy.deepcopy(LAYER)
    config.hidden_act = "relu"
    assert "forward" not in vars(fast.enable(layer_of("llama", "LlamaMLP")(config)))


# --- attention ---


@pytest.mark.parametrize("length, causal", [(2, True), (128, True), (300, True), (300, False)])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_the_backward_pass_of_attention_is_torchs(length, causal, kv_heads):
    """Nine rows of six heads, laid out as in a model: eight rows at a time, and if causal in blocks
    of 128 queries.
    """
    q, k, v = (
        torch.randn(9, length, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (6, kv_heads, kv_heads)
    )
    ours = fast.CPUAttention.apply(q, k, v, 0.3, causal)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    assert torch.equal(ours, torchs)
    towards = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(out, (q, k, v), towards) for out in (ours, torchs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offset", [0, 30])
def test_the_backward_pass_of_attention_is_exact_in_bf16(offset):
    """Scores reach the hundreds where keys have large biases, as Qwen2's do: bf16 rounds them to 1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 8) for heads in (4, 2, 2))
    q, k = q * (3 if offset else 1), k + offset * torch.randn(1, 2, 1, 8)
    tensors = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    towards = torch.randn(2, 4, 300, 8).bfloat16()
    torchs = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)

    def run(attend, tensors, *options):
        out = attend(*tensors, *options)
        return torch.autograd.grad(out, tensors, towards.to(out.dtype))

    exact = run(torchs, [t.detach().double().requires_grad_() for t in tensors])
    found = run(fast.CPUAttention.apply, tensors, 8**-0.5, True)
    for mine, theirs, true in zip(found, run(torchs, tensors), exact):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() < max(1.1 * (theirs - true).norm(), 0.01 * true.norm())


@pytest.mark.parametrize("lengths", [(7, 3, 12, 1), (5, 5)])
def test_prompts_padded_on_the_left_attend_as_under_their_mask(lengths):
    """In the positions that are read; under any other mask torch's attention stays."""
    rows, longest = len(lengths), max(lengths)
    q = torch.randn(rows, 6, longest, 8, dtype=torch.float64)
    k, v = torch.randn(2, rows, 3, longest, 8, dtype=torch.float64)
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]  # (B, T)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = (causal & real[:, None] & real[:, :, None])[:, None]  # (B, 1, T, T)
    found = fast.attend_by_rows(q, k, v, mask, 0.3)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    places = real[:, None].expand(rows, 6, longest)
    torch.testing.assert_close(found[places], wanted[places], atol=1e-10, rtol=0)
    padded_right = torch.ones_like(mask[:, :, :, -1:]) & causal & (torch.arange(longest) < 2)
    for other in (mask & causal.triu(-2), mask | mask.mT, padded_right):  # the first is a window
        assert fast.attend_by_rows(q, k, v, other, 0.3) is None
    attended = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fast, "attend_by_rows", lambda *given: attended.append(given))
        module = types.SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
        for given in (mask, None):
            fast.attend(module, q, k, v, given, 0.3)
    assert len(attended) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_training_in_bf16_has_attention_of_its_own(dtype, monkeypatch):
    calls, apply = [], fast.CPUAttention.apply

    def counted(*args):
        calls.append(args[-1])
        return apply(*args)

    monkeypatch.setattr(fast.CPUAttention, "apply", counted)
    model = fast.enable(small_llava(dtype=dtype))
    ids, pixels, labels, mask = mixed_batch(299, "left")
    pixels = pixels.to(dtype)
    with torch.no_grad():
        model(ids, pixels, labels)
    assert not calls
    model(ids, pixels, labels)[0].backward()
    layers = [False] * (VISION["num_hidden_layers"] - 1) + [True] * SMALL["num_hidden_layers"]
    assert calls == layers * (dtype == torch.bfloat16)  # is it causal?
    calls.clear()
    model.vision_tower.requires_grad_(False)
    model.language_model(inputs_embeds=model.embed(ids, pixels), attention_mask=mask)
    for layer in model.train().language_model.base_model.layers:
        layer.self_attn.attention_dropout = 0.1
    model(ids, pixels, labels)
    assert not calls


@pytest.mark.parametrize(
    "family, asked, used",
    [
        ("clip", None, "fast"),
        ("qwen2", None, "fast"),
        ("llama", None, "fast"),
        ("phi3", None, "sdpa"),
        ("qwen3", "eager", "eager"),
    ],
)
def test_attention_is_ours_in_place_of_torchs_in_known_families(family, asked, used):
    if family == "clip":
        model = AutoModel.from_config(CLIPVisionConfig(**VISION))
    else:
        config = AutoConfig.for_model(family, **dict(TEXT, pad_token_id=0))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=asked)
    fast.enable(model)
    assert model.config._attn_implementation == used
    assert "_attn_implementation" not in model.config.to_json_string()
