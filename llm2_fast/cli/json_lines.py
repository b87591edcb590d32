"""Results as JSON: one object per line on standard output."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


def print_json(value: Any) -> None:
    """Print a result as one line of JSON."""
    print(json.dumps(to_json(value), ensure_ascii=False, allow_nan=False))


def to_json(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists; numbers that JSON cannot express (NaN, infinities) as null."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
