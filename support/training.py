"""The training loop: optimiser steps on packs, checkpoints, and going on exactly after a kill.

It knows nothing of the algorithm: the caller says what a batch is, how it is packed and what the
loss is.
"""

import errno
import functools
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter

import numpy as np
import torch

from support.cli import Progress, UserError, first_line
from support.distributed import is_sharded, local_shard, rank, summed, wait_for_all, world
from support.records import put_in_place, replace


def cause(error) -> str:
    """What went wrong in the first process that torch.distributed.checkpoint found failing."""
    return first_line(next(iter(error.failures.values()))[0])


def whole_batches(counts: list[int], size: int, passes: int, seed: str) -> list[list[int]]:
    """Indices of whole problems whose counts reach `size` together, in a new order each pass."""
    rng, batches = random.Random(seed), []
    for _ in range(passes):
        batch, full = [], 0
        for i in rng.sample(range(len(counts)), len(counts)):
            batch, full = [*batch, i], full + counts[i]
            if full >= size:
                batches.append(batch)
                batch, full = [], 0
        batches += [batch] if full else []
    return batches


class Checkpoints:
    """The two newest checkpoints of a training run: a file each, of several processes a folder
    each (torch.distributed.checkpoint), which any number of processes can read again."""

    def __init__(self, work: Path, modules: dict, optimiser):
        self.work, self.modules, self.optimiser = work, modules, optimiser
        if rank() == 0:
            for half in work.glob("step-*.new"):  # a kill while it was written
                shutil.rmtree(half) if half.is_dir() else half.unlink()
        wait_for_all()  # or the others would find no room for what is being removed
        self.sharded = any(is_sharded(module) for module in modules.values())
        files, folders = sorted(work.glob("step-*.pt")), sorted(work.glob("step-*.dcp"))
        self.saved = folders if self.sharded else files
        if not self.saved and (files or folders):
            other = "without torchrun" if self.sharded else "under torchrun, or with --offload"
            raise UserError(f"{work}: was begun {other}; go on so, or --force starts over")

    def check_disk(self):
        """Two are kept while a third is written, each of weights and two moments."""
        size = 0
        for module in self.modules.values():
            size += 3 * sum(p.numel() * p.element_size() for p in module.parameters())
        need = (3 - len(self.saved)) * size
        if shutil.disk_usage(self.work).free < need:
            raise UserError(f"{self.work}: checkpoints need {need / 1e9:.1f} GB of disk; make room")
        return need

    def _sharded_state(self) -> dict:
        """Before the first step torch makes the moments by an empty step, and AdamW's count of steps
        stays at 1: so only `_load_sharded`, which overwrites both, calls it then."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        together = torch.nn.ModuleDict(self.modules)
        moments = get_optimizer_state_dict(together, self.optimiser)
        return {"modules": {k: m.state_dict() for k, m in self.modules.items()}, "moments": moments}

    def save(self, step: int):
        path = self.work / f"step-{step:08d}"
        if self.sharded:
            import torch.distributed.checkpoint as dcp

            path = Path(f"{path}.dcp")
            beside = Path(f"{path}.new")
            try:
                dcp.save(self._sharded_state() | {"step": step}, checkpoint_id=beside)
            except dcp.CheckpointException as e:  # no Exception: it would pass every handler
                raise OSError(errno.EIO, f"not written ({cause(e)})", str(path)) from e
            if rank() == 0:
                put_in_place(beside, path)
        else:
            path = Path(f"{path}.pt")
            state = {
                "step": step,
                "modules": {k: m.state_dict() for k, m in self.modules.items()},
                "optimiser": self.optimiser.state_dict(),
            }
            replace(path, functools.partial(torch.save, state))
        self.saved.append(path)
        while len(self.saved) > 2:
            old = self.saved.pop(0)
            if rank() == 0:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def load(self) -> int:
        """Restore the newest; -> the step that comes next."""
        if not self.saved:
            return 0
        newest = self.saved[-1]
        try:
            return self._load_sharded(newest) if self.sharded else self._load_file(newest)
        except (RuntimeError, EOFError, UnpicklingError) as e:
            raise UserError(f"{newest}: broken; remove it, the one before it is used") from e

    def _load_file(self, path: Path) -> int:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.optimiser.load_state_dict(state["optimiser"])
        return state["step"]

    def _load_sharded(self, path: Path) -> int:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = self._sharded_state() | {"step": 0}
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.CheckpointException as e:
            raise RuntimeError(cause(e)) from e
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        together = torch.nn.ModuleDict(self.modules)
        set_optimizer_state_dict(together, self.optimiser, state["moments"])
        return state["step"]


def fit(modules, batches, make_packs, loss, work: Path, lr: float, save_minutes: float, name=str):
    """One optimiser step (AdamW, gradient norm clipped to 1) per batch; resumes exactly from `work`.

    modules   {name: torch.nn.Module} to train
    batches   what step i trains on, a list that the stage's seed fixes
    make_packs  batch -> a list of argument tuples, one per pack; runs in a thread, one step ahead,
              and so makes tensors of the CPU only: another thread's GPU may be another
    loss      (*arguments) -> (the pack's share of the batch's mean loss, {metric: its sum}); shares
              add up, so gradients do not depend on how a batch is cut into packs (8 x 1 = 1 x 8)
    name      batch -> what to call it in the report on a loss that is not finite

    The rate is the lower of two lines: one rises to lr over the first 5 % of the steps, one falls from
    lr to a tenth of it over all of them. `work` holds the two newest checkpoints, one every
    `save_minutes` but none after the last step, when the stage writes the model itself, and
    metrics.jsonl, one line per step; seconds go to timing.jsonl apart. Of several processes each runs
    its share of a batch's packs.
    """
    work.mkdir(parents=True, exist_ok=True)
    give_back_whole_weights(modules)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    flags = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimiser = torch.optim.AdamW(parameters, lr=lr, **flags)
    checkpoints = Checkpoints(work, modules, optimiser)
    need, fresh = checkpoints.check_disk(), not checkpoints.saved
    first = checkpoints.load()
    if fresh:
        print(f"{work}: {len(batches)} steps; checkpoints take up to {need / 1e6:.0f} MB of disk")
    else:
        print(f"resuming {work} at step {first} of {len(batches)}")
    metrics, timing = Lines(work / "metrics.jsonl", first), Lines(work / "timing.jsonl", None)
    saved_at = perf_counter()
    with (
        ThreadPoolExecutor(1) as ahead,
        Progress(work.stem, len(batches), "steps", initial=first) as bar,
    ):
        packs = ahead.submit(make_packs, batches[first]) if first < len(batches) else None
        for i in range(first, len(batches)):
            begin, items = perf_counter(), packs.result()
            if i + 1 < len(batches):
                packs = ahead.submit(make_packs, batches[i + 1])
            rate = min((i + 1) / (0.05 * len(batches)), 1 - 0.9 * i / len(batches))
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            sums = {"loss": 0.0}
            own, rounds = local_shard(items), -(-len(items) // world())
            for j in range(rounds):
                synchronise(modules, last=j == rounds - 1)
                if j < len(own):
                    share, numbers = loss(*own[j])
                    share.backward()
                    for key, value in {"loss": share.detach(), **numbers}.items():
                        sums[key] = sums.get(key, 0.0) + float(value)
                else:
                    sums = dict.fromkeys(take_part(loss, items[0]), 0.0) | sums
            sums = summed(sums)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if not np.isfinite([norm, *sums.values()]).all():
                bad = work / "non_finite.json"
                found = {"norm": str(norm), "sums": str(sums)}
                if rank() == 0:
                    bad.write_text(json.dumps({"step": i, "batch": name(batches[i]), **found}))
                raise UserError(f"step {i}: loss or gradient not finite, see {bad}; lower --lr")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            metrics.write({"step": i, **sums, "norm": norm, "lr": lr * rate})
            timing.write({"step": i, "seconds": perf_counter() - begin})
            bar.update()
            due = summed({"due": float(perf_counter() - saved_at > 60 * save_minutes)})["due"]
            if due and i + 1 < len(batches):
                metrics.flush()
                checkpoints.save(i + 1)
                saved_at = perf_counter()
    metrics.flush()


def take_part(loss, arguments: tuple) -> list[str]:
    """To gather sharded weights and to sum their gradients takes every process. One that has no
    pack left in a step runs another's, with gradients of 0. -> the names of what it would report"""
    share, numbers = loss(*arguments)
    (0.0 * share).backward()
    return ["loss", *numbers]


class Lines:
    """A JSONL file that the first process writes; keep: the lines of an earlier start that stay."""

    def __init__(self, path: Path, keep: int | None):
        self.file = None
        if rank() > 0:
            return
        if keep is not None:
            old = path.read_text().splitlines(keepends=True)[:keep] if keep else []
            replace(path, lambda p: p.write_text("".join(old)))
        self.file = path.open("a", buffering=1)

    def write(self, record: dict):
        if self.file:
            self.file.write(json.dumps(record) + "\n")

    def flush(self):
        if self.file:
            os.fsync(self.file.fileno())


def give_back_whole_weights(modules: dict):
    """After passes without a backward one, offloaded weights are still whole on the card, and the
    modules' parameters are those: an optimiser made now would train copies."""
    for module in modules.values():
        for part in module.modules():
            if is_sharded(part):
                part.reshard()


def synchronise(modules: dict, last: bool):
    """With --offload weights and gradients stay on the card until a step's last pack. Otherwise the
    gradients of each pack are summed over the processes at once: kept whole until the last pack
    they would take 4 bytes per parameter of every card. Between machines that each hold whole
    weights they are summed after the last pack."""
    for module in modules.values():
        if is_sharded(module):
            module.set_requires_all_reduce(last)
            if module.keeps_weights_during_step:
                module.set_requires_gradient_sync(last)
                module.set_reshard_after_backward(last)
