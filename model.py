"""LLaVA: a vision tower, a projector and a language model; pictures are written into the text.

    pixel_values (N, 3, 336, 336) > vision_tower           (N, P, Dv)   CLIP's, last layer but one
                                  > multi_modal_projector  (N, P, D)    the small new part
    input_ids    (B, T)           > embeddings             (B, T, D)    N * P ids are <image>
                                  > merge                  (B, T, D)    pictures over those
                                  > language_model         (B, T, D)
                                  > head, where labelled   (S, V)       > loss

B batch, T tokens after each picture has become P of them, N pictures, P patches (576), S supervised
positions, D width of the language model, Dv of the tower, V vocabulary.

A model on disk is a Hugging Face LLaVA folder (llava-hf's layout): what transformers, vLLM and the
rest read and write.

    python model.py build --vision_tower DIR --language_model DIR --out DIR
    python model.py build --tiny --out DIR
    python model.py chat  --model_name_or_path DIR --image FILE --prompt "What is this?"

Sources: LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744), github.com/haotian-liu/LLaVA,
transformers' models/llava.
"""

import copy
import functools
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    PreTrainedConfig,
    TextStreamer,
)
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import logging as transformers_logging

IMAGE = "<image>"
DECODER = r"language_model\.(?!lm_head).+"  # paths of the layers that LoRA adapts and nf4 packs
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # a tower's number of CLS tokens
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


# --- the three parts ---


class VisionTower(nn.Module):
    """(N, 3, S, S) > (N, P, Dv): patches after layer `vision_feature_layer`, without CLIP's CLS.

    LLaVA reads layer -2, so the last layer is never built: its output is not used, so it would cost
    time and get no gradient.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        vision = copy.deepcopy(config.vision_config)
        vision.num_hidden_layers += 1 + config.vision_feature_layer
        vision.vision_use_head = False  # SigLIP's pooling
        tower = AutoModel.from_config(vision)
        use_faster_attention(tower)
        self.vision_model = getattr(tower, "vision_model", tower)  # transformers has both layouts
        self.vision_model.post_layernorm = nn.Identity()
        self.first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values):
        return self.vision_model(pixel_values).last_hidden_state[:, self.first :]


class Projector(nn.Sequential):
    """(N, P, Dv) > (N, P, D): `linear`, or `mlpNx_gelu`, N linears with exact GELU between them."""

    def __init__(self, kind: str, width_in: int, width_out: int):
        super().__init__()
        match = re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)
        if not match:
            raise ValueError(
                f"mm_projector_type {kind}: known are linear and mlpNx_gelu, as in mlp2x_gelu"
            )
        self.add_module("linear_1", nn.Linear(width_in, width_out))
        for i in range(2, int(match[1] or 1) + 1):
            self.add_module(f"act_{i - 1}", nn.GELU())
            self.add_module(f"linear_{i}", nn.Linear(width_out, width_out))


def merge(embeds, features, is_image):
    """embeds (B, T, D) with features (N, P, D) written over positions is_image (B, T), in order.

    Features beyond the placeholders are left out, but stay in the graph with zero gradients: see
    `Llava.embed`.
    """
    return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))  # (B, T, D)


class Llava(nn.Module):
    """The three parts under the names that they have on disk.

    `disk_dtypes` has the dtype that each tensor has on disk, `aside` the tensors that are never run
    (the tower's last layer and what follows); both only matter to `save_pretrained`.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        check_config(config)
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(
            getattr(config, "mm_projector_type", "mlp2x_gelu"),
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        use_faster_attention(self.language_model)
        keep_less(self.language_model)
        # Greedy is greedy: nothing that a folder suggests (sampling, penalties) applies unasked.
        self.language_model.generation_config = GenerationConfig()
        self.aside, self.disk_dtypes = {}, {}

    @property
    def tokens_per_picture(self) -> int:
        tower = self.vision_tower
        return tower.vision_model.embeddings.num_positions - tower.first

    def features(self, pixel_values):
        """(N, 3, S, S) > (N, P, D): what the language model is shown of N pictures; of one that is
        blank where there are none.

        For then too tower and projector run: under ZeRO-3 a process that calls a module waits until
        all others call it, and every weight that trains must get a gradient, if only zero.
        """
        if not len(pixel_values):
            vision = self.config.vision_config
            pixel_values = pixel_values.new_zeros(1, 3, vision.image_size, vision.image_size)
        dtype = next(self.multi_modal_projector.parameters()).dtype  # the tower's may be another
        return self.multi_modal_projector(self.vision_tower(pixel_values).to(dtype))

    def embed(self, input_ids, pixel_values):
        """(B, T, D): the text's embeddings, with each picture's features over its placeholders.

        In place of pixel_values it takes their `features` (N, P, D), so that several questions
        about a picture cost one look at it.
        """
        is_image = input_ids == self.config.image_token_id
        assert is_image.sum() == len(pixel_values) * self.tokens_per_picture, (
            f"{is_image.sum()} {IMAGE} ids for {len(pixel_values)} pictures of "
            f"{self.tokens_per_picture}"
        )
        features = self.features(pixel_values) if pixel_values.dim() == 4 else pixel_values
        return merge(self.language_model.get_input_embeddings()(input_ids), features, is_image)

    def forward(self, input_ids, pixel_values, labels):
        """The summed loss over labelled positions, and how many were predicted right; both scalars.

        input_ids, labels (B, T), unshifted as everywhere outside the model; a label below 0 is
        none. The head runs where it is needed only, (S, V) logits instead of (B, T, V), and once
        whatever S is: under ZeRO-3 a call is something that all ranks do together.
        """
        hidden = self.language_model.base_model(
            inputs_embeds=self.embed(input_ids, pixel_values), use_cache=False
        ).last_hidden_state
        supervised = labels[:, 1:] >= 0  # position t predicts label t + 1
        hidden, targets = hidden[:, :-1][supervised], labels[:, 1:][supervised]  # (S, D), (S,)
        logits = self.language_model.get_output_embeddings()(hidden).float()  # (S, V)
        right = (logits.detach().argmax(-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), right

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


def check_config(config: LlavaConfig):
    """Refuses what this model would run differently from what the folder means."""
    tower, layer = config.vision_config, config.vision_feature_layer
    act, bias = config.projector_hidden_act, config.multimodal_projector_bias
    layers = tower.num_hidden_layers + 1  # with the embeddings
    for name, value, known, only in (
        ("vision_config", tower.model_type, tower.model_type in TOWERS, " or ".join(TOWERS)),
        (
            "vision_feature_layer",
            layer,
            isinstance(layer, int) and -layers <= layer < 0,
            f"one number from -{layers} to -1",
        ),
        ("projector_hidden_act", act, act == "gelu", "gelu"),
        ("multimodal_projector_bias", bias, bias, "True"),
    ):
        if not known:
            raise ValueError(f"config.json: {name} {value!r}, but only {only} is supported")


@torch.no_grad()
def check_head(language_model):
    """Refuses a language model whose logits are no plain linear of its last hidden state."""
    head = language_model.get_output_embeddings()
    ids = torch.arange(1, 5, device=head.weight.device)[None]
    out = language_model(input_ids=ids, output_hidden_states=True, use_cache=False)
    # Equal to the bit: a soft cap or scale hardly shows on the small logits of an untrained model.
    same = torch.equal(out.logits.float(), head(out.hidden_states[-1]).float())
    if not same or head.bias is not None:
        raise ValueError(
            f"{language_model.config.model_type}: its logits are no plain linear of its last "
            "hidden state (a soft cap, a scale or a bias), so a LLaVA of it would differ from what "
            "it was trained as: take a model of Llama's kind"
        )


# --- the same layers, faster or with less kept for the backward pass ---


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only gate and up.

    Autograd by itself keeps silu(gate) too, as wide as the MLP for each layer and token.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32, keeping only x.

    Autograd by itself keeps x and the normalised x in fp32 too, for each norm and token.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight), wide = ctx.saved_tensors, torch.promote_types(grad.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(length.square() / x.shape[-1] + ctx.eps)
        normed, dweight = x.to(wide, copy=True).mul_(scale), None
        if ctx.needs_input_grad[1]:
            dweight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        slope = grad.to(wide, copy=True).mul_(weight)
        along = (slope * normed).mean(-1, keepdim=True)  # the part that normalising takes out
        return slope.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), dweight, None


class CPUAttention(torch.autograd.Function):
    """torch's attention for CPUs, with a backward pass that is 1.5 times as fast in bf16.

    q (B, H, T, C), k and v (B, K, T, C): H heads of C channels share K heads of keys and values.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, causal):
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )  # log_sum (B, H, T): of the scores' exponentials
        ctx.save_for_backward(q, k, v, log_sum.to(q.dtype))
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """For 128 queries at a time, whose weights are computed again.

        Scores can be in the hundreds, where bf16 rounds to whole numbers. Less the logarithm of the
        sum of their exponentials they are near zero where they count, and softmax is the same.
        """
        (q, k, v, log_sum), wide = ctx.saved_tensors, torch.promote_types(grad.dtype, torch.float32)
        (rows, heads, length, _), groups = q.shape, (k.shape[1], -1)
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=wide) for x in (k, v))
        for row, start in itertools.product(range(rows), range(0, length, 128)):
            here = slice(start, min(start + 128, length))
            seen = slice(here.stop if ctx.causal else length)
            qi, gi, less = (
                x[row, :, here].unflatten(0, groups).flatten(1, 2)
                for x in (q, grad, log_sum[..., None])
            )  # (K, G * queries, C or 1)
            ki, vi = k[row, :, seen], v[row, :, seen]  # (K, keys, C)
            scores = torch.baddbmm(less, qi, ki.mT, beta=-1, alpha=ctx.scale)
            if ctx.causal:
                queries = here.stop - start
                later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
                scores.unflatten(1, (-1, queries))[..., start:].masked_fill_(later, -torch.inf)
            weights = scores.softmax(-1)
            dv[row, :, seen] += weights.mT @ gi
            gi = torch.ops.aten._softmax_backward_data(gi @ vi.mT, weights, -1, weights.dtype)
            dq[row, :, here] = (gi @ ki).view(heads, -1, q.shape[-1])
            dk[row, :, seen] += gi.mT @ qi
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype), None, None


def attend(module, q, k, v, attention_mask, scaling, dropout=0.0, is_causal=None, **options):
    """What transformers calls for attention: torch's own, but for training in bf16 on a CPU."""
    whole = attention_mask is None and q.shape[2] == k.shape[2] > 1 and not dropout
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not (trains and whole and q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return sdpa_attention_forward(
            module,
            q,
            k,
            v,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    out = CPUAttention.apply(q, k, v, scaling, module.is_causal if is_causal is None else is_causal)
    return out.transpose(1, 2).contiguous(), None  # (B, T, heads, C)


AttentionInterface.register("llava", attend)
AttentionMaskInterface.register("llava", sdpa_mask)


def use_faster_attention(model):
    """Has `attend` called where transformers chose torch's attention, in families whose attention
    is q, k, v, a mask and a scale. (Others look at its name, or add soft caps and sinks.)
    """
    known = model.config.model_type in (*TOWERS, "llama", "mistral", "qwen2", "qwen3")
    if known and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("llava")


def gated_mlp(self, x):
    """LlamaMLP's forward, by SwiGLU."""
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def rms_norm(self, x):
    """LlamaRMSNorm's forward; bf16 is rounded once, where transformers rounds before `weight` too.

    On a GPU torch has one kernel for it, and one for its gradient.
    """
    if x.is_cuda:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    return RMSNorm.apply(x, self.weight, self.variance_epsilon)


def body(module: type) -> tuple:
    """What a class computes: equal for those whose `forward` is the same text."""
    code = module.forward.__code__
    return code.co_code, code.co_names, code.co_consts


def keep_less(language_model):
    """Replaces MLPs and norms that compute just what Llama's do, of whatever family they are."""
    for module in language_model.modules():
        if body(type(module)) == body(LlamaRMSNorm):
            module.forward = types.MethodType(rms_norm, module)
        elif body(type(module)) == body(LlamaMLP) and isinstance(
            module.act_fn, (nn.SiLU, type(ACT2FN["silu"]))
        ):
            module.forward = types.MethodType(gated_mlp, module)


# --- the model on disk ---


def resolve(name: str | Path, hint: str = "--model_name_or_path") -> Path:
    """The local folder of a model: a folder as it is, a hub id after downloading it."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(name)) or Path(name).parent.is_dir():
        raise FileNotFoundError(f"{hint} {name}: no such folder here, nor a hub id like owner/name")
    try:
        return Path(
            snapshot_download(
                str(name),
                ignore_patterns=[
                    "*.msgpack",
                    "*.h5",
                    "*.ot",
                    "*.md",
                    "*.pth",
                    "*.gguf",
                    "original/*",
                    "onnx/*",
                ],
            )
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{hint} {name}: no such folder, and the hub does not give it: {one_line(error)}"
        ) from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError, naming the file, where there is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def read_config(folder: Path) -> PreTrainedConfig:
    """A model folder's config.json, as the class of transformers that it names."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so no model folder")
    read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise nearly anything
        raise ValueError(f"{folder}/config.json: {one_line(error)}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards that an index names."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return [folder / stem]
        if index.is_file():
            named = read_json(index).get("weight_map")
            named = named.values() if isinstance(named, dict) else [named]
            files = sorted({str(name) for name in named})
            absent = [name for name in files if not (folder / name).is_file()]
            if absent or not files:
                raise FileNotFoundError(f"{index}: names {absent or 'no file'}; that is not there")
            return [folder / name for name in files]
    raise FileNotFoundError(f"{folder}: no model.safetensors, nor pytorch_model.bin, nor an index")


def open_weights(folder: Path) -> dict:
    """{name: tensor} of a folder's weights, mapped from the files: read when it is used."""
    tensors = {}
    for path in weight_files(folder):
        try:
            found = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            )
            if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
                raise EOFError("not {name: tensor}")
            tensors |= found
        except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path}: damaged, or no weights ({one_line(error)})") from None
    return tensors


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


class EmptyOnMeta(TorchFunctionMode):
    """Inside, `torch.empty`, from which layers get their weights, allocates nothing.

    Buffers are computed as ever, which `with torch.device("meta")` would prevent.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **(kwargs or {}) | device)


def match_weights(model: Llava, tensors: dict, where: str) -> dict:
    """{name: tensor} of just the model's names and shapes; a ValueError names the first other one.

    What is never run goes to `model.aside`; old buffers and a second copy of a tied head go away.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {
        canonical(name): tensor
        for name, tensor in tensors.items()
        if not re.search(r"(position_ids|inv_freq|masked_bias)$", name)
    }
    built = model.vision_tower.vision_model.config.num_hidden_layers
    unused = r"vision_tower\.vision_model\.(?:encoder\.layers\.(\d+)|post_layernorm|head)\."
    for name in list(tensors):
        layer = re.match(unused, name)
        if layer and (layer[1] is None or int(layer[1]) >= built):
            model.aside[name] = tensors.pop(name)
    if model.config.tie_word_embeddings:
        del expected[HEAD]
        if HEAD in tensors and torch.equal(tensors[HEAD], tensors.get(EMBEDDINGS, torch.empty(0))):
            del tensors[HEAD]
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} tensors differ from what config.json means; {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')} instead of {expected.get(wrong[0], 'absent')}"
        )
    return tensors


def load_weights(model: Llava, tensors: dict, where: str, dtype=None, device="cpu", quantize=None):
    """Fills `model` from {name: tensor}, one by one, cast to `dtype` (None: as they are).

    `quantize(model, tensors=...)` may fill some layers its own way; it returns their paths.
    """
    tensors = match_weights(model, tensors, where)
    model.disk_dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    for layer in quantize(model, tensors=tensors) if quantize else []:
        tensors.pop(f"{layer}.weight"), tensors.pop(f"{layer}.bias", None)
    # Copies in 4 bits: one tensor still mapped would keep the whole file mapped.
    own = quantize is not None
    model.aside = {name: tensor.to(tensor.dtype, copy=own) for name, tensor in model.aside.items()}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        tensor = tensor.to(device, dtype or tensor.dtype, copy=own)
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))
    if model.config.tie_word_embeddings:
        embeddings = model.language_model.get_input_embeddings()
        model.language_model.get_output_embeddings().weight = embeddings.weight


def from_pretrained(folder: str | Path, dtype=None, device="cpu", quantize=None) -> Llava:
    """The model of a LLaVA folder, weights mapped from its files and cast to `dtype` last.

    `dtype` None leaves them as they are on disk; `quantize`: see `load_weights`. Raises
    FileNotFoundError or ValueError, in one line, where something is missing, unexpected or
    mis-shaped.
    """
    folder = resolve(folder)
    config = read_config(folder)
    if config.model_type != "llava":
        raise ValueError(
            f"{folder}: a {config.model_type} folder, not a LLaVA: make one with "
            "`python model.py build`"
        )
    if config.image_token_id >= config.text_config.vocab_size:
        raise ValueError(
            f"{folder}: the id of {IMAGE} is {config.image_token_id}, but there are "
            f"{config.text_config.vocab_size} embeddings"
        )
    try:
        with EmptyOnMeta():
            model = Llava(config)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{folder}/config.json: no LLaVA can be made of it ({error!r})") from None
    load_weights(model, open_weights(folder), str(folder), dtype, device, quantize)
    model.to(device)  # buffers
    check_head(model.language_model)
    return model


def save_pretrained(
    model: Llava,
    out: Path,
    source: Path,
    chat_template: str | None = None,
    state: dict | None = None,
    aspect_ratio: str | None = None,
):
    """Writes a new model folder: weights in the dtypes of the source, its tokenizer and processor.

    `state` {name: tensor} takes precedence over the model's own (an optimizer's fp32 masters, say),
    `aspect_ratio` (pad, square) over how the source makes pictures square.
    The folder is written beside `out` and renamed, so it is there whole or not at all.
    """
    out = check_new(out)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {**model.state_dict(), **(state or {})}
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    tensors = {
        name: tensor.detach().to("cpu", model.disk_dtypes.get(name, tensor.dtype))
        for name, tensor in tensors.items()
    }
    try:
        write_weights({**tensors, **model.aside}, part)
        write_json(
            json.loads(model.config.to_json_string(), object_hook=without_path),
            part / "config.json",
        )
        copy_side_files(Path(source), part)
        if chat_template:
            write_template(chat_template, part)
        if aspect_ratio:
            write_aspect_ratio(aspect_ratio, part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # not there any more if all went well


def without_path(config: dict) -> dict:
    """A part of config.json without the path of this machine that transformers puts into it."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def check_new(out: str | Path) -> Path:
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; name a new folder")
    return Path(out)


def write_weights(tensors: dict, folder: Path, shard_size: str = "5GB"):
    """model.safetensors, or shards of it with an index above 5 GB."""
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=shard_size, filename_pattern="model{suffix}.safetensors"
    )
    for name, keys in split.filename_to_tensors.items():
        path = folder / name
        path.touch()
        mode = path.stat().st_mode  # the umask's; safetensors makes files private
        save_file({key: tensors[key].contiguous() for key in keys}, path, metadata={"format": "pt"})
        path.chmod(mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, folder / "model.safetensors.index.json")


def write_json(content: dict, path: Path):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
            shutil.copyfile(path, target / path.name)


def open_model(folder: Path, adapter, bits: int, dtype, device, quant_storage=torch.uint8) -> Llava:
    """The model of a folder, with its decoder in 4 bits and with an adapter, where asked for."""
    import lora

    quantize = functools.partial(
        lora.quantize,
        target_modules=DECODER,
        compute_dtype=dtype or torch.float32,
        device=device,
        quant_storage=quant_storage,
    )
    model = from_pretrained(folder, dtype, device, quantize if bits == 4 else None)
    if adapter:
        lora.load(model, adapter, folder, transformers_name)
    return model


def open_tokenizer(folder: Path, adapter=None):
    """The tokenizer of a folder, with the template that an adapter was trained with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # it raises nearly anything
        raise ValueError(f"{folder}: its tokenizer cannot be read ({one_line(error)})") from None
    if adapter and (path := Path(adapter) / "chat_template.jinja").is_file():
        tokenizer.chat_template = path.read_text()
    return tokenizer


# --- commands ---


def build(vision_tower, language_model, out, kind="mlp2x_gelu", version="own", aspect_ratio="pad"):
    """Writes a LLaVA folder with a fresh projector from a CLIP folder and a language model's.

    Both may be hub ids. The tokenizer gets one new token, <image>; the embeddings never shrink, and
    grow only where its id needs it.
    """
    from data import ChatText

    check_new(out)
    vision_folder = resolve(vision_tower, "--vision_tower")
    text_folder = resolve(language_model, "--language_model")
    with tempfile.TemporaryDirectory() as work:
        tokenizer, image_token_id = add_image_token(text_folder, Path(work))
        text = ChatText(tokenizer, version)
        write_template(text.chat_template, Path(work))
        write_json(
            {"eos_token_id": text.stop_ids, "pad_token_id": tokenizer.pad_token_id},
            Path(work) / "generation_config.json",
        )
        model = join(vision_folder, text_folder, kind, image_token_id, tokenizer.pad_token_id)
        write_processor(vision_folder, model.config, aspect_ratio, Path(work))
        save_pretrained(model, out, Path(work))
    return model


def join(vision_folder: Path, text_folder: Path, kind: str, image_token_id: int, pad_token_id: int):
    """The model of a CLIP folder's and a language model's weights, and a fresh projector."""
    vision_config, text_config = read_config(vision_folder), read_config(text_folder)
    vision_config = getattr(vision_config, "vision_config", vision_config)  # CLIP has a text tower
    if vision_config.model_type not in TOWERS:
        raise ValueError(
            f"--vision_tower {vision_folder}: a {vision_config.model_type}; known are "
            f"{' and '.join(TOWERS)}"
        )
    has_cls = TOWERS[vision_config.model_type]
    tensors = {f"language_model.{name}": t for name, t in open_weights(text_folder).items()}
    tensors |= {
        f"vision_tower.{name}": t
        for name, t in open_weights(vision_folder).items()
        if not re.match(r"text_model|text_projection|visual_projection|logit_", name)
    }
    text_config.vocab_size = grow_embeddings(tensors, image_token_id)
    dtype = tensors[EMBEDDINGS].dtype
    projector = Projector(kind, vision_config.hidden_size, text_config.hidden_size).to(dtype)
    tensors |= {f"multi_modal_projector.{name}": t for name, t in projector.state_dict().items()}
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        dtype=dtype,
        vision_feature_select_strategy="default" if has_cls else "full",  # default: without CLS
        tie_word_embeddings=text_config.tie_word_embeddings,
        pad_token_id=pad_token_id,
        architectures=["LlavaForConditionalGeneration"],
    )
    if kind != "mlp2x_gelu":  # transformers would fill any other with random weights, in silence
        config.mm_projector_type, config.architectures = kind, [f"LlavaWith_{kind}"]
    with EmptyOnMeta():
        model = Llava(config)
    load_weights(model, tensors, f"{vision_folder} and {text_folder}")
    check_head(model.language_model)
    return model


def add_image_token(source: Path, target: Path):
    """(tokenizer, id of <image>): that of `source` with <image> as one token, saved in `target`.

    Saving a tokenizer can lose a setting and so change ids: what it encoded before it must encode
    after, or we stop.
    """
    before, tokenizer = (AutoTokenizer.from_pretrained(source) for _ in range(2))
    if "hello" not in before.decode(before("hello").input_ids):  # transformers made up an empty one
        raise ValueError(f"{source}: its tokenizer knows no words; is tokenizer.json missing?")
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    tokenizer.save_pretrained(target)
    old, path = source / "tokenizer_config.json", target / "tokenizer_config.json"
    old = read_json(old) if old.is_file() else {}
    lost = {key: old[key] for key in ("legacy", "add_prefix_space", "add_bos_token") if key in old}
    write_json(lost | read_json(path), path)
    after = AutoTokenizer.from_pretrained(target)
    for probe in (
        "Hello, world!",
        " a  b\n\nc\t",
        "USER: x </s>y",
        "naïve 数字 1234 🙂",
        "".join(before.all_special_tokens) + " z",
    ):
        if before(probe).input_ids != after(probe).input_ids:
            raise ValueError(
                f"{source}: its tokenizer encodes {probe!r} differently once saved: not supported"
            )
    ids = after(IMAGE, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{source}: {IMAGE} does not become a single token ({ids})")
    return after, ids[0]


def grow_embeddings(tensors: dict, image_token_id: int) -> int:
    """The rows of embeddings and head; adds some (their mean) if the id of <image> needs it."""
    if EMBEDDINGS not in tensors:
        raise ValueError(
            "--language_model: it has no model.embed_tokens.weight: take a decoder of Llama's kind"
        )
    rows = len(tensors[EMBEDDINGS])
    if image_token_id < rows:
        return rows
    more = 64 * (image_token_id // 64 + 1) - rows  # a multiple of 64 suits matrix products
    for key in {EMBEDDINGS, HEAD} & set(tensors):
        mean = tensors[key].float().mean(0, keepdim=True).to(tensors[key].dtype)
        tensors[key] = torch.cat([tensors[key], mean.expand(more, -1)])
    return rows + more


def write_processor(vision_folder: Path, config: LlavaConfig, aspect_ratio: str, out: Path):
    """The files from which transformers' AutoProcessor prepares pictures just as data.py does."""
    tower, found = config.vision_config, vision_folder / "preprocessor_config.json"
    size = tower.image_size
    given = read_json(found) if found.is_file() else {}
    if "image_mean" not in given and tower.model_type != "clip_vision_model":
        raise ValueError(f"{found}: names no image_mean, and only CLIP's is known")
    pictures = {
        **PROCESSORS[aspect_ratio],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": given.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),  # CLIP's
        "image_std": given.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
    }
    processor = {"processor_class": "LlavaProcessor"}
    write_json(pictures | processor, out / "preprocessor_config.json")
    write_json(
        processor
        | {
            "image_token": IMAGE,
            "patch_size": tower.patch_size,
            "num_additional_image_tokens": TOWERS[tower.model_type],
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_processor": pictures,
        },
        out / "processor_config.json",
    )


CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def build_tiny(out: str | Path, words: list[str], *options, seed: int = 0):
    """A LLaVA of 344,000 parameters in the real on-disk format: CLIP's and Qwen2's architectures,
    336 pixels, 576 tokens. It stands in for models that must be downloaded. `words` is a text from
    which its tokenizer learns a vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    check_new(out)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as work:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            words,
            trainers.BpeTrainer(
                vocab_size=512,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                show_progress=False,
            ),
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(f"{work}/text")
        shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
        Qwen2ForCausalLM(
            Qwen2Config(
                **shape,
                num_hidden_layers=2,
                num_key_value_heads=2,
                vocab_size=bpe.get_vocab_size(),
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                initializer_range=0.1,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ).save_pretrained(f"{work}/text")
        tower = CLIPVisionModel(
            CLIPVisionConfig(**shape, num_hidden_layers=3, image_size=336, patch_size=14)
        )
        give_sight(getattr(tower, "vision_model", tower))
        tower.save_pretrained(f"{work}/vision")
        build(f"{work}/vision", f"{work}/text", out, *options)


@torch.no_grad()
def give_sight(tower):
    """Gives a fresh CLIP, by hand, a little of what a real one has learnt.

    Patch filters are the mean of each colour and low cosine waves of brightness, positions are
    sines and cosines. The first layer's MLP adds how strong each wave is, whatever its sign; the
    second layer's attention adds the mean over patches that are not white, or have edges.
    """
    first, second, _ = tower.encoder.layers
    table, conv = tower.embeddings.position_embedding.weight, tower.embeddings.patch_embedding
    width, side = tower.embeddings.embed_dim, tower.embeddings.patch_size
    # The norm after the embeddings takes their scale away, but Adam's steps would soon wipe out
    # small ones: hence the 50.
    grid, count = (torch.arange(side) + 0.5) / side, width // 4
    conv.weight.zero_()
    conv.weight[range(3), range(3)] = 50 / side**2
    order = sorted((i + j, i, j) for i in range(6) for j in range(6))[1:count]
    for k, (_, *frequencies) in enumerate(order):
        waves = [torch.cos(torch.pi * f * grid) for f in frequencies]
        conv.weight[3 + k] = 50 / side**2 * torch.outer(*waves)
    places = tower.embeddings.image_size // side
    angles = torch.pi * torch.outer(torch.arange(places) / places, 2.0 ** torch.arange(width // 16))
    waves = 50 * torch.cat([angles.sin(), angles.cos()], dim=1)  # (24, width / 8)
    place = [waves[:, None].expand(-1, places, -1), waves[None].expand(places, -1, -1)]
    table[1:] = 0
    table[1:, -width // 4 :] = torch.cat(place, dim=-1).flatten(0, 1)  # (576, width / 4)

    eye, waves, strengths = torch.eye(width), slice(3, 2 + count), slice(20, 19 + count)
    first.mlp.fc1.weight[: 2 * count - 2] = 4 * torch.cat([eye[waves], -eye[waves]])
    first.mlp.fc2.weight[:, : 2 * count - 2] = eye[:, strengths].repeat(1, 2)
    look = second.self_attn
    for head, whiteness in enumerate([-0.4, -0.8]):  # the weaker one leaves room for amounts
        one = head * look.head_dim  # its query is a constant, its key says how white a patch is
        look.q_proj.weight[one], look.q_proj.bias[one] = 0, look.head_dim**0.5
        look.k_proj.weight[one], look.k_proj.weight[one, :3] = 0, whiteness
    look.k_proj.weight[0, strengths] = 0.8
    look.v_proj.weight.copy_(eye)
    look.out_proj.weight.copy_(eye)


def reply(model: Llava, text, messages: list[dict], pixels: list, **options) -> str:
    """The answer to a conversation [{role, content}] whose pictures are `pixels` [(3, S, S)]."""
    device = next(model.parameters()).device
    ids = torch.tensor(text.ids_and_labels(messages, prompt=True)[0], device=device)
    times = torch.where(ids == model.config.image_token_id, model.tokens_per_picture, 1)
    ids = ids.repeat_interleave(times)[None]  # (1, T)
    pictures = torch.stack(pixels).to(device) if pixels else torch.zeros(0, device=device)
    new = model.generate(ids, pictures, torch.ones_like(ids), text.stop_ids, **options)
    return text.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def load_picture(file: str, transform):
    """(3, S, S): the picture in a file, prepared; FileNotFoundError or ValueError names it."""
    from data import decode_picture

    try:
        return torch.from_numpy(transform(decode_picture(Path(file).read_bytes(), file)))
    except FileNotFoundError:
        raise FileNotFoundError(f"--image {file}: no such file") from None


def chat(args):
    """One answer on stdout with --prompt; else a conversation, its words printed as they come."""
    from data import ChatText, PictureTransform

    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100) or not 0 < args.top_p <= 1:
        raise ValueError(
            f"--temperature {args.temperature} --top_p {args.top_p}: a temperature is "
            "0, or from 0.01 to 100; top_p above 0, to 1"
        )
    folder, cuda = resolve(args.model_name_or_path), torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (None, "cpu")
    model = open_model(folder, args.adapter, args.bits, dtype, device).eval()
    text = ChatText(open_tokenizer(folder, args.adapter), args.version)
    transform = PictureTransform.from_pretrained(folder)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p}

    def ask(question, new, **more):
        question = question if IMAGE in question else f"{IMAGE}\n" * len(new) + question
        if question.count(IMAGE) != len(new):
            raise ValueError(f"{question.count(IMAGE)} {IMAGE} asked about, {len(new)} given")
        asked = [*messages, {"role": "user", "content": question}]
        answer = reply(model, text, asked, pixels + new, **options, **more)
        messages[:] = [*asked, {"role": "assistant", "content": answer}]
        pixels.extend(new)
        return answer

    messages, pixels, new = [], [], [load_picture(file, transform) for file in args.image]
    if args.prompt is not None:
        return print(ask(args.prompt, new))
    print("Ask; /image FILE shows the model a picture, an empty line ends.", file=sys.stderr)
    streamer = TextStreamer(text.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while line := read_line("> "):
        try:
            if line.startswith("/image "):
                new.append(load_picture(line.removeprefix("/image ").strip(), transform))
            else:
                ask(line, new, streamer=streamer)
                new = []
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)


def read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def parse(argv):
    from data import VERSIONS, Parser

    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="join a vision tower and a language model")
    add = command.add_argument
    add("--vision_tower", help="CLIP's or SigLIP's folder, or hub id")
    add("--language_model", help="the language model's folder, or hub id")
    add("--out", required=True, help="folder to write to")
    add("--mm_projector_type", default="mlp2x_gelu", help="linear, or mlpNx_gelu")
    templates = [version for version in VERSIONS if version != "plain"]
    add(
        "--version",
        default="own",
        choices=templates,
        help="the chat template to save; own: the language model's",
    )
    add(
        "--image_aspect_ratio",
        default="pad",
        choices=["pad", "square"],
        help="how pictures become square",
    )
    add("--tiny", action="store_true", help="make both parts on the spot, small and untrained")
    command = commands.add_parser("chat", help="talk to a model")
    add = command.add_argument
    add("--model_name_or_path", required=True, help="a LLaVA folder, or hub id")
    add("--adapter", help="an adapter that was trained on it")
    add("--version", default="own", choices=templates, help="the chat template; own: the folder's")
    add("--bits", type=int, choices=[16, 4], default=16, help="4: the decoder in nf4")
    add("--image", nargs="*", default=[], help="pictures to begin with")
    add("--prompt", help="one question; its answer, alone, goes to stdout")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top_p", type=float, default=1.0, help="share of probability to sample from")
    add("--max_new_tokens", type=int, default=512, help="tokens of an answer at most")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if args.command == "chat":
            chat(args)
            return 0
        options = args.mm_projector_type, args.version, args.image_aspect_ratio
        if args.tiny:
            if args.vision_tower or args.language_model:
                raise ValueError(
                    "--tiny makes both parts: leave --vision_tower and --language_model out"
                )
            from data import toy_words

            build_tiny(args.out, toy_words(), *options)
        elif args.vision_tower and args.language_model:
            build(args.vision_tower, args.language_model, args.out, *options)
        else:
            raise ValueError("build needs --vision_tower and --language_model, or --tiny")
    except (ValueError, OSError, SafetensorError) as error:
        print(f"model.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
