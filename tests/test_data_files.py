"""Rows in every form that `data.path` may have: each gives the rows that the same JSON lines give, and names its bad
rows by file and line."""

import csv
import gzip
import io
import json
import logging
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from rich.console import Console
from test_data import TURNS, byte_level, write

from rlhf_fast.cli.main import main
from rlhf_fast.config.data_path import PythonRows, as_data_path, hub_name, parts, plain, rows_sha256
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.config.flags import stage_config
from rlhf_fast.config.resolve import from_json, resolve, to_yaml
from rlhf_fast.config.stages import PPOConfig, SFTConfig
from rlhf_fast.config.yaml_file import read_yaml
from rlhf_fast.data import hub, read_demonstrations
from rlhf_fast.data.check import check
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.files import require_data
from rlhf_fast.data.rows import Fault, read_examples, scan_examples
from rlhf_fast.data.token_view import echo_row
from rlhf_fast.errors import UserError
from rlhf_fast.run.identity import input_checksums
from rlhf_fast.run.info import sha256
from rlhf_fast.stages import ppo, reward, sft

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

WORSE = [TURNS[0], {"role": "assistant", "content": "no"}]
ROWS = {
    "demonstrations": [
        {"prompt": "Zwölf,\n\"quoted\" 'text'\ttab", "completion": "a; b, c", "group": "g1", "system": "Be brief."},
        {"prompt": "[1, 2, 3] sorted?", "completion": "{1: 2}", "group": "", "system": ""},
        {"prompt": "NA", "completion": "nan", "group": "g1", "system": ""},
    ],
    "comparisons": [
        {"prompt": "p", "responses": ["a", "b, c", "d\ne"], "ranks": [1, 0, 1]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]},
    ],
    "prompts": [{"messages": TURNS}, {"messages": [TURNS[0]]}],
    "texts": [{"text": "One.\n\nTwo."}, {"text": "x" * 200_000}],
}


def table(path: Path, rows: list[dict], delimiter: str = ",", start: bytes = b"") -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
    data = start + text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def in_form(form: str, folder: Path, rows: list[dict]) -> object:
    """Write the rows in a form, and return the value of `data.path` that names them."""
    path = folder / f"rows{form}"
    if form in (".csv", ".csv.gz"):
        return table(path, rows)
    if form == ".bom.csv":
        return table(path, rows, start=b"\xef\xbb\xbf")
    if form == ".tsv":
        return table(path, rows, "\t")
    if form == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
        return path
    if form in (".json", ".indented.json", ".array.jsonl"):
        path.write_text("\n" + json.dumps(rows, indent=2 if "indented" in form else None) + "\n")
        return path
    if form == ".json.gz":
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        return path
    if form in (".lines.json", ".jsonl"):
        return write(path, rows)
    if form == "pattern":
        for i, row in enumerate(rows):
            write(folder / f"part{i}.jsonl", [row])
        return str(folder / "part*.jsonl")
    if form == "files":
        pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "first.parquet")
        return [folder / "first.parquet", write(folder / "rest.jsonl", rows[1:])]
    return rows if form == "list" else datasets.Dataset.from_list(rows)


FORMS = (
    *(".csv", ".csv.gz", ".bom.csv", ".tsv", ".parquet", ".json", ".indented.json", ".array.jsonl", ".json.gz"),
    *(".lines.json", "pattern", "files", "list", "Dataset"),
)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_rows_of_json_lines(tmp_path, form, kind):
    expected = read_examples(write(tmp_path / "expected.txt", ROWS[kind]), kind)
    found = read_examples(in_form(form, tmp_path, ROWS[kind]), kind)
    assert len(found) == len(ROWS[kind])
    # An indented array and quoted line breaks have other line numbers
    assert [row._replace(line=0, file="") for row in found] == [row._replace(line=0, file="") for row in expected]


def faults(path: object, kind: str = "prompts", **options) -> list[tuple[str, str]]:
    found = [fault for fault in scan_examples(path, kind, **options) if isinstance(fault, Fault)]
    return [(Path(fault.location).name, str(fault.error)) for fault in found]


def sentence(path: object, kind: str = "prompts") -> str:
    with pytest.raises(UserError) as error:
        read_examples(path, kind)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_table_names_the_first_line_of_a_bad_record(tmp_path):
    (tmp_path / "d.csv").write_bytes(
        b'prompt,completion\r\n"a\r\nb",c\r\n\r\nonly\r\n"x\r\ny",1,2\r\n" ",c\r\ncaf\xe9,c\r\n"multi\r\nline",d\r\n'
    )
    found = faults(tmp_path / "d.csv", "demonstrations")
    assert [place for place, _ in found] == ["d.csv:5", "d.csv:6", "d.csv:8", "d.csv:9"]
    assert found[0][1].startswith("has 1 cell, the header 2 (prompt, completion); put quotes around")
    assert found[1][1].startswith("has 3 cells, the header 2") and "prompt is empty" in found[2][1]
    assert found[3][1].startswith("not UTF-8 at byte 4 (0xe9, in Windows-1252 'é'); save the file as UTF-8")
    good = [row for row in scan_examples(tmp_path / "d.csv", "demonstrations") if not isinstance(row, Fault)]
    assert [(row.line, row.prompt) for row in good] == [(2, "a\r\nb"), (10, "multi\r\nline")]


def test_tables_that_cannot_be_read(tmp_path):
    def error(text: str, name: str = "d.csv") -> str:
        (tmp_path / name).write_text(text)
        return sentence(tmp_path / name)

    assert "d.csv:1: the header has the column 'prompt' twice" in error("prompt,x,prompt\na,b,c\n")
    assert "if ; separates them, save it with commas" in error("prompt;x\na;b\n")
    assert "if a tab separates them, call the file .tsv" in error("prompt\tx\na\tb\n")
    assert "if a comma separates them, call the file .csv" in error("prompt,x\na,b\n", "d.tsv")
    assert "d.csv:3: not csv: a quote that opens at or below line 3 is never closed" in error('prompt\na\n"b\nc\n')
    assert "d.csv:2: not csv:" in error('prompt\n"a" b\n')
    assert "the file holds no rows; expected" in error("prompt\n") and "(it is empty)" in error("")
    wrong = "messages must be a list as JSON, with double quotes: not JSON"
    assert wrong in error("messages\n\"[{'role': 'user', 'content': 'hi'}]\"\n")


def test_a_mapped_column_of_a_table_may_hold_a_list(tmp_path):
    path = table(tmp_path / "d.csv", [{"q": "p", "candidates": ["a", "b"], "order": [1, 0]}])
    columns = {"prompt": "q", "responses": "candidates", "ranks": "order"}
    (row,) = read_examples(path, "comparisons", columns)
    assert (row.prompt, row.responses, row.ranks) == ("p", ("a", "b"), (1, 0))


def test_an_array_names_the_line_of_a_bad_row(tmp_path):
    def of(text: str) -> list[tuple[str, str]]:
        (tmp_path / "d.json").write_text(text)
        return faults(tmp_path / "d.json")

    found = of('[\n{"prompt": "a"},\n\n  3,\n{"prompt":\n null},\n{"prompt": "b", "prompt": "c"},\n{"prompt": "d"}]\n')
    assert [place for place, _ in found] == ["d.json:4", "d.json:5", "d.json:7"]
    assert ["found a number" in found[0][1], "is null" in found[1][1], "given twice" in found[2][1]] == [True] * 3
    assert of('[{"prompt": "a"}\n{"prompt": "b"}]')[0][0] == "d.json:2"
    assert "expected , or ]" in of('[{"prompt": "a"}')[0][1] and "the file ends" in of('[{"prompt": "a"}')[0][1]
    assert "at column 12" in of('[\n{"prompt": b}]')[0][1] and of('[\n{"prompt": b}]')[0][0] == "d.json:2"
    assert of('[{"prompt": "a"}]\n\n[]')[0] == (
        "d.json:3",
        "not JSON: the array has ended, and more text follows; remove it",
    )
    (tmp_path / "l.json").write_bytes(b'[\n{"prompt": "a"},\n{"prompt": "\xe9"}]')
    assert faults(tmp_path / "l.json")[0][0] == "l.json:3" and "at byte 13" in faults(tmp_path / "l.json")[0][1]
    assert sentence(write(tmp_path / "none.json", ["[]"])).startswith(f"{tmp_path}/none.json: the file holds no rows")


def test_an_object_that_holds_the_rows(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for indent in (None, 1):
        (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": rows}, indent=indent))
        assert "the rows are in it: `jq '.data'" in sentence(tmp_path / "d.json")
    (tmp_path / "d.json").write_text(json.dumps({"prompt": {"0": "a"}, "x": {"0": 1}}, indent=1))
    assert 'orient="records"' in sentence(tmp_path / "d.json")
    (tmp_path / "d.json").write_text(json.dumps({"messages": TURNS}))
    assert read_examples(tmp_path / "d.json", "demonstrations")[0].responses == ("yes",)


def test_a_row_of_parquet_has_a_number(tmp_path):
    rows = [{"prompt": f"p{i}" if i != 1500 else None, "when": None} for i in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert faults(tmp_path / "d.parquet") == [("d.parquet:1501", "prompt is null; give a text or remove the row")]
    content = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    assert "cut.parquet: cannot be read as parquet after row 0" in sentence(tmp_path / "cut.parquet")
    (tmp_path / "d.jsonl").write_bytes(content)
    assert "d.jsonl: is parquet, not text; give it a name that ends in .parquet" in sentence(tmp_path / "d.jsonl")


def test_without_pyarrow_or_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").touch()
    with pytest.raises(UserError, match=r"parquet needs pyarrow; pip install pyarrow"):
        require_data(str(tmp_path / "d.parquet"))
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^org/rows:train: there is no such file; .*pip install datasets"):
        require_data("org/rows:train")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"prompt": "é"}\n'.encode("utf-16"), "is UTF-16, not UTF-8; `iconv -f UTF-16 -t UTF-8"),
        ('{"prompt": "é"}\n'.encode("utf-16-le"), "is UTF-16, not UTF-8"),
        (b"\x28\xb5\x2f\xfd1234", "is compressed by zstd, not text; `zstd -d` unpacks it"),
        (b"PK\x03\x04....", "is a zip archive or a spreadsheet"),
        (b'{"prompt": "caf\xe9"}', ":1: not UTF-8 at byte 16 (0xe9, in Windows-1252 'é'); save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_utf8(tmp_path, data, words, packed):
    (tmp_path / "d.jsonl").write_bytes(gzip.compress(data) if packed else data)
    assert words in sentence(tmp_path / "d.jsonl")
    with pytest.raises(UserError) as error:
        check(DataConfig(str(tmp_path / "d.jsonl")))
    assert words in str(error.value) and "cannot tell" not in str(error.value)


def test_folders_and_patterns_that_name_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    assert sentence("*.json") == f"*.json: no file is called so; look at the pattern, which counts from {tmp_path}"
    assert sentence(tmp_path) == f"{tmp_path}: is a folder; give its files, {tmp_path}/*.jsonl"
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    assert "is a folder of save_to_disk; give its rows in Python" in sentence(tmp_path / "saved")
    write(tmp_path / "odd[1].jsonl", [{"prompt": "odd"}])
    assert read_examples("odd[1].jsonl", "prompts")[0].prompt == "odd"
    assert sentence(["a.jsonl", "b.jsonl"]).startswith("b.jsonl: there is no such file")
    assert "is xlsx, which is not read" in sentence(write(tmp_path / "d.xlsx", []))


def test_a_row_of_several_files_is_named_with_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in {"p10.jsonl": ["b", "", "b"], "p2.jsonl": ["c"], "p1.csv": ["a"]}.items():
        if name.endswith("csv"):
            table(tmp_path / name, [{"prompt": row} for row in rows])
        else:
            write(tmp_path / name, [{"prompt": row} if row else "" for row in rows])
    assert parts("p*") == ["p1.csv", "p10.jsonl", "p2.jsonl"]
    assert parts(("p2.jsonl", "p1*")) == ["p2.jsonl", "p1.csv", "p10.jsonl"]
    assert [row.location for row in read_examples("p*", "prompts")] == [
        *("p1.csv:2", "p10.jsonl:1", "p10.jsonl:3", "p2.jsonl:1")
    ]
    lines: list[str] = []
    write(tmp_path / "p3.jsonl", [{"prompt": None}, {"prompt": None}])
    assert check(DataConfig("p*"), echo=lines.append) == 2
    assert "  p3.jsonl:1: prompt is null; give a text or remove the row" in lines
    assert "    2 rows have this error: lines 1, 2" in lines  # all of one file
    assert "  duplicate rows: 1 (lines p10.jsonl:3 = p10.jsonl:1)" in lines
    assert sentence("p*").endswith("`rlhf-fast check 'p*' --as prompts` lists every such row")


def test_rows_in_python(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": None}]
    assert sentence(rows, "demonstrations") == "<list>:2: completion is null; give a text or remove the row"
    assert sentence(datasets.Dataset.from_list(rows), "demonstrations").startswith("<Dataset>:2: completion is null")
    cyclic: dict[str, object] = {"prompt": "a"}
    cyclic["self"] = [cyclic]
    for value, words in (
        ([rows[0], cyclic], "is a list whose row 2 contains itself; give rows that JSON could hold"),
        ([], "is an empty list; give at least one file or row, got []"),
        ([{"prompt": "a"}, "b.jsonl"], "not of both; found dict, str"),
        ({"prompt": ["a"]}, "is a dict, not rows"),
        (3, "or a datasets.Dataset, got 3"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), "give one, dataset['train']"),
        (datasets.Dataset.from_list(rows).to_iterable_dataset(), "is read as a stream"),
        (datasets.Dataset.from_list(rows).to_pandas(), 'frame.to_dict("records")'),
        (pa.Table.from_pylist(rows), "table.to_pylist()"),
    ):
        with pytest.raises(UserError, match=r"^DataConfig: path (is|must be) ") as error:
            DataConfig(path=value)
        assert words in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"^PPOConfig: data (is|must be) ") as error:
            PPOConfig(data=value)
        assert words in str(error.value)
        with pytest.raises(UserError, match=r"^data: (is|must be) "):
            read_examples(value, "prompts")
    assert as_data_path([Path("a"), "b"]) == ("a", "b") and as_data_path(["a"]) == "a"


def test_rows_in_python_are_one_text_for_settings():
    rows = [{"prompt": "p", "n": 1}, {"prompt": "q", "n": 2}]
    cfg = PPOConfig(data=rows)
    assert isinstance(cfg.data.path, PythonRows) and cfg.data.path.startswith("<list of 2 rows, sha256 ")
    assert cfg == PPOConfig(data=DataConfig(path=[dict(reversed(row.items())) for row in rows]))
    assert cfg != PPOConfig(data=rows[::-1]) and cfg != PPOConfig(data=[rows[0], {"prompt": "q", "n": 3}])
    assert SFTConfig(data=rows).data.valid_fraction == 0.05  # the stage's own default
    assert SFTConfig(data="d.jsonl").data == DataConfig("d.jsonl", valid_fraction=0.05)
    assert replace(cfg, seed=1).data.path.rows == tuple(rows)
    assert f"path: {cfg.data.path}" in to_yaml(cfg).replace("'", "").replace("\n    ", " ")
    with pytest.raises(UserError, match=r"^PPOConfig: data must be a path.* got 3$"):
        PPOConfig(data=3)


def test_rows_in_python_are_those_of_the_time_when_they_were_given():
    rows = [{"messages": [{"role": "user", "content": "p"}], "n": 1}, {"prompt": "q"}]
    cfg, text = DataConfig(rows), str(DataConfig(rows).path)
    rows[0]["messages"][0]["content"] = "changed"
    rows[1]["prompt"] = "changed"
    rows.append({"prompt": "r"})
    first, second = read_examples(cfg.path, "prompts")
    assert first.prompt == [{"role": "user", "content": "p"}] and second.prompt == "q"
    assert str(cfg.path) == text and rows_sha256(cfg.path.rows) == cfg.path.sha256  # of what is read
    assert DataConfig(rows).path != cfg.path


def test_values_that_are_not_json():
    numpy, when = (
        pytest.importorskip("numpy"),
        datasets.Dataset.from_dict({"d": [__import__("datetime").date(2020, 1, 2)]}),
    )
    assert plain({"a": numpy.int64(3), "b": numpy.array([1.5]), "c": (1, {2: None})}) == {
        "a": 3, "b": [1.5], "c": [1, {"2": None}],
    }  # fmt: skip
    assert plain(when[0]) == {"d": "2020-01-02"}
    (row,) = read_examples([{"prompt": "p", "ranks": (1, 0), "responses": ("a", "b")}], "comparisons")
    assert row.responses == ("a", "b") and row.ranks == (1, 0)
    assert DataConfig([{"p": object()}]).path == DataConfig([{"p": object()}]).path  # no address in the checksum


def test_paths_of_flags_yaml_and_run_json(tmp_path):
    cfg = stage_config(SFTConfig, ["--model.path", "m", "--data.path", "a.jsonl", "~/b.csv", "--data.valid", "v.jsonl"])
    assert cfg.data.path == ("a.jsonl", str(Path("~/b.csv").expanduser())) and cfg.data.valid == "v.jsonl"
    assert stage_config(SFTConfig, ["--data.path=a.jsonl"]).data.path == "a.jsonl"
    (tmp_path / "c.yaml").write_text("data: {path: [a.jsonl, 'p*.csv']}\nmodel.path: m\n")
    cfg = resolve(SFTConfig, read_yaml(tmp_path / "c.yaml"))
    assert cfg.data.path == ("a.jsonl", "p*.csv")
    assert (
        from_json("sft", json.loads(json.dumps({"data": {"path": ["a.jsonl", "p*.csv"]}}))).data.path == cfg.data.path
    )
    (tmp_path / "bad.yaml").write_text("data.path: 3\n")
    with pytest.raises(UserError, match=r"data\.path must be text"):
        resolve(SFTConfig, read_yaml(tmp_path / "bad.yaml"))
    for text in ("path", "valid"):
        (tmp_path / "bad.yaml").write_text(f"seed: 1\ndata.{text}: []\n")
        sentence = rf"^sft: data\.{text} is an empty list; give at least one file or row, got \[\] \(\S*bad\.yaml:2\)$"
        with pytest.raises(UserError, match=sentence):
            resolve(SFTConfig, read_yaml(tmp_path / "bad.yaml"))
        with pytest.raises(UserError, match=sentence):  # model.path has the same name in its group
            stage_config(SFTConfig, ["--config", str(tmp_path / "bad.yaml"), "--model.path", "m"])


def test_checksums_of_every_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": name}])
    found = input_checksums(SFTConfig(data=DataConfig("[ab].jsonl", valid="c.jsonl")))["data"]
    assert found.keys() == {"a.jsonl", "b.jsonl", "[ab].jsonl", "c.jsonl"}
    assert found["b.jsonl"] == sha256("b.jsonl") and len(set(found.values())) == 4
    assert input_checksums(SFTConfig(data=["b.jsonl", "a.jsonl"]))["data"]["b.jsonl, a.jsonl"] != found["[ab].jsonl"]
    assert input_checksums(SFTConfig(data=["a.jsonl", "b.jsonl"]))["data"]["a.jsonl, b.jsonl"] == found["[ab].jsonl"]
    assert input_checksums(SFTConfig(data=["a.jsonl"] * 2))["data"]["a.jsonl, a.jsonl"] != found["a.jsonl"]
    rows = SFTConfig(data=[{"prompt": "a"}])
    assert input_checksums(rows)["data"] == {str(rows.data.path): rows.data.path.sha256}


DATA = [
    {"prompt": f"{' '.join(text)} .", "completion": " ".join(text)} for text in ("ab", "cd", "efg", "ha", "bbc", "d")
]


def test_a_stage_on_rows_in_python_and_on_parquet_gives_the_weights_of_json_lines(folder, one_thread, capsys):
    base = toy.sft(folder)
    runs = {
        "lines": toy.jsonl(folder / "d.jsonl", DATA),
        "list": DATA,
        "parquet": in_form(".parquet", folder, DATA),
        "pattern": in_form("pattern", folder, DATA),
    }
    for name, data in runs.items():
        sft.run(replace(base, out=name, data=DataConfig(path=data, valid_fraction=0.3), epochs=1))
        assert toy.same_weights(folder / "lines", folder / name)
    again = replace(base, out="list", data=DataConfig(path=[dict(row) for row in DATA], valid_fraction=0.3), epochs=1)
    sft.run(again)
    assert "list is finished already" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data\.path = .<list of 6 rows, sha256 \w+>., now .<list of 5 rows"):
        sft.run(replace(again, data=replace(again.data, path=DATA[1:])))
    with pytest.raises(UserError, match=r"optim\.betas = .*, now \[0\.8, 0\.9\]"):  # a tuple that is no path
        sft.run(replace(again, optim=replace(again.optim, betas=(0.8, 0.9))))
    write(folder / "part9.jsonl", [DATA[0]])
    with pytest.raises(UserError, match=r"part\*\.jsonl: has changed since pattern was started with it"):
        sft.run(replace(again, out="pattern", data=DataConfig(path=runs["pattern"], valid_fraction=0.3)))
    moved = {"data": DataConfig(path=[str(folder / "part*.jsonl")], valid_fraction=0.3), "out": "pattern"}
    (folder / "part9.jsonl").unlink()
    sft.run(replace(again, **moved))
    assert "pattern is finished already" in capsys.readouterr().err


def test_reward_and_ppo_on_rows_in_python(folder, one_thread):
    rankings = [json.loads(line) for line in Path(toy.rankings(folder / "r.jsonl")).read_text().splitlines()]
    reward.run(replace(toy.reward(folder), out="rm", data=datasets.Dataset.from_list(rankings), epochs=1))
    saved = json.loads((folder / "rm" / "run.json").read_text())
    assert saved["config"]["data"]["path"].startswith("<Dataset of 48 rows, sha256 ")
    with pytest.raises(UserError, match=r"rows, sha256 .* stands for rows that a script gave; start the script again"):
        reward.run(replace(toy.reward(folder), out="again", data=saved["config"]["data"]["path"]))
    assert saved["data"][saved["config"]["data"]["path"]].startswith(saved["config"]["data"]["path"][-17:-1])
    cfg = toy.ppo(folder)
    ppo.run(replace(cfg, out="po", data=[{"prompt": row["prompt"]} for row in DATA], episodes=cfg.batch))
    prompts = {row["prompt"] for row in toy.rows(folder / "po" / "samples.jsonl")}
    assert prompts and prompts <= {row["prompt"] for row in DATA}


def test_a_file_may_have_rows_in_its_name(tmp_path):
    """Only the text of rows in Python, and nothing that is like it, stands for them."""
    (file := tmp_path / "<list of 3 rows, sha256 ab>.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    require_data(str(file))
    with pytest.raises(UserError, match="there is no such file"):
        require_data(str(tmp_path / "5 rows, sha256 x.jsonl"))
    text = str(PythonRows([{"prompt": "a"}], "MyDataset"))
    with pytest.raises(UserError, match="stands for rows"):
        require_data(text)
    require_data(PythonRows([{"prompt": "a"}], "MyDataset"))


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/name") == ("org/name", "", "train")
    assert hub_name("org/name:test[:10%]") == ("org/name", "", "test[:10%]") and parts("a/b:t[:3]") == ["a/b:t[:3]"]
    assert hub_name("openai/gsm8k/main:test") == ("openai/gsm8k", "main", "test")
    for name in ("rows.jsonl", "data/rows.jsonl", "data/rows.json.gz", "/data/rows", "../data/rows", "a/b/c/d", "x"):
        assert hub_name(name) is None
    (tmp_path / "org").mkdir()
    assert hub_name("org/name") is None  # the folder is meant


def test_rows_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def load(name, config=None, split=None):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": None}] if split == "bad" else [{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub.load_split.cache_clear()
    hub.split_sha256.cache_clear()
    assert read_examples("org/rows/main:test", "prompts")[0].location == "org/rows/main:test:1"
    assert sentence("org/rows:bad").startswith("org/rows:bad:2: prompt is null")
    assert calls == [("org/rows", "main", "test"), ("org/rows", None, "bad")]
    found = input_checksums(PPOConfig(data="org/rows/main:test"))["data"]
    assert found == {"org/rows/main:test": PythonRows([{"prompt": "a"}], "list").sha256}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ConnectionError("Couldn't reach 'org/rows' on the Hub (LocalEntryNotFoundError)"),
            "the hub cannot be reached",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/rows' doesn't exist"), "no such data set on the hub"),
        (ValueError("Config name is missing.\nPlease pick one among: ['main']"), "give org/rows/CONFIG:train"),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "has no split 'train'"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be loaded: Dataset scripts are no longer"),
    ],
)
def test_a_hub_that_fails_is_one_sentence(tmp_path, monkeypatch, error, words):
    monkeypatch.chdir(tmp_path)

    def load(*_args, **_options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub.load_split.cache_clear()
    level = logging.getLogger("huggingface_hub").level
    assert words in sentence("org/rows") and sentence("org/rows").startswith("org/rows: ")
    assert logging.getLogger("huggingface_hub").level == level


SHARED = {"prompt": "hi", "messages": TURNS, "score_chosen": 8.0, "score_rejected": 2.0}


def test_ultrafeedback_is_read(tmp_path):
    (row,) = read_examples([SHARED | {"chosen": TURNS, "rejected": WORSE}], "comparisons")
    assert (row.prompt, row.responses, row.ranks) == (TURNS[:1], ("yes", "no"), (0, 1))
    raw = {
        "instruction": "do",
        "completions": [
            {"model": "m", "response": text, "overall_score": score} for text, score in (("a", 3), ("b", 8.5), ("c", 3))
        ],
    }
    (row,) = read_examples([raw], "comparisons")
    assert (row.prompt, row.responses, row.ranks) == ("do", ("a", "b", "c"), (1, 0, 1))
    assert row.unused == ("completions[].model",)
    raw["completions"][1]["overall_score"] = None
    assert "completions[1].overall_score must be a number (the highest is best" in sentence([raw], "comparisons")
    del raw["completions"][1]["overall_score"]
    assert "completions[1] must have response and overall_score, found model, response" in sentence(
        [raw], "comparisons"
    )
    lines: list[str] = []
    assert check(DataConfig([SHARED | {"chosen": TURNS, "rejected": WORSE}]), echo=lines.append) == 0
    assert "read as comparisons" in lines[0]


def test_kto_is_refused_by_name():
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    assert len(read_examples(rows[:1], "demonstrations")) == 1
    text = sentence(rows, "demonstrations")
    assert text.startswith("<list>:2: label is false, which marks a bad answer (KTO's form)")
    assert "keep the rows whose label is true" in text


def test_names_of_roles():
    turns = [{"role": "User", "content": "hi"}, {"role": "ASSISTANT", "content": "yes"}]
    assert read_examples([{"messages": turns}], "demonstrations")[0].conversation == tuple(TURNS)
    turns[1]["role"] = "bot"
    text = sentence([{"messages": turns}], "demonstrations")
    assert text.endswith('found "bot"; if that is the assistant, write assistant instead')
    turns[1]["role"] = "critic"
    assert sentence([{"messages": turns}], "demonstrations").endswith('found "critic"; rename it')


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        (
            {"question": "q", "answer": "a"},
            {"demonstrations": "prompt question completion answer", "prompts": "prompt question"},
        ),
        ({"Question": "q", "Better": "a", "Worse": "b"},
         {"comparisons": "prompt Question chosen Better rejected Worse"}),
        ({"query": "q", "candidates": ["a", "b"], "order": [0, 1]},
         {"comparisons": "prompt query responses candidates ranks order"}),
        ({"dialog": TURNS}, {"demonstrations": "messages dialog"}),
        ({"body": "t"}, {"texts": "text body"}),
    ],
)  # fmt: skip
def test_check_offers_columns_that_work(tmp_path, row, flags, capsys):
    path = write(tmp_path / "d.jsonl", [row])
    assert main(["check", path]) == 2
    error = capsys.readouterr().err
    for kind, pairs in flags.items():
        assert f"--columns {pairs} reads them as {kind}" in error
        assert main(["check", path, "--columns", *pairs.split()]) == 0
        assert f"1 rows read as {kind}, 0 with errors" in capsys.readouterr().out


def test_check_offers_more_of_prompts(tmp_path):
    lines: list[str] = []
    assert check(DataConfig([{"prompt": "p", "answer": "a"}]), echo=lines.append) == 0
    assert "  --columns completion answer reads them as demonstrations" in lines


def test_check_reports_files_of_different_kinds_one_by_one(tmp_path, monkeypatch, capsys):
    """All were read as the kind that most rows had, and the rows of the others were errors."""
    monkeypatch.chdir(tmp_path)
    for kind in ("comparisons", "demonstrations"):
        write(tmp_path / f"{kind}.jsonl", ROWS[kind])
    write(tmp_path / "more.jsonl", ROWS["comparisons"])
    assert main(["check", "comparisons.jsonl", "demonstrations.jsonl", "more.jsonl"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if " rows read as " in line]
    counts = {kind: len(ROWS[kind]) for kind in ("comparisons", "demonstrations")}
    assert shown == [
        f"comparisons.jsonl, more.jsonl: {2 * counts['comparisons']} rows read as comparisons, 0 with errors",
        f"demonstrations.jsonl: {counts['demonstrations']} rows read as demonstrations, 0 with errors",
    ]


def test_check_reads_several_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    in_form(".parquet", tmp_path, ROWS["demonstrations"][:1])
    write(tmp_path / "b.jsonl", ROWS["demonstrations"][1:])
    assert main(["check", "rows.parquet", "b.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("rows.parquet, b.jsonl: 3 rows read as demonstrations, 0 with errors")
    assert main(["check", *["b.jsonl"] * 4, "--as", "prompts"]) == 0
    assert capsys.readouterr().out.startswith("b.jsonl, b.jsonl and 2 more: 8 rows read as prompts")
    assert main(["check"]) == 2
    assert "check: FILE must be given" in capsys.readouterr().err


def test_tokens_with_a_loss_have_a_colour_on_a_terminal_and_a_star_everywhere(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    tokenizer = byte_level()
    rows = read_demonstrations(DataConfig([{"prompt": "What is it?", "completion": "It is."}]), tokenizer).train
    learned = [str(token) for token in Encoder(tokenizer).response("It is.")]

    def shown(terminal: bool) -> str:
        lines: list[str] = []
        console = Console(file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None)
        echo_row(rows[0], tokenizer, lines.append, console)
        return "\n".join(lines)

    plain_text, colored = shown(False), shown(True)
    assert "\x1b" not in plain_text
    starred = [cell[1:] for cell in plain_text.split() if cell.startswith("*") and cell[1:].isdigit()]
    assert starred == learned
    assert [part.split("*")[1].split()[0] for part in colored.split("\x1b[1;32m")[1:]] == learned  # bold green
    assert colored.count("\x1b[36m") == len(rows[0].prompt)  # cyan
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(True) == plain_text
    with redirect_stdout(io.StringIO()) as out:
        check(DataConfig([{"prompt": "What is it?", "completion": "It is."}]), tokenizer=tokenizer)
    assert "\x1b" not in out.getvalue() and "* has a loss" in out.getvalue()


def test_generate_reads_another_form(folder, one_thread, capsys):
    model = toy.model_at(folder)
    options = ["--model", model, "--max-new-tokens", "4", "--out"]
    pq.write_table(pa.Table.from_pylist([{"prompt": row["prompt"]} for row in DATA]), folder / "p.parquet")
    assert main(["generate", "--prompts", "p.parquet", *options, "a.jsonl"]) == 0
    toy.jsonl(folder / "p.jsonl", [{"prompt": row["prompt"]} for row in DATA])
    assert main(["generate", "--prompts", "p.jsonl", *options, "b.jsonl"]) == 0
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["generate", "--prompts", "q*.jsonl", *options, "c.jsonl"]) == 2
    assert "q*.jsonl: no file is called so" in capsys.readouterr().err
    assert main(["sft", "--model.path", model, "--data.path", "p.jsonl", "q.csv", "--out", "run"]) == 2
    assert "q.csv: there is no such file" in capsys.readouterr().err


def test_the_loss_of_a_conversation_is_told():
    lines: list[str] = []
    check(DataConfig([{"messages": [*TURNS, *TURNS]}]), echo=lines.append)
    assert "  1 earlier answers of 1 conversations have no loss (data.turns: last)" in lines
