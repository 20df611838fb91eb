"""The higgs-sim generator: its kinematics against closed forms and invariances, and a few events from end to end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pythia8mc", reason="the higgs extra has wheels for CPython 3.11 on Linux only")

import datasets
from datasets.higgs import COLUMNS

from benchmarks.higgs_sim import __main__ as simulation
from benchmarks.higgs_sim import collisions, compare, detector, features
from benchmarks.higgs_sim.collisions import Particles, boosted, cos_decay_angle, pseudorapidity
from benchmarks.higgs_sim.detector import Seen, seen
from benchmarks.higgs_sim.features import W, mass, masses, neutrino

directions = st.tuples(st.floats(-200, 200), st.floats(-200, 200), st.floats(-200, 200))


def vector(px, py, pz, m=0.0):
    return np.array([np.sqrt(px**2 + py**2 + pz**2 + m**2), px, py, pz])


def test_a_boost_into_the_own_frame_leaves_the_mass_and_keeps_products():
    frame, other = vector(30, -40, 120, 80), vector(5, 6, -7, 1)
    np.testing.assert_allclose(boosted(frame, frame), [80, 0, 0, 0], atol=1e-9)
    moved = boosted(other, frame)
    metric = np.diag([1, -1, -1, -1])
    np.testing.assert_allclose(moved @ metric @ moved, 1, rtol=1e-9)
    np.testing.assert_allclose(moved[0], other @ metric @ frame / 80, rtol=1e-9)


@settings(max_examples=50)
@given(st.floats(-1, 1), st.floats(1, 300))
def test_the_decay_angle_is_the_one_that_the_decay_was_made_with(cosine, speed):
    """W at rest decays at that angle to z; it flies along z, its mother is at rest."""
    sine = np.sqrt(1 - cosine**2)
    w = vector(0, 0, speed, W)
    fermion = boosted(W / 2 * np.array([1, sine, 0, cosine]), vector(0, 0, -speed, W))
    mother = np.array([500.0, 0, 0, 0])
    assert cos_decay_angle(fermion, w, mother) == pytest.approx(cosine, abs=1e-6)


@settings(max_examples=50)
@given(directions, directions)
def test_the_neutrino_makes_a_w_with_the_lepton_or_as_near_to_it_as_its_transverse_momentum_allows(lepton, other):
    lepton, missing = vector(*lepton), np.array(other[:2])
    if np.hypot(*lepton[1:3]) < 1 or np.hypot(*missing) < 1:
        return
    found = neutrino(lepton, missing)
    np.testing.assert_allclose(found[1:3], missing)
    together = mass(lepton + found)
    transverse = 2 * (np.hypot(*lepton[1:3]) * np.hypot(*missing) - lepton[1:3] @ missing)
    assert together >= W - 0.05
    if transverse < W**2 * 0.999:
        assert together == pytest.approx(W, rel=1e-3)
        mirrored = neutrino(lepton * [1, 1, 1, -1], missing)
        assert abs(mirrored[3]) == pytest.approx(abs(found[3]), rel=1e-6, abs=1e-3)


def test_masses_take_the_tagged_pair_and_the_light_pair_nearest_the_w():
    at_rest = [vector(W / 2, 0, 0), vector(-W / 2, 0, 0)]
    b = [vector(0, 62.5, 0), vector(0, -62.5, 0)]
    jets = np.array([*b, *at_rest, vector(0, 0.3, 25)])
    event = Seen(vector(30, 30, 5), np.array([10.0, -20.0]), jets, np.array([2, 1, 0, 0, 0]))
    m_jj, m_jjj, m_lv, m_jlv, m_bb, m_wbb, m_wwbb = masses(event)
    assert m_jj == pytest.approx(W)
    assert m_bb == pytest.approx(125)
    assert m_jjj == pytest.approx(mass(at_rest[0] + at_rest[1] + b[0]))
    assert m_lv >= W - 1e-6
    assert m_wwbb > m_wbb
    assert m_wwbb > m_jlv


def event(lepton_pt=50.0, neighbour=0.0):
    """Four b jets, well apart, an electron, and beside it a pion."""
    axes = [(0.5, 1.0), (-0.5, 2.5), (1.0, -1.0), (-1.0, -2.5)]
    rows = [60 * np.array([np.cosh(eta), np.cos(phi), np.sin(phi), np.sinh(eta)]) for eta, phi in axes]
    rows += [lepton_pt * np.array([1, 1, 0, 0]), np.array([1, 1, 0, 0]) * (neighbour or 1e-3)]
    return Particles(np.array(rows), np.array([211] * 4 + [11, 211]), np.zeros(2), np.array(axes), np.zeros((0, 2)))


def test_the_detector_wants_a_hard_isolated_lepton_and_blurs_as_much_as_it_says():
    random = np.random.default_rng(0)
    found = [seen(event(), random) for _ in range(2000)]
    passed = [item for item in found if item is not None]
    tagged = 1 - 0.25**4 - 4 * 0.75 * 0.25**3
    assert len(passed) / 2000 == pytest.approx(0.95 * tagged, abs=0.02)
    pt = np.array([np.hypot(*item.jets[:, 1:3].T) for item in passed])
    assert pt.mean() == pytest.approx(60, rel=0.01)
    assert pt.std() == pytest.approx(60 * np.hypot(1 / np.sqrt(60), 0.05), rel=0.05)
    assert (np.diff(pt, axis=1) <= 0).all()
    assert np.mean([item.tags == 2 for item in passed]) == pytest.approx(0.65 / 0.95, abs=0.03)
    for other in (event(lepton_pt=15.0), event(neighbour=20.0)):
        assert not any(seen(other, random) for _ in range(50))


def test_a_soft_event_is_turned_and_mirrored_but_not_changed():
    random = np.random.default_rng(0)
    soft = random.normal(size=(7, 4))
    offsets = np.array([0, 3, 7])
    for _ in range(5):
        turned = collisions._turned(soft, offsets, random)
        source = soft[:3] if len(turned) == 3 else soft[3:]
        np.testing.assert_allclose(np.hypot(*turned[:, 1:3].T), np.hypot(*source[:, 1:3].T))
        np.testing.assert_allclose(np.abs(turned[:, 3]), np.abs(source[:, 3]))
        np.testing.assert_array_equal(turned[:, 0], source[:, 0])
    assert abs(pseudorapidity(np.array([[1.0, 1, 0, 1]]))[0] - np.arcsinh(1)) < 1e-12


def test_simulation_is_seeded_goes_on_where_it_stopped_and_is_what_the_loader_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CHUNK", 10)
    monkeypatch.setattr(simulation, "SOFT_EVENTS", 20)
    for folder in (tmp_path / "a", tmp_path / "b"):
        parts = folder / "parts-seed-7"
        parts.mkdir(parents=True)
        made = [(simulation.chunk(parts, *item, 7), item[0]) for item in simulation.chunks(40)]
        times = [path.stat().st_mtime_ns for path, _ in made]
        simulation.write(folder, made, 7)
    assert [path.stat().st_mtime_ns for path, _ in made] == times
    again = simulation.chunk(parts, *simulation.chunks(40)[0], 7)
    assert again.stat().st_mtime_ns == times[0]
    assert (tmp_path / "a" / "train.parquet").read_bytes() == (tmp_path / "b" / "train.parquet").read_bytes()
    data = datasets.higgs(tmp_path / "a")
    assert len(data.train_x) + len(data.test_x) == 40
    assert data.train_x.isfinite().all()
    rows = np.concatenate([compare.physical(tmp_path / "a", split) for split in ("train", "test")])
    named = dict(zip(COLUMNS, rows.T, strict=True))
    assert round(named["label"].sum()) == 21
    assert named["lepton_pT"].min() > 20 * (1 - 5 * detector.LEPTON_BLUR)
    assert (named["jet1pt"] >= named["jet2pt"]).all()
    assert named["jet4pt"].min() > 20
    assert (named["m_lv"] > W - 0.1).all()
    assert features.TOP > W


def test_comparison_finds_a_shifted_column_and_no_difference_to_itself():
    random = np.random.default_rng(0)
    rows = random.normal(size=(400, 29))
    rows[:, 0] = np.arange(400) % 2
    assert max(row[2] for row in compare.distances(rows, rows)) == 0
    shifted = rows.copy()
    shifted[:, 5] += 1
    worst = compare.distances(shifted, rows)
    assert {row[0] for row in worst[:2]} == {COLUMNS[5]}
    assert worst[0][3] < 1e-6
    mine, other = compare.difficulty(rows, rows, rows)
    assert mine == other
