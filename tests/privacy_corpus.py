"""Writes invented notes with planted secrets and personal identifiers, and harmless look-alikes beside them.

A note knows where each planted item stands. Templates are split: rules may be tuned on the notes of "tune", and the figures in
docs/privacy.md are of the notes of "test", which are written with other templates.
"""

# ruff: noqa: E501

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import privacy_items as items
import privacy_lookalikes

Split = Literal["tune", "test"]


@dataclass(frozen=True)
class Item:
    """A planted item: text[start:end] of its note. `form` names its issuer or country."""

    start: int
    end: int
    kind: str
    form: str


@dataclass(frozen=True)
class Note:
    """An invented note and what is planted in it. `harmless` are the places of the look-alikes."""

    text: str
    planted: tuple[Item, ...]
    harmless: tuple[Item, ...]


TEMPLATES: dict[str, dict[Split, list[str]]] = {
    "API key": {
        "tune": [
            "The new key for the build server is {x} and it expires in May.", "export SERVICE_TOKEN={x}",
            "- {x} (rotate in spring)",
            'api_key = "{x}"', "curl -H 'Authorization: Bearer {x}' https://api.example.com/v1/items", "Schlüssel für den Dienst: `{x}`",
            "| token | {x} | prod |", "me: here you go {x}\nher: thanks", '{{"apiKey": "{x}", "region": "eu"}}', "clé d'API : {x}",
            "const client = new Client({{ token: '{x}' }});", "<!-- key={x} -->", "API key (staging): {x}",
        ],
        "test": [
            "Got this token from the dashboard today: {x}", "SECRET_KEY: {x}", "set the header X-Api-Key: {x} before the call",
            "access_token='{x}'  # do not commit", "> key {x}", "Das Token lautet {x}.", "1. token {x}\n2. restart the service",
            "docker run -e API_TOKEN={x} image:latest", "[2024-03-02, 10:11] Tom: api key: {x}", "La clave de API es {x}, no la pierdas.",
            "    token: \"{x}\"\n    retries: 3", "auth = Auth(token={x!r})", "tajny klucz: {x}",
        ],
    },
    "password": {
        "tune": [
            "Password: {x}", "wifi password is {x}", "login: maria\npassword: {x}", "DB_PASSWORD={x}", "pw = {x}", "Passwort: {x}",
            "mot de passe : {x}", "contraseña: {x}", '"password": "{x}",', "| bank | anna | password: {x} |", "user admin / pass {x}",
            "mysql -u root -p'{x}' shop", "- **Password:** `{x}`", "hasło: {x}", "пароль: {x}", "PGPASSWORD={x} psql shop",
        ],
        "test": [
            "The password for the router is {x}", "pwd: {x}", "spring.datasource.password={x}", "Kennwort: {x}", "senha: {x}", "wachtwoord: {x}",
            "user: anna pw: {x}", "Her laptop's password: {x}, please keep it.", "    password: '{x}'\n    host: db1", "passwd = \"{x}\"",
            "ALTER USER shop IDENTIFIED BY '{x}';", "| Netflix | Password | {x} |", "Tom: what was it again\nAnna: password {x}",
            "lösenord: {x}", "sshpass -p {x} ssh host", "Passphrase: {x}", "密码：{x}",
        ],
    },
    "private key": {
        "tune": ["{x}", "```\n{x}\n```", "cat > ~/.ssh/id_rsa <<EOF\n{x}\nEOF"],
        "test": ["My old key, to be replaced:\n\n{x}\n", "key: |\n{x}", "~~~pem\n{x}\n~~~"],
    },
    "URL password": {
        "tune": ["postgres://shop:{x}@db.example.com:5432/shop", "clone https://anna:{x}@git.example.com/a/b.git", "DATABASE_URL=mysql://root:{x}@127.0.0.1/app", "redis://:{x}@cache:6379/0"],
        "test": ["mongodb+srv://admin:{x}@cluster0.abcde.mongodb.net/test", "ftp://backup:{x}@nas.local/photos is the place", "amqp://guest:{x}@rabbit:5672", "proxy: http://jan.novak:{x}@10.0.0.1:3128/", "jdbc:postgresql://db/shop?user=shop&password={x}"],
    },
    "JWT": {
        "tune": ["Authorization: Bearer {x}", "cookie: session={x}; path=/", "the token in the mail was {x}"],
        "test": ["jwt {x}", "https://app.example.com/reset?token={x}", "localStorage.setItem('t', '{x}')"],
    },
    "seed phrase": {
        "tune": ["Wallet seed: {x}", "{x}", "Recovery phrase for the cold wallet\n\n{x}\n"],
        "test": ["mnemonic = \"{x}\"", "12/24 words, on paper too: {x}", "> {x}"],
    },
    "e-mail": {
        "tune": [
            "Write to {x} about the lease.", "From: Anna <{x}>", "- {x}", "Kontakt: {x}.", "| Jan | {x} | Berlin |", "mailto:{x}",
            "cc {x}, and the others", '{{"email": "{x}"}}', "Tom: my address is {x} :)",
        ],
        "test": [
            "Reach her at {x} or in person.", "To: {x}\nSubject: the boat", "* {x} – treasurer", "courriel : {x}", "git config user.email {x}",
            "[write]({x})", "author = \"Jan Novak <{x}>\"", "({x})", "E-Mail:{x}", "mi correo es {x}",
        ],
    },
    "phone": {
        "tune": [
            "Call the plumber: {x}", "Tel. {x}", "- Anna {x}", "Mobil: {x}", "| dentist | {x} |", "tel:{x}", "My number is {x}, call after six.",
            "Téléphone : {x}", "Marie, {x}, comes on Friday", "WhatsApp {x}",
        ],
        "test": [
            "Phone {x} (evenings)", "ring {x} when you arrive", "* Dr. Huber: {x}", "Handynummer {x}", "Teléfono: {x}", "fax: {x}",
            "Anna: {x}\nTom: saved", "(tel {x})", "| garage | opens at 8 | {x} |", "emergency contact Jan Novak {x}",
        ],
    },
    "card": {
        "tune": ["Visa {x} exp 04/27", "card number: {x}", "- {x}", "Kreditkarte {x}, CVC on paper", "| card | {x} |"],
        "test": ["paid with {x}", "Card: {x} (joint account)", "carte bancaire {x}", "my mastercard is {x}.", "cc={x}&amount=20"],
    },
    "IBAN": {
        "tune": ["IBAN {x}", "Please transfer the rent to {x} by Monday.", "- {x}", "Konto: {x}", "| landlord | {x} |"],
        "test": ["account {x}, reference 12", "IBAN: {x}\nBIC: GENODEF1XXX", "virement vers {x}", "Bankverbindung {x}.", "(iban={x})"],
    },
    "national id": {
        "tune": ["{n}: {x}", "{n} {x}, needed for the form", "- {n} = {x}", "| {n} | {x} |"],
        "test": ["My {n} is {x}.", "{n}. {x}", "Anna Novak, {n} {x}", "{n}\n{x}"],
    },
    "harmless": {
        "tune": ["see {x} for details", "- {x}", "fixed in {x}", "{x}", "| row | {x} |", "`{x}`", "Notes on {x}: works.", "x = {x}"],
        "test": ["refer to {x}", "* {x}", "it was {x} yesterday", "1. {x}", "| {x} | yes |", "code `{x}` here", "log: {x} done", "({x})"],
    },
}  # fmt: skip
"""Lines around an item, by kind and split; in {x} the item stands, in {n} the name of a national number."""

NEEDED_NAME = {
    "tune": [
        "api_key={x}",
        "Access key: {x}",
        "client_secret = '{x}'",
        "the API token is {x}",
        '"secretKey": "{x}"',
        "AccountKey={x};",
    ],
    "test": [
        "API_SECRET={x}",
        "secret access key: {x}",
        'auth_token: "{x}"',
        "the secret key is {x}",
        "apikey {x}",
        "&api_key={x}",
    ],
}
"""Lines for keys that nothing but a name beside them tells from a hash."""

PROSE: dict[Split, list[str]] = {
    "tune": [
        "We met at the harbour and talked about the garden for an hour.", "The bread needs 500 g of flour, 350 ml of water and 10 g of salt.",
        "Der Zug nach Salzburg fährt um 9:42 von Gleis 7.", "Remember that the second chapter repeats the argument of the first.",
        "Il faut arroser les tomates avant samedi.", "def area(width, height):\n    return width * height", "## Plan for the week",
        "- buy nails\n- paint the fence\n- call grandmother", "El museo abre a las diez y cierra a las ocho.", "SELECT name, price FROM items WHERE price > 20;",
        "The meeting moved from 14:00 to 15:30 because room 204 was taken.", "W sobotę jedziemy nad jezioro.", "これは去年の夏の写真です。",
        "Passed the exam with 87 points out of 100, a secret joy.", "The token of thanks was a small wooden bird.",
    ],
    "test": [
        "The wind turned in the afternoon, so we reefed the main sail.", "Add two cups of rice and simmer for 18 minutes.", "Am Dienstag kommt der Elektriker.",
        "Her thesis argues that maps are promises.", "On a marché jusqu'au phare.", "for (let i = 0; i < 10; i++) {{ console.log(i); }}".replace("{{", "{").replace("}}", "}"),
        "### Ideas", "* repair the bicycle\n* return 3 books\n* water the fern", "La reunión fue larga y útil.", "git rebase -i HEAD~3 and then push",
        "Our flat has 74 square metres and two balconies.", "Wczoraj padał śnieg.", "明日は図書館に行きます。", "A key idea: measure first, then cut.",
        "Pass me the map, said the guide; the login page was slow today.",
    ],
}  # fmt: skip
"""Text between the items."""

SECRETS = ("API key", "password", "private key", "URL password", "JWT", "seed phrase")
IDENTIFIERS = ("e-mail", "phone", "card", "IBAN", "national id")
_WEIGHTS = {"API key": 30, "password": 14, "private key": 4, "URL password": 6, "JWT": 4, "seed phrase": 3, "e-mail": 12, "phone": 14, "card": 6, "IBAN": 6, "national id": 12}  # fmt: skip


def make(rng: random.Random, kind: str, split: Split) -> tuple[str, str, str]:
    """Return a new item of a kind, its form, and the template that it stands in."""
    template = rng.choice(TEMPLATES[kind][split])
    if kind == "API key":
        form = rng.choice(list(items.ISSUED))
        if form in items.NEED_A_NAME:
            template = rng.choice(NEEDED_NAME[split])
        return items.ISSUED[form](rng), form, template.replace("{x!r}", "'{x}'")
    if kind == "national id":
        form = rng.choice(list(items.NATIONAL))
        return items.NATIONAL[form](rng), form, template.replace("{n}", items.NATIONAL_NAMES[form])
    if kind == "phone":
        form = rng.choice(list(items.PHONES))
        return items.PHONES[form](rng), form, template
    if kind == "harmless":
        form = rng.choice(list(privacy_lookalikes.HARMLESS))
        return privacy_lookalikes.HARMLESS[form](rng), form, template
    makers = {
        "password": items.password, "private key": items.private_key, "URL password": items.url_password, "JWT": items.jwt,
        "seed phrase": items.seed_phrase, "e-mail": items.email, "card": items.card, "IBAN": items.iban,
    }  # fmt: skip
    return makers[kind](rng), "", template


def note(rng: random.Random, split: Split) -> Note:
    """Write one note with two planted items on average, three look-alikes and some prose."""
    kinds = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=rng.randint(1, 3))
    kinds += ["harmless"] * rng.randint(2, 4) + ["prose"] * rng.randint(3, 8)
    rng.shuffle(kinds)
    text, planted, harmless = f"# Note {rng.randint(1, 999)}\n\n", [], []
    for kind in kinds:
        if kind == "prose":
            text += rng.choice(PROSE[split]) + "\n\n"
            continue
        value, form, template = make(rng, kind, split)
        before, after = (part.replace("{{", "{").replace("}}", "}") for part in template.split("{x}"))
        start = len(text) + len(before)
        (harmless if kind == "harmless" else planted).append(Item(start, start + len(value), kind, form))
        text += before + value + after + "\n\n"
    return Note(text, tuple(planted), tuple(harmless))


def notes(split: Split, count: int, seed: int = 0) -> list[Note]:
    """Return `count` notes, the same for the same arguments."""
    rng = random.Random(f"{split} {seed}")
    return [note(rng, split) for _ in range(count)]
