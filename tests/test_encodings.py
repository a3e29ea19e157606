"""Notes in old code pages are read right or refused, never with the wrong letters."""

from __future__ import annotations

import pytest

from edgetune.config import DataConfig
from edgetune.documents.encoding import NotText, decode
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.runtime.errors import UsageError

WESTERN = {
    "German": "Heute früh fuhr ich über die Brücke. Die Straße war naß, die Kette größtenteils verrostet. “Schön” – für 5 €.",
    "French": "Ce matin-là, j’ai été à l’atelier. La chaîne était rouillée : « Ça ira », dit-elle… Où est le cœur du vélo ?",
    "Spanish": "¿Dónde está el corazón de la bicicleta? ¡Qué mañana más fría! El niño pidió café.",
    "Portuguese": "As lições de ontem não são fáceis: a manhã começou com pão, maçã e café. Você também já viu?",
    "Italian": "Perché la città è così? Più tardi andrò al caffè; c'è già luce. Ciò è tutto.",
    "Dutch": "De coördinatie van het café was geïmproviseerd. Eén reünie per jaar is genoeg, hè?",
    "Swedish": "På morgonen åkte jag över bron. Kedjan är gammal och sönder, men det går bra ändå.",
    "Danish": "I går kørte jeg på cykel over åen. Kæden er gammel, og det går nok. Søren så på.",
    "Icelandic": "Í gær hjólaði ég yfir brúna. Keðjan er gömul og ryðguð, en það gengur samt. Þú getur æft þig.",
    "Catalan": "Avui he anat al taller. La cadena és vella i la col·lecció és gran. Això està bé, però què més?",
    "English": "We met at the café. It cost £5, “quite a lot”, she said — naïve as ever. The part is 5 cm³ and 20 °C.",
    "two words": "déjà vu",
    "signs": "Fläche 5 m², 10 cm³, 20°C, ±3 mm, ½ Tasse, §5, ©2020 Müller®",
}
MIXED = "The valve must be opened before the pump is started. " * 8
OTHER = [
    ("cp1250", "Zażółć gęślą jaźń. Łódź jest piękna, a źrebię śpi w ogrodzie."),
    ("iso8859-2", "Zażółć gęślą jaźń. Łódź jest piękna, a źrebię śpi w ogrodzie."),
    ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy. Večer jsem jel přes řeku."),
    ("cp1250", "Az erdőben sétáltam, és láttam egy őzet. Szép idő volt, de hűvös."),
    ("cp1250", "Astăzi am fost în pădure şi am văzut o căprioară. Ţara e frumoasă."),
    ("cp1250", "Danas sam išao kući preko rijeke. Čovjek je đak, žena pije čaj, noć pada."),
    ("cp1251", "Привет, мир. Как дела?"),
    ("cp1251", MIXED + "Привет, мир."),
    ("koi8-r", "Привет, мир."),
    ("cp1253", "Καλημέρα κόσμε"),
    ("cp1254", "Şişli'de yağmur yağıyor; İstanbul güzel bir şehir, ılıdır da öyle."),
    ("cp1257", "Šiandien važiavau per upę. Žąsys, ėjo į mišką."),
    ("cp1255", "שלום עולם"),
    ("cp1256", "مرحبا بالعالم"),
    ("cp932", "今日は川を渡った。鎖が古い。"),
    ("cp932", MIXED + "東京タワー"),
    ("euc-kr", MIXED + "한국 사람"),
    ("gbk", MIXED + "你好，世界"),
    ("big5", "你好，世界"),
    ("mac-roman", "Heute früh fuhr ich über die Brücke. Die Straße war naß; schön."),
    ("cp437", "Heute früh fuhr ich über die Brücke, schön."),
    ("cp850", "El corazón está allí, mañana también."),
    ("iso8859-15", "Das kostet 5 € für die Kette."),
]


@pytest.mark.parametrize("text", WESTERN.values(), ids=WESTERN)
def test_western_languages_are_read_from_windows_1252(text):
    assert decode(text.encode("cp1252")) == (text, "windows-1252")


@pytest.mark.parametrize(("encoding", "text"), OTHER)
def test_another_code_page_is_refused_and_read_where_it_is_named(encoding, text):
    with pytest.raises(NotText) as problem:
        decode(text.encode(encoding))
    assert problem.value.reason is Reason.UNKNOWN_ENCODING
    assert decode(text.encode(encoding), encoding) == (text, encoding)


def test_a_named_encoding_that_does_not_fit_is_refused_and_utf8_goes_before_it():
    with pytest.raises(NotText) as problem:
        decode(b"\x81\xff\xff", "shift_jis")
    assert problem.value.reason is Reason.OTHER_ENCODING
    assert decode("naïve ☕".encode(), "cp1250") == ("naïve ☕", "utf-8")
    assert decode("今日は".encode("iso2022_jp"), "iso2022_jp") == ("今日は", "iso2022_jp")
    assert decode("今日は".encode("utf-16-le"), "utf-16-le") == ("今日は", "utf-16-le")


def test_an_unknown_name_of_an_encoding_is_a_usage_error():
    for name in ("windows-9999", "base64", "a\0b", "x" * 10_000):
        with pytest.raises(UsageError, match="windows-1250"):
            DataConfig(encoding=name)
    assert DataConfig(encoding="windows-1250").encoding == "windows-1250"


def test_surrogates_that_old_programs_wrote_into_utf8_become_the_letters_they_stand_for():
    assert decode(b"Smile: \xed\xa0\xbd\xed\xb8\x80 cesu\n") == ("Smile: 😀 cesu\n", "utf-8 (CESU-8)")
    assert decode(b"half a pair: \xed\xa0\xbd\n") == ("half a pair: \ufffd\ufffd\ufffd\n", "utf-8 (damaged)")


def test_a_damaged_letter_after_a_byte_order_mark_costs_no_note():
    assert decode("größer als".encode("utf-8-sig") + b"\xff!") == ("größer als\ufffd!", "utf-8 with BOM (damaged)")
    assert decode("größer als".encode("utf-16")[:-1]) == ("größer al\ufffd", "utf-16 with BOM (damaged)")
    with pytest.raises(NotText):
        decode(b"\xef\xbb\xbf" + bytes(range(128, 256)))


def test_damaged_letters_are_counted_by_note(tmp_path):
    (tmp_path / "half.md").write_bytes("größere Übel, ärger".encode() + b" d\xe9j\xe0")
    (tmp_path / "mark.md").write_text("one \ufffd here")
    (tmp_path / "whole.md").write_text("größer")
    assert read_notes([tmp_path]).damaged == {"half.md": 2, "mark.md": 1}


def test_a_letter_or_line_end_that_two_blocks_share_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.documents.reading.BLOCK_BYTES", 3)
    monkeypatch.setattr("edgetune.documents.reading.WHOLE_CHARS", 4)
    text = "größer ☕ 😀\r\nund\rweiter\r\n" * 20
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        (document,) = read_notes([tmp_path]).documents
        assert document.text == text.replace("\r\n", "\n").replace("\r", "\n")
    (tmp_path / "a.txt").write_bytes(WESTERN["German"].encode("cp1252"))
    assert read_notes([tmp_path]).documents[0].text == WESTERN["German"]
