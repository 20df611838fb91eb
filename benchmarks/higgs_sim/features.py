"""The 28 features of UCI HIGGS, in GeV and radians, from what the detector saw."""

from itertools import combinations

import numpy as np

from .collisions import Array, pseudorapidity
from .detector import Seen

W, TOP = 80.4, 172.5


def features(seen: Seen) -> Array:
    """In UCI's order: lepton, missing energy, four jets with their tags, seven masses."""
    lepton, jets = seen.lepton, seen.jets
    columns = [_pt(lepton), _eta(lepton), _phi(lepton), float(np.hypot(*seen.missing))]
    columns.append(float(np.arctan2(seen.missing[1], seen.missing[0])))
    for jet, tag in zip(jets[:4], seen.tags[:4], strict=True):
        columns += [_pt(jet), _eta(jet), _phi(jet), float(tag)]
    return np.array([*columns, *masses(seen)])


def masses(seen: Seen) -> tuple[float, ...]:
    """m_jj, m_jjj, m_lv, m_jlv, m_bb, m_wbb, m_wwbb.

    b's are the best two tags (harder first), W -> jj the pair of other jets nearest the W's mass, the b of m_jjj the
    one that brings it nearest the top's, the other b that of m_jlv; m_wbb takes the W of the larger pT.
    """
    order = np.lexsort((np.arange(len(seen.tags)), -seen.tags))
    b = [seen.jets[i] for i in order[:2]]
    others = [seen.jets[i] for i in order[2:]]
    hadronic = min((one + two for one, two in combinations(others, 2)), key=lambda pair: abs(mass(pair) - W))
    leptonic = seen.lepton + neutrino(seen.lepton, seen.missing)
    near, far = sorted(b, key=lambda jet: abs(mass(hadronic + jet) - TOP))
    pair = b[0] + b[1]
    harder = max((hadronic, leptonic), key=_pt)
    found = (hadronic, hadronic + near, leptonic, leptonic + far, pair, harder + pair, hadronic + leptonic + pair)
    return tuple(mass(vector) for vector in found)


def neutrino(lepton: Array, missing: Array) -> Array:
    """(E, p) of a massless particle with this transverse momentum that makes a W with the lepton: of the two pz that
    solve the quadratic equation the smaller one, its real part if they are complex."""
    square = float(missing @ missing)
    half = W**2 / 2 + float(lepton[1:3] @ missing)
    pt2 = float(lepton[1:3] @ lepton[1:3])
    middle = half * lepton[3] / pt2
    root = half**2 - pt2 * square
    step = lepton[0] * np.sqrt(root) / pt2 if root > 0 else 0.0
    pz = min((middle - step, middle + step), key=abs)
    return np.array([np.sqrt(square + pz**2), *missing, pz])


def mass(vector: Array) -> float:
    return float(np.sqrt(max(0.0, vector[0] ** 2 - (vector[1:] ** 2).sum())))


def _pt(vector: Array) -> float:
    return float(np.hypot(vector[1], vector[2]))


def _eta(vector: Array) -> float:
    return float(pseudorapidity(vector[None])[0])


def _phi(vector: Array) -> float:
    return float(np.arctan2(vector[2], vector[1]))
