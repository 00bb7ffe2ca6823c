"""Adapters as people have them: what PEFT makes, we load, train on, and give back; and the reverse.

python -m pytest tests/test_peft.py
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapted import PROJECTOR, adapt, close, fingerprint_of, logits_of, saved, tiny_llava
from processes import LORA, OWN, losses_of, run
from safetensors.torch import load_file, save_file
from tiny import built, change_tensors, edit, theirs
from transformers import AutoProcessor

import evaluate
import lora
import merge
import model as llava

# --- PEFT's adapters ---

PATHS = [
    f"model.language_model.layers.{i}.{leaf}"
    for i in range(2)
    for leaf in ("self_attn.q_proj", "mlp.up_proj")
]
KINDS = {  # on a tower of three layers, the last of which is never run
    "full paths": dict(target_modules=PATHS),
    "suffix": dict(target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "rsLoRA": dict(target_modules=["k_proj", "fc1"], use_rslora=True),
    "projector whole": dict(target_modules=PATHS, modules_to_save=["multi_modal_projector"]),
    "all-linear, projector whole": dict(
        target_modules="all-linear", modules_to_save=["multi_modal_projector"]
    ),
}
UNUSED = "model.vision_tower.encoder.layers.2."


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """The folder of a small LLaVA, its head tied to its embeddings or not."""
    return built(tmp_path_factory.mktemp("base"), tied=request.param)


def pefts(base, out, **config):
    """A model of PEFT's with an adapter that has learnt something, saved in `out`."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | config
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(**options))
    for name, p in model.named_parameters():
        if p.requires_grad and "modules_to_save" in name:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(out)
    return model.eval()


def row(config, pictures=2):
    """input_ids (1, T) with each picture's four ids, pixel_values (pictures, 3, 28, 28)."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 250, (12,), generator=generator)
    ids = [torch.full((4,), config.image_token_id)] * pictures
    pixel_values = torch.randn(pictures, 3, 28, 28, generator=generator)
    return torch.cat([words[:3], *ids, words[3:]])[None], pixel_values


@torch.no_grad()
def logits_and_words(model):
    """What a model of ours, or of transformers', says to `row`: logits (T, V) and greedy ids."""
    ids, pixels = row(model.config)
    options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    if isinstance(model, llava.Llava):
        logits = model.language_model(inputs_embeds=model.embed(ids, pixels)).logits
        return logits[0], model.generate(ids, pixels, eos_token_id=[2], **options)[0]
    ours = {"suppress_tokens": [model.config.image_token_id], "do_sample": False}
    words = model.generate(
        input_ids=ids, pixel_values=pixels, eos_token_id=2, pad_token_id=2, **options, **ours
    )
    return model(input_ids=ids, pixel_values=pixels).logits[0], words[0, ids.shape[1] :]


def opened(base, adapter, bits=16):
    return evaluate.open_model(base, adapter, bits, torch.float32, "cpu").eval()


def run_merge(base, adapter, out, *flags):
    words = ["--model_name_or_path", base, "--adapter", adapter, "--out", out, *flags]
    return merge.main([str(word) for word in words])


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_adapter_speaks_and_merges_as_in_peft(base, kind, tmp_path):
    model = pefts(base, tmp_path / "adapter", **KINDS[kind])
    logits, words = logits_and_words(model)
    assert (logits - logits_and_words(theirs(base))[0]).abs().max() > 0.01
    ours, our_words = logits_and_words(opened(base, tmp_path / "adapter"))
    close(ours, logits, 1e-4)
    assert torch.equal(our_words, words)
    assert run_merge(base, tmp_path / "adapter", tmp_path / "merged") == 0
    merged, merged_words = logits_and_words(theirs(tmp_path / "merged"))
    close(merged, logits, 1e-4)
    assert torch.equal(merged_words, words)
    expected, changed = model.merge_and_unload().state_dict(), theirs(tmp_path / "merged")
    for name, tensor in changed.state_dict().items():  # with the layer that is never run
        close(tensor, expected[name], 1e-6)
    before = theirs(base).get_parameter(f"{UNUSED}mlp.fc1.weight")
    after = changed.get_parameter(f"{UNUSED}mlp.fc1.weight")
    assert torch.equal(before, after) != (kind == "rsLoRA" or "all-linear" in kind)


@pytest.mark.parametrize("kind", ["suffix", "all-linear, projector whole"])
def test_a_loaded_adapter_is_saved_as_it_was(base, kind, tmp_path):
    model = pefts(base, tmp_path / "adapter", **KINDS[kind])
    ours = opened(base, tmp_path / "adapter")
    whole = KINDS[kind].get("modules_to_save", [])
    lora.save(ours, tmp_path / "again", fingerprint_of(base), llava.transformers_name, whole)
    before, after = (load_file(tmp_path / f / lora.WEIGHTS) for f in ("adapter", "again"))
    assert before.keys() == after.keys() and any(f"{lora.PREFIX}{UNUSED}" in key for key in after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again").eval()
    assert torch.equal(logits_and_words(again)[0], logits_and_words(model)[0])


def test_what_peft_trains_on_from_ours_comes_back_the_same(base, tmp_path):
    model = opened(base, None)
    lora.inject(model, llava.DECODER, r=4, alpha=8)
    model.multi_modal_projector.requires_grad_(True)
    whole = ["multi_modal_projector"]
    lora.save(model, tmp_path / "ours", fingerprint_of(base), llava.transformers_name, whole)
    with warnings.catch_warnings(action="error", category=UserWarning):  # of unknown entries
        trained = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours", is_trainable=True)
    ids, pixels = row(trained.config)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        trained(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(tmp_path / "theirs")
    back = opened(base, tmp_path / "theirs")
    lora.save(back, tmp_path / "back", fingerprint_of(base), llava.transformers_name, whole)
    first, last, ours = (
        load_file(tmp_path / folder / lora.WEIGHTS) for folder in ("theirs", "back", "ours")
    )
    assert first.keys() == last.keys() == ours.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert not any(torch.equal(first[key], ours[key]) for key in first)
    close(logits_and_words(back)[0], logits_and_words(trained.eval())[0], 1e-4)


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
    assert torch.equal(logits_of(other), logits_of(model))


# --- adapters in training ---


@pytest.mark.parametrize("kind", ["suffix", "all-linear"])
def test_training_goes_on_from_pefts_adapter(world, kind, tmp_path):
    base, adapter, final = world / "llava", tmp_path / "adapter", tmp_path / "out/final"
    pefts(base, adapter, **KINDS[kind])
    status, _, error = run(
        world, tmp_path / "out", **LORA | OWN | {"adapter": adapter, "max_steps": 2}
    )
    assert status == 0, error
    before, after = (load_file(folder / lora.WEIGHTS) for folder in (adapter, final))
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert still == {key for key in before if f"{lora.PREFIX}{UNUSED}" in key} and still
    whole = {key for key in after.keys() - before.keys()}  # the projector, unless it has adapters
    assert len(whole) == (0 if kind == "all-linear" else 4)
    in_peft = peft.PeftModel.from_pretrained(theirs(base), final).eval()
    close(logits_and_words(opened(base, final))[0], logits_and_words(in_peft)[0], 1e-4)


def test_an_adapters_folder_is_as_peft_users_expect(world, tmp_path, monkeypatch):
    hub = {"owner/name": world / "llava"}  # what a hub's id is resolved to
    monkeypatch.setattr(llava, "resolve", lambda name, *hint: Path(hub.get(name, name)))
    flags = {"max_steps": 1, "lora_target_modules": "q_proj,v_proj"}
    status, output, error = run(
        world, tmp_path / "a", **LORA | flags, model_name_or_path="owner/name"
    )
    assert status == 0 and output.count("2 x language_model") == 2, error
    adapter = tmp_path / "a/final"
    ours, base = (AutoProcessor.from_pretrained(folder) for folder in (adapter, world / "llava"))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi?"}]}]
    prompt, expected = (p.apply_chat_template(messages) for p in (ours, base))
    assert prompt == expected and ours.tokenizer(prompt) == base.tokenizer(prompt)
    assert ours.image_processor.to_dict() == base.image_processor.to_dict()
    assert not (adapter / "config.json").exists()
    config = json.loads((adapter / lora.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    output = re.sub(r" \\\n +", " ", output)  # commands go on in the next line
    assert f"merge.py --model_name_or_path owner/name --adapter {adapter}" in output
    assert str(world / "llava") not in output
    names = {key.split(".")[-3] for key in load_file(adapter / lora.WEIGHTS) if "lora_A" in key}
    assert names == {"q_proj", "v_proj"}


def test_an_adapter_goes_on_learning(world, tmp_path):
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
    source = llava.open_weights(world / "llava")
    tensors[f"{lora.PREFIX}{more}.weight"] = source[llava.EMBEDDINGS].float()
    save_file(tensors, adapter / lora.WEIGHTS)
    status, _, error = run(world, tmp_path / "b", **LORA | OWN | dict(adapter=adapter))
    assert status == 2 and "embed_tokens.weight whole" in error and not (tmp_path / "b").exists()


# --- what is refused ---

Q = "model.language_model.layers.0.self_attn.q_proj"
NOT_SUPPORTED = {  # a config of PEFT's > what the line names
    "use_dora True": dict(target_modules=["q_proj"], use_dora=True),
    "rank_pattern {'q_proj': 8}": dict(target_modules=PATHS, rank_pattern={"q_proj": 8}),
    "alpha_pattern {'q_proj': 2}": dict(target_modules=PATHS, alpha_pattern={"q_proj": 2}),
    "bias lora_only": dict(target_modules=["fc1"], bias="lora_only"),
    "bias all": dict(target_modules=["fc1"], bias="all"),
    "lora_bias True": dict(target_modules=["fc1"], lora_bias=True),
    "trainable_token_indices": dict(target_modules=PATHS, trainable_token_indices=[1, 2]),
    "target_parameters": dict(target_modules=PATHS, target_parameters=["linear_1.weight"]),
    "init_lora_weights olora": dict(target_modules=["q_proj"], init_lora_weights="olora"),
    "target_modules: model.language_model.embed_tokens": dict(target_modules=["embed_tokens"]),
    "target_modules: lm_head": dict(target_modules=["lm_head"]),
    "target_modules: model.vision_tower.embeddings.patch_embedding": dict(
        target_modules=["patch_embedding"]
    ),
}
TIED = {
    name: dict(target_modules=["q_proj"], modules_to_save=[name])
    for name in ("embed_tokens", "lm_head", "model.language_model.embed_tokens")
}


def refusal(base, adapter, out, capsys):
    """The line with which `merge` and `load` refuse an adapter; nothing is written."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        opened(base, adapter)
    capsys.readouterr()
    assert run_merge(base, adapter, out) == 2
    printed, line = capsys.readouterr()
    assert line == f"merge.py: {error.value}\n" and not printed
    assert not list(out.parent.glob(f"{out.name}*"))
    return line


@pytest.mark.parametrize("named", NOT_SUPPORTED)
def test_what_is_not_plain_lora_is_refused_by_its_name(base, named, tmp_path, capsys):
    pefts(base, tmp_path / "adapter", **NOT_SUPPORTED[named])
    line = refusal(base, tmp_path / "adapter", tmp_path / "out", capsys)
    assert f"adapter_config.json: {named}" in line


@pytest.mark.parametrize("name", TIED)
def test_new_embeddings_or_head_need_an_untied_base(base, name, tmp_path, capsys):
    model = pefts(base, tmp_path / "adapter", **TIED[name])
    if llava.from_pretrained(base).config.tie_word_embeddings:
        line = refusal(base, tmp_path / "adapter", tmp_path / "out", capsys)
        assert f"adapter_config.json: modules_to_save has {name}" in line
        copied = shutil.copytree(
            base, tmp_path / "copied"
        )  # a tied head that is there all the same
        change_tensors(copied, lambda t: t.update({llava.HEAD: t[llava.EMBEDDINGS].clone()}))
        assert refusal(copied, tmp_path / "adapter", tmp_path / "out", capsys) == line
        return
    logits, words = logits_and_words(model)
    ours = logits_and_words(opened(base, tmp_path / "adapter"))
    assert run_merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    for found, said in (ours, logits_and_words(theirs(tmp_path / "out"))):
        close(found, logits, 1e-4)
        assert torch.equal(said, words)


def edit_tensors(adapter, **changes):
    """Replaces tensors of the layer Q: None takes one away."""
    tensors = load_file(adapter / lora.WEIGHTS)
    for matrix, tensor in changes.items():
        key = f"{lora.PREFIX}{Q}.{matrix}.weight"
        tensors.pop(key, None)
        tensors |= {} if tensor is None else {key: tensor}
    save_file(tensors, adapter / lora.WEIGHTS)


DAMAGES = {  # what the line says > what was done to an adapter of ours
    f"{Q}.lora_A.weight is missing instead of (4, 32)": lambda a: edit_tensors(a, lora_A=None),
    f"{Q}.lora_B.weight is missing instead of (32, 4)": lambda a: edit_tensors(a, lora_B=None),
    f"{Q}.lora_A.weight is missing": lambda a: edit_tensors(a, lora_A=None, lora_B=None),
    f"{Q}.lora_A.weight is (4, 65) instead of (4, 32)": lambda a: edit_tensors(
        a, lora_A=torch.zeros(4, 65)
    ),
    f"{Q}.other.weight is (2,) instead of absent": lambda a: edit_tensors(a, other=torch.ones(2)),
    "peft_type IA3 is not supported": lambda a: edit(a / lora.CONFIG, peft_type="IA3"),
    "adapter_config.json is not a JSON object": lambda a: (a / lora.CONFIG).write_text("{"),
    "adapter_model.safetensors is damaged": lambda a: (a / lora.WEIGHTS).write_bytes(b"123"),
    "no adapter_config.json, so no adapter": lambda a: (a / lora.CONFIG).unlink(),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line(world, says, tmp_path, capsys):
    model, adapter = opened(world / "llava", None), tmp_path / "adapter"
    lora.inject(model, llava.DECODER, r=4, alpha=8)
    lora.save(model, adapter, fingerprint_of(world / "llava"), llava.transformers_name)
    DAMAGES[says](adapter)
    assert says in refusal(world / "llava", adapter, tmp_path / "out", capsys)


def test_an_adapter_of_a_larger_model_names_both_shapes(tmp_path):
    large = tiny_llava(hidden_size=128, num_hidden_layers=3)
    adapt(large)
    saved(large, tmp_path)
    with pytest.raises(ValueError, match=r"layers.0.*is \(.*128.*instead of \(.*64"):
        lora.load(tiny_llava(), tmp_path)
