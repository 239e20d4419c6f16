"""The picture of a profile: well-formed, in proportion, with text only where it fits."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from onegraph.profile_picture import WIDTH, profile_svg

SVG = "{http://www.w3.org/2000/svg}"


def profile(*rows: tuple[str, float]) -> dict[str, Any]:
    return {
        "steps": 4,
        "batches": [{"num_tokens": 8, "num_seqs": 8, "kind": "decode", "count": 4}],
        "seconds_per_step": 0.01,
        "rows": [
            {
                "path": path.split("/"),
                "calls_per_step": 1,
                "seconds_per_step": seconds,
                "ops": ["add", "mul<2>"],
                "user": "model.py:3",
                "module_path": "layers.0",
            }
            for path, seconds in rows
        ],
    }


def boxes(text: str) -> dict[str, dict[str, float]]:
    """Each box by the path in its tooltip."""
    found = {}
    for box in ElementTree.fromstring(text).iter(f"{SVG}rect"):
        path = (box.findtext(f"{SVG}title") or "").splitlines()[0]
        found[path] = {name: float(box.attrib[name]) for name in ("x", "y", "width", "height")}
    return found


def test_boxes_are_as_wide_as_their_time_and_lie_below_what_they_are_in() -> None:
    text = profile_svg(
        profile(("step", 0.01), ("step/model", 0.008), ("step/model/piece 0 (a)", 0.004), ("replay", 0.005))
    )
    found = boxes(text)
    assert found["step"]["width"] == WIDTH
    assert found["step › model"]["width"] == 0.8 * WIDTH
    assert found["step › model › piece 0 (a)"]["width"] == 0.4 * WIDTH
    assert found["replay"]["width"] == 0.5 * WIDTH
    assert found["step"]["y"] < found["step › model"]["y"] < found["replay"]["y"]


def test_texts_fit_their_boxes_and_markup_is_escaped() -> None:
    rows = [("step", 0.01), ("step/a <b> & a long name of a kernel", 0.001), *((f"step/{i}", 0.0009) for i in range(9))]
    text = profile_svg(profile(*rows))
    root = ElementTree.fromstring(text)
    assert any("mul<2>" in (title.text or "") for title in root.iter(f"{SVG}title"))
    places = {(box["x"], box["y"]): box["width"] for box in boxes(text).values()}
    shown = [one for one in root.iter(f"{SVG}text") if one.get("class") == "in"]
    assert [one.text for one in shown][:2] == ["step", "a <b> & a long…"]
    for one in shown:
        assert one.text is not None
        width = places[float(one.attrib["x"]) - 3, float(one.attrib["y"]) - 15]
        assert len(one.text) * 7 <= width


def test_it_is_made_for_light_and_dark_and_asks_nothing_of_the_network() -> None:
    text = profile_svg(profile(("step", 0.01)))
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


def test_a_profile_of_nothing_and_of_very_much() -> None:
    ElementTree.fromstring(profile_svg({"steps": 0, "batches": [], "seconds_per_step": 0.0, "rows": []}))
    many = [(f"step/model/piece {i}/kernel {k}", 1e-5) for i in range(100) for k in range(10)]
    pieces = [(f"step/model/piece {i}", 1e-4) for i in range(100)]
    assert len(profile_svg(profile(("step", 0.01), ("step/model", 0.01), *pieces, *many))) < 500_000
