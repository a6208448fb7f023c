"""The generator behind the dropout: the published vectors, and the one inside Triton."""

from __future__ import annotations

import pytest
import torch

from fastprefix.attention.philox import keep, philox

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_vectors(counter, key, output):
    assert torch.cat(philox(words(key), words(counter))).tolist() == [
        int(word, 16) for word in output.split()
    ]


def test_equals_tritons(triton):
    """Word by word, for seeds with the highest bit set and counters beyond 16 bits."""
    import triton as library
    import triton.language as tl

    @library.jit
    def kernel(seed, counter, out, N: tl.constexpr):
        o = tl.arange(0, N)
        c0 = tl.load(counter + o)
        c1 = tl.load(counter + N + o)
        c2 = tl.load(counter + 2 * N + o)
        c3 = tl.load(counter + 3 * N + o)
        words = tl.philox(tl.load(seed), c0, c1, c2, c3)
        tl.store(out + o, words[0].to(tl.int64))
        tl.store(out + N + o, words[1].to(tl.int64))
        tl.store(out + 2 * N + o, words[2].to(tl.int64))
        tl.store(out + 3 * N + o, words[3].to(tl.int64))

    counter = torch.randint(0, 2**31 - 1, (4, 32), dtype=torch.int32)
    for number in (0, 1, 2**40 + 7, 2**63 - 1, -5):
        seed, out = torch.tensor([number]), torch.empty(4, 32, dtype=torch.int64)
        kernel[(1,)](seed, counter, out, 32)
        ours = philox((seed, seed >> 32), tuple(counter.long()))
        assert torch.equal(torch.stack(ours), out & 0xFFFFFFFF)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_what_is_kept(p):
    n = 200
    place = torch.arange(n)
    kept = keep(torch.tensor([12345]), p, place, place[:, None], place[:5, None, None])
    assert kept.shape == (5, n, n)
    assert (
        abs(kept.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-12
    )
    # neither rows, columns nor heads repeat each other
    if p > 0:
        assert not torch.equal(kept[0], kept[1])
        assert not torch.equal(kept[0, 0], kept[0, 1])
        assert not torch.equal(kept[0], kept[0].T)
