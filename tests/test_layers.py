"""The floors of the house: runtime <- export <- edgetune; imports point down, never up, and nothing opens sockets."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "runtime": ("edgetune.",),  # everything of edgetune except edgetune.runtime
    "export": ("edgetune.",),  # everything except edgetune.runtime and edgetune.export
}
ALLOWED = {"runtime": ("edgetune.runtime",), "export": ("edgetune.runtime", "edgetune.export")}
NETWORK = {"socket", "http", "urllib", "requests", "ssl", "asyncio", "ftplib", "smtplib", "xmlrpc", "socketserver"}
HEAVY = {"coremltools", "gguf", "transformers", "peft", "bitsandbytes", "mlx", "llama_cpp", "triton"}
HEAVY |= {"dp_accounting"}  # the extra private
HEAVY |= {"pypdfium2", "mammoth", "selectolax", "orgparse", "docutils", "defusedxml", "rensa"}  # the extra documents
HEAVY |= {"keyring", "cryptography"}  # the extra encryption


FIRST_USE = {"runtime/backends/cuda": "triton"}
"""Back ends that are written with a heavy package. Only ops.py imports them, by name and on first use, so their modules may
import the package at the top, as Triton's decorators need."""


TOP_LEVEL = {
    *(".ci", ".clang-format", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md", "constraints.txt", "pyproject.toml"),
    *("docs", "edgetune", "examples", "export", "runtime", "tests"),
}
"""Everything that a clone holds at its top."""


def sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: found a relative import, expected absolute imports only"
            yield node.module or ""


def test_nothing_else_lies_at_the_top_of_a_clone() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no clone, or git is not here")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} == TOP_LEVEL


@pytest.mark.parametrize("floor", ["runtime", "export"])
def test_imports_point_downward(floor: str) -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(floor)
        for name in imports(path)
        if (name == "edgetune" or name.startswith("edgetune.")) and not name.startswith(ALLOWED[floor])
    ]
    assert upward == []


PRODUCT = (
    {"__main__"},
    {"cli"},
    {"machine", "nights"},
    {"training", "forgetting", "session", "chat", "exporting", "quantising", "auditing"},
    {"library", "dataset", "leaks"},
    {"conversion"},
    {"documents", "reports", "memory_settings", "weight_forms"},
    {"privacy"},
    {"config", "config_file"},
    {"parsing", "settings", "choices", "events", "progress", "home", "lock", "scratch", "demo", "texts", "_version"}
    | {"encrypting", "encryption", "keychain"},
)
"""The packages and modules of edgetune/, from the top down: each imports only from its own row and from rows below it."""


PREFIXES = {"runtime": "edgetune.runtime", "export": "edgetune.export", "edgetune": "edgetune"}


def imports_within(floor: str) -> dict[str, set[str]]:
    """Return the imports between a floor's top-level packages and modules, including imports inside functions."""
    prefix = PREFIXES[floor]
    graph: dict[str, set[str]] = {}
    for path in sources(floor):
        unit = path.relative_to(ROOT / floor).parts[0].removesuffix(".py")
        # edgetune's __init__ loads its public names on first use.
        if unit == "__init__":
            continue
        found = graph.setdefault(unit, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == prefix:
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{prefix}."):
                found.add((node.module or "").removeprefix(f"{prefix}.").split(".")[0])
    return {unit: (found & graph.keys()) - {unit} for unit, found in graph.items()}


def test_every_package_of_the_product_has_its_place() -> None:
    assert set(imports_within("edgetune")) == set().union(*PRODUCT)


def test_the_products_packages_import_downward() -> None:
    row = {unit: number for number, units in enumerate(PRODUCT) for unit in units}
    upward = [
        f"{unit} imports {name}"
        for unit, found in imports_within("edgetune").items()
        for name in found
        if row[name] < row[unit]
    ]
    assert upward == []


@pytest.mark.parametrize("floor", ["runtime", "export", "edgetune"])
def test_no_two_packages_import_each_other(floor: str) -> None:
    graph, done = imports_within(floor), set[str]()
    while free := {unit for unit in graph if unit not in done and graph[unit] <= done}:
        done |= free
    assert sorted(set(graph) - done) == [], "these packages or modules import each other"


def test_nobody_imports_a_bare_floor() -> None:
    bare = [
        f"{path.relative_to(ROOT)} imports {name}"
        for floor in ("runtime", "export", "edgetune", "tests")
        for path in sources(floor)
        for name in imports(path)
        if name.split(".")[0] in ("runtime", "export")
    ]
    assert bare == []


def test_nf4_the_specification_imports_nothing_of_ours() -> None:
    assert not [name for name in imports(ROOT / "runtime" / "nf4.py") if name.startswith("edgetune")]


def test_nothing_here_opens_a_socket() -> None:
    """Only `serve` and a judge that the user names may, and neither exists yet. torchrun's processes have the test below."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for floor in ("runtime", "export", "edgetune")
        for path in sources(floor)
        for name in imports(path)
        if name.split(".")[0] in NETWORK
    ]
    assert found == []


def test_only_one_module_talks_to_other_processes() -> None:
    def uses(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        reached = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed" for node in nodes)
        return reached or any(name.startswith("torch.distributed") for name in imports(path))

    users = [path.relative_to(ROOT) for floor in ("runtime", "export", "edgetune") for path in sources(floor) if uses(path)]
    assert users == [Path("edgetune/training/distributed.py")]


def test_heavy_packages_are_imported_inside_functions() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for floor in ("runtime", "export", "edgetune")
        for path in sources(floor)
        for name in imports(path, top_level_only=True)
        if name.split(".")[0] in HEAVY - {FIRST_USE.get(path.parent.relative_to(ROOT).as_posix())}
    ]
    assert found == []


def test_back_ends_that_need_a_heavy_package_are_imported_by_nobody_but_ops() -> None:
    packages = {home: "edgetune." + home.replace("/", ".") for home in FIRST_USE}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for floor in ("runtime", "export", "edgetune")
        for path in sources(floor)
        for name in imports(path)
        for home, package in packages.items()
        if name.startswith(package) and path.parent != ROOT / home
    ]
    assert found == []


BELOW_BACK_ENDS = ("attention", "backends", "errors", "int8", "nf4", "ops_types")
"""The modules of the runtime that a back end may import: number formats and types, not ops.py, the model or its layers."""


def test_back_ends_import_nothing_above_them() -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {node.module}.{alias.name}"
        for path in sources("runtime/backends")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edgetune.runtime")
        for alias in node.names
        if f"{node.module}.{alias.name}".split(".")[2] not in BELOW_BACK_ENDS
    ]
    assert upward == []


def test_the_list_of_packages_is_complete() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for floor, package in PREFIXES.items():
        for init in (ROOT / floor).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / floor).parts
            found.add(".".join([package, *parts]))
    assert set(settings["packages"]) == found


def test_one_nf4_table() -> None:
    """The table's numbers stand only in nf4.py; kernels receive the table as an argument."""
    holders = [
        str(path.relative_to(ROOT))
        for floor in ("runtime", "export", "edgetune")
        for path in sorted((ROOT / floor).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h", ".inl", ".metal") and "0.696192" in path.read_text(encoding="utf-8")
    ]
    assert holders == ["runtime/nf4.py"]


PUBLIC = """
import edgetune

for name in edgetune.__all__:
    namespace = {}
    exec(f"from edgetune import {name}", namespace)
    once, again = getattr(edgetune, name), getattr(edgetune, name)
    assert namespace[name] is once is again, name
    assert callable(once) or isinstance(once, str), name
"""


def test_a_public_name_is_the_same_however_it_is_asked_for() -> None:
    """Importing a module must not replace a public name; the test uses a new process in which nothing is imported yet."""
    subprocess.run([sys.executable, "-c", PUBLIC], check=True)
