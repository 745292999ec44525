"""`detseg dashboard`: what it starts, what it refuses, and what a browser shows of a real run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest

from detseg.cli.main import main
from detseg.engine import dashboard as module
from detseg.engine.dashboard import command, find_tool, free_port, options, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class TestWhatIsTyped:
    def test_directory_tool_and_port(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        assert options([]) == (Path("runs"), None, 6006)
        assert options(["elsewhere", "tool=mlflow", "port=7000"]) == (Path("elsewhere"), "mlflow", 7000)
        monkeypatch.chdir(tmp_path)
        Path("lr=0.1").mkdir()
        assert options(["lr=0.1"]) == (Path("lr=0.1"), None, 6006)

    @pytest.mark.parametrize("wrong", [["a", "b"], ["--open"], ["host=0.0.0.0"], ["port=many"], ["port="]])
    def test_what_it_does_not_know_is_one_line(self, wrong: list[str], capsys: pytest.CaptureFixture[str]):
        assert main(["dashboard", *wrong]) == 1
        assert wrong[-1].partition("=")[0].strip("-") in capsys.readouterr().err

    def test_help(self, capsys: pytest.CaptureFixture[str]):
        assert main(["dashboard", "--help"]) == 0
        assert "tool=tensorboard|mlflow" in capsys.readouterr().out


class TestWhatThereIs:
    def test_whichever_tool_has_something(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"no run below .* logger=\[csv,tensorboard\]"):
            find_tool(tmp_path)
        (tmp_path / "mlflow.db").touch()
        assert find_tool(tmp_path) == "mlflow"
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "a/b/events.out.tfevents.1").touch()
        assert find_tool(tmp_path) == "tensorboard"

    def test_nothing_to_show_is_an_error_with_the_remedy(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["dashboard", str(tmp_path / "none")]) == 2
        assert "there is no such directory" in capsys.readouterr().err
        assert main(["dashboard", str(tmp_path), "tool=mlflow"]) == 2
        assert "logger=[csv,mlflow]" in capsys.readouterr().err
        with pytest.raises(ValueError, match="tool=aim"):
            command("aim", tmp_path, 1)

    def test_it_listens_on_this_machine_alone(self, tmp_path: Path):
        (tmp_path / "mlflow.db").touch()
        for tool in module.TOOLS:
            line = command(tool, tmp_path, 7)
            assert line[line.index("--host") + 1] == "127.0.0.1" and line[line.index("--port") + 1] == "7"

    def test_a_taken_port_is_left_alone(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert free_port(port) not in (port, 0)
        assert free_port(port) == port

    def test_one_that_ends_at_once_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(module, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
        expected = pytest.raises(RuntimeError, match="tensorboard ended with exit code 3")
        with expected, serving("tensorboard", tmp_path, free_port()):
            pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once, for some seconds; return the directory of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("dashboard"))
        tiny = ["trainer=cpu", "data.train_images=16", "data.val_images=4", "data.batch_size=4", "data.num_workers=0"]
        short = ["data.image_size=64", "trainer.max_epochs=4", "trainer.log_every_n_steps=1", "evaluate_after=false"]
        assert main(["train", *tiny, *short, "model=fcos_small", "name=shown", "logger=[csv,tensorboard,mlflow]"]) == 0
        return Path.cwd() / "runs"


def screenshot(address: str, path: Path) -> np.ndarray:
    """Open an address in a headless browser and return what it shows, (H, W, 3) RGB."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    wait = ["--virtual-time-budget=30000", "--run-all-compositor-stages-before-draw", "--window-size=1500,1400"]
    browser = subprocess.Popen(
        [CHROMIUM, *flags, profile, *wait, f"--screenshot={path}", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        browser.wait(150)
    finally:
        if browser.poll() is None:
            os.killpg(browser.pid, signal.SIGKILL)
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def close_to(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Return how many pixels have a colour, within 6 of 255."""
    return int((np.abs(image.astype(int) - np.array(colour)).max(axis=-1) <= 6).sum())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
class TestInABrowser:
    def test_tensorboard_shows_curves_and_pictures(self, runs: Path, tmp_path: Path):
        with serving("tensorboard", runs, free_port()) as (address, process):
            curves = screenshot(f"{address}#scalars", tmp_path / "curves.png")
            pictures = screenshot(f"{address}#images", tmp_path / "pictures.png")
        assert close_to(curves, (255, 112, 67)) > 500  # the first run's orange, in the list and in the curves
        assert len(np.unique(pictures.reshape(-1, 3), axis=0)) > 10_000  # photographs; the page alone has 1,000 colours
        assert process.poll() is not None

    def test_mlflow_shows_curves_and_pictures(self, runs: Path, tmp_path: Path):
        pytest.importorskip("mlflow", reason="an extra: pip install detseg[mlflow]")
        with sqlite3.connect(runs / "mlflow.db") as store:
            run, experiment = store.execute("select run_uuid, experiment_id from runs").fetchone()
        with serving("mlflow", runs, free_port()) as (address, process):
            page = f"{address}#/experiments/{experiment}/runs/{run}"
            curves = screenshot(f"{page}/model-metrics", tmp_path / "curves.png")
            picture = screenshot(f"{page}/artifacts/pictures/val_epoch_003.png", tmp_path / "picture.png")
        assert close_to(curves, (33, 114, 180)) > 500  # the curves' blue
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10_000
        assert process.poll() is not None

    def test_the_verb_serves_until_it_is_ended(self, runs: Path):
        line = [sys.executable, "-m", "detseg.cli.main", "dashboard", str(runs), f"port={free_port()}"]
        verb = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert verb.stdout is not None
            said = verb.stdout.readline()
            address = next(word for word in said.split() if word.startswith("http://127.0.0.1:"))
            with urllib.request.urlopen(address, timeout=20) as page:
                assert page.status == 200
            verb.send_signal(signal.SIGTERM)
            assert verb.wait(30) == 143
            with pytest.raises(OSError):
                urllib.request.urlopen(address, timeout=5)
        finally:
            if verb.poll() is None:
                os.killpg(verb.pid, signal.SIGKILL)
