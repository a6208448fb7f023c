"""What `pip install .` gives: its files, its kernels, its public names."""

import shutil
import sys
from pathlib import Path

import pytest

import fastprefix
from fastprefix_testing.fresh import ROOT, checkout, run


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
    assert (unpacked / "CHANGELOG.md").is_file()
    assert not (unpacked / "tests").exists()  # they need the whole repository
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
    data = ("fastprefix/py.typed", "fastprefix/training/report.html")
    assert {*data, "fastprefix/tasks/data/descriptions-train.jsonl"} <= found["checkout"]


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
