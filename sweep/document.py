"""How is a YAML file read into typed sections, and how is a mistake in it named?

Every mistake becomes a ``GridError``, one line ``FILE: key.path: got VALUE; allowed: WHAT``, whoever notices it: YAML,
pydantic or a family of ``models.config``.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from models.config import Fields

INT64 = 2**63 - 1  # the largest whole number that a table column holds
KEY = re.compile(r"[\w.:+@-]{1,64}")  # keys that are printed as they are; others are quoted
# Line ends and other controls, marks that turn the direction of what follows, halves of characters
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class GridError(ValueError):
    """A mistake in what the user wrote. ``key`` is its dotted path, ``file`` is known at the latest in ``naming``."""

    def __init__(self, key: str, problem: str, file: str | None = None) -> None:
        super().__init__(key, problem)
        self.key, self.problem, self.file = key, problem, file

    @classmethod
    def got(cls, key: str, value: Any, allowed: str, file: str | None = None) -> GridError:
        return cls(key, f"got {shown(value)}; allowed: {allowed}", file)

    @classmethod
    def unknown(cls, path: str, key: str, known: Iterable[str]) -> GridError:
        """A key, axis or column that nobody knows."""
        return cls(path, f"got an unknown key; allowed: {choose(key, known)}")

    def __str__(self) -> str:
        return " ".join(": ".join(part for part in (self.file, self.key, self.problem) if part).split())


@contextlib.contextmanager
def naming(file: str) -> Iterator[None]:
    """Adds the name of the file to any GridError that passes."""
    try:
        yield
    except GridError as error:
        error.file = error.file or file
        raise


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 8, 8


def shown(value: Any) -> str:
    """A value as it appears in an error: short, on one line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number too long to print"


def choose(key: str, names: Iterable[str]) -> str:
    """The allowed names, the nearest one suggested."""
    known = sorted(names)
    near = difflib.get_close_matches(key, known, 1)
    return (", ".join(known) or "none") + (f" (did you mean {near[0]!r}?)" if near else "")


def join(path: str, key: Any) -> str:
    """A key path and one more key: an index in brackets, an odd key quoted."""
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{path}[{key}]"
    name = key if isinstance(key, str) and KEY.fullmatch(key) else shown(key)
    return f"{path}.{name}" if path else name


# --- text to values --------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e10 as the number it looks like (YAML 1.1 does not)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = f"line {key.start_mark.line + 1}"
                    raise GridError(join("", key.value), f"got this key twice ({line}); allowed: once in a mapping")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: bytes) -> Any:
    """The values of a YAML text in UTF-8; GridError when it is none."""
    try:
        values = yaml.load(text.decode(), _Loader)
    except GridError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        raise GridError(where, f"got no YAML ({error.problem}); allowed: a YAML mapping") from None
    except RecursionError:
        raise GridError("the file", "got too many nested levels; allowed: a grid") from None
    except Exception as error:  # constructors of odd tags (!!timestamp x, !!int "") raise all sorts
        raise GridError("the file", f"got no YAML ({error}); allowed: a YAML mapping") from None
    _refuse_hidden(values)
    return values


def _refuse_hidden(values: Any) -> None:
    """GridError where a text holds characters that do not show: it may become a part of a path, a label or a line."""
    waiting, seen = [("", values)], set[int]()  # an alias may stand for what it is in
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and HIDDEN.search(value):
            raise GridError.got(path or "the file", value, "text without control characters")
        if not isinstance(value, (dict, list)) or id(value) in seen:
            continue
        seen.add(id(value))
        inside: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in inside:
            if isinstance(key, str) and HIDDEN.search(key):
                raise GridError.got(path or "the file", key, "keys without control characters")
            waiting.append((join(path, key), item))


# --- values to sections ----------------------------------------------------------------------------------------


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=10**12)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**32)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Amount = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class Section(BaseModel):
    """Base of the parts of a file; an unknown key is refused with the list of known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def spelled(cls) -> set[str]:
        """The keys as a file spells them."""
        return {field.alias or name for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, raw: Any) -> Any:
        for key in raw if isinstance(raw, dict) else ():
            if key not in cls.spelled():
                names = choose(str(key), cls.spelled())
                raise PydanticCustomError("unknown", "{names}", {"key": key, "names": names})
        return raw


M = TypeVar("M", bound=Section)
F = TypeVar("F", bound=Fields)


def read(model: type[M], raw: Any, path: str = "") -> M:
    """``raw`` as a section; GridError for the first thing wrong in it."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _translate(error.errors(include_url=False)[0], path, raw, {}) from None


def build(model: type[F], raw: Any, path: str, paths: Mapping[str, str] | None = None) -> F:
    """``raw`` as family, data, recipe, runtime or protocol fields.

    ``paths`` says for a field where the file gives it, when that is not under ``path`` (an axis, say).
    """
    if not isinstance(raw, dict):
        raise GridError.got(path, raw, "a mapping")
    paths = paths or {}
    for key, value in raw.items():
        where = paths.get(key) or join(path, key)
        if key not in model.model_fields:
            raise GridError.unknown(where, str(key), model.model_fields)
        bools = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, bool)]
        if bools and "bool" not in str(model.model_fields[key].annotation):
            raise GridError.got(where, value, "a value that is not true or false")
    try:
        fields = model.model_validate(raw)
    except ValidationError as error:
        raise _translate(error.errors(include_url=False)[0], path, raw, paths) from None
    for key in model.model_fields:
        value = getattr(fields, key)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) > INT64:
                raise GridError.got(paths.get(key) or join(path, key), item, "a number of at most 64 bits")
    return fields


def blame(message: str, path: str, paths: Mapping[str, str]) -> GridError:
    """A family's own complaint, ``field: what is wrong``, under the place where the file gives that field."""
    found = re.match(r"(\w+): (.+)", message, re.DOTALL)
    if found is None:
        return GridError(path, message)
    return GridError(paths.get(found[1]) or join(path, found[1]), found[2])


def _translate(error: ErrorDetails, path: str, raw: Any, paths: Mapping[str, str]) -> GridError:
    """A pydantic error as one line, its location as the user wrote it."""
    where, at = path, raw
    for index, part in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        if isinstance(at, (list, tuple)) and isinstance(part, int):
            where, at = join(where, part), at[part] if part < len(at) else None
        elif isinstance(at, dict) and (part in at or (last and isinstance(part, str))):
            where = (paths.get(str(part)) if index == 0 else None) or join(where, part)
            at = at.get(part)
        # else the index of a single section that stands for a list, or the tag of a union: no file spells these
    message = re.sub(r"^(Input should be|Value should have|Value error,) ?", "", error["msg"])
    match error["type"]:
        case "unknown":
            return GridError(join(where, error["ctx"]["key"]), f"got an unknown key; allowed: {message}")
        case "missing":
            return GridError(where, "got nothing; allowed: a value (this key has to be given)")
        case "value_error":
            return blame(message, where, paths)
        case _:
            return GridError.got(where or "the file", error["input"], message)
