"""`--push_to_hub` against a stand-in for the hub: what arrives there, and what is said where it does not."""

import json
import socket

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

from jaxft import load_model
from jaxft.convert import __main__ as convert
from jaxft.errors import InputError, RunError, run_command
from jaxft.hub import open_repository, push
from jaxft.train import main as train
from tests.hub_stand_in import TOKEN, stand_in
from tests.test_merge import write_adapter
from tests.tiny_runs import flags, sums, write_base, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
]


@pytest.fixture
def hub(monkeypatch):
    """The stand-in as huggingface_hub's endpoint, with a token that it knows."""
    disable_progress_bars()
    with stand_in() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol has no stand-in
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/, adapter/ for it, rows.jsonl."""
    directory = tmp_path_factory.mktemp("hub")
    write_base(directory / "base", "llama2")
    write_adapter(directory / "adapter", *load_model(directory / "base"))
    write_rows(directory / "rows.jsonl", sums(8))
    return directory


def test_directory_arrives_as_one_commit_large_files_beside_small_ones(hub, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    content = {"a.safetensors": b"\0" * 3000, "config.json": b"{}", "checkpoints/3/state": b"x"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    name = open_repository("mine", private=True, exist_ok=False)
    assert name == "me/mine" and hub.private[name]
    url = push(name, tmp_path, "A run", leave=("checkpoints/*",))
    held = hub.repositories[name]
    assert held == {".gitattributes": b"", "a.safetensors": content["a.safetensors"], "config.json": b"{}"}
    assert url.endswith("/me/mine/commit/1234") and hub.messages == ["A run"]
    push(name, tmp_path, "Only one", files=("config.json",))
    assert hub.messages == ["A run", "Only one"]


def test_training_pushes_the_adapter_without_its_checkpoints(hub, place, tmp_path, capsys):
    settings = dict(
        model_name_or_path=place / "base", dataset=place / "rows.jsonl", output_dir=tmp_path / "tuned", max_length=64,
        max_steps=1, per_device_train_batch_size=2, dataset_cache="none", hub_model_id="me/tuned-adapter",
    )  # fmt: skip
    assert train([*flags(**settings), "--push_to_hub"]) == 0
    assert "pushed to " in capsys.readouterr().err
    held = hub.repositories["me/tuned-adapter"]
    assert not hub.private["me/tuned-adapter"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"):
        assert held[name] == (tmp_path / "tuned" / name).read_bytes()
    assert not [name for name in held if name.startswith("checkpoints")]
    assert b"base_model" not in held["README.md"].split(b"---")[1]  # a path of this machine is no name on the hub
    # the same command once more: the run is finished, and the repository is full
    again = [*flags(**settings), "--push_to_hub", "--resume_from_checkpoint=auto"]
    assert run_command(train, again) == 2
    assert "me/tuned-adapter is there already" in capsys.readouterr().err
    assert run_command(train, [*again, "--hub_exist_ok"]) == 0
    assert len(hub.messages) == 2


def test_merged_models_and_gguf_files_are_pushed(hub, place, tmp_path, capsys):
    argv = ["merge", str(place / "base"), str(place / "adapter"), str(tmp_path / "merged"), "--check=false"]
    assert run_command(convert.main, [*argv, "--push_to_hub", "--hub_private_repo"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pushed"].endswith("/me/merged/commit/1234") and hub.private["me/merged"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.repositories["me/merged"].keys()
    pytest.importorskip("gguf", reason="GGUF files are written with it")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("not to be pushed")
    argv = ["gguf", str(place / "base"), str(tmp_path / "out" / "m.{quant}.gguf"), "--quant=f16,q8_0", "--check=false"]
    argv += ["--pre_tokenizer=gpt-2", "--push_to_hub", "--hub_model_id=me/m-gguf"]
    assert run_command(convert.main, argv) == 0
    held = hub.repositories["me/m-gguf"]
    assert {"m.f16.gguf", "m.q8_0.gguf"} <= held.keys() and "private.txt" not in held
    assert held["m.q8_0.gguf"] == (tmp_path / "out" / "m.q8_0.gguf").read_bytes()


def test_what_the_hub_refuses_is_said_before_anything_is_done(hub, place, tmp_path, capsys, monkeypatch):
    def refused(said, name="mine"):
        argv = ["merge", str(place / "base"), str(place / "adapter"), str(tmp_path / "out"), "--push_to_hub"]
        assert run_command(convert.main, [*argv, f"--hub_model_id={name}"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: --push_to_hub") and said in error, error
        assert not (tmp_path / "out").exists()

    refused("(403: You don't have the rights to create a model under other); the token may not write", "other/mine")
    refused("name OWNER/NAME", "a/b/c")
    hub.repositories["me/mine"] = {".gitattributes": b"", "model.safetensors": b""}
    refused("me/mine is there already and holds 1 files; name another by --hub_model_id, or add to it with --hub_exist")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused("(401: Invalid user token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("jaxft.hub.get_token", lambda: None)
    refused("there is no token for the hub; set HF_TOKEN, or run `hf auth login`")


def test_no_connection_and_offline_mode_are_said(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(InputError, match="the hub cannot be reached"):
            open_repository("mine", private=False, exist_ok=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        open_repository("mine", private=False, exist_ok=False)


def test_a_push_that_fails_keeps_the_result_and_says_how_to_go_on(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    name = open_repository("mine", private=False, exist_ok=False)
    hub.refuse_commits = True
    with pytest.raises(RunError, match=rf"is whole, but not on the hub: .*403.*Later: hf upload me/mine {tmp_path} ."):
        push(name, tmp_path, "A run", leave=("checkpoints/*",))
    assert (tmp_path / "config.json").exists()
    hub.refuse_commits = False
    assert open_repository("mine", private=False, exist_ok=False) == "me/mine"  # it is empty still
