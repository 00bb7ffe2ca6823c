r"""LoRA and QLoRA for the linear layers of any torch model, in PEFT's files.

    y = W x + b + scale * B A dropout(x)      W (out, in) frozen, A (r, in) and B (out, r) learnt
                                              scale = alpha / r, with rsLoRA alpha / sqrt(r)

Fine-tuning moves each W by a matrix of its own size. LoRA bets that this move has a low rank and
learns it as B A: r (in + out) numbers instead of in * out. After training, W + scale * B A is an
ordinary W again (merge.py). QLoRA is the same over a frozen base in 4 bits (nf4): half a byte for
each weight, and gradients pass through it on their way to adapters in full precision.

    base = fingerprint(dict(model.named_parameters()))  # as on disk: before `quantize`
    inject(model, r".*\.(q|v)_proj", r=16, alpha=32)    # all else is frozen
    ...                                                 # train: any loop, any optimizer
    save(model, "adapter", base)                        # PEFT loads it, as `load` loads PEFT's
    load(fresh, "adapter", dict(fresh.named_parameters()))    # another base is refused

Sources: LoRA arXiv:2106.09685, QLoRA arXiv:2305.14314, rsLoRA arXiv:2312.03732, the files
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import hashlib
import json
import logging
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# --- LoRA: this part needs only math, re and torch of the above, and nothing below ---


def scaling(r, alpha, use_rslora):
    return alpha / (math.sqrt(r) if use_rslora else r)


class LoRA(nn.Module):
    """What one frozen linear layer learns, added to what it computes."""

    def __init__(self, linear, r, alpha, dropout=0.0, use_rslora=False, dtype=None):
        super().__init__()
        # A 4-bit weight is stored as bytes; compute_dtype is what its layer computes in.
        dtype = dtype or getattr(linear, "compute_dtype", linear.weight.dtype)
        like = {"dtype": dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **like))  # so B A is 0
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # PEFT's; the paper says Gaussian
        self.dropout = nn.Dropout(dropout)
        self.scale = scaling(r, alpha, use_rslora)
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora

    def forward(self, x, y):
        """y + scale * B A dropout(x): x (..., in), and y (..., out) what the layer made of it."""
        h = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
        return y + (self.scale * F.linear(h, self.lora_B)).to(y.dtype)


def add_lora(linear, args, kwargs, y):
    return linear.lora(args[0] if args else kwargs["input"], y)


def is_linear(module):
    # nn.MultiheadAttention reads its out_proj's weight and never calls it: no adapter would act.
    uncalled = nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(module, nn.Linear) and not isinstance(module, uncalled)


def find_linears(model, pattern):
    """{path: layer} of the linear layers with own weights whose whole path matches `pattern`."""
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    own = dict(model.named_parameters())  # without a head's that is tied to the embeddings
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and f"{n}.weight" in own}
    found = {name: module for name, module in linears.items() if matches(name)}
    if not found:
        example = next(reversed(linears), "none")
        raise ValueError(f"{pattern!r} matches no linear layer's whole path (one is {example})")
    return found


def inject(model, target_modules, r, alpha, dropout=0.0, use_rslora=False, dtype=None):
    """Paths of the linear layers that now have an adapter: those that `find_linears` finds.

    All else is frozen; unfreeze afterwards what shall train whole. An adapter is a child module
    `lora` and a forward hook, so a layer keeps its class, its keys and its kernel, and nn.Linear
    and bitsandbytes' 4-bit one are adapted alike. dtype is that of A and B, by default the one in
    which the layer computes. NOTE: in bf16 an optimizer loses most of its small steps unless it
    keeps fp32 master weights, as train.py and DeepSpeed do; in a plain loop, say torch.float32.
    """
    linears = find_linears(model, target_modules)
    adapted = any(isinstance(module, LoRA) for module in model.modules())
    assert not adapted, "the model has adapters already: inject once, with one expression for all"
    model.requires_grad_(False)
    for name, linear in linears.items():
        linear.lora = LoRA(linear, r, alpha, dropout, use_rslora, dtype).train(linear.training)
        linear.register_forward_hook(add_lora, with_kwargs=True)
    return list(linears)


# --- QLoRA: the base in 4 bits ---


def nf4_linear(
    weight, bias=None, compute_dtype=torch.bfloat16, device="cpu", quant_storage=torch.uint8
):
    """A linear layer with its weight in nf4, the scales quantized too ("double quantization").

    The weight may be mapped from a file: it is read once, and only the packed one stays in memory.
    quant_storage is the dtype that packed bytes pass for: ZeRO-3 can shard bf16, but not uint8.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it suggests kernels for CPUs
    from bitsandbytes.nn import Linear4bit, Params4bit  # here: LoRA alone does without bitsandbytes

    nf4 = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": quant_storage}
    d_out, d_in = weight.shape
    layer = Linear4bit(d_in, d_out, bias is not None, compute_dtype, device="meta", **nf4)
    layer.weight = Params4bit(weight.detach(), requires_grad=False, module=layer, **nf4)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(compute_dtype, copy=True), requires_grad=False)
    # NOTE: on CPUs with AVX512-BF16 the first forward in eval mode would repack the weight for a
    # kernel with coarser scales and no backward: an evaluation would ruin the training after it.
    layer.support_avx512bf16_for_cpu = False
    return layer.to(device)  # this quantizes


def dequantized(layer):
    """The weight (out, in) that an nf4 layer computes with, in the dtype it was quantized from."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def quantize(model, target_modules, tensors, **options):
    """Paths of the linear layers that now are nf4 layers, with their weights from {name: tensor}.

    With the model on the meta device and tensors mapped from files, one weight at a time is read
    and packed, and the 16-bit model is never whole in memory. options: those of nf4_linear.
    """
    linears = find_linears(model, target_modules)
    for name, linear in linears.items():
        weight = tensors[f"{name}.weight"]
        bias = tensors[f"{name}.bias"] if linear.bias is not None else None
        model.set_submodule(name, nf4_linear(weight, bias, **options))
    return list(linears)


def is_nf4(parameter):
    return getattr(parameter, "quant_state", None) is not None


def true_shape(parameter):
    """The shape on paper, also of a parameter that nf4 packs or that DeepSpeed's ZeRO-3 shards."""
    if is_nf4(parameter):
        return tuple(parameter.quant_state.shape)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# --- which layers, how many ---


def paths_of(target_modules, inside):
    """A regular expression on whole paths for names as PEFT's users write them: "q_proj,v_proj".

    They mean the layers of those names whose path matches `inside`, where PEFT takes any, and
    "all-linear" means all of these. Anything else is taken as a regular expression.
    """
    if target_modules == "all-linear":
        return inside
    if not re.fullmatch("[A-Za-z0-9_]+(,[A-Za-z0-9_]+)*", target_modules):
        return target_modules
    return rf"(?=(?:{inside})\Z)(?:.*\.)?(?:{target_modules.replace(',', '|')})"


def count(parameters):
    return sum(math.prod(true_shape(p)) for p in parameters)


# --- the base, as {name: tensor} ---
#
# `rename`, from here on, maps the path of a module or tensor to the path that PEFT sees, where they
# differ. It rewrites only a prefix, and is idempotent. (`str` changes nothing.)


def fingerprint(tensors, rename=str):
    """A hash of name, shape and three rows of every matrix in {name: tensor}.

    Cheap for tensors that are mapped from files, and the same however they are cut into files, in
    any wider dtype, and with or without the buffers that some versions of transformers keep.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors, key=rename):
        tensor = tensors[name].detach()
        if tensor.is_floating_point() and tensor.ndim > 1:
            digest.update(f"{rename(name)} {tuple(tensor.shape)}".encode())
            rows = tensor[[0, len(tensor) // 2, -1]]
            digest.update(rows.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def ends_with(path, end):
    return f".{path}".endswith(f".{end}")


def base_shapes(tensors, rename):
    """{path: shape} of the base's {name: tensor}, without a head that is tied to the embeddings.

    A file may hold a tied head as a second copy of them; what counts is that they are equal.
    """
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    heads = [path for path in tensors if ends_with(path, "lm_head.weight")]
    embeddings = [path for path in tensors if ends_with(path, "embed_tokens.weight")]
    if heads and embeddings and torch.equal(tensors[heads[0]], tensors[embeddings[0]]):
        del tensors[heads[0]]
    return {path: true_shape(tensor) for path, tensor in tensors.items()}


# --- PEFT's files ---

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"  # (r, in), (out, r)
# PEFT's names of what `inject` takes, in its order, and what it means that one is missing.
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
# The entries of a config that can mean another formula than the one above, and where they do not.
OFF = [False, [], {}]
SUPPORTED = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],  # others change the base
    **dict.fromkeys(["use_dora", "lora_bias", "rank_pattern", "alpha_pattern"], OFF),
    **dict.fromkeys(["trainable_token_indices", "target_parameters", "layer_replication"], OFF),
    **dict.fromkeys(["alora_invocation_tokens", "kasa_config", "monteclora_config"], OFF),
}


def read_json(file):
    try:
        return {} | json.loads(file.read_text())  # a TypeError for a list
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None


def read_tensors(file):
    try:
        with safe_open(file, "pt") as opened:
            about = (opened.metadata() or {}).get("base", "{}")
            return {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(about)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def write_tensors(tensors, file, **metadata):
    file.touch()
    mode = file.stat().st_mode  # the umask's; safetensors makes files private
    save_file(tensors, file, metadata={"format": "pt", **metadata})
    file.chmod(mode)


def is_inside(path, modules):
    return path.startswith(tuple(f"{module}." for module in modules))


def adapter_keys(model, rename, modules_to_save):
    """{parameter name: key in PEFT's file, less the prefix} of all that an adapter holds."""
    keys = {}
    for name, _ in model.named_parameters():
        layer, is_lora, matrix = name.partition(".lora.")  # "...q_proj", ".lora.", "lora_A"
        if is_lora:
            keys[name] = f"{rename(layer)}.{matrix}.weight"
        elif is_inside(rename(name), modules_to_save):
            keys[name] = rename(name)
    return keys


def options_of(model):
    """What the adapters of a model have in common, under PEFT's names."""
    loras = [module for module in model.modules() if isinstance(module, LoRA)]
    options = {(m.r, m.alpha, m.dropout.p, m.use_rslora) for m in loras}
    assert len(options) == 1, f"an adapter has one r, alpha, dropout and scaling, not {options}"
    return dict(zip(DEFAULTS, options.pop()))


def save(model, out, base_hash=None, rename=str, modules_to_save=(), tensors=None, base_name=None):
    """Writes all that trains, in fp32, as an adapter: a folder with a config and the weights.

    base_hash is the fingerprint of the base, base_name what its user calls it, modules_to_save the
    paths of what trains whole; tensors {parameter name: tensor} replace the model's own.
    """
    modules_to_save = [rename(module) for module in modules_to_save]
    keys = adapter_keys(model, rename, modules_to_save)
    parameters = dict(model.named_parameters())
    tensors = parameters if tensors is None else tensors
    lost = [name for name, p in parameters.items() if p.requires_grad and name not in keys]
    assert not lost, f"{lost[0]} trains but is not saved: name its module in modules_to_save"
    for name in keys:
        whole = tuple(tensors[name].shape) == true_shape(parameters[name])
        assert whole, f"{name} is sharded: pass save the whole one in tensors"
    tensors = {key: tensors[name].detach().float().cpu() for name, key in keys.items()}
    unused = getattr(model, "unused_adapter", {})
    more = {key.rpartition(".")[0] for key in unused if ".lora_" not in key}
    modules_to_save += sorted(module for module in more if not is_inside(module, modules_to_save))
    tensors |= unused
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # Beside the weights, for PEFT would warn of entries in the config that it does not know.
    quantized = [rename(name) for name, p in parameters.items() if is_nf4(p)]
    base = json.dumps({"quantized": quantized, "base_fingerprint": base_hash})
    write_tensors({PREFIX + k: x for k, x in tensors.items()}, out / WEIGHTS, base=base)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "target_modules": [key.removesuffix(A_KEY) for key in tensors if key.endswith(A_KEY)],
        "modules_to_save": modules_to_save or None,
        **options_of(model),
        "bias": "none",
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_config(file):
    """An adapter's config with PEFT's defaults; ValueError names an entry that is not supported."""
    config = {entry: value for entry, value in read_json(file).items() if value is not None}
    for entry, value in config.items():
        if value not in SUPPORTED.get(entry, [value]):
            advice = "PEFT's merge_and_unload makes a whole model of such an adapter"
            raise ValueError(f"{file}: {entry} {value} is not supported; {advice}")
    return {**DEFAULTS, "target_modules": [], "modules_to_save": [], "quantized": [], **config}


def whole_paths(modules_to_save, shapes, file):
    """The whole paths of the modules in modules_to_save, where PEFT takes the end of a path too."""
    has_head = any(ends_with(path, "lm_head.weight") for path in shapes)
    known = {path[:i] for path in shapes for i, letter in enumerate(path) if letter == "."}
    whole = []
    for module in modules_to_save:
        if not has_head and module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            tied = "the head of this base is tied to its embeddings, and neither can change alone"
            raise ValueError(f"{file}: modules_to_save has {module}, but {tied}")
        whole += [module] if module in known else [p for p in known if ends_with(p, module)]
    return whole


def check_keys(tensors, shapes, config, folder):
    """Raises ValueError unless an adapter has just the keys and shapes for a base {path: shape}."""
    r, expected, targets = config["r"], {}, config["target_modules"]
    if isinstance(targets, str):
        targets = []  # a regular expression of PEFT's: which layers it meant, only the keys tell
    for path, shape in shapes.items():
        layer = path.removesuffix(".weight")
        if len(shape) == 2 and (layer in targets or layer + A_KEY in tensors):
            expected[layer + A_KEY] = (r, shape[1])
            expected[layer + B_KEY] = (shape[0], r)
        elif is_inside(path, config["modules_to_save"]):
            expected[path] = shape
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        layer = re.split(r"\.lora_|\.base_layer\.", key)[0]
        if key not in expected and layer != key:
            can = "which only a linear layer of this base other than its head can have"
            raise ValueError(f"{folder / CONFIG}: target_modules: {layer} has an adapter, {can}")
        if expected.get(key) != found.get(key):
            is_, should = found.get(key, "missing"), expected.get(key, "absent")
            raise ValueError(f"{folder}: {key} is {is_} instead of {should}, as this base wants it")


def read_adapter(folder, base=None, rename=str, model=None):
    """(config, {key less the prefix: tensor}) of an adapter for a base: {name: tensor} as on disk,
    a model, or both. Raises ValueError unless it has just the keys and shapes that this asks for.
    """
    folder, base = Path(folder), base or {}
    if not (folder / CONFIG).is_file():
        final = folder / "final"
        where = f"; there is one in {final}" if (final / CONFIG).is_file() else ""
        raise FileNotFoundError(f"--adapter {folder}: no {CONFIG}, so no adapter{where}")
    tensors, about = read_tensors(folder / WEIGHTS)
    config = read_config(folder / CONFIG) | about
    parameters = dict(model.named_parameters()) if model else {}
    shapes = base_shapes({**parameters, **base}, rename)
    config["modules_to_save"] = whole_paths(config["modules_to_save"], shapes, folder / CONFIG)
    tensors = {rename(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
    check_keys(tensors, shapes, config, folder)
    if not any(key.endswith(A_KEY) for key in tensors):
        raise ValueError(f"{folder / WEIGHTS}: no adapter of any layer in it")
    known, name = config.get("base_fingerprint"), config.get("base_model_name_or_path", "its base")
    if base and known and known != fingerprint(base, rename):
        advice = f"{name}, as it was before any adapter was merged into it"
        raise ValueError(f"{folder} was trained on other weights than this base's: on {advice}")
    return config, tensors


def load(model, adapter, base=None, rename=str, dtype=None):
    """Names of the parameters that an adapter, ours or PEFT's, has filled.

    Leaves the model as `save` found it: adapters and modules_to_save train, the rest is frozen.
    dtype is that of A and B, as in `inject`: files have fp32. base is {name: tensor} of the files
    that the model is from; an adapter that was trained on others is refused, and what it has for
    parts that the model leaves out goes to `model.unused_adapter`, from where `save` takes it.
    """
    config, tensors = read_adapter(adapter, base, rename, model)
    layers = [name for name, _ in model.named_modules() if rename(name) + A_KEY in tensors]
    options = [config[entry] for entry in DEFAULTS]
    adapted = inject(model, "|".join(map(re.escape, layers)), *options, dtype)
    assert adapted == layers, f"no adapter can act on {set(layers) - set(adapted)}: never called"
    keys = adapter_keys(model, rename, config["modules_to_save"])
    for name, key in keys.items():
        model.get_parameter(name).requires_grad_(True).data.copy_(tensors.pop(key))
    model.unused_adapter = {key: tensor.clone() for key, tensor in tensors.items()}
    return list(keys)
