"""What the trackers left on disk, read without their services: for tests that compare them."""

from __future__ import annotations

import csv
import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

Values = dict[tuple[str, int], float]
"""(name, step) -> value; where a figure came twice at a step, the last."""


def read_csv(run: Path) -> Values:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (name, int(row["step"])): float(text) for row in rows for name, text in row.items() if text and name != "step"
    }


def read_tensorboard(run: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def read_pictures(run: Path) -> set[tuple[str, int]]:
    """Return name and step of TensorBoard's pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    return {(name, event.step) for name in events.Tags()["images"] for event in events.Images(name)}


def read_mlflow(store: Path, run_id: str) -> Values:
    with sqlite3.connect(store) as opened:
        rows = opened.execute(
            "select key, step, value from metrics where run_uuid = ? order by timestamp", [run_id]
        ).fetchall()
    return {(name, step): value for name, step, value in rows}


def wandb_records(folder: Path) -> list[Any]:
    """Return the records of an offline run: LevelDB's log format, blocks of 32 KiB, each record behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data = path.read_bytes()
    records, place, whole = [], 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def read_wandb(records: list[Any]) -> Values:
    found: Values = {}
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        plain = [item for item in record.history.item if len(item.nested_key) <= 1]  # the others are parts of pictures
        row = {(item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in plain}
        step = row.pop("trainer/global_step", None)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        found |= {(name, step): value for name, value in numbers.items() if not name.startswith("_")}
    return found
