"""Does the loop train what it says: same bits after a kill, on a branch, in pieces, on two ranks?"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.checkpoint import Checkpoints, load_point, read
from models.config import Recipe, Runtime, segments, steps_paid
from models.training import Loop, ema_exponent, join, mixed, rate, train

RECIPE = Recipe(batch=8, lr=1e-2, warmup=3, decay=0.25, ema=0.1)
RUNTIME = Runtime(device="cpu", log_every=7, save_every_s=1e9)


class Lines:
    """A stream of noisy lines: example i depends on (split, seed, i) only."""

    def draw(self, split, position, count, seed, device):
        index = torch.arange(position, position + count, dtype=torch.float64)
        x = torch.stack([torch.sin(index * (k + 1) * 0.7 + seed) for k in range(4)], dim=1).float()
        return {"x": x, "y": x.sum(1, keepdim=True) + 0.1 * x[:, :1] ** 2}


class Net(nn.Module):
    """A small regression with dropout, a buffer that training changes, and per-image noise."""

    def __init__(self, dropout: float = 0.1, poison: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.draws = {"noise": ("normal", (4,))}
        self.poison = poison
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch, step):
        error = F.mse_loss(self.layers(batch["x"] + 0.01 * batch["noise"]), batch["y"])
        if step == self.poison:
            error = error * math.nan
        return {"loss": error, "twice": 2 * error.detach()}

    def after_step(self, step, decaying):
        self.seen += 1 + 10 * decaying


def net(seed: int = 0, **kwargs) -> Net:
    torch.manual_seed(mixed(seed, "init"))
    return Net(**kwargs)


def run(folder: Path, points, *, recipe=RECIPE, runtime=RUNTIME, module=None, stop_after=None, seed=0, rows=None):
    """Train into ``folder``; with ``stop_after``, ask to stop after that many steps."""
    steps = iter(range(1, 10**9))
    return train(
        module or net(seed),
        Lines(),
        recipe,
        points,
        seed=seed,
        runtime=runtime,
        checkpoints=Checkpoints(folder / "ckpt", folder / "points"),
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


def test_two_ranks_equal_one_process(tmp_path):
    run(tmp_path / "one", (12, 20), module=net(dropout=0.0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "two")]
    ranks = [subprocess.Popen(command, env=shared | {"RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for step in (12, 20):
        one, two = point(tmp_path / "one", step), point(tmp_path / "two", step)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)


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
    quick = RUNTIME.model_copy(update={"save_every_s": 1e-9})
    run(tmp_path / "hurt", (40,), runtime=quick, stop_after=20)
    saved = sorted((tmp_path / "hurt" / "ckpt").iterdir())
    assert [path.name for path in saved] == ["trunk-00000019", "trunk-00000020"]
    tensors = saved[-1] / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert run(tmp_path / "hurt", (40,)).steps == 21
    assert same(point(tmp_path / "whole", 40), point(tmp_path / "hurt", 40))


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


if __name__ == "__main__":  # one of two ranks, started by the test above
    join()
    assert dist.get_world_size() == 2
    run(Path(sys.argv[1]), (12, 20), module=net(dropout=0.0))
    dist.destroy_process_group()
