"""Merges an adapter into its base: W + scale * B A for each W that has one, without LoRA after.

    python merge.py --model_name_or_path DIR --adapter DIR --out DIR [--dequantize] [--verbose]

An adapter that was trained over 4 bits (QLoRA) never saw the weights on disk, but what nf4 made of
them. It can be merged into either:

    as it is        W' = W + scale * B A        brings back what nf4 had rounded away in training
    --dequantize    W' = nf4(W) + scale * B A   what was trained, rounded once to the dtype of W

The relative error that is printed is |W' - T| / |T|: W' (out, in) as written, T as trained.
"""

import shutil
import statistics
import sys
from pathlib import Path

import torch

import lora
import model
from cli import BOOLEAN, Parser, check_new, command, written


def merge_weight(weight, A, B, scale, quantized):
    """([merged as it is, and, where quantized, merged into nf4's values], the distance of each).

    weight (out, in), A (r, in), B (out, r); A and B are None for a layer without an adapter.
    """
    delta = 0.0 if A is None else scale * (B.float() @ A.float())  # (out, in)
    trained = merged = weight.float() + delta
    choices = [merged.to(weight.dtype)]
    if quantized:  # it was trained on nf4's values: both distances are to these
        device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU: 100 s per 10^9 weights
        nf4 = lora.nf4_linear(weight, device=device)
        trained = lora.dequantized(nf4).cpu().float() + delta
        choices.append(trained.to(weight.dtype))
    return choices, [((w.float() - trained).norm() / trained.norm()).item() for w in choices]


def check_base(base):
    file = base / "config.json"
    if file.is_file() and model.read_json(file).get("quantization_config"):
        raise ValueError(f"{file}: quantization_config: a base has to be in 16 or 32 bits here")
    first = model.weight_files(base)[0]
    if first.suffix == ".bin":
        raise ValueError(f"{first}: only safetensors are merged: save the base in that format")


def merge(base, adapter, out, rename=str, dequantize=False):
    """Writes the folder `out`: `base` with `adapter` merged into it, in the dtypes of `base`.

    Returns {layer: [distance as it is, and of a layer in 4 bits that with dequantize]}.
    Goes file by file, in fp32, and needs no model class. Raises ValueError, before anything is
    written, if the adapter is not for this base.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    check_base(base)
    config, tensors = lora.read_adapter(adapter, model.open_weights(base), rename)
    if dequantize and not config["quantized"]:
        raise ValueError(f"{adapter} was not trained over 4 bits: leave --dequantize out")
    scale = lora.scaling(config["r"], config["lora_alpha"], config["use_rslora"])
    distances = {}
    out.mkdir(parents=True)
    for file in model.weight_files(base):
        merged = model.open_weight_file(file)
        for name, weight in merged.items():
            path = rename(name)
            layer, quantized = path.removesuffix(".weight"), path in config["quantized"]
            A, B = (tensors.get(layer + key) for key in (lora.A_KEY, lora.B_KEY))
            if path in tensors:  # of a module that trained whole
                merged[name] = tensors[path].to(weight.dtype)
            elif A is not None or quantized:
                choices, distances[layer] = merge_weight(weight, A, B, scale, quantized)
                merged[name] = choices[-1] if dequantize else choices[0]
        lora.write_tensors(merged, out / file.name)
    copy_the_rest(base, adapter, out)
    return distances


def copy_the_rest(base, adapter, out):
    """Config, index, tokenizer and so on of the base; the template that the adapter learnt."""
    model.copy_side_files(base, out)
    for name in ("config.json", "model.safetensors.index.json"):
        if (base / name).is_file():
            shutil.copy(base / name, out)
    if (out / "model.safetensors").is_file():  # then an index beside it is another model's
        (out / "model.safetensors.index.json").unlink(missing_ok=True)
    template = adapter / "chat_template.jinja"
    if template.is_file():
        model.write_template(template.read_text(), out)


def summary(distances):
    return f"largest {max(distances):.1e}, mean {statistics.mean(distances):.1e}"


def report(distances, args):
    """One line of what was done; for an adapter trained over 4 bits, one for each choice."""
    if args.verbose:
        for layer, choices in distances.items():
            shown = [f"{distance:.1e}" for distance in choices]
            print(f"{layer}: {', '.join(shown)}")
    as_it_is = summary([choices[0] for choices in distances.values()])
    dequantized = summary([choices[-1] for choices in distances.values()])
    distance = dequantized if args.dequantize else as_it_is
    print(f"{args.out}: {len(distances)} layers; relative error of a weight: {distance}")
    if any(len(choices) > 1 for choices in distances.values()):
        print(f"  without --dequantize: onto the weights as they are on disk: {as_it_is}")
        print(f"  with --dequantize: onto what 4 bits made of them, as trained: {dequantized}")


@command
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the base model: a folder, or a hub's id")
    add("--adapter", required=True, help="folder of the adapter")
    add("--out", required=True, help="folder to write, a new one")
    add("--dequantize", **BOOLEAN, default=False, help="trained with --bits 4: onto nf4's weights")
    add("--verbose", **BOOLEAN, default=False, help="print each layer's distance, or both")
    args = parser.parse_args(argv)
    base = model.resolve(args.model_name_or_path)
    with written(check_new(args.out)) as out:
        distances = merge(base, args.adapter, out, model.transformers_name, args.dequantize)
    report(distances, args)


if __name__ == "__main__":
    sys.exit(main())
