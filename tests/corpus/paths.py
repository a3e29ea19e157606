"""Names, links, pipes and permissions: what a file system holds that a program does not expect."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from corpus.case import Place, of_kind, plain_model

case = of_kind("names, links and permissions")


@contextlib.contextmanager
def home_at(path: Path) -> object:
    """Set EDGETUNE_HOME within a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_HOME", str(path))
        yield


@case("a note whose name moves the terminal's cursor")
def _(place: Place) -> None:
    place.notes()
    place.write("notes/\x1b[2Jnew\nline.md", "")
    outcome = place.run("train", "--dry-run", place.folder / "notes").taken("empty")
    assert "\x1b" not in outcome.out + outcome.err


@case("a note whose name begins with a tilde")
def _(place: Place) -> None:
    place.write("~draft.md", "The hub was loose.\n" * 9)
    with contextlib.chdir(place.folder):
        place.trained(Path("~draft.md")).taken()


@case("a note whose name is not UTF-8")
def _(place: Place) -> None:
    place.notes()
    with open(os.fsencode(place.folder) + b"/notes/caf\xe9.md", "wb") as file:
        file.write(b"The hub was loose.\n")
    place.run("train", "--dry-run", "--json", place.folder / "notes").taken()


@case("an output whose name is not UTF-8")
def _(place: Place) -> None:
    out = os.fsdecode(os.fsencode(place.folder) + b"/caf\xe9")
    place.trained(place.notes(), "--out", out).taken()
    assert os.path.isfile(os.path.join(out, "adapter_config.json"))


@case("a note whose name holds joiners, as Persian needs them")
def _(place: Place) -> None:
    name = "می\u200cخواهم 👩\u200d🌾.md"
    place.write(f"notes/{name}", "The hub was loose.\n")
    assert place.run("train", "--dry-run", "--json", place.folder / "notes").taken().json["read_paths"] == [name]


@case("a suffix in capitals")
def _(place: Place) -> None:
    place.write("notes/README.MD", "The hub was loose.\n")
    assert list(place.read("notes")) == ["README.MD"]


@case("a folder and a note inside it, both named")
def _(place: Place) -> None:
    notes = place.notes()
    outcome = place.run("train", "--dry-run", "--json", notes, notes / "00.md", f"{notes}/../notes")
    assert outcome.taken().json["documents"] == 12


@case("folders nested 150 deep")
def _(place: Place) -> None:
    place.write("notes/" + "d/" * 150 + "it.md", "The hub was loose.\n")
    assert len(place.read("notes")) == 1


@case("links that lead to each other and out of the folder")
def _(place: Place) -> None:
    place.write("secret.md", "my key\n")
    notes = place.notes()
    (notes / "loop").symlink_to(notes)
    (notes / "a.md").symlink_to("b.md")
    (notes / "b.md").symlink_to("a.md")
    (notes / "out.md").symlink_to("../secret.md")
    found = place.run("train", "--dry-run", "--json", notes).taken().json
    assert found["documents"] == 12
    assert {skip["path"] for skip in found["skipped_paths"]} == {"loop", "a.md", "b.md", "out.md"}


@case("a pipe among the notes")
def _(place: Place) -> None:
    os.mkfifo(place.notes() / "pipe.md")
    place.run("train", "--dry-run", place.folder / "notes").taken(r"pipe\.md: neither file nor folder")


@case("a pipe named as a note")
def _(place: Place) -> None:
    os.mkfifo(place.folder / "pipe.md")
    place.run("train", "--dry-run", place.folder / "pipe.md").refused("file")


@case("an endless device named as a note")
def _(place: Place) -> None:
    place.run("train", "--dry-run", "/dev/zero").refused("file")


@case("a pipe for config.json")
def _(place: Place) -> None:
    model = place.model()
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    place.opened(model).refused(r"config\.json")


@case("a link from config.json to the environment of this process")
def _(place: Place) -> None:
    model = place.model()
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/proc/self/environ")
    place.opened(model).refused(r"config\.json")


@case("a link from the licence to a private key")
def _(place: Place) -> None:
    key = place.write("id_rsa", "PRIVATE KEY")
    model = place.model()
    (model / "LICENSE").symlink_to(key)
    outcome = place.run("quantize", model, place.folder / "small")
    outcome.refused("LICENSE") if outcome.code else outcome.taken()
    assert all(b"PRIVATE KEY" not in file.read_bytes() for file in place.folder.rglob("small/*") if file.is_file())


@case("a link from the chat template to a file elsewhere")
def _(place: Place) -> None:
    model = place.model()
    (model / "chat_template.jinja").symlink_to(place.write("secret", "{{ messages[0].content }}"))
    place.run("ask", "--model", model, "--adapter", "none", "hello").refused(r"chat_template\.jinja", "link")


@case("a snapshot of the Hugging Face cache, which consists of links")
def _(place: Place) -> None:
    model = place.model()
    blobs, snapshot = (place.folder / "models--a--b" / name for name in ("blobs", "snapshots/0123"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    place.opens_as_plain(snapshot)


@case("an endless device where the cache names its newest snapshot")
def _(place: Place) -> None:
    repo = Path(os.environ["HF_HOME"]) / "hub" / "models--a--b"
    (repo / "refs").mkdir(parents=True)
    (repo / "snapshots" / "0123").mkdir(parents=True)
    (repo / "refs" / "main").symlink_to("/dev/zero")
    place.run("models").taken()


@case("names of 5,000 letters")
def _(place: Place) -> None:
    place.run("generate", "--model", "m" * 5000, "hello").refused()
    place.run("generate", "--model", plain_model(), "--adapter", "a" * 5000, "hello").refused()
    place.run("train", "--dry-run", "n" * 5000).refused()
    place.trained(place.notes(), "--out", str(place.folder / ("o" * 300))).refused()


@case("an output that is a file")
def _(place: Place) -> None:
    out = place.write("out", "mine")
    place.trained(place.notes(), "--out", str(out)).refused("out")
    assert out.read_text() == "mine"


@case("an output that holds somebody's notes")
def _(place: Place) -> None:
    notes = place.notes()
    place.trained(notes, "--out", str(notes)).refused("already exists")
    assert len(list(notes.iterdir())) == 12


@case("a home that is a file")
def _(place: Place) -> None:
    with home_at(place.write("home", "mine")):
        place.run("train", "--dry-run", place.notes()).refused("home", "EDGETUNE_HOME")


@case("a home that belongs to somebody else")
def _(place: Place) -> None:
    (place.folder / "home").mkdir(mode=0o700)
    with home_at(place.folder / "home"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.stat(place.folder).st_uid + 1)
        place.run("train", "--dry-run", place.notes()).refused("home")


@case("a current adapter that is gone")
def _(place: Place) -> None:
    home = Path(os.environ["EDGETUNE_HOME"])
    home.mkdir(parents=True, mode=0o700)
    (home / "current.json").write_text(json.dumps({"adapter": str(home / "gone"), "model": "demo", "base": "0"}))
    place.run("generate", "--model", plain_model(), "--max-tokens", "2", "hello").taken("adapter none")


@case("a current adapter in a file of brackets")
def _(place: Place) -> None:
    home = Path(os.environ["EDGETUNE_HOME"])
    home.mkdir(parents=True, mode=0o700)
    (home / "current.json").write_text("[" * 100_000)
    place.run("generate", "--model", plain_model(), "--max-tokens", "2", "hello").taken("adapter none")
