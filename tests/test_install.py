"""The package as users get it: sdist, wheel, a machine without a compiler, Hugging Face's `kernels` beside it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISSING = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"building without the network needs {', '.join(MISSING)}"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source checkout"),
]

USE = """
import sys, torch, kernels
from pathlib import Path
import rlhf_fast
from rlhf_fast import PPOConfig, ops
from rlhf_fast.kernels import _op
assert kernels.origin == "another package", kernels
assert Path(rlhf_fast.__file__).is_relative_to(sys.argv[1]), rlhf_fast.__file__
assert ops.gae.chosen("cpu").startswith("cpu:"), ops.gae.why("cpu")
one = torch.ones(1, 1)
print(ops.gae(one, one, one.bool())[1].item())
"""


def run(*command, cwd=None, **environment):
    env = {**os.environ, "RLHF_FAST_CUDA": "0", **environment}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout without build products."""
    copy = tmp_path_factory.mktemp("source") / "a folder with spaces"
    unwanted = shutil.ignore_patterns(
        ".git", "build", "dist", "*.so", "*.egg-info", ".venv", "runs", "__pycache__", ".*"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


def build_wheel(source, out, **environment):
    pip = (sys.executable, "-m", "pip", "wheel", "-v", source, "--no-deps", "--no-build-isolation", "-w", out)
    return run(*pip, cwd=out, **environment)


def test_sdist_then_wheel_then_use_from_elsewhere(source, tmp_path):
    made = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source)
    assert made.returncode == 0, made.stderr
    (sdist,) = tmp_path.glob("rlhf_fast-*.tar.gz")
    built = build_wheel(sdist, tmp_path, RLHF_FAST_REQUIRE_EXT="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rlhf_fast/kernels/gae.py", "rlhf_fast/py.typed"} <= set(names)
    assert any(name.startswith("rlhf_fast/_cpu") for name in names)
    expected = set()
    for folder, target in (("rlhf_fast", "rlhf_fast"), ("kernels", "rlhf_fast/kernels"), ("bench", "rlhf_fast/bench")):
        expected |= {f"{target}/{path.relative_to(source / folder)}" for path in (source / folder).rglob("*.py")}
    missing = expected - set(names)
    assert not missing, f"not in the wheel: {sorted(missing)}; see packages in pyproject.toml"
    others = {name.split("/")[0] for name in names} - {"rlhf_fast"}
    assert all(name.endswith(".dist-info") for name in others), f"the wheel installs more than rlhf_fast: {others}"
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("origin = 'another package'")
    for folder in (tmp_path, source / "tests"):
        used = run(sys.executable, "-c", USE, site, cwd=folder, PYTHONPATH=str(site))
        assert used.returncode == 0 and used.stdout.strip() == "1.0", used.stdout + used.stderr
    libraries = [line.split()[0] for line in run("ldd", *site.glob("rlhf_fast/_cpu*.so")).stdout.splitlines()]
    assert any(name.startswith("libc.so") for name in libraries), libraries
    assert not any("torch" in name or "c10" in name for name in libraries), libraries


def test_a_checkout_does_not_hide_another_package_named_kernels(source, tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("origin = 'another package'")
    used = run(sys.executable, "-c", "import kernels; print(kernels.origin)", cwd=source, PYTHONPATH=str(tmp_path))
    assert used.stdout.strip() == "another package", used.stdout + used.stderr


def test_without_a_compiler_the_install_goes_on_and_says_so(source, tmp_path):
    built = build_wheel(source, tmp_path, CXX="/bin/false", RLHF_FAST_REQUIRE_EXT="0")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "COULD NOT BE BUILT" in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    required = build_wheel(source, tmp_path, CXX="/bin/false", RLHF_FAST_REQUIRE_EXT="1")
    assert required.returncode != 0
