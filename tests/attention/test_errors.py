"""Wrong arguments raise, and the message names the argument and says what it takes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastprefix import prefix_attention

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
DIFFERENTIABLE = ("key", "value", "prefix_key", "prefix_value")


def arguments(**changes: Any) -> dict[str, Any]:
    """A valid call (B 2, Hq 4, Hkv 2, Lq 3, Lk 5, P 6, D 8), with changes."""
    good = {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 2, 5, 8),
        "value": torch.randn(2, 2, 5, 8),
        "prefix_key": torch.randn(2, 6, 8),
        "prefix_value": torch.randn(2, 6, 8),
    }
    return {**good, **changes}


def refuses(error: type[Exception], *words: str, **changes: Any) -> None:
    """The call raises exactly `error` with all the words in its message."""
    with pytest.raises(error) as caught:
        prefix_attention(**arguments(**changes))
    assert caught.type is error, f"{caught.type.__name__}: {caught.value}"
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(caught.value)), (
            f"{word!r} is not in {str(caught.value)!r}"
        )


def test_the_call_that_the_others_change_is_valid():
    assert prefix_attention(**arguments()).shape == (2, 4, 3, 8)


class TestTensors:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("prefix", [True, False])
    def test_rank(self, name, prefix):
        changes = {} if prefix else {"prefix_key": None, "prefix_value": None}
        if not prefix and name.startswith("prefix"):
            pytest.skip("no prefix, no rank")
        good = arguments()[name]
        refuses(ValueError, name, **{**changes, name: good[None]})
        refuses(ValueError, name, **{**changes, name: good[0]})

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_no_tensor(self, name):
        refuses(TypeError, name, **{name: arguments()[name].tolist()})

    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_what_is_no_tensor_without_a_prefix(self, name):
        none = {"prefix_key": None, "prefix_value": None}
        refuses(TypeError, name, **{**none, name: arguments()[name].tolist()})

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    @pytest.mark.parametrize("dim", [0, 1, 2, 3])
    def test_every_dimension(self, name, dim):
        good = arguments()[name]
        if dim >= good.dim() or (name, dim) in {("value", 3)}:
            pytest.skip("Dv is the value's to choose" if dim == 3 else "no such dimension")
        longer = torch.cat([good, good.narrow(dim, 0, 1)], dim)
        # Where two arguments disagree either may be named, as long as one is.
        partner = {"key": "value", "value": "key"}.get(name, "prefix_key")
        with pytest.raises(ValueError, match=rf"^({name}|{partner})\b"):
            prefix_attention(**arguments(**{name: longer}))

    def test_a_batch_of_the_query_alone(self):
        with pytest.raises(ValueError, match=r"query|key"):
            prefix_attention(**arguments(query=torch.randn(3, 4, 3, 8)))

    def test_value_head_size_unlike_that_of_the_prefix(self):
        refuses(ValueError, "prefix_value", value=torch.randn(2, 2, 5, 9))

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_dtype_unlike_the_query(self, name):
        refuses(TypeError, name, "float16", "float32", **{name: arguments()[name].half()})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtype_that_is_not_floating(self, dtype):
        changes = {name: x.to(dtype) for name, x in arguments().items()}
        refuses(TypeError, "query", **changes)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_device_unlike_the_query(self, name):
        refuses(ValueError, name, "meta", "cpu", **{name: arguments()[name].to("meta")})

    def test_query_heads_that_do_not_divide(self):
        refuses(ValueError, "query", "3", "2", query=torch.randn(2, 3, 3, 8))
        refuses(ValueError, "query", query=torch.randn(2, 1, 3, 8))

    def test_no_key_heads(self):
        x, prefix = torch.randn(2, 0, 5, 8), torch.randn(0, 6, 8)
        refuses(ValueError, "query", key=x, value=x, prefix_key=prefix, prefix_value=prefix)

    def test_head_size_zero(self):
        changes = {name: x[..., :0] for name, x in arguments().items()}
        refuses(ValueError, "query", **changes)

    @pytest.mark.parametrize("name", ["prefix_key", "prefix_value"])
    def test_half_a_prefix(self, name):
        refuses(ValueError, "prefix_key", "prefix_value", **{name: None})


class TestMasks:
    @pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 11), (1, 5), (2, 1), (2, 1, 1, 5)])
    def test_padding_mask_shape(self, shape):
        mask = torch.ones(shape, dtype=torch.bool)
        refuses(ValueError, "key_padding_mask", "[2, 5]", key_padding_mask=mask)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
    def test_padding_mask_dtype(self, dtype):
        """Tokenizers give int64 and models give additive floats: neither is guessed at."""
        refuses(TypeError, "key_padding_mask", key_padding_mask=torch.ones(2, 5, dtype=dtype))

    def test_padding_mask_device(self):
        mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
        refuses(ValueError, "key_padding_mask", "meta", key_padding_mask=mask)

    def test_padding_mask_that_is_no_tensor(self):
        refuses(TypeError, "key_padding_mask", key_padding_mask=[[True] * 5] * 2)

    @pytest.mark.parametrize(
        "shape", [(4,), (2, 5), (3, 3, 5), (3, 4, 3, 5), (2, 2, 3, 5), (3, 11), (1, 2, 4, 3, 5)]
    )
    def test_attn_mask_shape(self, shape):
        mask = torch.ones(shape, dtype=torch.bool)
        refuses(ValueError, "attn_mask", "[2, 4, 3, 5]", attn_mask=mask)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.float64])
    def test_attn_mask_dtype(self, dtype):
        refuses(TypeError, "attn_mask", attn_mask=torch.ones(3, 5, dtype=dtype))

    def test_attn_mask_device(self):
        refuses(ValueError, "attn_mask", "meta", attn_mask=torch.ones(3, 5, device="meta"))

    def test_attn_mask_that_is_no_tensor(self):
        refuses(TypeError, "attn_mask", attn_mask=[[True] * 5] * 3)


class TestNumbers:
    @pytest.mark.parametrize("Lk", [2, 0])
    def test_causal_with_fewer_keys_than_queries(self, Lk):
        x = torch.randn(2, 2, Lk, 8)
        refuses(ValueError, "is_causal", "3", f"{Lk}", key=x, value=x, is_causal=True)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
    def test_scale_that_is_not_finite(self, scale):
        refuses(ValueError, "scale", scale=scale)

    def test_scale_that_is_no_number(self):
        refuses(TypeError, scale="0.5")


LENGTHS, INDEX = torch.tensor([4, 2]), torch.tensor([0, -1])


class TestPackedPrefixes:
    def test_the_call_that_the_others_change_is_valid(self):
        for dtype in (torch.int32, torch.int64):
            packed = {"prefix_lengths": LENGTHS.to(dtype), "prefix_index": INDEX.to(dtype)}
            assert prefix_attention(**arguments(**packed)).shape == (2, 4, 3, 8)

    @pytest.mark.parametrize(
        ("error", "words", "changes"),
        [
            (ValueError, ["prefix_lengths", "prefix_index"], {"prefix_index": None}),
            (ValueError, ["prefix_lengths", "prefix_index"], {"prefix_lengths": None}),
            (ValueError, ["prefix_lengths"], {"prefix_key": None, "prefix_value": None}),
            (ValueError, ["prefix_lengths", "[N]"], {"prefix_lengths": LENGTHS[None]}),
            (ValueError, ["prefix_lengths", "6"], {"prefix_lengths": torch.tensor([4, 3])}),
            (ValueError, ["prefix_lengths", "6"], {"prefix_lengths": torch.tensor([7, -1])}),
            (TypeError, ["prefix_lengths", "float32"], {"prefix_lengths": LENGTHS.float()}),
            (TypeError, ["prefix_lengths", "list"], {"prefix_lengths": [4, 2]}),
            (ValueError, ["prefix_lengths", "meta"], {"prefix_lengths": LENGTHS.to("meta")}),
            (ValueError, ["prefix_index", "[2]"], {"prefix_index": torch.tensor([0])}),
            (ValueError, ["prefix_index", "1"], {"prefix_index": torch.tensor([0, 2])}),
            (ValueError, ["prefix_index", "-1"], {"prefix_index": torch.tensor([0, -2])}),
            (TypeError, ["prefix_index", "int16"], {"prefix_index": INDEX.short()}),
            (TypeError, ["prefix_index", "bool"], {"prefix_index": INDEX.bool()}),
        ],
    )
    def test_what_does_not_fit(self, error, words, changes):
        packed = {"prefix_lengths": LENGTHS, "prefix_index": INDEX}
        refuses(error, *words, **{**packed, **changes})


class TestPackedSequences:
    @pytest.mark.parametrize(
        ("error", "words", "changes"),
        [
            (ValueError, ["cu_seqlens", "5"], {"cu_seqlens": torch.tensor([0, 2, 4])}),
            (ValueError, ["cu_seqlens", "5"], {"cu_seqlens": torch.tensor([1, 2, 5])}),
            (ValueError, ["cu_seqlens", "5"], {"cu_seqlens": torch.tensor([0, 6, 5])}),
            (ValueError, ["cu_seqlens"], {"cu_seqlens": torch.tensor([0])}),
            (ValueError, ["cu_seqlens"], {"cu_seqlens": torch.tensor([[0, 5]])}),
            (TypeError, ["cu_seqlens", "float32"], {"cu_seqlens": torch.tensor([0.0, 5.0])}),
            (TypeError, ["cu_seqlens", "list"], {"cu_seqlens": [0, 5]}),
            (ValueError, ["cu_seqlens", "meta"], {"cu_seqlens": torch.tensor([0, 5]).to("meta")}),
            (ValueError, ["cu_seqlens", "Lq", "Lk"], {"query": torch.randn(1, 4, 4, 8)}),
            (
                ValueError,
                ["cu_seqlens", "key_padding_mask"],
                {"key_padding_mask": torch.ones(1, 5, dtype=torch.bool)},
            ),
            (
                ValueError,
                ["cu_seqlens", "attn_mask"],
                {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
            ),
            (
                ValueError,
                ["prefix_index", "cu_seqlens"],
                {"prefix_lengths": LENGTHS, "prefix_index": torch.tensor([0])},
            ),
        ],
    )
    def test_what_does_not_fit(self, error, words, changes):
        x = torch.randn(1, 2, 5, 8)
        packed = {"query": torch.randn(1, 4, 5, 8), "key": x, "value": x}
        refuses(error, *words, **{**packed, "cu_seqlens": torch.tensor([0, 2, 5]), **changes})

    def test_more_than_one_row(self):
        x = torch.randn(2, 2, 3, 8)
        refuses(ValueError, "cu_seqlens", "2", key=x, value=x, cu_seqlens=torch.tensor([0, 3]))


class TestAdded:
    @pytest.mark.parametrize("name", ["sinks", "prefix_bias"])
    def test_shape(self, name):
        refuses(ValueError, name, "[4]", **{name: torch.randn(2)})
        refuses(ValueError, name, "[4]", **{name: torch.randn(1, 4)})
        refuses(ValueError, name, "[4]", **{name: torch.tensor(1.0)})

    @pytest.mark.parametrize("name", ["sinks", "prefix_bias"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
    def test_dtype(self, name, dtype):
        refuses(TypeError, name, **{name: torch.ones(4, dtype=dtype)})

    @pytest.mark.parametrize("name", ["sinks", "prefix_bias"])
    def test_device_and_kind(self, name):
        refuses(ValueError, name, "meta", **{name: torch.ones(4, device="meta")})
        refuses(TypeError, name, "list", **{name: [1.0] * 4})

    def test_prefix_bias_of_other_columns(self):
        refuses(ValueError, "prefix_bias", "[4, 3, 6]", prefix_bias=torch.randn(4, 3, 11))


class TestMoreNumbers:
    @pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
    def test_dropout_p(self, p):
        refuses(ValueError, "dropout_p", dropout_p=p)

    @pytest.mark.parametrize("p", [None, "", []], ids=str)
    def test_dropout_p_is_a_number(self, p):
        refuses(TypeError, "dropout_p", dropout_p=p)

    def test_batch_invariant(self):
        refuses(ValueError, "batch_invariant, dropout_p", dropout_p=0.5, batch_invariant=True)

    @pytest.mark.parametrize("window", [0, -1])
    def test_sliding_window(self, window):
        refuses(ValueError, "sliding_window", f"{window}", sliding_window=window)

    @pytest.mark.parametrize("window", [4.0, "4", True, False])
    def test_sliding_window_that_is_no_number_of_keys(self, window):
        refuses(TypeError, "sliding_window", sliding_window=window)

    @pytest.mark.parametrize("softcap", [-1.0, float("inf"), float("nan")])
    def test_softcap(self, softcap):
        refuses(ValueError, "softcap", softcap=softcap)

    def test_prefix_in_window_without_a_window(self):
        refuses(ValueError, "prefix_in_window", "sliding_window", prefix_in_window=True)

    def test_prefix_in_window_with_fewer_keys_than_queries(self):
        x = torch.randn(2, 2, 2, 8)
        refuses(
            ValueError, "prefix_in_window", "Lk", key=x, value=x, sliding_window=4,
            prefix_in_window=True,
        )  # fmt: skip

    def test_all_are_accepted_at_their_defaults(self):
        defaults = dict.fromkeys(
            ["prefix_index", "prefix_lengths", "cu_seqlens", "sliding_window", "softcap", "sinks"]
        )
        defaults |= {"prefix_bias": None, "dropout_p": 0.0, "prefix_in_window": False}
        inputs = arguments()
        expected = prefix_attention(**inputs)
        assert torch.equal(prefix_attention(**inputs, **defaults), expected)
        assert torch.equal(prefix_attention(**inputs, softcap=0.0), expected)
