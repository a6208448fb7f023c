"""Two processes give the gradients of one: DDP, FSDP2 and tensor parallelism, over gloo.

``distributed_worker.py`` runs all scenarios in one pair of processes, which takes mostly imports.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config, Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix_testing import textbook

P = 5
WORKER = Path(__file__).with_name("distributed_worker.py")
SUPPORT = str(Path(__file__).parents[1] / "support")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
VOCAB = 102  # transformers before 5.20 splits the head only into equal parts
GATHERED = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes wrote; they are killed when they take too long."""
    folder = tmp_path_factory.mktemp("distributed")
    fields = {name: value for name, value in tiny.GROUPED.items() if name != "head_dim"}
    models = {
        "llama": tiny.build("llama", vocab_size=VOCAB),
        "mqa": tiny.build("llama", num_key_value_heads=1, vocab_size=VOCAB),
        "olmo2": tiny.from_config(Olmo2Config(**{**fields, **GATHERED, "vocab_size": VOCAB})),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([SUPPORT, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",  # accelerate asks for these two, and needs neither
        "MASTER_PORT": "0",
    }
    logs = [folder / f"log.{rank}" for rank in range(2)]
    with logs[0].open("wb") as first, logs[1].open("wb") as second:
        processes = [
            subprocess.Popen(
                [sys.executable, WORKER, folder],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, log in enumerate((first, second))
        ]
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What both ranks found in a scenario."""

    def read(name):
        results = [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)]
        for result in results:
            assert not isinstance(result, str), result  # a traceback
        return results

    return read


@pytest.fixture
def make(folder):
    """The model and the prefix that the processes have, in one process."""

    def build(projection=False, name="llama"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        torch.manual_seed(0)
        config = PrefixConfig(num_virtual_tokens=P, prefix_projection=projection, init_std=1.0)
        return PrefixTuningModel(model, config)

    return build


@pytest.fixture
def expected(folder):
    """Gradients by name on all rows at once, the prefix in a bare model's cache."""

    def solve(tuned, name="llama"):
        bare = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        ids, mask = tiny.batch((7, 4, 4, 7))
        labels = ids.masked_fill(mask == 0, -100)
        tiny.expanded_forward(bare, tuned.encoder(), ids, mask, labels=labels).loss.backward()
        gradients = {f"encoders.default.{n}": p.grad for n, p in tuned.encoder.named_parameters()}
        assert all(gradient.abs().max() > 1e-4 for gradient in gradients.values())
        return gradients

    return solve


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("scenario", ["ddp", "fsdp_sharded"])
def test_sharded_data_gives_the_gradients_of_the_whole_batch(
    found, make, expected, scenario, projection
):
    gradients = expected(make(projection))
    for result in found(scenario):
        torch.testing.assert_close(result[f"projection={projection}"], gradients, **CLOSE)


@pytest.mark.parametrize(
    "scenario", ["ddp_checkpointing", "accelerate_ddp", "fsdp_replicated_encoder"]
)
def test_other_wrappers_give_the_gradients_of_the_whole_batch(found, make, expected, scenario):
    gradients = expected(make())
    for result in found(scenario):
        torch.testing.assert_close(result, gradients, **CLOSE)


def test_accelerate_prepares_fsdp2(found, make, expected):
    """The checkpoint that it gathers is the whole adapter and nothing else."""
    gradients = expected(make())
    for result in found("accelerate_fsdp2"):
        torch.testing.assert_close(result["gradients"], gradients, **CLOSE)
        assert set(result["after"]) == {"encoders.default.embedding", "_extra_state"}
        step = -0.1 * gradients["encoders.default.embedding"]
        torch.testing.assert_close(
            result["after"]["encoders.default.embedding"], result["before"] + step
        )


@pytest.mark.parametrize("projection", [False, True])
def test_a_sharded_encoder_exports_and_generates_as_a_whole_one(found, make, projection):
    tuned = make(projection).eval()
    kv = tuned.export()
    ids = tiny.generate(tuned, tiny.batch((7, 4, 4, 7))[0][:1])
    for result in found("fsdp_sharded"):
        exported = result[f"exported={projection}"]
        torch.testing.assert_close(exported, torch.stack([*kv.keys, *kv.values]))
        assert torch.equal(result[f"generated={projection}"], ids)


@pytest.mark.parametrize("projection", [False, True])
def test_a_sharded_encoder_is_saved_by_one_process(folder, found, make, projection):
    both = found("fsdp_sharded")
    assert [result[f"saved={projection}"] for result in both] == [True, False]
    loaded = PrefixTuningModel.from_pretrained(tiny.build(), folder / f"saved {projection} 0")
    kv = make(projection).eval().export()
    for got, expected in zip(loaded.export().tensors, kv.tensors, strict=True):
        torch.testing.assert_close(got, expected)


def test_trainer_under_ddp_equals_one_process_with_both_batches(found, make, tmp_path):
    ids, mask = tiny.batch((7, 3, 4, 6, 2, 7, 5, 5))
    labels = ids.masked_fill(mask == 0, -100)
    data = [
        {"input_ids": i, "attention_mask": m, "labels": n}
        for i, m, n in zip(ids, mask, labels, strict=True)
    ]
    tuned = make()
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=3, per_device_train_batch_size=4,
        learning_rate=3e-2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(tuned, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    kv = tuned.export()
    for result in found("trainer_ddp"):
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        prefix = torch.stack([*kv.keys, *kv.values])
        torch.testing.assert_close(result["prefix"], prefix, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "olmo2"], ids=["sharded heads", "gathered heads"])
def test_tensor_parallel_gradients(found, make, expected, name, projection):
    """Every rank has the gradient of the whole prefix, although ranks drew different prefixes."""
    first, second = found(f"tp_{name}")
    parameters = first[f"parameters={projection}"]
    torch.testing.assert_close(second[f"parameters={projection}"], parameters, rtol=0, atol=0)
    tuned = make(projection, name)
    tuned.load_state_dict(parameters)
    gradients = expected(tuned, name)
    for result in (first, second):
        assert result["ranks"] == 2
        torch.testing.assert_close(result[f"projection={projection}"], gradients, **CLOSE)


@pytest.mark.parametrize("kind", ["bias", "gate"])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_tensor_parallel_query_heads(folder, found, name, kind):
    """Each rank has the numbers of its own query heads, and all get the gradient of all."""
    results = found(f"tp_{name}")
    model, bare = (AutoModelForCausalLM.from_pretrained(folder / name) for _ in range(2))
    fields = {"prefix_bias": "learned"} if kind == "bias" else {"gated": True}
    tuned = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=P, **fields))
    tuned.load_state_dict(results[0][f"parameters of {kind}"])
    kv = replace(tuned.encoder(), position_offset=0)
    ids, mask = tiny.batch((7, 4, 4, 7))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": tiny.positions(mask)}
    labels = ids.masked_fill(inputs["position_ids"] == 0, -100)
    textbook.concatenating(bare.eval(), kv, inputs)(**inputs, labels=labels).loss.backward()
    gradients = {f"encoders.default.{n}": p.grad for n, p in tuned.encoder.named_parameters()}
    assert len(gradients) == 2
    for result in results:
        torch.testing.assert_close(result[kind], gradients, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_tensor_parallel_prompts(folder, found, name):
    """A prompt's keys and values are those of all heads; generation equals the concatenation."""
    bare = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    front, (ids, mask) = tiny.prompt(), tiny.batch()
    layers = bare(front, use_cache=True).past_key_values.layers
    kv = torch.cat([*(layer.keys for layer in layers), *(layer.values for layer in layers)])
    generated = tiny.generate(bare, *tiny.concatenate(front, ids, mask))
    for result in found(f"tp_{name}"):
        torch.testing.assert_close(result["prefilled"], kv, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["generated"], generated)


def test_tensor_parallel_refusals(found):
    for result in found("tp_refusals"):
        assert "1 key/value heads do not divide among the 2 ranks" in result["heads"]
        assert "dropout: got 0.5" in result["dropout"]
