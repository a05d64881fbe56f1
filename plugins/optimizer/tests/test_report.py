import itertools
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from kernelm_contracts.optimizer import Row
from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import Scores
from kernelm_optimizer.picture import apart, wilson
from kernelm_optimizer.report import Findings, markdown, write


def measurement(model: str, accuracy: float, latency_ms: float, size: int, documents: int = 213) -> Measurement:
    return Measurement(model, Scores("validation", documents, accuracy, accuracy, accuracy - 0.001), latency_ms,
                       2 * latency_ms, 2000 / latency_ms, size, size / 5e5, 0.4)


ENCODER, INT8 = measurement("sha256:e", 0.9765, 71.3, 90_600_000), measurement("sha256:q", 0.9718, 28.9, 22_900_000)
ROWS = (
    Row("adamw", "measured", "encoder", "adamw", "fp32", "sha256:e", ENCODER),
    Row("lion", "not measured: the loss | is\nnan", "encoder", "lion"),
    Row("frozen", "measured", "frozen-linear", "lbfgs", "fp32", "sha256:f", measurement("sha256:f", 0.9671, 70.8, 90_600_000)),
    Row("tfidf", "measured", "tfidf-linear", "liblinear", "fp32", "sha256:t", measurement("sha256:t", 0.9765, 0.61, 9_400_000)),
    Row("adamw-int8", "winner", "encoder", "adamw", "int8", "sha256:q", INT8),
)
FINDINGS = Findings(
    "news", "sha256:d", "adamw-int8", "sha256:q", "accuracy", 0.005, 300, 212.4, ROWS, Scores("test", 425, 0.971, 0.97, 0.9705),
    ENCODER, INT8, {"cores": "2", "processor": "some | processor"})


def test_the_report_says_who_won_by_which_figures_and_what_was_not_measured():
    text = markdown(FINDINGS)
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("| ") and "encoder" in line]
    assert table[0] == ("| adamw | encoder | adamw | fp32 | 97.65 % | 97.55 % | 71.30 (142.60) | 28 | 90.60 | 181 | measured |")
    assert table[1] == "| lion | encoder | lion |  |  |  |  |  |  |  | not measured: the loss \\| is nan |"
    assert table[2].startswith("| **adamw-int8** |")
    assert "**adamw-int8** wins by accuracy: accuracy 97.18 %" in text
    assert "(425 documents): accuracy 97.10 %" in text
    assert "| latency ms | 71.30 | 28.90 | 2.47x |" in lines
    assert "| accuracy | 97.65 % | 97.18 % | -0.47 points |" in lines
    assert "| size MB | 90.60 | 22.90 | 3.96x |" in lines
    assert "| processor | some \\| processor |" in lines


def test_energy_has_a_column_where_the_machine_counts_it():
    assert "energy" not in markdown(FINDINGS)
    used = msgspec.structs.replace(INT8, energy_j=0.0421)
    rows = (*ROWS[:4], msgspec.structs.replace(ROWS[4], measurement=used))
    before = msgspec.structs.replace(ENCODER, energy_j=0.1)
    text = markdown(msgspec.structs.replace(FINDINGS, rows=rows, int8=used, int8_reference=before))
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("| candidate")).endswith("| memory MB | energy mJ | outcome |")
    assert next(line for line in lines if line.startswith("| **adamw-int8**")).endswith("| 46 | 42.1 | winner |")
    assert "| energy mJ | 100 | 42.1 | 2.38x |" in lines
    assert "energy that of all processors" in text


def test_without_an_int8_variant_nothing_is_said_of_one():
    plain = msgspec.structs.replace(FINDINGS, rows=ROWS[:4], winner="adamw", int8=None, int8_reference=None, conditions={})
    assert "int8" not in markdown(plain)
    assert "Conditions" not in markdown(plain)


@pytest.mark.parametrize("rows", [ROWS, ROWS[4:]])
def test_the_folder_holds_table_figures_and_picture(rows, tmp_path):
    findings = msgspec.structs.replace(FINDINGS, rows=rows)
    write(findings, tmp_path / "report")
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.md", "report.json", "report.png"}
    assert msgspec.json.decode((tmp_path / "report" / "report.json").read_bytes(), type=Findings) == findings
    with Image.open(tmp_path / "report" / "report.png") as picture:
        assert picture.size == (1500, 900)
        assert len(set(picture.convert("RGB").resize((150, 90)).get_flattened_data())) > 50  # something is drawn


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_those_of_scipy(counts):
    hits, documents = counts
    expected = binomtest(hits, documents).proportion_ci(0.95, "wilson")
    assert wilson(hits / documents, documents) == pytest.approx((expected.low, expected.high), abs=2e-4)


@given(st.lists(st.floats(0, 400), min_size=1, max_size=8))
def test_labels_keep_their_distance_and_their_middle(wanted):
    placed = apart(wanted, 20.0)
    ordered = sorted(placed)
    assert all(b - a >= 20 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert statistics.fmean(placed) == pytest.approx(statistics.fmean(wanted), abs=1e-6)
    for (a, pa), (b, pb) in itertools.combinations(zip(wanted, placed, strict=True), 2):
        assert a == b or (a < b) == (pa < pb)


def test_labels_that_are_apart_stay_where_they_are():
    assert apart([100.0, 0.0, 50.0], 20.0) == [100.0, 0.0, 50.0]
