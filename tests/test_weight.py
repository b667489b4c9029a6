"""CompressedWeight in the place of an embedding's parameter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.kernels.weight import CompressedWeight
from compress.registry import make


def packed(weight: Tensor, scheme: str, dtype: torch.dtype = torch.bfloat16) -> CompressedWeight:
    fitted = make(scheme).fit(tuple(weight.shape))
    return CompressedWeight(fitted, tuple(weight.shape), dtype, fitted.encode(weight))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("scheme", ["df11", "int8", "fp8", "int4", "bfp", "bitstack"])
def test_an_embedding_gives_the_rows_of_the_decoded_weight(scheme: str, weight: Tensor) -> None:
    stand_in = packed(weight, scheme)
    embedding = nn.Embedding(300, 128, padding_idx=0)
    del embedding.weight
    embedding.weight = stand_in
    ids = torch.tensor([[5, 299, 5], [0, 1, 2]])
    assert torch.equal(embedding(ids), stand_in.dense()[ids])
    assert embedding(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 128)
    assert torch.equal(embedding(torch.tensor(7)), stand_in.dense()[7])
    with pytest.raises(IndexError):
        embedding(torch.tensor([300]))


def test_a_head_that_shares_it_multiplies_with_it(weight: Tensor) -> None:
    head, stand_in = nn.Linear(128, 300, bias=True, dtype=torch.bfloat16), packed(weight, "df11")
    bias = head.bias
    del head.weight
    head.weight = stand_in
    x = torch.randn(2, 3, 128).bfloat16()
    assert torch.equal(head(x), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    "function", [lambda w: torch.sum(w, dim=0), lambda w: torch.cat([w, w]), lambda w: F.linear(input=w, weight=w)]
)
def test_anything_else_gets_the_dense_weight(function: Callable[..., Tensor], weight: Tensor) -> None:
    assert torch.equal(function(packed(weight, "df11")), function(weight))


def test_it_shows_the_dtype_and_shape_that_the_model_was_loaded_in(weight: Tensor) -> None:
    stand_in = packed(weight, "df11", torch.float32)
    assert (stand_in.dtype, stand_in.shape, stand_in.device.type) == (torch.float32, (300, 128), "cpu")
    assert F.embedding(torch.tensor([3]), stand_in).dtype == torch.float32
    assert stand_in.dense().dtype == torch.float32


def test_moving_it_prepares_it_anew(weight: Tensor) -> None:
    stand_in = packed(weight, "df11")
    before = stand_in.running()
    assert stand_in.running() is before
    stand_in.to("cpu")
    assert stand_in.running() is not before


def test_a_move_that_fails_leaves_everything_where_it_was(weight: Tensor) -> None:
    stand_in = packed(weight, "df11")

    def refuse(tensor: Tensor) -> Tensor:
        if tensor.numel():
            raise RuntimeError("out of memory")
        return tensor.to("meta")

    stand_in.plain = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="out of memory"):
        stand_in._apply(refuse)
    assert torch.equal(stand_in.dense(), weight) and stand_in.device.type == "cpu"
