"""The picture of a plan: every read is drawn, and no text or line covers what it does not belong to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.text import Text
from PIL import Image

from cllm.config import ModelConfig
from cllm.plan.describe import plan_drawing
from cllm.plan.picture import plan_figure
from cllm.plan.plan import KVPlan
from cllm.plan.presets import preset_names

DEPTHS = (8, 24, 48)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "mha": [{"window": 1024, "full_every": 4}],
    "mla": [{"factor": 2}],
    "yoco": [{"window": 512}, {"lower": "retention"}],
    "trailing": [{"window": 1024, "full_every": 2, "n_shared": 4}],
    "cla": [{"factor": 3, "keep_ends": True}],
    "swiftkv": [{"group": 2}, {"group": 3, "n_lower": 10}],
    "yoco_u": [{"window": 512, "times": 2}],
}
CROSSED = {  # owners that read each other, several rails a side, keys and values from different layers
    "layers": [
        {"layers": "0-3", "own": {}},
        {"layers": 4, "own": {}, "keys": {"fuse": [1, 4]}, "values": {"fuse": [0, 2, 4]}},
        {"layers": 5, "own": {}, "values": {"share": 3}, "keys": {"share": 2}},
        {"layers": 6, "keys": {"fuse": [0, 1, 5]}, "values": {"share": 5}},
        {"layers": 7, "keys": {"share": 4}, "values": {"fuse": [2, 3, 4]}, "window": 7},
    ]
}


EVERYTHING = {  # mixes, halves, ties, reads of several slots, windows in their parts
    "layers": [
        {"layers": 0, "own": {"tie": "kv"}},
        {"layers": 1, "own": {"mix": [0], "input": 0}, "keys": {"fuse": [0, 1]}, "values": {"fuse": [1]}},
        {"layers": 2, "read": {"join": [{"own": {"window": 4}}], "sink": True}},
        {"layers": 3, "read": {"join": [{"share": 0, "window": 8}, {"own": {"window": 3}}]}},
        {"layers": 4, "read": {"gate": [1, {"share": 3, "window": 2}]}},
        {"layers": 5, "own": {"only": "keys"}, "values": {"share": 0}},
        {"layers": 6, "keys": {"share": 5}, "values": {"fuse": [0, 1], "granularity": "matrix"}, "window": 6},
        {"layers": 7, "own": {"mix": [1, 0]}, "window": 5},
    ]
}

INPUTS = {  # outputs of several layers are projected, by layers that read and are read, on rails beside those of keys
    "layers": [
        {"layers": 0, "own": {"tie": "kv"}},
        {"layers": 1, "own": {"mix": [0], "input": 0}, "keys": {"fuse": [0, 1]}, "values": {"fuse": [1]}},
        {"layers": 2, "own": {"input": 1}, "keys": {"fuse": [0, 1, 2]}, "values": {"fuse": [1, 2]}},
        {"layers": 3, "own": {"input": 2}, "keys": {"fuse": [2, 3]}},
        {"layers": 4, "own": {"input": 1}, "keys": {"fuse": [2, 3, 4]}, "values": {"share": 3}},
        {"layers": "5-8", "keys": {"fuse": [4, 0]}, "values": {"fuse": [0, 4]}},
        {"layers": 9, "own": {"input": 2}},
    ],
    "loop": {"layers": "5-6", "times": 2},
}
LOOPED = {"layers": [{"layers": "0-1", "own": {}}, {"layers": "2-7", "own": {"input": 1}}]}
LOOPS: dict[str, dict[str, Any]] = {
    "loop": LOOPED | {"loop": {"layers": "2-3", "times": 3}},
    "loop of one": LOOPED | {"loop": {"layers": 2, "times": 5}},
}


def _plan(kv: dict[str, Any], n_layers: int) -> KVPlan:
    return ModelConfig(vocab_size=64, d_model=512, n_layers=n_layers, n_heads=8, kv=kv).plan()


class Box(NamedTuple):
    """A rectangle in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box) -> bool:
        return self.x0 <= other.x1 and other.x0 <= self.x1 and self.y0 <= other.y1 and other.y0 <= self.y1


class Drawn:
    """The artists of a picture and their extents in pixels."""

    def __init__(self, figure: Figure):
        self.figure = figure
        self.renderer: RendererAgg = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        named: list[Artist] = figure.findobj(lambda artist: bool(artist.get_gid()))
        self.boxes = {a.get_gid(): self.extent(a) for a in named if isinstance(a, Rectangle)}
        self.lines = {a.get_gid(): self.extent(a) for a in named if not isinstance(a, Rectangle | Text)}
        self.arrows = {a.get_gid() for a in named if isinstance(a, FancyArrowPatch)}
        self.texts = [a for a in figure.findobj(Text) if a.get_text() and a.get_visible()]

    def extent(self, artist: Artist) -> Box:
        return Box(*map(float, artist.get_window_extent(self.renderer).extents))


def _meet(one: Box, other: Box) -> bool:
    """Whether they have more than half a pixel in common both ways."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    return width > 0.5 and min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5


CASES = [
    *((name, n, {"preset": name}) for name in preset_names() for n in DEPTHS),
    *((name, 48, {"preset": name, **more}) for name, several in OPTIONS.items() for more in several),
    ("crossed", 8, CROSSED),
    ("everything", 8, EVERYTHING),
    ("inputs", 10, INPUTS),
    *((name, 8, kv) for name, kv in LOOPS.items()),
]
TITLE = "a run with quite a long name, which states its size, its data, its seed and more"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{len(case[2])}")
def picture(request: pytest.FixtureRequest) -> tuple[KVPlan, Drawn]:
    """A plan and its picture."""
    _, n_layers, kv = request.param
    plan = _plan(kv, n_layers)
    return plan, Drawn(plan_figure(plan, TITLE))


def test_nothing_covers_what_it_does_not_belong_to(picture) -> None:
    _, drawn = picture
    canvas = drawn.figure.bbox
    texts = [(text.get_text(), drawn.extent(text)) for text in drawn.texts]
    for i, (words, box) in enumerate(texts):
        assert canvas.x0 <= box.x0, words
        assert box.x1 <= canvas.x1, words
        assert canvas.y0 <= box.y0, words
        assert box.y1 <= canvas.y1, words
        assert not [other for other, at in texts[:i] if _meet(box, at)], words
        assert not [name for name, line in drawn.lines.items() if _meet(box, line)], words
        around = [place for place in drawn.boxes.values() if _meet(box, place)]
        assert all(place.x0 < box.x0 and box.x1 < place.x1 for place in around), f"{words} is wider than its box"
        assert len(around) <= 1
    for name, line in drawn.lines.items():
        assert line.x0 >= canvas.x0
        assert line.x1 <= canvas.x1
        for layer, box in drawn.boxes.items():
            touches = name.split()[-1] == layer.removeprefix("layer ") and not name.startswith("rail")
            assert touches or not box.overlaps(line), f"{name} crosses {layer}"
            if name.startswith("output of") and name.count(" ") == 2:
                assert not box.overlaps(line) or line.y0 > box.y1 - 2, f"{name} is not along the top of {layer}"
                continue
            inside = min(line.x1, box.x1) - max(line.x0, box.x0)
            assert inside < 4 or not box.overlaps(line), f"{name} goes into {layer}"


def test_every_read_of_another_layer_has_a_dot_on_its_rail_and_an_arrow(picture) -> None:
    plan, drawn = picture
    expected, readers = set(), set()
    for i in range(len(plan)):
        for half, read in (("keys", plan.keys(i)), ("values", plan.values(i))):
            taken = {*(read.layers if read.layers != (i,) else ()), *plan.mixes(i)}
            users = {*plan.readers(half).get(i, ()), *plan.mixers(i)}
            if taken:
                expected |= {f"{half} of {j} into {i}" for j in taken if j != i or users != {i}}
                readers.add(f"{half} into {i}")
    for i in plan.owners:
        if (below := plan.owned(i).input) is not None:
            expected.add(f"output of {below} into {i}")
            readers.add(f"output into {i}")
    dots = {name: box for name, box in drawn.lines.items() if re.fullmatch(r"\w+ of \d+ into \d+", name)}
    assert set(dots) == expected
    assert drawn.arrows == readers
    for name, dot in dots.items():
        half, owner, reader = re.fullmatch(r"(\w+) of (\d+) into (\d+)", name).groups()
        rail, stub = drawn.lines[f"rail of {half} of {owner}"], drawn.lines[f"{half} of {owner}"]
        arrow, target, source = (
            drawn.lines[f"{half} into {reader}"], drawn.boxes[f"layer {reader}"], drawn.boxes[f"layer {owner}"]
        )  # fmt: skip
        assert dot.overlaps(rail)
        assert dot.overlaps(arrow)
        assert stub.overlaps(rail)
        assert _near(arrow, target, half)
        if half == "output":
            assert source.y1 - 2 < stub.y0 <= stub.y1 < source.y1 + 4, f"{name} does not begin at the top of its layer"
            assert stub.x0 < source.x0 < source.x1 < stub.x1 + 2
        else:
            assert _near(stub, source, half)


def _near(line: Box, box: Box, half: str) -> bool:
    """Whether `line` ends at the side of `box` for `half`, at its height."""
    ends = abs(line.x0 - box.x1) if half == "values" else abs(line.x1 - box.x0)
    return ends < 4 and box.y0 < (line.y0 + line.y1) / 2 < box.y1


def test_layers_that_see_windows_alone_are_dashed_and_slots_with_learned_weights_hollow() -> None:
    figure = plan_figure(_plan(EVERYTHING, 8), "x")
    named: list[Any] = figure.findobj(lambda artist: bool(artist.get_gid()))
    drawn = {artist.get_gid(): artist for artist in named}
    assert [i for i in range(8) if drawn[f"layer {i}"].get_linestyle() != "-"] == [2, 3, 6, 7]
    dots = {name: dot for name, dot in drawn.items() if re.fullmatch(r"keys of \d+ into \d+", name)}
    hollow = {name for name, dot in dots.items() if dot.get_markerfacecolor() == "white"}
    assert hollow == {"keys of 0 into 1", "keys of 1 into 1", "keys of 0 into 7", "keys of 1 into 7"}


def test_every_turn_of_a_loop_has_a_bracket_beside_its_layers(picture) -> None:
    plan, drawn = picture
    brackets = {name: box for name, box in drawn.lines.items() if name.startswith("turn")}
    loop = plan.loop
    assert list(brackets) == ([] if loop is None else [f"turn {n + 1} of {loop.times}" for n in range(loop.times)])
    right = max(box.x1 for name, box in {**drawn.boxes, **drawn.lines}.items() if name not in brackets)
    for n, (turn, bracket) in enumerate(brackets.items()):
        inside = [i for i in range(len(plan)) if bracket.y0 - 2 < drawn.boxes[f"layer {i}"].y0 < bracket.y1]
        assert inside == list(range(loop.first + n * loop.count, loop.first + (n + 1) * loop.count))
        assert bracket.y1 + 2 > drawn.boxes[f"layer {inside[-1]}"].y1
        assert bracket.x0 > right
        (text,) = (drawn.extent(text) for text in drawn.texts if text.get_text() == turn)
        assert bracket.y0 < (text.y0 + text.y1) / 2 < bracket.y1


def _legend_of(kv: dict[str, Any], n_layers: int = 8) -> set[str]:
    figure = plan_figure(_plan(kv, n_layers), "x")
    return {text.get_text() for text in figure.legends[0].get_texts()}


def test_the_legend_names_projected_outputs_and_loops_where_there_are_some() -> None:
    projected, turn = "projected from the output of a lower layer", "turn of a loop: "
    assert projected in _legend_of({"preset": "swiftkv"})
    assert projected in _legend_of({"preset": "ced"})
    assert f"{turn}layers 0-1 x 3, with the same weights" in _legend_of({"preset": "yoco_u"})
    assert {projected, f"{turn}layer 2 x 5, with the same weights"} <= _legend_of(LOOPS["loop of one"])
    assert not [label for label in _legend_of({"preset": "yoco"}) if label == projected or label.startswith(turn)]


def test_the_drawing_in_characters_names_projected_outputs_and_turns() -> None:
    lines = plan_drawing(_plan(LOOPS["loop"], 8)).splitlines()
    assert lines[2] == "layer 1 . O . . . . . ."
    assert lines[3] == "layer 2 . . O . . . . .  turn 1 of 3"
    assert lines[8] == "layer 7 . . . . . . . O  turn 3 of 3"
    assert lines[10:] == [
        "all turns have the weights of layers 2-3",
        "layers 2-7 project the output of layer 1 into the cached slots",
    ]
    several = plan_drawing(_plan(INPUTS, 10)).splitlines()
    assert "layer 1 projects the output of layer 0 into the cached slot" in several
    assert "layers 2, 4 project the output of layer 1 into the cached slots" in several
    assert "all turns have the weights of layer 2" in plan_drawing(_plan(LOOPS["loop of one"], 8)).splitlines()


def test_the_drawing_in_characters() -> None:
    lines = plan_drawing(_plan(EVERYTHING, 8)).splitlines()
    assert lines[1:9] == [
        "layer 0 O . . . . .",
        "layer 1 K O . . . .",
        "layer 2 . . O . . .",
        "layer 3 B . . O . .",
        "layer 4 . B . B . .",
        "layer 5 V . . . k .",
        "layer 6 V V . . K .",
        "layer 7 . . . . . O",
    ]
    assert lines[0].split() == ["0", "1", "2", "3", "5", "7"]
    assert lines[10:] == [
        "layer 1 mixes slot 0 into its own",
        "layer 7 mixes slots 0-1 into its own",
        "layer 1 projects the output of layer 0 into the cached slot",
    ]
    assert "layers 1-3 mix slot 0 into their own" in plan_drawing(_plan({"preset": "yoco_pp"}, 8))


def test_no_line_runs_along_another(picture) -> None:
    lines = picture[1].lines
    rails = [box for name, box in lines.items() if name.startswith("rail")]
    across = [box for name, box in lines.items() if re.fullmatch(r"\w+ (of|into) \d+", name)]
    for boxes in (rails, across):
        assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


def test_windows_and_slots_are_written_into_the_boxes() -> None:
    plan = _plan({"preset": "trailing", "window": 1024, "full_every": 5, "n_shared": 4}, 24)
    drawn = Drawn(plan_figure(plan, "x"))
    for i in range(24):
        box = drawn.boxes[f"layer {i}"]
        inside = {text.get_text() for text in drawn.texts if _meet(drawn.extent(text), box)}
        expected = {str(i)} | ({"8 KV heads"} if i < 20 else set())
        assert inside == expected | ({"last 1024"} if plan.layers[i].window else set())


def test_the_page_of_plans_has_pictures_and_bytes_of_every_preset(load_file, monkeypatch, tmp_path):
    root = Path(__file__).resolve().parents[2]
    pictures, page = load_file(root / "scripts" / "plan_pictures.py"), (root / "docs" / "plans.md").read_text()
    assert set(preset_names()) <= set(pictures.designs())
    assert "](plans.png)" in page
    table = page[page.index("| preset | layers | resident | read |") :]
    assert all(f"| `{name}` | " in table for name in preset_names())
    assert Image.open(root / "docs" / "plans.png").width > 1000
    monkeypatch.setattr(pictures, "designs", lambda: ["mha", "fusedkv"])
    assert pictures.main(["--out", str(tmp_path / "two.png")]) == 0
    assert Image.open(tmp_path / "two.png").getbbox() is not None
