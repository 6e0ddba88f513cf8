"""Chat templates: prompt and response begin the template's own rendering; text stays text; runs keep their format."""

import json
import random
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import toy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_fast.batches import Demonstrations, pad_rows
from rlhf_fast.config.fields import DataConfig, ModelConfig
from rlhf_fast.data import read_demonstrations
from rlhf_fast.data.datasets import encode_example, join_demonstrations
from rlhf_fast.data.encode import Encoder, template_end
from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.data.rows import parse_row
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.run import prompt_format as formats
from rlhf_fast.run.prompt_format import model_prompt_format
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.training.losses import sft_loss

MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|user|>", "<|bot|>", "<call>", "</call>")
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
THINKING = (  # shows a thought in the last answer alone, and takes it from the content too
    "{% for m in messages %}{% if m.role != 'assistant' %}" + TURN + "{% else %}{% set text = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}<|im_end|>\n{% endif %}{% endfor %}"
    + OPEN
)
FORGETFUL = (  # opens a thought, and drops it from every answer
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|bot|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
SPEAKERS = (
    "A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
INST = (
    "{% if messages[0].role == 'system' %}{% set s = '<<' + messages[0].content + '>> ' %}{% else %}{% set s = '' %}"
    "{% endif %}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "[INST] {{ (s if loop.first else '') + m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SERVED = {
    "chatml": CHATML,
    "no generation prompt": CHATML.removesuffix(OPEN),
    "a thought in the last answer": THINKING,
    "a thought that the prompt opens": THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    "a thought that is dropped": FORGETFUL,
    "speakers": SPEAKERS + "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "speakers, no generation prompt": SPEAKERS,
    "a space before the answer": INST,
    "strips contents": CHATML.replace("m.content", "m.content | trim"),
    "strips answers": CHATML.replace("m.content", "(m.content | trim if m.role == 'assistant' else m.content)"),
    "a default system turn": "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    + CHATML,
    "always a generation prompt": CHATML.removesuffix(OPEN) + "<|im_start|>assistant\n",
    "a document ends": CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "refuses a system turn": "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML,
    "text before the end": CHATML.replace("{{ m.content }}", "{{ m.content }}\n###"),
}
REFUSED = {
    "no end": (CHATML.replace("<|im_end|>", ""), "ends an answer with no token"),
    "an end between two turns alone": (
        CHATML.replace("<|im_end|>", "{% if not loop.last %}{{ eos_token }}{% endif %}").replace("<|im_start|>", "#"),
        "ends an answer with no token",
    ),
    "the answer before the question": (
        "{% for m in messages[::-1] %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "changes a question once it is answered",
    ),
    "the last turn alone": ("{{ messages[-1].content }}{{ eos_token }}", "changes a question once it is answered"),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "leaves out",
    ),
    "random": (CHATML + "{{ range(10000) | random }}", "renders one conversation in two ways"),
}


def tokenizer(template=None, special=True, flags=None, normalizer=None, markers=MARKERS):
    """Return a tokenizer of bytes; `markers` are added tokens, special or not, with flags such as rstrip."""
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer:
        inner.normalizer = normalizer
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    add = inner.add_special_tokens if special else inner.add_tokens
    add([AddedToken(name, special=special, normalized=normalizer is not None, **(flags or {})) for name in markers])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", chat_template=template)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content} | fields


def encoded(words, row, kind="demonstrations", **settings):
    return encode_example(
        parse_row(row, kind), kind, Encoder(words, settings.get("template", "auto")), DataConfig("x", **settings)
    )


def learned(words, row):
    """Return the row as text, its tokens with a loss in brackets."""
    ids, mask = row.responses[0], row.loss_mask or [True] * len(row.responses[0])
    text = words.decode(row.prompt)
    for i, (token, loss) in enumerate(zip(ids, mask, strict=True)):
        before = mask[i - 1] if i else False
        text += ("[" if loss and not before else "]" if before and not loss else "") + words.decode([token])
    return text + ("]" if mask[-1] else "")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("answer", ["yes", " yes\n", "a\n\nb <b>"])
def test_prompt_and_response_begin_the_rendering_of_the_conversation(name, special, answer):
    """Members of our own choice: thoughts that a prompt opens or an answer drops, speakers, stripped contents."""
    words = tokenizer(SERVED[name], special)
    encoder, turns = Encoder(words), [user("hi"), assistant("ho"), user("why?")]
    for prompt in (turns[:1], turns):
        whole = words.apply_chat_template([*prompt, assistant(answer)], tokenize=False)
        ids, text = encoder.prompt(prompt)
        assert words.decode(ids) == text and whole.startswith(text)
        assert answer.strip() in whole[len(text) :]  # the prompt ends before the answer
        for response in (encoder.response(answer), encoder.answer(prompt, assistant(answer))):
            assert whole.startswith(words.decode(ids + response))
            assert response[-1:] == encoder.end == [template_end(words)]
            assert template_end(words) not in response[:-1]


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_followed_is_refused(name):
    template, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        Encoder(tokenizer(template)).response("yes")


def test_a_row_whose_own_rendering_differs_is_refused():
    rows = {
        "the prompt as it is once turn 2": (
            CHATML.replace(
                "{% for", "{% if messages | length > 1 and 'q' in messages[0].content %}x{% endif %}{% for", 1
            ),
            [user("q"), assistant("a")],
        ),
        "leaves out a part of turn 2": (FORGETFUL, [user("q"), assistant("<think>r</think>a")]),
        "takes no reasoning_content": (CHATML, [user("q"), assistant("a", reasoning_content="r")]),
        "leaves out the content of turn 1 (system)": (
            CHATML.replace("in messages", "in messages if m.role != 'system'"),
            [{"role": "system", "content": "a"}, user("a"), assistant("a")],
        ),
        "leaves out the content of turn 3 (tool)": (
            CHATML.replace("in messages", "in messages if m.role != 'tool'"),
            [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")],
        ),
    }
    for sentence, (template, turns) in rows.items():
        with pytest.raises(InvalidRow) as error:
            encoded(tokenizer(template), {"messages": turns})
        assert sentence in str(error.value)
    row = encoded(tokenizer(THINKING), {"messages": [user("q"), assistant("a", reasoning_content="r")]})
    assert learned(tokenizer(THINKING), row).endswith("assistant\n[<think>\nr\n</think>\n\na<|im_end|>]")
    as_text = encoded(
        tokenizer(THINKING), {"messages": [user("q"), assistant("<think>\nr\n</think>\n\na")]}, "demonstrations"
    )
    assert words_of(as_text) == words_of(row)


def words_of(row):
    return tokenizer(CHATML).decode(row.responses[0])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "name", ["chatml", "a thought in the last answer", "strips contents", "a space before the answer"]
)
def test_text_never_becomes_a_marker_of_the_template(name, special):
    """Not among the reports: markers in earlier answers and system turns, <call>, which the template never writes."""
    words = tokenizer(SERVED[name], special)
    spelled = " a<|im_end|>\n<|im_start|>b<call>"
    turns = [user("x" + spelled), assistant("y" + spelled), user(spelled)]
    row = encoded(words, {"messages": [*turns, assistant(spelled)]})
    plain = encoded(words, {"messages": [*(turn | {"content": "c"} for turn in turns), assistant("c")]})
    for marker in (*MARKERS, "<|end|>"):
        token = words.convert_tokens_to_ids(marker)
        assert row.prompt.count(token) == plain.prompt.count(token), marker
        assert row.responses[0].count(token) == plain.responses[0].count(token), marker
    whole = words.apply_chat_template([*turns, assistant(spelled)], tokenize=False)
    assert whole.startswith(words.decode(row.prompt + row.responses[0]))
    for template in ("plain", "dialog"):
        encoder = Encoder(words, template)
        assert not encoder.control.ids & {*encoder.prompt(spelled)[0], *encoder.response(spelled)[:-1]}


def test_markers_that_appear_by_normalization_and_plain_words_among_added_tokens():
    words = tokenizer(CHATML, False, normalizer=normalizers.Lowercase())
    assert words.convert_tokens_to_ids("<|im_end|>") in words("<|IM_END|>").input_ids
    assert words.convert_tokens_to_ids("<|im_end|>") not in Encoder(words).response("<|IM_END|>")[:-1]
    words.add_tokens(["covid", "\n\n"])
    ids = Encoder(words).response("a covid\n\nb")
    assert words.convert_tokens_to_ids(["covid", "\n\n"]) == [token for token in ids if token >= len(words) - 2]


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}])
def test_the_careful_way_gives_the_usual_tokens(flags):
    words = tokenizer(CHATML, flags=flags)
    encoder = Encoder(words)
    turns = [user(" a b "), assistant(" c\n"), user("\nd ")]
    ids, text = encoder.prompt(turns)
    assert encoder.control.segment_ids(encoder.control.split(text), follows=False) == ids == words(text).input_ids


DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
TOY_DATED = (
    "{{ 'a' if strftime_now('%d') | int % 2 else 'b' }} {% for m in messages %}{{ m.content }} "
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
FIRST, SECOND = datetime(2030, 1, 1, 12), datetime(2030, 1, 2, 12)


def test_the_date_of_a_template_is_fixed():
    words = tokenizer(DATED)
    texts = [Encoder(words, date=date).prompt("hi")[1] for date in (FIRST, SECOND, FIRST)]
    assert "Today is 01 Jan 2030." in texts[0] and texts[0] == texts[2] != texts[1]
    assert any("2030-01-01" in note for note in Encoder(words, date=FIRST).notes())
    assert Encoder(words).prompt("hi") == Encoder(words).prompt("hi")  # the date at which the process first asked
    given = "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    assert Encoder(tokenizer(given + CHATML), date=FIRST).prompt("hi")[1].startswith("2030<|im_start|>")
    assert not Encoder(tokenizer(CHATML)).chat.shows_date


def dated_model(folder: Path, template: str = TOY_DATED) -> str:
    """Return the folder of a toy model whose chat template writes one letter on the first of a month, else another."""
    path = toy.model_at(folder)
    words = toy.tokenizer()
    words.chat_template = template
    words.save_pretrained(path)
    return path


def on(monkeypatch, date: datetime) -> None:
    monkeypatch.setattr(formats, "process_start", lambda: date)


@pytest.mark.slow
def test_a_resumed_run_and_later_stages_keep_the_date(folder, one_thread, monkeypatch, capsys):
    dated_model(folder)
    on(monkeypatch, FIRST)
    sft.run(toy.sft(folder, "whole"))
    cfg = toy.sft(folder, "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "step_terms", failing_after(4, sft.step_terms))
        with pytest.raises(KeyError):
            sft.run(cfg)
    on(monkeypatch, SECOND)
    sft.run(cfg)
    assert toy.same_weights(folder / "whole", folder / "stopped")
    assert json.loads((folder / "stopped/run.json").read_text())["template"]["date"] == "2030-01-01T12:00:00"
    reward.run(toy.reward(folder, model=ModelConfig(str(folder / "whole"))))
    ppo.run(toy.ppo(folder, policy=ModelConfig(str(folder / "whole")), reward=str(folder / "reward"), episodes=16))
    for run in ("reward", "ppo", "ppo/ema"):
        assert formats.recorded_format(str(folder / run))["date"] == "2030-01-01T12:00:00"
    assert toy.rows(folder / "ppo/samples.jsonl")[0]["prompt"].startswith("a ")
    words = AutoTokenizer.from_pretrained(folder / "ppo")
    asked, _ = model_prompt_format(str(folder / "ppo"), words, "auto", "template", strict=False)
    assert Encoder(words, *asked[:1], date=asked.date).prompt("c .")[1].startswith("a ")
    assert "it is 2030-01-01 in this run" in capsys.readouterr().err


def test_run_json_binds_kind_date_and_tokens(tmp_path):
    """Quick form of the two tests above and below, without runs. Not among the reports: another added token."""
    words = tokenizer(DATED)
    section = formats.as_json(words, formats.PromptFormat("chat", FIRST))
    assert section["date"] == FIRST.isoformat()
    parts = {"stage": "sft", "config": {}, "data": {}, "versions": {}, "machine": {}}
    for folder in ("run", "run/ema"):
        words.save_pretrained(tmp_path / folder)
        (tmp_path / "run/run.json").write_text(json.dumps(parts | {"template": section}))
        found, notes = model_prompt_format(str(tmp_path / folder), words, "auto", "data.template", strict=True)
        assert found == ("chat", FIRST) and not notes
        with pytest.raises(UserError, match=r"data.template is dialog, but the run that wrote .* had chat"):
            model_prompt_format(str(tmp_path / folder), words, "dialog", "data.template", strict=True)
        found, notes = model_prompt_format(str(tmp_path / folder), words, "dialog", "data.template", strict=False)
        assert found.template == "dialog" and len(notes) == 1
    for changed in (tokenizer(CHATML), tokenizer(DATED, markers=("<|x|>", *MARKERS))):
        with pytest.raises(UserError, match="has changed: one conversation gives other tokens"):
            model_prompt_format(str(tmp_path / "run"), changed, "auto", "data.template", strict=True)
    (tmp_path / "run/run.json").write_text('{"of": "another program"}')
    assert model_prompt_format(str(tmp_path / "run"), words, "auto", "data.template", strict=True)[1] == []


def test_a_recipe_with_two_forms_of_prompts_is_refused_before_its_first_stage(folder, one_thread):
    dated_model(folder, CHATML)
    cfg = toy.sft(folder, data=replace(toy.sft(folder).data, template="dialog"))
    scored = toy.reward(folder, model=ModelConfig(str(folder / "sft")))
    last = toy.ppo(folder, policy=ModelConfig(str(folder / "sft")), reward=str(folder / "reward"))
    words = toy.tokenizer()
    words.chat_template = CHATML
    formats.check_planned_format(last, words, [cfg, scored])
    for stage, earlier, sentence in (
        (replace(last, data=replace(last.data, template="chat")), [cfg, scored], r"ppo: data.template is chat, but"),
        (replace(scored, data=replace(scored.data, template="plain")), [cfg], r"reward: data.template is plain, but"),
        (last, [cfg, replace(scored, model=cfg.model)], r"learns prompts in another form than dialog"),
    ):
        with pytest.raises(UserError, match=sentence):
            formats.check_planned_format(stage, words, earlier)


def failing_after(steps, function):
    def counted(*args):
        if args[-1] > steps:
            raise KeyError("stopped")
        return function(*args)

    return counted


@pytest.mark.slow
def test_later_stages_follow_the_template_of_the_model(folder, one_thread, capsys):
    """Not among the reports: a reward model after sft, or of another form; a changed tokenizer; an old run.json."""
    dated_model(folder, TOY_DATED.replace("strftime_now('%d')", "'1'"))
    data = toy.sft(folder).data
    sft.run(toy.sft(folder, data=replace(data, template="dialog"), epochs=1, pretrain_fraction=0.0))
    start = ModelConfig(str(folder / "sft"))
    ppo.run(toy.ppo(folder, policy=start, episodes=16))
    assert toy.rows(folder / "ppo/samples.jsonl")[0]["prompt"].startswith("Human: ")
    with pytest.raises(UserError, match=r"ppo: data.template is chat, but the run that wrote .*sft had dialog"):
        ppo.run(toy.ppo(folder, "other", policy=start, data=replace(toy.ppo(folder).data, template="chat")))
    cfg = toy.reward(folder, model=start, epochs=1)
    with pytest.raises(UserError, match=r"data.template is chat and demonstrations.template is dialog"):
        reward.run(
            replace(
                cfg,
                data=replace(cfg.data, template="chat"),
                demonstrations=replace(cfg.demonstrations, template="dialog"),
            )
        )
    reward.run(toy.reward(folder, "chat_reward", epochs=1))  # from the base model: its chat template
    with pytest.raises(UserError, match=r"chat_reward\) learns prompts in another form than dialog"):
        ppo.run(toy.ppo(folder, "other", policy=start, reward=str(folder / "chat_reward")))
    capsys.readouterr()
    sft.run(toy.sft(folder, "again", model=start, data=replace(data, template="chat"), epochs=1, pretrain_fraction=0.0))
    assert "data.template is chat, but the run that wrote" in capsys.readouterr().err
    section = json.loads((folder / "again/run.json").read_text())
    assert section["template"]["kind"] == "chat" and section["template"]["date"] is None

    changed = folder / "changed"
    shutil.copytree(folder / "again", changed)
    words = AutoTokenizer.from_pretrained(changed)
    words.chat_template = words.chat_template.replace("{{ m.content }}", "d {{ m.content }}")
    words.save_pretrained(changed)
    with pytest.raises(UserError, match="the tokenizer or its chat template has changed: one conversation gives other"):
        ppo.run(toy.ppo(folder, "other", policy=ModelConfig(str(changed)), episodes=16))
    old = {name: value for name, value in section.items() if name != "template"}
    del old["config"]["data"]["turns"]
    (changed / "run.json").write_text(json.dumps(old))
    assert formats.recorded_format(str(changed)) == {"kind": "chat"}
    ppo.run(toy.ppo(folder, "other", policy=ModelConfig(str(changed)), episodes=16))


LONG = [user("a1"), assistant("b1"), user("a2"), assistant("b2", weight=0), user("a3"), assistant("b3")]


def test_every_answer_has_a_loss_with_its_end_token_and_nothing_else_has():
    """Not among the reports: weights between answers, tools, HH's form, templates without a generation prompt."""
    words, row = tokenizer(CHATML), {"messages": [{"role": "system", "content": "S"}, *LONG]}
    last, everything = (encoded(words, row, turns=turns) for turns in ("last", "all"))
    assert learned(words, last).count("[") == 1 and last.loss_mask == ()
    assert learned(words, everything) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na1<|im_end|>\n<|im_start|>assistant\n[b1<|im_end|>]\n"
        "<|im_start|>user\na2<|im_end|>\n<|im_start|>assistant\nb2<|im_end|>\n<|im_start|>user\na3<|im_end|>\n"
        "<|im_start|>assistant\n[b3<|im_end|>]"
    )
    assert everything.prompt + everything.responses[0] == last.prompt + last.responses[0]
    inst = encoded(tokenizer(INST), {"messages": LONG}, turns="all")
    assert (
        learned(words, inst)
        == "[INST] a1 [/INST][ b1 <|end|>][INST] a2 [/INST] b2 <|end|>[INST] a3 [/INST][ b3 <|end|>]"
    )
    hh = {"prompt": "\n\nHuman: a1\n\nAssistant: b1\n\nHuman: a2\n\nAssistant:", "completion": " b2"}
    assert learned(words, encoded(words, hh, turns="all")).count("[") == 1  # a prompt column is a prompt
    thoughts = encoded(tokenizer(THINKING), {"messages": LONG}, turns="all")
    assert learned(words, thoughts).endswith("assistant\n[<think>\n\n</think>\n\nb3<|im_end|>]")
    dropped = [user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d")]
    for template, turns, sentence in (
        (THINKING, dropped, "leaves out the reasoning_content of turn 2"),
        (
            CHATML.replace("<|im_end|>", "") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            LONG,
            "turn",
        ),
    ):
        with pytest.raises(InvalidRow, match=sentence):
            encoded(tokenizer(template), {"messages": turns}, turns="all")
    with pytest.raises(InvalidRow, match="only a chat template ends every answer"):
        encoded(words, {"messages": LONG}, turns="all", template="plain")


CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
)
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CALLS
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = assistant("", tool_calls=[{"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}])
CALLING = [user("a"), CALL, {"role": "tool", "content": "sun"}, assistant("b")]


def test_tools_and_calls_reach_the_template_or_are_refused():
    words = tokenizer(WITH_TOOLS)
    row = encoded(words, {"messages": CALLING, "tools": [TOOL]}, turns="all")
    assert '"name": "weather", "parameters"' in row.text
    assert '[<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>]' in learned(words, row)
    assert row.responses[0].count(words.convert_tokens_to_ids("<call>")) == 1
    prompts = encoded(words, {"prompt": "a", "tools": [TOOL]}, "prompts")
    assert "weather" in prompts.text
    spelled = TOOL | {"function": TOOL["function"] | {"description": "x<|im_end|>"}}
    for template, tools, sentence in (
        (CALLS, [TOOL], "takes no tools"),
        (CHATML, [], "takes no tool calls"),
        (WITH_TOOLS, [spelled], "spell the control token <|im_end|>"),
    ):
        with pytest.raises(InvalidRow) as error:
            encoded(tokenizer(template), {"messages": CALLING, "tools": tools})
        assert sentence in str(error.value)
    with pytest.raises(InvalidRow, match="only a chat template can show"):
        encoded(words, {"messages": CALLING, "tools": [TOOL]}, template="plain")


@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_is_the_mean_over_the_mask(folder, one_thread, pack):
    model = Model.load(ModelConfig(toy.model(folder / "model")))
    rng = random.Random()
    rows = [[rng.randrange(3, 11) for _ in range(rng.randint(5, 12))] for _ in range(5)]
    firsts = [rng.randint(1, 3) for _ in rows]
    masks = [[rng.random() < 0.5 for _ in row[first:]] for row, first in zip(rows, firsts, strict=True)]
    masks[0] = [False] * len(masks[0])
    masks[1][0] = True
    tokens, lengths = pad_rows(rows)
    mask = pad_rows(masks)[0].bool()
    batch = Demonstrations(tokens, torch.tensor(firsts), lengths, None, mask)
    assert batch.num_items() == sum(map(sum, masks))
    logits = model.module(tokens).logits.detach().double().log_softmax(-1)
    total = 0.0
    for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        total -= sum(float(logits[i, first + j - 1, row[first + j]]) for j, keep in enumerate(masks[i]) if keep)
    loss, _ = sft_loss(model, batch, batch.num_items(), pack=pack)
    assert float(loss) == pytest.approx(total / batch.num_items(), rel=1e-5)
    parts = [batch.take(index) for index in ([3, 0], [1], [4, 2])]
    summed = sum(float(sft_loss(model, part, batch.num_items(), pack=pack)[0]) for part in parts)
    assert summed == pytest.approx(float(loss), rel=1e-5)


def test_rows_without_a_loss_are_left_out_and_batches_have_the_mask(tmp_path):
    words = tokenizer(CHATML)
    unlearned = [user("a"), assistant("b"), user("c"), assistant("d", weight=0)]
    path = toy.jsonl(
        tmp_path / "d.jsonl", [{"messages": LONG}, {"messages": unlearned}, {"prompt": "p", "completion": "c"}]
    )
    data = read_demonstrations(DataConfig(path), words).train
    assert len(data) == 2 and "1 whose last answer has weight 0" in data.notes
    assert "2 earlier answers of 2 conversations have no loss (data.turns: last)" in data.notes
    every = read_demonstrations(DataConfig(path, turns="all"), words).train
    assert "earlier answers" not in every.notes
    assert [sum(row.loss_mask or [True] * len(row.responses[0])) for row in every.rows] == [6, 2, 2]
    batch = join_demonstrations(every.rows, [0, 1, 2])
    assert batch.loss_mask.sum(1).tolist() == [6, 2, 2] and batch.num_items() == 10


BAD_SECTIONS = ([], "x", None, 5, {"kind": 5}, {"kind": "chat", "date": "soon"}, {"kind": "chat", "date": 7})
BAD_SECTIONS += ({"kind": "chat", "tokens": 5}, {"date": "2030-01-01"}, {"kind": ["chat"]}, {"kind": "auto"})


@pytest.mark.parametrize("section", BAD_SECTIONS, ids=str)
def test_a_broken_template_in_run_json_is_a_sentence(tmp_path, section):
    """Members with 5, 7, tokens, a list and auto were not reported."""
    parts = {"stage": "sft", "config": {}, "data": {}, "versions": {}, "machine": {}}
    (tmp_path / "run.json").write_text(json.dumps(parts | {"template": section}))
    with pytest.raises(
        UserError, match=r"run\.json: its `template` is not what a run of ours writes; put .* or remove"
    ):
        formats.recorded_format(str(tmp_path))
    with pytest.raises(UserError, match=r"its `template` is not"):
        formats.bind_prompt_format(RunAt(tmp_path), "x", tokenizer(), {"data": DataConfig("x")})


class RunAt:
    stage, manifest, notes = "sft", {}, []

    def __init__(self, out: Path):
        self.out = out


CUT = {
    "cuts what users say": "m.content[:12] if m.role == 'user' else m.content",
    "leaves a word out": "m.content | replace('IMPORTANT', '')",
    "changes what the system says": "m.content | upper if m.role == 'system' else m.content",
    "keeps the first line of a tool": "m.content.split('\n')[0] if m.role == 'tool' else m.content",
}


@pytest.mark.parametrize("name", CUT)
def test_a_template_that_changes_a_turn_is_refused(name):
    """The last two are not among the reports. Stripped blanks, a thought left out and a tool's JSON are no change."""
    words = tokenizer(CHATML.replace("m.content", f"({CUT[name]})"))
    said = [{"role": "system", "content": "Be brief."}, user("IMPORTANT: is it cold there?"), assistant("a")]
    said += [{"role": "tool", "content": "9\n8"}, assistant("yes")]
    for kind, row in (("demonstrations", {"messages": said}), ("prompts", {"prompt": said[:-1]})):
        with pytest.raises(InvalidRow, match="leaves out the content of turn"):
            encoded(words, row, kind)
    kept = [user(" why?\n"), assistant("<think>r</think>a"), {"role": "tool", "content": '{"a":  1}'}, assistant("b")]
    template = CHATML.replace("m.content", "(m.content.split('</think>')[-1] | trim)")
    assert encoded(tokenizer(template), {"messages": kept}).prompt


def test_a_conversation_is_rendered_and_split_once_for_all_its_answers(monkeypatch):
    """With data.turns: all the whole conversation; each answer's prompt is rendered too."""
    words, encoder = tokenizer(CHATML), Encoder(tokenizer(CHATML))
    turns = [turn for i in range(9) for turn in (user(f"q{i}"), assistant(f"a{i}"))]
    counts = {"render": 0, "segments": 0, "require_kept": 0}
    encoder.all_answers(turns)

    def count(name, function):
        def counted(*args, **settings):
            counts[name] += 1
            return function(*args, **settings)

        monkeypatch.setattr(encoder.chat, name, counted)

    for name in counts:
        count(name, getattr(encoder.chat, name))
    found = encoder.all_answers(turns)
    assert counts == {"render": 1 + 9, "segments": 1, "require_kept": 2}
    assert words.decode(found.prompt + found.response) == encoder.chat.render(turns).rstrip()
