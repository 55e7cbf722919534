"""The page of federations: its form is the configuration, its pictures say who has what and how the rounds went."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import assets
from adapters.errors import InputError
from studio.federation.partition_table import Part, parts
from studio.federation.schema import FederateConfig
from tests.ui.conftest import Tab
from ui.components import federation, schema_form
from ui.pages import federated

LONG = 240_000


def test_the_form_is_the_configuration():
    """Every field of the schema is on the page, but for those of clients with files of their own."""
    missing = set(FederateConfig.model_fields) - set(federated.NAMES)
    assert missing == {"clients", "secure_aggregation"}
    sample = federated.sample_config()
    shown = dict(zip(federated.NAMES, federated.fill(sample), strict=True))
    for name in federated.NAMES:  # what the sample leaves out is at its default
        if name not in sample:
            shown[name] = schema_form.show(federated.KNOWN[name], federated.KNOWN[name].default)
    made = federated.config_of(tuple(shown.values()))
    assert made == FederateConfig.parse(sample)
    assert [part.name for part in parts(made)] == ["fluent-emoji-flat", "fluent-emoji-high-contrast", "noto"]
    picture, file = federated.look_at(*shown.values())
    assert "noto has" in picture
    assert FederateConfig.from_yaml(_written(file)) == made
    shown["data"] = ""
    with pytest.raises(InputError, match="name clients with their data"):
        federated.config_of(tuple(shown.values()))


def _written(text: str) -> Path:
    import tempfile

    place = Path(tempfile.mkdtemp()) / "federation.yaml"
    place.write_text(text)
    return place


def test_pictures_hold_what_they_are_given():
    drawn = federation.who_has_what([Part("north", 30, 5, {"cat": 20, "<dog>": 10}), Part("south", 15, 0, {"cat": 15})])
    widths = [float(w) for w in re.findall(r'width="([\d.]+)"', drawn)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=1e-2)
    assert widths[2] == pytest.approx(1.5 * widths[1], rel=1e-2)
    assert "&lt;dog&gt;" in drawn
    assert "<dog>" not in drawn
    rounds = [
        {"number": 0, "clients": {}, "measured": {}, "failed": {}, "up": 9, "down": 0, "epsilon": {}, "bias": None},
        {"number": 1, "clients": {"a": {"loss": 2.0}, "b": {"loss": 4.0}}, "failed": {}, "up": 1000, "down": 2000,
         "measured": {"a": {"accuracy": 0.2}, "b": {"accuracy": 0.6}}, "epsilon": {"a": 0.5, "b": 0.7}, "bias": 0.125},
        {"number": 2, "clients": {"a": {"loss": 1.0}}, "failed": {"b": "did not answer"}, "up": 500, "down": 500,
         "measured": {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.7}}, "epsilon": {"a": 1.0}, "bias": 0.0625},
    ]  # fmt: skip
    curve = federation.curves(rounds, 4)
    assert "Accuracy 0.6 after round 2; a 0.5, b 0.7" in curve
    assert curve.count('<path class="raw"') == 2
    shown = federation.table(rounds)
    assert "1.5 kB up, 2.5 kB down" in shown
    assert "Round 2 without b: did not answer" in shown
    assert re.findall(r"<td>(.*?)</td>", shown)[:6] == ["1", "2", "1.0 kB", "2.0 kB", "0.125", "0.7"]
    unmeasured = [{**one, "measured": {}} for one in rounds]
    assert "training loss 1 after round 2" in federation.curves(unmeasured, 4)
    assert federation.curves([], 4) == federation.table([]) == federation.who_has_what([]) == ""


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_the_sample_runs_from_the_page(tab: Tab) -> None:
    """Three artists' emoji, one for each client: seen, run, drawn, and in the library."""
    if not Path(assets.path("models")).joinpath("emoji-vit").is_dir():
        pytest.skip("the embedded classifier is not in this checkout")
    page = tab.open("federated")
    page.locator("#federated-sample").click()
    page.wait_for_selector("#federated-parts svg", timeout=LONG)
    page.locator("#federated-rounds input").first.fill("2")
    page.locator("#federated-start").click()
    page.wait_for_selector("#federated-panel .as-job", timeout=LONG)
    page.wait_for_function(
        "document.querySelector('#federated-panel').innerText.includes('2 rounds with 3 clients')", timeout=LONG
    )
    assert page.locator("#federated-curves svg").count() == 1
