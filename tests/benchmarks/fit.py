"""How fast is the law engine? One fit, 4,000 refits and 1,000 curves, beside the usual way in the same run.

    python tests/benchmarks/fit.py            # two minutes, most of them the 4,500 starts it is compared with
    python tests/benchmarks/fit.py --quick    # without them

The usual way is that of the Chinchilla replication (Besiroglu et al., arXiv 2404.10102): L-BFGS-B with finite
differences from a grid of 4,500 starts, on the same 240 points and the same Huber loss.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import polars as pl
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from analysis.fit import fit, fit_each
from analysis.laws import Array
from analysis.published import table
from analysis.resampling import rows
from analysis.result import Fit

DELTA = 1e-3
REPEATS = 7


def timed(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of a warm run."""
    run()
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def usual(x: Array, y: Array) -> tuple[float, float]:
    """Seconds and best loss of 4,500 starts with finite differences."""
    log_n, log_d, log_y = np.log(x[:, 0]), np.log(x[:, 1]), np.log(y)

    def loss(p: Array) -> float:
        a, b, e, alpha, beta = p
        law = logsumexp([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)], axis=0)
        return float(huber(DELTA, log_y - law).sum())

    grid = itertools.product(
        np.arange(0, 30, 5),
        np.arange(0, 30, 5),
        np.arange(-1, 1.5, 0.5),
        np.arange(0, 2.5, 0.5),
        np.arange(0, 2.5, 0.5),
    )
    start, best = time.perf_counter(), np.inf
    for point in grid:
        best = min(best, minimize(loss, np.array(point), method="L-BFGS-B").fun)
    return time.perf_counter() - start, best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the 4,500 starts")
    given = parser.parse_args()
    held = table("chinchilla").filter(pl.col("loss") < 3.446995430227908)
    n, flops = held["model_size"].to_numpy(), held["flops"].to_numpy()
    x, y = np.stack([n, flops / (6 * n)], axis=-1), held["loss"].to_numpy()
    huber_loss: dict[str, object] = {"loss": "huber", "delta": DELTA, "interval": "delta"}

    def one() -> Fit:
        return fit(x, y, "chinchilla", **huber_loss)  # type: ignore[arg-type]

    warm = timed(one)
    found = one()
    print(f"one Huber fit of 240 points: {1e3 * warm:.1f} ms, loss {found.objective:.16g}")
    stream = np.random.RandomState(42)
    indices = np.array([stream.choice(len(y), len(y), replace=True) for _ in range(4000)])
    spent = timed(lambda: rows(found.estimate, indices, "legacy"), 3)
    errors = ", ".join(
        f"{k} {v:.5g}" for k, v in zip(found.params, rows(found.estimate, indices, "").error, strict=True)
    )
    print(f"4,000 refits: {spent:.2f} s; standard errors {errors}")
    rng, budgets, grid = np.random.default_rng(0), np.geomspace(1e9, 1e11, 8), np.geomspace(1e9, 1e12, 60)
    curves = [
        (budgets, (2 + 10 * (budgets / 1e9) ** -0.5) * np.exp(0.03 * rng.standard_normal(8))) for _ in range(1000)
    ]

    def bands() -> None:
        for each in fit_each(curves):
            assert isinstance(each, Fit)
            each.conf_int()
            each.get_prediction(grid).summary_frame()

    print(f"1,000 saturating laws with intervals and bands at 60 places: {timed(bands, 3):.2f} s")
    singly = timed(lambda: [fit(*curve) for curve in curves[:100]], 3) * 10
    print(f"  of these the fits alone: {timed(lambda: fit_each(curves), 3):.2f} s; one by one {singly:.2f} s")
    if not given.quick:
        seconds, best = usual(x, y)
        print(f"4,500 starts of L-BFGS-B: {seconds:.1f} s, loss {best:.16g}; ratio {seconds / warm:,.0f}")


if __name__ == "__main__":
    main()
