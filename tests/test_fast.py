"""What computes the same in less time and memory, beside plain torch."""

import copy
import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from conftest import built, mixed_batch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

import model as llava


def test_what_keeps_less_computes_what_transformers_does_and_leaves_other_layers_alone():
    def layers(family, *names):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        return [getattr(module, name) for name in names]

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    for family, mlp, norm in (("llama", "LlamaMLP", "LlamaRMSNorm"), ("qwen3", "Qwen3MLP", "Qwen3RMSNorm"),
                              ("mistral", "MistralMLP", "MistralRMSNorm")):  # fmt: skip
        mlp, norm = layers(family, mlp, norm)
        theirs = nn.Sequential(mlp(config), norm(16))
        nn.init.normal_(theirs[1].weight)
        ours = copy.deepcopy(theirs)
        llava.keep_less(ours)
        assert all("forward" in vars(layer) for layer in ours)
        x = torch.randn(2, 3, 16, requires_grad=True)
        outputs = [model(x) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs)
        towards = torch.randn(2, 3, 16)
        found, expected = (
            torch.autograd.grad(out, [x, *model.parameters()], towards)
            for out, model in zip(outputs, (ours, theirs))
        )
        torch.testing.assert_close(found, expected)
    # These have a dropout, multipliers, a weight of 1 + w, an activation of their own.
    others = layers("seed_oss", "SeedOssMLP") + layers("falcon_h1", "FalconH1MLP")
    assert not {llava.body(layer) for layer in others} & {llava.body(llava.LlamaMLP)}
    assert llava.body(*layers("gemma", "GemmaRMSNorm")) != llava.body(llava.LlamaRMSNorm)
    relu = nn.Sequential(
        llava.LlamaMLP(LlamaConfig(hidden_size=16, num_attention_heads=2, hidden_act="relu"))
    )
    llava.keep_less(relu)
    assert "forward" not in vars(relu[0])


@pytest.mark.parametrize("length, causal", [(2, True), (128, True), (300, True), (300, False)])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_the_backward_pass_of_attention_is_torchs(length, causal, kv_heads):
    """Two rows and six heads, in blocks of 128 queries."""
    q, k, v = (
        torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, kv_heads, kv_heads)
    )
    ours = llava.CPUAttention.apply(q, k, v, 0.3, causal)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    assert torch.equal(ours, torchs)
    towards = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(out, (q, k, v), towards) for out in (ours, torchs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offset", [0, 30])
def test_the_backward_pass_of_attention_is_exact_in_bf16(offset):
    """Scores reach the hundreds where keys have large biases, as Qwen2's do: bf16 rounds these to 1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 8) for heads in (4, 2, 2))
    q, k = q * (3 if offset else 1), k + offset * torch.randn(1, 2, 1, 8)
    tensors = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    towards = torch.randn(2, 4, 300, 8).bfloat16()

    def run(attend, tensors, *options):
        return torch.autograd.grad(
            attend(*tensors, *options), tensors, towards.to(tensors[0].dtype)
        )

    torchs = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    exact = run(torchs, [t.detach().double().requires_grad_() for t in tensors])
    for mine, theirs, true in zip(
        run(llava.CPUAttention.apply, tensors, 8**-0.5, True), run(torchs, tensors), exact
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() < max(1.1 * (theirs - true).norm(), 0.01 * true.norm())


def test_only_training_in_bf16_without_a_mask_has_a_backward_pass_of_its_own(tmp_path, monkeypatch):
    calls, apply = [], llava.CPUAttention.apply
    monkeypatch.setattr(
        llava.CPUAttention, "apply", lambda *args: calls.append(args[3:]) or apply(*args)
    )
    for dtype in (torch.bfloat16, torch.float32):
        model = llava.from_pretrained(built(tmp_path / str(dtype)), dtype)
        ids, pixels, labels, mask = mixed_batch(model.config.image_token_id, "left")
        pixels = pixels.to(dtype)
        with torch.no_grad():
            model(ids, pixels, labels)
        assert not calls
        parts = model.vision_tower.vision_model.config, model.config.text_config
        expected = [
            ((part.hidden_size // part.num_attention_heads) ** -0.5, causal)
            for part, causal in zip(parts, (False, True))
            for _ in range(part.num_hidden_layers)
        ]
        model(ids, pixels, labels)[0].backward()
        assert calls == expected * (dtype == torch.bfloat16)
        calls.clear()
        model.vision_tower.requires_grad_(False)
        model.language_model(inputs_embeds=model.embed(ids, pixels), attention_mask=mask)
        assert not calls


def test_attention_is_ours_where_transformers_chose_torchs_and_the_family_is_known(tmp_path):
    names = {
        "clip": "llava",
        "qwen2": "llava",
        "llama": "llava",
        "phi3": "sdpa",
        "qwen3 eager": "eager",
    }
    config = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, vocab_size=32, pad_token_id=0)  # fmt: skip
    for name, expected in names.items():
        family, _, wanted = name.partition(" ")
        if family == "clip":
            model = AutoModel.from_config(CLIPVisionConfig(hidden_size=16, num_attention_heads=2))
        else:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **config), attn_implementation=wanted or None
            )
        llava.use_faster_attention(model)
        assert model.config._attn_implementation == expected
        assert "_attn_implementation" not in model.config.to_json_string()
