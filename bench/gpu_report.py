"""The results of `bench/gpu.py` as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """A table of the engine and one of the kernels, under what they were measured on."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    checks = "; ".join(f"{name} {verdict}" for name, verdict in results["checks"].items())
    parts = [f"{machine}. Checks: {checks}."]
    parts += [f"## {name.capitalize()}\n\n{table(results[name])}" for name in ("engine", "kernels") if results[name]]
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under all names that any of them has, in the order in which they first come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
