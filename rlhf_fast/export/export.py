"""`rlhf-fast export`: a model for other programs, each file checked against the model before it takes its place.

Files are written to a folder beside the target first. export.json in the target lists what this command wrote, with
checksums: a later call replaces those files, and no others. While files are moved it lists both checksums of each, so
that a call that is killed meanwhile leaves no file that a later one takes for another's.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig

from rlhf_fast import __version__
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.errors import UserError, listed, writing
from rlhf_fast.export import gguf_file, llama_cpp, modelfile
from rlhf_fast.export.agreement import NEAR_TIE, Row, compare, greedy_rows, logits_of, rounding
from rlhf_fast.export.folder import merge_adapter, require_adapter, saved_dtype, write_folder
from rlhf_fast.export.gguf_tensors import FAMILIES, Contents, contents
from rlhf_fast.export.gguf_vocabulary import TokenizerFacts, tokenizer_facts
from rlhf_fast.model.model import Head, Model
from rlhf_fast.model.pretrained import check_folder, quiet
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.info import sha256
from rlhf_fast.run.outputs import check_empty_folder, read_json
from rlhf_fast.run.prompt_format import model_prompt_format

MANIFEST = "export.json"
MODELFILE = "Modelfile"
FIRST_BYTES = b'{\n  "rlhf-fast": "'
"""Start of every export.json."""

Sums = dict[str, list[str]]
"""File -> its checksum; several if an export was killed while it moved files, which may have any of them then."""


class Request(NamedTuple):
    """The files to write. Without `gguf` or `dtype` there is no such file."""

    run: str
    out: str
    gguf: str = ""
    ollama: bool = False
    dtype: str = ""
    merge_lora: bool = False

    @property
    def file(self) -> str:
        """Name of the GGUF file."""
        return f"{Path(self.run).resolve().name}-{self.gguf}.gguf"

    @property
    def planned(self) -> list[str]:
        """Names of the files that are known beforehand."""
        folder = ["config.json", "model.safetensors"] if self.dtype else []
        return [*([self.file] if self.gguf else []), *([MODELFILE] if self.ollama else []), *folder]


def export(request: Request) -> Iterator[str]:
    """Write the files, and yield a line on each check. UserError if one of them is not the model."""
    request = _completed(request)
    out, earlier = Path(request.out), _earlier(Path(request.out))
    _check_free(out, request.planned, earlier)
    model, notes = _load(request)
    yield from notes
    prompt_format, notes = model_prompt_format(request.run, model.tokenizer, "auto", "template", strict=False)
    yield from notes
    encoder = Encoder(model.tokenizer, prompt_format.template, eos=False, date=prompt_format.date)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(out) as workspace:
        rows: list[Row] = []
        if request.gguf:
            facts = tokenizer_facts(model, encoder)
            held = contents(model, gguf_file.require_gguf())
            if request.ollama:
                text = modelfile.modelfile(request.file, model, encoder, facts.ends, held.context_length)
                (workspace / MODELFILE).write_text(text, encoding="utf-8")
            rows = greedy_rows(model, encoder, held.context_length)
            yield from _write_gguf(workspace / request.file, model, rows, held, facts, request.gguf, bool(encoder.chat))
            if request.dtype:
                model, _ = _load(request)  # the parameters are the file's now
        if request.dtype:
            rows = rows or ([] if model.head == "scalar" else greedy_rows(model, encoder, model.max_positions or 10**6))
            yield write_folder(model, workspace, request.dtype, rows)
        names = _move_in(workspace, out, earlier, request)
    yield f"written to {out}: {listed(names, 12)}"


def _completed(request: Request) -> Request:
    """Return the request with what follows from it; UserError for one that asks for nothing or for what cannot be."""
    if request.ollama and not request.gguf:
        request = request._replace(gguf="q8_0")
    if request.gguf:
        gguf_file.require_gguf()
    check_folder(request.run)
    if request.merge_lora:
        require_adapter(request.run)
    if request.merge_lora and not request.gguf and not request.dtype:
        request = request._replace(dtype=saved_dtype(request.run))
    if not request.gguf and not request.dtype:
        raise UserError("export: nothing to write; give --gguf q8_0, --ollama, --safetensors-dtype or --merge-lora")
    return request


def _load(request: Request) -> tuple[Model, list[str]]:
    """Return the model in float32 on the CPU, where its greedy tokens do not depend on the machine's GPU, and notes."""
    with quiet():
        try:
            names = AutoConfig.from_pretrained(request.run).architectures or ()
        except Exception:  # Model.load says what is wrong with it
            names = ()
    head: Head = "scalar" if any("SequenceClassification" in name for name in names) else "lm"
    model = Model.load(ModelConfig(path=request.run), head=head, device="cpu")
    if request.gguf:
        contents(model, gguf_file.require_gguf())  # a model that llama.cpp does not have is refused first
    return model, [merge_adapter(request.run, model)] if request.merge_lora else []


def _write_gguf(
    path: Path, model: Model, rows: list[Row], held: Contents, facts: TokenizerFacts, kind: str, is_chat: bool
) -> Iterator[str]:
    """Write the file, read it back, and let llama.cpp read it where it is installed; yield lines."""
    yield from held.notes
    gguf_file.write(path, path.stem.removesuffix(f"-{kind}"), kind, held, facts)
    counts = gguf_file.read_back(path, held)
    types = ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))
    yield f"{path.name}: {sum(counts.values())} tensors ({types}) read back within the rounding of their types"
    if facts.note:
        yield facts.note
    own, moved = logits_of(model.base), rounding(rows, logits_of(model.base))
    name = f"the {kind} weights in our own forward pass"
    found = compare(rows, own, min(moved, NEAR_TIE[kind]), model.num_tokens, name)
    yield found.sentence(name, len(rows))
    if not llama_cpp.is_installed():
        yield "llama.cpp was not there to compare with; pip install llama-cpp-python, and export again"
        return
    exact_gelu = getattr(model.text_config, "hidden_act", "") == "gelu"
    activation = "gelu" if exact_gelu else FAMILIES[type(model.base).__name__].activation
    found = llama_cpp.check(
        path, rows, is_chat=is_chat, ends=facts.ends, activation=activation, kind=kind, rounding=moved,
        num_tokens=model.num_tokens,
    )  # fmt: skip
    yield found.sentence(llama_cpp.PROGRAM, len(rows))


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that is gone afterwards. Those which killed exports to `out` left are removed."""
    prefix = f"{out.name}.export-"
    for left in list(out.parent.glob(glob.escape(prefix) + "[a-z0-9_]" * 8)):
        if left.is_dir() and not left.is_symlink():
            with _locked(left) as is_free:
                if is_free:
                    shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, and yield whether no other process has it locked."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # its process has removed it, or it is another user's
        yield False
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except OSError:
        is_free = False
    try:
        yield is_free
    finally:
        os.close(number)


def _earlier(out: Path) -> Sums:
    """Return the files that an earlier call wrote to `out`, with checksums. UserError for a folder that is not ours."""
    saved = read_json(out / MANIFEST)
    if saved is None:
        unfinished = out / f"{MANIFEST}.tmp"  # of a call that was killed before it moved a file
        head = unfinished.read_bytes()[: len(FIRST_BYTES)] if unfinished.is_file() else b"?"
        check_empty_folder(out, "export", [unfinished.name] if FIRST_BYTES.startswith(head) else [])
        return {}
    files = saved.get("files") if isinstance(saved, dict) and "rlhf-fast" in saved else None
    if not isinstance(files, dict):
        raise UserError(f"{out / MANIFEST}: was not written by an export of ours; choose another --out")
    return {name: sums if isinstance(sums, list) else [sums] for name, sums in files.items()}


def _check_free(out: Path, names: list[str], earlier: Sums) -> None:
    """Raise UserError if a file would be written over that no export wrote, or that was changed since."""
    for name in names:
        file = out / name
        if file.exists() and (name not in earlier or sha256(file) not in earlier[name]):
            what = "was changed since the export that wrote it" if name in earlier else "was not written by an export"
            raise UserError(f"{file}: {what}; move it away, or choose another --out")


def _move_in(workspace: Path, out: Path, earlier: Sums, request: Request) -> list[str]:
    """Move the files to `out` and list them in its export.json; return their names."""
    names = sorted(path.relative_to(workspace).as_posix() for path in workspace.rglob("*") if path.is_file())
    _check_free(out, names, earlier)
    sums = {name: [sha256(workspace / name)] for name in names}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _write_manifest(out, request, earlier | {name: sums[name] + earlier.get(name, []) for name in names})
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (workspace / name).replace(out / name)
        _write_manifest(out, request, earlier | sums)
    return names


def _write_manifest(out: Path, request: Request, files: Mapping[str, list[str]]) -> None:
    """Write export.json, with one checksum of a file as it is, and several as a list."""
    short = {name: sums[0] if len(set(sums)) == 1 else sorted(set(sums)) for name, sums in files.items()}
    write_json(out / MANIFEST, {"rlhf-fast": __version__, "of": request.run, "files": short})
