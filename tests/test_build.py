"""build.py: what a LLaVA folder is made of, beside transformers, sentencepiece and the parts."""

import io
import json
import re

import pytest
import sentencepiece as spm
import torch
from PIL import Image
from tiny import (
    QUESTION,
    SENTENCES,
    SMALL,
    TEXT,
    TOKENIZERS,
    VISION,
    built,
    change_tensors,
    merges_of,
    parts,
    refused,
    sentencepiece,
    small_tokenizer,
    tensors_of,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    ViTConfig,
)

import build
import model as llava
from data import IMAGE, ChatText

ODD_TEXTS = (
    "  two  spaces\n\nand  lines ",
    "ünï 数 🙂",
    "USER: x </s>y",
    "A frog. </s>USER: x\n\ny",
)


# --- the tokenizer ---


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_the_same_once_the_tokenizer_is_saved(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path / "text")
    (tmp_path / "out").mkdir()
    saved = build.add_image_token(tmp_path / "text", tmp_path / "out")
    for text in (*ODD_TEXTS, f"{IMAGE}\nWhat <|im_end|>\n is  it?"):
        assert saved(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize(
    "family, tied, spare_rows",
    [("llama", False, 0), ("llama", True, 70), ("qwen2", True, 0), ("qwen2", False, 70)],
)
def test_embeddings_grow_only_for_the_image_token(tmp_path, family, tied, spare_rows):
    vision, text = parts(tmp_path, family, tied, spare_rows)
    model = build.build(vision, text, tmp_path / "llava", version="v1")
    before, after = tensors_of(text), tensors_of(tmp_path / "llava")
    tokenizer, old = AutoTokenizer.from_pretrained(tmp_path / "llava"), small_tokenizer(family)
    assert tokenizer(IMAGE, add_special_tokens=False).input_ids == [len(old)]
    assert model.config.image_token_id == len(old) and (llava.HEAD in after) == (not tied)
    for name in {llava.EMBEDDINGS, llava.HEAD} & set(after):
        rows, grown = before[name.removeprefix("language_model.")], after[name]
        assert torch.equal(grown[: len(rows)], rows)
        assert len(grown) == (len(rows) if spare_rows else 64 * (len(old) // 64 + 1))
        mean = rows.mean(0).expand(len(grown) - len(rows), -1)
        torch.testing.assert_close(grown[len(rows) :], mean)
    for sentence in (*SENTENCES[:3], *ODD_TEXTS):
        assert tokenizer(sentence).input_ids == old(sentence).input_ids


def as_vicuna_is_published(folder, legacy):
    """A language model's folder with sentencepiece's file, and the same tokenizer out of pieces."""
    file, options = io.BytesIO(), {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=file,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    content = file.getvalue()
    pieces = spm.SentencePieceProcessor(model_proto=content)
    config = LlamaConfig(**SMALL, vocab_size=len(pieces), num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(content)
    special = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = {
        key: {"__type": "AddedToken", "content": name, **special} for key, name in names.items()
    }
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": legacy, "pad_token": None}
    settings |= {
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = merges_of({piece: i for piece, i in ids.items() if i > 258})
    return sentencepiece("<unk>", legacy, (ids, merges)), pieces


@pytest.mark.parametrize("legacy", [False, True])
def test_vicunas_folder_gives_the_ids_of_its_tokenizer_json(tmp_path, legacy):
    vision, text = parts(tmp_path)[0], tmp_path / "vicuna"
    expected, pieces = as_vicuna_is_published(text, legacy)
    folder = tmp_path / "llava"
    build.build(vision, text, folder, version="v1")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for words in (*SENTENCES[:3], *ODD_TEXTS, "A chat.</s>USER: What? ASSISTANT:"):
        if legacy and words.startswith(" "):  # transformers puts no further space before it
            continue
        assert tokenizer(words).input_ids == expected(words).input_ids
        if "</s>" not in words and words == words.strip():
            assert tokenizer(words).input_ids == [1, *pieces.encode(words)]


@pytest.mark.parametrize("version", ["v1", "llava_llama_2"])
def test_one_start_token_in_one_step_and_in_two(tmp_path, version):
    vision, text = parts(tmp_path)[0], tmp_path / "vicuna"
    as_vicuna_is_published(text, False)
    build.build(vision, text, tmp_path / "llava", version=version)
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    picture = Image.new("RGB", (40, 30))
    parts_of_turn = [{"type": "text", "text": QUESTION}, {"type": "image", "image": picture}]
    said = [{"role": "user", "content": parts_of_turn}]
    options = {"add_generation_prompt": True}
    one = processor.apply_chat_template(said, tokenize=True, return_dict=True, **options)
    words = processor.apply_chat_template(said, tokenize=False, **options)
    two = processor(text=words, images=picture)
    ours = ChatText(processor.tokenizer).ids_and_labels(
        [{"role": "user", "content": f"{IMAGE}\n{QUESTION}"}], prompt=True
    )[0]
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    at = ours.index(image)
    ours[at : at + 1] = [image] * 4
    for ids in (ours, one["input_ids"][0], two["input_ids"][0]):
        assert list(ids) == ours and list(ids).count(1) == 1 == ids[0]


def test_a_tokenizer_that_transformers_would_make_up_is_refused(tmp_path, capsys):
    vision, text = parts(tmp_path)[0], tmp_path / "vicuna"
    as_vicuna_is_published(text, False)
    (text / "tokenizer_config.json").unlink()
    flags = ["--vision_tower", vision, "--language_model", text, "--out", tmp_path / "out"]
    assert "tokenizer.model without tokenizer_config.json" in refused(capsys, build, *flags)


def test_a_tokenizer_that_changes_when_saved_is_refused(tmp_path, monkeypatch):
    as_vicuna_is_published(tmp_path, legacy=True)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(build, "LOST_SETTINGS", ())
    with pytest.raises(ValueError, match="encodes 'USER: x </s>y' differently once saved"):
        build.add_image_token(tmp_path, tmp_path / "out")


# --- the parts ---


@pytest.mark.parametrize("form", ["bare", "with level", "with text tower", "bin", "sharded"])
def test_towers_in_every_form_keep_the_layer_never_run(tmp_path, form):
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
        if form == "bin":
            torch.save(level | buffer, vision / "pytorch_model.bin")
        else:
            tower.save_pretrained(vision, max_shard_size="20kB")
    model = build.build(vision, text, tmp_path / "llava").eval()
    prefix = "vision_tower.vision_model."
    saved = tensors_of(tmp_path / "llava")
    saved = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    assert saved.keys() == bare.keys() and all(torch.equal(saved[k], bare[k]) for k in bare)
    assert not any(re.search(r"layers\.2|post_layer", k) for k in model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.vision_tower(pixels), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config, more",
    [
        (Gemma2Config, {"head_dim": 8, "initializer_range": 0.02}),
        (CohereConfig, {}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (PhiConfig, {}),
    ],
)
def test_models_whose_logits_are_no_plain_linear_are_refused(tmp_path, capsys, config, more):
    vision, text = parts(tmp_path)
    config = config(**dict(SMALL, **more), num_key_value_heads=2, vocab_size=400, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(text)
    flags = ["--vision_tower", vision, "--language_model", text, "--out", tmp_path / "out"]
    assert config.model_type in refused(capsys, build, *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "vision"]


# --- the folder, and the command ---


@pytest.mark.parametrize(
    "family, tokens, pad",
    [
        ("llama", {}, "<unk>"),
        ("llama", {"pad_token": "</s>"}, "</s>"),
        ("llama", {"unk_token": None}, "</s>"),
        ("qwen2", {}, "<|endoftext|>"),
    ],
)
def test_folders_name_pad_and_end_tokens_and_one_template(tmp_path, family, tokens, pad):
    folder = built(tmp_path, family, **tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, generation, more = (
        json.loads((folder / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert tokenizer.pad_token == pad and config["pad_token_id"] == tokenizer.pad_token_id
    ends = {"eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    assert generation == ends and "chat_template" not in more
    content = [[{"type": "image"}, {"type": "text", "text": QUESTION}], f"{IMAGE}\n{QUESTION}"]
    as_parts, as_string = (
        tokenizer.apply_chat_template([{"role": "user", "content": c}], tokenize=False)
        for c in content
    )
    assert as_parts == as_string and QUESTION in as_string


def test_the_command_says_what_it_made_and_what_next(tmp_path, capsys):
    vision, text = parts(tmp_path)
    out = tmp_path / "my model"
    flags = ["--vision_tower", vision, "--language_model", text, "--mm_projector_type", "linear"]
    assert build.main([str(a) for a in (*flags, "--out", out)]) == 0
    said, saved = capsys.readouterr().out, tensors_of(out)
    for part in ("multi_modal_projector", "language_model"):
        count = sum(t.numel() for name, t in saved.items() if name.startswith(part))
        assert re.search(rf"{part} .* {count:,} weights in float32", said)
    assert "4 tokens for a picture of 28 x 28" in said and "clip_vision_model" in said
    assert f"--model_name_or_path '{out}'" in said and max(map(len, said.splitlines()[1:4])) < 80
    command = said.partition("next: ")[2].replace("\\\n", " ").split()
    assert command[:4] == ["python", "train.py", "--train_type", "projector"]


def test_the_lines_of_the_docstring_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vision, text = parts(tmp_path)
    line = re.search(r"^    (model = build\(.*)$", build.__doc__, re.M)[1]
    for source, name in (
        (vision, "openai/clip-vit-large-patch14-336"),
        (text, "Qwen/Qwen1.5-4B-Chat"),
    ):
        (tmp_path / name).parent.mkdir()
        source.rename(tmp_path / name)
    scope = {"build": build.build}
    exec(line, scope)
    assert scope["model"].tokens_per_picture == 4 and (tmp_path / "out/model/config.json").is_file()


def test_a_bad_call_is_one_line_and_leaves_nothing(tmp_path, capsys):
    vision, text = parts(tmp_path)
    AutoModel.from_config(ViTConfig(**VISION)).save_pretrained(text / "vit")
    flags, new = ["--vision_tower", vision, "--language_model", text, "--out"], tmp_path / "new"
    (text / "dangling").symlink_to(text / "nowhere")
    for argv, says in (
        ([*flags, text], "exists"),
        ([*flags, text / "dangling"], "exists"),
        ([*flags, new, "--mm_projector_type", "mlp"], "mm_projector_type mlp"),
        ([*flags, new, "--version", "plain"], "invalid choice: 'plain'"),
        (["--out", new], "--vision_tower, --language_model"),
        ([*flags, new, "--vision_tower", tmp_path / "nowhere"], "nowhere"),
        ([*flags, new, "--vision_tower", text / "vit"], "a vit; known are"),
        ([*flags, new, "--vision_tower", text], "a qwen2; known are"),
    ):
        assert says in refused(capsys, build, *argv)
    for missing, says in (
        (vision / "model.safetensors", "model.safetensors"),
        (text / "chat_template.jinja", "no chat template: name one with --version v1"),
        (text / "tokenizer.json", "tokenizer"),
    ):
        missing.unlink()
        assert says in refused(capsys, build, *flags, new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "vision"]


def test_a_tower_whose_mean_colour_is_unknown_is_refused(tmp_path):
    config = llava.read_config(built(tmp_path))
    config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="names no image_mean"):
        build.write_processor(tmp_path, config, "pad", tmp_path)


def test_a_decoder_without_embeddings_of_llamas_kind_is_refused():
    with pytest.raises(ValueError, match="no model.embed_tokens.weight"):
        build.grow_embeddings({}, 5)
