"""Philox against published answers, and the noise made of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2_fast.rng import gumbel, philox

_WORD = st.integers(0, 2**32 - 1)


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def _words(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    columns = tuple(torch.tensor([word]) for word in counter)
    return tuple(word.item() for word in philox(columns, torch.tensor([_signed(seed)])))


def _philox_of_python_integers(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(counter: tuple[int, ...], seed: int, expected: tuple[int, ...]) -> None:
    """The answers that Random123 publishes for Philox 4x32-10."""
    assert _words(counter, seed) == expected


@given(counter=st.tuples(_WORD, _WORD, _WORD, _WORD), seed=st.integers(0, 2**64 - 1))
def test_every_counter_and_key(counter: tuple[int, ...], seed: int) -> None:
    assert _words(counter, seed) == _philox_of_python_integers(counter, seed)


@pytest.mark.parametrize(("word", "extreme"), [(0, -2.82), (2**32 - 1, 16.64)])
def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch, word: int, extreme: float) -> None:
    """The smallest and the largest word keep u inside (0, 1)."""
    monkeypatch.setattr("llm2_fast.rng.philox", lambda counter, seed: (torch.full_like(counter[0], word),) * 4)
    noise = gumbel(torch.zeros(1, 1, dtype=torch.int32), *(torch.zeros(1, dtype=torch.int64),) * 4)
    assert noise.item() == pytest.approx(extreme, abs=0.01)


def _draw(ids: torch.Tensor, step: int = 0, sample_index: int = 0, request_id: int = 0, seed: int = 7) -> torch.Tensor:
    rows = [torch.full((ids.shape[0],), value) for value in (step, sample_index, request_id, seed)]
    return gumbel(ids, *rows)


def test_distribution() -> None:
    """Mean and variance of a standard Gumbel variable, within five standard errors."""
    draws = _draw(torch.arange(200_000, dtype=torch.int32).unsqueeze(0)).double()
    variance = math.pi**2 / 6
    assert draws.isfinite().all()
    assert abs(draws.mean().item() - 0.5772157) < 5 * math.sqrt(variance / 200_000)
    # The fourth central moment of the distribution is 5.4 times the squared variance.
    assert abs(draws.var().item() - variance) < 5 * variance * math.sqrt(4.4 / 200_000)


def test_a_draw_depends_on_its_counter_only() -> None:
    ids = torch.tensor([[5, 9, 2]], dtype=torch.int32)
    assert torch.equal(_draw(ids)[:, 1:], _draw(ids[:, 1:]))
    assert torch.equal(_draw(ids), _draw(ids.repeat(3, 1))[1:2])


@pytest.mark.parametrize("name", ["step", "sample_index", "request_id", "seed"])
def test_every_part_of_the_counter_counts(name: str) -> None:
    ids = torch.arange(64, dtype=torch.int32).unsqueeze(0)
    assert (_draw(ids) != _draw(ids, **{name: 1})).all()


def test_upper_half_of_the_seed_counts() -> None:
    ids = torch.arange(64, dtype=torch.int32).unsqueeze(0)
    assert (_draw(ids, seed=7) != _draw(ids, seed=7 + 2**32)).all()
    assert (_draw(ids, seed=7) != _draw(ids, seed=7 - 2**63)).all()
