"""The package as users get it: sdist, wheel, a machine without a compiler, Hugging Face's `kernels` beside it."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


def copy_with_one_kernel(source, copy, name):
    """Copy the sources with one kernel: all of them take minutes to compile, and the tests' own build has done it."""
    shutil.copytree(source, copy)
    for path in (copy / "csrc" / "cpu").glob("*.cpp"):
        if path.stem != name:
            path.unlink()
    return copy


def test_sdist_then_wheel_then_use_from_elsewhere(source, tmp_path):
    small = copy_with_one_kernel(source, tmp_path / "small", "gae")
    made = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=small)
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
    assert not any("torch" in name or "c10" in name or "gomp" in name for name in libraries), libraries


def test_sdist_holds_what_git_holds(tmp_path):
    """Nothing but the repository's own settings is missing, and nothing that a build or a run leaves is there."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a checkout of git")
    files = {name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()}
    copy = tmp_path / "source"
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in (
        "rlhf_fast/_cpu.cpython-311-x86_64-linux-gnu.so", "rlhf_fast/__pycache__/errors.cpython-311.pyc",
        "build/simt/a.o", "tests/simt/a.o", "runs/demo/run.json", "docs/examples/.ipynb_checkpoints/sft.ipynb",
        ".venv/bin/python",
    ):  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    made = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=copy)
    assert made.returncode == 0, made.stderr
    (sdist,) = tmp_path.glob("rlhf_fast-*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    of_setuptools = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("rlhf_fast.egg-info/")}
    assert held - of_setuptools == {name for name in files if not name.startswith(".")}


def test_a_checkout_does_not_hide_another_package_named_kernels(source, tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("origin = 'another package'")
    used = run(sys.executable, "-c", "import kernels; print(kernels.origin)", cwd=source, PYTHONPATH=str(tmp_path))
    assert used.stdout.strip() == "another package", used.stdout + used.stderr


def test_without_a_compiler_the_install_goes_on_and_says_so(source, tmp_path):
    built = build_wheel(source, tmp_path, CXX="no-such-compiler", RLHF_FAST_REQUIRE_EXT="0")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "COULD NOT BE BUILT" in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    required = build_wheel(source, tmp_path, CXX="no-such-compiler", RLHF_FAST_REQUIRE_EXT="1")
    assert required.returncode != 0
    chosen = build_wheel(source, tmp_path, CXX="/bin/false", RLHF_FAST_EXT="0")
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr


CRASHES = """#!/bin/sh
case "$*" in *-DKERNEL_GROUP*) echo "internal compiler error: Segmentation fault" >&2; kill -SEGV $$;; esac
exec c++ "$@"
"""


@pytest.fixture
def small_source(source, tmp_path):
    return copy_with_one_kernel(source, tmp_path / "small", "gelu")


def older_extensions(source):
    """Put files where an earlier build would have left extensions, and return them."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    tree = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    found = [folder / f"_cpu{suffix}" for folder in (source / "rlhf_fast", source / "build" / tree / "rlhf_fast")]
    for path in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"older")
    return found


def test_a_compiler_without_openmp_gives_kernels_of_one_thread_and_says_so(small_source):
    compiler = small_source / "c++-without-openmp"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) echo "unsupported option" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_source, CXX=str(compiler))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not compile with -fopenmp: the CPU kernels will run on ONE thread" in done.stdout
    for folder, expected in ((small_source, True), (ROOT, False)):
        shown = run(sys.executable, "-m", "rlhf_fast", "env", cwd=folder, PYTHONPATH=str(folder))
        assert shown.returncode == 0, shown.stderr
        assert ("(the last is used), on one thread: built without OpenMP\n" in shown.stdout) == expected, shown.stdout


@pytest.mark.parametrize("required", ["0", "1"])
@pytest.mark.parametrize("fault", ["source", "header", "compiler crashes", "compiler fails"])
def test_a_compiler_that_does_not_compile_is_an_error(small_source, fault, required):
    """Its own message is shown, and no extension of an earlier build stays in place."""
    environment, message = {}, "this is no C++"
    if fault == "source":
        (small_source / "csrc" / "cpu" / "gelu.cpp").write_text("#error this is no C++\n")
    elif fault == "header":
        (small_source / "csrc" / "cpu" / "simd.h").write_text("#error this is no C++\n")
    elif fault == "compiler crashes":
        compiler = small_source / "crashing-c++"
        compiler.write_text(CRASHES)
        compiler.chmod(0o755)
        environment, message = {"CXX": str(compiler)}, "internal compiler error"
    else:
        environment, message = {"CXX": "/bin/false"}, "/bin/false"
    older = older_extensions(small_source)
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*build, cwd=small_source, RLHF_FAST_REQUIRE_EXT=required, **environment)
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert message in output and "rlhf_fast._cpu was not built: its compiler is there and failed" in output
    assert "COULD NOT BE BUILT" not in output and "Traceback" not in output
    assert not any(path.exists() for path in older)


def test_a_mended_source_builds_again(small_source):
    kernel = small_source / "csrc" / "cpu" / "gelu.cpp"
    good = kernel.read_text()
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    kernel.write_text("#error this is no C++\n")
    assert run(*build, cwd=small_source).returncode != 0
    kernel.write_text(good)
    done = run(*build, cwd=small_source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((small_source / "rlhf_fast").glob("_cpu*.so"))


INPLACE = (sys.executable, "setup.py", "build_ext", "--inplace")


@pytest.mark.parametrize("cxx, sentence", [("  ", "CXX is blank"), ("c++ 'x", "is no command: No closing quotation")])
def test_a_compilers_name_that_is_no_command_is_refused(small_source, cxx, sentence):
    older = older_extensions(small_source)
    done = run(*INPLACE, cwd=small_source, CXX=cxx)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and sentence in output and "Traceback" not in output
    assert not any(path.exists() for path in older)


def test_a_compilers_name_may_have_quotes_and_blanks(small_source):
    folder = small_source / "a folder"
    folder.mkdir()
    (folder / "cc").write_text('#!/bin/sh\nexec c++ "$@"\n')
    (folder / "cc").chmod(0o755)
    done = run(*INPLACE, cwd=small_source, CXX=f"'{folder / 'cc'}' -DNAME='a b'", RLHF_FAST_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("setting, gone", [("RLHF_FAST_EXT", "_cpu"), ("RLHF_FAST_CUDA", "_cuda")])
def test_what_is_switched_off_is_removed(small_source, setting, gone):
    older_extensions(small_source)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = small_source / "rlhf_fast" / f"{gone}{suffix}"
    path.write_bytes(b"older")
    done = run(*INPLACE, cwd=small_source, **{setting: "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not path.exists()


def test_a_newer_file_in_place_is_replaced(small_source):
    assert run(*INPLACE, cwd=small_source).returncode == 0
    (path,) = (small_source / "rlhf_fast").glob("_cpu*.so")
    path.write_bytes(b"of another build")
    assert run(*INPLACE, cwd=small_source).returncode == 0
    assert path.read_bytes() != b"of another build"


def test_a_toolkit_without_its_library_leaves_no_older_extension(small_source):
    nvcc = small_source / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    path = small_source / "rlhf_fast" / f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"older")
    done = run(*INPLACE, cwd=small_source, RLHF_FAST_CUDA="1", CUDA_HOME=str(small_source))
    assert done.returncode != 0 and "libcudart_static.a was not found" in done.stdout + done.stderr
    assert not path.exists()
