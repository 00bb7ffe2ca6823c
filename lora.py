r"""LoRA and QLoRA for the linear layers of any torch model, saved in PEFT's format.

    y = W x + b + scale * B A dropout(x)      W (out, in) frozen, A (r, in) and B (out, r) learnt
                                              scale = alpha / r, with rsLoRA alpha / sqrt(r)

Fine-tuning moves each W by a matrix of its own size. LoRA bets that the move has a low rank, and
learns it as B A: r (in + out) numbers instead of in * out. A starts random and B at zero, so that
training starts from the base, bit for bit. When it is over, W + scale * B A is an ordinary W again
(`merge`). QLoRA is the same over a base kept in 4 bits (nf4), half a byte per weight: gradients
pass through the frozen 4-bit layers on their way to adapters in full precision.

    names = inject(model, r".*\.self_attn\.(q|k|v|o)_proj", r=16, alpha=32)
    ...                                                     # train: any loop, any optimizer
    save(model, "adapter")                                  # PEFT loads it, as `load` loads PEFT's
    load(base_model, "adapter")

    python lora.py merge --model_name_or_path DIR --adapter DIR --out DIR [--dequantize]

`rename`, below, maps the path of a module or tensor to the path that PEFT sees, if they differ. It
rewrites only a prefix, and is idempotent. (`str` changes nothing.)

Sources: LoRA arXiv:2106.09685, QLoRA arXiv:2305.14314, rsLoRA arXiv:2312.03732, and for the files
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# --- LoRA ---


def scaling(r, alpha, use_rslora):
    return alpha / (math.sqrt(r) if use_rslora else r)


class LoRA(nn.Module):
    """scale * B A dropout(x), what one linear layer learns; added to what it computes."""

    def __init__(self, linear, r, alpha, dropout, use_rslora, dtype=None):
        super().__init__()
        # A 4-bit weight is stored as bytes; compute_dtype is what its layer computes in.
        dtype = dtype or getattr(linear, "compute_dtype", linear.weight.dtype)
        like = {"dtype": dtype, "device": linear.weight.device}
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scale = scaling(r, alpha, use_rslora)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # PEFT's; the paper says Gaussian

    def forward(self, x, y):
        """y + scale * B A dropout(x): y (..., out) is the frozen layer's own output."""
        p, kind = self.dropout.p if self.training else 0.0, x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.lora_A.dtype
        tensors = (tensor.to(dtype) for tensor in (y, x, self.lora_A, self.lora_B))
        return AddProduct.apply(*tensors, self.scale / (1 - p), p).to(y.dtype)


class AddProduct(torch.autograd.Function):
    """y + scale * B A dropout(x), keeping x, A x and where dropout's zeros are.

    x is kept as it came, once for all layers that read it, and not once more with its zeros.
    Dropout's factor 1 / (1 - p) is in `scale`.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, scale, p):
        zeros = draw_zeros(x, p) if p else None
        h = put_zeros(x, zeros) @ A.T  # (tokens, r)
        ctx.save_for_backward(x, zeros, h, A, B)
        ctx.scale = scale
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.T, alpha=scale).view(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, zeros, h, A, B = ctx.saved_tensors
        dy = dy.contiguous()  # once, for here and for the layer itself
        dy2 = dy.view(-1, dy.shape[-1])
        dh = (dy2 @ B).mul_(ctx.scale)  # (tokens, r)
        dA, dB, dx = dh.T @ put_zeros(x, zeros), (dy2.T @ h).mul_(ctx.scale), None
        if ctx.needs_input_grad[1]:
            dx = (dh @ A).view(x.shape)
            if zeros is not None:
                dx.view(-1).index_fill_(0, zeros, 0)
        return dy, dx, dA, dB, None, None


def draw_zeros(x, p):
    """Indices into a flat x, each of its n numbers among them with probability p.

    -n ln(1 - p) are drawn, with replacement: all of them miss a number with probability
    (1 - 1 / n)^(-n ln(1 - p)) = 1 - p. For p = 5 % it takes 5 % of the random numbers of a mask,
    and 0.4 bytes for each number of x. A LoRA step on a CPU gets a tenth faster by it.
    """
    draws = round(-math.log1p(-p) * x.numel())
    return torch.randint(max(x.numel(), 1), (draws,), device=x.device)


def put_zeros(x, indices):
    """(tokens, width): a copy of x (..., width) with zeros there; x itself if indices is None."""
    x = x.reshape(-1, x.shape[-1])
    return x if indices is None else x.flatten().index_fill(0, indices, 0).view(x.shape)


def add_lora(linear, args, kwargs, y):
    return linear.lora(args[0] if args else kwargs["input"], y)


def inject(model, target_modules, r, alpha, dropout=0.0, use_rslora=False, dtype=None):
    """Paths of the linear layers that now have an adapter: all whose whole path matches the regular
    expression target_modules. The rest is frozen; unfreeze afterwards what shall train whole.

    An adapter is a child module `lora`, and a forward hook that adds its output. So a layer keeps
    its class, keys and kernel, and nn.Linear and bitsandbytes' 4-bit one are adapted alike. (Hooks
    also keep nn.TransformerEncoder off its fast path in eval mode, which calls no layer's forward.)
    dtype is that of A and B, by default the one in which the layer computes. NOTE: in bf16 an
    optimizer loses most of its small steps unless it keeps fp32 master weights, as train.py and
    DeepSpeed do; in a plain loop, say torch.float32.
    Raises ValueError if nothing matches, r < 1 or dropout is no share below 1.
    """
    if r < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"r is {r} and dropout {dropout}: the rank of LoRA is at least 1, and "
            "dropout from 0 to below 1"
        )
    linears = find_linears(model, target_modules)
    model.requires_grad_(False)
    for name, linear in linears.items():
        assert not hasattr(linear, "lora"), f"{name} has an adapter already"
        linear.lora = LoRA(linear, r, alpha, dropout, use_rslora, dtype)
        linear.register_forward_hook(add_lora, with_kwargs=True)
    return list(linears)


def find_linears(model, pattern):
    """{path: layer} of the linear layers whose whole path matches a regular expression."""
    try:
        match = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    linears = {
        name: module
        for name, module in model.named_modules()
        # The second is nn.MultiheadAttention's out_proj, whose forward is never called.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    found = {name: linear for name, linear in linears.items() if match(name)}
    if not found:
        example = next(reversed(linears), "none")
        raise ValueError(f"{pattern!r} matches no linear layer's whole path (one is {example})")
    return found


def fold(names):
    """Paths in a few lines, such as "32 x model.layers.*.self_attn.q_proj"."""
    counts = collections.Counter(re.sub(r"\d+", "*", name) for name in names)
    return "\n".join(f"{n} x {path}" for path, n in counts.items())


# --- QLoRA: the base in 4 bits ---


def nf4_linear(
    weight, bias=None, compute_dtype=torch.bfloat16, device="cpu", quant_storage=torch.uint8
):
    """A linear layer with its weight in nf4, the scales quantized too ("double quantization").

    The weight may be mapped from a file: it is read once, and only the packed one stays in memory.
    quant_storage is the dtype that packed bytes pass for: ZeRO-3 can shard bf16, but not uint8.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit  # here: LoRA alone does without bitsandbytes

    nf4 = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": quant_storage}
    (d_out, d_in), has_bias = weight.shape, bias is not None
    layer = Linear4bit(d_in, d_out, has_bias, compute_dtype, device="meta", **nf4)
    layer.weight = Params4bit(weight.detach(), requires_grad=False, module=layer, **nf4)
    if has_bias:
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
        assert weight.shape == linear.weight.shape, f"{name}: {weight.shape}, {linear.weight.shape}"
        model.set_submodule(name, nf4_linear(weight, bias, **options))
    return list(linears)


def is_nf4(parameter):
    return getattr(parameter, "quant_state", None) is not None


def true_shape(parameter):
    """The shape on paper, also of a parameter that nf4 packs or that DeepSpeed's ZeRO-3 shards."""
    if is_nf4(parameter):
        return tuple(parameter.quant_state.shape)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count(parameters):
    return sum(math.prod(true_shape(p)) for p in parameters)


# --- PEFT's files ---

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


KEYS = {  # of a config: what a missing one means, and what is right; the last two are ours
    "r": (8, lambda r: type(r) is int and r > 0),
    "lora_alpha": (8, lambda alpha: type(alpha) in (int, float) and math.isfinite(alpha)),
    "lora_dropout": (0.0, lambda p: type(p) in (int, float) and 0 <= p < 1),
    "use_rslora": (False, lambda flag: type(flag) is bool),
    "target_modules": ([], lambda names: isinstance(names, str) or are_names(names)),
    "modules_to_save": ([], are_names),
    "base_model_name_or_path": ("", lambda path: isinstance(path, str)),
    "quantized": ([], are_names),
    "base_fingerprint": ("", lambda digest: isinstance(digest, str)),
}  # fmt: skip
SUPPORTED = {  # What excludes the variants of LoRA that cannot be told from keys and shapes.
    "peft_type": ["LORA"],
    "init_lora_weights": [None, True, False, "gaussian"],  # PiSSA, LoftQ and such change the base
    "alpha_pattern": [None, {}],
    "alora_invocation_tokens": [None],
}


def save(model, out, base=None, rename=str, modules_to_save=(), tensors=None):
    """Writes all that trains, in fp32, as an adapter: a folder with a config and the weights.

    base: the folder of the base model, to record its fingerprint. modules_to_save: the paths of the
    modules that train whole. tensors: {parameter name: tensor} to write instead of the model's own.
    """
    modules_to_save = [rename(module) for module in modules_to_save]
    keys = adapter_keys(model, rename, modules_to_save)
    lost = [name for name, p in model.named_parameters() if p.requires_grad and name not in keys]
    assert not lost, f"{lost[0]} trains but is not saved: name its module in modules_to_save"
    config = peft_config(model, base, rename, modules_to_save)
    parameters = dict(model.named_parameters())
    tensors = parameters if tensors is None else tensors
    for name in keys:
        whole = tuple(tensors[name].shape) == true_shape(parameters[name])
        assert whole, f"{name} is sharded: pass save the whole one in tensors"
    tensors = {PREFIX + key: tensors[name].detach().float().cpu() for name, key in keys.items()}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, out / f"{WEIGHTS}.part")
    (out / f"{CONFIG}.part").write_text(json.dumps(config, indent=2) + "\n")
    for file in (WEIGHTS, CONFIG):  # whole or not at all, each
        (out / f"{file}.part").replace(out / file)


def peft_config(model, base, rename, modules_to_save):
    """What adapter_config.json says. The last three entries are ours, PEFT passes over them."""
    loras = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    options = {(m.r, m.alpha, m.dropout.p, m.use_rslora) for m in loras.values()}
    assert len(options) == 1, f"an adapter has one r, alpha, dropout and scaling, not {options}"
    r, alpha, dropout, use_rslora = options.pop()
    nf4 = [rename(name) for name, p in model.named_parameters() if is_nf4(p)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base and str(base),
        "target_modules": [rename(name).removesuffix(".lora") for name in loras],
        "modules_to_save": modules_to_save or None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "bias": "none",
        "bits": 4 if nf4 else 16,
        "quantized": nf4,
        "base_fingerprint": base and base_fingerprint(base, rename),
    }


def load(model, adapter, base=None, rename=str):
    """{parameter name: tensor as on disk} of an adapter, ours or PEFT's, that is now in the model.

    Leaves the model as `save` found it: adapters and modules_to_save train, the rest is frozen.
    Raises ValueError unless the adapter has just the keys and shapes that the model asks for and,
    where base is given, was trained on the model in that folder.
    """
    shapes = {rename(name): true_shape(p) for name, p in model.named_parameters()}
    config, tensors = read_adapter(adapter, shapes, base, rename)
    layers = [n for n, _ in model.named_modules() if f"{rename(n)}.lora_A.weight" in tensors]
    options = (config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora"))
    inject(model, "|".join(map(re.escape, layers)), *options)
    keys = adapter_keys(model, rename, config["modules_to_save"])
    for name, key in keys.items():
        model.get_parameter(name).requires_grad_(True).data.copy_(tensors[key])
    return {name: tensors[key] for name, key in keys.items()}


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


def read_adapter(folder, shapes, base, rename):
    """(config, {key less the prefix: tensor}) of an adapter for a base with {path: shape}."""
    folder = Path(folder)
    for file in (folder / CONFIG, folder / WEIGHTS):
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found: an adapter has {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not a JSON object")
    for key, values in SUPPORTED.items():
        if config.get(key) not in values:
            raise ValueError(f"{folder / CONFIG}: {key} {config.get(key)} is not supported")
    for key, (default, is_right) in KEYS.items():
        config[key] = default if config.get(key) is None else config[key]
        if not is_right(config[key]):
            raise ValueError(f"{folder / CONFIG}: {key} cannot be {config[key]!r}")
    config["modules_to_save"] = whole_paths(config["modules_to_save"], shapes)
    tensors = read_tensors(folder / WEIGHTS)
    tensors = {rename(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
    check_keys(tensors, shapes, config, folder)
    known = config["base_fingerprint"]
    if base and known and known != fingerprint(read_folder(base), rename):
        trained_on = config["base_model_name_or_path"]
        raise ValueError(
            f"{folder} was trained on other weights than those of {base}: "
            f"on {trained_on}, as it was before any adapter was merged into it"
        )
    return config, tensors


def whole_paths(modules, paths):
    """The whole paths of the modules in modules_to_save, where PEFT takes the end of a path too."""
    known = {path[:i] for path in paths for i, c in enumerate(path) if c == "."}
    whole = []
    for module in modules:
        ends_so = [path for path in known if f".{path}".endswith(f".{module}")]
        whole += [module] if module in known else ends_so
    return whole


def is_inside(path, modules):
    return path.startswith(tuple(f"{module}." for module in modules))


def check_keys(tensors, shapes, config, folder):
    """Raises ValueError unless an adapter has just the keys and shapes for a base {path: shape}."""
    r, targets = config["r"], config["target_modules"]
    if isinstance(targets, str):
        targets = []  # a regular expression of PEFT's: which layers it meant, only the keys tell
    expected = {}
    for path, shape in shapes.items():
        layer = path.removesuffix(".weight")
        if len(shape) == 2 and (layer in targets or f"{layer}.lora_A.weight" in tensors):
            expected[f"{layer}.lora_A.weight"] = (r, shape[1])
            expected[f"{layer}.lora_B.weight"] = (shape[0], r)
        elif is_inside(path, config["modules_to_save"]):
            expected[path] = shape
    for key in sorted(expected.keys() & tensors.keys()):
        shape = tuple(tensors[key].shape)
        if shape != expected[key]:
            raise ValueError(f"{folder}: {key} is {shape}, but {expected[key]} for this base")
    for key in sorted(expected.keys() ^ tensors.keys()):
        fault = "is missing" if key in expected else "has no place in this base"
        raise ValueError(f"{folder}: {key} {fault}")


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


@functools.cache
def base_fingerprint(folder, rename=str):
    """The fingerprint of a model folder, computed once: every checkpoint of a run records it."""
    return fingerprint(read_folder(folder), rename)


def read_folder(folder):
    """{name: tensor} of a model folder, mapped from its files: read from disk when touched."""
    return {k: v for file in weight_files(folder) for k, v in read_tensors(file).items()}


def weight_files(folder):
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no model.safetensors or model-*.safetensors (.bin "
            "files are not merged into)"
        )
    return files


def read_tensors(file):
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def write_tensors(tensors, file):
    file.unlink(missing_ok=True)  # of a process that died while it saved
    file.touch()
    mode = file.stat().st_mode  # the umask's; safetensors makes files private
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


# --- commands ---


def merge(base, adapter, out, rename=str, dequantize=False):
    """Writes the folder of base with W + scale * B A for each adapted W, in the dtype of W.

    Goes file by file, in fp32, and needs no model class. An adapter trained over nf4 (QLoRA) can be
    merged into the base as it is or, with dequantize, into the values that nf4 made of it; prints
    per layer how far either is from what was trained.
    Raises ValueError if the adapter is not for this base or out exists.
    """
    base, out = Path(base), Path(out)
    shapes = {rename(name): tuple(weight.shape) for name, weight in read_folder(base).items()}
    config, adapter_tensors = read_adapter(adapter, shapes, base, rename)
    if dequantize and not config["quantized"]:
        raise ValueError(f"{adapter} was not trained over 4 bits: leave --dequantize out")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: name a new folder")
    partial = out.with_name(f"{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in weight_files(base):
        tensors = read_tensors(file)
        for name, weight in tensors.items():
            tensors[name] = merge_tensor(rename(name), weight, config, adapter_tensors, dequantize)
        write_tensors(tensors, partial / file.name)
    for file in base.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pth", ".pt"):
            shutil.copy(file, partial)
    template = Path(adapter) / "chat_template.jinja"
    if template.is_file():  # the one that the adapter was trained with
        shutil.copy(template, partial)
        (partial / "chat_template.json").unlink(missing_ok=True)  # an older folder's
    partial.rename(out)


def merge_tensor(path, weight, config, adapter, dequantize):
    """What the merged model has in place of a tensor of the base."""
    if path in adapter:  # part of a module that trained whole
        return adapter[path].to(weight.dtype)
    layer = path.removesuffix(".weight")
    A, B = adapter.get(f"{layer}.lora_A.weight"), adapter.get(f"{layer}.lora_B.weight")
    quantized = path in config["quantized"]
    if A is None and not quantized:
        return weight
    scale = scaling(config["r"], config["lora_alpha"], config["use_rslora"])
    delta = 0.0 if A is None else scale * (B.float() @ A.float())  # (out, in)
    merged = (weight.float() + delta).to(weight.dtype)
    if not quantized:
        return merged
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU takes 100 s per billion weights
    trained = dequantized(nf4_linear(weight, device=device)).cpu().float() + delta
    merged_nf4 = trained.to(weight.dtype)
    off, off_nf4 = ((m.float() - trained).norm() / trained.norm() for m in (merged, merged_nf4))
    print(f"{layer}: off by {off:.1e} if merged as it is, by {off_nf4:.1e} with --dequantize")
    return merged_nf4 if dequantize else merged


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("merge", help="add an adapter to its base's weights").add_argument
    add("--model_name_or_path", required=True, help="the base model's folder, or hub id")
    add("--adapter", required=True, help="folder of the adapter")
    add("--out", required=True, help="folder to write, a new one")
    boolean = {"nargs": "?", "const": "True", "default": "False", "choices": ["True", "False"]}
    note = "for an adapter trained with --bits 4: add it to the weights as nf4 holds them"
    add("--dequantize", help=note, **boolean)
    args = parser.parse_args(argv)
    try:
        from model import resolve, transformers_name as rename  # names on disk > those PEFT sees
    except ImportError as error:
        if error.name != "model":
            raise
        resolve, rename = Path, str  # this file alone, in another project
    try:
        dequantize = args.dequantize == "True"
        merge(resolve(args.model_name_or_path), args.adapter, args.out, rename, dequantize)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.model_name_or_path} with {args.adapter} merged into it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
