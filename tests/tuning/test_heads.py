"""Heads: each adapter trains its own, as with PEFT's modules_to_save; the base keeps its own."""

import copy
import pickle
import threading

import peft
import pytest
import torch
from packaging.version import Version

from fastprefix import PrefixConfig
from fastprefix_testing.heads import CASES, CLOSE, WRAPS, P, answers, build, two


@pytest.mark.parametrize("wrap", WRAPS)
def test_one_is_trained_and_the_others_stay(wrap, texts):
    tuned = two("roberta", wrap)
    ids, mask = texts
    before = {name: tensor.clone() for name, tensor in tuned.named_parameters()}
    tuned.set_adapter("second")
    trained = {name for name, x in tuned.named_parameters() if x.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"encoders", "adapter_heads"}
    assert {name.split(".")[1] for name in trained} == {"second"}
    optimizer = torch.optim.SGD([x for x in tuned.parameters() if x.requires_grad], lr=0.1)
    loss = tuned(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    optimizer.step()
    changed = {name for name, x in tuned.named_parameters() if not torch.equal(x, before[name])}
    assert changed == trained
    assert list(tuned.base_model.state_dict()) == list(build("roberta").state_dict())
    tuned.set_requires_grad("default")
    assert tuned.adapter_heads["default"].classifier.dense.weight.requires_grad
    tuned.set_adapter("default", inference_mode=True)
    assert not any(x.requires_grad for x in tuned.parameters())


@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_training_steps_are_those_of_peft(wrap, texts, tmp_path):
    """The steps train the head too, with dropout in it: nothing else draws random numbers."""
    of, _, config = WRAPS[wrap]
    ids, mask = texts
    changes = {"classifier_dropout": 0.3}
    theirs = peft.get_peft_model(
        build("roberta", **changes), config(task_type="SEQ_CLS", num_virtual_tokens=P)
    )
    theirs.save_pretrained(tmp_path)
    ours = of.from_pretrained(build("roberta", **changes), tmp_path, is_trainable=True)
    losses = []
    for model in (theirs.train(), ours):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.2)
        for _ in range(4):
            labels = torch.tensor([0, 1, 2, 0])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.stack(losses[4:]), torch.stack(losses[:4]), **CLOSE)
    assert losses[3] < losses[0]


ROWS = ["second", None, "bare", "default"]


@pytest.mark.parametrize("case", ["roberta", "llama", "bert tokens"])
def test_each_row_has_the_head_of_its_adapter(case, texts):
    tuned = two(case)
    tuned.add_adapter("bare", PrefixConfig(2, task_type="FEATURE_EXTRACTION", init_std=0.5))
    assert tuned.head_names("bare") is None
    ids, mask = texts
    tuned.set_requires_grad(["default", "second"])
    weights = [x for x in tuned.parameters() if x.requires_grad]
    got = answers(tuned, ids, mask, prefix_names=ROWS)
    gradients = torch.autograd.grad(got.square().sum(), weights)
    alone = []
    for row, name in enumerate(ROWS):
        text = ids[row : row + 1], mask[row : row + 1]
        alone.append(answers(tuned, *text, prefix_names=[name]))
    torch.testing.assert_close(got, torch.cat(alone), **CLOSE)
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), weights)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    assert all(x.abs().max() > 0 for x in expected)
    tuned.set_adapter("bare")
    base, head = build(case), next(iter(CASES[case][3]))
    for name, tensor in tuned.base_model.get_submodule(head).state_dict().items():
        assert torch.equal(tensor, base.get_submodule(head).state_dict()[name])
    torch.testing.assert_close(answers(tuned, ids, mask)[2], got[2], **CLOSE)


def test_packed_rows_of_different_heads_are_refused(texts):
    tuned = two("llama")
    positions = torch.cat([torch.arange(2), torch.arange(3)])[None]
    with pytest.raises(NotImplementedError, match="prefix_names: got 2 rows with different heads"):
        tuned(input_ids=texts[0][:1], position_ids=positions, prefix_names=["default", "second"])


def test_a_head_and_a_part_of_it_in_one_batch_are_refused(texts):
    tuned = two("roberta")
    tuned.add_adapter("part", PrefixConfig(P, modules_to_save=["out_proj"], task_type="SEQ_CLS"))
    with pytest.raises(NotImplementedError, match="prefix_names: got rows whose adapters train cl"):
        answers(tuned, *texts, prefix_names=["default", "part"] * 2)
    answers(tuned, *texts, prefix_names=["part"] * 4)


def test_threads_do_not_see_each_others_heads(texts):
    tuned = two("bert")
    ids, mask = texts
    rows = {name: [name] * 4 for name in ("default", "second")} | {"mixed": ["second", None] * 2}
    with torch.no_grad():
        expected = {key: answers(tuned, ids, mask, prefix_names=x) for key, x in rows.items()}
    wrong = []
    start = threading.Barrier(len(rows))

    def run(key):
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                got = answers(tuned, ids, mask, prefix_names=rows[key])
            if not torch.equal(got, expected[key]):
                wrong.append(key)

    threads = [threading.Thread(target=run, args=(key,)) for key in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_copy_has_heads_of_its_own(wrap, make, texts):
    tuned = two("bert", wrap)
    again, base = make(tuned), make(tuned.base_model)
    expected = answers(tuned, *texts)
    assert torch.equal(answers(again, *texts), expected)
    assert type(base.classifier) is torch.nn.Linear
    with torch.no_grad():
        for parameter in again.adapter_heads.parameters():
            parameter.add_(1.0)
    assert torch.equal(answers(tuned, *texts), expected)
    assert not torch.allclose(answers(again, *texts), expected)


def test_compiled_in_one_graph(texts):
    torch._dynamo.reset()
    tuned = two("bert", num_hidden_layers=1)
    compiled = torch.compile(tuned, fullgraph=True, backend="eager")
    for name in ("default", "second", "default"):
        tuned.set_adapter(name)
        torch.testing.assert_close(answers(compiled, *texts), answers(tuned, *texts), **CLOSE)
    again = torch.compile(copy.deepcopy(tuned), fullgraph=True, backend="eager")
    torch.testing.assert_close(answers(again, *texts), answers(tuned, *texts), **CLOSE)


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_last_adapter_is_deleted(wrap, texts, tmp_path):
    tuned = two("bert", wrap)
    tuned.set_adapter("second")
    tuned.add_adapter("third", WRAPS[wrap][1](P, task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="'second' was active; now 'default' is"):
        tuned.delete_adapter("second")
    assert tuned.active_adapters == ["default"]
    assert not any(".second." in name for name in tuned.state_dict())
    tuned.delete_adapter("third")
    tuned.delete_adapter("default")
    assert (tuned.active_adapter, tuned.active_adapters, dict(tuned.peft_config)) == (None, [], {})
    assert list(tuned.state_dict()) == ["_extra_state"]
    ids, mask = texts
    for call in (
        lambda: tuned(input_ids=ids),
        lambda: tuned.encoder,
        tuned.export,
        tuned.heads,
    ):
        with pytest.raises(ValueError, match="active_adapter: got none"):
            call()
    with pytest.raises(ValueError, match="selected_adapters: got none"):
        tuned.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    expected = answers(build("bert"), ids, mask)
    with tuned.disable_adapter():
        torch.testing.assert_close(answers(tuned, ids, mask), expected, **CLOSE)
    torch.testing.assert_close(answers(tuned.base_model, ids, mask), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"adapter_name: got 'default', takes one of \[\]"):
        tuned.set_adapter("default")
    tuned.add_adapter("again", WRAPS[wrap][1](P, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="active_adapter: got none"):
        tuned(input_ids=ids)
    tuned.set_adapter("again")
    assert tuned.active_adapters == ["again"]
    assert answers(tuned, ids, mask).shape == (4, 3)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="PEFT 0.20 cannot delete an adapter of prompts",
)
@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_active_after_deletions_is_what_peft_has(wrap):
    _, config, theirs = WRAPS[wrap]
    task = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": P}
    base = build("bert")
    models = [
        peft.get_peft_model(build("bert"), theirs(**task)),
        WRAPS[wrap][0](base, config(**task)),
    ]
    for name in ("second", "third"):
        models[0].add_adapter(name, theirs(**task))
        models[1].add_adapter(name, config(**task))
    seen = [[], []]
    for model, active in zip(models, seen, strict=True):
        model.set_adapter("second")
        for name in ("second", "third", "default"):
            model.delete_adapter(name)
            active.append((list(model.active_adapters), list(model.peft_config)))
    assert seen[1] == seen[0]
