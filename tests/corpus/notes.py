"""Notes: encodings that must not be guessed, front matter, pictures and drawings, copies, and files that are no notes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from corpus.case import CASES, Case, Place, of_kind

PROSE = "The hub of the blue bicycle was loose, so I tightened both cones a quarter turn.\n"

# --- encodings --------------------------------------------------------------------------------------------------------

ENCODINGS = "encodings"
case = of_kind(ENCODINGS)
WESTERN = "“Nous n’avons pas osé”, dit-elle. L’été était déjà là, et le garçon mangeait des pâtes à côté de la fenêtre. "
GERMAN = "Die Speichen müssen gleichmäßig gespannt sein; später prüft man den Höhenschlag und öffnet die Bremse. "

# Language, code page, text. None is UTF-8: the note is read rightly, or left out with a word; wrong letters never train.
CODE_PAGES: tuple[tuple[str, str, str], ...] = (
    ("Polish", "cp1250", "Zażółć gęślą jaźń, powiedziała ciotka, i wyszła na łąkę zbierać zioła na herbatę. "),
    ("Czech", "cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy, a potom šel domů spát pod peřinu. "),
    ("Hungarian", "iso-8859-2", "Árvíztűrő tükörfúrógép, mondta az öreg, és hűvös őszi reggelen elindult a folyóhoz. "),
    ("Turkish", "cp1254", "Şişli'de oturan genç kız, ağır ağır çıktı merdivenlerden; gözleri ışıldıyordu. "),
    ("Russian in Windows", "cp1251", "Съешь же ещё этих мягких французских булок, да выпей чаю. "),
    ("Russian in Unix", "koi8-r", "Съешь же ещё этих мягких французских булок, да выпей чаю. "),
    ("Greek", "cp1253", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, είπε ο γέρος και έφυγε για το χωράφι. "),
    ("Hebrew", "cp1255", "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה נחמדה מאוד. "),
    ("Arabic", "cp1256", "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. "),
    ("Japanese in Windows", "shift_jis", "自転車のハブが緩んでいたので、玉押しを少し締めた。油も差した。"),
    ("Japanese in Unix", "euc_jp", "自転車のハブが緩んでいたので、玉押しを少し締めた。油も差した。"),
    ("Chinese", "gb18030", "自行车的花鼓松了，所以我把锥体拧紧了一点，还加了油。"),
    ("Chinese in Taiwan", "big5", "自行車的花鼓鬆了，所以我把錐體擰緊了一點，還加了油。"),
    ("Korean", "euc_kr", "자전거 허브가 헐거워서 콘을 조금 조였다. 기름도 쳤다. "),
    ("French in Windows", "cp1252", WESTERN),
    ("German in DOS", "cp850", GERMAN),
    ("German on an old Mac", "mac_roman", GERMAN),
)


def _right_or_left_out(encoding: str, text: str) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        place.write("notes/plain.md", PROSE)
        place.write("notes/it.txt", (text * 20).encode(encoding, "ignore"))
        texts = place.read("notes")
        known = {(text * 20).encode(encoding, "ignore").decode(encoding), (text * 20)}
        assert texts.get("it.txt") is None or texts["it.txt"].strip() in {each.strip() for each in known}
        place.run("train", "--dry-run", place.folder / "notes").taken("it.txt" if "it.txt" not in texts else "documents")

    return check


CASES.extend(Case(ENCODINGS, f"{name}, {encoding}", _right_or_left_out(encoding, text)) for name, encoding, text in CODE_PAGES)

MARKED: tuple[tuple[str, bytes, str], ...] = (
    ("UTF-8 with a byte order mark", b"\xef\xbb\xbf" + GERMAN.encode(), GERMAN),
    ("UTF-8 with two byte order marks", b"\xef\xbb\xbf\xef\xbb\xbf" + GERMAN.encode(), GERMAN),
    ("UTF-16 of Windows", GERMAN.encode("utf-16"), GERMAN),
    ("UTF-16 in the other order", b"\xfe\xff" + GERMAN.encode("utf-16-be"), GERMAN),
    ("UTF-32", GERMAN.encode("utf-32"), GERMAN),
    ("line ends of Windows", b"one\r\ntwo\r\n", "one\ntwo\n"),
    ("line ends of old Macs", b"one\rtwo\r", "one\ntwo\n"),
    ("letters made of two signs", unicodedata.normalize("NFD", GERMAN).encode(), unicodedata.normalize("NFD", GERMAN)),
    ("joiners, marks of direction and form feeds", "a\u200db \u2067c\u2069\x0cd\u2028e".encode(),
        "a\u200db \u2067c\u2069\x0cd\u2028e"),
)  # fmt: skip


def _reads(data: bytes, text: str) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        place.write("notes/it.txt", data)
        assert place.read("notes") == {"it.txt": text}

    return check


CASES.extend(Case(ENCODINGS, name, _reads(data, text)) for name, data, text in MARKED)


@case("UTF-16 without a mark")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    place.write("notes/it.txt", GERMAN.encode("utf-16-le"))
    assert place.read("notes").get("it.txt") in (None, GERMAN)


@case("UTF-16 cut within a letter")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    place.write("notes/it.txt", GERMAN.encode("utf-16")[:-1])
    place.run("train", "--dry-run", place.folder / "notes").taken(r"it\.txt")


@case("UTF-8 with a damaged letter, which is said")
def _(place: Place) -> None:
    place.write("notes/it.txt", (GERMAN * 5).encode().replace("ä".encode(), b"\xc3", 1))
    place.run("train", "--dry-run", place.folder / "notes").taken("damaged")


@case("a picture called .md")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    place.write("notes/photo.md", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40)
    place.run("train", "--dry-run", place.folder / "notes").taken(r"photo\.md: binary")


@case("one NUL in the middle of a note")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    place.write("notes/it.md", PROSE + "\0" + PROSE)
    assert "\0" not in place.read("notes").get("it.md", "")


# --- front matter -----------------------------------------------------------------------------------------------------

FRONT = "front matter"
case = of_kind(FRONT)

# Name, the note, and the text that is trained.
FRONT_MATTER: tuple[tuple[str, str, str], ...] = (
    ("a folded title", "---\ntitle: >-\n  How I repaired\n  the hub\nid: 4\n---\nBody.\n",
        "# How I repaired the hub\n\nBody.\n"),
    ("a plain title of two lines", "---\ntitle: A long title\n  goes on\nid: 4\n---\nBody.\n",
        "# A long title goes on\n\nBody.\n"),
    ("doubled quotes", "---\ntitle: 'It''s the wheel'\n---\nBody.\n", "# It's the wheel\n\nBody.\n"),
    ("escaped quotes", '---\ntitle: "She said \\"no oil\\" twice"\n---\nBody.\n', '# She said "no oil" twice\n\nBody.\n'),
    ("a letter in an escape", '---\ntitle: "Caf\\u00e9"\n---\nBody.\n', "# Café\n\nBody.\n"),
    ("tags of null", "---\ntitle: Spokes\ntags: null\n---\nBody.\n", "# Spokes\n\nBody.\n"),
    ("a title of ~", "---\ntitle: ~\ntags: ~\n---\nBody.\n", "Body.\n"),
    ("a comment after the title", '---\ntitle: "Spokes" # from "Wheels"\n---\nBody.\n', "# Spokes\n\nBody.\n"),
    ("keys in quotes", '---\n"title": Quoted\n"id": 7\n---\nBody.\n', "# Quoted\n\nBody.\n"),
    ("a title that is a year", "---\ntitle: 1984\n---\nBody.\n", "# 1984\n\nBody.\n"),
    ("a title that is a day", "---\ntitle: 2024-05-01\n---\nBody.\n", "# 2024-05-01\n\nBody.\n"),
    ("a title that YAML reads as true", "---\ntitle: Yes\n---\nBody.\n", "# Yes\n\nBody.\n"),
    ("a title that YAML reads in base 60", "---\ntitle: 12:30:45\n---\nBody.\n", "# 12:30:45\n\nBody.\n"),
    ("a title that the note repeats", "---\ntitle: Spokes\n---\n# Spokes\n\nBody.\n", "# Spokes\n\nBody.\n"),
    ("line ends of Windows in front matter", "---\r\ntitle: Spokes\r\n---\r\nBody.\r\n", "# Spokes\n\nBody.\n"),
    ("a byte order mark before front matter", "\ufeff---\ntitle: Spokes\n---\nBody.\n", "# Spokes\n\nBody.\n"),
    ("three dots that close it", "---\ntitle: Spokes\n...\nBody.\n", "# Spokes\n\nBody.\n"),
    ("TOML", '+++\ntitle = "Spokes"\ndraft = true\n+++\nBody.\n', "# Spokes\n\nBody.\n"),
    ("TOML of several lines", '+++\ntitle = """\nSpokes"""\ntags = [\n  "a",\n]\n+++\nBody.\n',
        "# Spokes\n\nTags: a\n\nBody.\n"),
)  # fmt: skip

# Name, and a note that begins like front matter and is none: it is trained as it is.
KEPT: tuple[tuple[str, str], ...] = (
    (
        "a diary between rulers",
        "---\nMonday: rode to the lake and back.\nTuesday: rain, stayed in.\n\nWednesday: the hub is loose.\n---\n\nGood.\n",
    ),
    ("a ruler that is never closed", "---\n\nThe hub was loose.\n"),
    ("prose between rulers", "---\nThe hub was loose.\n---\nI tightened it.\n"),
    ("a list between rulers", "---\n- oil\n- grease\n---\nI bought both.\n"),
    ("a ruler of four dashes", "----\ntitle: Spokes\n----\nBody.\n"),
    ("a block whose YAML is broken", '---\ntitle: "no end\n---\nBody.\n'),
    ("a block whose TOML is broken", '+++\ntitle = "no end\n+++\nBody.\n'),
)


def _front(note: str, text: str) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        place.write("notes/it.md", note)
        assert place.read("notes") == {"it.md": text}

    return check


CASES.extend(Case(FRONT, name, _front(note, text)) for name, note, text in FRONT_MATTER)
CASES.extend(Case(FRONT, name, _front(note, note)) for name, note in KEPT)


@case("a tag with a comma in it")
def _(place: Place) -> None:
    place.write("notes/it.md", '---\ntags: [wheel, "true, straight", hub]\n---\nBody.\n')
    assert re.fullmatch(r"Tags: wheel[,;] \"?true, straight\"?[,;] hub\n\nBody.\n", place.read("notes")["it.md"])


@case("aliases that multiply a thousand million times")
def _(place: Place) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    place.write("notes/it.md", "---\ntitle: Spokes\n" + "\n".join(lines) + "\ntags: *a9\n---\nBody.\n")
    texts = place.read("notes")
    assert texts["it.md"].endswith("Body.\n")
    assert len(texts["it.md"]) < 10_000


@case("a Python object that YAML would make")
def _(place: Place) -> None:
    reached = place.folder / "reached"
    place.write("notes/it.md", f"---\ntitle: !!python/object/apply:os.system ['touch {reached}']\n---\nBody.\n")
    assert place.read("notes")["it.md"].endswith("Body.\n")
    assert not reached.exists()


@case("ten thousand brackets in front matter")
def _(place: Place) -> None:
    place.write("notes/it.md", "---\ntags: " + "[" * 10_000 + "]" * 10_000 + "\n---\nBody.\n")
    assert place.read("notes")["it.md"].endswith("Body.\n")


# --- what is a note -----------------------------------------------------------------------------------------------------

NOTES = "notes"
case = of_kind(NOTES)


@case("a photograph of 200 kB pasted as a data URI")
def _(place: Place) -> None:
    place.write(
        "notes/it.md", f"{PROSE}\n![shed](data:image/png;base64,{'iVBORw0KGgoAAAANSUhEUg' * 9_000})\n\nIt stayed true.\n"
    )
    text = place.read("notes")["it.md"]
    assert "iVBORw0KGgo" * 2 not in text
    assert text.startswith(PROSE)
    assert text.endswith("It stayed true.\n")


@case("a picture of 50 kB in HTML")
def _(place: Place) -> None:
    place.write("notes/it.md", f'{PROSE}\n<img src="data:image/jpeg;base64,{"/9j/4AAQSkZJRgABAQ" * 3_000}" alt="shed">\n')
    assert len(place.read("notes")["it.md"]) < 2_000


@case("an Excalidraw drawing")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    drawing = (
        "```compressed-json\n" + "N4KAkARALgngDgUwgLgAQQQDwMYEMA2AlgCYBOuA7hADTgQBuCpAzoQPYB2KqATLZMzYBXUtiRoIACyhQ4z\n" * 20
    )
    place.write(
        "notes/bench.excalidraw.md", f"---\nexcalidraw-plugin: parsed\n---\n==⚠ Switch to EXCALIDRAW VIEW ⚠==\n{drawing}```\n"
    )
    assert "N4KAkARALgng" not in "".join(place.read("notes").values())
    place.run("train", "--dry-run", place.folder / "notes").taken("bench.excalidraw.md")


@case("old versions of pages that Logseq keeps")
def _(place: Place) -> None:
    place.write("graph/pages/Hub.md", PROSE)
    place.write("graph/logseq/bak/pages/Hub/2024-05-01T10_00_00.000Z.Desktop.md", PROSE * 2)
    assert list(place.read("graph")) == ["pages/Hub.md"]


@case("notes that are in iCloud and not on this machine")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    place.write("notes/.2024-05-01.md.icloud", b"bplist00")
    place.run("train", "--dry-run", place.folder / "notes").taken("not downloaded")


@case("a folder of edgetune's own data")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    place.trained(place.notes(), "--out", str(place.folder / "notes" / "adapter")).taken()
    assert not [path for path in place.read("notes") if path.startswith("adapter/")]


@case("nothing but white space")
def _(place: Place) -> None:
    place.write("notes/it.md", " \n\t\n\u3000\n")
    place.run("train", place.folder / "notes").refused("empty")


@case("a sparse note of 300 MB")
def _(place: Place) -> None:
    place.write("notes/plain.md", PROSE)
    with place.write("notes/it.txt", "x").open("r+b") as file:
        file.truncate(300 << 20)
    place.run("train", "--dry-run", place.folder / "notes").taken(r"it\.txt")


@case("a note that is one line of 3 MB")
def _(place: Place) -> None:
    place.write("notes/it.md", PROSE.strip() * 36_000)
    assert len(place.read("notes")["it.md"]) == len(PROSE.strip()) * 36_000


@case("only files of kinds that are not read")
def _(place: Place) -> None:
    place.write("notes/a.png", b"\x89PNG")
    place.write("notes/b.xlsx", b"PK")
    place.run("train", place.folder / "notes").refused("suffix", r"\.md")


@case("a Word file and a PDF that are broken")
def _(place: Place) -> None:
    place.write("notes/a.docx", b"PK")
    place.write("notes/b.pdf", b"%PDF-1.7")
    place.run("train", place.folder / "notes").refused("2 could not be parsed", r"\.md")


@case("a folder with nothing in it")
def _(place: Place) -> None:
    (place.folder / "notes").mkdir()
    place.run("train", place.folder / "notes").refused("empty")


# Name, and what changes a note into its copy. Copies lie on one side of the held-out split, or one of each is read.
COPIES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("copies but for the last newline", lambda text: text.rstrip("\n")),
    ("copies but for the byte order mark", lambda text: "\ufeff" + text),
    ("copies but for the normal form", lambda text: unicodedata.normalize("NFD", text)),
    ("copies but for spaces at the ends of lines", lambda text: text.replace("\n", "  \n")),
)


def _copies(change: Callable[[str], str]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        for number in range(12):
            lines = (f"Die Speichen müssen {number * line} Umdrehungen gespannt sein.\n" for line in range(40))
            text = f"# Tag {number}\n\n{''.join(lines)}"
            place.write(f"notes/n{number:02}.md", text)
            place.write(f"notes/n{number:02} 2.md", change(text))
        found = place.run("train", "--dry-run", "--json", place.folder / "notes").taken().json
        held_out = {path[:3] for path in found["heldout_paths"]}
        trained = {path[:3] for path in found["read_paths"] if path not in found["heldout_paths"]}
        assert held_out
        assert not held_out & trained

    return check


CASES.extend(Case(NOTES, name, _copies(change)) for name, change in COPIES)


@case("one diary of 26 kB beside eleven lines")
def _(place: Place) -> None:
    for number in range(11):
        place.write(f"notes/n{number:02}.md", f"Line {number} about the hub.\n")
    place.write(
        "notes/diary.md", "".join(f"## Day {n}\n\nThe hub was loose again, for the {n}th time.\n\n" for n in range(500))
    )
    done = place.trained(place.folder / "notes").taken().json
    assert done["heldout_bits_per_byte_after"] is not None
    started = place.run("train", "--dry-run", "--json", place.folder / "notes").taken().json
    assert "diary.md" not in started["heldout_paths"]
