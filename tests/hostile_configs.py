"""Configs that try to run something: each would leave a harmless canary, a file or directory, if it did."""

from __future__ import annotations

import importlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def call(target: str, *positional: Any, **arguments: Any) -> dict[str, Any]:
    """Return the node that calls ``target``."""
    return {"_target_": target, **({"_args_": list(positional)} if positional else {}), **arguments}


def write_files(place: Path) -> dict[str, str]:
    """Write what the configs read into ``place``; return the paths by kind."""
    payload = Payload(place / "canary")
    kinds = {"pt": "x.pt", "pkl": "x.pkl", "npy": "x.npy", "py": "script.py", "zip": "x.zip", "hub": "hub"}
    paths = {kind: str(place / name) for kind, name in kinds.items()} | {"module": "hostile_module"}
    torch.save({"state_dict": {}, "thing": payload}, paths["pt"])
    Path(paths["pkl"]).write_bytes(pickle.dumps(payload))
    np.save(paths["npy"], np.array([payload], dtype=object), allow_pickle=True)
    act = f"import os; os.mkdir({str(place / 'canary')!r})\n"
    for name in (paths["py"], place / "hostile_module.py"):
        Path(name).write_text(act)
    (place / "hub").mkdir()
    (place / "hub" / "hubconf.py").write_text(f"import os\n\ndef net():\n    os.mkdir({str(place / 'canary')!r})\n")
    with zipfile.ZipFile(paths["zip"], "w") as file:
        file.writestr("canary", "x")
    return paths


def attacks(place: Path) -> dict[str, dict[str, Any]]:
    """Return hostile nodes by name; ``write_files(place)`` has been called."""
    canary, code = str(place / "canary"), f"__import__('os').mkdir({str(place / 'canary')!r})"
    file = {key: str(place / name) for key, name in {"pt": "x.pt", "pkl": "x.pkl", "npy": "x.npy"}.items()}
    path = call("pathlib.Path", canary)
    make = call("os.mkdir", _partial_=True)
    source = call("importlib.machinery.SourceFileLoader", "hostile_script", str(place / "script.py"))
    nodes = [
        call("os.system", command=f"mkdir {canary}"),
        call("os.mkdir", path=canary),
        call("os.makedirs", name=canary),
        call("posix.mkdir", path=canary),
        call("subprocess.run", args=["mkdir", canary]),
        call("subprocess.check_output", ["mkdir", canary]),
        call("subprocess.getoutput", f"mkdir {canary}"),
        call("builtins.open", file=canary, mode="w"),
        call("io.open", file=canary, mode="w"),
        call("codecs.open", filename=canary, mode="w"),
        call("builtins.eval", code),
        call("builtins.exec", code),
        call("builtins.list", call("builtins.map", make, [canary])),
        call("timeit.timeit", stmt=code, number=1),
        call("runpy.run_path", path_name=str(place / "script.py")),
        call("importlib.import_module", name="hostile_module"),
        call("importlib.machinery.SourceFileLoader.load_module", source),
        call("pathlib.Path.touch", path),
        call("pathlib.Path.write_text", path, "x"),
        call("shutil.copyfile", src=file["pkl"], dst=canary),
        call("urllib.request.urlretrieve", url=f"file://{file['pkl']}", filename=canary),
        call("zipfile.ZipFile.extractall", call("zipfile.ZipFile", str(place / "x.zip")), str(place)),
        call("pickle.load", call("builtins.open", file["pkl"], "rb")),
        call("logging.FileHandler", filename=canary),
        call("logging.config.dictConfig", config=logging_config(canary)),
        call("yaml.unsafe_load", f"!!python/object/apply:os.mkdir [{canary!r}]"),
        call("omegaconf.OmegaConf.save", config={"a": 1}, f=canary),
        call("torch.load", f=file["pt"], weights_only=False),
        call("torch.save", obj=[1], f=canary),
        call("torch.hub.load", repo_or_dir=str(place / "hub"), model="net", source="local"),
        call("torch.serialization.load", file["pt"], weights_only=False),
        call("numpy.load", file=file["npy"], allow_pickle=True),
        call("numpy.savetxt", fname=canary, X=[1]),
        call("pandas.read_pickle", file["pkl"]),
        call("joblib.load", filename=file["pkl"]),
        call("sympy.sympify", code),
        call("torchvision.datasets.utils.extract_archive", from_path=str(place / "x.zip"), to_path=str(place)),
        call("timm.models.load_state_dict", checkpoint_path=file["pt"], weights_only=False),
        call("lightning.LightningModule.load_from_checkpoint", checkpoint_path=file["pt"], weights_only=False),
        call("lightning.fabric.utilities.cloud_io._load", file["pt"], weights_only=False),
        # Paths that begin well and lead elsewhere
        call("torch.nn.modules.module.torch.load", f=file["pt"], weights_only=False),
        call("detseg.data.cache.os.mkdir", path=canary),
        call("detseg.stamp.run", ["mkdir", canary]),
        call("detseg.lazy.import_module", name="hostile_module"),
    ]
    return {node["_target_"]: node for node in nodes}


def logging_config(canary: str) -> dict[str, Any]:
    formatter = {"()": "builtins.open", "file": canary, "mode": "w"}
    return {"version": 1, "disable_existing_loggers": False, "formatters": {"f": formatter}}


def naive(node: Any) -> Any:
    """Build a node as an instantiator without rules does; shows that the hostile ones are."""
    if isinstance(node, list):
        return [naive(item) for item in node]
    if not isinstance(node, dict):
        return node
    built = {key: naive(value) for key, value in node.items()}
    if "_target_" not in built:
        return built
    target = locate(built.pop("_target_"))
    positional, partial = built.pop("_args_", []), built.pop("_partial_", False)
    return target if partial else target(*positional, **built)


def locate(path: str) -> Any:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)
