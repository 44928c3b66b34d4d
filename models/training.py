"""How is any family trained? One loop: precision, averaging, accumulation, ranks, checkpoints, exact resume.

The program of a run is a trunk with a branch per measurement point (``models.config.segments``). Everything random
in a step (data, per-image draws, dropout) is a function of (seed, step) alone. So a resumed run continues bit for
bit, a branch equals a run that was trained to exactly that length, and the result does not depend on how a batch
is divided over micro-batches or ranks beyond rounding (dropout aside, whose mask follows the device).

The loop reaches the outside through what it is handed: ``checkpoints`` saves, ``record`` takes metrics,
``should_stop`` is asked between steps.

Several processes, one per device, train one run together: each calls ``meet`` once, then ``join``, ``train`` and
``leave`` for every run. Each of them holds all parameters (DDP) or, with ``Runtime.shard``, its part (FSDP2). What is
on disk is the same either way, so that a run can go on with another number of devices.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.checkpoint import Checkpoints, Saved, State
from models.config import Recipe, Runtime, branch_start

T = TypeVar("T")
Batch = dict[str, Tensor]
Draws = dict[str, tuple[Literal["uniform", "normal"], tuple[int, ...]]]


class Stream(Protocol):
    """Random access to an endless stream of training examples (models.data)."""

    def draw(self, split: Literal["train", "heldout"], position: int, count: int, seed: int, device: str) -> Batch: ...


class Trainable(Protocol):
    """What a family's module gives the loop.

    ``loss(batch, step)`` returns scalars, means over images; ``loss`` is minimised, the others are logged.
    ``draws`` (optional) names per-image random numbers that the loop adds to the batch. ``groups(recipe)``
    (optional) gives optimiser groups. ``after_step(step, decaying)`` (optional) runs after the update; ``decaying``
    says that the step is one of the last before a point (``decays``): no time to recover from a change of course.
    ``blocks`` (optional) holds submodules, called as such by ``loss``, whose parameters a sharded run gathers one after
    the other.
    """

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Outcome:
    """How training ended; ``steps`` and ``seconds`` are those of this call."""

    state: Literal["done", "stopped", "diverged"]
    steps: int
    seconds: float
    reason: str | None = None


def mixed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from a seed and names or counters."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def device_of(runtime: Runtime) -> str:
    """The device that a run uses on this machine."""
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("device: cuda asked for, but torch sees no GPU here; allowed: cpu, auto")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{local % torch.cuda.device_count()}"  # a rank that sees no GPU but its own finds it under 0


def decayed(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices only."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def ema_exponent(width: float) -> float:
    """gamma of the power-law average whose standard deviation is ``width`` times the step.

    Karras et al. 2024 (arXiv 2312.02696, eq. 5): the weight of step s at step t is proportional to (s/t)^gamma and
    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls in gamma. ``width`` lies in (0, 0.28].
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        if (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > width**2:
            low = gamma
        else:
            high = gamma
    return (low + high) / 2


def rate(recipe: Recipe, step: int, leaves: int, point: int | None) -> float:
    """Learning-rate factor of a step; ``point`` is None on the trunk, else the branch's end."""
    warm = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    if point is None or recipe.schedule == "constant":
        return warm
    if recipe.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / point))
    return warm * (point - step) / (point - leaves)


def decays(recipe: Recipe, step: int, point: int | None) -> bool:
    """Whether a step belongs to the decay before ``point`` (as for ``rate``): of cosine, to the last ``decay`` of it.

    A constant rate has no decay: points are no part of a run's identity, so its path must not depend on them.
    """
    if point is None or recipe.schedule == "constant":
        return False
    return recipe.schedule == "wsd" or step >= point - max(1, round(recipe.decay * point))


class _Step(nn.Module):
    """``loss`` as ``forward``, which is what DDP and torch.compile wrap."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", self.module.loss(batch, step))


# --- ranks ------------------------------------------------------------------------------------------------------

_hosts: dist.ProcessGroup | None = None  # the ranks that were joined; only here, so that ``leave`` closes connections


def meet(address: str, size: int, timeout_s: float, port: int = 0) -> tuple[dist.TCPStore, int]:
    """Where ``size`` processes meet to train runs together, and its port.

    Without a port this process is rank 0: it listens at its own ``address``, on a port of the system's choosing, which
    the others have to be told. Nobody is waited for here; ``join`` gives the others ``timeout_s`` to come.
    """
    store = dist.TCPStore(
        address, port, size, is_master=not port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
    return store, store.port


def join(
    runtime: Runtime, store: dist.Store, name: str, rank: int, size: int, local_rank: int, timeout_s: float = 1800.0
) -> None:
    """Join the other ranks of a run; ``leave`` ends it.

    Only ranks that give the same ``name`` find each other: it holds the run and its attempt, so that a process which
    was left over from an earlier attempt stays alone. Once all are there, whoever waits longer than ``timeout_s`` for
    another (while rank 0 writes a checkpoint, say) gives up with an error.

    On GPUs this rank's own becomes the current one. Hosts have a group of their own, on which no agreement between
    them waits for a device, and a rank that left or died is noticed at once.
    """
    global _hosts
    os.environ["LOCAL_RANK"] = str(local_rank)
    device = torch.device(device_of(runtime))
    on_gpu = device.type == "cuda"  # and not: whether there is one
    if on_gpu:
        torch.cuda.set_device(device)
    own, timeout = dist.PrefixStore(name, store), timedelta(seconds=timeout_s)
    own.set(f"rank {rank}", "here")
    own.wait([f"rank {number}" for number in range(size)])  # one that never comes is given up as ``meet`` says
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=own,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    _hosts = dist.new_group(backend="gloo", timeout=timeout)


def leave() -> None:
    """Part from the ranks that were joined, if any, so that this process can join those of the next run.

    To be called however ``train`` ended: the others wait for this rank as long as it has not left.
    """
    global _hosts
    if _hosts is not None:
        dist.destroy_process_group(_hosts)
        _hosts = None
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a sharded module refers to itself and would keep its memory


class Ranks:
    """The processes that train one run together; one process when none was joined."""

    def __init__(self) -> None:
        self.on = _hosts is not None
        self.rank = dist.get_rank() if self.on else 0
        self.size = dist.get_world_size() if self.on else 1

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true when any rank raised it. Hosts wait for each other, not for their devices."""
        if not self.on:
            return list(flags)
        votes = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(votes, dist.ReduceOp.MAX, _hosts)
        return [bool(vote) for vote in votes.tolist()]

    def barrier(self) -> None:
        self.any(True)

    def told(self, value: T) -> T:
        """The value that rank 0 has."""
        held = [value]
        if self.on:
            dist.broadcast_object_list(held, src=0, group=_hosts)
        return held[0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks; on the device."""
        if not self.on:
            return values
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.SUM)
        return values / self.size


def _sharded(module: nn.Module, device: str, size: int) -> _Step:
    """A step of a copy of ``module`` whose parameters are divided over ``size`` devices; ``module`` itself stays whole.

    Parameters of the family's ``blocks`` are gathered while their block runs, the others for the whole step.
    """
    from torch.distributed.device_mesh import init_device_mesh  # with what it imports, half as slow to load as torch
    from torch.distributed.fsdp import fully_shard

    for name, parameter in module.named_parameters():
        if not parameter.ndim:
            raise ValueError(
                f"shard: got true, but {name} of {type(module).__name__} is a single number, which cannot be divided; "
                "allowed: false"
            )
    mesh = init_device_mesh(torch.device(device).type, (size,))
    step = _Step(copy.deepcopy(module))
    for part in (*getattr(step.module, "blocks", ()), step):
        fully_shard(part, mesh=mesh)  # moves to the device what it divides, a part at a time
    return step


def _whole(value: Any) -> Tensor:
    """All of a tensor that is divided over the ranks, which all have to ask; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _divided(whole: Tensor, like: Any) -> Tensor:
    """A tensor that all ranks have, divided over them as ``like`` is, if that is."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class Loop:
    """The state of one run in memory, and a step of it."""

    def __init__(self, module: nn.Module, stream: Stream, recipe: Recipe, *, seed: int, runtime: Runtime) -> None:
        self.stream, self.recipe, self.seed, self.runtime = stream, recipe, seed, runtime
        self.device = device_of(runtime)
        self.ranks = Ranks()
        self.sharded = bool(runtime.shard) and self.ranks.on
        if recipe.batch % self.ranks.size:
            raise ValueError(f"batch: {recipe.batch} cannot be divided over {self.ranks.size} ranks")
        self.mixing: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.sharded:
            from torch.distributed.tensor.experimental import implicit_replication

            self.mixing = implicit_replication  # what ``after_step`` puts beside parameters is alike on all ranks
            own = _sharded(module, self.device, self.ranks.size)
        else:
            own = _Step(module.to(self.device))
        self.module = module = own.module.train()
        self.draws: Draws = getattr(module, "draws", {})
        groups = module.groups(recipe) if hasattr(module, "groups") else decayed(module, recipe)
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        for p in self.params:  # as AdamW would at its first step: a state then has one shape at any time
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.averaged = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.raw = [p.detach() for _, p in self.averaged]
        self.ema = [p.clone() for p in self.raw] if recipe.ema else []
        self.exponent = ema_exponent(recipe.ema) + 1 if recipe.ema else 0.0
        self.logs: dict[str, Tensor] = {}
        self.logged = torch.zeros((), device=self.device)
        step: nn.Module = own
        if runtime.compile:
            step = cast("nn.Module", torch.compile(step))
        if self.ranks.on and not self.sharded:
            on_gpu = self.device.startswith("cuda")
            step = nn.parallel.DistributedDataParallel(
                step,
                device_ids=[self.device] if on_gpu else None,
                gradient_as_bucket_view=True,  # or it would hold every gradient twice
            )
        self.forward = step
        local = recipe.batch // self.ranks.size
        self.micro = min(runtime.micro_batch or local, local)
        if local % self.micro:
            raise ValueError(f"micro_batch: {self.micro} has to divide the {local} images of a rank")

    # --- one step ---

    def _batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches of this rank: data and draws of the global batch, sliced."""
        local = self.recipe.batch // self.ranks.size
        first = self.ranks.rank * local
        batch = self.stream.draw("train", step * self.recipe.batch + first, local, self.seed, self.device)
        if self.draws:
            generator = torch.Generator(self.device).manual_seed(mixed(self.seed, "draws", step))
            for name, (kind, shape) in self.draws.items():
                make = torch.rand if kind == "uniform" else torch.randn
                numbers = make((self.recipe.batch, *shape), generator=generator, device=self.device)
                batch[name] = numbers[first : first + local]
        if self.micro == local:
            yield batch
        else:
            for start in range(0, local, self.micro):
                yield {key: value[start : start + self.micro] for key, value in batch.items()}

    def step(self, step: int, leaves: int, point: int | None) -> None:
        """Train one step in place: the step on the path, where its branch left, the branch's end (None: trunk)."""
        recipe = self.recipe
        factor = rate(recipe, step, leaves, point)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        torch.manual_seed(mixed(self.seed, "step", step, self.ranks.rank))  # dropout
        pieces = recipe.batch // self.ranks.size // self.micro
        for number, batch in enumerate(self._batches(step)):
            # replicas meet at the last piece; shards at each, as whole gradients are what may not fit
            waits = self.ranks.on and not self.sharded and number < pieces - 1
            with cast("Any", self.forward).no_sync() if waits else nullcontext():
                if recipe.precision == "bfloat16":
                    with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                        losses = self.forward(batch, step)
                else:
                    losses = self.forward(batch, step)
                (losses["loss"] / pieces if pieces > 1 else losses["loss"]).backward()
            self._log({name: value.detach() / pieces for name, value in losses.items()})
        norm = nn.utils.clip_grad_norm_(self.params, recipe.clip, foreach=True)
        self._log({"grad_norm": _whole(norm.detach())})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            torch._foreach_lerp_(self.ema, self.raw, 1.0 - (1.0 - 1.0 / (step + 1)) ** self.exponent)
        if hasattr(self.module, "after_step"):
            with self.mixing():
                self.module.after_step(step, decays(recipe, step, point))
        self.logged += 1

    def _log(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name in self.logs:
                self.logs[name] += value
            else:
                self.logs[name] = value.float().clone()

    def flush(self) -> dict[str, float]:
        """Means since the last flush, over ranks; the only place where the host waits for the device."""
        names = sorted(self.logs)
        sums = torch.stack([self.logs[name] for name in names]) / self.logged
        values = dict(zip(names, self.ranks.mean(sums).tolist(), strict=True))
        self.logs, self.logged = {}, torch.zeros_like(self.logged)
        return values

    # --- state ---

    def tensors(self) -> State:
        """Every tensor that the future depends on, by reference."""
        state = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        for index, p in enumerate(self.params):
            state |= {f"optimizer.{index}.{name}": value for name, value in self.optimizer.state[p].items()}
        state |= {f"ema.{name}": value for (name, _), value in zip(self.averaged, self.ema, strict=bool(self.ema))}
        state |= {f"log.{name}": value for name, value in self.logs.items()}
        return state | {"logged": self.logged}

    def weights(self) -> State:
        """Raw tensors (buffers too) and averaged parameters, by reference, as evaluations load them."""
        state = {f"raw.{name}": value for name, value in self.module.state_dict().items()}
        return state | {f"ema.{n}": value for (n, _), value in zip(self.averaged, self.ema, strict=bool(self.ema))}

    def gather(self, state: State, copied: bool = False) -> State:
        """``tensors`` or ``weights`` as one process would have them, in the host's memory of rank 0; elsewhere nothing.

        Every rank has to ask. What lies there already is handed out by reference unless it is to be ``copied``.
        """
        gathered: State = {}
        for name, value in state.items():
            value = self.ranks.mean(value) if name.startswith("log.") else _whole(value)
            if self.ranks.rank == 0:
                gathered[name] = value.to("cpu", copy=copied)
        return gathered

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put a state back in place, on all ranks that which rank 0 has; the names have to be those of this run."""
        names = self.ranks.told([name for name in state if name.startswith("log.")])
        self.logs = {name.removeprefix("log."): torch.zeros((), device=self.device) for name in names}
        held = self.tensors()
        assert self.ranks.rank or held.keys() == state.keys(), held.keys() ^ state.keys()
        for name, value in held.items():
            if not self.ranks.on:
                value.copy_(state[name])
                continue
            whole = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            if self.ranks.rank == 0:
                whole.copy_(state[name])
            dist.broadcast(whole, src=0)
            value.copy_(_divided(whole, value))


def train(
    module: nn.Module,
    stream: Stream,
    recipe: Recipe,
    points: tuple[int, ...],
    *,
    seed: int,
    runtime: Runtime,
    checkpoints: Checkpoints,
    record: Callable[[int, int, dict[str, float], int | None], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train ``module`` until every measurement point has its checkpoint; finished points are not trained again.

    ``record(step, trained, metrics, point)`` is called every ``runtime.log_every`` steps and at the end of a piece
    with means since its last call, on rank 0 only; ``trained`` counts the steps of this call, ``point`` names the
    branch the step lies on, None on the trunk. A loss or a gradient that is not finite, or a loss beyond
    ``recipe.diverged``, ends the run. On several ranks ``checkpoints`` is that of rank 0, and all stop after the step
    in which ``should_stop`` of any of them said so. A sharded run trains a copy: ``module`` stays as it was.
    Raises ValueError where the batch or the module cannot be divided, and whatever ``checkpoints`` raises when this
    attempt was superseded.
    """
    loop = Loop(module, stream, recipe, seed=seed, runtime=runtime)
    chief = loop.ranks.rank == 0
    began = saved = time.monotonic()
    trained = 0

    def outcome(state: Literal["done", "stopped", "diverged"], reason: str | None = None) -> Outcome:
        return Outcome(state, trained, time.monotonic() - began, reason)

    def save(state: State, step: int, point: int | None) -> None:
        if chief:
            checkpoints.save(state, {"step": step, "point": point, "seed": seed}, step, point)
        loop.ranks.barrier()

    def found(read: Callable[..., tuple[State, Saved] | None], *at: int) -> tuple[State, Saved] | None:
        held = read(*at) if chief else None  # what one rank sees on disk another may not see yet
        where = loop.ranks.told(held and held[1])
        return (held[0] if held else {}, where) if where else None

    remaining = loop.ranks.told([point for point in sorted(set(points)) if not checkpoints.has_point(point)])
    trunk: State | None = None  # the trunk while a branch is in memory (of rank 0): held for the pieces after it
    on_disk = False  # whether that trunk can be read back: it is written once per branch, at the first save
    step = 0
    for number, point in enumerate(remaining):
        leaves = branch_start(point, recipe)
        last = number == len(remaining) - 1
        on_branch = False
        if number == 0 and (latest := found(checkpoints.resume, point, leaves)):
            state, where = latest
            step, on_branch = where.step, where.point is not None
            if on_branch and not last:
                behind = found(checkpoints.resume_trunk, leaves)
                trunk = behind[0] if behind else loop.gather(loop.tensors(), copied=True)
                came_from, on_disk = behind[1].step if behind else 0, behind is not None
            loop.restore(state)
            del latest, state  # or they would take their memory to the end
        stop = False
        while step < point and not stop:
            if step == leaves and not on_branch and recipe.schedule == "wsd":
                on_branch, came_from = True, step
                if last:
                    save(loop.gather(loop.tensors()), step, None)  # so that a longer point can be added later
                else:
                    trunk, on_disk = loop.gather(loop.tensors(), copied=True), False
            loop.step(step, leaves, point if on_branch or recipe.schedule == "cosine" else None)
            step += 1
            trained += 1
            logs = step % runtime.log_every == 0 or step in (leaves, point)
            if logs:
                metrics = loop.flush()
                if not abs(metrics["loss"]) <= recipe.diverged:
                    return outcome("diverged", f"loss {metrics['loss']:.4g} at step {step}")
                if not math.isfinite(metrics["grad_norm"]):  # the weights are spoilt, whatever the loss before it was
                    return outcome("diverged", f"gradient norm {metrics['grad_norm']:.4g} at step {step}")
                if chief:
                    record(step, trained, metrics, point if on_branch else None)
            stop, due = loop.ranks.any(should_stop(), time.monotonic() - saved > runtime.save_every_s)
            if (stop or due) and step < point:
                if on_branch and trunk is not None and not on_disk:
                    save(trunk, came_from, None)
                    on_disk = True
                save(loop.gather(loop.tensors()), step, point if on_branch else None)
                saved = time.monotonic()
        if step < point:
            return outcome("stopped", f"asked to stop at step {step}")
        weights = loop.gather(loop.weights())
        if chief:
            checkpoints.save_point(point, weights, {"seed": seed})
        loop.ranks.barrier()
        del weights
        if on_branch and not last:
            assert trunk is not None
            loop.restore(trunk)
            step, trunk = came_from, None
        if (recipe.schedule == "constant" and last) or (stop and not last):
            save(loop.gather(loop.tensors()), step, None)
        if stop and not last:
            return outcome("stopped", f"asked to stop at point {point}")
    return outcome("done")
