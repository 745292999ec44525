"""Unknown keys and choices answered with the nearest ones that exist."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf


def flat_keys(cfg: DictConfig) -> list[str]:
    """Return every dotted key of ``cfg``, groups included, without resolving a value."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    return list(_walk(plain, ""))


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the candidates most like ``word``, best first.

    A dotted key is also compared by its last part, so that ``max_epoch`` finds ``trainer.max_epochs``.
    """
    names = sorted(set(candidates))
    last = word.rsplit(".", 1)[-1]
    scores = {
        name: max(
            difflib.SequenceMatcher(None, word, name).ratio(),
            0.85 * difflib.SequenceMatcher(None, last, name.rsplit(".", 1)[-1]).ratio(),
        )
        for name in names
    }
    best = sorted((name for name in names if scores[name] >= 0.6), key=lambda name: -scores[name])
    close = scores[best[0]] - 0.15 if best else 0.0  # what is much less alike than the best would only distract
    return [name for name in best if scores[name] >= close][:count]


def explain(
    overrides: Sequence[str],
    *,
    compose: Callable[[Sequence[str]], DictConfig],
    groups: Mapping[str, Sequence[str]],
) -> str | None:
    """Say which override is at fault and what was probably meant.

    Args:
        overrides: as typed, such as ``["model=fcoss", "trainer.max_epoch=3"]``.
        compose: composes the config from overrides.
        groups: every config group with its choices.

    Returns:
        A message of one line per fault, or ``None`` where no override is at fault.
    """
    values: list[str] = []
    choices: list[str] = []
    faults: list[str] = []
    for text in overrides:
        key, equals, value = text.lstrip("+~").partition("=")
        group = key.partition("@")[0]
        if not equals and not text.startswith("~"):
            faults.append(_without_value(text, groups))
            continue
        if group in groups and value not in ("null", ""):
            listed = value.startswith("[")  # as in callbacks=[default,ema]; without brackets a sweep
            names = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
            unknown = [name for name in names if name not in groups[group]]
            faults += [_unknown_choice(group, name, groups[group]) for name in unknown]
            if not unknown and (listed or "," not in value):
                choices.append(text)
        elif group not in groups:
            values.append(text)
    if faults:
        return "\n".join(faults)
    known = [*flat_keys(compose(choices)), *groups]
    for text in values:
        key = text.partition("=")[0]
        if key.startswith(("+", "~", "hydra.")) or key in known:
            continue
        faults.append(f"there is no key '{key}'." + _meant(nearest(key, known)))
    return "\n".join(faults) or None


def _without_value(text: str, groups: Mapping[str, Sequence[str]]) -> str:
    homes = [f"{group}={text}" for group, names in groups.items() if text in names]
    choices = f" Choices: {', '.join(groups[text])}." if text in groups else _meant(homes)
    return f"'{text}' has no value: write key=value.{choices}"


def _unknown_choice(group: str, name: str, choices: Sequence[str]) -> str:
    return f"there is no {group}={name}." + _meant(nearest(name, choices)) + f" Choices: {', '.join(choices)}."


def _meant(names: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""


def _walk(node: Any, prefix: str) -> Iterable[str]:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else f"{key}"
        yield path
        yield from _walk(value, path)
