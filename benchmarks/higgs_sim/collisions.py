"""Proton collisions at 8 TeV: the particles of one signal or background event, with pile of soft ones underneath.

Signal: gg -> H(425) -> W H+-(325), H+- -> W h(125), h -> b b. Background: top pairs. One W decays to an electron or
muon, the other to quarks. Leading order; both W's of the signal are longitudinal, none of the background is treated so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pythia8mc
from numpy.typing import NDArray

Array = NDArray[np.float64]

COMMON = [
    "Beams:eCM = 8000", "PartonLevel:MPI = off", "TimeShower:QEDshowerByQ = off", "TimeShower:QEDshowerByL = off",
    "TimeShower:QEDshowerByGamma = off", "SpaceShower:QEDshowerByQ = off", "SpaceShower:QEDshowerByL = off",
    "TimeShower:phiPolAsym = off", "SpaceShower:phiPolAsym = off", "SpaceShower:phiIntAsym = off",
    "TimeShower:pTmin = 1", "111:mayDecay = off",
]  # fmt: skip
SIGNAL = [
    "Higgs:useBSM = on", "HiggsBSM:gg2H2 = on", "HiggsH2:coup2HchgW = 1", "HiggsHchg:coup2H1W = 1",
    "25:m0 = 125", "25:onMode = off", "25:onIfMatch = 5 -5",
    "35:m0 = 425", "35:mWidth = 3", "35:doForceWidth = on", "35:mMin = 375", "35:mMax = 475", "35:onMode = off",
    "35:onIfMatch = 24 -37", "35:onIfMatch = -24 37",
    "37:m0 = 325", "37:mWidth = 3", "37:doForceWidth = on", "37:mMin = 275", "37:mMax = 375", "37:onMode = off",
    "37:onIfMatch = 24 25",
]  # fmt: skip
BACKGROUND = ["Top:gg2ttbar = on", "Top:qqbar2ttbar = on", "6:m0 = 172.5"]
SOFT = ["SoftQCD:nonDiffractive = on", "Beams:eCM = 8000", "111:mayDecay = off"]
LEPTONS, QUARKS, NEUTRINOS = "11 13", "1 2 3 4 5", (12, 14, 16)
REACH = 4.0  # in pseudorapidity: what lies beyond is not seen


@dataclass(frozen=True)
class Particles:
    """Of one event: visible final particles [n, 4] (E, px, py, pz) with their PDG ids [n], the sum of all neutrinos'
    (px, py), and the (eta, phi) of hadrons with beauty and with charm, [m, 2] each."""

    momenta: Array
    ids: NDArray[np.int64]
    invisible: Array
    beauty: Array
    charm: Array


class LongitudinalW(pythia8mc.UserHooks):
    """Accepts an event with the probability sin^2(theta*) of each W's decay, theta* seen from the W's flight."""

    def __init__(self, random: np.random.Generator):
        super().__init__()
        self.random = random

    def canVetoProcessLevel(self) -> bool:
        return True

    def doVetoProcessLevel(self, process: Any) -> bool:
        chance = 1.0
        for i in range(process.size()):
            if process[i].idAbs() == 24 and process[i].daughter1() != process[i].daughter2():
                w, fermion = _vector(process[i]), _vector(process[process[i].daughter1()])
                mother = _vector(process[process[i].mother1()])
                chance *= 1 - cos_decay_angle(fermion, w, mother) ** 2
        return bool(self.random.random() > chance)


def cos_decay_angle(fermion: Array, w: Array, mother: Array) -> float:
    """Cosine between fermion and W's flight, the one in the W's rest frame, the other in its mother's; (E, p) each."""
    direction = -boosted(mother, w)[1:]
    decay = boosted(fermion, w)[1:]
    return float(direction @ decay / max(1e-12, np.linalg.norm(direction) * np.linalg.norm(decay)))


def boosted(vector: Array, frame: Array) -> Array:
    """The four-vector (E, p) as seen in the rest frame of `frame`."""
    beta = frame[1:] / frame[0]
    square = float(beta @ beta)
    if square < 1e-24:
        return vector
    gamma = 1 / np.sqrt(1 - square)
    along = float(beta @ vector[1:])
    space = vector[1:] + beta * ((gamma - 1) * along / square - gamma * vector[0])
    return np.concatenate([[gamma * (vector[0] - along)], space])


def events(signal: bool, seed: int, swapped: bool, soft: Array, offsets: NDArray[np.int64]) -> Iterator[Particles]:
    """An endless stream. swapped: the negative W decays to leptons. soft, offsets: of `soft_events`."""
    random = np.random.default_rng(seed)
    hook = LongitudinalW(random) if signal else None  # it must live as long as pythia
    pythia = _pythia([*COMMON, *(SIGNAL if signal else BACKGROUND), *_decays(swapped)], seed, hook)
    while True:
        if pythia.next():
            underneath = [_turned(soft, offsets, random) for _ in range(2)]
            yield _particles(pythia.event, underneath)


def soft_events(path: Path, count: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """The library of soft collisions, made once: visible particles [n, 4], and where each event begins [count + 1]."""
    if not path.exists():
        pythia = _pythia(SOFT, seed)
        found: list[Array] = []
        while len(found) < count:
            if pythia.next():
                found.append(_visible(pythia.event)[0])
        offsets = np.cumsum([0, *(len(part) for part in found)])
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, momenta=np.concatenate(found), offsets=offsets)
        unfinished.rename(path)
    stored = np.load(path)
    return stored["momenta"], stored["offsets"]


def pseudorapidity(momenta: Array) -> Array:
    return np.arcsinh(momenta[:, 3] / np.maximum(np.hypot(momenta[:, 1], momenta[:, 2]), 1e-12))


def _pythia(settings: list[str], seed: int, hook: LongitudinalW | None = None) -> Any:
    pythia = pythia8mc.Pythia("", False)
    for line in ("Print:quiet = on", "Random:setSeed = on", f"Random:seed = {1 + seed % 900_000_000}", *settings):
        if not pythia.readString(line):
            raise ValueError(f"`settings` must be known to pythia8, got {line!r}. Use pythia8mc 8.317.")
    if hook is not None:
        pythia.setUserHooksPtr(hook)
    if not pythia.init():
        raise RuntimeError("pythia8 could not be initialised")
    return pythia


def _decays(swapped: bool) -> list[str]:
    first, second = (QUARKS, LEPTONS) if swapped else (LEPTONS, QUARKS)
    return ["24:onMode = off", f"24:onPosIfAny = {first}", f"24:onNegIfAny = {second}"]


def _vector(particle: Any) -> Array:
    return np.array([particle.e(), particle.px(), particle.py(), particle.pz()])


def _visible(event: Any) -> tuple[Array, NDArray[np.int64], Array]:
    """Visible final particles within reach, their ids, and the neutrinos' transverse momentum."""
    rows, ids, invisible = [], [], np.zeros(2)
    for particle in event:
        if not particle.isFinal():
            continue
        if particle.idAbs() in NEUTRINOS:
            invisible += (particle.px(), particle.py())
        else:
            rows.append((particle.e(), particle.px(), particle.py(), particle.pz()))
            ids.append(particle.id())
    momenta, names = np.array(rows).reshape(-1, 4), np.array(ids, dtype=np.int64)
    seen = (np.abs(pseudorapidity(momenta)) < REACH) & (np.hypot(momenta[:, 1], momenta[:, 2]) > 0.5)
    return momenta[seen], names[seen], invisible


def _turned(soft: Array, offsets: NDArray[np.int64], random: np.random.Generator) -> Array:
    """A random soft event, turned about the beam and perhaps mirrored along it."""
    i, angle, mirror = random.integers(len(offsets) - 1), random.uniform(0, 2 * np.pi), random.choice((-1.0, 1.0))
    momenta = soft[offsets[i] : offsets[i + 1]].copy()
    cos, sin = np.cos(angle), np.sin(angle)
    momenta[:, 1], momenta[:, 2] = cos * momenta[:, 1] - sin * momenta[:, 2], sin * momenta[:, 1] + cos * momenta[:, 2]
    momenta[:, 3] *= mirror
    return momenta


def _particles(event: Any, underneath: list[Array]) -> Particles:
    momenta, ids, invisible = _visible(event)
    heavy: dict[int, list[tuple[float, float]]] = {4: [], 5: []}
    for particle in event:
        number = particle.idAbs()
        flavour = number // 1000 % 10 or number // 100 % 10
        if 100 < number < 10_000 and flavour in heavy and particle.pT() > 5:
            heavy[flavour].append((particle.eta(), particle.phi()))
    total = np.concatenate([momenta, *underneath])
    names = np.concatenate([ids, *(np.full(len(part), 211) for part in underneath)])
    return Particles(total, names, invisible, *(np.array(heavy[f]).reshape(-1, 2) for f in (5, 4)))
