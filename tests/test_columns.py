"""Columns and keys: what changes the meaning of a row is served or refused, and everything that is not used is named.

No row here is one of the reports that led to these rules; each test holds at least two forms that were found by asking
what else belongs to the kind.
"""

import contextlib
import gzip
import json
import os
import random
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import toy
from test_data import CHATML, FORMATS, TURNS, byte_level, write
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data import read_comparisons, read_demonstrations, read_prompts
from rlhf_fast.data.check import check
from rlhf_fast.data.columns import COLUMNS
from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.data.json_lines import require_file
from rlhf_fast.data.rows import KINDS, parse_row, read_examples
from rlhf_fast.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ANSWER = TURNS
EARLIER = [{"role": "user", "content": "Name a sea."}, {"role": "assistant", "content": "The Red Sea."}]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}

SERVED = [
    # system: beside a prompt, a question, chosen and rejected in both forms, ranks, and a text in HH's form
    ("demonstrations", {"system": "Be brief.", "prompt": "hi", "completion": "yes"}, [SYSTEM, USER]),
    ("demonstrations", {"system": "", "prompt": "hi", "completion": "yes"}, "hi"),
    ("demonstrations", {"system": "Be brief.", "instruction": "hi", "output": "yes"}, [SYSTEM, USER]),
    ("demonstrations", {"system": "Be brief.", "messages": [SYSTEM, *TURNS]}, [SYSTEM, USER]),
    ("demonstrations", {"system": "Be brief.", "prompt": [USER], "completion": [ANSWER]}, [SYSTEM, USER]),
    ("comparisons", {"system": "Be brief.", "prompt": "hi", "chosen": "a", "rejected": "b"}, [SYSTEM, USER]),
    ("comparisons", {"system": "Be brief.", "prompt": "hi", "responses": ["a", "b"], "ranks": [0, 1]}, [SYSTEM, USER]),
    (
        "comparisons",
        {"system": "Be brief.", "chosen": TURNS, "rejected": [USER, {"role": "assistant", "content": "no"}]},
        [SYSTEM, USER],
    ),
    (
        "comparisons",
        {"system": "Be brief.", "chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
        [SYSTEM, USER],
    ),
    ("prompts", {"system": "Be brief.", "prompt": "hi"}, [SYSTEM, USER]),
    ("prompts", {"messages": [{"role": "developer", "content": "Be brief."}, USER]}, [SYSTEM, USER]),
    # history
    (
        "demonstrations",
        {"history": [["Name a sea.", "The Red Sea."]], "prompt": "hi", "response": "y"},
        [*EARLIER, USER],
    ),
    ("prompts", {"history": EARLIER, "system": "Be brief.", "prompt": "hi"}, [SYSTEM, *EARLIER, USER]),
    ("prompts", {"history": [], "prompt": "hi"}, "hi"),
    # context and input below the instruction, number and null
    ("prompts", {"instruction": "Add.", "context": "1 and 2"}, "Add.\n\n1 and 2"),
    ("prompts", {"instruction": "Round.", "input": 2.5}, "Round.\n\n2.5"),
    ("prompts", {"instruction": "Is it big?", "input": 10**20}, "Is it big?\n\n100000000000000000000"),
    ("prompts", {"instruction": "hi", "input": None, "context": "  "}, "hi"),
    ("comparisons", {"instruction": "Add.", "input": "1", "chosen": "a", "rejected": "b"}, "Add.\n\n1"),
    # the prompt as a conversation of its own, and rows that repeat it
    ("comparisons", {"conversations": [USER], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"}, [USER]),
    ("comparisons", {"messages": [SYSTEM, USER], "responses": ["a", "b"], "ranks": [0, 1]}, [SYSTEM, USER]),
    (
        "comparisons",
        {
            "prompt": "hi",
            "chosen": [SYSTEM, *TURNS],
            "rejected": [SYSTEM, USER, {"role": "assistant", "content": "no"}],
        },
        [SYSTEM, USER],
    ),
    ("demonstrations", {"prompt": "hi", "messages": [SYSTEM, *TURNS], "completion": "yes"}, [SYSTEM, USER]),
    ("prompts", {"prompt": "hi", "messages": [SYSTEM, *TURNS, USER, ANSWER]}, [SYSTEM, USER]),
    ("prompts", {"prompt": "hi", "messages": [*EARLIER, *TURNS]}, [*EARLIER, USER]),
    ("prompts", {"prompt": "Sum up: it rains.", "context": "it rains.", "instruction": "Sum up"}, "Sum up: it rains."),
    # contents in parts
    ("prompts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}]}, [USER]),
]


@pytest.mark.parametrize(("kind", "row", "prompt"), SERVED)
def test_what_changes_the_prompt_is_in_it(kind, row, prompt):
    assert parse_row(row, kind).prompt == prompt


def test_turns_keep_what_a_template_shows():
    """Tools as JSON text, flat or in OpenAI's form; calls whose arguments are text; thoughts; a tool's answer."""
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    turns = [
        {"from": "human", "value": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"from": "observation", "value": "9"},
        {"role": "assistant", "content": "Nine.", "reasoning_content": "9 is nine", "refusal": None},
    ]
    row = {"conversations": turns, "tools": json.dumps([TOOL["function"]])}
    example = parse_row(row, "demonstrations")
    assert example.tools == (TOOL,) and example.responses == ("Nine.",)
    assert [turn["role"] for turn in example.conversation] == ["user", "assistant", "tool", "assistant"]
    assert example.conversation[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1"} | CALL]}
    assert example.conversation[3]["reasoning_content"] == "9 is nine"
    assert example.prompt == [*example.conversation[:3]] and example.unused == ("conversations[].refusal",)
    assert parse_row({"prompt": "Time?", "tools": [TOOL]}, "prompts").tools == (TOOL,)
    called = parse_row({"prompt": "Time?", "completion": [turns[1]], "tools": [TOOL]}, "demonstrations")
    assert called.conversation == ({"role": "user", "content": "Time?"}, example.conversation[1])


@pytest.mark.parametrize(
    "flags", [("weight", 0, 1), ("loss", False, True), ("train", 0, True), ("masked", True, False)]
)
def test_a_turn_without_loss(flags):
    name, off, on = flags
    turns = [EARLIER[0], EARLIER[1] | {name: off}, USER, ANSWER | {name: on}]
    example = parse_row({"messages": turns}, "demonstrations")
    assert [turn.get("weight") for turn in example.conversation] == [None, 0, None, 1] and not example.unused
    with pytest.raises(InvalidRow, match="every answer has weight 0"):
        parse_row({"messages": [*turns[:3], ANSWER | {name: off}]}, "demonstrations")
    assert parse_row({"messages": turns}, "prompts").unused == (f"messages[].{name}",)
    # the answers of a prompt that has a column of its own are not learned; those of a history are
    call = ANSWER | {"tool_calls": [CALL]}
    example = parse_row({"prompt": [*EARLIER, USER], "completion": [call]}, "demonstrations")
    assert [turn.get("weight") for turn in example.conversation] == [None, 0, None, None]


REFUSED = [
    ("demonstrations", {"prompt": "p", "completion": "c", "audio": {"path": "a.wav"}}, "audio: only text"),
    ("demonstrations", {"prompt": "p", "completion": "c", "video_url": "v.mp4"}, "remove_columns: [video_url]"),
    ("demonstrations", {"prompt": "p", "completion": "c", "context": "k"}, "columns: {instruction: prompt}"),
    ("demonstrations", {"prompt": "p", "completion": "c", "input": "k"}, "input changes the row's meaning"),
    ("demonstrations", {"prompt": "p", "completion": "c", "system_prompt": "s"}, "columns: {system: system_prompt}"),
    ("demonstrations", {"prompt": "p", "completion": "c", "instruction": "i"}, "instruction changes the row's meaning"),
    ("demonstrations", {"prompt": "p", "completion": "c", "functions": [{}]}, "give it as tools"),
    ("demonstrations", {"prompt": "p", "completion": "c", "label": False}, "marks a bad answer"),
    ("demonstrations", {"prompt": "p", "completion": "c", "kto_tag": False}, "marks a bad answer"),
    ("demonstrations", {"prompt": "p", "completion": "c", "weight": 0}, "weight is 0"),
    ("demonstrations", {"prompt": "p", "completion": "c", "response": "d"}, "completion and response differ"),
    ("demonstrations", {"messages": TURNS, "completion": "c"}, "completion is no answer of the conversation"),
    ("demonstrations", {"messages": TURNS, "prompt": "other"}, "prompt changes the row's meaning"),
    (
        "demonstrations",
        {"messages": TURNS, "history": [["a", "b", "c"]]},
        "history[0] must be a list of [question, ans",
    ),
    ("demonstrations", {"messages": [SYSTEM, *TURNS], "system": "Be long."}, "system and the conversation's own"),
    ("demonstrations", {"instruction": "i", "input": ["k"], "output": "o"}, "input must be text, found a list"),
    ("demonstrations", {"instruction": "i", "input": True, "output": "o"}, "input must be text, found true or false"),
    ("demonstrations", '{"instruction": "i", "input": NaN, "output": "o"}', "input must be text, found NaN"),
    ("demonstrations", {"instruction": "i", "input": "a", "context": "b", "output": "o"}, "context changes the row"),
    ("demonstrations", {"prompt": "p", "completion": "\u200b\ufeff \u3164"}, "only characters that cannot be seen"),
    ("demonstrations", {"messages": [USER | {"images": ["a.png"]}, ANSWER]}, "messages[0].images changes"),
    ("demonstrations", {"messages": [USER | {"name": "Zoe"}, ANSWER]}, "remove_columns: [messages[].name]"),
    ("demonstrations", {"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "give it as tool_calls"),
    ("demonstrations", {"messages": [USER | {"weight": 1}, ANSWER]}, "a loss on a turn of the user"),
    ("demonstrations", {"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight must be 0 or 1, found 0.5"),
    ("demonstrations", {"messages": [USER, ANSWER | {"weight": 1, "loss": False}]}, "contradict each other"),
    ("demonstrations", {"messages": [USER, ANSWER | {"loss_scale": 2}]}, "messages[1].loss_scale changes"),
    (
        "demonstrations",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, ANSWER]},
        "messages[0].content[0] must be text, found image_url",
    ),
    ("demonstrations", {"conversations": [{"from": "function_call", "value": "{}"}]}, "give the call as tool_calls"),
    ("demonstrations", {"prompt": "p", "completion": "c", "choices": ["a", "b"]}, "choices changes the row's meaning"),
    ("demonstrations", {"prompt": "p", "completion": str(TURNS[1:])}, "completion is text that spells a list of turns"),
    ("prompts", {"prompt": json.dumps(TURNS[:1])}, "prompt is text that spells a list of turns"),
    ("demonstrations", {"messages": TURNS, "tools": "no"}, "tools must be JSON"),
    ("demonstrations", {"messages": TURNS, "tools": [{"description": "d"}]}, "tools[0] must be a function with a name"),
    (
        "demonstrations",
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        'the key "content" is given twice',
    ),
    (
        "comparisons",
        '{"prompt": "p", "chosen": "a", "rejected": "b", "id": {"k": 1, "k": 2}}',
        'the key "k" is given twice',
    ),
    ("comparisons", {"post": "x y", "chosen": "x a", "rejected": "x b"}, "set columns: {prompt: post}"),
    ("comparisons", {"Query": "x", "id": "7", "chosen": "x a", "rejected": "x b"}, "set columns: {prompt: Query}"),
    ("comparisons", {"prompt": "p", "chosen": "a", "rejected": "b", "messages": TURNS}, "messages changes the row"),
    (
        "comparisons",
        {"prompt": "p", "chosen": [ANSWER | {"tool_calls": [CALL]}], "rejected": "b"},
        "chosen has tool_calls, which no comparison can have",
    ),
    ("comparisons", {"instruction": "i", "completions": [{"response": "a"}]}, "converts UltraFeedback's rows"),
    ("prompts", {"prompt": "p", "messages": TURNS}, "prompt is no user's turn of the conversation"),
    ("prompts", {"prompt": "p", "documents": ["d"]}, "documents changes the row's meaning"),
    ("texts", {"text": "t", "image": "a.png"}, "image: only text"),
]


@pytest.mark.parametrize(("kind", "row", "sentence"), REFUSED)
def test_what_cannot_be_served_is_refused(tmp_path, kind, row, sentence):
    path = write(tmp_path / "d.jsonl", [row])
    with pytest.raises(UserError) as error:
        read_examples(path, kind)
    assert sentence in str(error.value) and str(error.value).startswith(f"{path}:1: ")


def json_value(rng: random.Random, depth: int = 0) -> object:
    """Return some JSON: texts that mean something to a format, numbers beyond int64, NaN, turns, lists."""
    texts = (
        "a",
        "b",
        "",
        " ",
        "[]",
        "{}",
        "\u200b",
        "user",
        "\n\nHuman: hi\n\nAssistant: a",
        "\ud800",
        "[{'role': 'x'}]",
    )
    kind = rng.randrange(10)
    if kind < 5 or depth > 3:
        return rng.choice([*texts, 0, 1, True, False, 2.5, float("nan"), 10**400, None])
    if kind < 8:
        return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    turn = {
        "role": rng.choice(["user", "assistant", "system", "tool", "x", ["a"]]),
        "content": json_value(rng, depth + 1),
    }
    return turn | {rng.choice(KEYS): json_value(rng, depth + 1) for _ in range(rng.randrange(3))}


KEYS = [
    "name",
    "tools",
    "reasoning",
    "thinking",
    "loss_mask",
    "channel",
    "function_call",
    "content",
    "prefix",
    "role",
    "from",
    "value",
    "weight",
    "train",
    "masked",
    "tool_calls",
    "tool_call_id",
    "x",
]
NAMES = [
    *COLUMNS,
    "question",
    "docs",
    "sys",
    "meta",
    "label",
    "weight",
    "mask",
    "reasoning",
    "completion",
    "response",
    "input",
    "conversations",
    "images",
    "\n",
]


def test_any_json_gives_an_example_or_one_sentence():
    rng = random.Random(0)
    served = 0
    for _ in range(1500):
        row = rng.choice([{}, *(case[1] for case in FORMATS)])
        row = row | {rng.choice(NAMES): json_value(rng) for _ in range(rng.randrange(3))}
        columns = {rng.choice(COLUMNS): rng.choice(NAMES)} if rng.random() < 0.2 else {}
        for kind in KINDS:
            try:
                example = parse_row(row, kind, columns, removed=rng.sample(NAMES, 2))
            except InvalidRow as error:
                assert "\n" not in str(error) and str(error).encode()
                continue
            served += 1
            assert all(name in row or "[" in name for name in example.unused)
            assert isinstance(example.prompt, str) or example.prompt[-1]["role"] in ("user", "tool")
    assert served > 100


def test_a_column_may_be_left_out_or_mapped():
    row = {"prompt": "p", "completion": "c", "context": "k", "images": ["a.png"]}
    example = parse_row(row, "demonstrations", removed=("images", "context"))
    assert example[1:3] == ("p", ("c",)) and example.unused == ("context", "images")
    example = parse_row(row, "demonstrations", {"instruction": "prompt"}, removed=("images",))
    assert example.prompt == "p\n\nk"
    row = {"messages": [USER | {"name": "Zoe"}, ANSWER]}
    assert parse_row(row, "demonstrations", removed=("messages[].name",)).unused == ("messages[].name",)
    # `system` and the like may be missing in some rows; a mapped column is not seen under its own name
    columns = {"system": "sys", "prompt": "q", "completion": "prompt"}
    assert parse_row({"q": "hi", "prompt": "yes"}, "demonstrations", columns)[1:3] == ("hi", ("yes",))
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 9, 4.5]}
    assert parse_row(row, "comparisons").ranks == (2, 0, 1)


def test_every_unused_column_is_named_in_check_and_in_the_stages_note(tmp_path):
    turns = [USER | {"id": 1}, ANSWER]
    rows = [{"messages": turns, "topic": "a"}, {"messages": TURNS, "topic": None, "n": float("nan")}]
    path = write(tmp_path / "d.jsonl", rows)
    lines: list[str] = []
    assert check(DataConfig(path), echo=lines.append) == 0
    named = "not used: topic (2 of 2 rows), messages[].id (1 of 2 rows), n (1 of 2 rows)"
    assert f"  {named}" in lines
    assert named in read_demonstrations(DataConfig(path), byte_level(CHATML)).train.notes
    assert (
        "not used"
        not in read_prompts(DataConfig(write(tmp_path / "p.jsonl", [{"prompt": "p"}])), byte_level()).train.notes
    )
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9}]
    notes = read_comparisons(DataConfig(write(tmp_path / "c.jsonl", pairs)), byte_level()).train.notes
    assert "not used: score_chosen (1 of 1 rows)" in notes


def test_the_answers_of_a_prompt_have_no_loss(tmp_path):
    """Nor with data.turns: all: the column of the response says what is learned."""
    rows = [{"prompt": [*EARLIER, USER], "completion": completion} for completion in ("yes", [ANSWER])]
    data = read_demonstrations(DataConfig(write(tmp_path / "d.jsonl", rows), turns="all"), byte_level(CHATML)).train
    assert [byte_level().decode(row.responses[0]) for row in data.rows] == ["yes<|im_end|>"] * 2


@pytest.mark.parametrize(("turns", "learned"), [("last", "c<|im_end|>"), ("all", "b<|im_end|>c<|im_end|>")])
def test_check_marks_the_turns_that_have_a_loss(tmp_path, turns, learned):
    answers = [{"role": "assistant", "content": "a", "weight": 0}, *({"role": "assistant", "content": c} for c in "bc")]
    rows = [{"messages": [turn for answer in answers for turn in (USER, answer)]}]
    rows.append({"messages": [*rows[0]["messages"], USER, answers[0]], "tools": []})
    lines: list[str] = []
    cfg = DataConfig(write(tmp_path / "d.jsonl", rows), turns=turns)
    tokenizer = byte_level(CHATML)
    assert check(cfg, tokenizer=tokenizer, echo=lines.append) == 0
    marked = [cell for line in lines for cell in line.split() if cell.startswith("*") and cell[1:].isdigit()]
    assert tokenizer.decode([int(cell[1:]) for cell in marked]) == learned
    assert any("3 earlier answers of 2" in line for line in lines) == (turns == "last")
    assert any("1 whose last answer has weight 0" in line for line in lines) == (turns == "last")


def test_rows_that_are_rendered_already(tmp_path):
    """Prompts of Llama 2 and Gemma, messages whose content begins with a marker; no question about markers."""
    for prompt, completion in (
        ("[INST] Say 1 [/INST]", "It is 1."),
        ("<start_of_turn>user\nSay 1<end_of_turn>\n<start_of_turn>model\n", "It is 1.<end_of_turn>"),
        ([{"role": "user", "content": "<|im_start|>user\nSay 1"}], "It is 1."),
    ):
        cfg = DataConfig(write(tmp_path / "d.jsonl", [{"prompt": prompt, "completion": completion}] * 2))
        with pytest.raises(UserError, match="2 of 2 rows hold the markers of a chat template already"):
            read_demonstrations(cfg, byte_level(CHATML))
        lines: list[str] = []
        assert check(cfg, tokenizer=byte_level(CHATML), echo=lines.append) == 2
        assert "2 of 2 rows hold the markers" in "\n".join(lines)
        lines.clear()
        assert check(cfg, echo=lines.append) == 0 and "spelled out in the text" in "\n".join(lines)
    asked = {"prompt": "What does <|im_end|> mean?", "completion": "It ends a turn."}
    cfg = DataConfig(write(tmp_path / "d.jsonl", [asked]))
    assert "(they stay text): <|im_end|> 1 times, lines 1" in read_demonstrations(cfg, byte_level(CHATML)).train.notes
    # without a chat template, a marker that the tokenizer does not know may be meant: it is named
    cfg = DataConfig(write(tmp_path / "d.jsonl", [{"prompt": "[INST] Say 1 [/INST]", "completion": "It is 1."}]))
    assert "(they stay text): [INST] 1 times, [/INST] 1 times" in read_demonstrations(cfg, byte_level()).train.notes


def test_unknown_tokens_are_counted(tmp_path):
    """By a tokenizer that names its unknown token, by one that hides it in its model, and by one that drops letters."""
    named, hidden = toy.tokenizer(), PreTrainedTokenizerFast(tokenizer_object=toy.tokenizer().backend_tokenizer)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    dropping = PreTrainedTokenizerFast(tokenizer_object=letters)
    for rows, tokenizer, sentence in (
        (["a b", "a Ω b 你好"], named, "2 of 7 tokens (28.6%) are unknown to the tokenizer (<unk>)"),
        (["a b", "a Ω b 你好"], hidden, "2 of 6 tokens (33.3%) are unknown to the tokenizer (<unk>)"),
        (["ab", "aéb"], dropping, "1 of 5 characters are dropped by the tokenizer: é"),
        (["a b", "a b"], named, ""),
    ):
        path = write(tmp_path / "d.jsonl", [{"prompt": rows[0], "completion": rows[1]}])
        cfg = DataConfig(path, append_eos=tokenizer is named)
        lines: list[str] = []
        check(cfg, tokenizer=tokenizer, echo=lines.append)
        for text in ("\n".join(lines), read_demonstrations(cfg, tokenizer).train.notes):
            assert sentence in text and (sentence or "unknown to" not in text)


@pytest.mark.parametrize("form", ["pipe", "gzip pipe", "fifo", "gzip without its suffix"])
def test_check_reads_a_stream_once(tmp_path, form):
    """As in `cat FILE | rlhf-fast check /dev/stdin`."""
    rows = "".join(json.dumps({"prompt": f"question {i}", "completion": "a"}) + "\n" for i in range(3000)).encode()
    data = gzip.compress(rows) if "gzip" in form else rows
    path = tmp_path / "rows"
    with contextlib.ExitStack() as stack:
        if form.endswith("pipe"):
            read_end, write_end = os.pipe()
            stack.callback(os.close, read_end)
            path, opened = Path(f"/dev/fd/{read_end}"), partial(os.fdopen, write_end, "wb")
        else:
            opened = partial(path.open, "wb")
            if form == "fifo":
                os.mkfifo(path)

        def write_all() -> None:
            with opened() as stream:
                stream.write(data)

        writer = threading.Thread(target=write_all, daemon=True)
        writer.start()
        if form.startswith("gzip without"):
            writer.join()
        lines: list[str] = []
        assert check(DataConfig(str(path)), echo=lines.append) == 0
        assert "3000 rows read as demonstrations, 0 with errors" in lines[0] and "  different prompts: 3000" in lines


def test_a_stage_refuses_a_pipe(tmp_path):
    """It reads its data again when it goes on after a stop."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/null"):
        with pytest.raises(UserError, match="is no file but a pipe or device"):
            require_file(path)


def test_names_that_are_no_file(tmp_path):
    for name in ("Tell me " * 40, "a\0b", str(tmp_path / "d.jsonl" / "x")):
        (tmp_path / "d.jsonl").touch()
        with pytest.raises(UserError, match="there is no such file"):
            read_examples(name, "prompts")


PAIR = {"prompt": "p", "completion": "c"}
WORSE = {"prompt": "p", "chosen": "a", "rejected": "b"}
# Beside each form of the reports stand two of our own or more: spellings, other libraries' names, nested columns.
MEANINGFUL = [
    # masks and flags, of rows and of turns
    *(("demonstrations", PAIR | {key: value}) for key, value in [("mask", [0, 1]), ("loss_mask", 0), ("loss", 0)]),
    *(("demonstrations", PAIR | {key: value}) for key, value in [("train", False), ("isMasked", True), ("skip", True)]),
    *(("demonstrations", PAIR | {key: value}) for key, value in [("trainable", "false"), ("learn", 0), ("no_loss", 1)]),
    *(("demonstrations", PAIR | {key: value}) for key, value in [("label", 0), ("label", "false"), ("ktoTag", "No")]),
    ("demonstrations", PAIR | {"lossScale": 0.5}),
    *(
        ("demonstrations", {"messages": [USER, ANSWER | {key: value}]})
        for key, value in [
            *[("train_on_turn", False), ("trainable", False), ("is_masked", True), ("learnable", "no")],
            *[("channel", "analysis"), ("recipient", "functions.clock"), ("end_turn", False), ("tokenMask", [1, 0])],
        ]
    ),
    ("comparisons", WORSE | {"chosen": [ANSWER | {"weight": 0}]}),
    ("comparisons", WORSE | {"rejected": {"role": "assistant", "content": "b", "train": False}}),
    ("comparisons", WORSE | {"margin": 2.5}),
    # thoughts where none can be read, and settings of the rendering
    *(("demonstrations", PAIR | {key: "r"}) for key in ("rationale", "Complex_CoT", "chainOfThought", "thoughts")),
    ("comparisons", WORSE | {"reasoning": "r"}),
    ("demonstrations", {"messages": TURNS, "thinking": "r"}),
    ("demonstrations", PAIR | {"chat_template_kwargs": {"enable_thinking": False}}),
    *(("demonstrations", PAIR | {key: False}) for key in ("enable_thinking", "enableThinking")),
    ("prompts", {"prompt": "p", "reasoning_effort": "high"}),
    # spellings of what belongs to the prompt
    *(("demonstrations", PAIR | {key: "k"}) for key in ("instructions", "inputs", "contexts", "ctxs", "docs", "Hint")),
    *(("prompts", {"prompt": "p", key: ["k"]}) for key in ("retrieved_context", "paragraph", "goldEvidence", "table")),
    *(("prompts", {"prompt": "p", key: "k"}) for key in ("systemPrompt", "sys", "developer", "system_instruction")),
    *(("prompts", {"prompt": "p", key: ["k"]}) for key in ("img", "picture", "photoUrls", "few_shot_examples")),
    *(
        ("demonstrations", PAIR | {"meta": meta})
        for meta in ({"system": "s"}, {"images": ["i"]}, {"a": {"tools": [1]}})
    ),
]


@pytest.mark.parametrize(("kind", "row"), MEANINGFUL)
def test_no_spelling_escapes(kind, row):
    with pytest.raises(InvalidRow) as error:
        parse_row(row, kind)
    name = re.search(r"remove_columns: \[(.*)\]$", str(error.value))[1]
    assert name in parse_row(row, kind, removed=(name,)).unused


def test_metadata_is_merely_named():
    """Nothing here is a report: names that hold a word of a rule, flags that say yes, thoughts beside a prompt."""
    columns = {
        **{"category": "a", "source": "s", "id": 1, "url": "u", "language": "en", "score": 0, "reward": -1.5},
        **{
            "operating_system": "x",
            "image_count": 2,
            "context_length": 8,
            "train": True,
            "loss": 2.25,
            "masked": False,
        },
        **{"weight": 1, "loss_mask": 1, "label": 2, "labels": "x", "question_type": "why", "num_examples": 3},
        **{"meta": {"source": "s", "label": 0, "tags": ["a"], "split": "train"}, "mascot": "m", "apricot": "a"},
    }
    example = parse_row(PAIR | columns, "demonstrations")
    assert example[1:3] == ("p", ("c",)) and set(example.unused) == set(columns)
    assert parse_row({"prompt": "p", "rationale": "r", "train": False}, "prompts").unused == ("rationale", "train")
    keys = {"channel": "final", "train": True, "is_masked": False, "id": 1}
    assert parse_row({"messages": [USER, ANSWER | keys]}, "demonstrations").responses == ("yes",)


def test_a_thought_is_the_reasoning_content_of_the_answer():
    """Not among the reports: a mapped column, a turn's `thinking`, two thoughts that differ, a history's weights."""
    for row, columns in (
        (PAIR | {"reasoning": "r"}, {}),
        (PAIR | {"thinking": "r", "reasoning_content": "r"}, {}),
        (PAIR | {"Complex_CoT": "r"}, {"reasoning_content": "Complex_CoT"}),
        ({"instruction": "p", "output": {"role": "assistant", "content": "c", "thinking": "r"}}, {}),
        ({"messages": [USER, ANSWER | {"reasoning": "r"}]}, {}),
    ):
        example = parse_row(row, "demonstrations", columns)
        assert example.conversation[-1]["reasoning_content"] == "r" and not example.unused
    for row in (
        PAIR | {"reasoning": "r", "thinking": "s"},
        PAIR | {"completion": [ANSWER | {"thinking": "s"}], "reasoning": "r"},
    ):
        with pytest.raises(InvalidRow, match="one thought"):
            parse_row(row, "demonstrations")
    history = [EARLIER[0], EARLIER[1] | {"weight": 0}]
    assert parse_row(PAIR | {"history": history}, "demonstrations").conversation[1]["weight"] == 0


def test_ranks_and_scores_must_agree():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]}
    assert parse_row(row | {"scores": [9, 2, 1]}, "comparisons").ranks == (0, 1, 1)
    for scores in ([1, 2, 3], [9, 9.5, 1], [9, 1], "9 2 1"):
        with pytest.raises(InvalidRow, match=r"remove_columns: \[scores\]"):
            parse_row(row | {"scores": scores}, "comparisons")


def test_a_label_beside_chosen_and_rejected_is_no_prompt():
    pair = {"chosen": "Say it: a", "rejected": "Say it: b"}
    for column in ({"category": "animals"}, {"source": "stackexchange"}, {"topic": "food", "rater": "Ann"}):
        assert parse_row(pair | column, "comparisons").prompt == "Say it:"
    for column in ({"user_query": "x"}, {"note": "How is it said?"}, {"essay": "long " * 20}, {"Question": "x"}):
        with pytest.raises(InvalidRow, match=f"set columns: {{prompt: {next(iter(column))}}}"):
            parse_row(pair | column, "comparisons")


def test_names_that_no_row_has_and_lines_that_are_no_rows(tmp_path):
    path = write(tmp_path / "d.jsonl", [PAIR | {"": 1, "hint": "h"}])
    cfg = DataConfig(path, remove_columns=("hint", "hnit", "messages[].name"))
    lines: list[str] = []
    assert check(cfg, echo=lines.append) == 0
    sentence = "remove_columns names what no row has: hnit, messages[].name"
    assert f"  {sentence}" in lines and '  not used: "" (1 of 1 rows), hint (1 of 1 rows)' in lines
    assert sentence in read_demonstrations(cfg, byte_level()).train.notes
    (tmp_path / "d.jsonl").write_text("\n{'prompt': 1}\n[1]\n")
    with pytest.raises(UserError, match=r"d\.jsonl:2: not JSON: .* at column 2; .* \(none of the 2 rows can be read\)"):
        check(DataConfig(path), echo=lines.append)


def test_a_file_of_no_lines(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"d\.jsonl: the file holds no rows; expected rows with prompt"):
        check(DataConfig(str(tmp_path / "d.jsonl")), echo=print)
