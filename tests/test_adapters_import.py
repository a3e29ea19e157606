"""`edgetune adapters`, and `--adapter` with adapters that other programs wrote."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapters import random_adapter
from click.testing import CliRunner, Result
from tiny import save_model

import edgetune
from edgetune.cli.main import cli
from edgetune.export.gguf import target as gguf
from edgetune.export.job import Job
from edgetune.export.mlx import adapter as mlx_adapter
from edgetune.library import adapter_registry as registry
from edgetune.library.kept_adapters import list_adapters
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import AdapterError, EdgetuneError, ModelError
from edgetune.runtime.loader import load_llama
from edgetune.session import Session

DEMO = Path(edgetune.__file__).parent / "demo"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def run_json(*arguments: str) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def adapter() -> Adapter:
    return random_adapter(open_model(DEMO).config)


@pytest.fixture
def from_mlx(tmp_path: Path, adapter: Adapter) -> Path:
    (tmp_path / "from mlx").mkdir()
    mlx_adapter.write_adapter(adapter, tmp_path / "from mlx", "demo", 8)
    return tmp_path / "from mlx"


@pytest.fixture
def from_peft(tmp_path: Path, adapter: Adapter) -> Path:
    peft_folder.save(adapter, tmp_path / "from-peft", "demo")
    return tmp_path / "from-peft"


def test_an_mlx_lm_and_a_peft_folder_are_kept_alike(from_mlx: Path, from_peft: Path) -> None:
    assert run_json("adapters", "list") == {"adapters": []}
    one = run_json("adapters", "import", str(from_mlx), "--model", "demo")
    two = run_json("adapters", "import", str(from_peft), "--model", "demo", "--name", "second")
    assert (one["name"], two["name"]) == ("from-mlx", "second")
    for file in (peft_folder.WEIGHTS_FILE, peft_folder.CONFIG_FILE, peft_folder.EDGETUNE_FILE):
        assert (Path(str(one["adapter"])) / file).read_bytes() == (Path(str(two["adapter"])) / file).read_bytes()
        assert (Path(str(one["adapter"])) / file).stat().st_mode & 0o777 == 0o600
    assert peft_folder.load(Path(str(one["adapter"]))).about == {"base": open_model(DEMO).digest}
    found = run_json("adapters", "list")["adapters"]
    assert isinstance(found, list)
    assert [(each["name"], each["rank"], each["current"]) for each in found] == [("from-mlx", 4, False), ("second", 4, False)]


def test_adapter_takes_an_mlx_lm_folder_as_it_is(from_mlx: Path, from_peft: Path) -> None:
    texts = []
    for path in (from_mlx, from_peft, "none"):
        texts.append(Session.load("demo", str(path)).generate("The harbour", 12, 0.0).text)
    assert texts[0] == texts[1] != texts[2]


def test_promote_show_and_delete(from_mlx: Path) -> None:
    run_json("adapters", "import", str(from_mlx), "--model", "demo", "--name", "one")
    run_json("adapters", "import", str(from_mlx), "--model", "demo", "--name", "two")
    assert run_json("adapters", "promote", "one", "--model", "demo")["model"] == "demo"
    current = registry.get_current()
    assert current is not None
    assert (current.adapter.name, current.model) == ("one", "demo")
    shown = run_json("adapters", "show", "one")
    assert (shown["current"], shown["alpha"], shown["layers"]) == (True, 8.0, None)
    assert re.search(
        r"^\* one: \d{4}-\d\d-\d\d \d\d:\d\d, base demo \([0-9a-f]{12}\), rank 4", run("adapters", "list").output, re.M
    )
    refused = run("adapters", "delete", "one")
    assert isinstance(refused.exception, AdapterError)
    assert "is the current one. Go back to the one before it with `edgetune adapters rollback`" in str(refused.exception)
    assert run_json("adapters", "delete", "two") == {"deleted": "two"}
    assert [each.name for each in list_adapters()] == ["one"]
    assert isinstance(run("adapters", "delete", "one").exception, AdapterError)  # even though it is the last adapter
    assert run_json("adapters", "rollback")["adapter"] is None
    assert run_json("adapters", "delete", "one") == {"deleted": "one"}
    assert list_adapters() == []
    assert registry.get_current() is None


@pytest.mark.parametrize("name", ["../../etc", "none", "", "a/b", ".hidden", "x" * 101])
def test_names_that_are_paths_or_nothing_are_refused(name: str, from_mlx: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be the name of an adapter"):
        registry.import_adapter(from_mlx, open_model(DEMO), "demo", name)
    assert registry.kept_folder(name, open_model(DEMO).digest) is None


def test_what_does_not_fit_is_refused_with_every_mismatch_and_nothing_is_kept(from_mlx: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other")
    other = open_model(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"layers 0-1 q_proj: lora_A is \(4, 384\) .*expected \(4, 64\).*"):
        registry.import_adapter(from_mlx, other, "other")
    with pytest.raises(AdapterError, match=r"No adapter at .*adapter_config.json is missing"):
        registry.import_adapter(tmp_path / "other", open_model(DEMO), "demo")
    for nothing in ("nope", "nope.gguf"):
        with pytest.raises(AdapterError, match=r"There is nothing at .*mlx-lm folder or a \.gguf file"):
            registry.import_adapter(tmp_path / nothing, open_model(DEMO), "demo")
    assert list_adapters() == []
    registry.import_adapter(from_mlx, open_model(DEMO), "demo", "here")
    with pytest.raises(AdapterError, match="This base model already has an adapter here"):
        registry.import_adapter(from_mlx, open_model(DEMO), "demo", "here")


def test_an_adapter_of_another_base_is_refused_by_its_digest(from_peft: Path) -> None:
    about = json.loads((from_peft / peft_folder.EDGETUNE_FILE).read_text())
    (from_peft / peft_folder.EDGETUNE_FILE).write_text(json.dumps(about | {"base": "f" * 64}))
    with pytest.raises(AdapterError, match="was made for another base"):
        registry.import_adapter(from_peft, open_model(DEMO), "demo")


def test_a_gguf_file_is_read_for_the_base_and_kept(tmp_path: Path, adapter: Adapter) -> None:
    pytest.importorskip("gguf")
    base = open_model(DEMO)
    gguf.write(Job(base, "demo", adapter, check=False), tmp_path)
    path = tmp_path / "adapter.gguf"
    assert registry.find(str(path), base.digest) == path
    found = registry.load_for(path, base)
    assert found.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert found.config.scale == adapter.config.scale
    in_folder = registry.load_for(tmp_path, base)  # the folder as `edgetune export gguf` writes it
    assert all(torch.equal(in_folder.tensors[key], tensor) for key, tensor in found.tensors.items())
    assert registry.import_adapter(path, base, "demo").name == "adapter"


@pytest.mark.parametrize("rank", ["Infinity", "NaN", "16.7", "1" + "0" * 400, "true", '"4"'])
@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_a_rank_that_is_none_is_one_sentence(rank: str, form: str, from_mlx: Path, from_peft: Path) -> None:
    folder, key = (from_mlx, "rank") if form == "mlx" else (from_peft, "r")
    config = (folder / "adapter_config.json").read_text()
    assert config.count(f'"{key}": 4') == 1
    (folder / "adapter_config.json").write_text(config.replace(f'"{key}": 4', f'"{key}": {rank}'))
    with pytest.raises(AdapterError, match=r"adapter_config\.json (at .* is unusable|is not valid JSON)"):
        registry.read(folder, open_model(DEMO).config)


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_alpha_beyond_any_float_is_one_sentence(form: str, from_mlx: Path, from_peft: Path) -> None:
    folder, before = (from_mlx, '"scale": 2.0') if form == "mlx" else (from_peft, '"lora_alpha": 8.0')
    config = (folder / "adapter_config.json").read_text()
    assert config.count(before) == 1
    (folder / "adapter_config.json").write_text(config.replace(before, f"{before.split(':')[0]}: 1{'0' * 400}"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json (at .* is unusable|is not valid JSON)"):
        registry.read(folder, open_model(DEMO).config)


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_a_layer_of_a_thousand_digits_is_one_sentence(form: str, from_mlx: Path, from_peft: Path) -> None:
    folder, file = (from_mlx, mlx_adapter.ADAPTER_FILE) if form == "mlx" else (from_peft, peft_folder.WEIGHTS_FILE)
    tensors = safetensors.torch.load_file(folder / file)
    name = next(name for name in tensors if "layers.7." in name)
    tensors[name.replace("layers.7.", f"layers.{'7' * 5000}.")] = tensors.pop(name)
    safetensors.torch.save_file(tensors, folder / file)
    with pytest.raises(AdapterError, match=r"not LoRA of a LLaMA linear: '.*77"):
        registry.read(folder, open_model(DEMO).config)


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_every_tensor_that_is_no_lora_is_named_at_once(form: str, from_mlx: Path, from_peft: Path) -> None:
    folder, file = (from_mlx, mlx_adapter.ADAPTER_FILE) if form == "mlx" else (from_peft, peft_folder.WEIGHTS_FILE)
    tensors = safetensors.torch.load_file(folder / file)
    names = {
        n: next(name for name in tensors if f".{n}.self_attn.q_proj.lora_{'a' if form == 'mlx' else 'A'}" in name)
        for n in range(6)
    }
    tensors[names[0]] *= float("nan")
    tensors[names[1]][0, 0] = float("inf")
    tensors[names[2]] = tensors[names[2]].to(torch.int8)
    tensors[names[3]] = torch.ones(4, 4, 4)
    tensors[names[4].replace("layers.4.", "layers.04.")] = torch.ones(4, 4)
    tensors[names[5].replace("self_attn", "mlp")] = torch.ones(4, 4)
    tensors["lm_head.weight.".ljust(10_000, "x")] = torch.ones(4, 4)
    safetensors.torch.save_file(tensors, folder / file)
    with pytest.raises(AdapterError) as raised:
        registry.read(folder, open_model(DEMO).config)
    message = str(raised.value)
    beyond = names[5].replace("self_attn", "mlp")
    for fault in (
        f"not LoRA of a LLaMA linear: {beyond!r}",
        f"the head, which edgetune does not adapt: '{'lm_head.weight.'.ljust(80, 'x')}'",
        f"inf or NaN: {names[0]!r}, {names[1]!r}",
        f"numbers of type I8: {names[2]!r}",
        f"not a matrix: {names[3]!r}",
        f"given twice: {names[4]!r}",
    ):
        assert fault in message
    assert len(message) < 1200
    safetensors.torch.save_file({}, folder / file)
    with pytest.raises(AdapterError, match="has no tensors; copy it again"):
        registry.read(folder, open_model(DEMO).config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights 'pissa_niter_4', which changes the base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"alora_invocation_tokens": [5, 6], "use_qalora": True}, "uses alora_invocation_tokens, use_qalora, which"),
        ({"use_dora": True, "rank_pattern": {"q_proj": 8}}, "uses use_dora, which"),
        ({"lora_bias": True, "modules_to_save": ["lm_head"]}, "uses lora_bias, modules_to_save, which"),
        ({"lora_alpha": "16"}, r"unusable: lora_alpha is '16', expected a number; copy"),
        ({"lora_dropout": "0"}, r"unusable: lora_dropout is '0', expected a number"),
        ({"use_rslora": "no"}, r"unusable: use_rslora is 'no', expected true or false"),
        ({"rank_pattern": {"q_proj": "8"}}, r"unusable: the rank is '8'"),
        ({"alpha_pattern": ["q_proj"]}, r"unusable: alpha_pattern is \['q_proj'\], expected an object"),
        ({"alpha_pattern": {"(a+)+$": 2}}, r"alpha_pattern that edgetune does not read: a key has '\+', where"),
        ({"alpha_pattern": {"q_proj": 1e300}}, r"unusable: Alpha is 1e\+300"),
        ({"r": 0}, r"unusable: The rank is 0; expected 1 to 1024, e\.g\. 16; copy the adapter again\.$"),
        ({"target_modules": ["wq" * 10_000]}, r"unusable: The targets name \['wqwq.{,300}; copy the adapter again"),
        ({"target_modules": {"q_proj": 1}}, r"has target_modules \{'q_proj': 1\}; expected names of linears"),
        ({"target_modules": ["q_proj"]}, r"not among target_modules.*'model\.layers\.0\.mlp\.down_proj'"),
        ({"exclude_modules": ["k_proj"]}, r"and exclude_modules: 'model\.layers\.0\.self_attn\.k_proj'"),
    ],
)  # fmt: skip
def test_a_peft_adapter_that_is_more_than_lora_is_refused(change: dict[str, object], said: str, from_peft: Path) -> None:
    config = json.loads((from_peft / peft_folder.CONFIG_FILE).read_text())
    (from_peft / peft_folder.CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=said):
        registry.read(from_peft, open_model(DEMO).config)
    (from_peft / peft_folder.CONFIG_FILE).write_text(json.dumps({key: config[key] for key in config if key != "lora_alpha"}))
    with pytest.raises(AdapterError, match="unusable: it has no 'lora_alpha'; copy"):
        registry.read(from_peft, open_model(DEMO).config)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva"])
def test_how_a_peft_adapter_began_does_not_matter_else(start: object, from_peft: Path, adapter: Adapter) -> None:
    config = json.loads((from_peft / peft_folder.CONFIG_FILE).read_text())
    newer = {"alora_invocation_tokens": None, "use_qalora": False, "arrow_config": None, "kasa_config": None}
    (from_peft / peft_folder.CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": start} | newer))
    assert registry.read(from_peft, open_model(DEMO).config).config == adapter.config


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_an_adapter_whose_numbers_overflow_is_one_sentence(temperature: str, adapter: Adapter, tmp_path: Path) -> None:
    huge = {key: tensor * 1e30 for key, tensor in adapter.tensors.items()}
    peft_folder.save(replace(adapter, tensors=huge), tmp_path / "huge", "demo")
    result = run("generate", "hi", "--model", "demo", "--adapter", str(tmp_path / "huge"), "--temperature", temperature)
    assert isinstance(result.exception, ModelError)
    assert "gives NaN for the next token, since numbers in its adapter or" in str(result.exception)


def test_names_that_no_file_can_have_are_one_sentence(monkeypatch: pytest.MonkeyPatch, from_peft: Path) -> None:
    for name, said in (("x" * 5000, "cannot be read"), ("~no such user/x", "names the home folder of a user")):
        for arguments in (
            ["adapters", "import", name],
            ["generate", "hi", "--adapter", name],
            ["export", "peft", "--adapter", name],
        ):
            result = run(*arguments, "--model", "demo")
            assert isinstance(result.exception, EdgetuneError), result.output
            assert said in str(result.exception) or "it is neither a folder" in str(result.exception)

    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(mlx_adapter, "is_adapter", closed)
    with pytest.raises(AdapterError, match=r"from-peft cannot be read \(Permission denied\); name an adapter"):
        registry.read(from_peft, open_model(DEMO).config)
    monkeypatch.undo()

    (from_peft / peft_folder.WEIGHTS_FILE).unlink()
    (from_peft / peft_folder.WEIGHTS_FILE).symlink_to("/proc/self/environ")
    with pytest.raises(AdapterError, match=r"safetensors cannot be read \(it is not a regular file\)"):
        registry.read(from_peft, open_model(DEMO).config)


def test_a_score_beyond_any_float_hides_no_adapter(from_mlx: Path) -> None:
    kept = Path(str(run_json("adapters", "import", str(from_mlx), "--model", "demo")["adapter"]))
    about = {"heldout_bits_per_byte_before": 10**390, "heldout_bits_per_byte_after": 2.5}
    (kept / peft_folder.EDGETUNE_FILE).write_text(json.dumps(about))
    (found,) = list_adapters()
    assert (found.heldout_bits_per_byte_before, found.heldout_bits_per_byte_after) == (None, 2.5)


def test_an_adapter_on_some_layers_changes_these_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    base = open_model(tmp_path / "base")
    partial = random_adapter(base.config, layers=(1,))
    model = load_llama(base, torch.float32)
    adapters.attach(model, partial)
    assert [type(block.q_proj).__name__ for block in model.blocks] == ["Linear", "LoraLinear"]
    assert adapters.snapshot(model, partial.config).layers == (1,)
    peft_folder.save(partial, tmp_path / "kept", "base")
    assert json.loads((tmp_path / "kept" / peft_folder.CONFIG_FILE).read_text())["layers_to_transform"] == [1]
    assert peft_folder.load(tmp_path / "kept").layers == (1,)
    beyond = random_adapter(base.config, layers=(1,))
    config = json.loads((tmp_path / "kept" / peft_folder.CONFIG_FILE).read_text())
    (tmp_path / "kept" / peft_folder.CONFIG_FILE).write_text(json.dumps(config | {"layers_to_transform": [0, 1]}))
    assert peft_folder.load(tmp_path / "kept").layers == (1,)  # PEFT starts layer 0, which has no tensors, at no effect
    for layers, message in (
        ([7], "not among target_modules, layers_to_transform"),
        ([1, 7], "the model has no layer 7"),
        (["x"], "expected the numb"),
    ):
        (tmp_path / "kept" / peft_folder.CONFIG_FILE).write_text(json.dumps(config | {"layers_to_transform": layers}))
        with pytest.raises(AdapterError, match=message):
            adapters.attach(model, registry.read(tmp_path / "kept", base.config))
    assert torch.equal(model.blocks[1].q_proj.lora_A, beyond.tensors[1, "q_proj", "A"])  # unchanged by the refused adapters
