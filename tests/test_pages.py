"""The pages of measured bounds and predictions hold what their results say: nothing is typed by hand."""

import json

from benchmarks import calibration_page, fuzz


def test_fuzz_page_is_that_of_its_results():
    found = json.loads(fuzz.RESULTS.read_text())
    assert fuzz.PAGE.read_text() == fuzz.page(found)
    assert found["cases"] == sum(row["cases"] for row in found["types"].values()) >= 1_000_000
    assert set(found["types"]) == set(fuzz.SPECS)
    assert found["violations"] == 0


def test_a_violation_is_counted_and_shown():
    row = {"cases": 2, "worst": {"3": 0.5, "4-6": 1.25}}
    text = fuzz.page({"cases": 2, "seed": 0, "torch": "x", "violations": 1, "types": {"relu": row}})
    assert "2 cases, 1 violations" in text
    assert "| relu | 2 | 0.500000 | 1.250000 | none | none |" in text


def test_calibration_page_is_that_of_its_results():
    events = calibration_page.measured()
    assert calibration_page.PAGE.read_text() == calibration_page.page(events)
    assert len(events) >= 500
    assert len({event["recipe"] for event in events}) >= 4


def test_a_factor_of_two_counts_both_ways():
    events = [{"predicted": 1.0, "train_increase": x} for x in (0.49, 0.5, 1.0, 2.0, 2.1, -1.0)]
    assert calibration_page.within(events, "train_increase", calibration_page.total) == 0.5
