"""Rows of one batch with prefixes of their own: each row is what it is alone on a bare model."""

import gc
import weakref

import pytest
import torch
from transformers import MistralConfig, set_seed

import fastprefix_testing.models as tiny
from fastprefix import PackedPrefixKV, PrefixKV, patch_model, use_prefix
from fastprefix.attention import checks
from fastprefix.attention.step import Step
from fastprefix.hf import patch_of
from fastprefix_testing import zoo

ROWS = ["a", None, "b", "a"]
LENGTHS = (7, 4, 1, 5)
EXACT = {"rtol": 0, "atol": 1e-9}
LOGITS = {"rtol": 1e-3, "atol": 1e-4}


def prefixes(model, **options):
    """Two of different lengths; the text stands elsewhere behind each than their lengths say."""
    return {
        "a": tiny.random_kv(model, 3, seed=1, position_offset=8, **options),
        "unused": tiny.random_kv(model, 2, seed=2, **options),
        "b": tiny.random_kv(model, 6, seed=3, position_offset=1, **options),
    }


def alone(bare, kv, text, **kwargs):
    """A text of one row on a bare model, its prefix in the cache."""
    mask = torch.ones_like(text)
    if kv is None:
        return bare(text, attention_mask=mask, **kwargs)
    return tiny.expanded_forward(bare, kv, text, mask, **kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients_are_those_of_each_row_alone(architecture, side):
    model, bare = (tiny.build(architecture, torch.float64) for _ in range(2))
    ids, mask = tiny.batch(LENGTHS, side)
    found = []
    ours = prefixes(model, requires_grad=True)
    with use_prefix(model, ours, ROWS):
        logits = model(ids, attention_mask=mask).logits
    logits[mask.bool()].softmax(-1).square().sum().backward()
    theirs = prefixes(bare, requires_grad=True)
    for row, name in enumerate(ROWS):
        real = mask[row].bool()
        if name is None:  # without position_ids the bare model counts GPT-2's pads
            expected = bare(ids, attention_mask=mask).logits[row][real]
        else:
            expected = alone(bare, theirs[name], ids[row][real][None]).logits[0]
        torch.testing.assert_close(logits[row][real], expected, rtol=1e-5, atol=1e-5)
        expected.softmax(-1).square().sum().backward()
    for name in ("a", "b"):
        found = tiny.gradients(ours[name])
        assert all(gradient.abs().max() > 1e-6 for gradient in found)
        torch.testing.assert_close(found, tiny.gradients(theirs[name]), rtol=1e-4, atol=1e-6)
    assert all(tensor.grad.abs().max() == 0 for tensor in ours["unused"].keys)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gpt_neox"])
def test_a_row_without_a_prefix_does_not_depend_on_the_others(name, side):
    """It stands where the bare model puts it, which counts pads (GPT-2) or does not (OPT)."""
    model, bare = patch_model(zoo.kind(name)), zoo.kind(name)
    ids, mask = tiny.batch(LENGTHS, "right" if side == "right" else "left")
    if side == "holes":
        mask[:, 3] = 0
    kv = {
        x: tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P).detach()
        for x, P in (("a", 3), ("b", 6))
    }
    with torch.no_grad():
        expected = bare(ids, attention_mask=mask).logits
        for rows in ([None] * 4, ROWS, ["b", None, None, "a"]):
            with use_prefix(model, kv, rows):
                cached = model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
                got = model(ids, attention_mask=mask).logits
                last = model(
                    ids[:, -2:], attention_mask=mask, past_key_values=cached.past_key_values
                ).logits
            for row in (row for row, x in enumerate(rows) if x is None):
                real = mask[row].bool()
                torch.testing.assert_close(got[row][real], expected[row][real], **EXACT)
                torch.testing.assert_close(last[row][real[-2:]], got[row, -2:][real[-2:]], **EXACT)
            with use_prefix(model, kv["a"]):
                alike = model(ids, attention_mask=mask).logits
            for row in (row for row, x in enumerate(rows) if x == "a"):
                real = mask[row].bool()
                torch.testing.assert_close(got[row][real], alike[row][real], **EXACT)


def test_rows_with_position_ids_or_embeddings(model):
    ids, mask = tiny.batch(LENGTHS)
    kv = PackedPrefixKV.pack(prefixes(model))
    with use_prefix(model, kv, ROWS):
        expected = model(ids, attention_mask=mask).logits
        positions = tiny.positions(mask)
        same = model(ids, attention_mask=mask, position_ids=positions).logits
        embeds = model.get_input_embeddings()(ids)
        embedded = model(inputs_embeds=embeds, attention_mask=mask).logits
        whole = model(ids).logits
        ones = model(ids, attention_mask=torch.ones_like(mask)).logits
    placed = mask.bool() & torch.tensor([name is not None for name in ROWS])[:, None]
    assert torch.equal(same[placed], expected[placed])
    assert torch.equal(embedded, expected)
    assert torch.equal(whole, ones)


def rows_alone(bare, fronts, ids, mask, **options):
    """New ids of each row alone, its prompt in front of it as text."""
    found = []
    for row, name in enumerate(ROWS):
        text = ids[row][mask[row].bool()][None]
        if name is not None:
            text = torch.cat([fronts[name], text], 1)
        found.append(tiny.generate(bare, text, **options))
    return torch.cat(found)


GREEDY = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
}


@pytest.mark.parametrize("mode", GREEDY)
def test_generated_ids_are_those_of_each_row_alone(model, bare, mode):
    fronts = {"a": tiny.prompt(9, seed=1), "b": tiny.prompt(4, seed=2)}
    ids, mask = tiny.batch(LENGTHS)
    kv = {name: PrefixKV.prefill(model, front) for name, front in fronts.items()}
    with use_prefix(model, kv, ROWS):
        got = tiny.generate(model, ids, mask, **GREEDY[mode])
    assert torch.equal(got, rows_alone(bare, fronts, ids, mask, **GREEDY[mode]))
    if mode == "greedy":
        for wrong in (["b", None, "a", "a"], ["a", "a", "b", "a"]):
            with use_prefix(model, kv, wrong):
                assert not torch.equal(tiny.generate(model, ids, mask), got)


def test_sampled_ids_are_those_of_the_concatenation(model, bare):
    """num_return_sequences repeats each row; the same seed draws the same in both batches."""
    fronts = {"a": tiny.prompt(9, seed=1), "b": tiny.prompt(4, seed=2)}
    ids, mask = tiny.batch(LENGTHS)
    rows = []
    for row, name in enumerate(ROWS):
        text = ids[row][mask[row].bool()]
        rows.append(text if name is None else torch.cat([fronts[name][0], text]))
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 3}
    set_seed(3)
    expected = tiny.generate(bare, *tiny.pad(rows, "left"), **options)
    kv = {name: PrefixKV.prefill(model, front) for name, front in fronts.items()}
    set_seed(3)
    with use_prefix(model, kv, ROWS):
        got = tiny.generate(model, ids, mask, **options)
    assert torch.equal(got, expected)
    assert len(set(map(tuple, got[:3].tolist()))) > 1


def mistral(window, **changes):
    fields = {**tiny.GROUPED, "sliding_window": window, **changes}
    return tiny.from_config(MistralConfig(**fields))


@pytest.mark.parametrize("mode", GREEDY)
def test_prompts_slide_out_of_a_window_row_by_row(mode):
    """Prompts shorter and longer than the window, until all are out of it."""
    model, bare = mistral(8), mistral(8)
    fronts = {"a": tiny.prompt(12, seed=1), "b": tiny.prompt(3, seed=2)}
    ids, mask = tiny.batch(LENGTHS)
    kv = {name: PrefixKV.prefill(model, front) for name, front in fronts.items()}
    options = {**GREEDY[mode], "max_new_tokens": 12}
    with use_prefix(model, kv, ROWS):
        got = tiny.generate(model, ids, mask, **options)
    assert torch.equal(got, rows_alone(bare, fronts, ids, mask, **options))


def test_learned_prefixes_stay_in_sight_of_a_window():
    model, bare = mistral(4), mistral(4)
    ids, mask = tiny.batch((9, 9, 9, 9))
    kv = prefixes(model)
    with use_prefix(model, kv, ROWS):
        got = model(ids, attention_mask=mask).logits
    near = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    for row, name in enumerate(ROWS):
        P = kv[name].num_virtual_tokens if name else 0
        sees = torch.cat([torch.ones(9, P, dtype=torch.bool), near], 1)[None, None]
        sees = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        offset = kv[name].position_offset if name else 0
        expected = bare(
            ids[row : row + 1],
            attention_mask=sees,
            position_ids=torch.arange(9)[None] + offset,
            past_key_values=tiny.expanded(kv[name], 1) if name else None,
        ).logits
        torch.testing.assert_close(got[row : row + 1], expected, **LOGITS)


def test_prompts_and_learned_prefixes_mix_but_in_a_window(model):
    """A window treats them differently, and a call of the operator can not."""
    ids, mask = tiny.batch((4, 2))
    for one in (model, mistral(64), mistral(8)):
        learned, prompt = tiny.random_kv(one, 5), PrefixKV.prefill(one, tiny.prompt(5))
        texts = [ids[row][mask[row].bool()][None] for row in range(2)]
        expected = []
        for text, kv in zip(texts, (learned, prompt), strict=True):
            with use_prefix(one, kv):
                expected.append(one(text).logits[0, -1])
        with use_prefix(one, {"learned": learned, "prompt": prompt}, ["learned", "prompt"]):
            if getattr(one.config, "sliding_window", None) == 8:
                with pytest.raises(NotImplementedError, match=r"sliding_window of 8.*one batch"):
                    one(ids, attention_mask=mask)
                continue
            got = one(ids, attention_mask=mask).logits[:, -1]
        torch.testing.assert_close(got, torch.stack(expected), **LOGITS)


def test_prefixes_of_other_dtypes_are_converted_together(model):
    ids, mask = tiny.batch((4, 4))
    kv = {"a": tiny.random_kv(model, 3), "b": tiny.random_kv(model, 4).to(dtype=torch.float64)}
    with use_prefix(model, kv, ["a", "b"]):
        got = model(ids, attention_mask=mask).logits
    kv["b"] = kv["b"].to(dtype=torch.float32)
    with use_prefix(model, kv, ["a", "b"]):
        assert torch.equal(model(ids, attention_mask=mask).logits, got)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Two forwards with other rows before one backward; the reentrant variant stays refused."""
    model = patch_model(tiny.build("llama", torch.float64).train().requires_grad_(False))
    ids, mask = tiny.batch(LENGTHS)
    kv = prefixes(model, requires_grad=True)

    def run():
        total = 0
        for rows in (ROWS, ["b", "b", "a", None]):
            with use_prefix(model, kv, rows):
                total = total + model(ids, attention_mask=mask).logits[mask.bool()].square().sum()
        total.backward()
        return [gradient for one in kv.values() for gradient in tiny.gradients(one)]

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            run()
    else:
        torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-9)


def test_compiled_whole():
    model = patch_model(mistral(8, num_hidden_layers=1))
    ids, mask = tiny.batch(LENGTHS)
    kv = {name: PrefixKV.prefill(model, tiny.prompt(P)) for name, P in (("a", 5), ("b", 3))}
    options = {"attention_mask": mask, "use_cache": False}
    torch._dynamo.reset()
    with use_prefix(model, kv, ROWS), torch.no_grad():
        expected = model(ids, **options).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(ids, **options).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **LOGITS)


def test_rows_that_do_not_fit(model):
    ids, mask = tiny.batch((4, 3, 2))
    kv = {"a": tiny.random_kv(model, 3), "b": tiny.random_kv(model, 4)}
    for rows in (["a", "b"], ["a", "b", None, "a"], ["a"] * 6):
        with (
            use_prefix(model, kv, rows),
            pytest.raises(ValueError, match=rf"rows: got {len(rows)} names.* 3 rows"),
        ):
            model(ids, attention_mask=mask)
    refused = {
        "rows: got None with several": (kv, None),
        "rows: got names with one": (kv["a"], ["a", "a", "a"]),
        "rows: got 'c', takes one of": (kv, ["a", "c", None]),
        "kv: got no prefixes": ({}, [None]),
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message), use_prefix(model, *arguments):
            pass
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("train", [False, True])
def test_values_are_checked_once_in_a_forward(train, monkeypatch):
    model = tiny.build("llama", torch.float64)
    ids, mask = tiny.batch(LENGTHS, "left")
    checked, check = [], checks._check_values
    monkeypatch.setattr(checks, "_check_values", lambda *a: checked.append(a) or check(*a))
    steps = []
    made = Step.__init__
    monkeypatch.setattr(
        Step, "__init__", lambda self: steps.append(weakref.ref(self)) or made(self)
    )
    if train:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        patch_model(model)
    kv = prefixes(model, requires_grad=train)
    with use_prefix(model, kv, ROWS):
        checked.clear()
        for count in (1, 2):
            with torch.set_grad_enabled(train):
                logits = model(ids, attention_mask=mask).logits
            if train:
                logits.sum().backward()
            assert len(checked) == count
    del logits
    gc.collect()
    assert [each() for each in steps] == [None] * len(steps)
