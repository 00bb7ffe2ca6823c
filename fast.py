"""The same mathematics in less time and memory, for LLaVA and for language models of Llama's kind.

    model = fast.enable(model)    # a Llava, or AutoModelForCausalLM.from_pretrained("...")

                     without > with it                   how it was measured
    cross entropy    12 > 2.2 bytes a logit, in two thirds    2,000 x 151,936 logits in bf16, peak
                     of the time                              of forward and backward
    LoRA             4.2 > 0.7 bytes kept a number of the     what autograd saves, dropout 5 %, r an
                     input; a step 8.6 > 6.9 s                eighth of the width; bench.py use_lora
    RMSNorm          6 > 2 bytes kept a number;               what autograd saves;
                     peak 7.01 > 6.55 GiB                     bench.py, full
    SwiGLU           8 > 6 bytes kept a number of the         what autograd saves;
                     MLP's width; peak 6.75 > 6.55 GiB        bench.py, full
    attention        70 > 57 ms a layer in training           4 x 784 tokens, 9 heads of 64, AMX
                     9.2 > 8.8 s for 16 prompts and answers   bench.py, generate
    freed memory     a step is 5 % shorter                    bench.py, full

(bench.py: --shape 135m --dtype bf16 on 2 CPU cores, with and without the entry.) A step of a small
plain Llama of transformers, 4 x 512 tokens and 32,000 words in bf16: its peak is 768 > 158 MiB.

Everything works without this file, slower and larger. Layers are recognised by the names of their
classes; those of other families stay as they are. Where numbers are not equal to the last bit, they
are rounded elsewhere; where they are random (dropout), they have the same distribution. After the
backward pass, the logits that a language model returned hold their gradient.
"""

import ctypes
import math
import types

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask


def at_least_fp32(dtype):
    return torch.promote_types(dtype, torch.float32)


# --- cross entropy ---


def in_parts(logits):
    """Pairs (a slice of rows, their logits in fp32), one after the other.

    The second is 32 MiB of memory that all parts use in turn, and may be written to.
    """
    rows = max(2**23 // logits.shape[-1], 1)
    shape = min(rows, len(logits)), logits.shape[-1]
    memory = logits.new_empty(shape, dtype=at_least_fp32(logits.dtype))
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        yield here, memory[: len(logits[here])].copy_(logits[here])


class CrossEntropy(torch.autograd.Function):
    """The summed cross entropy of logits (S, V) for targets (S,), and how many are predicted right.

        loss        log(sum(exp(logits))) - logits[target]
        gradient    exp(logits - log(sum(exp(logits)))) - one_hot(target)

    torch makes five tensors of the logits' size on the way, most of them in fp32. Here both are
    computed for some rows at a time, and the backward pass writes the gradient over the logits,
    which nothing else reads by then. (If something does, autograd raises an error.) A target below
    0 is none: no loss, and a gradient of zero.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        log_sums = logits.new_empty(len(logits), 1, dtype=at_least_fp32(logits.dtype))
        losses, best = torch.empty_like(log_sums), torch.empty_like(targets)
        for here, logit in in_parts(logits):
            target_logit = logit.gather(-1, targets[here, None].clamp(min=0))
            highest, best[here] = logit.max(-1)
            sums = logit.sub_(highest[:, None]).exp_().sum(-1)  # at most V: nothing overflows
            log_sums[here, 0] = sums.log_().add_(highest)
            losses[here] = log_sums[here] - target_logit
        ctx.save_for_backward(logits, targets, log_sums)
        right = (best == targets).sum()
        ctx.mark_non_differentiable(right)
        return losses[targets >= 0].sum(), right

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        logits, targets, log_sums = ctx.saved_tensors
        factors = torch.where(targets >= 0, dloss, 0)[:, None]  # (S, 1)
        targets, minus_one = targets.clamp(min=0)[:, None], -torch.ones_like(log_sums)
        for here, logit in in_parts(logits):
            grad = logit.sub_(log_sums[here]).exp_()
            grad.scatter_add_(-1, targets[here], minus_one[here])
            logits[here] = grad.mul_(factors[here])
        return logits, None


def cross_entropy(logits, targets):
    """What a Llava calls with the output of its head."""
    return CrossEntropy.apply(logits, targets)


def causal_lm_loss(
    logits, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """What a language model of transformers calls with its logits (B, T, V) and labels (B, T)."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]  # t predicts t + 1
    targets = shift_labels.flatten().to(logits.device)
    targets = targets.masked_fill(targets == ignore_index, -100)
    loss, _ = cross_entropy(logits.flatten(0, -2), targets)
    return loss / ((targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch)


# --- LoRA ---


class AddProduct(torch.autograd.Function):
    """y + scale * B A dropout(x), keeping x, A x and where dropout's zeros are.

    x (tokens, in) is kept as it came, once for all layers that read it, and not once more with its
    zeros. Dropout's factor 1 / (1 - p) is in `scale`.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, scale, p):
        zeros = draw_zeros(x, p) if p else None
        h = put_zeros(x, zeros) @ A.T  # (tokens, r)
        ctx.save_for_backward(x, zeros, h, A, B)
        ctx.scale = scale
        return torch.addmm(y, h, B.T, alpha=scale)  # (tokens, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, zeros, h, A, B = ctx.saved_tensors
        dy = dy.contiguous()  # once, for here and for the layer itself
        dh = (dy @ B).mul_(ctx.scale)  # (tokens, r)
        dB = (dy.T @ h).mul_(ctx.scale)  # (out, r)
        dA = dh.T @ put_zeros(x, zeros)  # (r, in)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = dh @ A  # (tokens, in)
            if zeros is not None:
                dx.view(-1).index_fill_(0, zeros, 0)
        return dy, dx, dA, dB, None, None


def draw_zeros(x, p):
    """Indices into a flat x, each of its n numbers among them with probability p.

    They are drawn with replacement, and their number is Poisson's, of mean -n ln(1 - p): so each
    number of x is missed with probability 1 - p, independently of the others. For p = 5 % it takes
    5 % of the random numbers of a mask, and 0.4 bytes for each number of x.
    """
    mean = torch.tensor(-math.log1p(-p) * x.numel(), dtype=torch.float64)
    draws = int(torch.poisson(mean))
    return torch.randint(max(x.numel(), 1), (draws,), device=x.device)


def put_zeros(x, indices):
    """A copy of x with zeros there; x itself where indices is None."""
    return x if indices is None else x.flatten().index_fill(0, indices, 0).view(x.shape)


def add_product(self, x, y):
    """The forward of `LoRA` in lora.py: y + scale * B A dropout(x), with y (..., out)."""
    p, kind = self.dropout.p if self.training else 0.0, x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else self.lora_A.dtype
    rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])  # (tokens, out), (tokens, in)
    tensors = [tensor.to(dtype) for tensor in (*rows, self.lora_A, self.lora_B)]
    return AddProduct.apply(*tensors, self.scale / (1 - p), p).view(y.shape).to(y.dtype)


# --- the norm and the MLP ---


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
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dtype, dweight = at_least_fp32(grad.dtype), None
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = torch.rsqrt(length.square() / x.shape[-1] + ctx.eps)
        normed = x.to(dtype, copy=True).mul_(scale)
        if ctx.needs_input_grad[1]:
            dweight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        slope = grad.to(dtype, copy=True).mul_(weight)
        along = (slope * normed).mean(-1, keepdim=True)  # the part that normalising takes out
        return slope.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), dweight, None


def rms_norm(self, x):
    """LlamaRMSNorm's forward; bf16 is rounded once; transformers rounds before `weight` too."""
    if x.is_cuda:  # torch has one kernel for it, and one for its gradient
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    return RMSNorm.apply(x, self.weight, self.variance_epsilon)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only gate and up.

    Autograd by itself keeps silu(gate) too, as wide as the MLP for each layer and token.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated_mlp(self, x):
    """LlamaMLP's forward."""
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


# --- attention ---


class CPUAttention(torch.autograd.Function):
    """torch's attention for CPUs, with a backward pass that is faster in bf16.

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
    @once_differentiable
    def backward(ctx, grad):
        rows = max(1, 48 // grad.shape[1])  # many heads at once keep cores busy; more take memory
        tensors = *ctx.saved_tensors, grad
        gradients = [torch.empty_like(x) for x in tensors[:3]]  # laid out as q, k and v are
        for start in range(0, len(grad), rows):
            here = slice(start, start + rows)
            some = attention_gradients(*(x[here] for x in tensors), ctx.scale, ctx.causal)
            for gradient, part in zip(gradients, some):
                gradient[here] = part  # in its dtype
        return *gradients, None, None


def attention_gradients(q, k, v, log_sum, grad, scale, causal):
    """dq, dk and dv of a few rows, whose weights are computed again: those of 128 queries at a time
    where later keys are skipped, or else all at once.

    Scores can be in the hundreds, where bf16 rounds to whole numbers. Less the logarithm of the sum
    of their exponentials they are near zero where they count, and softmax is the same.
    """
    length, dtype = q.shape[2], at_least_fp32(grad.dtype)
    # (B, K, H / K, T, C or 1) and (B * K, T, C)
    qs, grads, less = (x.unflatten(1, (k.shape[1], -1)) for x in (q, grad, log_sum[..., None]))
    ks, vs = (x.flatten(0, 1) for x in (k, v))
    dq, dk, dv = torch.empty_like(qs), *(torch.zeros_like(x, dtype=dtype) for x in (ks, vs))
    queries = 128 if causal else length
    for start in range(0, length, queries):
        here = slice(start, min(start + queries, length))
        seen = slice(here.stop)
        # (B * K, H / K * queries, C or 1) and (B * K, keys, C)
        qi, gi, less_i = (x[..., here, :].flatten(2, 3).flatten(0, 1) for x in (qs, grads, less))
        ki, vi = ks[:, seen], vs[:, seen]
        scores = torch.baddbmm(less_i, qi, ki.mT, beta=-1, alpha=scale)
        if causal:
            mask_later(scores, start, here.stop - start)
        weights = scores.softmax(-1)
        dv[:, seen] += weights.mT @ gi
        gi = torch.ops.aten._softmax_backward_data(gi @ vi.mT, weights, -1, weights.dtype)
        dq[..., here, :] = (gi @ ki).view_as(dq[..., here, :])
        dk[:, seen] += gi.mT @ qi
    return dq.mul_(scale).flatten(1, 2), dk.mul_(scale).view(k.shape), dv.view(v.shape)


def mask_later(scores, start, queries):
    """No weight for keys behind their query, of which some are among those from `start` on."""
    later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    scores.unflatten(1, (-1, queries))[..., start:].masked_fill_(later, -torch.inf)


def attend_by_rows(q, k, v, mask, scale):
    """Causal attention of rows that are padded on the left, each without its padding and so without
    a mask: torch's kernel then skips what comes later. None where the mask is another.
    """
    lengths = mask[:, 0, -1].sum(-1)  # (B,): the last position sees all of its row
    if not torch.equal(mask.flatten(1).sum(1), lengths * (lengths + 1) // 2):
        return None
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        qkv = (x[row : row + 1, :, -length:] for x in (q, k, v))
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        out[row, :, -length:] = F.scaled_dot_product_attention(*qkv, **options)[0]
    return out


def attend(module, q, k, v, attention_mask, scaling, dropout=0.0, is_causal=None, **options):
    """What transformers calls for attention: torch's own, but on a CPU for training in bf16 and for
    the prompts of a generation.
    """
    is_causal, out = module.is_causal if is_causal is None else is_causal, None
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and q.shape[2] == k.shape[2] > 1 and not dropout:
        masked = attention_mask is not None and attention_mask.dtype == torch.bool
        if masked and not trains:
            out = attend_by_rows(q, k, v, attention_mask, scaling)
        elif trains and attention_mask is None and q.dtype == torch.bfloat16:
            out = CPUAttention.apply(q, k, v, scaling, is_causal)
    if out is not None:
        return out.transpose(1, 2).contiguous(), None  # (B, T, H, C)
    options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, q, k, v, attention_mask, **options)


# --- memory ---


def keep_freed_memory():
    """Has glibc keep freed memory, which each step would otherwise take anew from the system, page
    by page. Other C libraries have no such switch, and need none.
    """
    TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, -1)  # never
        # Above this a tensor is mapped by itself, as ever; older ones take no more than the second.
        library.mallopt(MMAP_THRESHOLD, 2**30) or library.mallopt(MMAP_THRESHOLD, 2**25)


# --- all of it, in a model ---

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
NORMS = {f"{family}RMSNorm" for family in (*FAMILIES, "Phi3")}
MLPS = {f"{family}MLP" for family in FAMILIES}
# Attention of q, k, v, a mask and a scale; others have soft caps, sinks, or ask for their own name.
ATTENTION = {"clip_vision_model", "siglip_vision_model", *(name.lower() for name in FAMILIES)}


def faster_forward(module):
    """The function that takes the place of a layer's forward; None where it stays as it is."""
    name = type(module).__name__
    if name == "LoRA" and hasattr(module, "scale"):  # lora.py's
        return add_product
    if name in NORMS:
        return rms_norm
    if name in MLPS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return gated_mlp


def use_faster_attention(module):
    """Has `attend` called where transformers chose torch's attention, in families that we know."""
    config = getattr(module, "config", None)
    known = getattr(config, "model_type", None) in ATTENTION
    if known and config._attn_implementation == "sdpa":
        module.set_attn_implementation("fast")


def use_faster_loss(module):
    name = type(module).__name__
    if name == "Llava":
        module.cross_entropy = cross_entropy
    elif name.endswith(("ForCausalLM", "ForConditionalGeneration")):
        if getattr(module, "loss_function", None) is ForCausalLMLoss:
            module.loss_function = causal_lm_loss


def enable(model):
    """The model, with all of the above wherever it applies.

    Call it when LoRA's layers are there. To call it again changes nothing but what is new. Freed
    memory is then kept by the whole process.
    """
    keep_freed_memory()
    AttentionInterface.register("fast", attend)
    AttentionMaskInterface.register("fast", sdpa_mask)
    for module in model.modules():
        forward = faster_forward(module)
        if forward:
            module.forward = types.MethodType(forward, module)
        use_faster_attention(module)
        use_faster_loss(module)
    return model
