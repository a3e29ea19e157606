"""`edgetune models` gives an answer for every model it finds, however broken, and a user's words resolve to a model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from edgetune.cli.main import cli
from edgetune.config import TrainConfig
from edgetune.config_file import train_config
from edgetune.library import base_models as models
from edgetune.library import inspect_model
from edgetune.library.base_models import DEMO, ModelChoice, resolve, scan
from edgetune.library.inspect_model import FoundModel
from edgetune.machine.forecast import forecast
from edgetune.memory_settings import least_memory_to_train
from edgetune.runtime.checkpoint import model_shapes, open_model
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import ModelError
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.untrusted_file import MODEL_CONFIG

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(models, "memory_allowed", lambda *_: 10**12)
    return tmp_path


def make_model(folder: Path, dtype: torch.dtype = torch.bfloat16, template: bool = True, **changes: Any) -> Path:
    """Write a complete model folder with random weights and return it."""
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = model_shapes(LlamaConfig.from_hf(config))
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, folder / "model.safetensors")
    tiny.save_letters(folder)
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def cached(home: Path, id: str, revision: str = "0123456789abcdef", hub: str = ".cache/huggingface/hub") -> Path:
    """Return the snapshot folder of a model in the Hugging Face cache, after pointing refs/main to it."""
    entry = home / hub / ("models--" + id.replace("/", "--"))
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(revision)
    return entry / "snapshots" / revision


def ollama(home: Path, name: str, model: bool = True, root: str = ".ollama/models", **about: Any) -> None:
    """Write the files that `ollama pull` leaves for a model."""
    digests = [hashlib.sha256(f"{name} {kind}".encode()).hexdigest() for kind in ("weights", "settings")]
    blobs = home / root / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / f"sha256-{digests[0]}").write_bytes(b"GGUF" + bytes(100))
    (blobs / f"sha256-{digests[1]}").write_text(json.dumps(about))
    layers = [
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digests[0]}", "size": 1_321_082_688},
        {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{digests[1]}", "size": 5},
    ]
    path = home / root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"digest": f"sha256:{digests[1]}"}
    path.write_text(json.dumps({"config": config, "layers": layers if model else []}))


def only(finds: list[FoundModel]) -> FoundModel:
    assert len(finds) == 1, finds
    return finds[0]


def test_a_cached_model_is_ready(home: Path) -> None:
    folder = make_model(cached(home, "Tiny/Llama-Chat"))
    found = only(scan())
    assert (found.name, found.path, found.source) == ("Tiny/Llama-Chat", folder, "Hugging Face")
    assert (found.status, found.fits, found.reason, found.template) == ("ready", True, "", True)
    assert (found.quantisation, found.architecture) == ("bf16", "LlamaForCausalLM")
    assert found.parameters == LlamaConfig.from_hf(CONFIG).parameters
    assert found.bytes == pytest.approx(2 * found.parameters, rel=0.02)


def test_a_four_bit_folder_is_ready(home: Path) -> None:
    make_model(home / "dense", torch.float32)
    quantize_folder(home / "dense", home / "models" / "small")
    found = only(scan(home / "models"))
    assert (found.status, found.quantisation) == ("ready", "nf4 double")
    assert found.name == str(home / "models" / "small")


def test_each_quantisation_is_named(home: Path) -> None:
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        make_model(home / "models" / name, dtype)
    assert {found.name.rpartition(os.sep)[2]: found.quantisation for found in scan(home / "models")} == {
        "fp32": "fp32",
        "fp16": "fp16",
        "bf16": "bf16",
    }


def test_a_large_dense_folder_comes_with_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(cached(home, "Large/Llama"))
    monkeypatch.setattr(inspect_model, "CONVERT_BYTES", 1000)
    found = only(scan())
    assert found.status == "convert"
    assert "edgetune quantize Large/Llama DEST" in found.reason
    assert resolve("Large/Llama").name == "Large/Llama"  # a model that is named is used anyway


def test_a_model_that_does_not_fit_says_what_it_needs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "memory_allowed", lambda *_: 1_000_000)
    make_model(cached(home, "Tiny/Llama"))
    found = only(scan())
    assert (found.status, found.fits) == ("ready", False)
    assert "GB" in found.reason
    assert resolve().name == DEMO


def test_what_models_says_of_memory_is_what_plan_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(cached(home, "Tiny/Llama"))
    plan = forecast(TrainConfig(model=str(folder), device=pick_device("auto").type))
    # The process itself counts, and may have grown between the two calls.
    growth = 50_000_000
    for room, fits in ((plan.least_memory_bytes + growth, True), (plan.least_memory_bytes - growth, False)):
        monkeypatch.setattr(models, "memory_allowed", lambda *_, room=room: room)
        assert only(scan()).fits == fits


def test_the_cache_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(cached(home, "A/One", hub="elsewhere/hub"))
    make_model(cached(home, "B/Two", hub="third"))
    assert scan() == []
    monkeypatch.setenv("HF_HOME", str(home / "elsewhere"))
    assert only(scan()).name == "A/One"
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "third"))
    assert only(scan()).name == "B/Two"


def test_the_revision_is_the_one_refs_main_names(home: Path) -> None:
    make_model(cached(home, "Tiny/Llama", "b" * 40))
    wanted = make_model(cached(home, "Tiny/Llama", "a" * 40))
    assert only(scan()).path == wanted
    wanted.parent.parent.joinpath("refs", "main").write_text("../../../../etc")
    assert only(scan()).path.parent == wanted.parent


def test_a_snapshot_of_links_into_blobs_is_read(home: Path) -> None:
    """huggingface_hub keeps the files in blobs/ and links to them from the snapshot."""
    snapshot = make_model(cached(home, "Tiny/Llama"))
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert only(scan()).status == "ready"


def test_ollama_models_are_named_as_ollama_names_them(home: Path) -> None:
    ollama(home, "registry.ollama.ai/library/llama3.2/1b")
    found = only(scan())
    assert (found.name, found.source, found.status, found.gguf) == ("llama3.2:1b", "Ollama", "no", True)
    assert found.bytes == 104  # of the file, whatever the manifest says
    assert "is not a usable GGUF model" in found.reason


def test_ollama_names_other_people_and_places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama(home, "registry.ollama.ai/someone/model/latest", root="o")
    ollama(home, "hf.co/bartowski/Llama-GGUF/Q8_0", root="o")
    ollama(home, "registry.ollama.ai/library/empty/latest", model=False, root="o")
    assert scan() == []
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "o"))
    finds = {found.name: found for found in scan()}
    assert set(finds) == {"hf.co/bartowski/Llama-GGUF:Q8_0", "someone/model:latest", "empty:latest"}
    assert "names no model" in finds["empty:latest"].reason


def test_lm_studio_holds_gguf_and_mlx(home: Path) -> None:
    first = home / ".lmstudio" / "models" / "bartowski" / "Llama-3.2-1B-GGUF"
    first.mkdir(parents=True)
    (first / "Llama-3.2-1B-Q4_K_M.gguf").write_bytes(bytes(10))
    (first / "mmproj-f16.gguf").write_bytes(bytes(10))
    old = home / ".cache" / "lm-studio" / "models" / "x" / "split"
    old.mkdir(parents=True)
    for part in (1, 2):
        (old / f"m-0000{part}-of-00002.gguf").write_bytes(bytes(10))
    (old / "odd-00001-of-00000.gguf").write_bytes(bytes(10))
    mlx = make_model(home / ".lmstudio" / "models" / "mlx-community" / "Llama-4bit")
    (mlx / "config.json").write_text(json.dumps({**CONFIG, "quantization": {"bits": 4, "group_size": 64}}))
    finds = {found.name: found for found in scan()}
    gguf = "bartowski/Llama-3.2-1B-GGUF/Llama-3.2-1B-Q4_K_M"
    assert set(finds) == {gguf, "x/split/m", "x/split/odd-00001-of-00000", "mlx-community/Llama-4bit"}
    assert {found.status for found in finds.values()} == {"no"}
    assert {found.source for found in finds.values()} == {"LM Studio"}
    assert finds[gguf].quantisation == "Q4_K_M"
    assert finds["mlx-community/Llama-4bit"].quantisation == "MLX 4-bit"
    assert "MLX" in finds["mlx-community/Llama-4bit"].reason


def break_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def break_shapes(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": 128}))


def break_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))


def break_method(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def break_types(folder: Path) -> None:
    odd = {"model_type": ["llama"], "architectures": {"a": 1}, "quantization": [], "hidden_size": "x"}
    (folder / "config.json").write_text(json.dumps(odd))


def break_numbers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": -1, "num_attention_heads": 0}))


def break_size(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"x": "a" * (MODEL_CONFIG.limit + 1)}))


def rename_tensors(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({re.sub(old, new, name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def break_prefix(folder: Path) -> None:
    rename_tensors(folder, "^model[.]", "")


def break_outer_prefix(folder: Path) -> None:
    rename_tensors(folder, "^model[.]", "model.language_model.")


def break_fp8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    small = {name: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for name, t in tensors.items()}
    scales = {f"{name}_scale_inv": torch.ones(1) for name in small if "proj" in name}
    save_file({**small, **scales}, folder / "model.safetensors")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BREAKS = {name.removeprefix("break_"): value for name, value in list(globals().items()) if name.startswith("break_")}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (break_prefix, "its tensors are those of layers.0, where a LlamaForCausalLM has model.layers.0"),
        (break_outer_prefix, "those of layers.0 of model.language_model, where"),
        (break_fp8, "its weights are stored in 8-bit floats (lm_head.weight), which edgetune does not read"),
        (break_method, "is quantised with gptq; edgetune reads bitsandbytes 4-bit, bf16, fp16 and fp32"),
        (break_architecture, "Unsupported architecture 'BertModel'"),
    ],
)
def test_the_true_reason_is_said_and_nothing_of_memory(how: Callable[[Path], None], said: str, home: Path) -> None:
    how(make_model(cached(home, "Tiny/Odd")))
    listed = CliRunner().invoke(cli, ["models"]).stdout
    assert said in listed
    assert "fit" not in listed.partition("Built-in")[0]
    assert " is missing" not in listed  # one cause, not the twelve tensors that follow from it


def test_what_fits_is_said_of_what_can_be_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(cached(home, "Tiny/Llama"))
    assert "chat template, fits in memory" in CliRunner().invoke(cli, ["models"]).stdout
    monkeypatch.setattr(models, "memory_allowed", lambda *_: 1_000_000)
    assert "chat template, does not fit in memory" in CliRunner().invoke(cli, ["models"]).stdout


@pytest.mark.parametrize("place", [".lmstudio/models", ".cache/huggingface/hub", ".ollama/models"])
@pytest.mark.parametrize("how", ["denied", "loop", "file"])
def test_a_place_that_cannot_be_listed_is_said(place: str, how: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / place).parent.mkdir(parents=True)
    if how == "loop":
        (home / place).symlink_to(home / place)
        found = only(scan())
    elif how == "file":
        (home / place).write_bytes(b"")
        assert scan() == []
        return
    else:
        (home / place).mkdir()
        real = os.scandir

        def scandir(path: str | Path) -> Any:  # as root, a test can deny itself nothing
            if str(path).startswith(str(home / place)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        found = only([found for found in scan() if found.reason])
    assert re.search(rf"{place} cannot be listed \((Permission denied|Too many levels of symbolic links)\)", found.reason)
    assert found.status == "no"


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can become another user")
def test_folders_of_somebody_else_are_no_crash() -> None:
    """Lists models as nobody, whose home has folders that only root may enter."""
    script = (
        "import os; from edgetune.library.base_models import scan; os.seteuid(65534); "
        "print([found.reason for found in scan() if found.reason])"
    )
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to nobody
        home = Path(place)
        home.chmod(0o755)
        for name in (".lmstudio/models", ".cache/huggingface/hub/models--A--B/snapshots/a", ".ollama/models/manifests/a/b/c"):
            (home / name).mkdir(parents=True)
        for name in (".lmstudio", ".cache/huggingface/hub/models--A--B", ".ollama/models/manifests"):
            (home / name).chmod(0o700)
        (home / "edgetune").mkdir(mode=0o700)
        os.chown(home / "edgetune", 65534, 65534)
        places = {"HOME": place, "EDGETUNE_HOME": str(home / "edgetune"), "HF_HOME": str(home / ".cache" / "huggingface")}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **places})
    assert done.stderr == ""
    assert done.stdout.count("cannot be listed (Permission denied)") == 1


def test_a_reference_that_never_ends_is_not_read(home: Path) -> None:
    wanted = make_model(cached(home, "Tiny/Llama"))
    reference = wanted.parent.parent / "refs" / "main"
    for target in ("/dev/zero", "/proc/self/environ", str(reference)):
        reference.unlink()
        reference.symlink_to(target)
        assert only(scan()).path == wanted
    reference.unlink()
    os.mkfifo(reference)
    assert only(scan()).path == wanted


def test_a_folder_that_is_not_there_is_said() -> None:
    with pytest.raises(ModelError, match="There is no folder /nowhere/models"):
        scan("/nowhere/models")


def test_what_config_toml_says_of_training_counts(home: Path, private_home: Path) -> None:
    make_model(cached(home, "Tiny/Llama"), max_position_embeddings=65536)
    private_home.mkdir(parents=True)
    (private_home / "config.toml").write_text("[train]\nbatch_tokens = 1000000\nrecompute = 'none'\nseq_len = 65536\n")
    much = only(scan()).path
    checkpoint, device = open_model(much), pick_device("auto").type
    needed, usual = (least_memory_to_train(checkpoint, train, device) for train in (train_config({}), TrainConfig()))
    assert needed > 1.2 * usual
    planned = forecast(replace(train_config({}), model="Tiny/Llama", memory="1MB"))
    assert planned.least_memory_bytes == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("how", BREAKS)
def test_a_find_that_cannot_be_used_says_why(how: str, home: Path) -> None:
    folder = make_model(cached(home, "Tiny/Broken"))
    BREAKS[how](folder)
    make_model(cached(home, "Tiny/Whole"))
    whole, broken = scan()
    assert (whole.name, whole.status) == ("Tiny/Whole", "ready")
    assert (broken.name, broken.status, broken.fits) == ("Tiny/Broken", "no", None)  # whether it would fit is not the question
    assert broken.reason
    assert broken.reason.isprintable()
    with pytest.raises(ModelError) as caught:
        resolve("Tiny/Broken")
    assert str(caught.value) == broken.reason


def test_hostile_entries_are_no_crash(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    hub.mkdir(parents=True)
    (hub / "models--file").write_text("not a folder")
    (hub / "models--loop").mkdir()
    (hub / "models--loop" / "snapshots").symlink_to("snapshots")
    (hub / "models----").mkdir()
    snapshot = cached(home, "Bad/\x1b[31mName")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").mkdir()
    (snapshot / "model.gguf").write_bytes(b"")
    manifests = home / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / "m"
    manifests.mkdir(parents=True)
    hostile = ["", "[]", '{"layers": 5}', '{"layers": [5, {"mediaType": 3, "digest": ["x"]}]}', "[" * 50_000]
    hostile.append(json.dumps({"layers": [{"mediaType": "a.model", "digest": "sha256:../../../etc/passwd", "size": -1}]}))
    for number, content in enumerate(hostile):
        (manifests / str(number)).write_text(content)
    finds = scan()
    assert len(finds) == 1 + len(hostile)
    assert {found.status for found in finds} == {"no"}
    assert all(found.name.isprintable() and found.reason.isprintable() for found in finds)


def test_nothing_is_written_and_an_empty_home_has_nothing(home: Path) -> None:
    assert scan() == []
    assert list(home.iterdir()) == []
    assert "hf download" in models.NOTHING_FOUND
    assert "never downloads" in models.NOTHING_FOUND


# --- names ------------------------------------------------------------------------------------------------------------


def test_without_a_model_the_demo_answers(home: Path) -> None:
    for name in (None, DEMO):
        choice = resolve(name)
        assert (choice.name, choice.path.name) == ("demo", "demo")
        assert choice.path.parent.name == "edgetune"


def test_the_best_is_the_largest_ready_model_that_fits(home: Path) -> None:
    make_model(cached(home, "A/Small"))
    make_model(cached(home, "A/Large"), intermediate_size=192)
    make_model(cached(home, "A/Plain"), intermediate_size=192, template=False)
    assert resolve() == ModelChoice(cached(home, "A/Large"), "A/Large")


def test_a_name_leads_back_to_its_model(home: Path) -> None:
    folder = make_model(cached(home, "Tiny/Llama-Chat"))
    for name in ("Tiny/Llama-Chat", "tiny/llama-chat", "Llama-Chat"):
        choice = resolve(name)
        assert (choice.path, choice.name) == (folder, "Tiny/Llama-Chat")
        assert resolve(choice.name) == choice


def test_of_two_models_of_one_name_the_one_that_can_be_used_is_meant(home: Path) -> None:
    break_pickled(make_model(cached(home, "Tiny/Llama")))
    usable = make_model(home / ".lmstudio" / "models" / "Tiny" / "Llama")
    assert resolve("Tiny/Llama").path == resolve().path == usable


def test_a_folder_leads_back_to_itself_from_anywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(home / "here" / "model")
    monkeypatch.chdir(home / "here")
    choice = resolve("model")
    monkeypatch.chdir(home)
    assert resolve(choice.name) == choice
    assert choice.path == folder.resolve()
    assert resolve("~/here/model").path == folder.resolve()


def test_a_cache_entry_named_by_its_folder_is_its_snapshot(home: Path) -> None:
    snapshot = make_model(cached(home, "Tiny/Llama"))
    assert resolve(str(snapshot.parent.parent)).path == snapshot.resolve()


def test_broken_gguf_and_mlx_are_refused_by_name_and_by_path(home: Path) -> None:
    ollama(home, "registry.ollama.ai/library/llama3.2/latest", file_type="Q4_K_M")
    gguf = home / "x" / "model-Q8_0.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    mlx = make_model(home / "mlx")
    (mlx / "config.json").write_text(json.dumps({**CONFIG, "quantization": {"bits": 4, "group_size": 64}}))
    for name in ("llama3.2", "llama3.2:latest", str(gguf), str(gguf.parent)):
        with pytest.raises(ModelError, match="GGUF"):
            resolve(name)
    with pytest.raises(ModelError, match="MLX"):
        resolve(str(mlx))


def test_a_name_that_is_not_here_says_where_it_looked(home: Path) -> None:
    (home / "file.txt").write_text("")
    with pytest.raises(ModelError, match=r"no model 'nobody/nothing'.*edgetune models.*never downloads"):
        resolve("nobody/nothing")
    with pytest.raises(ModelError, match=r"is neither a model folder nor a \.gguf file"):
        resolve(str(home / "file.txt"))
