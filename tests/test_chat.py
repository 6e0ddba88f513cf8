"""`rlhf-fast chat`: its answers, prompts and log-probabilities are Rollout's and transformers'; and what is shown."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fast.batches import EOS, STOP, Prompts
from rlhf_fast.cli.conversation import Answer, Conversation, Exchange, ending
from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import ModelConfig, SamplingConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.text_stream import TextStream

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
pytestmark = pytest.mark.usefixtures("one_thread")


def byte_tokenizer(template=None):
    """Return a tokenizer with a token for each byte, so that many characters take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<|end|>", "<|start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", chat_template=template)


def byte_model(folder, template=CHATML, positions=256):
    """Write a random model of bytes; return the folder's name."""
    words = byte_tokenizer(template)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=positions, vocab_size=len(words), eos_token_id=words.eos_token_id, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Give lines to the command as a pipe does; return its exit status, standard output and standard error."""

    def run(model, lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        status = main(["chat", str(model), *map(str, flags)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def rollout_answer(model, prompt, **sampling):
    """Return the text that Rollout samples after the tokens of a prompt, and its log-probabilities at temperature 1."""
    loaded = Model.load(ModelConfig(str(model)), device="cpu")
    ids = loaded.tokenizer(prompt, add_special_tokens=False).input_ids
    responses = Rollout(loaded, SamplingConfig(**sampling)).generate(Prompts([0], [ids], [prompt]))
    return responses.texts(loaded.tokenizer)[0], responses


def rendered(model, turns):
    words = byte_tokenizer(CHATML)
    return words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def turns_of(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_greedy_answers_are_those_of_rollout_on_the_chat_template_of_the_history(tmp_path, talk):
    model = byte_model(tmp_path / "model")
    greedy = {"temperature": 0.0, "max_new_tokens": 9}
    first, _ = rollout_answer(model, rendered(model, turns_of("Hi")), **greedy)
    second, _ = rollout_answer(model, rendered(model, turns_of("Hi", first, "Why?")), **greedy)
    alone, _ = rollout_answer(model, rendered(model, turns_of("Why?")), **greedy)
    assert second != alone  # the history is read
    status, out, err = talk(model, ["Hi", "Why?"], "--temperature", 0, "--max-new-tokens", 9)
    assert status == 0 and out == f"{first.lstrip()}\n{second.lstrip()}\n"
    assert "template: chat" in err and err.count("cut at 9 tokens") == 2

    system = [{"role": "system", "content": "Be brief."}]
    answered, _ = rollout_answer(model, rendered(model, system + turns_of("Hi")), **greedy)
    flags = ("--temperature", 0, "--max-new-tokens", 9)
    assert talk(model, ["Hi"], *flags, "--system", "Be brief.")[1] == f"{answered.lstrip()}\n"
    lines = ["Hi", "/clear", "/system Be brief.", "Hi", "/undo", "/system", "Hi"]
    assert talk(model, lines, *flags)[1] == "".join(f"{text.lstrip()}\n" for text in (first, answered, first))


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the stories260K folder")
def test_a_model_without_template_continues_each_message(talk):
    text = "Once upon a time"
    loaded = Model.load(ModelConfig(str(STORIES)), device="cpu")
    expected = Rollout(loaded, SamplingConfig(temperature=0.0, max_new_tokens=20)).generate([text])
    (answer,) = expected.texts(loaded.tokenizer)
    status, out, err = talk(STORIES, [text, text], "--temperature", 0, "--max-new-tokens", 20)
    assert status == 0 and out == f"{answer}\n{answer}\n"
    assert err.count("this model continues texts") == 1
    status, _, err = talk(STORIES, ["Hi"], "--system", "Be brief.")
    assert status == 2 and "error: chat: --system: the format of prompts is plain, which has no system turn" in err


def test_dialog_is_hh_text_and_its_stop_text_is_not_printed(tmp_path, talk):
    model = byte_model(tmp_path / "model", template=None)
    prompt = "Human: Hi\n\nAssistant:"
    whole, _ = rollout_answer(model, prompt, temperature=0.0, max_new_tokens=12)
    stop = whole[4:6]
    flags = ("--template", "dialog", "--temperature", 0, "--max-new-tokens", 12)
    assert talk(model, ["Hi"], *flags)[1] == f"{whole.lstrip()}\n"
    status, out, err = talk(model, ["Hi"], *flags, "--stop", stop)
    assert status == 0 and out == whole[: whole.find(stop)].lstrip() + "\n" and "cut at" not in err


def test_an_empty_answer_is_said():
    sampling = SamplingConfig()
    assert ending(Answer(" \n", [1], [0.0], EOS), sampling) == "the answer is empty: the model ended at once"
    assert ending(Answer(" \n", [5, 5, 7], [0.0] * 3, STOP), sampling) == "the answer is empty"
    assert ending(Answer("a", [5, 1], [0.0, 0.0], EOS), sampling) == ""


def test_regenerate_draws_another_sample_that_the_seed_gives_again(tmp_path, talk):
    model = byte_model(tmp_path / "model")
    runs = {seed: talk(model, ["Hi", "/regenerate"], "--seed", seed, "--max-new-tokens", 8)[1]
            for seed in (3, 4)}  # fmt: skip
    assert talk(model, ["Hi", "/regenerate"], "--seed", 3, "--max-new-tokens", 8)[1] == runs[3] != runs[4]
    both = runs[3]
    first = talk(model, ["Hi"], "--seed", 3, "--max-new-tokens", 8)[1]
    assert both.startswith(first) and both != first + first
    _, out, err = talk(model, ["Hi", "/regenerate"], "--temperature", 0, "--max-new-tokens", 8)
    assert out[: len(out) // 2] == out[len(out) // 2 :] and "at temperature 0 it is the same answer" in err


def test_regenerate_replaces_the_answer(tmp_path, talk, folder):
    model = byte_model(tmp_path / "model")
    _, out, _ = talk(
        model, ["Hi", "/regenerate", "/save a.jsonl", "/undo", "Yo", "/save b.jsonl"], "--max-new-tokens", 6
    )
    (row,) = map(json.loads, Path("a.jsonl").read_text().splitlines())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert out.find(row["messages"][1]["content"].lstrip()) > 0
    (row,) = map(json.loads, Path("b.jsonl").read_text().splitlines())
    assert row["messages"][0]["content"] == "Yo" and len(row["messages"]) == 2
    status, _, err = talk(model, ["Hi", "/save a.jsonl"], "--max-new-tokens", 2)
    assert status == 2 and err.endswith("chat: a.jsonl: exists already; give another name\n")


def test_logprobs_are_those_of_transformers(tmp_path, talk):
    model = byte_model(tmp_path / "model")
    flags = ("--temperature", 0.7, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 10)
    out = talk(model, ["Hi", "/logprobs"], *flags)[1]
    shown = [float(number) for number in re.findall(r"^ +(-?\d+\.\d{4})  \"", out, flags=re.M)]
    loaded = Model.load(ModelConfig(model), device="cpu")
    prompt = loaded.tokenizer(rendered(model, turns_of("Hi")), add_special_tokens=False).input_ids
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=10)
    (ids,) = Rollout(loaded, sampling, seed=5).generate(Prompts([0], [prompt], [""])).response_ids()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([prompt + ids])).logits[0]
    truth = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert len(shown) == len(ids) > 1
    torch.testing.assert_close(torch.tensor(shown), truth, rtol=0, atol=1e-4)
    assert f"{len(ids)} tokens, {truth.sum():.3f}" in out.replace(f"{truth.sum():.4f}", f"{truth.sum():.3f}")


def test_a_history_that_does_not_fit_loses_its_first_turns_and_says_so(tmp_path, talk):
    model = byte_model(tmp_path / "model", positions=120)
    greedy = {"temperature": 0.0, "max_new_tokens": 9}
    messages = ["a" * 12, "b" * 12, "c" * 12]
    first, _ = rollout_answer(model, rendered(model, turns_of(messages[0])), **greedy)
    second, _ = rollout_answer(model, rendered(model, turns_of(messages[0], first, messages[1])), **greedy)
    words = byte_tokenizer(CHATML)
    kept = rendered(model, turns_of(messages[1], second, messages[2]))
    everything = rendered(model, turns_of(messages[0], first, messages[1], second, messages[2]))
    assert len(words(kept).input_ids) <= 120 - 9 < len(words(everything).input_ids)
    third, _ = rollout_answer(model, kept, **greedy)
    status, out, err = talk(model, messages, "--temperature", 0, "--max-new-tokens", 9)
    assert status == 0 and out == "".join(f"{text.lstrip()}\n" for text in (first, second, third))
    assert err.count("the first 1 message and the answers to them are left out") == 1

    status, out, err = talk(model, ["d" * 200], "--max-new-tokens", 9)
    assert status == 2 and "over the 111 that max_new_tokens 9 leaves of 120 positions" in err
    assert "an answer has at most 60 tokens" in talk(model, [], "--max-new-tokens", 500)[2]


def test_messages_over_several_lines_and_with_a_slash(tmp_path, talk):
    model = byte_model(tmp_path / "model")
    greedy = {"temperature": 0.0, "max_new_tokens": 5}
    flags = ("--temperature", 0, "--max-new-tokens", 5)
    for lines, message in ((["a\\", "b"], "a\nb"), (["//help"], "/help"), (["", "  ", "x"], "x"), (["x\\"], "x")):
        expected, _ = rollout_answer(model, rendered(model, turns_of(message)), **greedy)
        assert talk(model, lines, *flags)[1] == f"{expected.lstrip()}\n"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["/regenrate"], "chat: no command /regenrate; did you mean /regenerate?"),
        (["/regenerate"], "chat: there is no answer yet; write a message first"),
        (["/logprobs"], "chat: there is no answer yet"),
        (["/undo"], "chat: there is no answer yet"),
        (["/undo all"], "chat: /undo takes no argument; write /undo alone"),
        (["a", "/save"], "chat: /save needs a file"),
        (["a", "/save no/such/folder"], "chat: no/such/folder: No such file or directory; look at the path"),
        (["a\ud800b"], "chat: the message"),
    ],
)
def test_bad_input_of_a_script_is_one_sentence_and_ends_it(tmp_path, talk, lines, sentence):
    model = byte_model(tmp_path / "model")
    status, _, err = talk(model, [*lines, "never read"], "--max-new-tokens", 2)
    assert status == 2 and sentence in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_of_an_answer_do_not_reach_a_terminal(tmp_path, talk, monkeypatch, is_terminal):
    chunks = ["a\x1b[2Jb\r", "\n", "c\td\x9b\re", "\u202ef\x1b]0;t\x07", "g\r"]
    tokens = byte_tokenizer()("a\x7f").input_ids

    def ask(self, message, show, prompt):
        for chunk in chunks:
            show(chunk)
        answer = Answer("".join(chunks), tokens, [-1.0] * len(tokens), EOS)
        self.exchanges.append(Exchange(message, answer))
        return answer

    model = byte_model(tmp_path / "model")
    monkeypatch.setattr(Conversation, "ask", ask)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    status, out, _ = talk(model, ["Hi"])
    shown = "a\ufffd[2Jb\nc\td\ufffd\ufffde\ufffdf\ufffd]0;t\ufffdg\n"
    assert status == 0 and out == (shown if is_terminal else "".join(chunks) + "\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)  # no colours, which are sequences of ours
    status, out, err = talk(model, ["H\x9b\u2028\x1bi", "/logprobs", "/undo"])
    assert status == 0 and '  "a"\n' in out and '  "\\u007f"\n' in out
    assert r'forgotten: "H\u009b\u2028\u001bi" and its answer' in err


def test_input_that_is_not_utf8_is_named_in_the_c_locale_too(tmp_path, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")  # as of C.UTF-8
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", byte_model(tmp_path / "model"), "--max-new-tokens", "2"]) == 2
    assert "error: chat: standard input is not UTF-8; convert it" in capsys.readouterr().err


def test_help_and_exit(tmp_path, talk):
    status, out, _ = talk(byte_model(tmp_path / "model"), ["/help", "/exit", "never read"])
    assert status == 0 and all(
        f"/{name}" in out for name in ["regenerate", "logprobs", "undo", "clear", "system", "save", "exit"]
    )


def chunks_of(words, ids, stops=(), stop=""):
    stream = TextStream(words, stops)
    chunks = [stream.push(token) for token in ids]
    return [*chunks, stream.finish(stop)], stream


def test_a_stream_gives_whole_characters_and_together_the_decoded_text():
    words = byte_tokenizer()
    for text in ("a\u00e4\u20ac\U0001f600b", "\u4f60\u597d \u2028", "plain"):
        ids = words(text).input_ids
        chunks, stream = chunks_of(words, ids)
        assert "".join(chunks) == stream.text == text and "\ufffd" not in "".join(chunks[:-1])
        assert chunks[0] == ("a" if text[0] == "a" else "p" if text[0] == "p" else "")  # a byte alone is no character
    ids = [*words("ab\U0001f600").input_ids[:-1], words.eos_token_id]
    chunks, stream = chunks_of(words, ids)
    assert "".join(chunks) == stream.text == words.decode(ids, skip_special_tokens=True)


def test_a_stream_holds_back_what_may_be_a_stop_text():
    words = byte_tokenizer()
    stops = ("STOP", "TO")
    chunks, stream = chunks_of(words, words("a ST b STOP").input_ids, ("STOP",), "STOP")
    assert "".join(chunks) == stream.text == "a ST b "
    assert chunks[2:5] == ["", "", "ST "]  # held back until it was none
    chunks, _ = chunks_of(words, words("xSTO").input_ids, stops, "TO")
    assert "".join(chunks) == "xS"
    chunks, _ = chunks_of(words, words("xSTO").input_ids, stops)  # the response ended by its length instead
    assert "".join(chunks) == "xSTO"
    chunks, _ = chunks_of(words, words("STOP it STOP").input_ids, ("STOP",), "STOP")  # the first before min_new_tokens
    assert "".join(chunks) == "STOP it "


def test_a_stop_text_twice_in_the_last_token_is_cut_once_for_screen_and_conversation():
    class Words:
        def decode(self, tokens, skip_special_tokens):
            return "".join(["Hello", "\n\n", "aaa"][token] for token in tokens)

    for ids, stop in (([0, 1], "\n"), ([0, 1, 1], "\n"), ([0, 2], "aa")):
        chunks, stream = chunks_of(Words(), ids, (stop,), stop)
        assert "".join(chunks) == stream.text == ("Hello\n\n" if len(ids) == 3 else "Hello")


class Blanks:
    """A tokenizer whose blanks before a full stop are gone only in a text of more than three words."""

    def decode(self, tokens, skip_special_tokens):
        text = " ".join("abcd."[token] for token in tokens)
        return text.replace(" .", ".") if len(tokens) > 3 else text


def test_a_stream_ends_with_the_whole_text_of_a_tokenizer_that_changes_blanks():
    chunks, stream = chunks_of(Blanks(), [0, 4, 1, 2], ("c", "d"), "c")
    assert "".join(chunks) == "a . b " and stream.text == "a. b "
    chunks, stream = chunks_of(Blanks(), [0, 4, 1, 2], ("cd",))
    assert "".join(chunks) == "a . b c" and stream.text == "a. b c"


@pytest.mark.parametrize("path", ["fused", "attention", "transformers"])
def test_a_rollout_hands_out_its_tokens_as_it_samples_them(tmp_path, path):
    model = Model.load(ModelConfig(byte_model(tmp_path / "model")), device="cpu")
    rollout = Rollout(model, SamplingConfig(max_new_tokens=7, batch=2), seed=2, decode_path=path)
    tokens, logprobs = {}, {}

    def receive(responses, sampled, sample):
        for response, token, logprob in zip(responses.tolist(), sampled.tolist(), sample.raw_logprobs, strict=True):
            tokens.setdefault(response, []).append(token)
            logprobs.setdefault(response, []).append(float(logprob))

    responses = rollout.generate(["ab", "c", "def"], samples=2, on_tokens=receive)
    assert [tokens[i] for i in range(6)] == responses.response_ids()
    for i, row in logprobs.items():
        torch.testing.assert_close(torch.tensor(row), responses.raw_logprobs[i, : len(row)], rtol=0, atol=0)


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=env,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def until(self, wanted, seconds=120.0):
        """Read until the text since the last call matches; return that text."""
        end = time.monotonic() + seconds
        while not re.search(wanted, self.text):
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"no {wanted!r} in {self.text!r}")
            try:
                new = os.read(self.master, 4096)
            except OSError:  # the other end is closed
                new = b""
            assert new, f"the process ended without {wanted!r}: {self.text!r}"
            self.text += new.decode(errors="replace")
        found, self.text = self.text, ""
        return found

    def press(self, key, wanted):
        """Press a key, as a person does again where nothing follows: readline misses a signal that comes just before it
        waits for the next key."""
        for _ in range(3):
            self.send(key)
            with contextlib.suppress(TimeoutError):
                return self.until(wanted, 5)
        self.send(key)
        return self.until(wanted)

    def send(self, text):
        os.write(self.master, text.encode())


def test_a_terminal_shows_tokens_as_they_come_and_control_c_stops_the_answer(tmp_path):
    model = byte_model(tmp_path / "model", positions=100_000)
    tokens = ("--max-new-tokens", "90000", "--min-new-tokens", "90000")
    terminal = Terminal(sys.executable, "-m", "rlhf_fast", "chat", model, *tokens)
    try:
        assert "/help lists the commands" in terminal.until(r"> $")
        terminal.send("Hi\n")
        terminal.until(r"Hi\r\n[\s\S]{20}")  # long before the answer's end
        assert terminal.process.poll() is None
        terminal.send("\x03")
        stopped = terminal.until(r"chat: stopped\r\n> $")
        assert "Traceback" not in stopped
        terminal.send("/logprobs\n")
        shown = terminal.until(r"(\d+) tokens?, .* at temperature 1\r\n> $")
        assert 1 <= int(re.search(r"(\d+) tokens?, ", shown).group(1)) < 90000
        terminal.send("half a line")
        terminal.until("half a line")
        terminal.press("\x03", r"\n> $")  # at the prompt it drops the line
        terminal.send("/nothing\n")
        terminal.until(r"chat: no command /nothing; [\s\S]*> $")  # and the conversation goes on
        terminal.send("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.master)


def test_the_package_runs_as_a_module(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-m", "rlhf_fast", "--version"], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and run.stdout.startswith("rlhf-fast ")
    run = subprocess.run([sys.executable, "-m", "rlhf_fast", "chat"], capture_output=True, text=True, env=env)
    assert run.returncode == 2 and run.stderr.startswith("rlhf-fast: error: chat: MODEL must be given")
