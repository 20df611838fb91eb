"""What a detector sees of the particles: one lepton, jets with b-tags, missing energy, all of them blurred."""

from dataclasses import dataclass

import fastjet
import numpy as np
from numpy.typing import NDArray

from .collisions import Array, Particles, pseudorapidity

RADIUS, JET_PT, SOFTEST_JET, ETA = 0.5, 20.0, 10.0, 2.5
LEPTON_PT, LEPTON_BLUR, LEPTON_EFFICIENCY, ISOLATION, CONE = 20.0, 0.015, 0.95, 0.15, 0.4
TAGS = {"b": (0.65, 0.75), "c": (0.10, 0.20), "light": (0.01, 0.03)}  # chance of a tight tag, of a tight or loose one


@dataclass(frozen=True)
class Seen:
    """One event: the lepton (E, px, py, pz), missing (px, py), jets [n, 4] by falling pT, their tags 0, 1, 2 [n]."""

    lepton: Array
    missing: Array
    jets: Array
    tags: NDArray[np.int64]


def seen(particles: Particles, random: np.random.Generator) -> Seen | None:
    """The event, if it passes: one isolated electron or muon, four jets, two of them tagged; else None."""
    lepton = _lepton(particles, random)
    if lepton is None:
        return None
    rest = np.delete(particles.momenta, lepton, 0)
    jets = _clustered(rest)
    blurred = _blurred(jets, random)
    good = (np.hypot(blurred[:, 1], blurred[:, 2]) > JET_PT) & (np.abs(pseudorapidity(blurred)) < ETA)
    tags = _tags(jets[good], particles, random)
    if good.sum() < 4 or (tags > 0).sum() < 2:
        return None
    true = particles.momenta[lepton]
    measured = true * (1 + LEPTON_BLUR * random.standard_normal())
    shifts = (blurred - jets)[:, 1:3].sum(0) + (measured - true)[1:3]
    soft = max(0.0, np.hypot(rest[:, 1], rest[:, 2]).sum() - np.hypot(jets[:, 1], jets[:, 2]).sum())
    noise = np.hypot(0.6 * np.sqrt(soft), 4.0) * random.standard_normal(2)
    chosen = blurred[good]
    order = np.argsort(-np.hypot(chosen[:, 1], chosen[:, 2]))
    return Seen(measured, particles.invisible - shifts + noise, chosen[order], tags[order])


def _lepton(particles: Particles, random: np.random.Generator) -> int | None:
    """Where the one isolated electron or muon is among the particles; None if there is none, or another."""
    momenta, pt = particles.momenta, np.hypot(particles.momenta[:, 1], particles.momenta[:, 2])
    eta, phi = pseudorapidity(momenta), np.arctan2(momenta[:, 2], momenta[:, 1])
    leptons = np.isin(np.abs(particles.ids), (11, 13)) & (pt > LEPTON_PT) & (np.abs(eta) < ETA)
    found = []
    for i in np.flatnonzero(leptons):
        near = np.hypot(eta - eta[i], wrapped(phi - phi[i])) < CONE
        if pt[near].sum() - pt[i] < ISOLATION * pt[i] and random.random() < LEPTON_EFFICIENCY:
            found.append(int(i))
    return found[0] if len(found) == 1 else None


def wrapped(angle: Array) -> Array:
    """The angle in -pi ... pi."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _clustered(momenta: Array) -> Array:
    """Anti-kT jets [n, 4] of pT above SOFTEST_JET."""
    inputs = [fastjet.PseudoJet(px, py, pz, e) for e, px, py, pz in momenta.tolist()]
    cluster = fastjet.ClusterSequence(inputs, fastjet.JetDefinition(fastjet.antikt_algorithm, RADIUS))
    jets = cluster.inclusive_jets(SOFTEST_JET)
    return np.array([(jet.e(), jet.px(), jet.py(), jet.pz()) for jet in jets]).reshape(-1, 4)


def _blurred(jets: Array, random: np.random.Generator) -> Array:
    """Energies blurred by 1 / sqrt(pT) and 5 % in quadrature, directions by 0.03; a jet keeps its mass's share."""
    pt = np.hypot(jets[:, 1], jets[:, 2])
    scale = np.maximum(0.0, 1 + np.sqrt(1 / pt + 0.05**2) * random.standard_normal(len(jets)))
    mass = np.sqrt(np.maximum(0, jets[:, 0] ** 2 - (jets[:, 1:] ** 2).sum(1))) * scale
    eta = pseudorapidity(jets) + 0.03 * random.standard_normal(len(jets))
    phi = np.arctan2(jets[:, 2], jets[:, 1]) + 0.03 * random.standard_normal(len(jets))
    pt = pt * scale
    space = np.stack([pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta)], 1)
    return np.concatenate([np.sqrt(mass[:, None] ** 2 + (space**2).sum(1, keepdims=True)), space], 1)


def _tags(jets: Array, particles: Particles, random: np.random.Generator) -> NDArray[np.int64]:
    """2: tight, 1: loose only, 0: none; by the heaviest hadron within 0.4 of the jet."""
    eta, phi = pseudorapidity(jets), np.arctan2(jets[:, 2], jets[:, 1])
    tags = np.zeros(len(jets), dtype=np.int64)
    for i in range(len(jets)):
        near = [
            bool((np.hypot(hadrons[:, 0] - eta[i], wrapped(hadrons[:, 1] - phi[i])) < 0.4).any())
            for hadrons in (particles.beauty, particles.charm)
        ]
        tight, loose = TAGS["b" if near[0] else "c" if near[1] else "light"]
        drawn = random.random()
        tags[i] = 2 if drawn < tight else 1 if drawn < loose else 0
    return tags
