"""Does the loop train what it says: same bits after a kill, on a branch, in pieces, on two ranks?"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.checkpoint import Checkpoints, load_point, read
from models.config import VQ, DeadLeaves, Latent, Llama, Recipe, Runtime, family, segments, steps_paid
from models.data import encode
from models.training import Loop, device_of, ema_exponent, join, leave, meet, mixed, rate, train

RECIPE = Recipe(batch=8, lr=1e-2, warmup=3, decay=0.25, ema=0.1)
RUNTIME = Runtime(device="cpu", log_every=7, save_every_s=1e9)
QUICK = RUNTIME.model_copy(update={"save_every_s": 1e-9})  # saves after every step


def on_gpu(test):
    """A test for the GPU; what torch itself warns of there is not at issue."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.mark.gpu(skip(pytest.mark.filterwarnings("default")(test)))


class Lines:
    """A stream of noisy lines: example i depends on (split, seed, i) only."""

    def draw(self, split, position, count, seed, device):
        index = torch.arange(position, position + count, dtype=torch.float64)
        x = torch.stack([torch.sin(index * (k + 1) * 0.7 + seed) for k in range(4)], dim=1).float()
        return {"x": x.to(device), "y": (x.sum(1, keepdim=True) + 0.1 * x[:, :1] ** 2).to(device)}


class Net(nn.Module):
    """A small regression with dropout, a buffer that training changes, and per-image noise.

    ``poison`` is the step with a loss that is no number, ``spike`` that with a gradient that is not finite.
    """

    def __init__(self, dropout: float = 0.1, poison: int | None = None, spike: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.draws = {"noise": ("normal", (4,))}
        self.poison, self.spike = poison, spike
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch, step):
        error = F.mse_loss(self.layers(batch["x"] + 0.01 * batch["noise"]), batch["y"])
        if step == self.poison:
            error = error * math.nan
        if step == self.spike:
            weight = self.layers[0].weight
            error = error + (weight - weight.detach()).sum().sqrt()  # zero, on an infinite slope
        return {"loss": error, "twice": 2 * error.detach()}

    def after_step(self, step, decaying):
        self.seen += 1 + 10 * decaying


def net(seed: int = 0, **kwargs) -> Net:
    torch.manual_seed(mixed(seed, "init"))
    return Net(**kwargs)


def run(
    folder: Path,
    points,
    *,
    recipe=RECIPE,
    runtime=RUNTIME,
    module=None,
    stream=None,
    stop_after=None,
    seed=0,
    rows=None,
    guard=lambda: None,
):
    """Train into ``folder``; with ``stop_after``, ask to stop after that many steps."""
    steps = iter(range(1, 10**9))
    return train(
        module or net(seed),
        stream or Lines(),
        recipe,
        points,
        seed=seed,
        runtime=runtime,
        checkpoints=Checkpoints(folder / "ckpt", folder / "points", guard),
        record=lambda step, _, metrics, point: rows.append((step, metrics, point)) if rows is not None else None,
        should_stop=lambda: stop_after is not None and next(steps) >= stop_after,
    )


def point(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read(folder / "points" / f"{step:08d}", "point")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@settings(max_examples=12, deadline=None)
@given(stops=st.lists(st.integers(1, 45), min_size=1, max_size=4))
def test_a_run_that_is_stopped_anywhere_goes_on_bit_for_bit(schedule, stops, tmp_path_factory):
    recipe = RECIPE.model_copy(update={"schedule": schedule})
    points = (40,) if schedule == "cosine" else (12, 25, 40)
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    assert run(whole, points, recipe=recipe).state == "done"
    for stop in stops:
        run(pieces, points, recipe=recipe, stop_after=stop)
    assert run(pieces, points, recipe=recipe).state == "done"
    for step in points:
        assert same(point(whole, step), point(pieces, step))


def test_a_branch_equals_a_run_of_exactly_that_length(tmp_path):
    run(tmp_path / "trunk", (12, 25, 40))
    for step in (12, 25, 40):
        run(tmp_path / str(step), (step,))
        assert same(point(tmp_path / "trunk", step), point(tmp_path / str(step), step))


def test_points_added_to_a_finished_run_equal_points_planned_from_the_start(tmp_path):
    run(tmp_path / "all", (12, 25, 40))
    run(tmp_path / "grown", (25,))
    outcome = run(tmp_path / "grown", (12, 25, 40))
    assert outcome.steps == steps_paid((12, 40), RECIPE)  # point 12 lies before the trunk that was kept
    assert run(tmp_path / "grown", (12, 25, 40)).steps == 0
    for step in (12, 25, 40):
        assert same(point(tmp_path / "all", step), point(tmp_path / "grown", step))


def test_a_longer_point_starts_from_the_trunk_that_was_kept(tmp_path):
    run(tmp_path, (40,))
    outcome = run(tmp_path, (40, 80))
    leaves = segments((40,), RECIPE)[0].stop
    assert outcome.steps == 80 - leaves


def test_paid_steps_are_the_steps_that_run(tmp_path):
    assert run(tmp_path, (12, 25, 40)).steps == steps_paid((12, 25, 40), RECIPE)


def test_the_trunk_does_not_depend_on_how_a_batch_is_divided(tmp_path):
    run(tmp_path / "whole", (20,), module=net(dropout=0.0))
    run(
        tmp_path / "micro",
        (20,),
        module=net(dropout=0.0),
        runtime=RUNTIME.model_copy(update={"micro_batch": 2}),
    )
    for a, b in zip(point(tmp_path / "whole", 20).values(), point(tmp_path / "micro", 20).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [("cuda", 4, "cuda:2"), ("cuda", 1, "cuda:0"), ("auto", 2, "cuda:0"), ("cpu", 4, None)],
)
def test_a_rank_joins_with_the_device_of_its_run(device, seen, expected, monkeypatch):
    """Rank 2 of 3 on a node where torch sees some GPUs: all of them, or (one per task) only its own."""
    calls: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: calls.append((backend, rest["device_id"])))
    monkeypatch.setattr(dist, "new_group", lambda backend, **_: backend)
    monkeypatch.setattr("models.training._hosts", None)  # join sets it and the variable: taken back after the test
    monkeypatch.setenv("LOCAL_RANK", "0")
    store = dist.HashStore()
    for rank in range(2):
        dist.PrefixStore("run", store).set(f"rank {rank}", "here")
    join(RUNTIME.model_copy(update={"device": device}), store, "run", rank=2, size=3, local_rank=2)
    if expected is None:
        assert calls == [("gloo", None)]
    else:
        assert calls == [torch.device(expected), ("nccl", torch.device(expected))]
        assert device_of(RUNTIME.model_copy(update={"device": device})) == expected


@pytest.mark.parametrize(("schedule", "decaying"), [("wsd", 10), ("cosine", 10), ("constant", 0)])
def test_a_family_is_told_which_steps_decay(schedule, decaying, tmp_path):
    run(tmp_path, (40,), recipe=RECIPE.model_copy(update={"schedule": schedule}))
    assert point(tmp_path, 40)["raw.seen"] == 40 + 10 * decaying


def test_a_constant_rate_knows_no_points(tmp_path):
    constant = RECIPE.model_copy(update={"schedule": "constant"})
    run(tmp_path / "all", (12, 25, 40), recipe=constant)
    run(tmp_path / "one", (40,), recipe=constant)
    assert same(point(tmp_path / "all", 40), point(tmp_path / "one", 40))


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    rows: list = []
    outcome = run(tmp_path, (40,), module=net(spike=39), rows=rows)  # the last step: no loss is computed after it
    assert outcome.state == "diverged"
    assert outcome.reason == "gradient norm inf at step 40"
    assert rows[-1][0] == 35
    assert not (tmp_path / "points").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path):
    rows: list = []
    outcome = run(tmp_path, (40,), module=net(poison=9), rows=rows)
    assert outcome.state == "diverged"
    assert outcome.reason is not None
    assert "step 14" in outcome.reason  # the first logging step after it
    assert all(math.isfinite(metrics["loss"]) for _, metrics, _ in rows)
    assert not (tmp_path / "points").exists()


def test_a_loss_beyond_the_bound_diverges(tmp_path):
    assert run(tmp_path, (40,), recipe=RECIPE.model_copy(update={"diverged": 1e-9})).state == "diverged"


def test_rows_are_means_over_the_steps_between_them(tmp_path):
    rows: list = []
    run(tmp_path, (20,), rows=rows)
    assert [step for step, _, _ in rows] == [7, 14, 15, 20]
    assert [where for _, _, where in rows] == [None, None, None, 20]
    assert all(metrics["twice"] == pytest.approx(2 * metrics["loss"]) for _, metrics, _ in rows)
    assert {"loss", "twice", "grad_norm"} == rows[0][1].keys()


class Waits(TorchDispatchMode):
    """Counts the places where the host reads a tensor's value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    loop = Loop(net(), Lines(), RECIPE, seed=0, runtime=RUNTIME)
    with Waits() as waits:
        for step in range(5):
            loop.step(step, 100, None)
    assert waits.count == 0
    assert set(loop.flush()) == {"loss", "twice", "grad_norm"}


def test_damaged_checkpoints_are_passed_over(tmp_path):
    run(tmp_path / "whole", (40,))
    run(tmp_path / "hurt", (40,), runtime=QUICK, stop_after=20)
    saved = sorted((tmp_path / "hurt" / "ckpt").iterdir())
    assert [path.name for path in saved] == ["trunk-00000019", "trunk-00000020"]
    tensors = saved[-1] / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert run(tmp_path / "hurt", (40,)).steps == 21
    assert same(point(tmp_path / "whole", 40), point(tmp_path / "hurt", 40))


def test_a_branch_goes_on_from_its_state_before_a_damaged_one(tmp_path):
    run(tmp_path / "whole", (40, 80))
    run(tmp_path / "hurt", (40, 80), runtime=QUICK, stop_after=36)
    names = ["branch-00000040-00000035", "branch-00000040-00000036", "trunk-00000029", "trunk-00000030"]
    assert sorted(path.name for path in (tmp_path / "hurt" / "ckpt").iterdir()) == names
    tensors = tmp_path / "hurt" / "ckpt" / names[1] / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert run(tmp_path / "hurt", (40, 80)).steps == steps_paid((40, 80), RECIPE) - 35
    for step in (40, 80):
        assert same(point(tmp_path / "whole", step), point(tmp_path / "hurt", step))


def test_the_trunk_is_written_once_per_branch(tmp_path):
    run(tmp_path, (40, 80), runtime=QUICK, stop_after=31)
    trunk = tmp_path / "ckpt" / "trunk-00000030" / "state.safetensors"
    written = trunk.stat().st_mtime_ns
    run(tmp_path, (40, 80), runtime=QUICK, stop_after=5)
    assert sorted(tmp_path.glob("ckpt/branch-*"))[-1].name == "branch-00000040-00000036"
    assert trunk.stat().st_mtime_ns == written


def test_a_branch_whose_trunk_is_lost_keeps_its_states_while_the_trunk_is_written(tmp_path):
    run(tmp_path, (40, 80), runtime=QUICK, stop_after=36)
    for state in tmp_path.glob("ckpt/trunk-*/state.safetensors"):
        state.unlink()
    run(tmp_path, (40, 80), runtime=QUICK, stop_after=1)
    names = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert {"trunk-00000000", "branch-00000040-00000036", "branch-00000040-00000037"} <= names


def test_a_point_before_the_kept_trunk_can_be_interrupted_too(tmp_path):
    run(tmp_path, (40,), runtime=QUICK)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"trunk-00000029", "trunk-00000030"}
    run(tmp_path, (12, 40), runtime=QUICK, stop_after=5)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {f"trunk-000000{n}" for n in ("04", "05", "30")}
    assert run(tmp_path, (12, 40)).steps == 12 - 5


def test_a_flipped_byte_is_noticed(tmp_path):
    run(tmp_path, (12,))
    tensors = tmp_path / "points" / "00000012" / "point.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-3] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        point(tmp_path, 12)


def test_averaged_weights_follow_the_power_law(tmp_path):
    """The average of p(s) = s under weights (s/t)^gamma tends to t (gamma + 1) / (gamma + 2)."""
    gamma = ema_exponent(0.1)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.01)
    assert gamma == pytest.approx(6.94, abs=0.01)
    average = 0.0
    for step in range(4000):
        average += (step + 1 - average) * (1 - (1 - 1 / (step + 1)) ** (gamma + 1))
    assert average / 4000 == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
    run(tmp_path, (40,))
    state = point(tmp_path, 40)
    assert not torch.equal(state["ema.layers.0.weight"], state["raw.layers.0.weight"])


def test_weights_load_by_kind(tmp_path):
    run(tmp_path, (12,))
    state = point(tmp_path, 12)
    for kind in ("raw", "ema"):
        module = net(seed=9)
        assert load_point(tmp_path / "points", 12, module, kind)["point"] == 12
        assert torch.equal(module.layers[0].weight, state[f"{kind}.layers.0.weight"])
    run(tmp_path / "off", (12,), recipe=RECIPE.model_copy(update={"ema": 0.0}))
    with pytest.raises(ValueError, match="allowed: raw"):
        load_point(tmp_path / "off" / "points", 12, net(), "ema")


def test_rates_warm_up_hold_and_fall():
    wsd = RECIPE
    assert [rate(wsd, s, 30, None) for s in (0, 1, 2, 20)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [rate(wsd, s, 30, 40) for s in (30, 35, 39)] == pytest.approx([1, 0.5, 0.1])
    cosine = RECIPE.model_copy(update={"schedule": "cosine", "warmup": 0})
    assert [rate(cosine, s, 40, 40) for s in (0, 20, 40)] == pytest.approx([1, 0.5, 0], abs=1e-12)


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="micro_batch: 3"):
        Loop(net(), Lines(), RECIPE, seed=0, runtime=RUNTIME.model_copy(update={"micro_batch": 3}))


def test_a_guard_that_objects_keeps_the_disk_as_it_was(tmp_path):
    class Superseded(RuntimeError):
        pass

    def guard() -> None:
        raise Superseded

    with pytest.raises(Superseded):
        train(
            net(),
            Lines(),
            RECIPE,
            (12,),
            seed=0,
            runtime=RUNTIME,
            checkpoints=Checkpoints(tmp_path / "ckpt", tmp_path / "points", guard),
            record=lambda *_: None,
        )
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_compiled_step_trains_to_the_same_weights(tmp_path):
    run(tmp_path / "eager", (12,), module=net(dropout=0.0))
    run(tmp_path / "compiled", (12,), module=net(dropout=0.0), runtime=RUNTIME.model_copy(update={"compile": True}))
    for a, b in zip(point(tmp_path / "eager", 12).values(), point(tmp_path / "compiled", 12).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


FAMILIES = pytest.mark.parametrize("kind", ["vq", "llama"])


def built(kind: str, folder: Path) -> dict:
    """A small tokenizer and dead leaves, or a small generator and that tokenizer's codes."""
    data, fields = DeadLeaves(size=16, leaves=6, cached=64, cached_heldout=32), VQ(tokens=16, width=8, reset_every=2)
    torch.manual_seed(0)
    module, stream = fields.build(data), data.build()
    if kind == "llama":
        stream = encode(module.eval(), stream, folder / "codes", seed=0)
        module = Llama(layers=2, width=32, heads=2).build(fields.latent(data), data.labels)
    return {"module": module, "stream": stream}


def real(kind: str, folder: Path, **runtime) -> Loop:
    """The loop of a small tokenizer on dead leaves, or of a small generator on that tokenizer's codes."""
    recipe = Recipe(batch=24, lr=1e-3, warmup=0, precision=runtime.pop("precision", "float32"))
    return Loop(**built(kind, folder), recipe=recipe, seed=0, runtime=Runtime(**({"device": "cuda"} | runtime)))


def trained(loop: Loop, steps: int = 3) -> dict[str, float]:
    for step in range(steps):
        loop.step(step, 100, None)
    return loop.flush()


def test_the_example_of_a_family_samples_where_its_weights_are(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    table = family("generator", "example_family:Independent")().build(Latent(2, 2, codebook=8), 3).to("meta")
    assert table.sample(torch.zeros(5, dtype=torch.int64, device="meta"), seed=0).device.type == "meta"


@pytest.mark.slow
@FAMILIES
def test_compiled_families_learn_as_they_do_uncompiled(kind, tmp_path):
    eager, compiled = (trained(real(kind, tmp_path, device="cpu", compile=on)) for on in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-3)


@on_gpu
@FAMILIES
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_families_learn_on_a_gpu(kind, precision, tmp_path):
    eager = trained(real(kind, tmp_path))
    compiled = trained(real(kind, tmp_path, compile=True, precision=precision))
    assert compiled == pytest.approx(eager, rel=0.01 if precision == "float32" else 0.1)


@on_gpu
@FAMILIES
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_a_real_family_never_waits_for_the_gpu(kind, precision, tmp_path):
    loop = real(kind, tmp_path, precision=precision)
    trained(loop)  # libraries are loaded, memory is taken
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 9):  # resets of dead codes among them
            loop.step(step, 100, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(value) for value in loop.flush().values())


@on_gpu
def test_a_trunk_that_waited_on_the_host_goes_on_on_the_gpu(tmp_path):
    cuda = RUNTIME.model_copy(update={"device": "cuda"})
    run(tmp_path / "all", (12, 25, 40), runtime=cuda, stop_after=20)
    run(tmp_path / "all", (12, 25, 40), runtime=cuda)
    run(tmp_path / "one", (40,), runtime=cuda)
    for a, b in zip(point(tmp_path / "all", 40).values(), point(tmp_path / "one", 40).values(), strict=True):
        torch.testing.assert_close(a, b)


# --- two ranks ---------------------------------------------------------------------------------------------------

ONE, DENSE, SHARDED = (
    RUNTIME.model_copy(update={"devices": devices, "shard": shard})
    for devices, shard in ((1, False), (2, False), (2, True))
)
RUNTIMES = {"dense": DENSE, "sharded": SHARDED}
DIVIDED = pytest.mark.parametrize("divided", list(RUNTIMES))
SHORT = Recipe(batch=24, lr=1e-3, warmup=3, ema=0.1, clip=0.2)
HALF = SHORT.model_copy(update={"precision": "bfloat16"})
SEVERAL = (12, 25, 40)


class Scalar(Net):
    """A family with a parameter that cannot be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def training(into: str, points=(24,), *, kind=None, make=net, dropout=0.0, stop=None, **options):
    """A job of two ranks: train into a folder. Rank 1 alone asks to stop, after ``stop`` steps."""

    def job(folder: Path, rank: int, device: str) -> dict:
        rows: list = []
        made = built(kind, folder) if kind else {"module": make(dropout=dropout)}
        runtime = options["runtime"].model_copy(update={"device": device})
        asked = {"stop_after": stop if rank == 1 else None}
        outcome = run(folder / into, points, **(options | made | asked | {"runtime": runtime, "rows": rows}))
        if outcome.state == "done":  # what was passed in is whole and can be used
            load_point(folder / into / "points", points[-1], made["module"], "ema", device)
        return {"state": outcome.state, "steps": outcome.steps, "rows": rows}

    return job


def refused(folder: Path, rank: int, device: str) -> dict:
    """A job whose rank 0 may not write."""

    def guard() -> None:
        raise PermissionError("another attempt has this run")

    return run(folder / "refused", (12,), runtime=DENSE, guard=guard)


def shares(folder: Path, rank: int, device: str) -> dict[str, float]:
    """A job that tells how much of everything this rank holds."""
    loop = Loop(**built("llama", folder), recipe=SHORT, seed=0, runtime=SHARDED)
    loop.step(0, 100, None)
    moments = [state[name] for state in loop.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = {"parameters": loop.params, "moments": moments, "average": loop.ema}
    return {name: sum(t.to_local().numel() for t in each) / sum(t.numel() for t in each) for name, each in held.items()}


def alike(name: str, runtime: Runtime) -> dict:
    """Jobs that are done both with and without sharding."""
    micro, seldom = (runtime.model_copy(update=change) for change in ({"micro_batch": 2}, {"log_every": 10_000}))
    return {
        f"net-{name}": training(f"net-{name}", (12, 20), runtime=runtime),
        f"net-{name}-micro": training(f"net-{name}-micro", (12, 20), runtime=micro),
        f"llama-{name}": training(f"llama-{name}", kind="llama", recipe=SHORT, runtime=runtime),
        f"llama-{name}-half": training(f"llama-{name}-half", kind="llama", recipe=HALF, runtime=runtime),
        f"vq-{name}": training(f"vq-{name}", kind="vq", recipe=SHORT, runtime=runtime),
        f"home-{name}": training(f"home-{name}", kind="llama", recipe=SHORT, runtime=runtime),
        f"whole-{name}": training(f"whole-{name}", SEVERAL, dropout=0.1, runtime=runtime),
        f"pieces-{name}-1": training(f"pieces-{name}", SEVERAL, dropout=0.1, stop=11, runtime=seldom),
        f"pieces-{name}-2": training(f"pieces-{name}", SEVERAL, dropout=0.1, stop=20, runtime=runtime),
        f"pieces-{name}-3": training(f"pieces-{name}", SEVERAL, dropout=0.1, runtime=runtime),
    }


JOBS = {
    "apart": training("apart", runtime=DENSE),
    "refused": refused,
    "scalar": training("scalar", make=lambda **_: Scalar(), runtime=SHARDED),
    "shares": shares,
    "away": training("away", kind="llama", stop=10, recipe=SHORT, runtime=SHARDED),
    **alike("dense", DENSE),
    **alike("sharded", SHARDED),
}
SLOW = {
    "compiled": training("compiled", kind="llama", recipe=SHORT, runtime=SHARDED.model_copy(update={"compile": True}))
}


def two_ranks(folder: Path, device: str, jobs: Iterable[str]) -> dict[str, list[dict]]:
    """What each of two processes told of each job."""
    command = [sys.executable, __file__, str(folder), device]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), *jobs], env=own) for rank in range(2)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return {job: [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in range(2)] for job in jobs}


def one_of_two(folder: Path, device: str, rank: int, jobs: list[str]) -> None:
    """Do jobs together with the other rank, each in a group of its own."""
    file, failed = folder / "port", []
    if rank == 0:
        store, port = meet("localhost", 2, 120.0)
        file.with_suffix(".new").write_text(str(port))
        file.with_suffix(".new").rename(file)
    else:
        while not file.exists():
            time.sleep(0.05)
        store, _ = meet("localhost", 2, 120.0, int(file.read_text()))
    for job in jobs:
        began = time.monotonic()
        name, patience = (f"{job}@{rank}", 2) if job == "apart" else (job, 120)
        store.set_timeout(timedelta(seconds=patience))
        try:
            join(DENSE.model_copy(update={"device": device}), store, name, rank, 2, rank, timeout_s=120.0)
            told = (JOBS | SLOW)[job](folder, rank, device)
        except Exception as error:
            traceback.print_exc()
            failed.append(error)  # which keeps what its frames held
            told = {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
        finally:
            leave()
        (folder / f"{job}-{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Two processes that did all jobs one after the other: their folder, and what each told."""
    folder, threads = tmp_path_factory.mktemp("pair"), torch.get_num_threads()
    torch.set_num_threads(1)  # as they have
    for name in RUNTIMES:  # what they go on with
        begun = run(folder / f"home-{name}", (24,), recipe=SHORT, runtime=ONE, stop_after=10, **built("llama", folder))
        assert begun.state == "stopped"
    yield SimpleNamespace(folder=folder, told=two_ranks(folder, "cpu", JOBS))
    torch.set_num_threads(threads)


def near(one: dict, two: dict, tolerance: float) -> None:
    """Alike in names, shapes, types, and in values: each tensor as a whole, relative to its length."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value.shape, value.dtype) == (two[name].shape, two[name].dtype)
        length, apart = value.double().norm(), (value.double() - two[name].double()).norm()
        assert apart <= tolerance * length, f"{name}: {apart / length:.2g} apart"


def near_rows(one: list, two: list, tolerance: float) -> None:
    """Rows of one process and, as JSON, of two; the perplexity of codes is that of what is seen at a time."""
    assert [(step, where) for step, _, where in one] == [(step, where) for step, _, where in two]
    for (_, metrics, _), (_, others, _) in zip(one, two, strict=True):
        compared = metrics.keys() - {"perplexity"}
        assert {k: others[k] for k in compared} == pytest.approx({k: metrics[k] for k in compared}, rel=tolerance)


@DIVIDED
@pytest.mark.parametrize("micro", ["", "-micro"])
def test_two_ranks_equal_one_process(divided, micro, pair, tmp_path):
    rows: list = []
    run(tmp_path, (12, 20), module=net(dropout=0.0), runtime=ONE, rows=rows)
    for step in (12, 20):
        one, two = point(tmp_path, step), point(pair.folder / f"net-{divided}{micro}", step)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)
    first, second = pair.told[f"net-{divided}{micro}"]
    near_rows(rows, first["rows"], 1e-5)
    assert (first["state"], second["state"], second["rows"]) == ("done", "done", [])


@pytest.mark.gpu
def test_two_ranks_on_gpus_equal_one_process(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("two ranks on GPUs need two of them")
    run(tmp_path, (12, 20), module=net(dropout=0.0), runtime=ONE.model_copy(update={"device": "cuda"}))
    jobs = [f"net-{name}{micro}" for name in RUNTIMES for micro in ("", "-micro")]
    two_ranks(tmp_path, "cuda", jobs)
    for job in jobs:
        for step in (12, 20):
            one, two = point(tmp_path, step), point(tmp_path / job, step)
            assert one.keys() == two.keys()
            for key in one:
                torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


@FAMILIES
def test_two_ranks_train_a_real_family_as_one_process_does(kind, pair, tmp_path):
    rows: list = []
    run(tmp_path, (24,), recipe=SHORT, runtime=ONE, rows=rows, **built(kind, tmp_path))
    for name in RUNTIMES:
        two = pair.folder / f"{kind}-{name}"
        near(point(tmp_path, 24), point(two, 24), 1e-4)
        near(*(read(folder / "ckpt" / "trunk-00000019", "state")[0] for folder in (tmp_path, two)), 1e-4)
        near_rows(rows, pair.told[f"{kind}-{name}"][0]["rows"], 1e-4)
    assert all(metrics["grad_norm"] > SHORT.clip for _, metrics, _ in rows)  # the clip matters


def test_two_ranks_train_in_half_precision_as_one_process_does(pair, tmp_path):
    rows: list = []
    run(tmp_path, (24,), recipe=HALF, runtime=ONE, rows=rows, **built("llama", tmp_path))
    for name in RUNTIMES:
        near(point(tmp_path, 24), point(pair.folder / f"llama-{name}-half", 24), 0.01)
        near_rows(rows, pair.told[f"llama-{name}-half"][0]["rows"], 1e-3)


def test_each_rank_of_a_sharded_run_holds_its_half(pair):
    for told in pair.told["shares"]:
        assert told.keys() == {"parameters", "moments", "average"}
        assert all(0.49 < share < 0.51 for share in told.values())


@DIVIDED
def test_two_ranks_stop_at_the_step_where_one_was_asked_to_and_go_on_bit_for_bit(divided, pair):
    """The first stop is on a branch, its trunk in memory, the second on the trunk; no row is due at either."""
    pieces = [pair.told[f"pieces-{divided}-{number}"] for number in (1, 2, 3)]
    left = steps_paid(SEVERAL, RECIPE) - 31
    for rank in range(2):
        ends = [(told[rank]["state"], told[rank]["steps"]) for told in pieces]
        assert ends == [("stopped", 11), ("stopped", 20), ("done", left)]
    for step in SEVERAL:
        assert same(point(pair.folder / f"whole-{divided}", step), point(pair.folder / f"pieces-{divided}", step))
    rows, *parts = ({(s, w): m for s, m, w in t[0]["rows"]} for t in (pair.told[f"whole-{divided}"], *pieces))
    assert parts[1][12, 12] == pytest.approx(rows[12, 12], rel=1e-6)  # means over both ranks before the stop as after
    assert parts[2][28, None] == pytest.approx(rows[28, None], rel=1e-6)


def test_a_run_goes_on_with_another_number_of_devices(pair, tmp_path):
    rows: list = []
    run(tmp_path, (24,), recipe=SHORT, runtime=ONE, rows=rows, **built("llama", tmp_path))
    late: list = []
    away = pair.folder / "away"
    assert [told["state"] for told in pair.told["away"]] == ["stopped", "stopped"]
    outcome = run(away, (24,), recipe=SHORT, runtime=ONE, rows=late, **built("llama", tmp_path))
    assert outcome.steps == pair.told["home-dense"][0]["steps"] == pair.told["home-sharded"][0]["steps"] == 14
    for folder, others in (
        (away, late),
        *((pair.folder / f"home-{name}", pair.told[f"home-{name}"][0]["rows"]) for name in RUNTIMES),
    ):
        near(point(tmp_path, 24), point(folder, 24), 1e-4)
        near_rows(rows[1:], others, 1e-4)


def test_ranks_of_another_attempt_are_not_met(pair):
    for told in pair.told["apart"]:
        assert told["error"].startswith("DistStoreError")
        assert told["seconds"] < 60
    assert not (pair.folder / "apart").exists()


def test_a_rank_that_fails_does_not_keep_the_other_waiting(pair):
    first, second = pair.told["refused"]
    assert first["error"] == "PermissionError: another attempt has this run"
    assert second["error"].startswith("RuntimeError")
    assert second["seconds"] < 60  # of the 120 that it would wait
    assert not (pair.folder / "refused").exists()


def test_a_module_that_cannot_be_divided_is_refused(pair):
    for told in pair.told["scalar"]:
        assert told["error"].startswith("ValueError: shard: got true, but scale of Scalar is a single number")


@pytest.mark.slow
def test_a_compiled_sharded_step_trains_to_the_same_weights(tmp_path):
    run(tmp_path / "one", (24,), recipe=SHORT, runtime=ONE, **built("llama", tmp_path))
    two_ranks(tmp_path, "cpu", SLOW)
    near(point(tmp_path / "one", 24), point(tmp_path / "compiled", 24), 1e-4)


if __name__ == "__main__":  # one of two ranks, started by a test above
    one_of_two(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
