#!/usr/bin/env python
"""Write docs/plans.png, the pictures of all presets in docs/plans.md.

python scripts/plan_pictures.py [--out FILE]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cllm.arguments import Parser  # noqa: E402

LAYERS, COLUMNS, DPI = 8, 4, 80
OPTIONS = {"swiftkv": ":group=2", "fusedkv": ":keys=complex,values=matrix"}
"""Presets that are drawn a second time, with these options."""


def designs() -> list[str]:
    """Every preset, and some with options, in the order of the pictures."""
    from cllm.plan.presets import preset_names

    return [name + options for name in preset_names() for options in dict.fromkeys(("", OPTIONS.get(name, "")))]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    import cllm

    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "docs" / "plans.png")
    arguments = parser.parse_args(argv)
    from PIL import Image

    pictures = []
    for design in designs():
        file = io.BytesIO()
        cllm.plan(design, layers=LAYERS, n_heads=16, d_model=2048).figure(design).savefig(file, dpi=DPI)
        pictures.append(Image.open(file).convert("RGB"))
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (width * COLUMNS, sum(heights)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture, (x * width + (width - picture.width) // 2, sum(heights[:y])))
    page.quantize(64).save(arguments.out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
