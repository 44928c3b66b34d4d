"""How is any family trained? One loop: precision, averaging, accumulation, ranks, checkpoints, exact resume.

The program of a run is a trunk with a branch per measurement point (``models.config.segments``). Everything random
in a step (data, per-image draws, dropout) is a function of (seed, step) alone. So a resumed run continues bit for
bit, a branch equals a run that was trained to exactly that length, and the result does not depend on how a batch
is divided over micro-batches or ranks beyond rounding (dropout aside, whose mask follows the device).

The loop reaches the outside through what it is handed: ``checkpoints`` saves, ``record`` takes metrics,
``should_stop`` is asked between steps.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.checkpoint import Checkpoints, State
from models.config import Recipe, Runtime, branch_start

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


LAUNCHERS = (  # rank, number of ranks, rank on this node: as torchrun and srun name them
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def join(runtime: Runtime) -> None:
    """Join the other ranks of this run when the environment (torchrun, srun) names more than one.

    MASTER_ADDR and MASTER_PORT have to be set, as torchrun does. On GPUs this rank's own becomes the current one.
    """
    for rank, size, local in LAUNCHERS:
        if int(os.environ.get(size, "1")) > 1 and rank in os.environ and "MASTER_ADDR" in os.environ:
            os.environ["LOCAL_RANK"] = os.environ.get(local, "0")
            device = torch.device(device_of(runtime))
            on_gpu = device.type == "cuda"  # and not: whether there is one
            if on_gpu:
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                rank=int(os.environ[rank]),
                world_size=int(os.environ[size]),
                device_id=device if on_gpu else None,  # barriers use it too
            )
            return


class Ranks:
    """The processes that train one run together; one process when nothing was initialised.

    ``device`` is that of the run on this rank: what ranks tell each other passes through it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.on = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.on else 0
        self.size = dist.get_world_size() if self.on else 1

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true when any rank raised it."""
        if not self.on:
            return list(flags)
        votes = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def mean(self, values: Tensor) -> Tensor:
        if self.on:
            dist.all_reduce(values, dist.ReduceOp.SUM)
            values = values / self.size
        return values

    def barrier(self) -> None:
        if self.on:
            dist.barrier()


class Loop:
    """The state of one run in memory, and a step of it."""

    def __init__(self, module: nn.Module, stream: Stream, recipe: Recipe, *, seed: int, runtime: Runtime) -> None:
        self.stream, self.recipe, self.seed, self.runtime = stream, recipe, seed, runtime
        self.device = device_of(runtime)
        self.ranks = Ranks(self.device)
        if recipe.batch % self.ranks.size:
            raise ValueError(f"batch: {recipe.batch} cannot be divided over {self.ranks.size} ranks")
        self.module = module.to(self.device).train()
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
        self.raw = [p.data for _, p in self.averaged]
        self.ema = [p.detach().clone() for _, p in self.averaged] if recipe.ema else []
        self.exponent = ema_exponent(recipe.ema) + 1 if recipe.ema else 0.0
        self.logs: dict[str, Tensor] = {}
        self.logged = torch.zeros((), device=self.device)
        step: nn.Module = _Step(self.module)
        if runtime.compile:
            step = cast("nn.Module", torch.compile(step))
        if self.ranks.on:
            on_gpu = self.device.startswith("cuda")
            step = nn.parallel.DistributedDataParallel(step, device_ids=[self.device] if on_gpu else None)
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
            last = number == pieces - 1
            syncs = cast("Any", self.forward).no_sync() if self.ranks.on and not last else nullcontext()
            with syncs:
                if recipe.precision == "bfloat16":
                    with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                        losses = self.forward(batch, step)
                else:
                    losses = self.forward(batch, step)
                (losses["loss"] / pieces if pieces > 1 else losses["loss"]).backward()
            self._log({name: value.detach() / pieces for name, value in losses.items()})
        norm = nn.utils.clip_grad_norm_(self.params, recipe.clip, foreach=True)
        self._log({"grad_norm": norm.detach()})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            torch._foreach_lerp_(self.ema, self.raw, 1.0 - (1.0 - 1.0 / (step + 1)) ** self.exponent)
        if hasattr(self.module, "after_step"):
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

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put a state back in place; the names have to be those of this run."""
        self.logs = {
            name.removeprefix("log."): value.to(self.device).clone()
            for name, value in state.items()
            if name.startswith("log.")
        }
        held = self.tensors()
        assert held.keys() == state.keys(), held.keys() ^ state.keys()
        for name, value in held.items():
            value.copy_(state[name])

    def weights(self) -> State:
        """Raw tensors (buffers too) and averaged parameters, as evaluations load them."""
        state = {f"raw.{name}": value for name, value in self.module.state_dict().items()}
        return state | {f"ema.{n}": value for (n, _), value in zip(self.averaged, self.ema, strict=bool(self.ema))}


def on_host(state: State) -> State:
    """A copy in the host's memory: beside training, 16 bytes per parameter are too many for a GPU."""
    return {name: value.to("cpu", copy=True) for name, value in state.items()}


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
    ``recipe.diverged``, ends the run.
    Raises ValueError where the batch cannot be divided, and whatever ``checkpoints`` raises when this attempt was
    superseded.
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

    remaining = [point for point in sorted(set(points)) if not checkpoints.has_point(point)]
    trunk: State | None = None  # the trunk while a branch is in memory: held for the pieces after it
    on_disk = False  # whether that trunk can be read back: it is written once per branch, at the first save
    step = 0
    for number, point in enumerate(remaining):
        leaves = branch_start(point, recipe)
        last = number == len(remaining) - 1
        on_branch = False
        if number == 0 and (found := checkpoints.resume(point, leaves)):
            state, where = found
            step, on_branch = where.step, where.point is not None
            if on_branch and not last:
                behind = checkpoints.resume_trunk(leaves)
                trunk = behind[0] if behind else on_host(loop.tensors())
                came_from, on_disk = behind[1].step if behind else 0, behind is not None
            loop.restore(state)
            del found, state  # or they would take their memory to the end
        stop = False
        while step < point and not stop:
            if step == leaves and not on_branch and recipe.schedule == "wsd":
                on_branch, came_from = True, step
                if last:
                    save(loop.tensors(), step, None)  # so that a longer point can be added to a finished run
                else:
                    trunk, on_disk = on_host(loop.tensors()), False
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
            if logs or not loop.ranks.on:  # ranks agree on stopping where they agree on logging
                stop, due = loop.ranks.any(should_stop(), time.monotonic() - saved > runtime.save_every_s)
                if (stop or due) and step < point:
                    if on_branch and trunk is not None and not on_disk:
                        save(trunk, came_from, None)
                        on_disk = True
                    save(loop.tensors(), step, point if on_branch else None)
                    saved = time.monotonic()
        if step < point:
            return outcome("stopped", f"asked to stop at step {step}")
        if chief:
            checkpoints.save_point(point, loop.weights(), {"seed": seed})
        loop.ranks.barrier()
        if on_branch and not last:
            assert trunk is not None
            loop.restore(trunk)
            step, trunk = came_from, None
        if (recipe.schedule == "constant" and last) or (stop and not last):
            save(loop.tensors(), step, None)
        if stop and not last:
            return outcome("stopped", f"asked to stop at point {point}")
    return outcome("done")
