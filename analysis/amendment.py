"""What would a grid file say with one thing more in it? Its text with the addition; comments and order stay.

YAML is read for where its values stand, and text is put there. ``path`` is a list of keys and indices. Whether the
result is a grid is for ``sweep.plan`` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import yaml

Key = str | int
BASE = "base"  # anchor of an arm that another one repeats
TEXT = "tag:yaml.org,2002:str"
WORD = re.compile(r"[\w.+-]+")
ANCHOR = re.compile(r"&([\w-]+)")


class AmendmentError(ValueError):
    """A text that is no YAML mapping, or a place in it that cannot take the addition; one line."""


def read(text: str) -> yaml.MappingNode:
    """The document; AmendmentError when it is no mapping."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise AmendmentError(f"not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise AmendmentError("not a YAML mapping")
    return node


def find(node: yaml.Node, path: Sequence[Key]) -> yaml.Node | None:
    """The node at a path; None where there is none."""
    for key in path:
        if isinstance(node, yaml.MappingNode):
            held = {name.value: value for name, value in node.value}
            if key not in held:
                return None
            node = held[key]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
        else:
            return None
    return node


def scalars(node: yaml.Node | None) -> list[str]:
    """The texts of a list of plain values."""
    return [item.value for item in node.value] if isinstance(node, yaml.SequenceNode) else []


def flow(node: yaml.Node) -> str:
    """A node on one line."""
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{flow(key)}: {flow(value)}' for key, value in node.value)}}}"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(flow(item) for item in node.value)}]"
    assert isinstance(node, yaml.ScalarNode)
    # a text may hold what means something within brackets; a number must not become a text
    plain = node.style is None and (node.tag != TEXT or WORD.fullmatch(node.value))
    return str(node.value) if plain else json.dumps(node.value, ensure_ascii=False)


def appended(text: str, path: Sequence[Key], item: str, absent: str = "") -> str:
    """The text with one more item in the list at ``path``; a list that is not there is [absent, item]."""
    root = read(text)
    node = find(root, path)
    if node is None:
        mapping = find(root, path[:-1])
        if not isinstance(mapping, yaml.MappingNode) or not mapping.value:
            raise AmendmentError(f"{_named(path[:-1])}: no mapping that could be added to")
        return _inserted(text, mapping, f"{path[-1]}: [{absent}, {item}]", f"{path[-1]}: [{absent}, {item}]")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise AmendmentError(f"{_named(path)}: no list that could be added to")
    return _inserted(text, node, item, f"- {item}")


def repeated(text: str, path: Sequence[Key], changes: dict[str, str]) -> str:
    """The text with one more arm of a stage: as the one at ``path`` (a stage, or a stage and an index), but for this.

    A single section becomes a list of two.
    """
    node = find(read(text), path)
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise AmendmentError(f"{_named(path)}: no section that could be repeated")
    first = node if node.flow_style else node.value[0][0]  # the start mark of a block lies before its anchor
    start, end, column = first.start_mark.index, _end(node), first.start_mark.column
    known = ANCHOR.match(text, node.start_mark.index) if len(path) > 1 or node.flow_style else None
    own = [f"<<: *{known[1] if known else BASE}", *(f"{key}: {value}" for key, value in changes.items())]
    if len(path) > 1:
        anchor = "" if known else f"&{BASE} " if node.flow_style else f"&{BASE}\n{' ' * column}"
        return appended(text[:start] + anchor + text[start:], path[:1], f"{{{', '.join(own)}}}")
    if node.flow_style:
        anchor = "" if known else f"&{BASE} "
        return f"{text[:start]}[{anchor}{text[start:end]}, {{{', '.join(own)}}}]{text[end:]}"
    end = _line_end(text, end)
    deeper = [f"  {line}" if line.strip() else line for line in text[start:end].split("\n")]
    inner = " " * (column + 2)
    lines = [f"- &{BASE}", inner + deeper[0].lstrip(), *deeper[1:]]
    lines += [f"{' ' * column}- {own[0]}", *(inner + line for line in own[1:])]
    return text[:start] + "\n".join(lines) + text[end:]


def _inserted(text: str, node: yaml.MappingNode | yaml.SequenceNode, inline: str, own_line: str) -> str:
    """The text with an entry after the last one of a list or mapping."""
    end = _end(node)
    if node.flow_style:
        last = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
        place = _end(last)
        return f"{text[:place]}, {inline}{text[place:]}"
    place = _line_end(text, end)
    return f"{text[:place]}\n{' ' * node.start_mark.column}{own_line}{text[place:]}"


def _end(node: yaml.Node) -> int:
    """Where a node ends: the end mark of a block lies behind the comments that follow it."""
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _named(path: Sequence[Key]) -> str:
    return ".".join(str(key) for key in path) or "the file"
