"""What may a grid file say? Its sections as they are written, checked one by one.

A grid is YAML: a study, its data, sections for the stages to train (``encoder``, ``tokenizer``, ``representation``,
``generator``; each one section or a list of them, its *arms*), evaluation protocols, prices. ``sweep.grid`` looks up
what the sections name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from sweep.axes import Block, Condition
from sweep.document import Amount, Name, Number, Section, Seed, Whole


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("distinct", "different values")
    return values


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
Steps = Annotated[list[Whole], Field(min_length=1), AfterValidator(_distinct)]
Budgets = Annotated[list[Amount], Field(min_length=1), AfterValidator(_distinct)]


class Source(Section):
    """Which earlier runs an arm is built from, one checkpoint of each in turn.

    Two roles that go back to a common ancestor have to agree on it. ``match`` asks for more agreement: a teacher
    of the same ``size`` or ``seed`` as its pupil.
    """

    stage: Literal["encoder", "tokenizer", "representation", "generator"]
    arm: Name | None = None
    points: Literal["last", "all"] = "last"
    match: list[str] = Field([])


class Trained(Section):
    """One arm of a trained stage: its family, the axes over it, how long, how and how often it is trained."""

    name: Name | None = None
    family: str
    fields: dict[str, Any] = Field({})
    sizes: list[Any] | None = Field(None, min_length=1)
    axes: list[Block] = Field([])
    steps: Steps | None = None
    budgets: Budgets | None = None
    tolerance: float = Field(0.01, ge=0, lt=1)
    where: dict[str, Condition] = Field({})
    train: dict[str, Any] = Field({})
    seeds: Seeds = Field([0])
    run: dict[str, Any] = Field({})
    upstream: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=32)], Source] = Field({})

    @property
    def axis_names(self) -> set[str]:
        blocks = [block.listed or [block.product or block.zipped or {}] for block in self.axes]
        return {name for rows in blocks for row in rows for name in row}

    @model_validator(mode="after")
    def _length(self) -> Trained:
        if (self.steps is None) == (self.budgets is None):
            raise PydanticCustomError("length", "exactly one of steps, budgets")
        return self


class Sized(Section):
    """The name of a size that a grid spells out."""

    name: Name


class Measured(Section):
    """What an evaluation section says beside the fields of its protocol."""

    name: Name
    points: Literal["last", "all"] = "last"
    seeds: Seeds = Field([0])
    arms: list[Name] | None = Field(None, min_length=1)


class Price(Section):
    """What one device gives, and what may be spent."""

    device: Annotated[str, Field(pattern=r"^[\w .()/+-]+$", max_length=32)] = "device"
    devices: Annotated[int, Field(ge=1, le=10**6)] = 1
    peak_tflops: Annotated[Number, Field(ge=1e-6, le=1e6)]
    mfu: tuple[Annotated[Number, Field(ge=1e-4, le=1)], Annotated[Number, Field(ge=1e-4, le=1)]] = (0.2, 0.5)
    overhead_s: float = Field(0.0, ge=0, le=1e6, description="seconds to start a run, added to each")
    mem_gib: Amount | None = None
    time_limit_h: Amount | None = None
    max_gpu_hours: Amount | None = None
    max_disk_gib: Amount | None = None

    @model_validator(mode="after")
    def _band(self) -> Price:
        if self.mfu[0] > self.mfu[1]:
            raise PydanticCustomError("band", "mfu: [low, high] with low <= high")
        return self


Arms = Annotated[list[Trained], BeforeValidator(lambda raw: [raw] if isinstance(raw, dict) else raw)]


class Document(Section):
    """A grid file as it is written."""

    study: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)
    data: dict[str, Any]
    encoder: Arms = Field([])
    tokenizer: Arms = Field([])
    representation: Arms = Field([])
    generator: Arms = Field([])
    evaluation: list[dict[str, Any]] = Field([])
    run: dict[str, Any] = Field({})
    price: Price
    laws: list[Literal["rate", "compute"]] = Field(["rate", "compute"])
