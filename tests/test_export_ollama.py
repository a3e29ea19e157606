"""The Modelfile keeps to Ollama's grammar, and its Go template writes what the model's own Jinja writes."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from adapters import random_adapter

import edgetune
from edgetune.export import ollama, verify
from edgetune.export.go_template import Derived, derive, evaluate
from edgetune.export.job import Job, UserFile
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import UsageError
from edgetune.runtime.generation_config import SamplingSettings
from edgetune.runtime.templates import ChatTemplate
from edgetune.runtime.tokenizer import Tokenizer

pytest.importorskip("gguf")
DEMO = Path(edgetune.__file__).parent / "demo"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for m in messages %}"
JINJA = {
    "demo": (DEMO / "chat_template.jinja").read_text(),
    "chatml": LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2.5": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama-2": "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    "zephyr": LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "mistral-1": "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}",
    "mistral-3": "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}",
    "braces": LOOP + "{{ '{{' + m.role + '}} ' + m.content + '\n' }}{% endfor %}{{ '{{assistant}}' }}",
}
INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
INTEGERS = {"num_ctx", "num_predict", "repeat_last_n", "seed", "top_k"}
NUMBERS = {"temperature", "top_p", "min_p", "repeat_penalty"}
WORD = re.compile(r"[ \t]*(?:#[^\n]*|([A-Za-z]+)[ \t]+)?", re.ASCII)


def parse(text: str) -> list[tuple[str, str]]:
    """Parse a Modelfile as its reference describes it into (instruction, arguments). Raises ValueError if it is not one.

    A line is a comment, or an instruction and its arguments: bare to the line's end, in quotes, or in triple quotes over
    several lines. FROM must be there; PARAMETER takes a name it knows and a value.
    """
    found, at = [], 0
    while at < len(text):
        line = WORD.match(text, at)
        assert line is not None
        at = line.end()
        if line[1]:
            instruction = line[1].upper()
            if instruction not in INSTRUCTIONS:
                raise ValueError(f"no instruction {instruction}")
            prefix = ""
            if instruction == "PARAMETER":
                prefix, at = text[at : text.index(" ", at)] + " ", text.index(" ", at) + 1
                if prefix.strip() not in {"stop", *INTEGERS, *NUMBERS}:
                    raise ValueError(f"no parameter {prefix}")
            if text.startswith('"""', at):
                end = text.index('"""', at + 3)
                value, at = text[at + 3 : end], end + 3
            else:
                end = text.find("\n", at) if "\n" in text[at:] else len(text)
                value, at = text[at:end].strip(), end
                if value.startswith('"'):
                    if len(value) < 2 or not value.endswith('"'):
                        raise ValueError("a quote that does not end")
                    value = value[1:-1]
            found.append((instruction, prefix + value))
        if at < len(text) and text[at] != "\n":
            raise ValueError("something after an instruction's arguments")
        at += 1
    if "FROM" not in dict(found):
        raise ValueError("no FROM")
    return found


def derived(name: str, bos: str = "") -> Derived:
    found = derive(ChatTemplate(JINJA[name], name, TOKENS).render, bos)
    assert found is not None, name
    return found


@pytest.mark.parametrize("name", JINJA)
def test_the_go_template_writes_what_the_jinja_writes(name: str) -> None:
    """Uses conversations that derive() itself never sees."""
    found, jinja = derived(name), ChatTemplate(JINJA[name], name, TOKENS)
    said = ["What is a lens?", "It bends light.", "And a mirror\n(say, a flat one)?", "It throws it back.", "Thanks! {ok}"]
    for count in (1, 3, 5):
        for system in ([], [{"role": "system", "content": "Answer in one line.\nNo lists."}] if found.takes_system else []):
            roles = ("user", "assistant") * 3
            turns = [{"role": role, "content": text} for role, text in zip(roles, said[:count], strict=False)]
            assert evaluate(found.source, [*system, *turns]) == jinja.render([*system, *turns])
    assert found.takes_system == (name != "mistral-1")


def test_ollamas_own_bos_is_left_to_it() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert evaluate(derived("llama-2").source, chat).startswith("<s>[INST] a")
    without = evaluate(derived("llama-2", bos="<s>").source, chat)
    assert without == "[INST] a [/INST] b </s><s>[INST] c [/INST]"


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ messages[0].content | upper }}",  # alters a message
        "{{ messages[-1].content }}{{ messages | length }}",  # leaves out earlier messages
        LOOP + "{{ m.content + m.content }}{% endfor %}",  # repeats a message
        LOOP + "{{ m.role + loop.index | string + m.content }}{% endfor %}",  # numbers the messages
        "{{ raise_exception('no') }}",
        LOOP + "{{ m.role + '{' + m.content + '}' }}{% endfor %}",  # three braces in a row, an empty action in Go
    ],
)
def test_a_template_of_another_form_is_left_out(jinja: str) -> None:
    assert derive(ChatTemplate(jinja, "test", TOKENS).render, "") is None
    text = ollama.modelfile(None, [], SamplingSettings())
    assert parse(text) == [("FROM", "./model.gguf")]


@pytest.mark.parametrize(
    "source",
    [
        "{{ .Tools }}",
        "{{ if .Tools }}{{ end }}",
        "{{ if .System }}x",
        "x{{ end }}",
        "{{ range $i, $_ := .Messages }}",
        "{{ if .System }}{{ else }}",
    ],
)
def test_the_evaluator_knows_its_forms_only(source: str) -> None:
    with pytest.raises(ValueError):
        evaluate(source, [{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "text",
    [
        "PARAMETER stop x\n",
        "FROM a\nTEMPALTE x\n",
        'FROM a\nTEMPLATE "x\n',
        'FROM a\nPARAMETER stops "x"\n',
        'FROM a\nSYSTEM """x""" y\n',
    ],
)
def test_the_tests_grammar_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize("name", JINJA)
def test_the_modelfile_keeps_to_the_grammar(name: str) -> None:
    found = derived(name)
    commands = parse(ollama.modelfile(found, ["</s>", "### Human:"], SamplingSettings()))
    assert commands[0] == ("FROM", "./model.gguf")
    assert ("TEMPLATE", found.source) in commands
    assert ("PARAMETER", "stop </s>") in commands
    assert ("PARAMETER", "stop ### Human:") in commands


def test_a_template_that_no_quotes_hold_is_left_out() -> None:
    for source in ('a"""b', 'a"', "a\x00b"):
        assert "TEMPLATE" not in dict(parse(ollama.modelfile(Derived(source, "", True), [], SamplingSettings())))


def test_the_demos_export(tmp_path: Path) -> None:
    base = open_model(DEMO)
    job = Job(base, "demo", None, "q8_0")
    written = ollama.write(job, tmp_path)
    assert written.opens == "Modelfile"
    assert written.notices == ()
    commands = parse((tmp_path / "Modelfile").read_text())
    assert [value for name, value in commands if name == "PARAMETER"] == [
        "stop </s>",
        "stop ### Human:",
        "temperature 0.7",
        "top_p 0.9",
    ]
    source = dict(commands)["TEMPLATE"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is rain?"}]
    assert evaluate(source, chat) == Tokenizer.load(DEMO).render_chat(chat)
    assert (tmp_path / "Modelfile").stat().st_mode & 0o777 == 0o600
    import gguf

    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True  # training put it before chats, too


@pytest.fixture
def adapter_job(tmp_path: Path) -> Job:
    """Return a job for the demo with an adapter, as if it had been converted from a file; no proof, since there is none."""
    base = open_model(DEMO)
    file = UserFile(tmp_path / "my models" / "Demo.Q4_1.gguf", "Demo.Q4_1.gguf", "Q4_1", 1)
    (tmp_path / "out").mkdir()
    return Job(base, "demo", random_adapter(base.config), "none", check=False, user_file=file)


def test_an_adapter_is_put_on_the_users_own_file(tmp_path: Path, adapter_job: Job) -> None:
    """The rest of the Modelfile is the merged model's; its place is told, since this folder is not to be given away."""
    written = ollama.write(adapter_job, tmp_path / "out")
    commands = parse((tmp_path / "out" / "Modelfile").read_text())
    assert commands[:2] == [("FROM", f"{tmp_path}/my models/Demo.Q4_1.gguf"), ("ADAPTER", "./adapter.gguf")]
    (tmp_path / "merged").mkdir()
    ollama.write(replace(adapter_job, weights="q8_0", adapter=None, user_file=None), tmp_path / "merged")
    assert commands[2:] == parse((tmp_path / "merged" / "Modelfile").read_text())[1:]
    assert written.opens == "Modelfile"
    assert written.notices == (
        "Ollama takes adapters up to version 0.34.0; for a newer one, leave --weights out.",
        "This folder is for this machine: its Modelfile holds the path of your Demo.Q4_1.gguf, which `ollama create` copies "
        "into Ollama's own folder.",
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "adapter.gguf"]


def test_an_adapter_is_put_on_ollamas_own_model_by_its_name(tmp_path: Path, adapter_job: Job) -> None:
    """Ollama then keeps one copy of the base, with the template and settings that it has; no path leaves this machine."""
    blob = UserFile(tmp_path / "blobs" / f"sha256-{'0' * 64}", "me/demo:16m", "Q4_1", 1, in_ollama=True)
    written = ollama.write(replace(adapter_job, user_file=blob), tmp_path / "out")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert parse(text) == [("FROM", "me/demo:16m"), ("ADAPTER", "./adapter.gguf")]
    assert written.notices == ("Ollama takes adapters up to version 0.34.0; for a newer one, leave --weights out.",)
    for file in (tmp_path / "out").iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes()


@pytest.mark.parametrize("name", ['a"b.gguf', "a\nFROM b.gguf", "a\x1b.gguf"])
def test_a_file_that_no_modelfile_can_name_is_refused(tmp_path: Path, adapter_job: Job, name: str) -> None:
    file = UserFile(tmp_path / name, name, "Q4_1", 1)
    with pytest.raises(UsageError, match="No Modelfile can hold the name"):
        ollama.write(replace(adapter_job, user_file=file), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_commands_make_and_run_a_model_with_the_folders_name(tmp_path: Path, adapter_job: Job) -> None:
    folder = tmp_path / "My Notes (2026)"
    assert ollama.commands(adapter_job, folder) == (
        ("ollama", "create", "my-notes-2026", "-f", str(folder / "Modelfile")),
        ("ollama", "run", "my-notes-2026"),
    )


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    tiny.save_trainable(tmp_path / "m")
    (tmp_path / "out").mkdir()
    written = ollama.write(Job(open_model(tmp_path / "m"), "m", None, "f16"), tmp_path / "out")
    assert written.notices == ()
    assert parse((tmp_path / "out" / "Modelfile").read_text()) == [("FROM", "./model.gguf"), ("PARAMETER", "stop </s>")]


@pytest.mark.parametrize("weights", [form for form in ollama.SPEC.weights if not ollama.SPEC.needs_user_file(form)])
def test_llama_cpp_proves_the_model(tmp_path: Path, weights: str) -> None:
    pytest.importorskip("llama_cpp")
    tiny.save_trainable(tmp_path / "m")
    (tmp_path / "out").mkdir()
    job = Job(open_model(tmp_path / "m"), "m", None, weights)
    ollama.write(job, tmp_path / "out")
    bound = verify.BOUNDS["ollama", weights]
    expected = verify.golden(job, list(range(5, 40)), job.model())
    assert verify.compare(expected, ollama.SPEC.read(job, tmp_path / "out"), bound).holds(bound)
