"""Makes texts that look like secrets or personal identifiers and are none: digests, versions, dates, order numbers, code."""

# ruff: noqa: E501

from __future__ import annotations

import random
import uuid

from privacy_items import BASE64, DIGITS, HEX, LOWER, URLSAFE, Maker, b64, some


def _day(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(1940, 2005), rng.randint(1, 12), rng.randint(1, 28)


def _isbn(rng: random.Random) -> str:
    body = rng.choice(["978", "979"]) + rng.choice(["0", "1", "3", "2"]) + some(rng, DIGITS, 8)
    check = str(-sum(int(d) * (1, 3)[at % 2] for at, d in enumerate(body)) % 10)
    return rng.choice(
        [
            body + check,
            f"{body[:3]}-{body[3]}-{body[4:6]}-{body[6:12]}-{check}",
            f"{body[:3]} {body[3]} {body[4:6]} {body[6:12]} {check}",
        ]
    )


def _isbn10(rng: random.Random) -> str:
    body = some(rng, "013", 1) + some(rng, DIGITS, 8)
    check = sum(int(d) * w for d, w in zip(body, range(1, 10), strict=True)) % 11
    whole = body + ("X" if check == 10 else str(check))
    return rng.choice([whole, f"{whole[0]}-{whole[1:4]}-{whole[4:9]}-{whole[9]}"])


def rng_version(rng: random.Random) -> str:
    return rng.choice(
        [
            f"v{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 99)}",
            f"{rng.randint(100, 130)}.0.{rng.randint(1000, 6999)}.{rng.randint(10, 250)}",
            "3.11.0rc1",
            "1.21.5-alpine3.19",
        ]
    )


HARMLESS: dict[str, Maker] = {
    "commit": lambda r: some(r, HEX, r.choice([7, 8, 10, 12, 40])),
    "sha256": lambda r: some(r, HEX, 64),
    "md5": lambda r: some(r, HEX, 32),
    "docker digest": lambda r: "sha256:" + some(r, HEX, 64),
    "integrity": lambda r: f"sha512-{b64(r, 64)}",
    "go sum": lambda r: f"h1:{b64(r, 32)}",
    "ssh fingerprint": lambda r: "SHA256:" + b64(r, 32).rstrip("="),
    "ssh public key": lambda r: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + some(r, BASE64, 43) + " laptop",
    "uuid": lambda r: str(uuid.UUID(int=r.getrandbits(128), version=4)),
    "isbn": _isbn,
    "isbn10": _isbn10,
    "version": lambda r: rng_version(r),
    "camel": lambda r: r.choice(["getUserAccountSettings", "AbstractSingletonProxyFactoryBean", "onDidChangeActiveTextEditor2",
                                 "XMLHttpRequestEventTarget", "kSecAttrAccessibleWhenUnlockedThisDeviceOnly", "NSURLSessionConfiguration"]),
    "snake": lambda r: r.choice(["test_a_long_name_of_a_test_with_2_numbers", "MAX_RETRY_COUNT_PER_REQUEST_V2", "x86_64-unknown-linux-gnu",
                                 "com.example.myapp.MainActivity", "org.springframework.boot.autoconfigure"]),
    "colour": lambda r: "#" + some(r, HEX, 6),
    "date": lambda r: (lambda y, m, d: r.choice([f"{y}-{m:02}-{d:02}", f"{d:02}.{m:02}.{y}", f"{d:02}/{m:02}/{y}", f"{y}{m:02}{d:02}", f"{y}-{m:02}-{d:02}T08:{d:02}:00Z"]))(*_day(r)),
    "range": lambda r: r.choice(["1939-1945", "2019/2020", "pp. 1123-1187", "10.00-18.30", "1 000 000", "12,500,000", "3.141592653589793"]),
    "time": lambda r: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}:{r.randint(0, 59):02}",
    "epoch": lambda r: str(r.randint(1_500_000_000, 1_800_000_000)),
    "coordinates": lambda r: f"{r.uniform(-80, 80):.6f}, {r.uniform(-170, 170):.6f}",
    "order": lambda r: r.choice([f"#{some(r, DIGITS, 6, 9)}", f"INV-{r.randint(2018, 2026)}-{some(r, DIGITS, 5)}", f"{some(r, DIGITS, 3)}-{some(r, DIGITS, 7)}-{some(r, DIGITS, 7)}", f"RMA{some(r, DIGITS, 8)}"]),
    "ip": lambda r: ".".join(str(r.randint(1, 254)) for _ in range(4)),
    "ipv6": lambda r: "2001:db8:" + ":".join(some(r, HEX, 4) for _ in range(6)),
    "mac": lambda r: ":".join(some(r, HEX, 2) for _ in range(6)),
    "measure": lambda r: f"{some(r, '123456789', 1)}{some(r, DIGITS, 6, 9)} {r.choice(['bytes', 'rows', 'ns', 'EUR'])}",
    "url": lambda r: f"https://www.youtube.com/watch?v={some(r, URLSAFE, 11)}",
    "document url": lambda r: f"https://docs.google.com/document/d/1{some(r, URLSAFE, 43)}/edit",
    "slug": lambda r: f"https://blog.example.com/2023/04/12/how-i-learned-to-stop-worrying-{some(r, DIGITS, 5)}",
    "path": lambda r: f"/nix/store/{some(r, '0123456789abcdfghijklmnpqrsvwxyz', 32)}-hello-2.12.1",
    "decorator": lambda r: r.choice(["@app.route", "@pytest.fixture", "@media (min-width: 600px)", "user@host:~$", "git@github.com:org/repo.git", "npm i lodash@4.17.21", "@angular/core@17.0.2"]),
    "doi": lambda r: f"10.{some(r, DIGITS, 4)}/{some(r, LOWER, 5)}.{r.randint(2000, 2024)}.{some(r, DIGITS, 5)}",
    "template": lambda r: r.choice(["password: <your password>", "API_KEY=your-api-key-here", "password=os.environ['DB_PASSWORD']", "token: ${{ secrets.GITHUB_TOKEN }}",
                                    "const password = req.body.password;", "password: string;", "SECRET_KEY = os.getenv('SECRET_KEY')", "export TOKEN=$(cat token.txt)",
                                    "the password is in the safe", "Password: required", "password: ********", "api_key: xxxxxxxxxxxxxxxx", "--token <TOKEN>", "postgres://user:password@localhost/db",
                                    "the tokenizer: sentencepiece", "primary key: user_id", "sort key: created_at", "the secret: butter"]),
    "phrase": lambda r: r.choice(["key takeaway: always measure twice", "the token budget is 4096", "pass the salt", "a secret garden", "API keys rotate monthly"]),
    "imei-like": lambda r: some(r, DIGITS, 15) + "0",
    "bitcoin": lambda r: "bc1q" + some(r, "023456789acdefghjklmnpqrstuvwxyz", 38),
}  # fmt: skip
"""Texts that look like secrets or identifiers and are none, by kind."""
