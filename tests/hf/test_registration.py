"""``attn_implementation="fastprefix"`` after ``import fastprefix`` alone; and output_attentions."""

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

import fastprefix.hf.layer.attention
import fastprefix.hf.versions
import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    UnsupportedModelError,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.after_import import after_import
from fastprefix.hf import is_patched, patch_of
from fastprefix_testing import zoo

EXACT = {"rtol": 1e-4, "atol": 1e-4}
PADDED = ["llama", "gemma2", "gpt2", "bert", "modernbert", "t5", "bart", "bigbird_pegasus"]


def python(code, *arguments):
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FASTPREFIX_FIRST = """
    import sys
    import fastprefix
    finders = list(sys.meta_path)
    assert "transformers" not in sys.modules
    import pickle, torch
    model, ids, want = pickle.load(open(sys.argv[1], "rb"))  # as a process that was spawned does
    assert "transformers.modeling_utils" in sys.modules
    assert "fastprefix.hf" not in sys.modules
    torch.testing.assert_close(model(ids).logits, want)
    assert "fastprefix.hf" in sys.modules
    mine = [f for f in sys.meta_path if type(f).__module__.startswith("fastprefix")]
    assert not [f for f in mine if f.name.startswith("transformers")], mine
    loader = sys.modules["transformers.modeling_utils"].__spec__.loader
    assert type(loader).__name__ == "SourceFileLoader", loader
    """
TRANSFORMERS_FIRST = """
    import sys, threading
    import transformers
    assert "transformers.modeling_utils" not in sys.modules
    failed = []
    def load(name):
        try:
            __import__(name)
        except BaseException as problem:
            failed.append(problem)
    names = ["transformers.modeling_utils", "fastprefix", "transformers.masking_utils"]
    names.append("fastprefix.hf")
    threads = [threading.Thread(target=load, args=(name,)) for name in names]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed, failed
    from transformers import AutoModelForCausalLM, GPT2Config
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastprefix")
    import torch
    model(torch.ones(1, 3, dtype=torch.long))
    """
WITHOUT_TRANSFORMERS = """
    import sys
    sys.modules["transformers"] = None
    import fastprefix, torch
    x = torch.randn(1, 2, 3, 8)
    fastprefix.prefix_attention(x, x, x)
    for name in ("transformers", "transformers.modeling_utils"):
        try:
            __import__(name)
        except ModuleNotFoundError as problem:
            assert "transformers" in str(problem)
        else:
            raise AssertionError(name)
    """


@pytest.mark.usefixtures("picklable")
def test_fastprefix_may_be_imported_first(tmp_path):
    model = tiny.build("llama", attn_implementation="fastprefix")
    ids = tiny.prompt()
    with open(tmp_path / "model.pickle", "wb") as file:
        pickle.dump((model, ids, model(ids).logits.detach()), file)
    python(FASTPREFIX_FIRST, tmp_path / "model.pickle")


def test_transformers_may_be_imported_first_or_meanwhile():
    python(TRANSFORMERS_FIRST)


def test_transformers_may_be_missing():
    python(WITHOUT_TRANSFORMERS)


def test_a_module_that_cannot_be_imported_is_waited_for(tmp_path, monkeypatch):
    """One that raises may be mended; its loader stays its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    file = tmp_path / "mended_later.py"
    file.write_text("1 / 0")
    seen = []
    after_import("mended_later", seen.append)
    with pytest.raises(ZeroDivisionError):
        import mended_later
    assert not seen
    file.write_text("answer = 42  # longer, so that no compiled file is taken for it")
    import mended_later

    assert seen == [mended_later]
    assert type(mended_later.__loader__) is type(mended_later.__spec__.loader)
    assert type(mended_later.__loader__).__module__ != "fastprefix.after_import"
    assert not any(getattr(finder, "name", "") == "mended_later" for finder in sys.meta_path)
    after_import("mended_later", seen.append)  # it is here already
    assert seen == [mended_later] * 2


def logits(model, inputs, real):
    with torch.no_grad():
        return model(**inputs).logits[real]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_a_model_of_that_name_alone_computes_what_it_did(name, side):
    """Whatever its modules say of themselves: those of one here say that they are not causal."""
    # eager gives NaN for rows of pads in float64, where sdpa has no caps
    model = zoo.kind(name, torch.float32 if name == "gemma2" else torch.float64)
    inputs, real = zoo.kind_inputs(model, side)
    unpadded = {
        key: x[:, :3] for key, x in inputs.items() if key in ("input_ids", "decoder_input_ids")
    }
    everything = slice(None)
    want = logits(model, inputs, real), logits(model, unpadded, everything)
    fastprefix.hf.versions.set_attention(model, "fastprefix")
    got = logits(model, inputs, real), logits(model, unpadded, everything)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
def test_generate_by_that_name_alone(architecture, autocast):
    bare = tiny.build(architecture)
    model = tiny.build(architecture, attn_implementation="fastprefix")
    ids, mask = tiny.batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        want, got = (x(ids, attention_mask=mask).logits[mask.bool()] for x in (bare, model))
    torch.testing.assert_close(got, want, **({"rtol": 0.1, "atol": 0.1} if autocast else EXACT))
    if not autocast:
        assert torch.equal(tiny.generate(model, ids, mask), tiny.generate(bare, ids, mask))


def test_from_pretrained_takes_the_name(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastprefix")
    assert model.config._attn_implementation == "fastprefix"
    ids = tiny.prompt()
    want = tiny.build("llama")(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, want, **EXACT)


def test_prefixes_on_a_model_of_that_name(architecture):
    model = tiny.build(architecture, attn_implementation="fastprefix")
    bare = tiny.build(architecture)
    ids, mask = tiny.batch()
    front = tiny.prompt(5)
    kv = PrefixKV.prefill(model, front)
    assert not is_patched(model)
    with use_prefix(model, kv), torch.no_grad():
        told = model(ids, attention_mask=mask).logits[mask.bool()]
    want = tiny.concatenated_logits(bare, front, ids, mask)[mask.bool()]
    torch.testing.assert_close(told, want, **EXACT)
    assert not is_patched(model)
    assert model.config._attn_implementation == "fastprefix"

    patch_model(model)
    tuned = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=3))
    tuned(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tuned.encoder.parameters())
    unpatch_model(model)
    assert model.config._attn_implementation == "fastprefix"
    with torch.no_grad():
        plain = bare(ids, attention_mask=mask).logits[mask.bool()]
        again = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(again, plain, **EXACT)


def test_patching_such_a_model_is_not_held_to_itself(monkeypatch):
    right = fastprefix.hf.layer.attention.attend
    monkeypatch.setattr(fastprefix.hf.layer.attention, "attend", lambda call: 1.1 * right(call))
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        patch_model(tiny.build("llama", attn_implementation="fastprefix"))


@pytest.mark.usefixtures("picklable")
def test_patched_models_keep_compact_masks():
    """A copy and a model from a file are patched too."""
    import copy

    from fastprefix.hf.layer.masks import prefix_attention_mask

    def mask_of(model):
        padding = torch.ones(2, 4, dtype=torch.bool)
        given = {"batch_size": 2, "q_length": 4, "kv_length": 4, "attention_mask": padding}
        return prefix_attention_mask(**given, config=model.config)

    model = tiny.build("llama", attn_implementation="fastprefix")
    assert mask_of(model).shape == (2, 1, 4, 4)
    patch_model(model)
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mask_of(patched) is None
    unpatch_model(model)
    assert mask_of(model).shape == (2, 1, 4, 4)


def test_compiled_by_that_name_alone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastprefix").eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)


ATTENTIONS = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions")


def answer(model, inputs):
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
        plain = model(**inputs)
    assert torch.equal(out.logits, plain.logits)
    return {name: out[name] for name in ATTENTIONS if name in out}, len(out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart"])
def test_output_attentions_is_answered_as_sdpa_does(name, caplog):
    logging.warning_once.cache_clear()
    model = zoo.kind(name)
    inputs, _ = zoo.kind_inputs(model, "right")
    model.set_attn_implementation("sdpa")
    want = answer(model, inputs)
    assert want[0]
    assert not any(torch.is_tensor(x) for attentions in want[0].values() for x in attentions)
    patch_model(model)
    assert answer(model, inputs) == want
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    with use_prefix(model, kv):
        assert answer(model, inputs) == want
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own, as with sdpa
        model.config.output_attentions = True
    told = [record.message for record in caplog.records if record.name.startswith("fastprefix")]
    assert len(told) == 1
    assert "returns none of them, as with sdpa" in told[0]
    unpatch_model(model)
    fastprefix.hf.versions.set_attention(model, "fastprefix")
    assert answer(model, inputs) == want


def test_weights_asked_for_in_the_config_are_not_left_out_quietly(caplog):
    logging.warning_once.cache_clear()
    model = tiny.build("llama", attn_implementation="eager")
    model.config.output_attentions = True
    assert patch_model(model)(tiny.prompt()).attentions == ()
    assert "returns none of them, as with sdpa" in caplog.text


def test_generate_with_output_attentions(model):
    patch_model(model)
    ids, mask = tiny.batch()
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        want = model.generate(ids, **more)
        got = model.generate(ids, return_dict_in_generate=True, output_attentions=True, **more)
    assert torch.equal(got.sequences, want)
    assert all(step == () for step in got.attentions)
