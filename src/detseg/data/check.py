"""Faults in annotations: what was repaired is counted in a report, what cannot be repaired is an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

FIRST_FEW = 5
"""How many examples of each kind of fault a report names."""

KINDS = {
    "clipped": "box beyond the image, clipped to it",
    "zero_area": "box without area, dropped",
    "not_finite": "box with NaN or infinity, dropped",
    "inverted": "box with its right left of its left or its bottom above its top, dropped",
    "outside": "box wholly outside the image, dropped",
    "unknown_category": "object of a category that the file does not define, dropped",
    "unknown_image": "annotation of an image that the file does not list, dropped",
    "duplicate_id": "annotation or image that repeats an earlier id; kept unless it is an exact copy",
    "duplicate": "exact copy of another annotation of the image, dropped",
    "missing_image": "image file not found, image left out",
    "missing_mask": "image without a mask file, left out",
    "image_size": "annotated size differs from the file's, the file's is used",
    "bad_polygon": "polygon with fewer than three points or values that are not finite, dropped",
    "no_mask": "object without a mask where masks are wanted, dropped",
    "other_class": "object of a class that was not asked for, left out",
    "no_objects": "image without objects",
    "absent_class": "class of which the maps have no pixel; it keeps its label, and its figures are n/a",
}
"""What a report counts; the key is the kind's name in code and tests."""


class DataError(ValueError):
    """Data that cannot be repaired; the message names file, id, value and what would be allowed."""


@dataclass
class Finding:
    """How often one kind of fault occurred, and the first few places."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What the check of one split found.

    Attributes:
        source: the file or folder that was checked.
        images: images that are used.
        objects: objects that are used.
        findings: by kind (see ``KINDS``); a kind that did not occur is absent.
    """

    source: str
    images: int = 0
    objects: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Count one fault of ``kind`` (a key of ``KINDS``) and remember ``where`` if it is among the first few."""
        if kind not in KINDS:
            raise KeyError(f"{kind!r} is no kind of finding; the kinds are {', '.join(KINDS)}")
        finding = self.findings.setdefault(kind, Finding())
        finding.count += 1
        if len(finding.first) < FIRST_FEW:
            finding.first.append(where)

    def count(self, kind: str) -> int:
        """Return how often ``kind`` was found."""
        return self.findings[kind].count if kind in self.findings else 0

    @property
    def clean(self) -> bool:
        """Whether nothing had to be repaired or left out; images without objects and absent classes are no fault."""
        return not set(self.findings) - {"no_objects", "absent_class"}

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.images} images, {self.objects} objects"]
        for kind, finding in self.findings.items():
            shown = "; ".join(finding.first) + ("; ..." if finding.count > len(finding.first) else "")
            lines.append(f"  {finding.count} x {KINDS[kind]}: {shown}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Report:
        """Return the report that :meth:`to_json` wrote."""
        values = json.loads(text)
        values["findings"] = {kind: Finding(**finding) for kind, finding in values["findings"].items()}
        return Report(**values)


def check_classes(*, source: str, found: Sequence[str], wanted: Sequence[str] | None, num_classes: int | None) -> None:
    """Raise ``DataError`` unless the files' classes are those asked for.

    Args:
        source: the data set, for the message.
        found: the names that the files give, one per label.
        wanted: the names asked for, or ``None`` for whatever the files have.
        num_classes: the number asked for, or ``None``.
    """
    if num_classes is not None and num_classes != len(found):
        raise DataError(
            f"{source}: num_classes={num_classes} was asked for, but the files have {len(found)} classes. "
            f"{both_lists(wanted, found)}. Set data.num_classes=null to take the files' number"
        )
    if wanted is not None and list(wanted) != list(found):
        raise DataError(f"{source}: the class names differ. {both_lists(wanted, found)}")


def both_lists(wanted: Sequence[str] | None, found: Sequence[str]) -> str:
    """Return ``"wanted: [...]; found: [...]"`` for messages."""
    named = "not given" if wanted is None else list(wanted)
    return f"Class names wanted: {named}; found: {list(found)}"
