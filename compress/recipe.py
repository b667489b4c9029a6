"""Which linears are taken: rules from a recipe file and from the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.planning import Rule
from compress.registry import make
from compress.scheme import Scheme


@dataclass(frozen=True)
class Rules:
    """A recipe file, then patterns to leave out, then patterns to restrict to. First match wins, in that order.

    A recipe is a YAML (or JSON) list; each item has `match` (`re:` and a regular expression, or a module's name or its
    dotted tail) and `scheme` (a scheme's name, or `none` to leave the weight as it is) with that scheme's options.
    """

    recipe: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def read(self, scheme: Scheme) -> list[Rule]:
        """The rules in order; `scheme` is what --include gives. Raises ValueError, naming the rule."""
        rules = read_recipe(self.recipe) if self.recipe else []
        rules += [Rule(pattern, None, f"--exclude {pattern}") for pattern in self.exclude]
        rules += [Rule(pattern, scheme, f"--include {pattern}") for pattern in self.include]
        for rule in rules:
            _check(rule)
        if self.include:  # what no --include names stays as it is
            rules.append(Rule("re:", None, "everything else"))
        return rules


def read_recipe(path: Path) -> list[Rule]:
    """The rules of a recipe file."""
    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(items, list):
        raise ValueError(
            f"recipe {path} is not a list of rules; write for example `- {{match: down_proj, scheme: int8}}`"
        )
    return [_rule(item, f"recipe {path}, rule {i}") for i, item in enumerate(items, 1)]


def _rule(item: Any, where: str) -> Rule:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: is {item!r}; write for example `- {{match: down_proj, scheme: int8}}`")
    for key in ("match", "scheme"):
        if key not in item:
            raise ValueError(f"{where}: needs `{key}`; it has {', '.join(map(str, item)) or 'no key'}")
    if not isinstance(item["match"], str):
        raise ValueError(f"{where}: match is {item['match']!r}; give a module's name, or `re:` and an expression")
    name = item["scheme"]
    options = {key: value for key, value in item.items() if key not in ("match", "scheme")}
    try:
        scheme = None if name in (None, "none") else make(str(name), options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Rule(item["match"], scheme, where)


def _check(rule: Rule) -> None:
    try:
        re.compile(rule.pattern.removeprefix("re:"))
    except re.error as error:
        if rule.pattern.startswith("re:"):
            raise ValueError(f"{rule.origin}: not a regular expression: {error}") from None
