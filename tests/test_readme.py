"""README and docs/ show what works: their commands run, their rows are read, their Python has its imports."""

import ast
import builtins
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy
import yaml
from architectures import RECURRENT, SERVED

from rlhf_fast import ops
from rlhf_fast.cli.main import COMMANDS, main
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.config.resolve import setting_types
from rlhf_fast.config.stages import STAGES
from rlhf_fast.data.check import examine
from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.model.architectures import FAMILIES
from rlhf_fast.stages import ppo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="not a source checkout")

# Appended to what a page shows, so that it takes seconds: the pages show real sizes.
SMALL = {
    "sft": "--epochs 1 --batch 4 --data.template plain --sampling.max-new-tokens 4",
    "reward": "--epochs 1 --batch 4 --data.template plain --demonstrations.template plain",
    "ppo": "--episodes 8 --batch 4 --minibatch 4 --inner-epochs 1 --ptx-ratio 1 --data.template plain"
    " --sampling.max-new-tokens 4 --pretrain.max-response-tokens 8 --log.samples 1",
    "generate": "--max-new-tokens 4 --template plain",
    "chat": "--max-new-tokens 4 --template dialog",
    "eval": "--max-new-tokens 4 --template plain --limit 2",
}
SMALL_RECIPE = {
    "sft": {"epochs": 1, "batch": 4, "data.template": "plain", "sampling.max_new_tokens": 4},
    "reward": {"epochs": 1, "batch": 4, "data.template": "plain", "demonstrations.template": "plain"},
    "ppo": {"episodes": 8, "batch": 4, "minibatch": 4, "data.template": "plain", "sampling.max_new_tokens": 4},
}
# Not run here: they install, or another test runs them whole.
ELSEWHERE = {
    "pip": "test_install.py installs the package",
    "pre-commit": "ruff and clang-format are what .ci/run checks",
    ".ci/run": "runs these tests",
    "pytest$": "runs these tests",
    "pytest -m slow$": "runs more of these tests",
    "rlhf-fast demo": "test_demo.py",
    "rlhf-fast export": "test_export.py: the tiny model has no tokenizer that a GGUF file can hold",
    "python -m zipfile": "Python's own",
    "python setup.py": "test_install.py builds the extensions",
    "python examples/": "test_examples.py",
    "rlhf-fast run examples/smollm2.yaml": "test_examples.py resolves it",
}
# Packages whose modules the map does not list one by one.
WITHOUT_MODULES = {"demo", "rollout", "data"}
# As a user has it: these tests themselves run under Triton's interpreter.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}


def blocks(language: str, *pages: Path) -> list[str]:
    """The fenced blocks of one language, in all pages or in those named."""
    found = []
    for page in pages or PAGES:
        found += re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return found


def commands(page: Path) -> list[str]:
    """Each command of the page's sh blocks, without comments and leading variables, split at `&&`."""
    lines = [line.partition("  #")[0].strip() for block in blocks("sh", page) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [re.sub(r"^([A-Z_]+=\S+ )+", "", part) for part in parts if part]


def is_elsewhere(command: str) -> bool:
    return any(f"{command}$".startswith(start) for start in ELSEWHERE)


def small_recipe(text: str, model: str) -> str:
    """A recipe as `init` writes it, filled in, with few and short steps."""
    recipe = yaml.safe_load(text)
    for stage, settings in SMALL_RECIPE.items():
        recipe[stage] |= settings
    recipe["sft"]["model.path"] = model
    return yaml.safe_dump(recipe)


@pytest.fixture
def workplace(folder, one_thread):
    """A folder with the data files that the pages name and a tiny model."""
    rows = blocks("json", ROOT / "docs" / "data.md")
    for name, text in zip(("demonstrations", "rankings", "prompts", "texts"), rows, strict=True):
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


SLOW = ("adding-an-op.md", "running.md", "integrations.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW), id=p.name) for p in PAGES],
)
def test_the_commands_run(page, workplace, capsys, monkeypatch):
    """`rlhf-fast` commands run in the page's order, with small sizes; the others are tried as far as is quick."""
    model = toy.model(workplace / "MODEL", letters="abcdefghijklmnopqrstuvwxyz")
    shown = [command for command in commands(page) if not is_elsewhere(command)]
    for command in shown:
        words = shlex.split(command)
        if words[0] == "rlhf-fast":
            name, argv = words[1], words[2:]
            if name == "run":  # after `init`
                recipe = Path(argv[0])
                recipe.write_text(small_recipe(recipe.read_text(encoding="utf-8"), model), encoding="utf-8")
            monkeypatch.setattr(sys, "stdin", io.StringIO("a b .\n"))
            assert main([name, *argv, *SMALL.get(name, "").split()]) == 0, f"{command}\n{capsys.readouterr().err}"
        elif words[0] == "pytest":
            quick = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *words[1:]]
            done = subprocess.run(quick, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        else:
            assert words[:2] == ["python", "-m"], f"{page.name}: no test runs `{command}`"
            done = subprocess.run(
                [sys.executable, "-m", words[2], "--help"], capture_output=True, text=True, env=ENVIRONMENT
            )
            assert done.returncode == 0, done.stderr
            for flag in (word for word in words if word.startswith("--")):
                assert flag in done.stdout, f"{command}: {words[2]} has no {flag}"


def test_every_exception_is_needed():
    """A command that no page shows any more needs no entry in ELSEWHERE."""
    shown = [command for page in PAGES for command in commands(page)]
    assert all(any(f"{command}$".startswith(start) for command in shown) for start in ELSEWHERE)
    assert sum(not is_elsewhere(command) for command in shown) > 15


def test_the_rows_are_read_as_what_they_are(tmp_path):
    kinds = ("demonstrations", "comparisons", "prompts", "texts")
    for text, kind in zip(blocks("json"), kinds, strict=True):
        (tmp_path / "rows.jsonl").write_text(text)
        report = examine(DataConfig(str(tmp_path / "rows.jsonl")))
        assert report.kind == kind and not report.errors
        assert len(report.examples) == len(text.splitlines())


def test_the_op_that_is_called_learns():
    found = {}
    exec(next(block for block in blocks("python") if "ops.linear_ppo_loss(" in block), found)
    assert found["loss"].isfinite() and found["weight"].grad.any()
    assert 0.3 < found["hidden"].grad.any(1).float().mean() < 0.8  # a clipped token has none, here about half


def test_the_scorer_prefers_the_true_answer(capsys, one_thread):
    """The example has the demo's SFT model; its base model comes with the package."""
    example = next(block for block in blocks("python") if "Scorer(model)(" in block)
    assert example.count("runs/demo/sft") == 1
    exec(example.replace("runs/demo/sft", str(BASE_MODELS / "large")), {})
    true, false = (float(line.split()[-3]) for line in capsys.readouterr().out.splitlines())
    assert false < true < 0


@pytest.mark.slow
def test_trls_trainer_is_fused(workplace, capsys, monkeypatch):
    pytest.importorskip("trl", minversion="1.15", reason="trl 1.15 or later is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workplace / "cache"))
    example = next(block for block in blocks("python") if "integrations.trl.fused()" in block)
    example = example.replace("runs/demo/data/", "").replace("runs/demo/sft", str(BASE_MODELS / "large"))
    assert "runs/demo" not in example
    found = {}
    exec(example, found)
    assert found["handle"].status.answered.total() == 20 and not found["handle"].status.fallbacks
    assert "trl: answered by rlhf_fast: ChunkedLogProbFunction 20" in capsys.readouterr().out


def test_the_op_that_is_added_works(tmp_path):
    """In a process of its own, because an op is registered for good."""
    source = next(block for block in blocks("python") if "def twice(" in block)
    source += (
        "\n(x,) = twice.make_inputs(device='cpu', dtype=torch.float32, N=17)\nassert torch.equal(twice(x), 2 * x)\n"
        "assert 'ValueError' in twice.__doc__\ntry:\n    twice(x.long())\nexcept ValueError:\n    pass\n"
        "else:\n    raise AssertionError('no error')\n"
    )
    (tmp_path / "twice.py").write_text(source, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "twice.py"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def files_of(page: Path) -> dict[str, str]:
    """Return the files that a page shows whole: a line that begins with a path, then the file's block."""
    found = re.findall(r"^`([\w/.]+)`[^\n]*:\n\n```\w+\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return dict(found)


OF_ALL_OPS = "every_op or every_shared_file or without_a_cuda_kernel or links_and_paths or map_is_the_tree"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_op_added_by_the_page_passes_the_tests(tmp_path):
    """To the letter, in a copy of the sources that has no other CPU kernel: with kernels, without, with a gradient."""
    page = ROOT / "docs" / "adding-an-op.md"
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "runs", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    files = files_of(page)
    assert files.keys() == {"kernels/twice.py", "csrc/cpu/twice.cpp", "kernels/triton/twice.py"}
    for name, text in files.items():
        (tree / name).write_text(text, encoding="utf-8")
    public = tree / "rlhf_fast" / "ops.py"
    (line,) = (block for block in blocks("py", page) if "import twice\n" in block)
    text = public.read_text(encoding="utf-8").replace("__all__ = [", '__all__ = ["twice", ', 1)
    public.write_text(
        text.replace("from rlhf_fast.kernels.token_logprobs", f"{line}from rlhf_fast.kernels.token_logprobs")
    )
    env = ENVIRONMENT | {"PYTHONPATH": str(tree), "RLHF_FAST_CUDA": "0", "RLHF_FAST_REQUIRE_EXT": "1"}

    def run_tests(*names, options=("-k", "twice", "-m", "")):
        tests = [f"tests/test_{name}.py" for name in names or ("ops", "nan", "arguments")]
        command = [sys.executable, "-m", "pytest", *tests, *options, "-n", "0", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return int(re.findall(r"(\d+) passed", done.stdout + " 0 passed")[0]) or done.stdout.count(".")

    run_tests("dispatch", "readme", options=("-k", OF_ALL_OPS, "-m", ""))
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        if path.name != "twice.cpp":
            path.unlink()
    without = run_tests()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=tree, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    without_gradient = run_tests()
    assert without_gradient > without

    (gradient,) = (block for block in blocks("py", page) if "twice.gradient(" in block)
    file = tree / "kernels" / "twice.py"
    text = file.read_text(encoding="utf-8") + gradient
    for old, new in (  # what the page says below that block
        ("return (x.detach(),)", "return (x,)"),
        ("dtype=dtype),)", "dtype=dtype, requires_grad=True),)"),
        ("No gradient.", "Gradients for x."),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    assert run_tests() > without_gradient


@pytest.mark.parametrize("page", ["README.md", "docs/rollouts.md"])
def test_the_rollouts_run(page, workplace, capsys):
    toy.model(workplace / "runs" / "first" / "sft")
    toy.model(workplace / "runs" / "sft")
    source = next(block for block in blocks("python", ROOT / page) if "Rollout(" in block)
    found = {}
    exec(source.replace("max_new_tokens=64", "max_new_tokens=4"), found)
    assert len(found["responses"].lengths) == 8 and capsys.readouterr().out


def test_a_trainer_without_logits(workplace, capsys):
    toy.model(workplace / "runs" / "demo" / "sft", letters="abcdefghijklmnopqrstuvwxyz")
    source = next(block for block in blocks("python", ROOT / "docs" / "integrations.md") if "lazy_head(" in block)
    exec(source, {})
    answered = "LlamaForCausalLM: answered by rlhf_fast: linear_cross_entropy 3"
    assert capsys.readouterr().out == f"{answered}; not lazy now, logits given at once 0 times\n"


def test_a_model_with_our_layers(workplace, capsys):
    toy.model(workplace / "runs" / "demo" / "sft", letters="abcdefghijklmnopqrstuvwxyz")
    source = next(block for block in blocks("python", ROOT / "docs" / "integrations.md") if "layers.fused(" in block)
    exec(source, {})
    assert capsys.readouterr().out == "LlamaForCausalLM: answered by rlhf_fast: LlamaModel.forward 1\n"


def test_the_stage_that_is_run_from_python(workplace, monkeypatch):
    """The page shows a short run, which runs here once it is shorter still."""
    toy.model(workplace / "runs" / "sft")
    source = next(block for block in blocks("python", ROOT / "docs" / "running.md") if "ppo.run(" in block)
    run, shown = ppo.run, []
    monkeypatch.setattr(ppo, "run", shown.append)
    exec(source, {})
    (cfg,) = shown
    toy.assert_is_short(cfg)
    small = {"reward": "toy:share_of_a", "episodes": 4, "batch": 4, "minibatch": 4}
    run(replace(cfg, data=replace(cfg.data, template="plain"), **small))
    assert (workplace / "runs" / "from-python" / "model.safetensors").is_file()


@pytest.mark.parametrize("source", blocks("python"))
def test_python_has_its_imports(source):
    tree = ast.parse(source)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    known |= {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if getattr(node, "module", None) == "trl":
                pytest.importorskip("trl")
            exec(compile(ast.Module([node], []), "a page", "exec"), {})
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            known.add(node.name)
    assert {node.id for node in names} <= known


def test_flags_are_settings():
    for page in PAGES:
        for command in commands(page):
            name, *words = command.removeprefix("rlhf-fast ").split()
            if command.startswith("rlhf-fast ") and name in STAGES:
                flags = [word.removeprefix("--") for word in words if word.startswith("--")]
                unknown = [flag for flag in flags if flag.replace("-", "_") not in setting_types(STAGES[name])]
                assert not unknown, f"{page.name}: {command}: {unknown}"
            elif command.startswith("rlhf-fast "):
                assert name in COMMANDS, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    outside_blocks = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for path in re.findall(r"`((?:rlhf_fast|kernels|csrc|tests|bench|examples|docs)/[\w./-]+)`", outside_blocks):
        is_example = Path(path).stem == "twice"  # the op that docs/adding-an-op.md makes
        assert is_example or (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_table_of_steps_names_whole_paths():
    """A file without its folder would not be looked for by test_links_and_paths_exist."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Where each step")[2].partition("\n## ")[0]
    bare = re.findall(r"`[\w<>*]+\.(?:py|cpp|cu|cuh|h)`", table)
    assert table.count("`csrc/cuda/") > 5 and not bare, bare


def test_architectures_are_counted():
    """Every number of architectures is that of the fused path's table or of the models that the tests decode."""
    tested = len({type(make()) for make in SERVED.values()})
    for page in PAGES:
        counts = {int(n) for n in re.findall(r"(\d+)\s+architectures", page.read_text(encoding="utf-8"))}
        assert counts <= {len(FAMILIES), tested}, f"{page.name}: {counts}"
    rows = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    (count, names), *others = re.findall(r"(\d+) architectures: ([\w, -]+) \|", rows)
    assert int(count) == len(FAMILIES) and not others
    assert {f"{name.replace('-', '')}Model" for name in names.split(", ")} == FAMILIES.keys()
    assert f"tested on {tested} architectures, those {count} among them" in rows
    (count, names) = re.search(r"recurrent models: tested on (\d+), among them ([\w, .-]+) \|", rows).groups()
    kinds = {type(make()).__name__.removesuffix("ForCausalLM").lower() for make in RECURRENT.values()}
    assert int(count) == len(kinds) and {re.sub("[ .-]", "", name).lower() for name in names.split(", ")} <= kinds


def test_the_ops_without_a_cuda_kernel_are_named():
    """README and docs/ say that of the ops that they name all but these have a CUDA C++ kernel."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    without = set(ops.__all__) - set(re.findall(r"^KERNEL\((\w+)\)", sources, re.M))
    known = {name for name in ops.__all__ if name.startswith("linear_")} | {"linear", "varlen_attention", "rope"}
    assert known <= without
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "adding-an-op.md")
    assert not {name for name in without - known if re.search(rf"`{name}\b", pages)}


def test_the_map_is_the_tree():
    """docs/architecture.md lists every package and module of rlhf_fast/ and every folder at the top."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (text, *_) = re.findall(r"^```\n(kernels/.*?)^```", page, re.M | re.S)
    for path in sorted((ROOT / "rlhf_fast").iterdir()):
        if path.is_dir() and [*path.glob("*.py")]:
            (lines,) = re.findall(rf"^  {path.name}/ .*(?:\n {{16}}.*)*", text, re.M)
            words = set(re.findall(r"\w+", lines))
            stems = {module.stem for module in path.glob("*.py")} - {"__init__"}
            assert stems <= words or path.name in WITHOUT_MODULES, f"{path.name}: {stems - words}"
        elif path.suffix == ".py":
            assert f"  {path.name} " in text, path
    for name in ("kernels/", "csrc/", "rlhf_fast/", "tests/", "bench/", "docs/", "examples/"):
        assert re.search(rf"^(docs/ )?{name}", text, re.M), name
