"""Several processes that train one model (torchrun, FSDP2), or one with the host's memory.

It knows nothing of the algorithm.

`torchrun --standalone --nproc-per-node 8 train_actor.py ...` starts a process per card. Each runs the
whole script; weights, gradients and moments are sharded, packs are shared out, and the first process
alone speaks and writes. Without torchrun nothing of this happens.

Several machines: the same command on each (benchmarks/PAPER.md, "More than one machine").
"""

import os
import types
import warnings

import torch
import torch.distributed as dist

# Torch rounds pinned memory up to a power of two. Tensors of more MB than this setting says it does
# not: an 8B model's weights and gradients take 64 GB then, and a 7.6B model's 61 instead of 116.
PINNED_EXACTLY = "pinned_max_round_threshold_mb"


def decoder_layers(model) -> list[torch.nn.Module]:
    """The layers of a Hugging Face decoder, which one calls `layers` and another `h`."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world())))


def joined() -> bool:
    """Is there a group of processes? Of one, too: see `join`."""
    return dist.is_initialized()


def join(offload: bool = False):
    """Meet the other processes; offload: a group of one, which CPUOffloadPolicy needs too."""
    if offload and not torch.cuda.is_available():
        print("--offload: there is no GPU here, so it saves nothing")
    if joined() or (world() == 1 and not offload):
        return
    if offload:
        pin_exactly()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    options = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world() == 1 else {}
    dist.init_process_group(backend, **options)


def pin_exactly():
    """Take no more pinned memory than is asked for, unless the user's own settings are there."""
    if torch.__version__ >= (2, 13):  # before, the setting is unknown, and CUDA would not start
        os.environ.setdefault("PYTORCH_ALLOC_CONF", f"{PINNED_EXACTLY}:1")


def leave():
    """Part from the other processes; gloo's threads would otherwise end some with an error."""
    if joined():
        dist.destroy_process_group()


def wait_for_all():
    if world() > 1 and joined():
        dist.barrier()


def tell_all(what):
    """What the first process says, in every process. what: anything that can be pickled. Every process
    has to call it, or the others wait."""
    said = [what]
    dist.broadcast_object_list(said)
    return said[0]


def bring_weights(module: torch.nn.Module, device: str):
    """Give a module that was read by `weights.read_once` the first process's weights, on `device`. What
    is sharded already is left as it is."""
    from torch.distributed.tensor import DTensor  # takes a second

    # (dict, name) of each weight and buffer, in the same order in every process.
    places = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    places.append((tensors, name))
    dtypes = tell_all([tensors[name].dtype for tensors, name in places])
    brought = {}  # tied weights are one tensor in several places, and stay one
    for (tensors, name), dtype in zip(places, dtypes):
        old = tensors[name]
        if old not in brought:
            if rank() == 0:
                new = old.detach().to(device).contiguous()
            else:
                new = torch.empty(old.shape, dtype=dtype, device=device)
            dist.broadcast(new, 0)
            is_weight = isinstance(old, torch.nn.Parameter)
            brought[old] = torch.nn.Parameter(new, old.requires_grad) if is_weight else new
        tensors[name] = brought[old]


def local_shard(items: list) -> list:
    """This process's share of the items."""
    return items[rank() :: world()]


def all_gather(items: list) -> list:
    """The items of all processes, joined."""
    if world() == 1:
        return items
    everyone = [None] * world()
    dist.all_gather_object(everyone, items)
    return [item for own in everyone for item in own]


def is_sharded(module) -> bool:
    if not joined():  # the import below takes a while
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard(lm, value_head: torch.nn.Module | None = None, offload: bool = False, processes: int = 0):
    """Shard a model's weights over the processes, each decoder layer and then the rest.

    lm: a model.LM, whose weights the first process has; value_head: the critic's, too. offload:
    weights, gradients and moments lie in the host's memory. processes: over how many, by default
    all. Over those of one machine, each machine has whole weights, and only gradients travel between
    them, once per step (hybrid sharding).

    What uses weights outside the layers (embedding, last norm, the vocabulary products) runs inside
    `LM.with_weights`, for which they are gathered; so tied embeddings stay one parameter.
    """
    if not joined():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # That outputs which are views must not be changed in place: nothing here changes one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    if processes in (0, world()):
        shape, names = (world(),), ("shard",)
    else:
        shape, names = (world() // processes, processes), ("replicate", "shard")
    param_dtype = torch.bfloat16 if lm.in_bfloat16 else None
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    policy = CPUOffloadPolicy(torch.cuda.is_available()) if offload else OffloadPolicy()
    flags = {
        "mesh": init_device_mesh(lm.device, shape, mesh_dim_names=names),
        "offload_policy": policy,
        # Offloaded weights come to the card once per step, not once per pack, and stay until its end.
        "reshard_after_forward": not offload,
    }
    for layer in decoder_layers(lm.model):  # one at a time, so no card holds all of them whole
        bring_weights(layer, lm.device)
        fully_shard(layer, mp_policy=precision, **flags)
    bring_weights(lm.model, lm.device)
    fully_shard(lm.model, mp_policy=precision, **flags)
    # FSDP gathers weights around the model's methods, so a function runs as one of them.
    lm.model.with_weights = types.MethodType(lambda model, function: function(), lm.model)
    register_fsdp_forward_method(lm.model, "with_weights")
    sharded = [lm.model]
    if value_head is not None:
        sharded.append(fully_shard(value_head, **flags))
    for module in sharded:
        for part in module.modules():
            if is_sharded(part):  # the shares of a batch's mean are summed, not averaged
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        module.keeps_weights_during_step = offload


def whole_state(module: torch.nn.Module) -> dict:
    """The state dict with whole tensors, on the first process; every process takes part."""
    if not is_sharded(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return {name: state[name] for name in own if name in state}  # a tied head is no second one


def summed(sums: dict[str, float]) -> dict[str, float]:
    """Each number summed over the processes."""
    if world() == 1:
        return sums
    numbers = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist()))
