"""What the card of the source says of it that holds for what is made of it: licence, languages, tags, base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_LARGEST_BYTES = 2**20
# of https://huggingface.co/docs/hub/model-cards
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def front_matter(model: str, path: Path, scheme: str) -> dict[str, Any]:
    """The front matter of the new card. model: as it was named; path: where it lies.

    base_model is the hub id that was given, else the one that the source's own card names.
    """
    source = _read(path / "README.md")
    carried: dict[str, Any] = {key: source[key] for key in _CARRIED if _is_text(source.get(key))}
    tags = source.get("tags")
    named = tags if isinstance(tags, list) and _is_text(tags) else []
    carried |= {"library_name": "transformers", "tags": list(dict.fromkeys([*named, "compress", *scheme.split(", ")]))}
    base = model if is_hub_id(model) else source.get("base_model")
    if _is_text(base):
        carried |= {"base_model": base, "base_model_relation": "quantized"}
    return carried


def is_hub_id(model: str) -> bool:
    """Whether a model was named by its place on the hub, and not by a directory here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None and not Path(model).exists()


def _read(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; nothing where it cannot be read."""
    try:
        if card.stat().st_size > _LARGEST_BYTES:
            return {}
        text = card.read_text(encoding="utf-8")
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        found = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: object) -> bool:
    """Text, or a list of texts: the hub takes either for a language or a base model."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
