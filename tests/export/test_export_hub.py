"""--push-to-hub against a stand-in for the Hub (tests/hub_server.py): it is no Hub, it speaks a Hub's upload calls.

The stand-in checks and keeps what arrives, so that it can be compared with the exported folder byte for byte, and
answers errors when told to. hf_xet, by which the real Hub takes large files, is switched off: it needs the Hub's own
storage service. What is tested here is what vlmdist does with huggingface_hub, and that no token leaks.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repo
from huggingface_hub import constants
from made import make_run, run_config
from ranks import rank_environment

from vlmdist.errors import RunFailed, UserError
from vlmdist.export.hub import Hub
from vlmdist.export.run import export_run

TOKEN = "hf_SENTINEL0123456789"  # noqa: S105 - must be found nowhere


@pytest.fixture(scope="module")
def run_dir(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return make_run(run_config(tiny_world / "model", folder / "run", {"lora": {"r": 4, "alpha": 8}}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What might have been exported: small files, one that goes by LFS, one in a subfolder."""
    made = tmp_path / "exported"
    (made / "sub").mkdir(parents=True)
    (made / "README.md").write_text("---\nlibrary_name: peft\n---\n# Ä card\n", encoding="utf-8")
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 999)
    (made / "sub" / "code.py").write_text("x = 1\n")
    return made


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(TOKEN) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def export_by_command(run_dir: Path, out: Path, *options: str, **environment: str) -> Any:
    """``vlmdist export`` with the library's debug log on: its worst chance to give the token away."""
    env = rank_environment(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HOME=str(out.parent / "cache"), **environment)
    return subprocess.run(
        [sys.executable, "-m", "vlmdist", "export", str(run_dir), "--out", str(out), *options],
        capture_output=True,
        text=True,
        timeout=120,
        env={**env, "HF_HUB_VERBOSITY": "debug"},
    )


def test_what_was_exported_arrives_byte_for_byte_and_the_token_shows_nowhere(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with HubServer(TOKEN) as server:
        server.fail = [("/storage/", 500)]  # a hiccup of the storage: sent again
        done = export_by_command(
            run_dir,
            out,
            "--push-to-hub",
            "team/receipts",
            "--private",
            "--json",
            HF_ENDPOINT=server.url,
            HF_TOKEN=TOKEN,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    repo = server.repos["team/receipts"]
    assert repo.private
    assert repo.commits == 1
    assert repo.files == files_of(out)
    facts = json.loads(done.stdout)
    assert facts["commit_url"].startswith(f"{server.url}/team/receipts/commit/")
    # the token goes to the calls that need it alone, and not to the storage, whose addresses are signed
    known = ("/api/whoami-v2", "/api/repos/create", "/api/models/team/receipts", "/api/validate-yaml", "/lfs/verify")
    shown = [r.path for r in server.requests if r.authorization is not None]
    assert [path for path in shown if not path.startswith((*known, "/team/receipts.git/"))] == []
    assert len(server.asked("/storage/")) == 3  # weights and tokenizer, the first of them twice
    written = [p.read_bytes() for root in (out, run_dir, tmp_path) for p in root.rglob("*") if p.is_file()]
    for text in (done.stdout.encode(), done.stderr.encode(), *written):
        assert TOKEN.encode() not in text
    # the title is the repository's, the base is a folder here and is not named as if the Hub knew it
    assert "# team/receipts\n" in repo.files["README.md"].decode()


def test_a_folder_goes_up_as_it_is(server: HubServer, folder: Path) -> None:
    address = Hub("receipts", private=False).upload(folder)
    assert server.repos["me/receipts"].files == files_of(folder)
    assert not server.repos["me/receipts"].private
    assert address.startswith(f"{server.url}/me/receipts/commit/")
    Hub("me/receipts", private=False).upload(folder)  # again: the repository is there


def test_a_saved_login_serves(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "login").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    Hub("me/receipts", private=True).upload(folder)
    assert server.repos["me/receipts"].private


@pytest.mark.parametrize(
    ("part", "status", "kind", "says"),
    [
        ("whoami", 401, UserError, "doesn't accept the token (401) when asked who you are; set HF_TOKEN"),
        ("whoami", 503, RunFailed, "failed (503) when asked who you are; try again later"),
        ("repos/create", 403, UserError, "forbids it (403) when asked for the repository team/x; the token needs"),
        ("repos/create", 500, RunFailed, "failed (500) when asked for the repository team/x"),
        ("repos/create", 400, UserError, "refused (400) when asked for the repository team/x: told to answer 400"),
        ("api/models/team/x", 401, UserError, "doesn't accept the token (401)"),
        ("preupload", 403, UserError, "forbids it (403) when sent the files"),
        ("objects/batch", 401, UserError, "doesn't accept the token (401) when sent the files"),
        ("storage", 403, UserError, "forbids it (403) when sent the files"),
        ("verify", 422, UserError, "refused (422) when sent the files"),
        ("commit", 500, RunFailed, "failed (500) when sent the files to team/x; try again later"),
    ],
)
def test_an_answer_of_the_hub_gets_one_sentence(
    server: HubServer, folder: Path, part: str, status: int, kind: type[Exception], says: str
) -> None:
    server.fail = [(part, status)]
    before = files_of(folder)
    with pytest.raises(kind) as e:
        Hub("team/x", private=False).upload(folder)
    message = str(e.value)
    assert message.startswith(f"--push-to-hub: {server.url} ")
    assert says in message
    assert "\n" not in message
    assert TOKEN not in message
    assert (f"hf upload team/x {folder}" in message) == (part != "whoami")
    assert files_of(folder) == before
    assert all(not repo.files for repo in server.repos.values())


def test_a_public_repository_gets_nothing_that_was_meant_to_be_private(server: HubServer, folder: Path) -> None:
    server.repos["me/open"] = Repo(private=False)
    with pytest.raises(UserError, match="is there already and is public, so nothing was uploaded"):
        Hub("me/open", private=True).upload(folder)
    assert server.repos["me/open"].files == {}
    assert server.objects == {}


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        ("", "me/x", "no login for http"),
        ("hf_other", "me/x", "doesn't accept the token (401)"),
        ("hf_\x01SENTINEL", "me/x", "characters that no token has"),
        ("hf_SENTINEL\u00e4", "me/x", "characters that no token has"),
        (TOKEN, "a/b/c", "is no name of a repository"),
        (TOKEN, "me/x y", "is no name of a repository"),
    ],
)
def test_a_login_or_name_that_is_no_good_is_told_before_any_work(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, says: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as e:
        Hub(repo, private=False)
    assert says in str(e.value)
    assert "SENTINEL" not in str(e.value)


def test_a_hub_that_is_not_there(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")  # nobody listens on discard
    with pytest.raises(RunFailed, match="http://127.0.0.1:9 could not be reached when asked who you are") as e:
        Hub("me/x", private=False)
    assert "secret" not in str(e.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        Hub("me/x", private=False)


def test_a_refused_login_leaves_nothing_behind(server: HubServer, run_dir: Path, tmp_path: Path) -> None:
    server.fail = [("whoami", 401)]
    with pytest.raises(UserError, match="doesn't accept the token"):
        export_run(run_dir, tmp_path / "out", push_to_hub="me/x")
    assert not (tmp_path / "out").exists()
    assert server.repos == {}


def test_after_a_failed_upload_the_folder_is_whole(server: HubServer, run_dir: Path, tmp_path: Path) -> None:
    server.fail = [("commit", 500)]
    with pytest.raises(RunFailed, match="is whole; when that is mended: hf upload me/x"):
        export_run(run_dir, tmp_path / "out", push_to_hub="me/x")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
