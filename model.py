"""LLaVA: a vision tower, a projector and a language model, joined by writing pictures into the text.

    pixel_values (N, 3, 336, 336) > vision_tower           (N, P, Dv)   CLIP's patches, last but one layer
                                  > multi_modal_projector  (N, P, D)    the small new part
    input_ids    (B, T)           > embeddings             (B, T, D)    of which N * P are <image> placeholders
                                    written over them      (B, T, D)
                                  > language_model         (B, T, D)
                                  > head, where a label is (S, V)       > loss

B batch, T tokens after each picture has become P of them, N pictures, P patches (576), S supervised positions,
D width of the language model, Dv of the tower, V vocabulary.

A model on disk is a Hugging Face LLaVA folder (llava-hf's layout): what transformers, vLLM and the rest read and write.

    python model.py build --vision_tower DIR --language_model DIR --out DIR
    python model.py build --tiny --out DIR
    python model.py chat  --model_name_or_path DIR --image FILE --prompt "What is this?"

Sources: LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744), github.com/haotian-liu/LLaVA, transformers' models/llava.
"""

import argparse
import copy
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlavaConfig,
                          PreTrainedConfig, TextStreamer)
from transformers.utils import logging as transformers_logging

IMAGE = "<image>"


# --- the three parts ---


class VisionTower(nn.Module):
    """(N, 3, S, S) > (N, P, Dv): CLIP's patch features behind layer `vision_feature_layer`, without the CLS token.

    LLaVA reads the last layer but one, so what lies behind it is never built: it would cost time, and as it gets no
    gradient it would trip everything that expects one.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        vision = copy.deepcopy(config.vision_config)
        vision.num_hidden_layers += 1 + config.vision_feature_layer
        tower = AutoModel.from_config(vision)
        self.vision_model = getattr(tower, "vision_model", tower)  # transformers has both layouts
        self.vision_model.post_layernorm = nn.Identity()
        self.first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values):
        return self.vision_model(pixel_values).last_hidden_state[:, self.first:]


class Projector(nn.Module):
    """(N, P, Dv) > (N, P, D): `linear`, or `mlpNx_gelu`, N linear layers with exact GELU between them."""

    def __init__(self, kind: str, width_in: int, width_out: int):
        super().__init__()
        match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
        if kind != "linear" and not match:
            raise ValueError(f"--mm_projector_type {kind}: offered are linear and mlpNx_gelu, as in mlp2x_gelu")
        for i in range(int(match[1]) if match else 1):
            self.add_module(f"linear_{i + 1}", nn.Linear(width_out if i else width_in, width_out))

    def forward(self, x):
        for i, linear in enumerate(self.children()):
            x = linear(F.gelu(x) if i else x)
        return x


def merge(embeds, features, is_image):
    """embeds (B, T, D) with features (N, P, D) written over the positions is_image (B, T), in order.

    Features beyond the placeholders are left out, but stay in the graph with zero gradients: see `Llava.embed`.
    """
    return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))  # (B, T, D)


class Llava(nn.Module):
    """The three parts under the names that they have on disk.

    `disk_dtypes` has the dtype that each tensor has on disk, `aside` the tensors that are never run (the tower's last
    layer and what follows); both only matter to `save_pretrained`.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        check_config(config)
        self.config = config
        self.vision_tower = VisionTower(config)
        kind = getattr(config, "mm_projector_type", "mlp2x_gelu")
        self.multi_modal_projector = Projector(kind, config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        # Greedy is greedy: nothing that a folder suggests (sampling, penalties) applies unless asked for.
        self.language_model.generation_config = GenerationConfig(pad_token_id=0)
        self.aside, self.disk_dtypes = {}, {}

    @property
    def tokens_per_picture(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1 - self.vision_tower.first

    def embed(self, input_ids, pixel_values):
        """(B, T, D): the text's embeddings, with each picture's features over its placeholders.

        A batch without a picture sends a blank one through tower and projector, for nothing: with many processes each
        must take the same path, and every weight that trains must get a gradient, if only zero.
        """
        is_image = input_ids == self.config.image_token_id
        if not len(pixel_values):
            vision = self.config.vision_config
            pixel_values = pixel_values.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
            assert not is_image.any(), f"{is_image.sum()} {IMAGE} ids, but no picture"
        else:
            assert is_image.sum() == len(pixel_values) * self.tokens_per_picture, (
                f"{is_image.sum()} {IMAGE} ids for {len(pixel_values)} pictures of {self.tokens_per_picture}")
        dtype = self.multi_modal_projector.linear_1.weight.dtype
        features = self.multi_modal_projector(self.vision_tower(pixel_values.to(dtype)))  # (N, P, D)
        return merge(self.language_model.get_input_embeddings()(input_ids), features, is_image)

    def forward(self, input_ids, pixel_values, labels):
        """The summed loss over positions that have a label, and how many of these were predicted right; both scalars.

        input_ids, labels (B, T), unshifted as everywhere outside the model; a label below 0 is none. The head runs
        where it is needed only: (S, V) logits, not (B, T, V).
        """
        hidden = self.language_model.base_model(
            inputs_embeds=self.embed(input_ids, pixel_values), use_cache=False).last_hidden_state  # (B, T, D)
        supervised = labels[:, 1:] >= 0  # position t predicts label t + 1
        logits = self.language_model.get_output_embeddings()(hidden[:, :-1][supervised]).float()  # (S, V)
        targets = labels[:, 1:][supervised]  # (S,)
        return F.cross_entropy(logits, targets, reduction="sum"), (logits.detach().argmax(-1) == targets).sum()

    @torch.no_grad()
    def generate(self, input_ids, pixel_values, attention_mask=None, **options):
        """New ids (B, at most max_new_tokens) from transformers' `generate`; rows padded on the left, with their mask."""
        return self.language_model.generate(inputs_embeds=self.embed(input_ids, pixel_values),
                                            attention_mask=attention_mask,
                                            suppress_tokens=[self.config.image_token_id], **options)


def check_config(config: LlavaConfig):
    """Refuses what this model would run differently from what the folder means."""
    wrong = [f"{name} {getattr(config, name)!r} (only {only} is known)" for name, known, only in (
        ("vision_feature_layer", lambda x: isinstance(x, int) and x < 0, "one negative number"),
        ("projector_hidden_act", lambda x: x == "gelu", "gelu"),
        ("multimodal_projector_bias", lambda x: x, "True"),
    ) if not known(getattr(config, name))]
    if wrong:
        raise ValueError(f"config.json: {wrong[0]}")


@torch.no_grad()
def check_head(language_model):
    """Refuses language models whose logits are more than a linear of their last hidden state (soft caps, scales)."""
    head = language_model.get_output_embeddings()
    ids = torch.arange(1, 5, device=head.weight.device)[None]
    out = language_model(input_ids=ids, output_hidden_states=True, use_cache=False)
    same = torch.allclose(out.logits.float(), head(out.hidden_states[-1]).float(), rtol=1e-3, atol=1e-3)
    if not same or head.bias is not None:
        raise ValueError(f"{language_model.config.model_type}: its logits are not a plain linear of its last hidden "
                         "state, so a LLaVA of it would differ from what it was trained as: take a model of Llama's kind")


# --- the model on disk ---


def resolve(name: str | Path, hint: str = "--model_name_or_path") -> Path:
    """The local folder of a model: a folder as it is, a hub id after downloading it."""
    if Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(name)) and not Path(name).parent.is_dir():
        return Path(snapshot_download(str(name), ignore_patterns=["*.msgpack", "*.h5", "*.ot", "*.md"]))
    raise FileNotFoundError(f"{hint} {name}: no such folder, nor a hub id like owner/name")


def open_weights(folder: Path) -> dict:
    """{name: tensor} of a folder's weights, mapped from the files: a tensor is read when it is used.

    Reads safetensors, and `pytorch_model*.bin` with `weights_only=True`, whole or in indexed shards.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            break
        if (folder / stem).is_file():
            files = [stem]
            break
    else:
        raise FileNotFoundError(f"{folder}: no model.safetensors, nor an index of shards, nor pytorch_model.bin")
    tensors = {}
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: listed in {index.name}, but not there")
        if name.endswith(".bin"):
            tensors |= torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged ({error})") from None
    return tensors


def canonical(name: str) -> str:
    """The name of a tensor as llava-hf's folders have it; newer ones leave out the tower's `vision_model.`."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def transformers_name(name: str) -> str:
    """The name in memory of transformers' LlavaForConditionalGeneration of a tensor or module of ours: PEFT's spelling."""
    table = ((r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model", "model.language_model"),
             (r"^vision_tower\.vision_model", "model.vision_tower"), (r"^multi_modal_projector", "model.multi_modal_projector"))
    for pattern, target in table:
        name = re.sub(pattern, target, name)
    return name


class EmptyOnMeta(TorchFunctionMode):
    """Inside, `torch.empty`, which is where layers get their weights, allocates nothing; buffers are computed as ever."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "meta"} if function is torch.empty else kwargs))


def load_weights(model: Llava, tensors: dict, where: str, dtype=None):
    """Fills `model` from {name: tensor}; names and shapes must match exactly, or a ValueError names the first that does not."""
    tensors = {canonical(name): tensor for name, tensor in tensors.items()}
    own = model.state_dict(keep_vars=True)
    first_unbuilt = model.vision_tower.vision_model.config.num_hidden_layers
    tied = model.config.text_config.tie_word_embeddings
    for name in list(tensors):
        layer = re.match(r"vision_tower\.vision_model\.(?:encoder\.layers\.(\d+)\.|post_layernorm|head\.)", name)
        if layer and (layer[1] is None or int(layer[1]) >= first_unbuilt):
            model.aside[name] = tensors.pop(name)
        elif re.search(r"(position_ids|inv_freq|masked_bias)$", name) or tied and name == "language_model.lm_head.weight":
            del tensors[name]
    missing = [name for name in own if name not in tensors and not (tied and name == "language_model.lm_head.weight")]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected:
        raise ValueError(f"{where}: {len(missing)} tensors are missing, {len(unexpected)} unexpected; the first is "
                         f"{(missing + unexpected)[0]} ({'missing' if missing else 'unexpected'})")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, config.json means {tuple(own[name].shape)}")
        model.disk_dtypes[name] = tensor.dtype
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor.to(dtype or tensor.dtype)))
    if tied:
        model.language_model.tie_weights()


def from_pretrained(folder: str | Path, dtype=None, device="cpu") -> Llava:
    """The model of a LLaVA folder, weights mapped from its files and cast to `dtype` last (None: as they are on disk).

    Raises FileNotFoundError or ValueError, in one line, where something is missing, unexpected or mis-shaped.
    """
    folder = resolve(folder)
    config = read_config(folder)
    if config.model_type != "llava":
        raise ValueError(f"{folder}: a {config.model_type} folder, not a LLaVA: make one with `python model.py build`")
    with EmptyOnMeta():
        model = Llava(config)
    load_weights(model, open_weights(folder), str(folder), dtype)
    rows = model.language_model.get_input_embeddings().num_embeddings
    if config.image_token_id >= rows:
        raise ValueError(f"{folder}: the id of {IMAGE} is {config.image_token_id}, but there are {rows} embeddings")
    check_head(model.language_model)
    return model.to(device)


def read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so no model folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}/config.json: {str(error).splitlines()[0]}") from None


def save_pretrained(model: Llava, out: Path, source: Path, chat_template: str | None = None, state: dict | None = None):
    """Writes a complete model folder: weights in the dtypes of the source, and its tokenizer and processor files.

    `state` {name: tensor} takes precedence over the model's own (an optimizer's fp32 masters, say). The folder is
    written beside `out` and renamed, so it is there whole or not at all.
    """
    out, source = Path(out), Path(source)
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"{out}: source and output are the same folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {**model.state_dict(), **(state or {})}
    if model.config.text_config.tie_word_embeddings:
        del tensors["language_model.lm_head.weight"]
    tensors = {name: tensor.detach().to(model.disk_dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    write_weights({**tensors, **model.aside}, part)
    write_config(model.config, part)
    copy_side_files(source, part)
    if chat_template:
        (part / "chat_template.jinja").write_text(chat_template)
    replace_folder(part, out)


def write_weights(tensors: dict, folder: Path, shard_size: str = "5GB"):
    """model.safetensors, or shards of it with an index above 5 GB."""
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=shard_size, filename_pattern="model{suffix}.safetensors")
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_config(config: LlavaConfig, folder: Path):
    """config.json, without the paths of this machine."""
    def strip(part):
        return {k: strip(v) if isinstance(v, dict) else v for k, v in part.items() if k != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(strip(json.loads(config.to_json_string())), indent=2) + "\n")


def copy_side_files(source: Path, target: Path):
    """Tokenizer, template, processor and generation files, byte for byte: saving a tokenizer anew can change it."""
    for path in source.iterdir():
        weights = re.search(r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf)$|\.index\.json$", path.name)
        if path.is_file() and not weights and path.name != "config.json" and path.stat().st_size < 1 << 28:
            shutil.copyfile(path, target / path.name)


def remove_folder(folder: Path):
    """Deletes a folder so that, cut short, it is not mistaken for a whole one: it is renamed first."""
    gone = folder.with_name(folder.name + ".old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def replace_folder(part: Path, out: Path):
    """Renames `part`, written whole, to `out`, whose earlier content goes away."""
    if out.exists():
        remove_folder(out)
    part.rename(out)


# --- commands ---


def build(vision_tower, language_model, out, kind="mlp2x_gelu", version="own", aspect_ratio="pad"):
    """Writes a LLaVA folder with a fresh projector from a CLIP folder and a language model's (or their hub ids).

    The tokenizer gets one new token, <image>; the embeddings never shrink, and grow only where its id needs it.
    """
    from data import ChatText

    vision_folder, text_folder = resolve(vision_tower, "--vision_tower"), resolve(language_model, "--language_model")
    vision_config, text_config = read_config(vision_folder), read_config(text_folder)
    vision_config = getattr(vision_config, "vision_config", vision_config)  # CLIP's folders have a text tower too
    if Path(out).exists():
        raise ValueError(f"--out {out}: exists already; name a new folder")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent, prefix=".build-") as work:
        tokenizer, image_token_id = add_image_token(text_folder, Path(work))
        text = ChatText(tokenizer, version)
        (Path(work) / "chat_template.jinja").write_text(tokenizer.chat_template)
        write_processor(vision_folder, vision_config, aspect_ratio, Path(work))
        generation = {"eos_token_id": text.stop_ids, "pad_token_id": tokenizer.pad_token_id}
        (Path(work) / "generation_config.json").write_text(json.dumps(generation, indent=2))
        tensors = {f"language_model.{name}": tensor for name, tensor in open_weights(text_folder).items()}
        for name, tensor in open_weights(vision_folder).items():
            if not re.match(r"text_model\.|text_projection|visual_projection|logit_scale|logit_bias", name):
                tensors["vision_tower." + name] = tensor
        text_config.vocab_size = grow_embeddings(tensors, image_token_id)
        config = LlavaConfig(
            vision_config=vision_config, text_config=text_config, image_token_index=image_token_id,
            image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
            tie_word_embeddings=text_config.tie_word_embeddings, pad_token_id=tokenizer.pad_token_id,
            architectures=["LlavaForConditionalGeneration"], dtype=text_config.dtype)
        if kind != "mlp2x_gelu":  # transformers knows no other, and would fill it with random weights in silence
            config.mm_projector_type, config.architectures = kind, [f"LlavaWith_{kind}"]
        projector = Projector(kind, vision_config.hidden_size, text_config.hidden_size)
        dtype = tensors["language_model.model.embed_tokens.weight"].dtype
        tensors |= {f"multi_modal_projector.{n}": t.to(dtype) for n, t in projector.state_dict().items()}
        with EmptyOnMeta():
            model = Llava(config)
        load_weights(model, tensors, f"{vision_folder} and {text_folder}")
        check_head(model.language_model)
        save_pretrained(model, Path(out), Path(work))
    return model


def add_image_token(source: Path, target: Path):
    """Writes the tokenizer of `source` with <image> as one token into `target`; (tokenizer, id of <image>).

    Saving a tokenizer can lose a setting and so change ids: what it encoded before it must encode after, or we stop.
    """
    before = AutoTokenizer.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    tokenizer.save_pretrained(target)
    lost = json.loads((source / "tokenizer_config.json").read_text()) if (source / "tokenizer_config.json").is_file() else {}
    saved = json.loads((target / "tokenizer_config.json").read_text())
    saved = {key: lost[key] for key in ("legacy", "add_prefix_space", "add_bos_token") if key in lost} | saved
    saved.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(saved, indent=2, ensure_ascii=False))
    after = AutoTokenizer.from_pretrained(target)
    probes = ["Hello, world!", " a  b\n\nc\t", "USER: x </s>y", "naïve 数字 1234 🙂", "".join(before.all_special_tokens) + " z"]
    for probe in probes:
        if before(probe).input_ids != after(probe).input_ids:
            raise ValueError(f"{source}: its tokenizer encodes {probe!r} differently once saved: not supported")
    ids = after(IMAGE, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{source}: {IMAGE} does not become a single token ({ids})")
    return after, ids[0]


def grow_embeddings(tensors: dict, image_token_id: int) -> int:
    """Adds rows (their mean) to embeddings and head only if the id of <image> lies beyond them; the number of rows."""
    name, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    if name not in tensors:
        raise ValueError(f"--language_model: no {name.removeprefix('language_model.')}; take a decoder of Llama's kind")
    rows = len(tensors[name])
    if image_token_id < rows:
        return rows
    more = -(-(image_token_id + 1) // 64) * 64 - rows  # up to a multiple of 64, for the head's matrix product
    for key in {name, head} & set(tensors):
        mean = tensors[key].float().mean(0, keepdim=True).to(tensors[key].dtype)
        tensors[key] = torch.cat([tensors[key], mean.expand(more, -1)])
    return rows + more


def write_processor(vision_folder: Path, vision_config, aspect_ratio: str, out: Path):
    """The files from which transformers' AutoProcessor prepares pictures just as data.py does."""
    size, found = vision_config.image_size, vision_folder / "preprocessor_config.json"
    given = json.loads(found.read_text()) if found.is_file() else {}
    pictures = {
        "image_processor_type": "LlavaImageProcessor" if aspect_ratio == "pad" else "CLIPImageProcessor",
        "do_pad": aspect_ratio == "pad", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": size},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": given.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),  # CLIP's
        "image_std": given.get("image_std", [0.26862954, 0.26130258, 0.27577711])}
    if aspect_ratio != "pad":
        del pictures["do_pad"]
    processor = {"processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": vision_config.patch_size,
                 "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    for name, content in (("preprocessor_config.json", pictures | {"processor_class": "LlavaProcessor"}),
                          ("processor_config.json", processor | {"image_processor": pictures})):
        (out / name).write_text(json.dumps(content, indent=2))


CHATML = ("{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
          "{%- endfor -%}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}")


def build_tiny(out: str | Path, words: list[str], seed: int = 0):
    """A LLaVA of under a million parameters in the real on-disk format: CLIP's and Qwen2's architectures, 576 tokens.

    It stands in for models that cannot be downloaded here. Real towers have learnt to see; this one is given edges,
    colours and places to begin with: low frequencies as patch filters, sines as positions. `words` is a text from
    which the tokenizer learns its vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent, prefix=".tiny-") as work:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        bpe.train_from_iterator(words, trainers.BpeTrainer(
            vocab_size=768, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(f"{work}/text")
        Qwen2ForCausalLM(Qwen2Config(
            vocab_size=bpe.get_vocab_size(), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
            initializer_range=0.05)).save_pretrained(f"{work}/text")
        tower = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=336,
            patch_size=14))
        see(getattr(tower, "vision_model", tower).embeddings)
        tower.save_pretrained(f"{work}/vision")
        build(f"{work}/vision", f"{work}/text", out)


@torch.no_grad()
def see(embeddings):
    """Sets CLIP's patch filters to low cosine frequencies for each colour, and its positions to sines and cosines."""
    filters, (width, side) = embeddings.patch_embedding.weight, (embeddings.embed_dim, embeddings.patch_size)
    grid = (torch.arange(side) + 0.5) / side
    order = sorted((i + j, i, j) for i in range(6) for j in range(6))[:width // 4]
    for k, (_, i, j) in enumerate(order):
        wave = torch.outer(torch.cos(torch.pi * i * grid), torch.cos(torch.pi * j * grid)) / side**2
        for colour in range(3):
            filters[3 * k + colour] = 0
            filters[3 * k + colour, colour] = wave
    positions, places = embeddings.position_embedding.weight, embeddings.image_size // side
    place = torch.arange(places) / places
    angles = torch.pi * torch.outer(place, 2.0 ** torch.arange(width // 16))  # (24, width / 16)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)                    # (24, width / 8)
    rows, columns = waves[:, None].expand(-1, places, -1), waves[None].expand(places, -1, -1)
    positions[1:] = 0
    positions[1:, -width // 4:] = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (576, width / 4)


def reply(model: Llava, text, messages: list[dict], pixels: list, streamer=None, **options) -> str:
    """The model's answer to a conversation [{role, content}] whose pictures are `pixels` [(3, S, S)]."""
    ids = torch.tensor(text.ids_and_labels(messages, prompt=True)[0])
    times = torch.where(ids == model.config.image_token_id, model.tokens_per_picture, 1)
    device = model.multi_modal_projector.linear_1.weight.device
    ids = ids.repeat_interleave(times)[None].to(device)  # (1, T)
    pictures = torch.stack(pixels).to(device) if pixels else torch.zeros(0, device=device)
    new = model.generate(ids, pictures, torch.ones_like(ids), eos_token_id=text.stop_ids, streamer=streamer, **options)
    return text.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def chat(args):
    """One answer on stdout with --prompt; else a conversation, its words printed as they come."""
    from data import ChatText, PictureTransform, decode_picture

    folder, cuda = resolve(args.model_name_or_path), torch.cuda.is_available()
    model = from_pretrained(folder, torch.bfloat16 if cuda else None, "cuda" if cuda else "cpu").eval()
    text, transform = ChatText(AutoTokenizer.from_pretrained(folder)), PictureTransform.from_pretrained(folder)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p}

    def load(file):
        if not Path(file).is_file():
            raise FileNotFoundError(f"--image {file}: no such file")
        return torch.from_numpy(transform(decode_picture(Path(file).read_bytes())))

    def ask(question, files, **more):
        pixels.extend([load(file) for file in files])
        content = question if IMAGE in question else f"{IMAGE}\n" * len(files) + question
        messages.append({"role": "user", "content": content})
        return reply(model, text, messages, pixels, **options, **more)

    messages, pixels, files = [], [], list(args.image)
    if args.prompt is not None:
        print(ask(args.prompt, files))
        return
    print("Ask; /image FILE shows the model a picture, an empty line ends.", file=sys.stderr)
    streamer = TextStreamer(text.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while line := read_line("> "):
        if line.startswith("/image "):
            files.append(line.removeprefix("/image ").strip())
            continue
        messages.append({"role": "assistant", "content": ask(line, files, streamer=streamer)})
        files = []


def read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="make a LLaVA folder from a vision tower and a language model")
    command.add_argument("--vision_tower", help="CLIP's folder, or hub id")
    command.add_argument("--language_model", help="the language model's folder, or hub id")
    command.add_argument("--out", required=True, help="folder to write to")
    command.add_argument("--mm_projector_type", default="mlp2x_gelu", help="linear, or mlpNx_gelu")
    command.add_argument("--version", default="own", choices=["v1", "llava_llama_2", "chatml_direct", "own"],
                         help="the chat template to save; own: the language model's")
    command.add_argument("--image_aspect_ratio", default="pad", choices=["pad", "square"], help="how pictures become square")
    command.add_argument("--tiny", action="store_true", help="make both parts on the spot, small and untrained")
    command = commands.add_parser("chat", help="talk to a model")
    command.add_argument("--model_name_or_path", required=True, help="a LLaVA folder, or hub id")
    command.add_argument("--image", nargs="*", default=[], help="pictures to begin with")
    command.add_argument("--prompt", help="one question; its answer, alone, goes to stdout")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_argument("--top_p", type=float, default=1.0, help="share of probability to sample from")
    command.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if args.command == "chat":
            chat(args)
        elif args.tiny:
            from data import toy_words
            build_tiny(args.out, toy_words())
        elif args.vision_tower and args.language_model:
            build(args.vision_tower, args.language_model, args.out, args.mm_projector_type, args.version,
                  args.image_aspect_ratio)
        else:
            raise ValueError("build needs --vision_tower and --language_model, or --tiny")
    except (ValueError, FileNotFoundError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
