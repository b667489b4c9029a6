"""Plan: which stored weight gets which scheme, resolved once from rules and headers, and written to config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compress import bitsandbytes, interchange
from compress.registry import did_you_mean, make, scheme_class
from compress.scheme import Scheme, Spec
from compress.structure import Linear, Structure

VERSION = 2  # of our own layout in config.json
TRIPWIRE = Spec(torch.uint8, (0,))  # stored as `weight` of packed modules: stops a loader that does not know us

# Local names that stand for another on disk. In our own layout every module stores an empty `weight`, so that a loader
# that does not know us stops at its shape; a scheme's own `weight` moves aside. transformers' fp8 has its own word.
# So has bitsandbytes, with dots in it.
ALIASES = {
    "qweight": "weight",
    "weight_scale_inv": "weight_scale",
    **{stored: local for local, stored in bitsandbytes.NAMES.items()},
}


@dataclass(frozen=True)
class Rule:
    """pattern: `re:` and a regular expression on module names, or a name or its dotted tail. None: leave as it is."""

    pattern: str
    scheme: Scheme | None
    origin: str  # where the user wrote it, for messages

    def matches(self, module: str) -> bool:
        if self.pattern.startswith("re:"):
            return re.search(self.pattern[3:], module) is not None
        return module == self.pattern or module.endswith(f".{self.pattern}")


@dataclass(frozen=True)
class Packed:
    """How one weight is stored: `scheme`, and the tensor (or slice `index` of a 3-D one) that it stands for."""

    scheme: Scheme
    source: str
    index: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Plan:
    """module -> Packed, in checkpoint order, with what led to it."""

    modules: dict[str, Packed]
    left: tuple[str, ...] = ()  # stored linear weights that stay as they are
    paths: dict[str, str] = field(default_factory=dict)  # module -> its name in the model
    ignore: tuple[str, ...] = ()  # the model's linear modules that stay as they are
    interchange: str | None = None  # whose layout it is: compressed-tensors, bitsandbytes; None: our own
    dense: bool = False  # transformers has no place for the packed tensors of some modules
    notes: dict[str, str] = field(default_factory=dict)
    rule_counts: tuple[tuple[str, int], ...] = ()
    dtype: torch.dtype = torch.bfloat16  # of the weights, as far as they have one
    base: Mapping[str, Any] | None = None  # the `quantization_config` of what was compressed, where that stays packed
    kv_cache: dict[str, str] = field(default_factory=dict)  # attention module -> its name in the model: gets scales

    @property
    def needs_calibration(self) -> bool:
        """Whether text runs through the model before anything is written."""
        return bool(self.kv_cache) or any(packed.scheme.needs_calibration for packed in self.modules.values())

    def stored_specs(self, module: str, original: Spec) -> dict[str, tuple[str, Spec]]:
        """local name -> (name in the file, spec) of everything that is written for a module, without the tripwire."""
        specs = self.modules[module].scheme.specs(original.shape, original.dtype)
        moved = {None: {"weight": "qweight"}, bitsandbytes.METHOD: bitsandbytes.NAMES}.get(self.interchange, {})
        return {local: (f"{module}.{moved.get(local, local)}", spec) for local, spec in specs.items()}

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        schemes = {module: packed.scheme for module, packed in self.modules.items()}
        if self.interchange == bitsandbytes.METHOD:
            return bitsandbytes.write(schemes.values(), self.ignore, self.dtype)
        if self.interchange:
            return interchange.write(schemes, self.paths, self.ignore, self.dense, bool(self.kv_cache))
        distinct = list(dict.fromkeys(schemes.values()))
        config = {
            "quant_method": "compress",
            "version": VERSION,
            "schemes": [scheme.to_dict() for scheme in distinct],
            "modules": {module: distinct.index(scheme) for module, scheme in schemes.items()},
            # where that is not `weight` of the module: the tensor that it stands for, and the slice of it
            "sources": {m: [p.source, p.index] for m, p in self.modules.items() if p.source != f"{m}.weight"},
            "transposed": [m for m, p in self.modules.items() if p.transposed],
        }
        return config if self.base is None else {**config, "base": self.base}


def from_config(config: Mapping[str, Any], stored: Mapping[str, Spec]) -> dict[str, Packed]:
    """module -> Packed of a compressed checkpoint. stored: its tensors."""
    method = config.get("quant_method")
    if method == "compress":
        return _from_own(config)
    readers: dict[str, Callable[..., dict[str, Scheme]]] = {
        "compressed-tensors": interchange.read,
        "fp8": interchange.read_fp8,
        bitsandbytes.METHOD: bitsandbytes.read,
    }
    if method not in readers:
        raise ValueError(
            f"it is already compressed with {method!r}; give an uncompressed checkpoint, or one in fp8, "
            "compressed-tensors weight-only or bitsandbytes nf4 form"
        )
    schemes = readers[method](config, stored)
    transposed = set(config.get("transposed", ()))  # `Source` finds that out
    return {m: Packed(scheme, f"{m}.weight", transposed=m in transposed) for m, scheme in schemes.items()}


def _from_own(config: Mapping[str, Any]) -> dict[str, Packed]:
    if config.get("version") != VERSION:
        raise ValueError(
            f"it has layout version {config.get('version')}, and this compress reads {VERSION}; use the version of "
            "compress that wrote it, which compress.json names, or compress the original again"
        )
    schemes = [make(s["scheme"], {k: v for k, v in s.items() if k != "scheme"}) for s in config["schemes"]]
    sources, transposed = config["sources"], set(config["transposed"])
    modules = {}
    for module, number in config["modules"].items():
        source, index = sources.get(module, (f"{module}.weight", None))
        modules[module] = Packed(schemes[number], source, index, module in transposed)
    return modules


def restricted(config: Mapping[str, Any], keep: Callable[[str], bool]) -> dict[str, Any]:
    """The `quantization_config` of our own layout with those modules only for which `keep` is true."""
    return {
        **config,
        "modules": {module: number for module, number in config["modules"].items() if keep(module)},
        "sources": {module: source for module, source in config["sources"].items() if keep(module)},
        "transposed": [module for module in config["transposed"] if keep(module)],
    }


def split(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A `quantization_config` of our own layout as that of its lossless modules and that of the others."""
    lossless = [scheme_class(fields["scheme"]).lossless for fields in config["schemes"]]
    modules = config["modules"]
    return restricted(config, lambda m: lossless[modules[m]]), restricted(config, lambda m: not lossless[modules[m]])


def local_tensors(stored: Mapping[str, Spec], modules: Mapping[str, Packed]) -> dict[str, dict[str, str]]:
    """module -> {local name: name in the file}, leaving out biases and the empty `weight` of our own layout.

    Raises ValueError for a module of which a tensor is missing.
    """
    found: dict[str, dict[str, str]] = {module: {} for module in modules}
    for name, spec in stored.items():
        module, local = _split(name)
        if module not in found or local == "bias" or (name == f"{module}.weight" and 0 in spec.shape):
            continue
        known = modules[module].scheme.locals
        if known is None or local in known:
            found[module][local] = name
    for module, names in found.items():
        try:
            modules[module].scheme.check({local: stored[name] for local, name in names.items()})
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
    return found


def _split(name: str) -> tuple[str, str]:
    """The module and the local name of a stored tensor."""
    for stored, local in ALIASES.items():
        if name.endswith(f".{stored}"):
            return name.removesuffix(f".{stored}"), local
    module, _, local = name.rpartition(".")
    return module, local


def resolve(
    structure: Structure,
    specs: Mapping[str, Spec],
    rules: Sequence[Rule],
    scheme: Scheme,
    chosen_for: Mapping[str, Scheme] | None = None,
) -> Plan:
    """The first rule that matches a module decides; without one, `scheme` takes every linear but the head and routers.

    A lossless scheme takes these too, and every other tensor, under its name without `.weight`; a rule for a lossy one
    does not concern the latter. The head and embeddings that `scheme` leaves go to the one that it has `beside` it.
    specs: shape and dtype of every source tensor. chosen_for: by linear, what it gets where it would get `scheme`.

    Raises ValueError for a rule that matches nothing, or that splits the experts of one parameter.
    """
    linears = structure.linears
    rest = _other_tensors(structure, specs, (scheme, *(rule.scheme for rule in rules)))
    counts = dict.fromkeys(range(len(rules)), 0)
    modules: dict[str, Packed] = {}
    left, notes = [], {}
    for name, linear in linears.items():
        spec = Spec(specs[linear.source].dtype, weight_shape(linear, specs[linear.source]))
        takes = scheme.lossless or not (linear.head or linear.router)
        chosen = _choose(name, rules, counts, scheme if takes else scheme.beside if linear.head else None)
        if chosen is scheme and chosen_for:
            chosen = chosen_for.get(name, scheme)
        if chosen is None or not chosen.takes(spec):
            left.append(name)
            if chosen is not None and not chosen.lossless:
                notes[name] = f"{chosen.name} does not take {'x'.join(map(str, spec.shape))}: stays as it is"
            continue
        fitted = chosen.fit(spec.shape)
        note = _difference(chosen, fitted) if fitted != chosen else fitted.note(spec.shape)
        if note:
            notes[name] = f"in_features {spec.shape[1]}: {note}"
        modules[name] = Packed(fitted.for_dtype(spec.dtype), linear.source, linear.index, linear.transposed)
    for name, source in rest.items():
        lossless = [i for i, rule in enumerate(rules) if rule.scheme is None or rule.scheme.lossless]
        beside = scheme.beside if structure.is_embedding(source) else None
        chosen = _choose(name, rules, counts, scheme if scheme.lossless else beside, lossless)
        if chosen is not None and chosen.takes(spec := specs[source]):
            modules[name] = Packed(chosen.fit(spec.shape).for_dtype(spec.dtype), source)
    _check_rules(rules, counts, list(linears), list(rest))
    _check_experts(linears, modules)
    taken = {linears[module].path for module in modules if module in linears}
    dense = _needs_dense(structure, modules)
    method = _method(structure, modules, dense)
    others = bitsandbytes.replaced(structure.model) if method == bitsandbytes.METHOD else structure.native_paths()
    return Plan(
        modules=modules,
        left=tuple(left),
        paths={module: linears[module].path for module in modules if module in linears and linears[module].native},
        ignore=tuple(path for path in others if path not in taken),
        interchange=method,
        dense=dense,
        notes=notes,
        rule_counts=tuple((rule.origin, counts[i]) for i, rule in enumerate(rules)),
        dtype=next((specs[packed.source].dtype for packed in modules.values()), torch.bfloat16),
    )


def _other_tensors(structure: Structure, specs: Mapping[str, Spec], schemes: Sequence[Scheme | None]) -> dict[str, str]:
    """Module name -> source tensor of everything that is no linear weight, that can be loaded when it is packed, and
    that one of the schemes may take."""
    lossless = any(scheme and scheme.lossless for scheme in schemes)
    if not lossless and not any(scheme and scheme.beside for scheme in schemes):
        return {}
    taken = {linear.source for linear in structure.linears.values()} | structure.left_out
    names = [name for name in specs if name not in taken and structure.is_placed(name)]
    return {name.removesuffix(".weight"): name for name in names if lossless or structure.is_embedding(name)}


def _choose(
    name: str, rules: Sequence[Rule], counts: dict[int, int], default: Scheme | None, among: Sequence[int] | None = None
) -> Scheme | None:
    """What the first rule that matches says, of those whose numbers are `among`. Counts every one that matches."""
    numbers = range(len(rules)) if among is None else among
    hits = [i for i in numbers if rules[i].matches(name)]
    for i in hits:
        counts[i] += 1
    return rules[hits[0]].scheme if hits else default


def weight_shape(packed: Linear | Packed, spec: Spec) -> tuple[int, ...]:
    """Shape of what a scheme gets of a source tensor with `spec`: (out_features, in_features) of a linear."""
    shape = spec.shape if packed.index is None else spec.shape[1:]
    return shape[::-1] if packed.transposed else shape


def _difference(chosen: Scheme, fitted: Scheme) -> str:
    before, after = chosen.to_dict(), fitted.to_dict()
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key])


def _check_rules(rules: Sequence[Rule], counts: Mapping[int, int], linears: Sequence[str], rest: Sequence[str]) -> None:
    names = [*linears, *rest]
    for i, rule in enumerate(rules):
        if counts[i] == 0:
            others = [name for name in rest if rule.matches(name)]
            if others and rule.scheme:
                raise ValueError(
                    f"{rule.origin}: '{rule.pattern}' matches {others[0]}, which is no linear weight, and "
                    f"{rule.scheme.name} takes no others; a lossless scheme does"
                )
            tails = [*names, *{name.rpartition(".")[2] for name in names}]
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
            kind = "module" if rest else "linear module"
            raise ValueError(
                f"{rule.origin}: '{rule.pattern}' matches no {kind}{did_you_mean(rule.pattern, tails)}; "
                f"their names end in {known} (a head that is tied to the embedding is none)"
            )


def _check_experts(linears: Mapping[str, Linear], modules: Mapping[str, Packed]) -> None:
    wholes: dict[str, set[bool]] = {}
    for name, linear in linears.items():
        if linear.expert is not None:
            wholes.setdefault(linear.path, set()).add(name in modules)
    for path, states in wholes.items():
        if len(states) == 2:
            raise ValueError(f"{path}: a rule takes some of its experts only; take all of them or none")


def _needs_dense(structure: Structure, modules: Mapping[str, Packed]) -> bool:
    linears = {name: structure.linears[name] for name in modules if name in structure.linears}
    if any(linear.expert is not None for linear in linears.values()):
        return True
    packed = [name for name, linear in linears.items() if linear.native and interchange.packs(modules[name].scheme)]
    return bool(packed) and not structure.initializes_packed(linears[name].path for name in packed)


def _method(structure: Structure, modules: Mapping[str, Packed], dense: bool) -> str | None:
    """The `quant_method` in whose layout all of it can be written, if there is one."""
    if not modules.keys() <= structure.linears.keys():
        return None
    methods = {interchange.method(packed.scheme) for packed in modules.values()} or {interchange.METHOD}
    if methods == {bitsandbytes.METHOD}:
        taken = {structure.linears[module].path for module in modules}
        return bitsandbytes.METHOD if bitsandbytes.holds(structure.model, taken) else None
    if methods == {interchange.METHOD} and _can_interchange(structure.linears, modules, dense):
        return interchange.METHOD
    return None


def _can_interchange(linears: Mapping[str, Linear], modules: Mapping[str, Packed], dense: bool) -> bool:
    schemes = {packed.scheme for packed in modules.values()}
    experts = any(linears[module].expert is not None for module in modules)
    if experts and not all(interchange.decodes_experts(scheme) for scheme in schemes):
        return False
    # Where transformers must decode while loading, it takes one scheme for the whole checkpoint.
    if interchange.needs_dequantize(schemes, dense) and len(schemes) > 1:
        return False
    # A slice of a 3-D tensor and GPT-2's Conv1D have no name that compressed-tensors knows.
    return all(linears[m].native or (p.index is None and linears[m].expert is not None) for m, p in modules.items())
