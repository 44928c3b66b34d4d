"""Which published tables are there, what do their columns hold, and how do notes become columns?

A column name means one thing, in one unit, in every table; ``results/published/README.md`` says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl

EVIDENCE = {
    "code": "read in the code of the authors",
    "repository": "read in a README or document of the authors' repository",
    "page": "read on the authors' project page",
    "paper": "read in the text or a table of the paper",
    "abstract": "read in the abstract",
    "table": "read in a table of the source",
    "text": "read in the text of the source",
    "citing": "read in another paper, which cites it",
    "digitised": "digitised from a published figure",
    "eye": "read by eye from a published figure",
    "secondary": "read in third parties' notes or copies, not in the paper",
    "issue": "reported by a user or author in an issue thread",
    "calculated": "calculated from what the source gives",
}


@dataclass(frozen=True)
class Kind:
    """Type and range of a column: low <= value <= high, or low < value where ``open``."""

    dtype: type[pl.DataType]
    low: float | None = None
    high: float | None = None
    open: bool = False

    @property
    def allowed(self) -> str:
        left = "" if self.low is None else f"{'above' if self.open else 'from'} {self.low:g}"
        right = "" if self.high is None else f"up to {self.high:g}"
        what = {pl.Float64: "a number", pl.Int64: "an integer", pl.Boolean: "true or false"}[self.dtype]
        return " ".join(part for part in (what, left, right) if part)


TEXT, FLAG, NUMBER = Kind(pl.String), Kind(pl.Boolean), Kind(pl.Float64)
POSITIVE, COUNT, NATURAL = Kind(pl.Float64, 0, open=True), Kind(pl.Int64, 1), Kind(pl.Int64, 0)
SHARE, PERCENT, CORRELATION = Kind(pl.Float64, 0, 1), Kind(pl.Float64, 0, 100), Kind(pl.Float64, -1, 1)


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _columns(*groups: tuple[Kind, str]) -> dict[str, Kind]:
    return {name: kind for kind, names in groups for name in names.split()}


COLUMNS = _columns(
    (TEXT, "source evidence provenance note notes caution finding formula duplicate_of"),
    (TEXT, "tokenizer generator encoder method backbone model network data arm study encoders match property metric"),
    (TEXT, "condition factor level sweep setting distillation convention group operation space feature"),
    (TEXT, "reference labels guidance decoding relation colour"),
    (FLAG, "guided learnable_k k_scale cross_timestep training_images_at_sampling"),
    (COUNT, "tokens codebook latent_dim epochs iterations batch steps samples resolution generated_px input_px point"),
    (COUNT, "n dimensions params sampler_steps weight_bits activation_bits row layers"),
    (COUNT, "generator_epochs rdm_epochs bits"),
    (NATURAL, "top_k connections seed"),
    (POSITIVE, "rfid gfid fid sfid rep_fd val_fd value psnr lpips inception_score cfg temperature lds macs_g params_m"),
    (POSITIVE, "rdm_params_m generator_params_m rdm_days generator_days samples_per_s bits_per_pixel weights_m"),
    (POSITIVE, "size_mib times_smaller binary_macs_g full_macs_g ops_g times_fewer_ops ms_per_iteration hours time_us"),
    (POSITIVE, "times_faster flops model_size threshold loss svg_x svg_y"),
    (SHARE, "usage precision recall top_p ssim"),
    (PERCENT, "linear_probe_pct precision_pct recall_pct"),
    (CORRELATION, "r r_low r_high"),
    (NUMBER, "alpha uniformity level_value tau"),
)

# the tags that notes of the two large sources begin with, in our words
PROVENANCE = {
    "primary-repo": "repository",
    "primary-repo+paper-text": "repository",
    "paper-text": "paper",
    "paper-text (citing paper)": "citing",
    "abstract": "abstract",
    "abstract (primary) + notes": "abstract",
    "secondary-note": "secondary",
    "secondary-note (table copy)": "secondary",
    "secondary-note (one note only)": "secondary",
    "issue": "issue",
}
TAGS = {
    "table": "table",
    "text": "text",
    "digitised from figure": "digitised",
    "read by eye": "eye",
    "issue": "issue",
    "secondary: third-party notes/paper copy": "secondary",
}

# keys of the notes of published_generation.csv that become columns; the others stay in ``notes``
KEYS = {
    **{"prov": "provenance", "cfg": "cfg", "caution": "caution", "duplicate_of": "duplicate_of", "metric": "metric"},
    **{"resolution": "resolution", "gen_px": "generated_px", "input_px": "input_px", "batch": "batch"},
    **{"steps": "steps", "top_k": "top_k", "top_p": "top_p", "temp": "temperature", "IS": "inception_score"},
    **{"sFID": "sfid", "prec": "precision", "rec": "recall", "usage": "usage", "SSIM": "ssim", "LPIPS": "lpips"},
    **{"GMACs": "macs_g", "linprobe": "linear_probe_pct", "decoding": "decoding"},
}
KEPT = words(
    "K_from cfg_pow epochs_from eval expected gen_tokens guidance iters losses meaning note observation pFID "
    "paper_value rIS rand_temp recipe rejection rfid_vs_train rfid_vs_val scales setting table train train_loss"
)

# what stands in the notes of published_convergence.csv after the tag
REMARKS = {
    "cfg": (r"\bcfg (\d+(?:\.\d+)?)", "{}"),
    "batch": (r"\bbatch (\d+)", "{}"),
    "seed": (r"\bseed (\d+)", "{}"),
    "reference": (r"\b(ADM|JiT) reference", "{} statistics"),
    "labels": (r"\b(balanced|random) labels", "{}"),
}

CHINCHILLA = (
    "Hoffmann et al. arXiv:2203.15556 Figure 4, its SVG read out by Besiroglu et al. arXiv:2404.10102 "
    "(data/svg_extracted_data.csv)"
)

Row = dict[str, str | None]


@dataclass(frozen=True)
class Table:
    """A table: its columns in order, which of them together name a row, and how its source becomes these columns."""

    columns: tuple[str, ...]
    key: tuple[str, ...]
    source: str = ""  # file without .csv, where it is not the table's name
    header: tuple[str, ...] = ()  # of the source, where it is not ``columns``
    convert: Callable[[Row], Row] | None = None  # text to text; raises ``Wrong``

    @property
    def schema(self) -> dict[str, type[pl.DataType]]:
        return {name: COLUMNS[name].dtype for name in self.columns}


class Wrong(Exception):
    """A value that cannot stand in its column: column, value, what is allowed."""


def pairs(notes: str) -> dict[str, str]:
    """``"a=1;b=x; y"`` as {"a": "1", "b": "x; y"}: what has no ``key=`` of its own goes on with the value before."""
    found: dict[str, str] = {}
    last = ""
    for part in notes.split(";"):
        match = re.match(r"([A-Za-z_]+)=(.*)", part)
        if match:
            last = match[1]
            found[last] = match[2]
        elif last:
            found[last] += f";{part}"
        else:
            raise Wrong("notes", part, 'text that begins with "key="')
    return found


def _generation(row: Row) -> Row:
    held = pairs(row["notes"] or "")
    for key in held:
        if key not in KEYS and key not in KEPT:
            raise Wrong("notes", f"{key}=", ", ".join(sorted({*KEYS, *KEPT})))
    found: Row = {KEYS[key]: value or None for key, value in held.items() if key in KEYS}
    tag = (found.get("provenance") or "").partition(";")[0]
    if tag not in PROVENANCE:
        raise Wrong("notes", f"prov={tag}", ", ".join(PROVENANCE))
    found["evidence"] = PROVENANCE[tag]
    scale = found.get("cfg")
    if scale and not re.fullmatch(r"\d+(\.\d+)?", scale):  # a schedule or a search has no single scale
        found["cfg"], found["guidance"] = None, scale
    usage = found.get("usage")
    if usage and usage.endswith("%"):
        found["usage"] = f"{float(usage[:-1]) / 100:.6g}"
    kept = {"tokens": row["tokens_per_image"], "codebook": row["codebook_size"]}
    return {**row, **kept, **found}


def _convergence(row: Row) -> Row:
    notes = row["notes"] or ""
    match = re.match(r"\[([^]]*)\] *(.*)", notes)
    if match is None or match[1] not in TAGS:
        raise Wrong("notes", notes, ", ".join(f"[{tag}]" for tag in TAGS))
    found: Row = {"evidence": TAGS[match[1]]}
    for column, (pattern, written) in REMARKS.items():
        said = re.search(pattern, match[2])
        found[column] = written.format(said[1]) if said else None
    return {**row, **found}


def _chinchilla(row: Row) -> Row:
    renamed = {"svg_x": row["x"], "svg_y": row["y"], "colour": row["color"], "flops": row["Training FLOP"]}
    return {
        "source": CHINCHILLA,
        "evidence": "digitised",
        "model_size": row["Model Size"],
        "loss": row["loss"],
        **renamed,
    }


def _plain(columns: str, key: str) -> Table:
    return Table(words(f"source evidence {columns}"), words(key))


TABLES: Mapping[str, Table] = {
    "generation": Table(
        words(
            "source evidence tokenizer tokens codebook latent_dim rfid psnr ssim lpips usage generator params_m macs_g "
            "epochs steps batch guided cfg guidance temperature top_k top_p decoding gfid metric inception_score sfid "
            "precision recall linear_probe_pct resolution generated_px input_px caution duplicate_of provenance notes"
        ),
        words(
            "source tokenizer tokens codebook latent_dim usage generator params_m epochs guided cfg guidance decoding"
        ),
        "published_generation",
        words(
            "source tokenizer tokens_per_image codebook_size latent_dim rfid psnr generator params_m epochs guided "
            "gfid notes"
        ),
        _generation,
    ),
    "convergence": Table(
        words(
            "source evidence method backbone params_m epochs iterations batch seed guided cfg labels reference gfid "
            "notes"
        ),
        words("source method backbone epochs guided seed"),
        "published_convergence",
        words("source method backbone params_m epochs iterations guided gfid notes"),
        _convergence,
    ),
    "chinchilla": Table(
        words("source evidence model_size flops loss svg_x svg_y colour"),
        words("model_size flops"),
        "chinchilla_svg_extracted",
        ("x", "y", "color", "Model Size", "Training FLOP", "hex_color", "loss"),
        _chinchilla,
    ),
    "irepa_association": _plain(
        "point property value gfid encoder match generator epochs iterations guided reference resolution note",
        "property point",
    ),
    "raev2_common_encoders": _plain(
        "encoder arm linear_probe_pct lds gfid generator epochs iterations guided resolution note", "encoder arm"
    ),
    "raev2_encoders": _plain("encoder arm gfid generator epochs iterations guided resolution", "encoder arm"),
    "correlations": _plain(
        "study arm encoders generator epochs guided property r n r_low r_high note",
        "study arm encoders generator property",
    ),
    "raev2_layers": _plain(
        "method layers metric value guided guidance encoder generator epochs resolution note",
        "method layers metric guided epochs",
    ),
    "ep_fid": _plain("method threshold relation epochs guided resolution note", "method threshold"),
    "fdr": _plain("method space value reference resolution note", "method space"),
    "fdr_spaces": _plain("space model input_px feature dimensions val_fd reference note", "space"),
    "crt": _plain("tokenizer tokens codebook rfid params_m gfid guided resolution caution note", "tokenizer params_m"),
    "crt_sweeps": _plain(
        "sweep tokens codebook bits bits_per_pixel rfid resolution finding note", "sweep tokens codebook"
    ),
    "crt_scaling": _plain("arm formula alpha note", "arm"),
    "rcg_generators": _plain(
        "generator condition fid inception_score guided samples reference resolution", "generator condition"
    ),
    "rcg_systems": _plain(
        "model condition guided tau params_m rdm_params_m generator_params_m fid inception_score precision recall "
        "training_images_at_sampling samples reference resolution note",
        "model condition guided",
    ),
    "rcg_ablations": _plain(
        "factor level level_value fid inception_score rep_fd uniformity generator generator_epochs rdm_epochs guided "
        "reference resolution note",
        "factor level",
    ),
    "rcg_data": _plain("data generator condition fid encoder samples reference resolution", "data condition"),
    "rcg_cost": _plain(
        "model condition rdm_params_m generator_params_m rdm_days generator_days rdm_epochs generator_epochs "
        "samples_per_s fid guided samples reference resolution",
        "model generator_epochs",
    ),
    "bidm_results": _plain(
        "data model method weight_bits activation_bits inception_score fid sfid precision_pct recall_pct guided "
        "sampler_steps samples reference resolution note",
        "data method",
    ),
    "bidm_ablations": _plain(
        "data model setting learnable_k connections distillation fid sfid precision_pct recall_pct guided "
        "sampler_steps samples resolution note",
        "setting",
    ),
    "bidm_speed": _plain(
        "data model row k_scale learnable_k cross_timestep distillation ms_per_iteration hours fid caution", "row"
    ),
    "bidm_accounting": _plain(
        "model network convention params size_mib times_smaller binary_macs_g full_macs_g ops_g times_fewer_ops note",
        "model network convention",
    ),
    "bidm_layers": _plain("model group layers weights_m macs_g", "group"),
    "bidm_kernels": _plain("operation time_us times_faster note", "operation"),
}
