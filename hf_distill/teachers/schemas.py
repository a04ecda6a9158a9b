"""Whether a text is what a JSON schema asks for; as much of the standard as teachers are asked to hold to."""

from __future__ import annotations

import json

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def misfit(schema: dict, text: str) -> str | None:
    """Where the text does not fit; None where it does. Reads type, enum, properties, required and items.

    Example:
        >>> misfit({"type": "object", "required": ["label"]}, '{"text": 1}')
        'label is missing'
    """
    try:
        return _misfit(schema, json.loads(text), "")
    except ValueError:
        return "no JSON"


def _misfit(schema: dict, value, place: str) -> str | None:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    what = place or "the whole"
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{what} is no {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{what} is none of {schema['enum']}"
    parts = []
    if isinstance(value, dict):
        for name in schema.get("required", []):
            if name not in value:
                return f"{place + '.' if place else ''}{name} is missing"
        known = schema.get("properties", {})
        parts = [(known[name], part, f"{place}.{name}".lstrip(".")) for name, part in value.items() if name in known]
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        parts = [(schema["items"], part, f"{place}[{i}]") for i, part in enumerate(value)]
    return next((wrong for part in parts if (wrong := _misfit(*part))), None)


def _is(value, kind: str) -> bool:
    if isinstance(value, bool):  # an int to Python
        return kind == "boolean"
    return isinstance(value, TYPES.get(kind, object))
