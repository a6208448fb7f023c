"""One of the two processes of ``test_distributed.py``: runs every scenario, writes what it found.

    RANK=0 ... PYTHONPATH=tests/support python distributed_worker.py FOLDER [SCENARIO...]

FOLDER holds a checkpoint of each tiny model; the processes meet through a file in it, so that no
port can be taken. A scenario's dict of tensors, or its traceback, goes to FOLDER/SCENARIO.RANK.pt.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel, patch_model, use_prefix

RANK, FOLDER = int(os.environ["RANK"]), Path(sys.argv[1])
logging.disable_progress_bar()

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def load(name="llama", **options):
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, **options)


def make(model, projection=False, seed=0, **fields):
    """The prefix that the test makes too."""
    torch.manual_seed(seed)
    config = PrefixConfig(
        num_virtual_tokens=5, prefix_projection=projection, init_std=1.0, **fields
    )
    return PrefixTuningModel(model, config)


def rows(whole=False):
    """All rows, or this rank's; as many tokens on either rank, so that means of means are means."""
    ids, mask = tiny.batch((7, 4, 4, 7))
    labels = ids.masked_fill(mask == 0, -100)
    part = slice(None) if whole else slice(2 * RANK, 2 * RANK + 2)
    return {"input_ids": ids[part], "attention_mask": mask[part], "labels": labels[part]}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(module):
    """The gradients by name, without the prefixes that wrappers add to names."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name.removeprefix("module.")] = full(parameter.grad).clone()
        else:
            assert parameter.grad is None, name
    return found


@scenario
def ddp():
    found = {}
    for projection in (False, True):
        wrapped = DistributedDataParallel(make(load(), projection))
        for _ in range(2):  # a parameter without gradient would stop the second forward
            wrapped.zero_grad()
            wrapped(**rows()).loss.backward()
        found[f"projection={projection}"] = gradients(wrapped)
    return found


@scenario
def ddp_checkpointing():
    tuned = make(load()).train()
    tuned.gradient_checkpointing_enable()
    wrapped = DistributedDataParallel(tuned)
    wrapped(**rows()).loss.backward()
    return gradients(wrapped)


@scenario
def accelerate_ddp():
    accelerator = Accelerator(cpu=True)
    tuned = make(load())
    optimizer = torch.optim.SGD(tuned.encoder.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(tuned, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    accelerator.backward(wrapped(**rows()).loss)
    return gradients(wrapped)


@scenario
def fsdp_sharded():
    """Base and encoder sharded, each under a root of all."""
    found = {}
    for projection in (False, True):
        tuned = make(load(), projection)
        for layer in tuned.base_model.model.layers:
            fully_shard(layer)
        fully_shard(tuned)
        register_fsdp_forward_method(tuned, "generate")
        assert all(isinstance(p, DTensor) for p in tuned.parameters())
        for _ in range(2):
            tuned.zero_grad()
            tuned(**rows()).loss.backward()
        found[f"projection={projection}"] = gradients(tuned)
        ids = rows(whole=True)["input_ids"][:1]
        found[f"generated={projection}"] = tiny.generate(tuned.eval(), ids)
        exported = tuned.export()
        found[f"exported={projection}"] = torch.stack([*exported.keys, *exported.values])
        saved = FOLDER / f"saved {projection} {RANK}"
        tuned.save_pretrained(saved, is_main_process=RANK == 0)  # would hang if one left it out
        found[f"saved={projection}"] = saved.exists()
    return found


@scenario
def fsdp_replicated_encoder():
    """Only the base is sharded. The encoder's gradients must then be averaged by hand."""
    tuned = make(load())
    for layer in tuned.base_model.model.layers:
        fully_shard(layer)
    fully_shard(tuned.base_model)
    tuned(**rows()).loss.backward()
    found = gradients(tuned)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return found


@scenario
def accelerate_fsdp2():
    """As accelerate prepares a model for GPUs. On CPUs it would use DDP without saying so."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    tuned = make(load())
    optimizer = torch.optim.SGD(tuned.encoder.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(tuned, optimizer)
    assert all(isinstance(p, DTensor) for p in wrapped.parameters())
    accelerator.backward(wrapped(**rows()).loss)
    found = {"gradients": gradients(wrapped)}
    found["before"] = full(tuned.encoder.embedding).detach().clone()
    optimizer.step()
    found["after"] = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    return found


def tensor_parallel(name):
    model = load(name, distributed_config=DistributedConfig(tp_plan="auto"))
    found = {}
    for projection in (False, True):
        tuned = make(model, projection, seed=RANK)  # ranks must agree all the same
        found["ranks"] = tuned.tp_size
        tuned(**rows(whole=True)).loss.backward()
        found[f"projection={projection}"] = gradients(tuned)
        found[f"parameters={projection}"] = tuned.state_dict()
    for kind, fields in {"bias": {"prefix_bias": "learned"}, "gate": {"gated": True}}.items():
        tuned = make(model, seed=RANK, position_offset=0, **fields)
        with torch.no_grad():
            numbers = tuned.encoder.reweighting.numbers
            numbers.copy_(torch.linspace(-1, 2, len(numbers)))
        batch = rows(whole=True)
        # the first token is predicted by a pad, which sees no text at all
        first = tiny.positions(batch["attention_mask"]) == 0
        tuned(**{**batch, "labels": batch["labels"].masked_fill(first, -100)}).loss.backward()
        found[kind], found[f"parameters of {kind}"] = gradients(tuned), tuned.state_dict()
    ids, mask = tiny.batch()
    kv = PrefixKV.prefill(model, tiny.prompt())
    found["prefilled"] = torch.stack([*kv.keys, *kv.values])
    with use_prefix(model, kv):
        found["generated"] = tiny.generate(model, ids, mask)
    return found


@scenario
def tp_llama():
    """The plan gives each rank its own heads."""
    return tensor_parallel("llama")


@scenario
def tp_olmo2():
    """The plan gathers all heads on each rank, for the norm over them."""
    return tensor_parallel("olmo2")


@scenario
def tp_refusals():
    plan = DistributedConfig(tp_plan="auto")
    return {
        "heads": refused(lambda: patch_model(load("mqa", distributed_config=plan))),
        "dropout": refused(lambda: make(load(distributed_config=plan), dropout=0.5)),
    }


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def texts():
    """Rows of two lengths: a rank's mean over its tokens is not its share of the mean."""
    ids, mask = tiny.batch((7, 3, 4, 6, 2, 7, 5, 5))
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": i, "attention_mask": m, "labels": n}
        for i, m, n in zip(ids, mask, labels, strict=True)
    ]


def train(model, folder, rows_a_rank, **options):
    """Four steps of the Trainer: losses, and the prefix it ends with."""
    tuned = make(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=rows_a_rank,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=2,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(tuned, arguments, train_dataset=texts())
    trainer.train()
    exported = tuned.export()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "prefix": torch.stack([*exported.keys, *exported.values]),
    }


@scenario
def trainer_ddp():
    return train(load(), FOLDER / "ddp", 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{FOLDER}/meeting",
        rank=RANK,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    for name, function in SCENARIOS.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            result = function()
        except Exception:
            result = traceback.format_exc()
        torch.save(result, FOLDER / f"{name}.{RANK}.pt")
        dist.barrier()
    dist.destroy_process_group()
