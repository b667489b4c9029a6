"""The compact form of predictions: exact where it must be, and within its stated error elsewhere."""

from typing import Any

import pytest
import torch

from compress.eval import compact

BOUND = 1e-4  # nats, of a mean


def exact(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def measured(reference: torch.Tensor, logits: torch.Tensor) -> compact.Scores:
    targets = torch.arange(len(logits)) % logits.shape[1]
    return compact.score(logits, targets, compact.encode(reference, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 3, 300, 5000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 12.0])
def test_the_divergence_is_within_its_error(dtype: torch.dtype, vocabulary: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    reference = (scale * torch.randn(64, vocabulary, generator=generator)).to(dtype)
    targets = torch.arange(64) % vocabulary
    for noise in (0.0, 1e-3, 0.1, 1.0, 5.0):
        logits = (reference + noise * torch.randn(64, vocabulary, generator=generator)).to(dtype)
        found, kl = measured(reference, logits), exact(reference, logits)
        assert found.kl is not None
        assert abs(found.kl.mean() - kl.mean()) < BOUND
        assert ((found.kl - kl).abs() < BOUND * (1 + 10 * kl.sqrt())).all()
        nll = -logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        assert torch.allclose(found.nll, nll, rtol=1e-12, atol=1e-12)


def test_equal_logits_have_no_divergence() -> None:
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(0)) * 5
    assert (measured(logits, logits).kl == 0).all()  # type: ignore[union-attr]
    kl = measured(logits, logits + 0.125).kl  # a constant changes no probability
    assert kl is not None and kl.max() < 1e-7


def test_a_token_that_is_all_but_ruled_out_counts_in_full() -> None:
    reference, logits = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -90.0]])
    found = measured(reference, logits).kl
    assert found is not None and float(found) == pytest.approx(float(exact(reference, logits)), abs=1e-3)


def test_logits_as_far_apart_as_float32_goes() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [0.0, 0.0, 0.0]])
    found = measured(logits, logits.flip(0))
    assert found.kl is not None and found.kl.isfinite().all() and (found.kl > 0).all() and found.nll.isfinite().all()


def test_the_likeliest_tokens_are_the_first_of_equal_ones() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 1.0, 1.0, 2.5], [0.0] * 7])
    found = compact.score(logits, torch.tensor([0, 6]), None)
    assert found.top.tolist() == [[1, 3, 6, 2, 0], [0, 1, 2, 3, 4]] and found.kl is None
    assert float(found.nll[1]) == pytest.approx(1.9459101)  # log 7
    assert compact.encode(logits[:, :2], torch.tensor([0, 1])).top.tolist() == [[1, 0, -1, -1, -1], [0, 1, -1, -1, -1]]


def test_a_confident_row_keeps_few_tokens() -> None:
    logits = torch.cat([torch.tensor([[20.0, 10.0]]), torch.zeros(1, 998)], 1)
    kept = compact.encode(logits, torch.tensor([0]))
    # exp(-10) is 5e-5, and the other 998 together 2e-6
    assert kept.codes.tolist()[:2] == [0, 10 * 2048] and kept.mask.shape == (1, 125)
    few = compact.encode(torch.cat([logits, torch.full((1, 5000), -5.0)], 1), torch.tensor([0]))
    assert len(few.codes) == 1000 and float(few.tail) == pytest.approx(5000 * 2.718281828**-25)


def test_threads_change_nothing(on_threads: Any) -> None:
    reference = torch.randn(30, 4000, generator=torch.Generator().manual_seed(0)) * 3
    first, *others = on_threads(lambda: measured(reference, reference + 0.1).kl)
    assert all(torch.equal(first, other) for other in others)
