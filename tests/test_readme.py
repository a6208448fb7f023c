"""README: its table of methods, its snippets, and what `pip install .` gives.

Every row of the table goes through README's five lines, and costs what it says. What is marked
`slow` runs in an environment made by `pip install .` alone (`make fresh`).
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

import fastprefix
import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLE = README.read_text(encoding="utf-8").split("<!-- methods: begin -->")[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.split("<!-- methods: end -->")[0].strip().splitlines()[2:]
]
CLASSES = 3


def number(formula, **names):
    """The value of a row's formula, which has only sums and products."""
    text = formula.replace("·", "*")
    assert re.fullmatch(r"[\w\s*+()-]+", text), formula
    tree = ast.parse(text, mode="eval")
    return eval(compile(tree, "README.md", "eval"), {"__builtins__": {}}, names)


def base(config):
    if config.task_type != "SEQ_CLS":
        return tiny.build("llama")
    model = tiny.build("llama")
    settings = LlamaConfig(**{**model.config.to_dict(), "num_labels": CLASSES, "pad_token_id": 0})
    torch.manual_seed(3)
    return LlamaForSequenceClassification(settings).eval()


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_five_lines(row, tmp_path):
    _, configuration, trained, stored, source = row
    config = eval(configuration.strip("`"), {c.__name__: c for c in (PrefixConfig, PromptConfig)})
    classify = config.task_type == "SEQ_CLS"
    kind = PromptTuningModel if isinstance(config, PromptConfig) else PrefixTuningModel
    model = base(config)
    shape = model.config
    names = {
        "P": config.num_virtual_tokens,
        "L": shape.num_hidden_layers,
        "w": 2 * shape.num_key_value_heads * shape.head_dim,
        "Hq": shape.num_attention_heads,
        "d": shape.hidden_size,
        "h": shape.hidden_size,
        "c": CLASSES,
    }
    ids, mask = tiny.batch((6, 6, 6), "left")
    labels = torch.tensor([0, 1, 2]) if classify else ids
    items = [
        {"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(3)
    ]
    if configuration.count("infix"):
        items = [item | {"infix_positions": torch.tensor(4)} for item in items]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=0.1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    tuned = kind(model, config, None)
    before = [p.detach().clone() for p in tuned.parameters() if p.requires_grad]
    Trainer(tuned, arguments, train_dataset=items).train()
    tuned.save_pretrained(tmp_path / "adapter")
    after = [p for p in tuned.parameters() if p.requires_grad]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert sum(p.numel() for p in after) == number(trained, **names)
    files = (tmp_path / "adapter").glob("*.safetensors")
    found = sum(t.numel() for file in files for t in load_file(file).values())
    assert found == number(stored, **names)
    assert source

    again = kind.from_pretrained(base(config), tmp_path / "adapter")
    tuned.eval()
    batch = {"input_ids": ids, "attention_mask": mask}
    if classify:
        torch.testing.assert_close(again(**batch).logits, tuned(**batch).logits)
    else:
        assert torch.equal(tiny.generate(again, ids, mask), tiny.generate(tuned, ids, mask))


# What `pip install .` gives.


def run(command, cwd, **env):
    """What a command prints, standard error behind it; it must succeed."""
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": "", **env}
    ours.pop("TRITON_INTERPRET", None)  # of these tests, and no user's
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ours,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def checkout(folder):
    """A copy of what git would have, and no more, in a folder that is not there yet."""
    left_out = (".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*left_out))


def built(source, output, kind="wheel"):
    """The file that setuptools makes of a folder, with what is installed here."""
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(output)!r})"
    run([sys.executable, "-c", code], source)
    (made,) = output.iterdir()
    return made


def files_of(wheel, folder):
    shutil.unpack_archive(wheel, folder, "zip")
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_dir_shows_what_is_public(tmp_path):
    code = (
        "import sys, fastprefix; print(*dir(fastprefix)); assert 'transformers' not in sys.modules"
    )
    shown = run([sys.executable, "-c", code], tmp_path).split()
    assert set(fastprefix.__all__) <= set(shown)


def test_pythons_started_in_the_root_find_the_kernels():
    """Without the finder of an editable install, as after `pip install .`."""
    code = (
        "import sys; sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in repr(x)]; "
        "import fastprefix.kernels as found; print(found.__file__)"
    )
    printed = run([sys.executable, "-c", code], ROOT).split("\n")[0]
    assert Path(printed).resolve() == (ROOT / "kernels" / "triton" / "__init__.py").resolve()


def test_wheels_of_a_checkout_of_its_sdist_and_without_symlinks_have_the_same_files(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # what pyproject.toml asks for
    source = checkout(tmp_path / "source")
    link = source / "fastprefix" / "kernels"
    assert link.is_symlink()
    shutil.unpack_archive(built(source, tmp_path / "sdist", "sdist"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    plain = checkout(tmp_path / "plain")
    (plain / "fastprefix" / "kernels").unlink()
    (plain / "fastprefix" / "kernels").write_text(
        "../kernels/triton"
    )  # as git does where none can be
    wheels = {"checkout": source, "sdist": unpacked, "no symlinks": plain}
    found = {}
    for name, folder in wheels.items():
        wheel = built(folder, tmp_path / f"{name} wheel")
        found[name] = files_of(wheel, tmp_path / f"{name} files")
    assert found["checkout"] == found["sdist"] == found["no symlinks"]
    package = ROOT / "kernels" / "triton"
    kernels = {
        f"fastprefix/kernels/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*.py")
    }
    assert kernels <= found["checkout"]
    library = {
        f"fastprefix/{file.relative_to(ROOT / 'fastprefix')}"
        for file in (ROOT / "fastprefix").rglob("*.py")
    }
    assert library <= found["checkout"]  # every package is named in pyproject.toml
    assert {Path(name).parts[0] for name in found["checkout"]} == {
        "fastprefix",
        f"fastprefix-{fastprefix.__version__}.dist-info",
    }
    assert not any(name.startswith("kernels") for name in found["checkout"])


class Fresh(NamedTuple):
    """An environment in which nothing was done but `pip install .`, of the copy in `source`."""

    python: Path
    source: Path


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Its dependencies stay in .cache for the next time, unless what asks for them changes."""
    source = checkout(tmp_path_factory.mktemp("checkout") / "source")
    folder = ROOT / ".cache" / "fresh"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    files = [ROOT / "constraints.txt", ROOT / "pyproject.toml"]
    made_from = "\n".join([sys.version, *(file.read_text(encoding="utf-8") for file in files)])
    stamp = folder / "made-from.txt"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    if stamp.exists() and stamp.read_text(encoding="utf-8") == made_from:
        # the same dependencies; only fastprefix is new, built by the setuptools that torch brought
        run([*pip, "--no-deps", "--no-build-isolation", "--force-reinstall", ".[tasks]"], source)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        run([*pip, "-c", "constraints.txt", ".[tasks]"], source)
        stamp.write_text(made_from, encoding="utf-8")
    return Fresh(python, source)


@pytest.mark.slow
def test_the_installed_kernels_are_found_in_the_root_and_elsewhere(fresh, tmp_path):
    code = (
        "import importlib.util as u, os, fastprefix.kernels as k; "
        "print(k.launch_forward.__module__, os.path.realpath(k.__file__))"
    )
    for cwd, inside in ((fresh.source, True), (tmp_path, False)):
        name, file = run([fresh.python, "-c", code], cwd).split("\n")[0].split()
        assert name == "fastprefix.kernels.forward"
        assert Path(file).is_relative_to(fresh.source.resolve()) == inside
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    assert run([fresh.python, "-c", code], tmp_path).split() == ["None"]


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder as HF_HOME in which the model that README names lies as though downloaded.

    The snippets load it by its name. It is a random one of two layers, in SmolLM2's dtype and with
    a small vocabulary of its own: what the snippets say does not depend on the weights.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from fastprefix.tasks import load_examples

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    examples = load_examples("descriptions")
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{example.source}\n{example.targets[0]}" for example in examples]
    made.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("hub")
    stored = home / "hub" / f"models--{NAME.replace('/', '--')}"
    commit = "0" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(stored / "snapshots" / commit)
    tokenizer.save_pretrained(stored / "snapshots" / commit)
    return home


def blocks(language):
    """README's blocks of a language, each with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


# Pasted into one session, one after the other; a traceback has README's line.
SESSION = """
import re, sys
for line, code in {blocks!r}:
    exec(compile("\\n" * (line - 1) + code, "README.md", "exec"))
    print("README.md, line", line, "runs")
"""


@pytest.mark.slow
def test_python_snippets_run_as_they_are(fresh, hub, tmp_path):
    snippets = blocks("python")
    assert len(snippets) >= 6
    script = tmp_path / "session.py"
    script.write_text(SESSION.format(blocks=snippets), encoding="utf-8")
    printed = run([fresh.python, script], tmp_path, HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    for line, _ in snippets:
        assert f"README.md, line {line} runs" in printed
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "prompt.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_run_as_they_are(fresh, hub, tmp_path):
    """Those of fastprefix, in one shell; what installs something or is of make is left out."""
    (commands,) = [text for _, text in blocks("bash") if re.search("^fastprefix ", text, re.M)]
    assert len(re.findall("^fastprefix ", commands, re.M)) >= 6
    path = os.pathsep.join([str(fresh.python.parent), os.environ["PATH"]])
    printed = run(
        ["bash", "-euc", commands], tmp_path, PATH=path, HF_HOME=str(hub),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert (tmp_path / "adapter.safetensors").is_file()
    for told in ("composed", "trained", "What is fog?", "perplexity", "adapter"):
        assert told in printed
