"""Is a price what the arithmetic says, and does measured throughput replace the band?"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import config
from models.config import VQ, DeadLeaves, Digits, Latent, Llama, Protocol, Recipe, Runtime
from sweep import cost, rundir
from sweep.schema import schema
from sweep.sections import Price

DIGITS = Digits(views=10, views_heldout=2)
LATENT = Latent(4, 4, codebook=64)
TOKENIZER, GENERATOR = VQ(tokens=16, codebook=64, width=16), Llama()
COUNTS = cost.counts(GENERATOR, DIGITS, LATENT)
EXTRACTORS = ("digits-supervised", "digits-contrastive")


def test_counts_are_those_of_the_family():
    assert (COUNTS.params_core, COUNTS.params_total) == GENERATOR.params(LATENT, 10)
    assert COUNTS.training == 3 * COUNTS.forward == GENERATOR.flops(LATENT, 10).train
    assert cost.counts(TOKENIZER, DIGITS, LATENT).params_total == TOKENIZER.params(DIGITS).total


def test_encoding_is_paid_for_every_cached_view_of_both_splits():
    images = 1438 * 10 + 359 * 2
    assert cost.encoding(TOKENIZER, DIGITS) == images * TOKENIZER.flops_encode(DIGITS)
    leaves = DeadLeaves(size=16, cached=100, cached_heldout=10)
    assert cost.encoding(TOKENIZER, leaves) == 110 * (TOKENIZER.flops_encode(leaves) + leaves.flops_image)


def test_epochs_count_unique_images_and_a_cache_is_finite():
    assert cost.images_unique(DIGITS, cached=True) == cost.images_unique(DIGITS, cached=False) == 1438
    assert cost.images_unique(DeadLeaves(cached=100), cached=False) is None
    assert cost.images_unique(DeadLeaves(cached=100), cached=True) == 100


def measuring(**fields: object) -> cost.Measuring:
    protocol = Protocol(**{"of": "generator", "extractors": EXTRACTORS, "samples": 1000} | fields)
    return cost.measuring(protocol, GENERATOR, TOKENIZER, COUNTS, DIGITS, LATENT)


def test_sampling_costs_every_candidate_of_a_search_and_twice_with_guidance():
    plain = GENERATOR.flops_sample(LATENT, 10, guided=False)
    assert measuring().sample == 1000 * plain
    assert measuring(guidance=(2,)).sample == 2000 * plain
    searched = measuring(guidance=(1, 2, 3), search_samples=500)
    assert searched.sample == 2000 * plain + 500 * (1 + 2 + 2) * plain
    image = TOKENIZER.flops_decode(DIGITS) + 2 * 5e6
    assert searched.measure - measuring().measure == pytest.approx(3 * 500 * image)
    assert measuring(extractors=EXTRACTORS[:1]).measure == measuring().measure - 1000 * 5e6


def test_a_tokenizer_is_measured_without_sampling():
    protocol = Protocol(of="tokenizer", extractors=EXTRACTORS, samples=500)
    counted = cost.counts(TOKENIZER, DIGITS, LATENT)
    part = cost.measuring(protocol, TOKENIZER, None, counted, DIGITS, LATENT)
    assert part.sample == 0
    coding = 718 * TOKENIZER.flops_encode(DIGITS) + 500 * TOKENIZER.flops_decode(DIGITS)
    assert part.measure == coding + 500 * 1e7
    assert coding < 718 * counted.forward
    more = cost.measuring(protocol.model_copy(update={"samples": 1000}), TOKENIZER, None, counted, DIGITS, LATENT)
    assert more.measure == 1000 * (counted.forward + 1e7)


def test_code_lengths_are_of_so_many_sequences_at_most():
    def scored(data: config.DataFields) -> float:
        protocol = Protocol(of="generator", extractors=EXTRACTORS, samples=16)
        drawn = 16 * (TOKENIZER.flops_decode(data) + cost.features(protocol))
        measure = cost.measuring(protocol, GENERATOR, TOKENIZER, COUNTS, data, LATENT).measure
        return (measure - drawn) / COUNTS.forward

    assert scored(DIGITS) == pytest.approx(718 + config.SEQUENCES)
    assert scored(DeadLeaves(size=16, cached=10**6, cached_heldout=10**5)) == pytest.approx(2 * config.SEQUENCES)


def test_memory_of_sampling_holds_keys_and_values_of_a_batch():
    xl, latent = Llama(**Llama.ladder["XL"]), Latent(24, 24, 2**14)
    counted = [cost.counts(xl, DIGITS, latent)]

    def gib(guidance: float, batch: int) -> float:
        protocol = Protocol(of="generator", extractors=EXTRACTORS, samples=16, guidance=(guidance,))
        return cost.memory_measuring(protocol, xl, counted, DIGITS, latent, Runtime(measure_batch=batch))

    held = 4 * 2 * xl.layers * 576 * xl.width / 2**30  # of one sequence
    assert gib(1.0, 200) - gib(1.0, 100) == pytest.approx(100 * held)
    assert gib(2.0, 200) - gib(2.0, 100) == pytest.approx(200 * held)


def test_references_need_three_passes_of_real_images():
    assert cost.references(Protocol(of="tokenizer", extractors=EXTRACTORS, samples=500), DIGITS) == 3 * 500 * 1e7
    path = Protocol(of="tokenizer", extractors=("inception-v3-compat:/weights.pth",), samples=500)
    assert cost.references(path, DIGITS) == 3 * 500 * 1.14e10


def test_memory_holds_the_state_and_one_micro_batch():
    recipe = Recipe(lr=1e-3, batch=100)
    base = cost.memory_training(COUNTS, recipe, Runtime(micro_batch=1))
    grown = cost.memory_training(COUNTS, recipe, Runtime(micro_batch=11))
    assert (grown - base) * 2**30 == pytest.approx(10 * 4 * COUNTS.activations)
    assert cost.memory_training(COUNTS, recipe, Runtime()) == cost.memory_training(
        COUNTS, recipe, Runtime(micro_batch=100)
    )
    assert cost.memory_training(COUNTS, recipe, Runtime(devices=10)) == pytest.approx(
        cost.memory_training(COUNTS, recipe, Runtime(micro_batch=10))
    )
    state = cost.memory_training(COUNTS._replace(activations=0.0), recipe, Runtime())
    assert (state - cost.PROCESS_GIB) * 2**30 == pytest.approx(20 * COUNTS.params_total)
    half = Recipe(lr=1e-3, batch=100, precision="bfloat16")
    assert cost.memory_training(COUNTS, half, Runtime()) < cost.memory_training(COUNTS, recipe, Runtime())


def test_memory_of_a_sharded_run_holds_one_share_of_the_state_and_whole_casts():
    def held(devices: int, shard: bool, **recipe: object) -> float:
        """Bytes per parameter."""
        trained = Recipe(**{"lr": 1e-3, "batch": 100} | recipe)
        runtime = Runtime(devices=devices, shard=shard)
        gib = cost.memory_training(COUNTS._replace(activations=0.0), trained, runtime) - cost.PROCESS_GIB
        return gib * 2**30 / COUNTS.params_total

    assert held(4, False) == pytest.approx(20)
    assert held(4, True) == pytest.approx(20 / 4)
    assert held(4, True, ema=0) == pytest.approx(16 / 4)
    assert held(4, False, precision="bfloat16") == pytest.approx(20 + 2)
    assert held(4, True, precision="bfloat16") == pytest.approx(20 / 4 + 2)


def test_a_run_is_sharded_where_its_state_does_not_fit_one_device_unless_the_grid_says_otherwise():
    recipe = Recipe(lr=1e-3, batch=100)

    def chosen(mem_gib: float | None, **runtime: object) -> bool | None:
        return cost.sharding(COUNTS, recipe, Runtime(**runtime), mem_gib).shard

    needed = cost.memory_training(COUNTS, recipe, Runtime(devices=2))
    assert chosen(needed * 0.999, devices=2) is True
    assert chosen(needed, devices=2) is False
    assert chosen(None, devices=2) is False
    assert chosen(needed / 10) is False
    assert chosen(needed / 10, devices=2, shard=False) is False
    assert chosen(needed * 10, devices=2, shard=True) is True


def test_disk_holds_resumable_checkpoints_points_and_codes():
    recipe, constant = Recipe(lr=1e-3), Recipe(lr=1e-3, schedule="constant", ema=0)
    assert cost.disk_training(COUNTS, recipe, 2) * 2**30 == COUNTS.params_total * (3 * 16 + 2 * 8)
    assert cost.disk_training(COUNTS, constant, 2) * 2**30 == COUNTS.params_total * (2 * 12 + 2 * 4)
    rows = 1438 * 10 + 359 * 2
    assert cost.disk_codes(DIGITS, LATENT) * 2**30 == rows * (16 * 2 + 12)
    assert cost.disk_codes(DIGITS, LATENT._replace(codebook=2**17)) * 2**30 == rows * (16 * 4 + 12)


PRICE = Price(peak_tflops=2.0, mfu=(0.25, 0.5), overhead_s=36.0)


def test_hours_span_the_band_and_add_the_start():
    hours = cost.Rates(PRICE).hours("generator", "llama", 1000, 3.6e15)
    assert hours == (1 + 0.01, 2 + 0.01, "band")


def test_measured_throughput_of_a_run_of_about_the_size_replaces_the_band():
    done = [cost.Throughput("generator", "llama", 1000, rate) for rate in (1e12, 2e12)]
    rates = cost.Rates(PRICE, done)
    assert rates.hours("generator", "llama", 1100, 3.6e15) == (0.5 + 0.01, 1 + 0.01, "measured")
    assert rates.hours("generator", "llama", 1100, 3.6e15, devices=4).low == 4 * (0.5 + 0.01)
    for other in (("generator", "llama", 1300), ("tokenizer", "llama", 1000), ("generator", "sit", 1000)):
        assert rates.hours(*other, 3.6e15).source == "band"


ROW = {"stage": "generator", "family": "llama", "status": "done", "params_total": 1000}


def test_throughput_is_read_from_parts_or_the_compact_table_and_damage_is_named(tmp_path):
    rows = [
        ROW | {"flops_per_s": 5e9},
        ROW | {"flops_per_s": 6e9, "status": "failed"},
        ROW | {"stage": "evaluation", "flops_paid": 1e10, "wall_s": 2.0},
        ROW | {"flops_per_s": None},
    ]
    full = [dict.fromkeys(schema("runs").names) | row for row in rows]
    part = rundir.part_file(tmp_path, "runs", "g0123456789ab", 1, 0)
    part.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(full, schema("runs")), part)
    broken = rundir.part_file(tmp_path, "runs", "g00000000000b", 1, 0)
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PAR1 and no more")
    found, unread = cost.measured(tmp_path)
    assert [(one.stage, one.flops_per_s) for one in found] == [("generator", 5e9), ("evaluation", 5e9)]
    assert len(unread) == 1
    assert unread[0].startswith(str(broken))
    compact = rundir.compact_file(tmp_path, "runs")
    compact.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(full[:1], schema("runs")), compact)
    assert cost.measured(tmp_path) == (found[:1], [])


@pytest.mark.parametrize(
    ("runtime", "mem_gib", "hours", "device_gib", "pack"),
    [
        ({}, 2.0, 0.1, 24.0, 8),  # 10 would fit
        ({}, 5.0, 0.1, 24.0, 4),
        ({}, 13.0, 0.1, 24.0, 1),
        ({}, 2.0, 1.5, 24.0, 1),  # long enough to have a device for itself
        ({}, 2.0, 0.1, None, 1),  # the grid does not say what a device has
        ({"device": "cpu"}, 2.0, 0.1, 24.0, 1),
        ({"devices": 2}, 2.0, 0.1, 24.0, 1),
        ({"pack": 3}, 20.0, 9.0, 24.0, 3),  # as it was asked for
    ],
)
def test_short_runs_share_a_device_as_its_memory_allows(runtime, mem_gib, hours, device_gib, pack):
    assert cost.packing(Runtime(**runtime), mem_gib, hours, device_gib).pack == pack
