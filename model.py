"""LLaVA: a vision tower, a projector and a language model; pictures are written into the text.

    pixel_values (N, 3, 336, 336) > vision_tower           (N, P, Dv)   CLIP's, last layer but one
                                  > multi_modal_projector  (N, P, D)    the small new part
    input_ids    (B, T)           > embeddings             (B, T, D)    N * P of the ids are <image>
                                  > merge                  (B, T, D)    pictures over those
                                  > language_model         (B, T, D)
                                  > head, where labelled   (S, V)       > loss

B rows, T tokens of the longest one once each picture has become P of them, N pictures in all rows,
P patches of a picture (576), S supervised positions, D width of the language model, Dv of the
tower, V vocabulary.

    model = from_pretrained("llava-hf/llava-1.5-7b-hf", torch.bfloat16, "cuda")
    loss, right = model(input_ids, pixel_values, labels)    # summed loss; how many it got right
    loss.backward()
    new_ids = model.generate(input_ids, pixel_values, attention_mask, eos_token_id=[2])
    save_pretrained(model, "out", source="llava-hf/llava-1.5-7b-hf")

A model on disk is a Hugging Face LLaVA folder (llava-hf's layout): what transformers, vLLM and the
rest read and write.

Sources: LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744), github.com/haotian-liu/LLaVA,
transformers' models/llava.
"""

import copy
import json
import re
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
)

IMAGE = "<image>"
DECODER = r"language_model\.(?!lm_head).+"  # paths of the layers that LoRA adapts and nf4 packs
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # a tower's number of CLS tokens


# --- the three parts, and how they meet ---


class VisionTower(nn.Module):
    """(N, 3, S, S) > (N, P, Dv): patches after layer `vision_feature_layer`, without CLIP's CLS.

    LLaVA reads layer -2. What stands behind it is never built: it would cost time and memory, and
    get no gradient.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        vision = copy.deepcopy(config.vision_config)
        vision.num_hidden_layers += 1 + config.vision_feature_layer  # -2: one layer less
        vision.vision_use_head = False  # SigLIP's pooling
        tower = AutoModel.from_config(vision)
        self.vision_model = getattr(tower, "vision_model", tower)  # transformers has both layouts
        self.vision_model.post_layernorm = nn.Identity()
        # "default" leaves CLIP's CLS out, which stands in front; "full" takes all: SigLIP has none.
        self.first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values):
        return self.vision_model(pixel_values).last_hidden_state[:, self.first :]


class Projector(nn.Sequential):
    """(N, P, Dv) > (N, P, D): `linear`, or `mlpNx_gelu`, N linears with exact GELU between them."""

    def __init__(self, kind: str, width_in: int, width_out: int):
        super().__init__()
        match = re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)
        if not match:
            raise ValueError(f"mm_projector_type {kind}: known are linear, mlp2x_gelu, mlp3x_gelu")
        self.add_module("linear_1", nn.Linear(width_in, width_out))
        for i in range(2, int(match[1] or 1) + 1):
            self.add_module(f"act_{i - 1}", nn.GELU())
            self.add_module(f"linear_{i}", nn.Linear(width_out, width_out))


def merge(embeds, features, is_image):
    """embeds (B, T, D) with features (N, P, D) written over where is_image (B, T), in order."""
    rows = features.flatten(0, 1).to(embeds.dtype)  # (N * P, D)
    assert is_image.sum() == len(rows), f"{is_image.sum()} places for {len(rows)} image features"
    return embeds.index_put((is_image,), rows)  # (B, T, D)


def cross_entropy(logits, targets):
    """The summed loss of logits (S, V) for targets (S,), and how many are predicted right."""
    right = (logits.argmax(-1) == targets).sum()
    return F.cross_entropy(logits.float(), targets, reduction="sum"), right


class Llava(nn.Module):
    """The three parts, under the names that they have on disk."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        kind = getattr(config, "mm_projector_type", "mlp2x_gelu")
        vision, text = config.vision_config, config.text_config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(kind, vision.hidden_size, text.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(text)
        # Greedy is greedy: nothing that a folder suggests (sampling, penalties) applies unasked.
        self.language_model.generation_config = GenerationConfig()
        self.cross_entropy = cross_entropy  # fast.py puts one in its place that needs less memory

    @property
    def tokens_per_picture(self) -> int:
        tower = self.vision_tower
        return tower.vision_model.embeddings.num_positions - tower.first

    def features(self, pixel_values):
        """(N, P, D): what the language model is shown of N pictures (N, 3, S, S).

        Without a picture a blank one goes through tower and projector, and its features are
        dropped. Under ZeRO-3 a process that calls a module waits until all others call it too, and
        would wait for ever; and every weight that trains must get a gradient, if only zero.
        """
        pictures = len(pixel_values)
        if not pictures:
            side = self.config.vision_config.image_size
            pixel_values = pixel_values.new_zeros(1, 3, side, side)
        # The tower's dtype may be another than the projector's.
        dtype = next(self.multi_modal_projector.parameters()).dtype
        return self.multi_modal_projector(self.vision_tower(pixel_values).to(dtype))[:pictures]

    def embed(self, input_ids, pixel_values):
        """(B, T, D): the text's embeddings, with each picture's features over its placeholders.

        In place of pixel_values it takes their `features` (N, P, D): one look at a picture will do
        for several questions about it.
        """
        features = pixel_values if pixel_values.dim() == 3 else self.features(pixel_values)
        embeds = self.language_model.get_input_embeddings()(input_ids)  # (B, T, D)
        return merge(embeds, features, input_ids == self.config.image_token_id)

    def forward(self, input_ids, pixel_values, labels):
        """The summed loss over labelled positions, and how many were predicted right; both scalars.

        input_ids, labels (B, T), unshifted as everywhere outside the model; a label below 0 is
        none. The head runs where it is needed only, (S, V) logits instead of (B, T, V), and once
        whatever S is: under ZeRO-3 a call is something that all ranks do together.
        """
        embeds = self.embed(input_ids, pixel_values)
        decoder, head = self.language_model.base_model, self.language_model.get_output_embeddings()
        hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state  # (B, T, D)
        supervised = labels[:, 1:] >= 0  # position t predicts label t + 1
        logits = head(hidden[:, :-1][supervised])  # (S, V)
        return self.cross_entropy(logits, labels[:, 1:][supervised])

    @torch.no_grad()
    def generate(self, input_ids, pixel_values, attention_mask, eos_token_id: list[int], **options):
        """New ids (B, at most max_new_tokens) from transformers' `generate`, greedy unless asked.

        Rows are padded on the left, with their mask. A row that ends before others do is filled up
        with the first of `eos_token_id`, which decoding skips; any other id may be a word.
        """
        return self.language_model.generate(
            inputs_embeds=self.embed(input_ids, pixel_values),
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id[0],
            suppress_tokens=[self.config.image_token_id],
            **options,
        )


# --- a model folder ---


def resolve(name: str | Path, hint: str = "--model_name_or_path") -> Path:
    """The local folder of a model: a folder as it is, a hub id after downloading it."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{hint} {name}: an adapter; name its base, and this as --adapter")
        if (folder / "final").is_dir():
            raise ValueError(f"{hint} {name}: a run's folder; its model is {folder / 'final'}")
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(name)) or Path(name).parent.is_dir():
        raise FileNotFoundError(f"{hint} {name}: no such folder here, nor a hub id like owner/name")
    others = "*.msgpack *.h5 *.ot *.md *.pth *.gguf original/* onnx/*".split()
    try:
        return Path(huggingface_hub.snapshot_download(str(name), ignore_patterns=others))
    except OSError as error:
        fault = f"no such folder, and the hub does not give it: {error}"
        raise FileNotFoundError(f"{hint} {name}: {fault}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError, naming the file, where there is none."""
    try:
        return {} | json.loads(path.read_text())  # a TypeError for a list
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None


def write_json(content: dict, path: Path):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_config(folder: Path):
    """A model folder's config.json, as the class of transformers that it names."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so no model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise nearly anything
        raise ValueError(f"{folder}/config.json: {error}") from None
    config.name_or_path = ""  # a path of this machine, which saving would write down
    return config


def open_tokenizer(folder: Path, adapter=None):
    """The tokenizer of a folder, with the template that an adapter was trained with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # it raises nearly anything
        raise ValueError(f"{folder}: its tokenizer cannot be read ({error})") from None
    if adapter and (path := Path(adapter) / "chat_template.jinja").is_file():
        tokenizer.chat_template = path.read_text()
    return tokenizer


# --- names of tensors ---

EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def canonical(name: str) -> str:
    """A tensor's name as llava-hf's folders have it; newer ones lack `vision_model.`."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def transformers_name(name: str) -> str:
    """A tensor's or module's name in LlavaForConditionalGeneration in memory: PEFT's spelling."""
    name = canonical(name)
    for ours, theirs in (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model", "model.language_model"),
        ("vision_tower.vision_model", "model.vision_tower"),
        ("multi_modal_projector", "model.multi_modal_projector"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def is_never_run(name: str, config: LlavaConfig) -> bool:
    """Whether a tensor belongs to what stands behind the tower's layer `vision_feature_layer`."""
    places = r"(?:encoder\.layers\.(\d+)|post_layernorm|head)"
    match = re.match(rf"vision_tower\.vision_model\.{places}\.", name)
    built = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
    return match is not None and (match[1] is None or int(match[1]) >= built)


def tidy(tensors: dict, config: LlavaConfig) -> dict:
    """The tensors of a folder by canonical names, less old buffers and a tied head's copy."""
    buffers = r".*(position_ids|inv_freq|masked_bias)"
    names = {canonical(name): name for name in tensors if not re.fullmatch(buffers, name)}
    tensors = {canonical_name: tensors[name] for canonical_name, name in names.items()}
    if config.tie_word_embeddings and HEAD in tensors and EMBEDDINGS in tensors:
        if torch.equal(tensors[HEAD], tensors[EMBEDDINGS]):
            del tensors[HEAD]
    return tensors


# --- loaded: names and shapes match exactly, weights are mapped from the file and cast last ---


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards that an index names."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return [folder / stem]
        if index.is_file():
            names = read_json(index)["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
    raise FileNotFoundError(f"{folder}: no model.safetensors, nor pytorch_model.bin, nor an index")


def open_weights(folder: Path) -> dict:
    """{name: tensor} of a folder's weights, mapped from its files: read when they are used."""
    files = weight_files(folder)
    return {name: tensor for file in files for name, tensor in open_weight_file(file).items()}


def open_weight_file(path: Path) -> dict:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both raise nearly anything
        raise ValueError(f"{path}: missing, damaged, or no weights ({error})") from None


class EmptyOnMeta(torch.overrides.TorchFunctionMode):
    """Inside, `torch.empty`, from which layers get their weights, allocates nothing.

    Buffers are computed as ever, which `with torch.device("meta")` would prevent.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **(kwargs or {}) | device)


def load_weights(model: Llava, tensors: dict, where: str, dtype=None, device="cpu", quantize=None):
    """Fills `model` from {name: tensor}, one by one, cast to `dtype` (None: as they are).

    `quantize(model, tensors=...)` may fill some layers its own way; it returns their paths.
    Raises ValueError unless `tensors` has just the model's names and shapes.
    """
    tensors = tidy(tensors, model.config)
    tensors = {name: t for name, t in tensors.items() if not is_never_run(name, model.config)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected[HEAD]
    names = sorted(found.keys() | expected.keys())
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} tensors differ from what config.json means; {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')} instead of {expected.get(wrong[0], 'absent')}"
        )
    for layer in quantize(model, tensors=tensors) if quantize else []:
        del tensors[f"{layer}.weight"]
        tensors.pop(f"{layer}.bias", None)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        # With `quantize` all are copied: one that stayed mapped would keep the whole file mapped.
        tensor = tensor.to(device, dtype or tensor.dtype, copy=quantize is not None)
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))
    if model.config.tie_word_embeddings:
        embeddings = model.language_model.get_input_embeddings()
        model.language_model.get_output_embeddings().weight = embeddings.weight


def check_config(config: LlavaConfig):
    """Refuses, by its name, an entry of config.json that is not supported."""
    tower, layer = config.vision_config, config.vision_feature_layer
    layers = tower.num_hidden_layers + 1  # with the embeddings
    act, bias = config.projector_hidden_act, config.multimodal_projector_bias
    image, words = config.image_token_id, config.text_config.vocab_size
    quantized = getattr(config, "quantization_config", None)
    is_layer = isinstance(layer, int) and -layers <= layer < 0
    for name, value, supported, expected in (
        ("vision_config", tower.model_type, tower.model_type in TOWERS, " or ".join(TOWERS)),
        ("vision_feature_layer", layer, is_layer, f"one number from -{layers} to -1"),
        ("projector_hidden_act", act, act == "gelu", "gelu"),
        ("multimodal_projector_bias", bias, bias, "True"),
        ("image_token_index", image, image < words, f"one of the {words} embeddings"),
        ("quantization_config", quantized, not quantized, "a folder in 16 or 32 bits"),
    ):
        if not supported:
            raise ValueError(f"config.json: {name} is {value!r}, supported is {expected}")


@torch.no_grad()
def check_head(language_model):
    """Refuses a language model whose logits are no plain linear of its last hidden state."""
    head = language_model.get_output_embeddings()
    ids = torch.arange(1, 5, device=head.weight.device)[None]
    out = language_model(input_ids=ids, output_hidden_states=True, use_cache=False)
    # Equal to the bit: a soft cap or scale hardly shows on the small logits of an untrained model.
    same = torch.equal(out.logits.float(), head(out.hidden_states[-1]).float())
    if not same or head.bias is not None:
        fault = "its logits are no plain linear of its last hidden state (a cap, scale or bias)"
        raise ValueError(f"{language_model.config.model_type}: {fault}: take one of Llama's kind")


def from_pretrained(folder: str | Path, dtype=None, device="cpu", quantize=None) -> Llava:
    """The model of a LLaVA folder or hub id, weights mapped from files and cast to `dtype` last.

    `dtype` None leaves them as they are on disk; `quantize`: see `load_weights`. Raises
    FileNotFoundError or ValueError where something is missing, unexpected or mis-shaped.
    """
    folder = resolve(folder)
    config = read_config(folder)
    if config.model_type != "llava":
        kind = config.model_type
        raise ValueError(f"{folder}: a {kind} folder, not a LLaVA: make one with build.py")
    check_config(config)
    with EmptyOnMeta():
        model = Llava(config)
    load_weights(model, open_weights(folder), str(folder), dtype, device, quantize)
    model.to(device)  # buffers
    check_head(model.language_model)
    return model


# --- saved ---


def write_model(tensors: dict, config: LlavaConfig, folder: Path, shard_size: str = "5GB"):
    """config.json, and model.safetensors, or shards of it with an index above 5 GB."""
    config.to_json_file(folder / "config.json", use_diff=True)
    split = huggingface_hub.split_torch_state_dict_into_shards(
        tensors, max_shard_size=shard_size, filename_pattern="model{suffix}.safetensors"
    )
    for name, keys in split.filename_to_tensors.items():
        shard, path = {key: tensors[key].contiguous() for key in keys}, folder / name
        path.touch()
        rights = path.stat().st_mode  # the umask's; safetensors makes files private
        safetensors.torch.save_file(shard, path, metadata={"format": "pt"})
        path.chmod(rights)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, folder / "model.safetensors.index.json")


def write_template(chat_template: str, folder: Path):
    """chat_template.jinja, and no other template where older folders have it."""
    (folder / "chat_template.jinja").write_text(chat_template)
    (folder / "chat_template.json").unlink(missing_ok=True)
    for path in (folder / "tokenizer_config.json", folder / "processor_config.json"):
        if path.is_file() and "chat_template" in (content := read_json(path)):
            del content["chat_template"]
            write_json(content, path)


PROCESSORS = {
    "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "square": {"image_processor_type": "CLIPImageProcessor"},
}


def write_aspect_ratio(aspect_ratio: str, folder: Path):
    """Has the processor files say how pictures become square."""
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        content = read_json(path) if path.is_file() else {}
        pictures = content.get("image_processor", content)
        if "image_mean" in pictures:
            pictures.pop("do_pad", None)
            pictures.update(PROCESSORS[aspect_ratio])
            write_json(content, path)


def copy_side_files(source: Path, target: Path):
    """Tokenizer, template, processor files ..., byte for byte: saving them anew can change them."""
    weights = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf)$|\.index\.json$")
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not weights.search(path.name):
            (target / path.name).write_bytes(path.read_bytes())


def save_pretrained(model, out, source, chat_template=None, state=None, aspect_ratio=None):
    """Writes the model into the folder `out`, like `source`, the folder that it was loaded from.

    That one gives the dtype of each tensor, the layers of the tower that are never run, and the
    tokenizer's and processor's files. `state` {name: tensor} takes precedence over the model's own
    tensors (an optimizer's fp32 masters, say), `chat_template` and `aspect_ratio` (pad, square)
    over the source's.
    """
    source, out = resolve(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    assert not out.samefile(source), f"{out} is mapped: it cannot be written to"
    trained, files = model.state_dict() | (state or {}), tidy(open_weights(source), model.config)
    lost = trained.keys() - files.keys() - ({HEAD} if model.config.tie_word_embeddings else set())
    assert not lost, f"{min(lost)} has no place in {source}: adapters are saved by lora.save"
    tensors = {}
    for name, old in files.items():
        tensors[name] = trained.get(name, old).detach().to("cpu", old.dtype)
        is_whole = tensors[name].shape == old.shape
        assert is_whole, f"{name} is {tuple(tensors[name].shape)}: in 4 bits, or sharded"
    write_model(tensors, model.config, out)
    copy_side_files(source, out)
    if chat_template:
        write_template(chat_template, out)
    if aspect_ratio:
        write_aspect_ratio(aspect_ratio, out)
