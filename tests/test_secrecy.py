"""Secrets of the environment: found by name, kept out of texts, written back as the interpolation they came from."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import urllib.parse
import warnings
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detseg import secrecy
from detseg.config import load_config
from detseg.engine.errors import said
from detseg.experiment import write_json, write_run_files
from detseg.secrecy import keep_secrets, known_secrets, redact, redact_record, veil, veil_arguments
from forks import run_anew, run_forked

CANARY = 'c4nary/with+odd "signs" & ümlaut'


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(secrecy, "_read", {})
    monkeypatch.setenv("DEMO_API_KEY", CANARY)
    return CANARY


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "HF_TOKEN", "aws_secret_access_key", "DB_PASSWORD", "MYSQL_PASSWD", "MY_CREDENTIALS"),
        *("SMTP_PASS", "MYSQL_PWD"),
    ],
)
def test_names_that_hold_secrets(name: str):
    assert known_secrets({name: "hunter2hunter2", "OTHER": "visible"}) == {"hunter2hunter2": name}


@pytest.mark.parametrize("name", ["PATH", "KEYBOARD_LAYOUT", "TOKENIZERS_PARALLELISM", "HOME", "PWD", "OLDPWD"])
def test_names_that_do_not(name: str):
    assert known_secrets({name: "something long"}) == {}


def test_short_values_count_only_where_a_config_asked_for_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DB_PASSWORD", "abc")
    assert "abc" not in known_secrets() and redact("abc") == "abc"
    assert load_config("name=${oc.env:DB_PASSWORD}").name == "abc"
    assert known_secrets()["abc"] == "DB_PASSWORD" and redact("-abc-") == "-<DB_PASSWORD>-"
    load_config("name=${oc.env:HOME}")
    assert os.environ["HOME"] not in known_secrets()


def test_the_default_of_an_absent_variable_is_no_secret():
    assert load_config("name=${oc.env:NO_SUCH_TOKEN,standard}").name == "standard"
    assert "standard" not in known_secrets()


def test_every_way_of_writing_a_value_is_redacted():
    for text in (CANARY, json.dumps({"a": CANARY}), json.dumps(CANARY, ensure_ascii=False), repr(CANARY)):
        assert "c4nary" not in redact(text) and "<DEMO_API_KEY>" in redact(text)
    url = "https://github.com/x?k=" + urllib.parse.quote(CANARY, safe="")
    assert redact(url) == "https://github.com/x?k=<DEMO_API_KEY>"
    assert redact("nothing here") == "nothing here"


def test_the_longer_secret_goes_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert redact("abcdefghijkl abcdefgh") == "<B_TOKEN> <A_TOKEN>"


def test_lines_of_a_private_key(monkeypatch: pytest.MonkeyPatch):
    lines = ["-----BEGIN-----", "MIIEvQIBADANBgkqhkiG9w0B", "AQEFAASCBKcwggSjAgEAAoIB"]
    monkeypatch.setenv("SIGNING_KEY", "\n".join(lines))
    assert redact(f"x {lines[1]} y {lines[2]}") == "x <SIGNING_KEY> y <SIGNING_KEY>"


class TestFiles:
    def test_values_become_interpolations_that_resolve_again(self):
        content = {"a": [CANARY, f"user:{CANARY}@host", 3, None], CANARY: (1.5, CANARY)}
        veiled = veil(content)
        assert "c4nary" not in str(veiled) and veiled["<DEMO_API_KEY>"][0] == 1.5
        again = OmegaConf.to_container(OmegaConf.create({"a": veiled["a"]}), resolve=True)
        assert again == {"a": [CANARY, f"user:{CANARY}@host", 3, None]}

    def test_without_secrets_the_content_itself_comes_back(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("DEMO_API_KEY")
        monkeypatch.setattr(secrecy, "known_secrets", dict)
        content = {"a": [1]}
        assert veil(content) is content

    def test_run_files_hold_none_and_a_worker_finds_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sys, "argv", ["detseg", "train", f"key={CANARY}"])
        cfg = OmegaConf.create({"logger": {"uri": "mysql://me:${oc.env:DEMO_API_KEY}@host"}, "seed": 1})
        write_run_files(cfg, tmp_path)
        for path in tmp_path.iterdir():
            assert "c4nary" not in path.read_text(encoding="utf-8"), path
        text = (tmp_path / "resolved.yaml").read_text(encoding="utf-8")
        assert "mysql://me:${oc.env:DEMO_API_KEY}@host" in text
        assert OmegaConf.load(tmp_path / "resolved.yaml").logger.uri == f"mysql://me:{CANARY}@host"
        assert json.loads((tmp_path / "environment.json").read_text())["command"][2] == "key=${oc.env:DEMO_API_KEY}"

    def test_json_files(self, tmp_path: Path):
        assert "c4nary" not in write_json(tmp_path / "x.json", {"error": f"no access with {CANARY}"}).read_text()


class TestCommandLine:
    def test_what_the_shell_filled_in_becomes_an_interpolation(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("DEMO_TOKEN", "tok3nvalue")
        veiled = veil_arguments(["name=run-tok3nvalue", "-m", "seed=1,2", "tok3nvalue"])
        assert veiled == ["name=run-${oc.env:DEMO_TOKEN}", "-m", "seed=1,2", "tok3nvalue"]
        assert load_config(veiled[0]).name == "run-tok3nvalue"

    def test_errors_are_redacted(self):
        assert said(ValueError(f"cannot log in with {CANARY}")) == "cannot log in with <DEMO_API_KEY>"


class TestLogging:
    def record(self, message: str, *values: object, exc_info: object = None) -> logging.LogRecord:
        return redact_record(logging.LogRecord("x", logging.INFO, "f", 1, message, values, exc_info))  # type: ignore[arg-type]  # as logging passes it

    def test_messages_arguments_and_tracebacks(self):
        assert self.record("key %s of %d", CANARY, 3).getMessage() == "key <DEMO_API_KEY> of 3"
        untouched = self.record("step %d", 3)
        assert untouched.args == (3,) and untouched.getMessage() == "step 3"
        try:
            raise RuntimeError(f"refused: {CANARY}")
        except RuntimeError:
            text = logging.Formatter().format(self.record("failed", exc_info=sys.exc_info()))
        assert "RuntimeError: refused: <DEMO_API_KEY>" in text and "c4nary" not in text

    def test_a_wrong_format_is_left_to_logging(self):
        with pytest.raises(TypeError):
            self.record("%d %d", 1).getMessage()

    def test_handlers_that_appear_later_get_redacted_records(self, tmp_path: Path):
        """In a process of its own: the redaction lasts as long as the process."""
        keep = (
            "from detseg.secrecy import keep_secrets; import logging, warnings, sys; keep_secrets(); keep_secrets()\n"
        )
        act = (
            "import os; secret = os.environ['DEMO_API_KEY']\n"
            f"logging.getLogger().addHandler(logging.FileHandler({str(tmp_path / 'x.log')!r}))\n"
            "logging.getLogger('any.other').warning('with %s', secret)\n"
            "warnings.warn('warned of ' + secret)\n"
            "raise KeyError(secret)\n"
        )
        done = subprocess.run([sys.executable, "-c", keep + act], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "c4nary" not in done.stderr and "c4nary" not in done.stdout
        assert done.stderr.count("<DEMO_API_KEY>") == 2 and "KeyError" in done.stderr
        assert (tmp_path / "x.log").read_text() == "with <DEMO_API_KEY>\n"

    def test_importing_alone_changes_nothing(self):
        code = "import logging, sys; f = logging.getLogRecordFactory(); import detseg.secrecy; "
        code += "print(f is logging.getLogRecordFactory() and sys.excepthook is sys.__excepthook__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "True"

    def test_keeping_twice_wraps_once(self, monkeypatch: pytest.MonkeyPatch):
        before = (logging.getLogRecordFactory(), warnings.formatwarning, sys.excepthook)
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        try:
            keep_secrets()
            first = logging.getLogRecordFactory()
            keep_secrets()
            assert logging.getLogRecordFactory() is first and first is not logging.LogRecord
        finally:
            logging.setLogRecordFactory(before[0])
            warnings.formatwarning, sys.excepthook = before[1:]


OWN_PARTS = '''
import logging
import lightning as L


class Guest(L.Callback):
    """Gets a token, and is careless with it."""

    def __init__(self, *, token, fail=False):
        self.token, self.fail = token, fail

    def on_fit_start(self, trainer, pl_module):
        logging.getLogger("ownparts").warning("logging in with %s", self.token)
        if self.fail:
            raise ValueError(f"{self.token} was refused")
'''

TINY = ["trainer=cpu", "data.train_images=2", "data.val_images=2", "data.batch_size=2", "data.num_workers=0"]
TINY += ["data.image_size=64", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "model=unet_small"]


def leaks(directory: Path, *secrets: str) -> list[str]:
    """Return files and names below ``directory`` that hold a secret, byte for byte."""
    found = []
    for path in directory.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [str(path) for text in secrets if text.encode() in content or text in path.name]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_run_with_every_tracker_leaks_nothing(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch):
    """The token comes as an interpolation, and once typed out by the shell; the callback logs it and fails with it."""
    (tmp_path / "ownparts.py").write_text(OWN_PARTS)
    token, typed = "tok3n-from-the-environment", "pa55word-from-the-shell"
    secrets = {"SITE_TOKEN": token, "SITE_PASSWORD": typed, "WANDB_API_KEY": "0" * 8 + "0123456789abcdef" * 2}
    environment = secrets | {"WANDB_MODE": "offline", "PYTHONPATH": str(tmp_path)}
    guest = "+callbacks.guest={_target_:ownparts.Guest,token:'${oc.env:SITE_TOKEN}',fail:FAIL}"
    mine = [
        "allow=[ownparts]",
        "logger=[csv,tensorboard,wandb,mlflow]",
        f"+callbacks.second={{_target_:ownparts.Guest,token:{typed}}}",
    ]
    outputs = []
    for fail in ("false", "true"):
        sweep = ["-m", "seed=1,2"] if mode == "sweep" else []
        words = ["train", *sweep, *TINY, *mine, guest.replace("FAIL", fail)]
        start = run_anew if (mode, fail) == ("run", "false") else run_forked
        done = start(words, tmp_path, env=environment)
        assert (done.returncode == 0) == (fail == "false"), done.stderr[-3000:]
        outputs.append(done.stdout + done.stderr)
    assert leaks(tmp_path / "runs", *secrets.values()) == []
    assert not [text for text in secrets.values() if text in "".join(outputs)]
    assert "<SITE_TOKEN>" in outputs[0] and "<SITE_TOKEN> was refused" in outputs[1]
    resolved = next((tmp_path / "runs").rglob("resolved.yaml")).read_text()
    assert "${oc.env:SITE_TOKEN}" in resolved and "${oc.env:SITE_PASSWORD}" in resolved
    kinds = {path.suffix or path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {".ckpt", ".wandb", ".csv", ".log", ".yaml", ".json", ".db"} <= kinds
