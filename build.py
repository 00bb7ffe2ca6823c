"""A LLaVA folder from a vision tower and a language model, with a fresh projector between them.

    CLIP's or SigLIP's folder    config, weights of the picture part     > vision_tower
    torch's random weights                                               > multi_modal_projector
    a language model's folder    config, weights, tokenizer, template    > language_model

    out/   config.json, model.safetensors    transformers' LlavaConfig; each part in its own dtype
           tokenizer.json ..                 the language model's, with one more token, <image>
           chat_template.jinja               takes a turn as a string and as a list of parts
           processor_config.json ..          how a picture becomes pixels

    model = build("openai/clip-vit-large-patch14-336", "Qwen/Qwen1.5-4B-Chat", "out/model")

    python build.py --vision_tower openai/clip-vit-large-patch14-336 \\
        --language_model lmsys/vicuna-7b-v1.5 --version v1 --out out/model

Sources: github.com/haotian-liu/LLaVA (llava/model/llava_arch.py), huggingface.co/llava-hf.
"""

import re
import shlex
import sys
from pathlib import Path

import torch
from transformers import LlavaConfig

import model as llava
from cli import Parser, check_new, command, written
from data import VERSIONS, ChatText
from model import IMAGE, read_json, write_json

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# Settings that transformers reads from a tokenizer's folder, and leaves out where it saves one.
LOST_SETTINGS = ("legacy", "add_prefix_space", "add_bos_token")
PROBES = ("Hello, world!", " a  b\n\nc\t", "USER: x </s>y", "naïve 数字 1234 🙂")


# --- the tokenizer ---


def read_tokenizer(folder: Path):
    """The tokenizer of a language model's folder, where transformers does not make one up."""
    files = {path.name for path in folder.iterdir()}
    if not files & {"tokenizer.json", "tokenizer_config.json"} and "tokenizer.model" in files:
        # It would encode without a start token, and without the space of the first word.
        raise ValueError(
            f"{folder}: tokenizer.model without tokenizer_config.json, which says how to use it: "
            "get that file from where the model is published"
        )
    tokenizer = llava.open_tokenizer(folder)
    if "hello" not in tokenizer.decode(tokenizer("hello").input_ids):
        raise ValueError(f"{folder}: its tokenizer knows no words: is tokenizer.json missing?")
    return tokenizer


def add_image_token(source: Path, out: Path):
    """Saves the tokenizer of `source` in `out`, with <image> as one new token; gives it back.

    Saving a tokenizer can lose a setting and so change ids: what it encoded before it must encode
    after, or we stop.
    """
    before, tokenizer = read_tokenizer(source), read_tokenizer(source)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    tokenizer.save_pretrained(out)
    old, path = source / "tokenizer_config.json", out / "tokenizer_config.json"
    old = read_json(old) if old.is_file() else {}
    lost = {key: old[key] for key in LOST_SETTINGS if key in old}
    write_json(lost | read_json(path), path)

    after = llava.open_tokenizer(out)
    for probe in (*PROBES, "".join(before.all_special_tokens) + " z"):
        if before(probe).input_ids != after(probe).input_ids:
            raise ValueError(
                f"{source}: its tokenizer encodes {probe!r} differently once saved: not supported"
            )
    ids = after(IMAGE, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{source}: {IMAGE} does not become a single token ({ids})")
    return after


# --- the weights ---


def grow_embeddings(tensors: dict, image_token_id: int) -> int:
    """The rows of embeddings and head; more of them only where the id of <image> is beyond.

    They never shrink, as what is published may have spare rows. A new row is the mean of the
    others: neither likely nor impossible from the start.
    """
    if llava.EMBEDDINGS not in tensors:
        raise ValueError(
            "--language_model: it has no model.embed_tokens.weight: take a decoder of Llama's kind"
        )
    rows = len(tensors[llava.EMBEDDINGS])
    if image_token_id < rows:
        return rows
    more = 64 * (image_token_id // 64 + 1) - rows  # a multiple of 64 suits matrix products
    for key in {llava.EMBEDDINGS, llava.HEAD} & set(tensors):
        mean = tensors[key].float().mean(0, keepdim=True).to(tensors[key].dtype)
        tensors[key] = torch.cat([tensors[key], mean.expand(more, -1)])
    return rows + more


def join(vision_folder: Path, text_folder: Path, kind: str, tokenizer):
    """(tensors, LlavaConfig) of a tower and a language model, with a fresh projector."""
    vision, text = llava.read_config(vision_folder), llava.read_config(text_folder)
    vision = getattr(vision, "vision_config", vision)  # CLIP's folder has a text tower, too
    if vision.model_type not in llava.TOWERS:
        known = " and ".join(llava.TOWERS)
        raise ValueError(
            f"--vision_tower {vision_folder}: a {vision.model_type}; known are {known}"
        )
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    tensors = {f"language_model.{name}": t for name, t in llava.open_weights(text_folder).items()}
    for name, tensor in llava.open_weights(vision_folder).items():
        if not re.match(r"text_model|text_projection|visual_projection|logit_", name):
            tensors[f"vision_tower.{name}"] = tensor
    text.vocab_size = grow_embeddings(tensors, image_token_id)
    dtype = tensors[llava.EMBEDDINGS].dtype
    projector = llava.Projector(kind, vision.hidden_size, text.hidden_size).to(dtype)
    tensors |= {f"multi_modal_projector.{name}": t for name, t in projector.state_dict().items()}

    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="default" if llava.TOWERS[vision.model_type] else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
        architectures=["LlavaForConditionalGeneration"],
    )
    if kind != "mlp2x_gelu":  # transformers would fill any other with random weights, in silence
        config.mm_projector_type, config.architectures = kind, [f"LlavaWith_{kind}"]
    return llava.tidy(tensors, config), config


# --- the folder ---


def write_processor(vision_folder: Path, config: LlavaConfig, aspect_ratio: str, out: Path):
    """The files from which transformers' AutoProcessor prepares pictures just as data.py does."""
    tower, found = config.vision_config, vision_folder / "preprocessor_config.json"
    given = read_json(found) if found.is_file() else {}
    if "image_mean" not in given and tower.model_type != "clip_vision_model":
        raise ValueError(f"{found}: names no image_mean, and only CLIP's is known")
    pictures = llava.PROCESSORS[aspect_ratio] | {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": tower.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": tower.image_size, "width": tower.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": given.get("image_mean", CLIP_MEAN),
        "image_std": given.get("image_std", CLIP_STD),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": tower.patch_size,
        "num_additional_image_tokens": llava.TOWERS[tower.model_type],
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_processor": pictures,
    }
    # Newer programs read the one, older ones the other.
    write_json(processor, out / "processor_config.json")
    write_json(pictures | {"processor_class": "LlavaProcessor"}, out / "preprocessor_config.json")


def build(vision_tower, language_model, out, kind="mlp2x_gelu", version="own", aspect_ratio="pad"):
    """Writes a LLaVA folder `out` from two others, or hub ids; its model.

    `kind` is the projector's (linear, mlpNx_gelu), `version` the chat template to save (own: the
    language model's), `aspect_ratio` how pictures become square (pad, square).
    """
    vision_folder = llava.resolve(vision_tower, "--vision_tower")
    text_folder, out = llava.resolve(language_model, "--language_model"), Path(out)
    out.mkdir(parents=True)
    tokenizer = add_image_token(text_folder, out)
    text = ChatText(tokenizer, version)
    tensors, config = join(vision_folder, text_folder, kind, tokenizer)
    llava.write_model(tensors, config, out)
    llava.write_template(text.chat_template, out)
    ends = {"eos_token_id": text.stop_ids, "pad_token_id": tokenizer.pad_token_id}
    write_json(ends, out / "generation_config.json")
    write_processor(vision_folder, config, aspect_ratio, out)
    return llava.from_pretrained(out)  # which checks that all of it fits


def print_summary(model: llava.Llava, kind: str, out: Path):
    """What was made, part by part; what a picture becomes; the next command."""
    config = model.config
    tower, text = config.vision_config, config.text_config
    kinds = {"vision_tower": tower.model_type, "multi_modal_projector": kind}
    print(out)
    for part, name in {**kinds, "language_model": text.model_type}.items():
        weights = list(model.get_submodule(part).parameters())
        count, dtype = sum(w.numel() for w in weights), str(weights[0].dtype)
        print(f"  {part:<22}{name:<19}{count:>14,} weights in {dtype.removeprefix('torch.')}")
    print(
        f"  {model.tokens_per_picture} tokens for a picture of {tower.image_size} x "
        f"{tower.image_size}; {IMAGE} is token {config.image_token_id} of {text.vocab_size}\n"
        f"next: python train.py --train_type projector --model_name_or_path {shlex.quote(str(out))}"
        " \\\n    --data_path captions.json --image_folder images --output_dir out/stage1"
    )


# --- the command ---


@command
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add, versions = parser.add_argument, [version for version in VERSIONS if version != "plain"]
    add("--vision_tower", required=True, help="CLIP's or SigLIP's folder, or hub id")
    add("--language_model", required=True, help="the language model's folder, or hub id")
    add("--out", required=True, help="folder to write")
    add("--mm_projector_type", default="mlp2x_gelu", help="linear, or mlpNx_gelu")
    add("--version", default="own", choices=versions, help="template to save; own: the model's")
    add("--image_aspect_ratio", default="pad", choices=["pad", "square"], help="pad, or crop")
    args = parser.parse_args(argv)
    out, kind = check_new(args.out), args.mm_projector_type
    with written(out) as part:
        model = build(
            args.vision_tower,
            args.language_model,
            part,
            kind,
            args.version,
            args.image_aspect_ratio,
        )
    print_summary(model, kind, out)


if __name__ == "__main__":
    sys.exit(main())
