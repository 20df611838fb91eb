"""Do two directories of higgs-sim hold the same physics? python -m benchmarks.higgs_sim.compare OURS THEIRS

Column by column and class by class a two-sample Kolmogorov-Smirnov test, in GeV and radians; and the AUC of one
classifier, trained on THEIRS, on the test events of both.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets.higgs import COLUMNS
from scipy.stats import ks_2samp
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score


def physical(folder: Path, split: str) -> np.ndarray:
    """[n, 29]: label and features in GeV and radians, to 0.01: tags and the W's mass are the same values again."""
    scale = json.loads((folder / "normalisation.json").read_text())
    table = pq.read_table(folder / f"{split}.parquet")
    factors = [1.0, *(scale[name] for name in COLUMNS[1:])]
    columns = (table[name].to_numpy() * factor for name, factor in zip(COLUMNS, factors, strict=True))
    return np.stack(list(columns), 1).astype(np.float64).round(2)


def distances(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[str, str, float, float]]:
    """(column, class, Kolmogorov-Smirnov distance, p) for every column and class, the largest distance first."""
    found = []
    for label, name in ((1, "signal"), (0, "background")):
        mine, other = ours[ours[:, 0] == label], theirs[theirs[:, 0] == label]
        for i, column in enumerate(COLUMNS[1:], start=1):
            test = ks_2samp(mine[:, i], other[:, i])
            found.append((column, name, float(test.statistic), float(test.pvalue)))
    return sorted(found, key=lambda row: -row[2])


def difficulty(ours: np.ndarray, theirs: np.ndarray, training: np.ndarray) -> tuple[float, float]:
    """AUC of gradient boosting, trained on `training`, on ours and on theirs."""
    classifier = HistGradientBoostingClassifier(max_iter=200, random_state=0).fit(training[:, 1:], training[:, 0])
    mine, other = (roc_auc_score(part[:, 0], classifier.predict_proba(part[:, 1:])[:, 1]) for part in (ours, theirs))
    return float(mine), float(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--training", type=int, default=100_000, help="events of THEIRS to train the classifier on")
    args = parser.parse_args()
    ours = np.concatenate([physical(args.ours, split) for split in ("train", "test")])
    theirs, training = physical(args.theirs, "test"), physical(args.theirs, "train")[: args.training]
    print(f"{'column':28}{'class':12}{'distance':>10}{'p':>12}   ({len(ours):,} and {len(theirs):,} events)")
    for column, label, distance, p in distances(ours, theirs):
        print(f"{column:28}{label:12}{distance:10.4f}{p:12.2g}")
    mine, other = difficulty(ours, theirs, training)
    print(f"AUC of the same classifier: {mine:.4f} on ours, {other:.4f} on theirs, difference {mine - other:+.4f}")


if __name__ == "__main__":
    main()
