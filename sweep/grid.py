"""What does a grid name? Families found, rules read, protocols checked.

``load`` checks all that can be checked without combining anything; ``sweep.design`` combines. Every mistake is a
``GridError``: one line.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from models import config
from sweep.axes import RULES, Rule
from sweep.document import GridError, build, choose, join, naming, parse, read
from sweep.sections import Document, Measured, Price, Sized, Source, Trained

__all__ = ["Arm", "Choice", "Evaluation", "Grid", "GridError", "load"]

TRAINED: tuple[config.Stage, ...] = config.STAGES[:-1]
# What a filter may ask for beside the axes: columns of the plan that are known for every point.
FILTERS = frozenset(
    {"steps", "images", "epochs", "flops_target", "flops_to_point", "params_core", "params_total", "batch", "lr"}
    | {"seed", "size", "arm", "tokens", "codebook", "bits_nominal", "tokenizer_seed", "tokenizer_steps"}
)
# Names that a role cannot take, because a run's config uses them.
RESERVED = frozenset(
    {"run_id", "study", "stage", "family", "label", "identity", "fields", "data", "recipe", "seed", "points", "encode"}
    | {"upstream", "runtime", "plan", "protocol", "protocol_name", "protocol_id", "point", "checkpoint"}
)


class Choice(NamedTuple):
    """One setting of all axes of an arm; ``paths`` says where the file gives each of them."""

    fields: dict[str, Any]
    train: dict[str, Any]
    size: str | None
    paths: dict[str, str]


@dataclass(frozen=True)
class Arm:
    """A trained section with its family found and its rules read."""

    stage: config.Stage
    key: str
    name: str
    family: type[config.Family]
    section: Trained
    runtime: config.Runtime
    rules: dict[str, Rule]
    sizes: list[tuple[str | None, dict[str, Any], str]]  # name, fields, where the file gives it
    upstream: dict[str, Source]

    def swept(self, axis: str) -> list[Any]:
        """The values that an axis takes."""
        rows = (row for block in self.section.axes for row in block.settings())
        return [row[axis][0] for row in rows if axis in row]

    def choices(self) -> Iterator[Choice]:
        """All combinations of size and axes; an axis wins over a size, a size over ``fields``."""
        section = self.section
        plain = {name: rule for name, rule in section.train.items() if name not in self.rules}
        for (size, fields, where), *blocks in itertools.product(
            self.sizes, *([(i, row) for row in block.settings()] for i, block in enumerate(section.axes))
        ):
            given, train = {**section.fields, **fields}, dict(plain)
            paths = {name: join(where, name) for name in fields}
            for index, row in blocks:
                for axis, (value, path) in row.items():
                    paths[axis.removeprefix("train.")] = f"{self.key}.axes[{index}].{path}"
                    (train if axis.startswith("train.") else given)[axis.removeprefix("train.")] = value
            yield Choice(given, train, size, paths)


@dataclass(frozen=True)
class Evaluation:
    """A protocol, and which checkpoints it measures how often."""

    key: str
    name: str
    protocol: config.Protocol
    points: Literal["last", "all"]
    seeds: tuple[int, ...]
    arms: frozenset[str] | None


@dataclass(frozen=True)
class Grid:
    """A whole grid, checked and resolved."""

    file: str
    text: bytes
    study: str
    data_family: str
    data: config.DataFields
    arms: dict[config.Stage, tuple[Arm, ...]]
    evaluations: tuple[Evaluation, ...]
    price: Price
    laws: frozenset[str]


def load(path: str | Path) -> Grid:
    """The grid in a file; GridError names what is wrong in it."""
    with naming(str(path)):
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise GridError("", f"cannot be read ({error.strerror}); allowed: a YAML file") from None
        raw = parse(text)
        document = read(Document, raw)
        arms: dict[config.Stage, tuple[Arm, ...]] = {}
        for stage in TRAINED:
            arms[stage] = _arms(stage, document, isinstance(raw.get(stage), list), arms)
        evaluations = tuple(_evaluation(i, item, arms) for i, item in enumerate(document.evaluation))
        _distinct([evaluation.name for evaluation in evaluations], "evaluation")
        if not any(arms.values()):
            raise GridError("", f"got no section to train; allowed: one or more of {', '.join(TRAINED)}")
        data_family, data = _data(document.data)
        laws = frozenset(document.laws)
        return Grid(str(path), text, document.study, data_family, data, arms, evaluations, document.price, laws)


def _distinct(names: list[str], key: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise GridError.got(key, name, "a different name for each section")


def _family(kind: str, name: Any, key: str) -> type[config.Fields]:
    if not isinstance(name, str):
        raise GridError.got(key, name, choose("", config.FAMILIES[kind]) + ", or package.module:Class")
    try:
        return config.family(kind, name)
    except Exception as error:  # importing somebody's module can raise anything
        raise GridError(key, str(error).removeprefix("family: ")) from None


def _expand(path: str) -> str:
    """A path with its environment variables filled in; unknown ones stay as they are."""
    return os.path.expanduser(os.path.expandvars(path))


def _data(raw: dict[str, Any]) -> tuple[str, config.DataFields]:
    fields = dict(raw)
    name = fields.pop("family", None)
    kind = _family("data", name, "data.family")
    if isinstance(fields.get("root"), str):
        fields["root"] = _expand(fields["root"])
    return str(name), cast(config.DataFields, build(kind, fields, "data"))


def _arms(
    stage: config.Stage, document: Document, several: bool, earlier: dict[config.Stage, tuple[Arm, ...]]
) -> tuple[Arm, ...]:
    arms: list[Arm] = []
    for index, section in enumerate(getattr(document, stage)):
        key = join(stage, index) if several else stage
        family = cast(type[config.Family], _family(stage, section.family, f"{key}.family"))
        arm = Arm(
            stage,
            key,
            section.name or section.family.rpartition(":")[2],
            family,
            section,
            build(config.Runtime, {**document.run, **section.run}, "run", {n: f"{key}.run.{n}" for n in section.run}),
            _rules(section, f"{key}.train"),
            _sizes(section, family, key),
            _upstream(stage, section, key, {**earlier, stage: tuple(arms)}),
        )
        _check_names(arm)
        arms.append(arm)
        _distinct([arm.name for arm in arms], stage)
    return tuple(arms)


def _rules(section: Trained, key: str) -> dict[str, Rule]:
    """The rules among the training settings; the plain ones are checked against the recipe."""
    rules: dict[str, Rule] = {}
    train = section.train
    for name, value in train.items():
        if name in RULES and isinstance(value, dict):
            rule = value.get("rule")
            if not isinstance(rule, str) or rule not in RULES[name]:
                raise GridError.got(join(join(key, name), "rule"), rule, choose(str(rule), RULES[name]))
            rules[name] = cast(Rule, read(RULES[name][rule], value, join(key, name)))
    placeholders = {"lr": 1.0} if "lr" in rules or "train.lr" in section.axis_names else {}
    build(config.Recipe, {**{k: v for k, v in train.items() if k not in rules}, **placeholders}, key)
    return rules


def _sizes(section: Trained, family: type[config.Family], key: str) -> list[tuple[str | None, dict[str, Any], str]]:
    if section.sizes is None:
        return [(None, {}, key)]
    sizes: list[tuple[str | None, dict[str, Any], str]] = []
    for index, size in enumerate(section.sizes):
        where = f"{key}.sizes[{index}]"
        if isinstance(size, dict) and isinstance(size.get("name"), str):
            fields = {name: value for name, value in size.items() if name != "name"}
            sizes.append((read(Sized, {"name": size["name"]}, where).name, fields, where))
        elif isinstance(size, str) and size in family.ladder:
            sizes.append((size, dict(family.ladder[size]), where))
        else:
            allowed = choose(str(size) if isinstance(size, str) else "", family.ladder)
            raise GridError.got(where, size, f"{allowed}, or a mapping with a name and fields of the family")
        for name in sizes[-1][1]:
            if name not in family.model_fields:
                raise GridError.unknown(join(where, name), str(name), family.model_fields)
    _distinct([str(size[0]) for size in sizes], f"{key}.sizes")
    return sizes


def _upstream(
    stage: config.Stage, section: Trained, key: str, earlier: dict[config.Stage, tuple[Arm, ...]]
) -> dict[str, Source]:
    upstream = dict(section.upstream)
    if stage == "generator" and earlier.get("tokenizer"):
        upstream.setdefault("tokenizer", Source(stage="tokenizer"))
    for role, source in upstream.items():
        where = f"{key}.upstream.{role}"
        if role in RESERVED or role == stage or (role in config.STAGES and role != source.stage):
            raise GridError.got(where, role, "a role that is no key of a config and no other stage's name")
        known = [arm.name for arm in earlier.get(source.stage, ())]
        if not known:
            got = [name for name in TRAINED if earlier.get(name)]
            raise GridError.got(f"{where}.stage", source.stage, "a stage with earlier sections: " + choose("", got))
        if source.arm is not None and source.arm not in known:
            raise GridError.got(f"{where}.arm", source.arm, choose(source.arm, known))
    return upstream


def _check_names(arm: Arm) -> None:
    """Axes, filters and the fields of a rule have to exist."""
    known = set(arm.family.model_fields) | {f"train.{name}" for name in config.Recipe.model_fields}
    for index, block in enumerate(arm.section.axes):
        for row in block.settings():
            for axis, (_, path) in row.items():
                if axis not in known:
                    raise GridError.unknown(f"{arm.key}.axes[{index}].{path}", axis, known)
            if block.listed is None:
                break
    for name in arm.section.where:
        if name not in FILTERS | arm.section.axis_names:
            raise GridError.unknown(join(f"{arm.key}.where", name), name, FILTERS | arm.section.axis_names)


def _evaluation(index: int, raw: dict[str, Any], arms: dict[config.Stage, tuple[Arm, ...]]) -> Evaluation:
    key = f"evaluation[{index}]"
    own, fields = ({k: v for k, v in raw.items() if (k in Measured.spelled()) is mine} for mine in (True, False))
    for name in fields:
        if name not in config.Protocol.model_fields:
            known = Measured.spelled() | set(config.Protocol.model_fields)
            raise GridError.unknown(join(key, name), str(name), known)
    if isinstance(fields.get("extractors"), list):
        names = [_expand(name) if isinstance(name, str) and ":" in name else name for name in fields["extractors"]]
        fields["extractors"] = names
    section, protocol = read(Measured, own, key), build(config.Protocol, fields, key)
    if not arms[protocol.of]:
        allowed = choose(protocol.of, [stage for stage in TRAINED if arms[stage]])
        raise GridError.got(f"{key}.of", protocol.of, f"{allowed} (stages of this grid)")
    for arm in section.arms or ():
        if arm not in (names := [known.name for known in arms[protocol.of]]):
            raise GridError.got(f"{key}.arms", arm, choose(arm, names))
    for position, name in enumerate(protocol.extractors):
        if name not in config.EXTRACTORS and ":" not in name:
            allowed = choose(name, config.EXTRACTORS)
            near = f"{allowed}, inception-v3-compat:/path/to/weights.pth, timm:NAME, or package.module:Class"
            raise GridError.got(f"{key}.extractors[{position}]", name, near)
    seeds, only = tuple(section.seeds), frozenset(section.arms) if section.arms else None
    return Evaluation(key, section.name, protocol, section.points, seeds, only)
