"""Where a finished evaluation goes: two files beside each other, written aside and then renamed."""

import json
from pathlib import Path

from fathom.evals.base import Report

TASKS = ("skills",)
"""What can be evaluated, by name."""


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `<task>.json` and `<task>.md` into `folder` (made if it is missing); gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(report.to_dict(), indent=2), "md": report.to_markdown()}
    paths = []
    for kind, text in texts.items():
        path = folder / f"{report.task}.{kind}"
        aside = path.with_name(path.name + ".part")
        aside.write_text(text + "\n", encoding="utf-8")
        paths.append(aside.replace(path))
    return paths[0], paths[1]
