"""Configs, checkpoints and data files from elsewhere start nothing: 44 hostile targets by three ways in, and more.

Each of them leaves a canary where it runs. An instantiator without rules runs all of them, which is shown first.
"""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import detseg
from detseg.allow import RefusedTarget
from detseg.checkpoint import init_from, load, read_checkpoint
from detseg.cli.main import main
from detseg.config import ConfigError, instantiate, load_config
from detseg.data import cache
from detseg.evaluation import evaluate, load_evaluation
from detseg.nn import load_weights
from detseg.nn.weights import read_state
from detseg.stamp import make_stamp
from hostile_configs import Payload, attacks, call, naive, write_files
from shared import REPO
from tiny_models import BrightBox

NAMES = list(attacks(Path("x")))
TINY = ["trainer=cpu", "data.train_images=2", "data.val_images=2", "data.num_workers=0", "data.image_size=64"]
REFUSED = r"is refused|has no '|cannot be allowed|no dotted path"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with what the hostile configs read, on the path, in which the canary would appear."""
    write_files(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("hostile_module", None)


def canary(place: Path) -> bool:
    """Say whether something ran, and make room for the next."""
    path = place / "canary"
    ran = path.exists()
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    sys.modules.pop("hostile_module", None)
    return ran


def override(node: Any) -> str:
    """Write plain values in Hydra's grammar."""
    if isinstance(node, dict):
        return "{" + ",".join(f"{quoted(key)}:{override(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(override, node)) + "]"
    return quoted(node) if isinstance(node, str) else json.dumps(node)


def quoted(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_]\w*", text) else '"' + text.replace('"', '\\"') + '"'


def stamped(path: Path, config: dict[str, Any]) -> str:
    """Write a checkpoint whose stamp says ``config``, with the weights of a detector."""
    model = BrightBox(num_classes=2)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    stamp = make_stamp(config, class_names=["a", "b"], num_classes=None)
    torch.save({"state_dict": state, "detseg": stamp}, path)
    return str(path)


class TestTargets:
    def test_the_canaries_sing(self, place: Path):
        """Without rules all of them run, so a silent canary below means something."""
        silent = []
        for name, node in attacks(place).items():
            try:
                naive(node)
            except Exception as error:  # some fail after they ran
                assert canary_or(place, error), name
                continue
            silent += [] if canary(place) else [name]
        assert silent == [] and len(NAMES) >= 28

    @pytest.mark.parametrize("name", NAMES)
    def test_by_an_override(self, place: Path, name: str):
        node = attacks(place)[name]
        if "()" in override(node):  # a key that Hydra's grammar has no place for
            node["config"] = {"version": 1}
        cfg = load_config(*TINY, f"+callbacks.guest={override(node)}")
        assert cfg.callbacks.guest._target_ == name
        with pytest.raises(ConfigError, match=REFUSED) as caught:
            detseg.build(cfg)
        assert not canary(place) and "callbacks.guest" in str(caught.value)

    @pytest.mark.parametrize("name", NAMES)
    def test_by_a_checkpoints_stamp(self, place: Path, name: str):
        node = attacks(place)[name]
        for config in ({"model": node}, {"model": call("torch.nn.Sequential", node)}):
            with pytest.raises((RefusedTarget, ImportError), match=REFUSED):
                load(stamped(place / "bad.ckpt", config))
        model = call("tiny_models.BrightBox", num_classes=2)
        path = stamped(place / "bad.ckpt", {"model": model, "data": {"eval_transform": node}})
        with pytest.raises((RefusedTarget, ImportError), match=REFUSED):
            load(path, allow=["tiny_models"])
        assert not canary(place)

    @pytest.mark.parametrize("name", NAMES)
    def test_by_a_file(self, place: Path, name: str, capsys: pytest.CaptureFixture[str]):
        write_experiment(place, {"callbacks": {"guest": attacks(place)[name]}})
        assert main(["train", "--config-dir", str(place / "conf"), "experiment=guest", *TINY]) == 2
        said = capsys.readouterr().err
        assert not canary(place) and re.search(REFUSED, said) and len(said.strip().splitlines()) == 1
        assert not list(place.glob("runs/*/*/resolved.yaml"))

    @pytest.mark.parametrize("name", ["os.mkdir", "torch.load", "builtins.eval"])
    def test_by_the_task_and_the_data_of_a_stamp(self, place: Path, name: str):
        node = attacks(place)[name]
        model = call("tiny_models.BrightBox", num_classes=2)
        small = ["trainer=cpu", "allow=[tiny_models]"]
        path = stamped(place / "data.ckpt", {"model": model, "data": node, "truth": "boxes"})
        with pytest.raises(ConfigError, match=REFUSED):
            evaluate(load_evaluation(f"ckpt={path}", *small))
        from detseg.evaluation import rebuild_task

        with pytest.raises(ConfigError, match=REFUSED):
            rebuild_task(load(path, allow=["tiny_models"]), {"config": {"task": node}})
        assert not canary(place)

    @pytest.mark.parametrize("group", ["model", "optimizer", "scheduler", "task", "trainer", "logger.csv", "data"])
    def test_in_every_group_before_anything_is_built(self, place: Path, group: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("detseg.data.Orchard.__init__", lambda *_, **__: pytest.fail("the data were built"))
        cfg = load_config(*TINY, f"+{group}.guest={override(attacks(place)['os.mkdir'])}")
        with pytest.raises(ConfigError, match=rf"^{group}\.guest: .*os\.mkdir"):
            detseg.build(cfg)
        assert not canary(place)


def canary_or(place: Path, error: Exception) -> bool:
    """Say whether the canary sang before an error."""
    return canary(place) and error is not None


def hiding_places(place: Path) -> dict[str, dict[str, Any]]:
    bad = call("os.mkdir", path=str(place / "canary"))
    return {
        "in a list": call("torch.nn.Sequential", [bad]),
        "in a list of lists": call("torch.nn.Sequential", layers=[[[bad]]]),
        "in a plain dict": call("torch.nn.Identity", options={"deep": {"deeper": bad}}),
        "not recursive": call("torch.nn.Identity", inner=bad, _recursive_=False),
        "partial": call("torch.nn.Identity", inner=bad | {"_partial_": True}),
        "itself partial": bad | {"_partial_": True},
        "converted": bad | {"_convert_": "object"},
        "partial of partial": call("functools.partial", bad | {"_partial_": True}),
        "interpolated target": {"_target_": "os.${.tail}", "tail": "mkdir", "path": str(place / "canary")},
        "interpolated node": call("torch.nn.Identity", inner="${elsewhere}"),
        "decoded node": call("torch.nn.Identity", inner="${oc.decode:'{_target_: os.getcwd}'}"),
        "created node": call("torch.nn.Identity", inner="${oc.create:${.bad}}", bad=bad),
        "environment": {"_target_": "${oc.env:DEMO_TARGET}", "path": str(place / "canary")},
        "a list as target": {"_target_": ["os.mkdir"], "path": str(place / "canary")},
        "spaces": {"_target_": " os.mkdir", "path": str(place / "canary")},
        "a method": call("torch.nn.Module.register_forward_hook"),
        "inner names": call("torch.nn.Module.__init__.__globals__.get", "warnings"),
        "a constructor's helper": call("torch.nn.Linear.__new__"),
        "a type": call("builtins.type", "X", [], {}),
        "a getter": call("operator.attrgetter", "system"),
        "an allowed class with a file": call("timm.create_model", "resnet18", checkpoint_path=str(place / "x.pt")),
        "an allowed class with a program": call("lightning.pytorch.loggers.WandbLogger", settings={"x": 1}),
        "Lightning's own command line": call("lightning.pytorch.cli.LightningCLI", args=["fit"]),
        "a config again": call("hydra.utils.instantiate", config=bad, _recursive_=False),
        "our own launcher": call("detseg.experiment.train", cfg=bad),
        "our own reader": call("detseg.config.instantiate", node=bad, _recursive_=False),
    }


HIDING = list(hiding_places(Path("x")))


@pytest.mark.parametrize("name", HIDING)
def test_hiding_places(place: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("DEMO_TARGET", "os.mkdir")
    node = hiding_places(place)[name]
    with pytest.raises(ConfigError):
        elsewhere = call("os.mkdir", path=str(place / "canary"))
        instantiate(OmegaConf.create({"guest": node, "elsewhere": elsewhere}).guest, path="guest")
    assert not canary(place)


def write_experiment(place: Path, content: dict[str, Any], name: str = "guest") -> None:
    folder = place / "conf" / "experiment"
    folder.mkdir(parents=True, exist_ok=True)
    text = "# @package _global_\n" + yaml.safe_dump(content, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text)


def hydra_points(place: Path) -> dict[str, dict[str, Any]]:
    """Return what experiments may try at Hydra's own instantiation points."""
    canary = str(place / "canary")
    bad = call("os.mkdir", path=canary)
    file = {"class": "logging.FileHandler", "filename": canary, "formatter": "simple"}
    return {
        "callbacks": {"callbacks": {"x": bad}},
        "callbacks, a file": {"callbacks": {"x": call("logging.FileHandler", filename=canary)}},
        "callbacks, nested": {"callbacks": {"x": call("detseg.callbacks.EMA", decay=bad)}},
        "launcher": {"launcher": bad},
        "launcher's argument": {"launcher": {"x": bad}},
        "sweeper": {"sweeper": bad},
        "sweeper's params": {"sweeper": {"params": {"hydra.callbacks.x._target_": "os.getcwd,os.getpid"}}},
        "sweeper allows": {"sweeper": {"params": {"allow": "[joblib],[hostile_module]"}}},
        "log elsewhere": {"job_logging": {"handlers": {"file": {"filename": canary}}}},
        "log above": {"job_logging": {"handlers": {"file": {"filename": "${hydra.runtime.output_dir}/../../canary"}}}},
        "log by name": {"job": {"name": "../../../canary"}},
        "another handler": {"job_logging": {"handlers": {"x": file}, "root": {"handlers": ["x"]}}},
        "handler's factory": {"job_logging": {"handlers": {"x": {"()": "builtins.open", "file": canary, "mode": "w"}}}},
        "handler's class": {
            "job_logging": {"handlers": {"x": file | {"class": "logging.handlers.WatchedFileHandler"}}}
        },
        "formatter's factory": {
            "job_logging": {"formatters": {"simple": {"()": "builtins.open", "file": canary, "mode": "w"}}}
        },
        "formatter's class": {"job_logging": {"formatters": {"simple": {"class": "hostile_module.Formatter"}}}},
        "filter's factory": {"job_logging": {"filters": {"x": {"()": "os.mkdir", "path": canary}}}},
        "an attribute": {"job_logging": {"handlers": {"console": {".": {"x": "ext://hostile_module.x"}}}}},
        "an import by logging": {"job_logging": {"handlers": {"console": {"stream": "ext://hostile_module.x"}}}},
        "logging of Hydra's own": {"hydra_logging": {"handlers": {"x": file}, "root": {"handlers": ["x"]}}},
        "a library to load": {"job": {"env_set": {"LD_PRELOAD": "x.so"}}},
        "a module path": {"job": {"env_set": {"PYTHONPATH": str(place)}}},
        "a search path": {"searchpath": ["pkg://hostile_module"]},
        "files beside the run": {"output_subdir": "../../canary"},
    }


POINTS = list(hydra_points(Path("x")))


class TestHydra:
    """Hydra builds, writes and imports for a config before anything of ours is called."""

    @pytest.mark.parametrize("mode", [[], ["-m"]])
    @pytest.mark.parametrize("name", POINTS)
    def test_by_a_file(self, place: Path, name: str, mode: list[str], capsys: pytest.CaptureFixture[str]):
        write_experiment(place, {"hydra": hydra_points(place)[name]})
        code = main(["train", *mode, "--config-dir", str(place / "conf"), "experiment=guest", *TINY])
        said = capsys.readouterr().err
        assert code == 2 and "hydra" in said and not canary(place)
        assert "hostile_module" not in sys.modules and not (place / "runs").exists()

    @pytest.mark.parametrize(
        "text",
        [
            "hydra.launcher._target_=hydra_plugins.other.Launcher",
            "+hydra.callbacks.x={_target_:os.getcwd}",
            "hydra.searchpath=[pkg://hostile_module]",
            "hydra.searchpath=[file:///tmp,pkg://hostile_module.deeper]",
            "+hydra.job.env_set.PATH=/tmp",
            "hydra.job_logging.handlers.file.filename=/tmp/x.log",
            "hydra.output_subdir=../x",
        ],
    )
    def test_by_an_override(self, place: Path, text: str):
        with pytest.raises(ConfigError, match="hydra"):
            load_config(text)
        assert main(["train", text]) == 2 and "hostile_module" not in sys.modules

    @pytest.mark.parametrize(
        "flags",
        [
            ["--experimental-rerun", "x.pkl"],
            ["--experimental-r=x.pkl"],
            ["--config-path", "conf"],
            ["-cp", "conf"],
            ["--config-name=other"],
        ],
    )
    def test_flags_that_load_something_else(self, place: Path, flags: list[str], capsys: pytest.CaptureFixture[str]):
        assert main(["train", *flags]) == 2
        assert not canary(place) and f"there is no flag {flags[0].partition('=')[0]}" in capsys.readouterr().err

    def test_what_users_need_passes(self, place: Path):
        fine = [
            "sweep=lr",
            "hydra.verbose=true",
            "hydra/job_logging=disabled",
            "hydra/job_logging=stdout",
            "hydra.searchpath=[file:///nowhere]",
            "+hydra.job.env_set.OMP_NUM_THREADS=2",
            "hydra.job.name=other",
            "hydra.output_subdir=null",
            "hydra.run.dir=elsewhere",
        ]
        for text in fine:
            assert load_config(text).seed == 1

    def test_other_programs_of_hydras_are_left_alone(self, place: Path):
        from hydra import compose, initialize_config_dir

        load_config()
        (place / "conf").mkdir()
        (place / "conf" / "other.yaml").write_text("hydra:\n  callbacks:\n    x: {_target_: os.getcwd}\n")
        with initialize_config_dir(str(place / "conf"), version_base="1.3"):
            assert "hydra" in compose("other", return_hydra_config=True)

    @pytest.mark.slow
    def test_without_the_check_they_would_have_run(self, place: Path):
        """The same experiments in a plain program of Hydra's: the canaries can sing."""
        text = "import hydra\n\n@hydra.main(version_base='1.3', config_path=None)\ndef app(cfg):\n    pass\n\napp()\n"
        (place / "app.py").write_text(text)
        ran = []
        for name in ("callbacks, a file", "log elsewhere", "another handler", "log above", "handler's factory"):
            write_experiment(place, {"hydra": hydra_points(place)[name]})
            command = [sys.executable, "app.py", "--config-dir", "conf", "+experiment=guest"]
            subprocess.run(command, cwd=place, capture_output=True, timeout=120)
            ran += [name] if canary(place) or list(place.glob("outputs/**/canary")) else []
        assert {"callbacks, a file", "log elsewhere"} <= set(ran)


class TestAllow:
    """Who may add packages: the one who types the command."""

    def test_a_file_cannot(self, place: Path, capsys: pytest.CaptureFixture[str]):
        node = call("hostile_module.x")
        write_experiment(place, {"allow": ["hostile_module"], "callbacks": {"guest": node}})
        assert main(["train", "--config-dir", str(place / "conf"), "experiment=guest", *TINY]) == 2
        said = capsys.readouterr().err
        assert "comes from a file" in said and "type allow=[hostile_module]" in said and not canary(place)

    def test_the_command_line_can(self, place: Path, capsys: pytest.CaptureFixture[str]):
        (place / "guestparts.py").write_text("from lightning import Callback\n\nclass Mine(Callback):\n    pass\n")
        command = ["train", "+callbacks.mine={_target_:guestparts.Mine}", *TINY, "trainer.max_epochs=1"]
        assert main([*command, "trainer.limit_train_batches=1", "evaluate_after=false"]) == 2
        assert "allow=[mypackage]" in capsys.readouterr().err
        cfg = load_config(*command[1:], "allow=[guestparts]")
        assert "Mine" in {type(callback).__name__ for callback in detseg.build(cfg).trainer.callbacks}

    def test_a_run_directory_cannot(self, place: Path, capsys: pytest.CaptureFixture[str]):
        """Its overrides.json would count as typed."""
        run = place / "runs" / "their" / "run"
        (run / "checkpoints").mkdir(parents=True)
        stamped(run / "checkpoints" / "last.ckpt", {"model": call("hostile_module.x")})
        hostile = ["+callbacks.guest={_target_:hostile_module.x}", "allow=[hostile_module]"]
        (run / "overrides.json").write_text(json.dumps([*TINY, *hostile]))
        assert main(["train", f"resume={run}"]) == 2
        assert "if you trust it, type this again" in capsys.readouterr().err and not canary(place)
        (run / "overrides.json").write_text(json.dumps([*TINY, "+hydra.callbacks.x={_target_:hostile_module.x}"]))
        assert main(["train", f"resume={run}"]) == 2
        assert "hydra.callbacks.x" in capsys.readouterr().err and not canary(place)

    @pytest.mark.parametrize("name", ["os", "torch", "numpy", "hydra", "detseg"])
    def test_nobody_can_add_what_runs_anything(self, place: Path, name: str):
        cfg = load_config(*TINY, f"allow=[{name}]", "+callbacks.guest={_target_:os.mkdir,path:canary}")
        with pytest.raises((ConfigError, RefusedTarget), match=f"allow: {name} belongs to"):
            detseg.build(cfg)
        assert not canary(place)

    def test_a_stamp_cannot(self, place: Path):
        path = stamped(place / "x.ckpt", {"model": call("hostile_module.x"), "allow": ["hostile_module"]})
        with pytest.raises(RefusedTarget, match="hostile_module"):
            load(path)
        assert not canary(place)


class TestPickles:
    """Files of tensors and arrays that hold objects are refused, wherever a file is read."""

    @pytest.fixture
    def payloads(self, place: Path) -> dict[str, Path]:
        payload = Payload(place / "canary")
        old, new, raw = place / "old.ckpt", place / "new.ckpt", place / "raw.ckpt"
        torch.save({"state_dict": {"w": torch.zeros(1)}, "x": payload}, new)
        torch.save({"state_dict": payload}, old, _use_new_zipfile_serialization=False)
        raw.write_bytes(pickle.dumps({"state_dict": payload}))
        return {"zip": new, "legacy": old, "raw": raw}

    def test_the_payload_works(self, place: Path, payloads: dict[str, Path]):
        for path in (payloads["zip"], payloads["legacy"]):
            torch.load(path, weights_only=False)
            assert canary(place)
        pickle.loads(payloads["raw"].read_bytes())
        assert canary(place)

    @pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
    def test_checkpoints(self, place: Path, payloads: dict[str, Path], kind: str):
        path = payloads[kind]
        model = torch.nn.Linear(1, 1)
        for read in (load, read_checkpoint, read_state, lambda file: init_from(model, file)):
            with pytest.raises(ValueError, match=path.name) as caught:
                read(path)
            assert "\n" not in str(caught.value)
        assert not canary(place)

    @pytest.mark.parametrize("key", ["resume", "init_from"])
    def test_training_from_one(self, place: Path, payloads: dict[str, Path], key: str):
        for path in payloads.values():
            assert main(["train", *TINY, f"{key}={path}", "trainer.max_epochs=1"]) != 0
        assert not canary(place)

    def test_weights_of_a_backbone(self, place: Path, payloads: dict[str, Path]):
        node = call("detseg.nn.TimmBackbone", name="resnet18", weights=str(payloads["zip"]))
        with pytest.raises(ValueError, match=r"new\.ckpt"):
            instantiate(node, path="backbone")
        assert not canary(place) and callable(load_weights)

    def test_the_cache_of_data_sets(self, place: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("DETSEG_CACHE", str(place / "kept"))
        (place / "kept").mkdir()
        objects = np.array([Payload(place / "canary")], dtype=object)
        np.savez(place / "kept" / "abc.npz", report=objects, boxes=objects)
        shutil.copy(place / "x.pkl", place / "kept" / "def.npz")
        shutil.copy(place / "x.npy", place / "kept" / "ghi.npz")
        with np.load(place / "kept" / "abc.npz", allow_pickle=True) as file:
            assert file["report"] is not None and canary(place)
        assert [cache.load(key) for key in ("abc", "def", "ghi")] == [None, None, None]
        assert not canary(place)

    def test_images_and_annotations_that_are_pickles(self, place: Path):
        from detseg.data.image import read_image

        for suffix in (".jpg", ".png", ".npy"):
            shutil.copy(place / "x.npy", place / f"photo{suffix}")
            with pytest.raises((ValueError, OSError)):
                read_image(place / f"photo{suffix}")
        assert not canary(place)


UNSAFE = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "torch.hub.load",
    "shutil.unpack_archive",
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_our_own_code_reads_nothing_unsafely():
    """What the tests above try from outside, looked for in the source."""
    wrong, loads = [], 0
    for path in sorted((REPO / "src").rglob("*.py")):
        for name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name == "torch.load":
                loads += 1
            unsafe = (
                name in UNSAFE
                or (name == "torch.load" and options.get("weights_only") != "True")
                or (name == "np.load" and options.get("allow_pickle") != "False")
                or options.get("shell") == "True"
                or name.endswith(".extractall")
            )
            wrong += [f"{path.relative_to(REPO)}:{node.lineno}: {name}"] if unsafe else []
    assert wrong == [] and loads >= 1
