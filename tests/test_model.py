"""The model beside transformers' LlavaForConditionalGeneration, in memory and on disk."""

import gc
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import SMALL, VISION, change_tensors, edit, mixed_batch, tensors_of, theirs
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import data
import model as llava

IMAGE_ID = 299
TOWER = "vision_tower.vision_model."
BIAS = "multi_modal_projector.linear_1.bias"


def small_config(text=LlamaConfig, vision=CLIPVisionConfig, tied=False, words=IMAGE_ID + 1):
    """Its pictures have 28 pixels a side, and 4 patches; CLIP's tower has a CLS token too."""
    shape = {name: value for name, value in VISION.items() if name != "initializer_range"}
    strategy = "default" if vision is CLIPVisionConfig else "full"
    text = text(**SMALL, num_key_value_heads=2, vocab_size=words, tie_word_embeddings=tied)
    return LlavaConfig(
        vision_config=vision(**shape),
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=4,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )


def published(path, *options, dtype=torch.float32, **more):
    """A LLaVA folder as transformers writes it."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(small_config(*options, **more)).to(dtype)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("any")
    return path


def as_on_the_hub(folder):
    """Older folders have a level more in the names of the tower."""

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace("vision_tower.", TOWER)] = tensors.pop(name)
        tensors[f"{TOWER}embeddings.position_ids"] = torch.arange(5)[None]  # an old buffer

    change_tensors(folder, rename)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(a folder, its model) that no test changes."""
    folder = published(tmp_path_factory.mktemp("good"))
    return folder, llava.from_pretrained(folder).eval()


def gradients(model, *batches):
    """{name: gradient} of the summed loss over batches of (input_ids, pixel_values, labels)."""
    model.zero_grad()
    for batch in batches:
        model(*batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- what it computes ---


@pytest.mark.parametrize("way", ["in shards", "as on the hub", "saved by us", "bin"])
@pytest.mark.parametrize(
    "text, vision, tied",
    [
        (LlamaConfig, CLIPVisionConfig, False),
        (Qwen2Config, CLIPVisionConfig, True),
        (Qwen2Config, SiglipVisionConfig, False),
    ],
)
def test_logits_loss_and_greedy_words_equal_transformers(tmp_path, text, vision, tied, way):
    folder = published(tmp_path / "a", text, vision, tied)
    reference = theirs(folder)
    if way == "in shards":
        (folder / "model.safetensors").unlink()
        reference.save_pretrained(folder, max_shard_size="30kB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif way == "as on the hub":
        as_on_the_hub(folder)
    elif way == "saved by us":
        llava.save_pretrained(llava.from_pretrained(folder), tmp_path / "b", folder)
        folder, reference = tmp_path / "b", theirs(tmp_path / "b")
    elif way == "bin":
        torch.save(tensors_of(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model = llava.from_pretrained(folder).eval()
    ids, pixels, labels, mask = mixed_batch(IMAGE_ID)
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels)
        logits = model.language_model(inputs_embeds=model.embed(ids, pixels)).logits
        loss, right = model(ids, pixels, labels)
    assert expected.logits.std() > 0.5  # not so small that anything is equal
    torch.testing.assert_close(logits[mask > 0], expected.logits[mask > 0], atol=1e-5, rtol=0)
    supervised = labels[:, 1:] >= 0
    mean = loss / supervised.sum()
    torch.testing.assert_close(mean, expected.loss, rtol=1e-6, atol=0)  # fp32 has 24 bits
    assert right == (expected.logits.argmax(-1)[:, :-1] == labels[:, 1:])[supervised].sum()

    ids, pixels, _, mask = mixed_batch(IMAGE_ID, "left")
    inputs = dict(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    options = dict(max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE_ID])
    free = reference.generate(**inputs, **options)[:, ids.shape[1] :]
    eos = [free[0, 3].item(), free[1, 5].item()]
    ends = dict(eos_token_id=eos, pad_token_id=eos[0])
    expected = reference.generate(**inputs, **options, **ends)[:, ids.shape[1] :]
    new = model.generate(ids, pixels, mask, max_new_tokens=8, eos_token_id=eos)
    assert new.tolist() == expected.tolist() != free.tolist()


def test_merge_equals_a_splice_by_hand(good):
    model = good[1]
    ids, pixels, _, _ = mixed_batch(IMAGE_ID)
    text = model.language_model.get_input_embeddings()
    one, two, three = model.multi_modal_projector(model.vision_tower(pixels))  # (4, 32) each
    rows = [
        text(ids[0]),
        torch.cat([text(ids[1, :1]), one, text(ids[1, 5:])]),
        torch.cat([text(ids[2, :1]), two, text(ids[2, 5:6]), three, text(ids[2, 10:])]),
    ]
    assert torch.equal(model.embed(ids, pixels), torch.stack(rows))


def test_pictures_that_do_not_match_their_placeholders_are_an_error(good):
    ids, pixels, labels, _ = mixed_batch(IMAGE_ID)
    for wrong in (pixels[:2], pixels[:0], torch.cat([pixels, pixels])):
        with pytest.raises(AssertionError, match="12 places"):
            good[1](ids, wrong, labels)


@pytest.mark.parametrize("layer", [-1, -2, -3, -4])
def test_the_tower_gives_patches_of_the_layer_that_is_asked(layer):
    config = small_config()
    config.vision_feature_layer = layer
    torch.manual_seed(0)
    reference, tower = CLIPVisionModel(config.vision_config).eval(), llava.VisionTower(config)
    weights = {f"vision_model.{name}": t for name, t in reference.state_dict().items()}
    assert tower.load_state_dict(weights, strict=False).missing_keys == []
    pixels = torch.randn(2, 3, 28, 28)
    expected = reference(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    torch.testing.assert_close(tower.eval()(pixels), expected, atol=1e-6, rtol=0)
    assert len(tower.vision_model.encoder.layers) == 4 + layer


def test_a_picture_of_336_pixels_has_576_patches():
    config = LlavaConfig(vision_config=CLIPVisionConfig(**dict(VISION, image_size=336)))
    with torch.device("meta"):
        assert llava.VisionTower(config)(torch.empty(1, 3, 336, 336)).shape == (1, 576, 32)


def test_every_weight_gets_a_gradient(good):
    ids, pixels, labels, _ = mixed_batch(IMAGE_ID)
    found = gradients(good[1], (ids, pixels, labels))  # a missing gradient has no .clone()
    assert all(g.abs().max() > 0 for g in found.values())


def test_rows_without_pictures_give_the_projector_zeros(good):
    ids, pixels, labels, _ = mixed_batch(IMAGE_ID)
    found = gradients(good[1], (ids[:1], pixels[:0], labels[:1]))
    assert all((g == 0).all() for name, g in found.items() if "language_model" not in name)
    assert found[llava.HEAD].abs().max() > 0


def test_rows_without_labels_give_zeros(good):
    ids, pixels, labels, _ = mixed_batch(IMAGE_ID)
    found = gradients(good[1], (ids, pixels, torch.full_like(labels, -100)))
    assert all((g == 0).all() for g in found.values())


def test_padding_and_the_split_into_batches_change_no_gradient(good):
    model = llava.from_pretrained(good[0], torch.float64)
    ids, pixels, labels, mask = mixed_batch(IMAGE_ID)
    pixels = pixels.double()
    whole = gradients(model, (ids, pixels, labels))
    longer = F.pad(ids, (0, 7), value=5), pixels, F.pad(labels, (0, 7), value=-100)
    padded = gradients(model, longer)
    pictures = (pixels[:0], pixels[:1], pixels[1:])
    rows = [
        (row[seen > 0][None], picture, label[seen > 0][None])
        for row, picture, label, seen in zip(ids, pictures, labels, mask)
    ]
    one_by_one = gradients(model, *reversed(rows))
    for name, gradient in whole.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-10, rtol=0)
        torch.testing.assert_close(one_by_one[name], gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind, count", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_a_projector_is_linears_with_gelu_between_them(kind, count):
    projector, x = llava.Projector(kind, 8, 6), torch.randn(2, 4, 8)
    weights, expected = projector.state_dict(), x
    for i in range(1, count + 1):
        expected = F.gelu(expected) if i > 1 else expected
        weight, bias = (weights.pop(f"linear_{i}.{leaf}") for leaf in ("weight", "bias"))
        expected = F.linear(expected, weight, bias)
    assert torch.equal(projector(x), expected) and not weights


@pytest.mark.parametrize("width, count", [(2560, 9_180_160), (4096, 20_979_712)])
def test_projectors_have_the_published_numbers_of_parameters(width, count):
    with torch.device("meta"):
        projector = llava.Projector("mlp2x_gelu", 1024, width)
    assert sum(p.numel() for p in projector.parameters()) == count


def test_parts_of_different_dtypes_work_together(good):
    model = llava.from_pretrained(good[0])
    model.language_model.bfloat16()
    model.multi_modal_projector.half()
    assert torch.isfinite(model(*mixed_batch(IMAGE_ID)[:3])[0])


def test_the_image_token_is_never_generated(good):
    model = llava.from_pretrained(good[0]).eval()
    ids, pixels, _, mask = (x[-2:] for x in mixed_batch(IMAGE_ID, "left"))
    ids, mask = ids[1:], mask[1:]
    with torch.no_grad():
        hidden = model.language_model.base_model(inputs_embeds=model.embed(ids, pixels))[0]
        head = model.language_model.lm_head
        head.weight[IMAGE_ID] = 100 * hidden[0, -1]
        assert head(hidden[0, -1]).argmax() == IMAGE_ID
    new = model.generate(ids, pixels, mask, max_new_tokens=5, eos_token_id=[3])
    assert not (new == IMAGE_ID).any()


# --- loaded and saved ---


@pytest.mark.parametrize("old", [False, True])
def test_a_saved_folder_is_its_source_to_the_bit(tmp_path, old):
    folder, new = published(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "b"
    if old:
        as_on_the_hub(folder)
    model = llava.from_pretrained(folder, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    umask = os.umask(0o022)
    llava.save_pretrained(model, new, folder)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in new.iterdir()} == {0o644}
    assert {file.name for file in new.iterdir()} == {file.name for file in folder.iterdir()}
    assert (new / "tokenizer.json").read_text() == "any"
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, new)]
    assert configs[0] == configs[1]
    before = {llava.canonical(name): t for name, t in tensors_of(folder).items()}
    before.pop(f"{TOWER}embeddings.position_ids", None)
    after = tensors_of(new)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in before)
    unused = [name for name in after if re.search(r"layers\.2\.|post_layernorm", name)]
    assert len(unused) == 18 and not any(name in model.state_dict() for name in unused)


def test_a_config_keeps_no_path_of_this_machine(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    config = LlavaConfig(text_config=llava.read_config(tmp_path))
    assert str(tmp_path) not in config.to_json_string()


def test_what_was_trained_is_saved_in_the_models_place(good, tmp_path):
    folder, model = good
    llava.save_pretrained(model, tmp_path, folder, state={BIAS: torch.ones(32)})
    before, after = (
        {llava.canonical(name): t for name, t in tensors_of(path).items()}
        for path in (folder, tmp_path)
    )
    assert [name for name in before if not torch.equal(before[name], after[name])] == [BIAS]
    assert (after[BIAS] == 1).all()


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_other_projectors_are_saved_and_loaded(tmp_path, kind):
    config = small_config()
    config.mm_projector_type, config.architectures = kind, [f"LlavaWith_{kind}"]
    model = llava.Llava(config).eval()
    unused = CLIPVisionModel(config.vision_config).state_dict().items()
    tensors = {f"{TOWER}{name}": t for name, t in unused} | model.state_dict()
    (tmp_path / "a").mkdir()
    llava.write_model(tensors, config, tmp_path / "a")
    llava.save_pretrained(llava.from_pretrained(tmp_path / "a"), tmp_path / "b", tmp_path / "a")
    batch = mixed_batch(IMAGE_ID)[:3]
    assert torch.equal(llava.from_pretrained(tmp_path / "b").eval()(*batch)[0], model(*batch)[0])
    saved = json.loads((tmp_path / "b/config.json").read_text())
    assert saved["mm_projector_type"] == kind and saved["architectures"] == [f"LlavaWith_{kind}"]


def test_shards_have_an_index_that_transformers_reads(good, tmp_path):
    folder, model = good
    tensors = {llava.canonical(name): t for name, t in tensors_of(folder).items()}
    llava.write_model(tensors, model.config, tmp_path, shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = theirs(folder).state_dict()
    assert all(torch.equal(expected[name], t) for name, t in theirs(tmp_path).state_dict().items())


def test_a_folder_is_not_written_over_its_source(good):
    with pytest.raises(AssertionError, match="it cannot be written to"):
        llava.save_pretrained(good[1], good[0] / ".", good[0])


def test_buffers_equal_those_of_a_model_made_normally(tmp_path):
    folder = published(tmp_path, dtype=torch.bfloat16)
    ours = dict(llava.from_pretrained(folder).named_buffers())
    normal = dict(llava.Llava(LlavaConfig.from_pretrained(folder)).named_buffers())
    assert ours.keys() == normal.keys() and any("inv_freq" in name for name in ours)
    for name, buffer in normal.items():
        assert torch.equal(ours[name], buffer) and ours[name].dtype == buffer.dtype


def test_loading_maps_the_weights_and_does_not_copy_them(tmp_path):
    def private_megabytes():
        gc.collect()
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000

    folder = published(tmp_path, words=800_000, tied=True)  # 32 wide, fp32
    assert (folder / "model.safetensors").stat().st_size > 100e6
    before = private_megabytes()
    model = llava.from_pretrained(folder)
    assert private_megabytes() - before < 30 and next(model.parameters()).device.type == "cpu"


FAULTS = {  # what is changed in config.json, or done to the folder > what the one line must name
    "other kind": (dict(model_type="qwen2"), "qwen2"),
    "no kind": (dict(model_type="nonesuch"), "nonesuch"),
    "activation": (dict(projector_hidden_act="relu"), "relu"),
    "list of layers": (dict(vision_feature_layer=[-2, -1]), "vision_feature_layer"),
    "layer from the front": (dict(vision_feature_layer=1), "vision_feature_layer"),
    "layer before the first": (dict(vision_feature_layer=-9), "vision_feature_layer"),
    "strategy": (dict(vision_feature_select_strategy="max"), "vision_feature_select_strategy"),
    "no projector bias": (dict(multimodal_projector_bias=False), "multimodal_projector_bias"),
    "other projector": (dict(mm_projector_type="mlp"), "mm_projector_type"),
    "other tower": (dict(vision_config={"model_type": "vit"}), "vision_config"),
    "image id beyond": (dict(image_token_index=9999), "9999"),
    "quantized": (dict(quantization_config={"quant_method": "awq"}), "quantization_config"),
    "head not tied": (dict(tie_word_embeddings=True), "lm_head"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "damaged": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors"),
    "damaged bin": (lambda f: instead(f, "pytorch_model.bin", "damaged"), "pytorch_model.bin"),
    "broken index": (lambda f: instead(f, "model.safetensors.index.json", "{"), "index.json"),
    "list for an index": (lambda f: instead(f, "model.safetensors.index.json", "[]"), "index"),
    "absent shard": (
        lambda f: instead(f, "model.safetensors.index.json", '{"weight_map": {"a": "gone"}}'),
        "gone",
    ),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(BIAS)), BIAS),
    "unexpected": (lambda f: change_tensors(f, lambda t: t.update(other=torch.ones(1))), "other"),
    "mis-shaped": (lambda f: change_tensors(f, lambda t: t.update({BIAS: t[BIAS][1:]})), BIAS),
}


def instead(folder, name, content):
    (folder / "model.safetensors").rename(folder / name).write_text(content)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_by_what_is_wrong(tmp_path, fault):
    folder, (change, named) = published(tmp_path), FAULTS[fault]
    if isinstance(change, dict):
        edit(folder / "config.json", **change)
    else:
        change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        llava.from_pretrained(folder)


def test_a_name_that_is_no_folder_is_refused(tmp_path):
    for name in ("nowhere", tmp_path / "no/such"):
        with pytest.raises(FileNotFoundError, match=f"--vision_tower {name}: no such folder here"):
            llava.resolve(name, "--vision_tower")


def test_a_tokenizer_that_cannot_be_read_is_named(good):
    with pytest.raises(ValueError, match=f"{good[0]}: its tokenizer cannot be read"):
        llava.open_tokenizer(good[0])


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_file_of_weights_is_not_run(tmp_path):
    torch.save({"weight": Code(tmp_path / "made")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        llava.open_weights(tmp_path)
    assert not (tmp_path / "made").exists()


# --- taken elsewhere ---


def test_the_lines_of_the_docstring_run(good, tmp_path, monkeypatch):
    lines = re.search(r"( +model = .*?)\n\n", llava.__doc__, re.DOTALL)[1]
    code = inspect.cleandoc(lines).replace("llava-hf/llava-1.5-7b-hf", str(good[0]))
    code = code.replace('"cuda"', '"cpu"').replace("[2])", "[2], max_new_tokens=3)")
    monkeypatch.chdir(tmp_path)
    names = dict(zip(("input_ids", "pixel_values", "labels", "attention_mask"), mixed_batch(299)))
    exec(code, vars(llava) | names)
    assert llava.from_pretrained(tmp_path / "out").config.image_token_id == IMAGE_ID


PASTED = """
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
decoder, projector = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50)), Projector("linear", 48, 32)
ids = [torch.tensor([1, 49, answer]) for answer in (7, 8)]
rows = [dict(input_ids=i, labels=i.where((i > 6) & (i < 49), -100), pixel_values=torch.randn(1, 3, 8, 8)) for i in ids]
batch = Collator(image_token_id=49, tokens_per_picture=4)(rows)
optimizer = torch.optim.AdamW([*decoder.parameters(), *projector.parameters()], lr=1e-2)
for _ in range(50):
    features = projector(nn.functional.unfold(batch["pixel_values"], 4, stride=4).mT)  # (N, 4, 32)
    text = decoder.get_input_embeddings()(batch["input_ids"])
    embeds = merge(text, features, batch["input_ids"] == 49)
    loss = decoder(inputs_embeds=embeds, labels=batch["labels"]).loss
    loss.backward(), optimizer.step(), optimizer.zero_grad()
print(loss.item())
"""


def test_projector_merge_and_collator_work_where_they_are_pasted(tmp_path):
    """Two rows of one text, whose answers hang on their pictures."""
    imports = (
        "import re, torch, torch.nn as nn\nfrom transformers import LlamaConfig, LlamaForCausalLM"
    )
    pasted = [inspect.getsource(x) for x in (llava.Projector, llava.merge, data.Collator)]
    command = [sys.executable, "-c", "\n".join([imports, *pasted, "torch.manual_seed(0)", PASTED])]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.1
