"""A tiny LLaVA as transformers has it, and adapters on it as if they had been trained."""

import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lora
import model as llava

BLOCKS = r"model\.language_model\.layers\.\d+\..+"  # every linear layer of the decoder's blocks


PROJECTOR = "model.multi_modal_projector"


def tiny_llava(seed=0, device="cpu", **text):
    # Widths that 64 divides: bitsandbytes 0.50 unpacks rows of others wrongly on a CPU with AVX512.
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100,
            "num_attention_heads": 4, "num_key_value_heads": 2} | text  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28,
              "num_attention_heads": 2, "patch_size": 14, "projection_dim": 32}  # fmt: skip
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision),
                         image_token_id=99, image_seq_length=4)  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        return LlavaForConditionalGeneration(config).eval()


def batch():
    """Two rows with a picture each for `tiny_llava`."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 98, (2, 12), generator=generator)
    input_ids[:, 1:5] = 99
    pixel_values = torch.randn(2, 3, 28, 28, generator=generator)
    return {"input_ids": input_ids, "pixel_values": pixel_values}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits.float()


def close(a, b, tolerance):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


def adapt(model, seed=0, train_projector=True, **options):
    """Adapters on the decoder's blocks of a tiny LLaVA, as if they had been trained for a while."""
    options = {"r": 4, "alpha": 8} | options
    names = lora.inject(model, BLOCKS, **options)
    model.get_submodule(PROJECTOR).requires_grad_(train_projector)
    torch.manual_seed(100 + seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape).to(p.dtype)
    return names


def fingerprint_of(folder):
    return lora.fingerprint(llava.open_weights(folder), llava.transformers_name)


def saved(model, out, base=None, **options):
    options = {"rename": llava.transformers_name, "modules_to_save": [PROJECTOR]} | options
    lora.save(model, out, base and fingerprint_of(base), **options)
    return out


def old_llava_folder(folder, out):
    """The folder with the tower's keys spelled as llava-hf's are, and a buffer that they carry."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    old = ("vision_tower.", "vision_tower.vision_model.")
    tensors = {name.replace(*old): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
