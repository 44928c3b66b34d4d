"""How do rows become Arrow columns without loading pandas?

``pyarrow.array`` imports pandas, where it is installed, the first time that it sees a Python object: seconds on a
cold core, for a check of the object's type. Filling the buffers asks for nothing, and is faster on long columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

NUMBERS = {pa.int64(): np.int64, pa.float64(): np.float64}


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """``values`` (None is null) as an array of strings, int64, float64, or lists of them.

    OverflowError for a whole number beyond 64 bits.
    """
    nulls, bitmap = values.count(None), None
    if nulls == len(values):
        return pa.nulls(nulls, kind)
    if nulls:
        valid = np.fromiter((value is not None for value in values), bool, len(values))
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little"))
    if kind in NUMBERS:
        held = np.array([0 if value is None else value for value in values] if nulls else values, NUMBERS[kind])
        return pa.Array.from_buffers(kind, len(values), [bitmap, pa.py_buffer(held)], nulls)
    if pa.types.is_list(kind):
        lists = [value or () for value in values]
        items = column([item for value in lists for item in value], kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [bitmap, _offsets(lists)], nulls, children=[items])
    assert kind == pa.string(), kind
    texts = [value or "" for value in values] if nulls else values
    joined = "".join(texts)
    data = joined.encode()
    ends = _offsets(texts if len(data) == len(joined) else [text.encode() for text in texts])
    return pa.Array.from_buffers(kind, len(values), [bitmap, ends, pa.py_buffer(data)], nulls)


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    """Where each value starts, and the end; 32 bits, so a column holds at most 2 GiB."""
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=offsets[1:])
    assert offsets[-1] < 2**31, "split the rows into smaller batches"
    return pa.py_buffer(offsets.astype(np.int32))


def batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as one record batch; every row has every column."""
    if not rows:
        return pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)
    values = zip(*map(itemgetter(*schema.names), rows), strict=True)  # row by row, as they lie in memory
    columns = [column(cells, field.type) for cells, field in zip(values, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
