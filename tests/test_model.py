"""The model beside transformers' LlavaForConditionalGeneration, in memory and on disk."""

import gc
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    QUESTION,
    SMALL,
    VISION,
    built,
    change_tensors,
    edit,
    mixed_batch,
    parts,
    refused,
    small_tokenizer,
    tensors_of,
    theirs,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
)

import model as llava
from data import ChatText, PictureTransform


def gradients(model, *batches):
    """{name: gradient} of the summed loss over batches of (input_ids, pixel_values, labels)."""
    model.zero_grad()
    for batch in batches:
        model(*batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["saved by transformers", "as on the hub", "saved by us"])
@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True)])
def test_logits_loss_and_greedy_tokens_equal_transformers(tmp_path, family, tied, way):
    folder = built(tmp_path, family, tied=tied)
    if way != "saved by us":
        reference = theirs(folder)
        (folder / "model.safetensors").unlink()
        reference.save_pretrained(folder, max_shard_size="30kB")
    if way == "as on the hub":
        tensors = {
            re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v
            for k, v in tensors_of(folder).items()
        }
        for file in folder.glob("model*"):
            file.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference, model = theirs(folder), llava.from_pretrained(folder).eval()
    image = model.config.image_token_id
    ids, pixels, labels, mask = mixed_batch(image)
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels)
        logits = model.language_model(inputs_embeds=model.embed(ids, pixels)).logits
        loss, right = model(ids, pixels, labels)
    assert expected.logits.std() > 0.5  # not so small that anything is equal
    torch.testing.assert_close(logits[mask > 0], expected.logits[mask > 0], atol=1e-5, rtol=0)
    supervised = labels[:, 1:] >= 0
    assert abs(loss / supervised.sum() - expected.loss) < 1e-6
    assert right == (expected.logits.argmax(-1)[:, :-1] == labels[:, 1:])[supervised].sum()

    ids, pixels, _, mask = mixed_batch(image, "left")
    options = dict(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=[image],
    )
    free = reference.generate(**options)[:, ids.shape[1] :]
    eos = [free[0, 3].item(), free[1, 5].item()]
    expected = reference.generate(**options, eos_token_id=eos, pad_token_id=eos[0])
    new = model.generate(ids, pixels, mask, max_new_tokens=8, eos_token_id=eos)
    assert new.tolist() == expected[:, ids.shape[1] :].tolist() != free.tolist()


@pytest.mark.parametrize("family, aspect_ratio", [("llama", "square"), ("qwen2", "pad")])
def test_auto_processor_on_our_folders_gives_our_ids_and_pixels(tmp_path, family, aspect_ratio):
    folder = built(tmp_path, family, aspect_ratio=aspect_ratio)
    text, image_id = ChatText(AutoTokenizer.from_pretrained(folder)), len(small_tokenizer(family))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    expected = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    said = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    ids = torch.tensor(text.ids_and_labels(said, prompt=True)[0])
    ids = ids.repeat_interleave(torch.where(ids == image_id, 4, 1))
    assert ids.tolist() == expected["input_ids"][0].tolist() and (ids == image_id).sum() == 4
    transform = PictureTransform.from_pretrained(folder)
    pixels = transform(image)
    assert transform.aspect_ratio == aspect_ratio
    np.testing.assert_allclose(pixels, expected["pixel_values"][0].numpy(), atol=1e-5)


def test_scatter_equals_a_splice_by_hand_and_a_336_tower_has_576_patches(good):
    model = good[1]
    ids, pixels, _, _ = mixed_batch(model.config.image_token_id)
    table = model.language_model.get_input_embeddings()
    f = model.multi_modal_projector(model.vision_tower(pixels))
    assert f.shape == (3, 4, 32) and model.tokens_per_picture == 4
    rows = [
        table(ids[0]),
        torch.cat([table(ids[1, :1]), f[0], table(ids[1, 5:])]),
        torch.cat([table(ids[2, :1]), f[1], table(ids[2, 5:6]), f[2], table(ids[2, 10:])]),
    ]
    assert torch.equal(model.embed(ids, pixels), torch.stack(rows))
    with torch.device("meta"):
        config = LlavaConfig(vision_config=CLIPVisionConfig(**dict(VISION, image_size=336)))
        tower = llava.VisionTower(config)(torch.empty(1, 3, 336, 336))
    assert tower.shape == (1, 576, 32)


def test_every_weight_gets_a_gradient_and_rows_without_pictures_give_the_projector_zeros(good):
    model = good[1]
    ids, pixels, labels, _ = mixed_batch(model.config.image_token_id)
    found = gradients(model, (ids, pixels, labels))  # a missing gradient has no .clone()
    assert all(g.abs().max() > 0 for g in found.values())
    found = gradients(model, (ids[:1], pixels[:0], labels[:1]))
    assert all((g == 0).all() for k, g in found.items() if not k.startswith("language_model."))
    assert found["language_model.lm_head.weight"].abs().max() > 0
    found = gradients(model, (ids, pixels, torch.full_like(labels, -100)))
    assert all((g == 0).all() for g in found.values())


def test_padding_and_the_split_into_micro_batches_change_no_gradient(good):
    model = llava.from_pretrained(good[0], torch.float64)
    ids, pixels, labels, mask = mixed_batch(model.config.image_token_id)
    pixels = pixels.double()
    whole = gradients(model, (ids, pixels, labels))
    padded = gradients(
        model, (F.pad(ids, (0, 7), value=5), pixels, F.pad(labels, (0, 7), value=-100))
    )
    pictures = (pixels[:0], pixels[:1], pixels[1:])
    rows = [(i[m > 0][None], p, l[m > 0][None]) for i, p, l, m in zip(ids, pictures, labels, mask)]
    one_by_one = gradients(model, *reversed(rows))
    for name, gradient in whole.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-10, rtol=0)
        torch.testing.assert_close(one_by_one[name], gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind, count", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projectors_round_trip_and_only_mlp2x_gelu_is_named_as_transformers_does(
    tmp_path, kind, count
):
    folder = built(tmp_path, kind=kind)
    model, config = llava.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    saved = {k: v for k, v in tensors_of(folder).items() if k.startswith("multi_modal_projector")}
    x = expected = torch.randn(2, 4, 32)
    for i in range(1, count + 1):
        expected = F.linear(
            F.gelu(expected) if i > 1 else expected,
            *(saved.pop(f"multi_modal_projector.linear_{i}.{leaf}") for leaf in ("weight", "bias")),
        )
    assert torch.equal(model.multi_modal_projector(x), expected) and not saved
    assert (config["architectures"] == ["LlavaForConditionalGeneration"]) == (count == 2)


def test_projectors_have_the_published_numbers_of_parameters():
    for width, count in ((2560, 9_180_160), (4096, 20_979_712)):
        with torch.device("meta"):
            projector = llava.Projector("mlp2x_gelu", 1024, width)
        assert sum(p.numel() for p in projector.parameters()) == count


@pytest.mark.parametrize("form", ["bare", "with level", "with text tower", "bin", "sharded"])
def test_build_takes_towers_in_every_form_and_keeps_the_layer_it_never_runs(tmp_path, form):
    vision, text = parts(tmp_path)
    tower = CLIPVisionModel.from_pretrained(vision).eval()
    bare = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    level = {f"vision_model.{k}": v for k, v in bare.items()}
    if form in ("bare", "with level"):
        change_tensors(vision, lambda t: (t.clear(), t.update(bare if form == "bare" else level)))
    elif form == "with text tower":
        small = dict(SMALL, vocab_size=99)
        CLIPModel(CLIPConfig(vision_config=VISION, text_config=small)).save_pretrained(vision)
        change_tensors(vision, lambda t: t.update(level))
    else:
        (vision / "model.safetensors").unlink()
        buffer = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        torch.save(level | buffer, vision / "pytorch_model.bin") if form == "bin" else (
            tower.save_pretrained(vision, max_shard_size="20kB")
        )
    model = llava.build(vision, text, tmp_path / "llava").eval()
    prefix = "vision_tower.vision_model."
    saved = {
        k.removeprefix(prefix): v
        for k, v in tensors_of(tmp_path / "llava").items()
        if k.startswith(prefix)
    }
    assert saved.keys() == bare.keys() and all(torch.equal(saved[k], bare[k]) for k in bare)
    assert not any(re.search(r"layers\.2|post_layer", k) for k in model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.vision_tower(pixels), expected, atol=1e-6, rtol=0)


def test_a_saved_folder_is_the_loaded_one_to_the_bit_in_the_dtype_of_the_file(tmp_path):
    folder = built(tmp_path, dtype=torch.bfloat16)
    model, before = llava.from_pretrained(folder, torch.float32), tensors_of(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    new, old_umask = tmp_path / "new", os.umask(0o022)
    llava.save_pretrained(model, new, folder)
    os.umask(old_umask)
    after = tensors_of(new)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[k], after[k]) for k in before)
    for file in new.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file
        same = file.read_bytes() == (folder / file.name).read_bytes()
        assert same or file.suffix == ".safetensors", file
    masters = {"multi_modal_projector.linear_1.bias": torch.ones(32)}
    llava.save_pretrained(model, tmp_path / "trained", folder, state=masters)
    trained = tensors_of(tmp_path / "trained")
    assert [k for k in before if not torch.equal(before[k], trained[k])] == list(masters)


def test_parts_of_different_dtypes_work_together(tmp_path):
    vision, text = parts(tmp_path, dtype=torch.bfloat16)
    change_tensors(vision, lambda t: t.update({k: v.float() for k, v in t.items()}))
    model = llava.build(vision, text, tmp_path / "llava")
    assert torch.isfinite(model(*mixed_batch(model.config.image_token_id)[:3])[0])


def test_buffers_that_no_file_holds_equal_those_of_a_model_made_normally(tmp_path):
    folder = built(tmp_path, "llama", dtype=torch.bfloat16)
    ours = dict(llava.from_pretrained(folder).named_buffers())
    normal = dict(llava.Llava(LlavaConfig.from_pretrained(folder)).named_buffers())
    assert ours.keys() == normal.keys() and any("inv_freq" in k for k in ours)
    assert all(torch.equal(ours[k], b) and ours[k].dtype == b.dtype for k, b in normal.items())


def test_loading_maps_the_weights_and_does_not_copy_them(tmp_path):
    def private_megabytes():
        gc.collect()
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000

    folder = built(tmp_path, tied=True, spare_rows=800_000)  # 32 wide, fp32
    assert (folder / "model.safetensors").stat().st_size > 100e6
    before = private_megabytes()
    model = llava.from_pretrained(folder)
    assert private_megabytes() - before < 30 and next(model.parameters()).device.type == "cpu"


def test_the_image_token_is_never_generated(tmp_path):
    model = llava.from_pretrained(built(tmp_path)).eval()
    ids, pixels, _, mask = (x[-2:] for x in mixed_batch(model.config.image_token_id, "left"))
    ids, mask = ids[1:], mask[1:]
    with torch.no_grad():
        hidden = model.language_model.base_model(inputs_embeds=model.embed(ids, pixels))[0]
        head = model.language_model.lm_head
        head.weight[model.config.image_token_id] = 100 * hidden[0, -1]
        assert head(hidden[0, -1]).argmax() == model.config.image_token_id
    new = model.generate(ids, pixels, mask, max_new_tokens=5, eos_token_id=[3])
    assert not (new == model.config.image_token_id).any()


BIAS = "multi_modal_projector.linear_1.bias"

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
    "image id beyond": (dict(image_token_index=9999), "9999"),
    "head not tied": (dict(tie_word_embeddings=True), "lm_head"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "damaged": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors"),
    "damaged bin": (lambda f: instead(f, "pytorch_model.bin", "damaged"), "pytorch_model.bin"),
    "broken index": (lambda f: instead(f, "model.safetensors.index.json", "[]"), "index.json"),
    "odd index": (
        lambda f: instead(f, "model.safetensors.index.json", '{"weight_map": [1]}'),
        "index.json",
    ),
    "bin of numbers": (
        lambda f: (
            instead(f, "pytorch_model.bin", "") or torch.save({"a": 1}, f / "pytorch_model.bin")
        ),
        "pytorch_model.bin",
    ),
    "odd config": (dict(text_config=5), "config.json"),
    "no heads": (
        dict(vision_config={"model_type": "clip_vision_model", "num_attention_heads": 0}),
        "config.json",
    ),
    "odd tokenizer": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer"),
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
def test_a_faulty_model_folder_is_refused_in_one_line(good, tmp_path, capsys, fault):
    folder, (change, named) = shutil.copytree(good[0], tmp_path / "folder"), FAULTS[fault]
    edit(folder / "config.json", **change) if isinstance(change, dict) else change(folder)
    assert named in refused(capsys, "chat", "--model_name_or_path", folder, "--prompt", "hello")


def test_saving_refuses_what_exists_and_a_failed_save_leaves_nothing(good, tmp_path, monkeypatch):
    folder, model = good
    for out in (folder, folder / ".." / folder.name, tmp_path):
        with pytest.raises(ValueError, match="exists already"):
            llava.save_pretrained(model, out, folder)
    monkeypatch.setattr(llava, "copy_side_files", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llava.save_pretrained(model, tmp_path / "out", folder)
    assert not list(tmp_path.iterdir())


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_file_of_weights_is_not_run(tmp_path, capsys):
    made, file = tmp_path / "made", "pytorch_model.bin"
    vision, text = parts(tmp_path)
    (text / "model.safetensors").unlink()
    torch.save({"weight": Code(made)}, text / file)
    flags = ["--vision_tower", vision, "--language_model", text, "--out", tmp_path / "a"]
    assert file in refused(capsys, "build", *flags) and not made.exists()
