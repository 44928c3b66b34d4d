"""How do axes, filters and rules read? The small language in which a grid spans its runs.

Blocks of axes multiply; a filter (``where``) keeps the points that it holds for; a rule sets batch or learning rate
from what a run turns out to be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from sweep.document import Amount, Number, Section, Whole


class Block(Section):
    """One block of axes: all combinations, values side by side, or a list of settings. Blocks multiply."""

    product: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(None, min_length=1)
    zipped: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(None, min_length=1, alias="zip")
    listed: list[Annotated[dict[str, Any], Field(min_length=1)]] | None = Field(None, min_length=1, alias="list")

    @model_validator(mode="after")
    def _one_kind(self) -> Block:
        given = [kind for kind in (self.product, self.zipped, self.listed) if kind is not None]
        if len(given) != 1:
            raise PydanticCustomError("block", "exactly one of product, zip, list")
        if self.zipped and len({len(values) for values in self.zipped.values()}) > 1:
            lengths = ", ".join(f"{name} has {len(values)}" for name, values in self.zipped.items())
            raise PydanticCustomError("zip", "lists of equal length under zip ({lengths})", {"lengths": lengths})
        return self

    def settings(self) -> Iterator[dict[str, tuple[Any, str]]]:
        """Each setting of the block: axis -> (value, key path within the block)."""
        if self.listed is not None:
            for i, row in enumerate(self.listed):
                yield {name: (value, f"list[{i}].{name}") for name, value in row.items()}
            return
        kind, axes = ("product", self.product) if self.product is not None else ("zip", self.zipped)
        assert axes is not None
        columns = [[(n, v, f"{kind}.{n}[{i}]") for i, v in enumerate(values)] for n, values in axes.items()]
        for cells in itertools.product(*columns) if kind == "product" else zip(*columns, strict=True):
            yield {name: (value, path) for name, value, path in cells}


class Condition(Section):
    """A filter on one column or axis; a null (epochs where images never repeat, say) passes min and max."""

    least: Number | None = Field(None, alias="min")
    most: Number | None = Field(None, alias="max")
    among: list[Any] | None = Field(None, alias="in")
    without: list[Any] | None = Field(None, alias="not")

    def holds(self, value: Any) -> bool:
        """Whether ``value`` stays; TypeError where min or max meet a value that is no number."""
        if value is not None and (self.least is not None or self.most is not None):
            if not isinstance(value, (int, float)):
                raise TypeError
            if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
                return False
        return (self.among is None or value in self.among) and (self.without is None or value not in self.without)


class TokenBatch(Section):
    """Batch such that a step sees about this many tokens, whatever the tokens per image."""

    rule: Literal["tokens"]
    tokens: Whole

    def resolve(self, known: Mapping[str, Any]) -> float:
        return float(max(1, round(self.tokens / known["tokens"])))


class ConstantRate(Section):
    rule: Literal["constant"]
    value: Amount

    def resolve(self, known: Mapping[str, Any]) -> float:
        return self.value


class TableRate(Section):
    """Learning rate by the value of an axis or field, by default the name of the size."""

    rule: Literal["table"]
    by: str = "size"
    values: Annotated[
        dict[str, Amount],
        BeforeValidator(lambda raw: {str(k): v for k, v in raw.items()} if isinstance(raw, dict) else raw),
    ]

    def resolve(self, known: Mapping[str, Any]) -> float:
        return self.values[str(known[self.by])]


class PowerRate(Section):
    """``base`` times (width of the model / ``width``)^``exponent``; -1 is muP's rule for Adam."""

    rule: Literal["power"]
    base: Amount
    width: Amount
    exponent: Number = -1.0

    def resolve(self, known: Mapping[str, Any]) -> float:
        # six digits: the last bits of a power differ between C libraries, and ids must not
        return float(f"{self.base * (known['width'] / self.width) ** self.exponent:.6g}")


Rule = TokenBatch | ConstantRate | TableRate | PowerRate
RULES: dict[str, dict[str, type[Section]]] = {
    "batch": {"tokens": TokenBatch},
    "lr": {"constant": ConstantRate, "table": TableRate, "power": PowerRate},
}
