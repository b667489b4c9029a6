"""BfpCache: keys and values in block floating point along head_dim, key channels sorted (K-sort, arXiv:2403.20137).

Channels of a key are reordered as they are stored, and put back as they are read, so queries, weights and the rotary
embedding stay as they are: the order differs from head to head, the two of a rotary pair lie side by side (in halves,
as rotary embeddings have them, sorting gains nothing at blocks of 64), and the checkpoint means the same to any other
program. On a CPU it costs nothing, as channels are put back while they are unpacked. Not in the paper: what is stored
of a key is its difference from the mean of the first ones. Some channels hardly change from token to token, and would
cost the others of their block all precision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from compress.formats import bfp
from compress.formats.bfp import Format
from compress.kernels import bfp_cache
from compress.packed_cache import Exact, Packed, PackedCache, PackedLayer

BITS = (4, 5, 6, 8)
EXACT_BITS = 16


class BfpPacking:
    """Blocks along head_dim: mantissas and exponents, (batch, heads, tokens, bytes) uint8 each.

    order: (head_dim,) or (heads, head_dim) int64, in which channels are stored. Without it, the two of a rotary pair
    lie side by side; rotary: the part of the channels that are turned, i with i + rotary * head_dim / 2. centered: what
    is packed is the difference from `mean`, (1, heads, 1, head_dim), that of the tokens there were at first.
    """

    together = 1

    def __init__(
        self, bits: int, block_size: int, order: Tensor | None = None, rotary: float = 0.0, centered: bool = False
    ) -> None:
        self.form = Format(bits, block_size, True, torch.float32)
        self.order, self.rotary, self.centered = order, rotary, centered
        self.mean: Tensor | None = None

    def begin(self, states: Tensor) -> None:
        self.mean = states.float().mean((0, 2), keepdim=True).to(states.dtype) if self.centered else None

    def pack(self, states: Tensor) -> Packed:
        leading, exact = states.shape[:-1], states.float()
        if self.mean is not None:
            exact = exact - self.mean
        order = self._order(states.shape[1], states.shape[3], states.device)
        flat = torch.take_along_dim(exact, order, dim=-1).reshape(-1, states.shape[-1])
        exponents = bfp.nearest_exponents(flat, self.form)
        return bfp.pack(flat, exponents, self.form).view(*leading, -1), exponents.view(*leading, -1)

    def unpack(self, packed: Packed, head_dim: int, dtype: torch.dtype) -> Tensor:
        mantissas, exponents = packed
        order = self._order(mantissas.shape[1], head_dim, mantissas.device)
        return bfp_cache.states(mantissas, exponents, self.form, order, self.mean).to(dtype)

    def _order(self, heads: int, channels: int, device: torch.device) -> Tensor:
        """(1, heads or 1, 1, head_dim)."""
        if self.order is None:
            self.order = paired(torch.arange(channels), self.rotary)
        if self.order.shape not in ((channels,), (heads, channels)):
            raise ValueError(
                f"order: {tuple(self.order.shape)} channels of keys are ordered, and there are {(heads, channels)}"
            )
        self.order = self.order.to(device)
        return self.order.view(1, -1, 1, channels)


class BfpCache(PackedCache):
    """Keys and values as mantissas of 4, 5, 6 or 8 bits in blocks of `block_size` along head_dim, as a `Cache`.

    window: so many recent tokens are kept as they are. value_bits: of the values, by default as many as of the keys; 16
    leaves them as they are. order: layer -> (heads, head_dim) or (head_dim,) int64, in which key channels are stored
    (`key_order` sorts them); by default the two of a rotary pair lie side by side. centered: keys are packed as
    differences from the mean of those there are when the first are packed.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        bits: int = 4,
        *,
        value_bits: int | None = None,
        block_size: int = 32,
        window: int = 64,
        order: Mapping[int, Tensor] | None = None,
        centered: bool = True,
    ) -> None:
        of_values = bits if value_bits is None else value_bits
        for name, found in (("bits", bits), ("value_bits", of_values)):
            if found not in (*BITS, EXACT_BITS):
                raise ValueError(f"kv_cache bfp: {name} is {found}; give 4, 5, 6 or 8, or 16 to leave them as they are")
        if block_size < 1 or window < 0:
            raise ValueError(f"kv_cache bfp: block_size {block_size}, window {window}; give 1 and 0 or more")
        rotary, ordered = rotary_part(config), order or {}

        def layer(number: int) -> PackedLayer:
            keys = BfpPacking(bits, block_size, ordered.get(number), rotary, centered)
            values = BfpPacking(of_values, block_size)
            return PackedLayer(
                (Exact() if bits == EXACT_BITS else keys, Exact() if of_values == EXACT_BITS else values), window
            )

        super().__init__(config, layer)


def rotary_part(config: PretrainedConfig) -> float:
    """The part of a key's channels that the rotary embedding turns."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", 1.0))


def paired(channels: Tensor, rotary: float) -> Tensor:
    """channels: (..., head_dim). The same with i beside i + n / 2, of the first n = rotary * head_dim."""
    turned = int(channels.shape[-1] * rotary) // 2 * 2
    first = channels[..., :turned].unflatten(-1, (2, turned // 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([first, channels[..., turned:]], dim=-1)


@torch.no_grad()
def key_order(model: PreTrainedModel) -> dict[int, Tensor]:
    """K-sort: layer -> (heads, head_dim) int64, the channels of keys from the largest rows of the key weight to the
    smallest.

    A rotary pair counts as one and lies side by side: both have the size of its two rows together, as turning makes
    them. A bias counts as another column; a norm of the keys is applied to the sizes. Layers whose keys do not come
    from a `k_proj` are left out.
    """
    orders, rotary = {}, rotary_part(model.config)
    for attention in model.modules():
        projection, layer = getattr(attention, "k_proj", None), getattr(attention, "layer_idx", None)
        if projection is None or layer is None or not getattr(attention, "head_dim", None):
            continue
        weight = projection.weight.detach().float()
        sizes = weight.square().sum(1) + (0 if projection.bias is None else projection.bias.detach().float().square())
        sizes = sizes.sqrt().view(-1, attention.head_dim)
        norm = getattr(attention, "k_norm", None)
        if norm is not None:
            sizes = norm(sizes).abs()
        orders[layer] = _sorted(sizes.float(), rotary).cpu()
    return orders


def _sorted(sizes: Tensor, rotary: float) -> Tensor:
    """sizes: (heads, head_dim). Returns the channels of each head, pairs from the largest to the smallest."""
    channels = torch.arange(sizes.shape[1], device=sizes.device).expand_as(sizes)
    turned = int(sizes.shape[1] * rotary) // 2 * 2
    together = sizes[:, :turned].unflatten(1, (2, turned // 2)).square().mean(1).sqrt()
    of_pairs = torch.cat([together.repeat_interleave(2, 1), sizes[:, turned:]], dim=1)  # in the order of `paired`
    order = of_pairs.argsort(dim=1, descending=True, stable=True)
    return paired(channels, rotary).take_along_dim(order, dim=1)
