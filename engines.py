"""Engines: one optimizer step, in plain torch or in DeepSpeed's ZeRO, by the same calls.

    loss, right = engine.forward(input_ids, pixel_values, labels)
    engine.backward(loss, last)     of each micro batch; `last` of a step's
    norm = engine.step(factor)      clips, updates at `factor` times the learning rates

The loop has no `if deepspeed` in it. Plain is for one process, ZeRO for one or many:

    engine.sum(*numbers)            each number, added up over all processes
    engine.gather(items)            the lists of all processes, as one
    engine.get, put, refresh        what a checkpoint saves and puts back: see checkpoint.py
    engine.state(frozen)            {name: whole fp32 tensor} of what trains, on rank 0; with
                                    frozen=True also of what stage 3 has partitioned

Both keep, for each bf16 weight that trains, an fp32 sum of gradients and an fp32 master copy, which
AdamW updates: most steps are smaller than bf16 can add to a weight. ZeRO (arXiv:1910.02054)
partitions these among the processes (stage 2), and the weights too (stage 3).
"""

import functools
import math
from pathlib import Path

import torch
import torch.distributed as dist

import lora

# What --offload moves to the host's memory.
OFFLOADED = {
    "none": [],
    "optimizer": ["offload_optimizer"],
    "all": ["offload_optimizer", "offload_param"],
}


def set_learning_rates(optimizer, factor: float):
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def make_moments(adamw, weights):
    """AdamW would make them in its first step; a checkpoint is put into them before that."""
    for p in weights:
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }


class OneProcess:
    """The part of an engine that an evaluation uses, for one process: nothing is to be added."""

    rank, world, stage = 0, 1, 0  # ZeRO's stage

    def sum(self, *numbers):
        return numbers

    def gather(self, items: list) -> list:
        return items


class Plain(OneProcess):
    """Plain torch. make_optimizer({name: tensor}) is AdamW over them, `base_lr` in its groups."""

    def __init__(self, model, make_optimizer, max_grad_norm: float):
        self.model, self.max_grad_norm = model, max_grad_norm or math.inf  # 0: no clipping
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in self.weights.items()
        }  # the masters
        self.optimizer = make_optimizer(self.trained)
        make_moments(self.optimizer, self.trained.values())
        for name, p in self.weights.items():
            if p is not self.trained[name]:
                collect = functools.partial(self._collect, self.trained[name])
                p.register_post_accumulate_grad_hook(collect)

    @staticmethod
    def _collect(master, p):
        """Adds a bf16 gradient to its fp32 sum as soon as it is complete, and frees it."""
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def forward(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss, last: bool):
        loss.backward()

    def step(self, factor: float) -> float:
        """The norm of the gradient before clipping; where it is not finite, nothing is updated."""
        set_learning_rates(self.optimizer, factor)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _copy_masters(self):
        for name, p in self.weights.items():
            if p is not self.trained[name]:
                p.copy_(self.trained[name])

    def state(self, frozen: bool = True) -> dict:
        return {name: master.detach() for name, master in self.trained.items()}

    def get(self, name: str, part: str):
        master = self.trained[name]
        return master.detach() if part == "weight" else self.optimizer.state[master][part]

    def put(self, name: str, part: str, value):
        self.get(name, part).copy_(value)

    def refresh(self, step: int):
        for state in self.optimizer.state.values():
            state["step"].fill_(step)
        self._copy_masters()


class ZeRO:
    """DeepSpeed's engine inside; config is `deepspeed_config`'s.

    NOTE: where names are DeepSpeed's private ones a comment says so; they are those of 0.19.8.
    """

    def __init__(self, model, make_optimizer, config: dict):
        import deepspeed

        self.model, self.deepspeed = model, deepspeed
        self.stage = config["zero_optimization"]["stage"]
        if self.stage == 3:
            self.partition(config)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(self.trained)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.optimizer = self.engine.optimizer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        make_moments(self.optimizer.optimizer, self._masters())
        if self.stage == 2:  # it would link moments with weights after the first group's first step
            self.optimizer._lazy_init_hp_params_optimizer_state()  # private

    def _masters(self) -> list:
        """The flat tensors that this rank's AdamW updates, one or several for each group."""
        if self.stage == 2:
            return self.optimizer.single_partition_of_fp32_groups  # private
        return self.optimizer.fp32_partitioned_groups_flat  # private

    def partition(self, config: dict):
        """Partitions the weights among the ranks, one weight at a time.

        NOTE: `initialize` alone would move the whole model to every device and broadcast that of
        rank 0 over it. One weight at a time is copied here, just before it is partitioned, so all
        ranks of a machine share the pages of the file.
        """
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        for module in reversed(list(self.model.modules())):  # children first
            for p in module.parameters(recurse=False):
                if not hasattr(p, "ds_id"):
                    p.data = p.data.clone() if lora.is_nf4(p) else p.data.to(dtype, copy=True)
            if any(not hasattr(p, "ds_id") for p in module.parameters()):
                self.deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to("cuda" if torch.cuda.is_available() else "cpu")

    def sum(self, *numbers):
        total = torch.tensor(numbers, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, items: list) -> list:
        shares = [None] * self.world
        dist.all_gather_object(shares, items)
        return [item for share in shares for item in share]

    def forward(self, *inputs):
        return self.engine(*inputs)

    def backward(self, loss, last: bool):
        """DeepSpeed would divide the loss and count micro batches by itself; its `step` is called
        after each of them, and updates after the last.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, factor: float) -> float:
        set_learning_rates(self.optimizer, factor)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self, frozen: bool = True) -> dict:
        """As Plain's, gathered weight by weight, whole on rank 0 and empty elsewhere; with the
        `frozen` ones where stage 3 has partitioned these too.
        """
        state = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                whole = self.get(name, "weight")
                if self.rank == 0:
                    state[name] = whole.cpu()
            elif frozen and hasattr(p, "ds_id"):
                with self.deepspeed.zero.GatheredParameters([p]):
                    if self.rank == 0:
                        state[name] = p.detach().to("cpu", copy=True)
        return state

    def get(self, name: str, part: str):
        utils, p = self.deepspeed.utils, self.trained[name]
        if part == "weight":
            return utils.safe_get_full_fp32_param(p)
        return utils.safe_get_full_optimizer_state(p, part)

    def put(self, name: str, part: str, value):
        p, key = self.trained[name], None if part == "weight" else part
        if self.stage == 2:
            p.set_full_hp_param(value, key)  # private
            return
        # safe_set_full_... would want a size that the number of ranks divides.
        size = p.ds_tensor.numel()  # private; of this rank's share, the last one is padded
        share = value.flatten()[size * self.rank : size * (self.rank + 1)]
        share = torch.nn.functional.pad(share, (0, size - len(share)))
        self.optimizer.set_local_hp_param(share, p, key)  # private

    def refresh(self, step: int):
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(step)
        if self.stage == 2:
            self.optimizer.update_lp_params()  # private
            return
        self.optimizer.checkpoint_event_prologue()  # private
        for i in range(len(self._masters())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)  # private
        self.optimizer.checkpoint_event_epilogue()  # private


def deepspeed_config(args) -> dict:
    """The file of --deepspeed and, from the flags, what it must leave to them."""
    where = f"--deepspeed {args.deepspeed}"
    if not Path(args.deepspeed).is_file():
        raise FileNotFoundError(f"{where}: no such file")
    config = lora.read_json(Path(args.deepspeed))
    zero = config.get("zero_optimization") or {}
    flags = {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
    }
    decided = {*flags, "train_batch_size", "optimizer", "scheduler", "fp16"} & config.keys()
    if decided:
        raise ValueError(f"{where}: remove {min(decided)}, the flags decide it")
    if zero.get("stage") not in (2, 3):
        raise ValueError(f"{where}: zero_optimization needs a stage, 2 or 3")
    if args.offload == "all" and zero["stage"] == 2:
        advice = "use ds_zero3.json, or --offload optimizer"
        raise ValueError(f"--offload all: {where} is ZeRO-2, which splits no weights; {advice}")
    memory = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero |= {section: memory for section in OFFLOADED[args.offload]}
    return config | flags | {"zero_optimization": zero, "bf16": {"enabled": args.bf16}}
