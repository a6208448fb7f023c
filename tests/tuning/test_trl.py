"""The trainers of trl run a tuned model as they run PEFT's, and as a plain loop does by hand."""

import copy
import random
import sys
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import log_softmax, logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix.integrations import trl as integration

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 3
LEARNING_RATE = 0.05


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<pad>", "<eos>", "<unk>"]
    words = special + [f"w{number}" for number in range(tiny.VOCAB - len(special))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def small():
    return tiny.build("llama", num_hidden_layers=2)


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def loud(tuned):
    """A prefix that has learned something: without it, or with another one, all is different."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.normal_(0.0, 1.0, generator=generator)
    return tuned


def prefixed(**options):
    config = PrefixConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", **options)
    return loud(PrefixTuningModel(small(), config))


def texts(kind, rows):
    """Columns of a data set for a trainer."""
    source = random.Random(0)

    def some(length):
        return " ".join(f"w{source.randrange(98)}" for _ in range(length))

    if kind == "sft":
        return {"text": [some(4 + row % 4) for row in range(rows)]}
    columns = {"prompt": [some(3 + row % 3) for row in range(rows)]}
    if kind != "grpo":
        columns["chosen"] = [" " + some(4 + row % 2) for row in range(rows)]
        columns["rejected"] = [" " + some(3 + row % 3) for row in range(rows)]
    return columns


def make(kind, model, tokenizer, folder, rows=4, **options):
    """A trainer of trl whose every step sees all rows, if there are four."""
    trainer, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[kind]
    more = {name: options.pop(name) for name in ("ref_model", "reward_funcs") if name in options}
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "bf16": False, "seed": 5, **options,
    }  # fmt: skip
    return trainer(
        model=model,
        args=config(output_dir=str(folder), **given),
        train_dataset=datasets.Dataset.from_dict(texts(kind, rows)),
        processing_class=tokenizer,
        **more,
    )


def run(*args, **options):
    """What a trainer logs at each step."""
    trainer = make(*args, **options)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def loop(tuned, loss_of):
    """The losses of the same steps by hand."""
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    losses = []
    tuned.train()
    for _ in range(STEPS):
        loss = loss_of(tuned)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def log_probs(model, tokenizer, prompts, completions):
    """The log-probability [rows] of each completion with its end, and the number of tokens."""
    sums, count = [], 0
    for prompt, completion in zip(prompts, completions, strict=True):
        front = tokenizer(prompt)["input_ids"]
        rest = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*front, *rest]])
        per_token = log_softmax(model(input_ids=ids).logits[:, :-1], -1)
        picked = per_token.gather(2, ids[:, 1:, None])[0, :, 0]
        picked = picked[max(len(front) - 1, 0) :]
        sums.append(picked.sum())
        count += len(picked)
    return torch.stack(sums), count


def assert_losses(logs, want, tolerance=1e-5):
    got = [float(log["loss"]) for log in logs]
    assert got == pytest.approx(want, rel=tolerance)
    assert len(set(want)) == len(want)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_is_the_plain_loop(tokenizer, tmp_path, gradient_checkpointing):
    tuned = prefixed()
    other, data = copy.deepcopy(tuned), texts("sft", 4)

    def loss_of(model):
        sums, count = log_probs(model, tokenizer, [""] * 4, data["text"])
        return -sums.sum() / count

    want = loop(other, loss_of)
    options = {"gradient_checkpointing": gradient_checkpointing}
    logs = run("sft", tuned, tokenizer, tmp_path, **options)
    assert_losses(logs, want)
    assert want[-1] < want[0]
    for got, expected in zip(tuned.export().keys, other.export().keys, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_head_beside_the_prefix_is_trained_too(tokenizer, tmp_path):
    """The trainer computes with the weight of the head, and does not call it."""
    tuned = prefixed(modules_to_save=["lm_head"])
    other, data = copy.deepcopy(tuned), texts("sft", 4)

    def loss_of(model):
        sums, count = log_probs(model, tokenizer, [""] * 4, data["text"])
        return -sums.sum() / count

    assert_losses(run("sft", tuned, tokenizer, tmp_path), loop(other, loss_of))
    for name, head in tuned.heads().items():
        torch.testing.assert_close(head, other.heads()[name], rtol=1e-3, atol=1e-4)
        assert not torch.equal(head, small().state_dict()[name])


def test_dpo_compares_with_the_prefix_as_it_was(tokenizer, tmp_path):
    """PEFT's rule: neither with the base nor with the prefix that is being trained."""
    tuned = prefixed()
    other, reference = copy.deepcopy(tuned), copy.deepcopy(tuned)
    data = texts("dpo", 4)

    def ratios(model, side):
        with torch.no_grad():
            was, _ = log_probs(reference, tokenizer, data["prompt"], data[side])
        return log_probs(model, tokenizer, data["prompt"], data[side])[0] - was

    def loss_of(model):
        margin = ratios(model, "chosen") - ratios(model, "rejected")
        return -logsigmoid(0.1 * margin).mean()

    want = loop(other, loss_of)
    assert_losses(run("dpo", tuned, tokenizer, tmp_path), want)
    assert want[-1] < want[0] == pytest.approx(0.6931472)
    # the adapter that trl keeps for it is what the prefix was, and was not trained
    assert tuned.active_adapter == "default"
    for got, was in zip(tuned.export("ref").keys, reference.export().keys, strict=True):
        assert torch.equal(got, was)


def test_dpo_takes_a_reference_of_ones_own(tokenizer, tmp_path):
    tuned, bare = prefixed(), small()
    data = texts("dpo", 4)

    def loss_of(model):
        margins = []
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                was, _ = log_probs(bare, tokenizer, data["prompt"], data[side])
            margins.append(log_probs(model, tokenizer, data["prompt"], data[side])[0] - was)
        return -logsigmoid(0.1 * (margins[0] - margins[1])).mean()

    want = loop(copy.deepcopy(tuned), loss_of)
    assert want[0] != pytest.approx(0.6931472, rel=1e-3)
    logs = run("dpo", tuned, tokenizer, tmp_path, ref_model=small())
    assert_losses(logs, want)


def test_grpo_generates_with_the_prefix_and_compares_with_it(tokenizer, tmp_path):
    tuned = prefixed()
    initial, seen = copy.deepcopy(tuned), []

    def rewards(prompts, completion_ids, **_):
        seen.append((prompts, completion_ids))
        return [float(row % 4) for row in range(len(prompts))]

    logs = run(
        "grpo", tuned, tokenizer, tmp_path, rows=2, reward_funcs=rewards, beta=0.1,
        num_generations=4, max_completion_length=5, generation_kwargs={"do_sample": False},
        gradient_checkpointing=True,
    )  # fmt: skip
    prompts, completions = seen[0]
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    want = initial.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert completions == [want] * 4
    assert initial.base_model.generate(ids, **options)[0, ids.shape[1] :].tolist() != want
    # at first the policy is its reference, which the base is not; and the reference stays
    assert float(logs[0]["kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(logs[-1]["kl"]) > 1e-4
    for got, was in zip(tuned.export("ref").keys, initial.export().keys, strict=True):
        assert torch.equal(got, was)
    assert not torch.equal(tuned.export().keys[0], initial.export().keys[0])


def test_reward_is_the_plain_loop(tokenizer, tmp_path):
    """The head on top is trained beside the prefix."""
    config = PrefixConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    tuned = loud(PrefixTuningModel(classifier(), config))
    other, data = copy.deepcopy(tuned), texts("reward", 4)

    def rewards(model, side):
        rows = []
        for prompt, answer in zip(data["prompt"], data[side], strict=True):
            ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
            rows.append(model(input_ids=torch.tensor([ids])).logits[0, 0])
        return torch.stack(rows)

    def loss_of(model):
        return -logsigmoid(rewards(model, "chosen") - rewards(model, "rejected")).mean()

    want = loop(other, loss_of)
    assert_losses(run("reward", tuned, tokenizer, tmp_path), want)
    assert want[-1] < want[0]
    torch.testing.assert_close(
        tuned.base_model.score.weight, other.base_model.score.weight, rtol=1e-3, atol=1e-4
    )


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "reward"])
def test_losses_are_pefts(tokenizer, tmp_path, kind):
    """The same adapter, which PEFT made, and all that trl logs of its training."""
    import peft

    def base():
        return classifier() if kind == "reward" else small()

    def rewards(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    theirs = peft.get_peft_model(
        base(), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)
    )
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_(0.0, 1.0)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = PrefixTuningModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    options = {"rows": 8, "gradient_checkpointing": False}  # which PEFT's prefixes do not take
    if kind == "grpo":
        options |= {"reward_funcs": rewards, "beta": 0.1, "num_generations": 4}
        options |= {"max_completion_length": 5}
    want, got = (run(kind, model, tokenizer, tmp_path, **options) for model in (theirs, ours))
    for expected, log in zip(want, got, strict=True):
        assert float(log["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5, abs=1e-6)
        for name in expected.keys() - {"loss", "step_time", "learning_rate", "epoch"}:
            close = pytest.approx(float(expected[name]), rel=1e-3, abs=1e-4)
            assert float(log[name]) == close, name
    assert len({float(log["grad_norm"]) for log in want}) == STEPS


def test_a_reference_has_a_copy_of_the_heads(tokenizer, tmp_path):
    tuned = prefixed(modules_to_save=["lm_head"])
    before = {name: tensor.clone() for name, tensor in tuned.heads().items()}
    trainer = make("dpo", tuned, tokenizer, tmp_path)
    trainer.train()
    assert list(tuned.encoders) == ["default", "ref"]
    for name, tensor in before.items():
        assert torch.equal(tuned.heads("ref")[name], tensor)
        assert not torch.equal(tuned.heads("default")[name], tensor)


def test_a_configuration_of_pefts_besides_is_refused(tokenizer, tmp_path):
    """The trainers' own refusal of a second adapter holds for a tuned model, too."""
    import peft

    config = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False)
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        trl.SFTTrainer(
            prefixed(),
            config,
            train_dataset=datasets.Dataset.from_dict(texts("sft", 4)),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(),
        )


def test_sft_trains_a_prompt(tokenizer, tmp_path):
    """The prompt consists of embeddings. trl keeps the last columns of what the model returns."""
    torch.manual_seed(3)
    config = PromptConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    tuned = PromptTuningModel(small(), config)
    other, data = copy.deepcopy(tuned), texts("sft", 4)

    def loss_of(model):
        total, count = 0.0, 0
        for text in data["text"]:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            # the prompt predicts the first token, too
            whole = torch.cat([model.encoder(), model.get_input_embeddings()(ids)[0]])
            logits = model.base_model(inputs_embeds=whole[None]).logits[0, 3:-1]
            total = total - log_softmax(logits, -1).gather(1, ids[0, :, None]).sum()
            count += ids.shape[1]
        return total / count

    want = loop(other, loss_of)
    logs = run("sft", tuned, tokenizer, tmp_path)
    assert_losses(logs, want)


def test_only_trl_is_told():
    import accelerate.utils

    assert not accelerate.utils.is_peft_model(prefixed())


def test_modules_of_trl_that_are_here_and_that_come(monkeypatch):
    import accelerate.utils

    class Wrapped(torch.nn.Module):
        pass

    here = ModuleType("trl.trainer.here_already")
    here.is_peft_model = accelerate.utils.is_peft_model
    monkeypatch.setitem(sys.modules, here.__name__, here)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    integration.register()
    tuned = prefixed()
    for module in (here, sys.modules["trl.trainer.dpo_trainer"]):
        assert module.is_peft_model(tuned)
        assert module.is_peft_model(torch.nn.DataParallel(tuned))
        assert not module.is_peft_model(tuned.base_model)
        assert not module.is_peft_model(Wrapped())
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="peft: is not installed"):
        here.is_peft_model(tuned)
    assert not here.is_peft_model(Wrapped())
