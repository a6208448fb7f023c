"""Settings that every test needs before torch or Triton do any work."""

import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Triton reads this when a kernel is defined, so it must be set before anything imports Triton.
# `TRITON_INTERPRET=0 pytest` runs without the interpreter (and so without Triton on the CPU), and
# so does `pytest -m gpu`: those tests need compiled kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import Phase, settings

# Its asserts explain themselves, as those of tests do. It imports transformers, and perhaps Triton,
# so only the fixtures below import it: `pytest_configure` must run first.
pytest.register_assert_rewrite("fastprefix_testing")

# The order of a parallel sum must not depend on the machine; and the shapes here are so small that
# a second thread costs more than it brings.
torch.set_num_threads(1)

# The same examples in every run: a red test stays red until the code changes.
# Without the phase that explains failures, which runs slow examples many times over.
settings.register_profile(
    "fastprefix",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.load_profile("fastprefix")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing has imported Triton yet; workers of xdist inherit the environment."""
    if config.option.markexpr == "gpu" and "FASTPREFIX_GPU_SUITE_ON" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `peft` compare with what PEFT computes, which must be right to compare with."""
    if not any(item.get_closest_marker("peft") for item in items):
        return
    from fastprefix.hf.versions import peft_mismatch  # not before the line on Triton above

    reason = peft_mismatch()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("peft") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def picklable() -> None:
    """Skips where a model that nobody patched cannot be pickled (transformers 5.20)."""
    import fastprefix_testing.models as tiny

    try:
        pickle.dumps(tiny.build("llama"))
    except AttributeError as error:
        pytest.skip(f"transformers' own models cannot be pickled: {error}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved two-layer Llama with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastprefix_testing.models as tiny

    tokenizer = tiny.smollm2_tokenizer()
    assert tokenizer is not None
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.15,
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An environment in which nothing was done but `pip install '.[tasks]'`; slow tests use it."""
    from fastprefix_testing.fresh import fresh_environment

    return fresh_environment(tmp_path_factory.mktemp("checkout") / "source")


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """As tmp_path, but in memory where that is possible: some tests sync thousands of files."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of three architectures by name."""
    return request.param


@pytest.fixture
def model(architecture: str) -> Any:
    """A model that the test may patch."""
    import fastprefix_testing.models as tiny

    return tiny.build(architecture)


@pytest.fixture
def bare(architecture: str) -> Any:
    """The same weights, which nothing of fastprefix ever touches."""
    import fastprefix_testing.models as tiny

    return tiny.build(architecture)


@pytest.fixture
def rounded_once() -> Iterator[None]:
    """For tests of bits in Triton's interpreter: see :mod:`fastprefix_testing.products`."""
    from fastprefix_testing import products

    with products.rounded_once():
        yield
