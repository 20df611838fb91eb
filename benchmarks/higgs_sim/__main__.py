"""Simulate higgs-sim: train.parquet, test.parquet and normalisation.json in a directory that `datasets.higgs` reads.

Chunks of events are made in parallel, each from its own seed; a chunk that is there already is not made again, so an
interrupted run goes on. The result depends on --events and --seed alone.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.higgs import COLUMNS
from datasets.progress import progress

CHUNK, SOFT_EVENTS = 1000, 4000
SIGNAL, TEST = 0.53, 50_000 / 388_717  # shares of all events


def chunk(folder: Path, signal: bool, index: int, events: int, seed: int) -> Path:
    """Simulate so many selected events into a file of their own, [events, 28] in GeV and radians."""
    from benchmarks.higgs_sim import collisions, detector, features

    path = folder / f"{'signal' if signal else 'background'}-{index:05}-{events}.npy"
    if not path.exists():
        own = int(np.random.SeedSequence([seed, int(signal), index]).generate_state(1)[0]) % 900_000_000
        soft, offsets = collisions.soft_events(folder / "soft.npz", SOFT_EVENTS, seed)
        random, rows = np.random.default_rng(own), []
        for particles in collisions.events(signal, own, bool(index % 2), soft, offsets):
            seen = detector.seen(particles, random)
            if seen is not None:
                rows.append(features.features(seen))
            if len(rows) == events:
                break
        unfinished = path.with_suffix(".part.npy")
        np.save(unfinished, np.array(rows, np.float32))
        unfinished.rename(path)
    return path


def chunks(events: int) -> list[tuple[bool, int, int]]:
    """(signal, index, events) of every chunk."""
    found = []
    for signal in (True, False):
        total = round(events * SIGNAL) if signal else events - round(events * SIGNAL)
        sizes = [CHUNK] * (total // CHUNK) + ([total % CHUNK] if total % CHUNK else [])
        found += [(signal, i, size) for i, size in enumerate(sizes)]
    return found


def write(folder: Path, parts: list[tuple[Path, bool]], seed: int) -> None:
    """Shuffle, split, and divide momenta, masses and tags by their training mean, angles by their deviation."""
    rows = np.concatenate([np.insert(np.load(path), 0, float(signal), axis=1) for path, signal in parts])
    rows = rows[np.random.default_rng(seed).permutation(len(rows))].astype(np.float32)
    test = round(TEST * len(rows))
    train = rows[test:].astype(np.float64)
    angles = np.array([name.endswith(("eta", "phi")) for name in COLUMNS[1:]])
    scale = np.where(angles, train[:, 1:].std(0), train[:, 1:].mean(0))
    (folder / "normalisation.json").write_text(
        json.dumps(dict(zip(COLUMNS[1:], scale.tolist(), strict=True)), indent=1)
    )
    for name, part in (("test", rows[:test]), ("train", rows[test:])):
        scaled = np.concatenate([part[:, :1], part[:, 1:] / scale], 1).astype(np.float32)
        pq.write_table(
            pa.table(dict(zip(COLUMNS, scaled.T, strict=True))), folder / f"{name}.parquet", compression="zstd"
        )


def simulate(folder: Path, events: int, seed: int, processes: int) -> None:
    """All chunks, then the files."""
    from benchmarks.higgs_sim import collisions

    parts = folder / f"parts-seed-{seed}"
    parts.mkdir(parents=True, exist_ok=True)
    collisions.soft_events(parts / "soft.npz", SOFT_EVENTS, seed)
    todo = chunks(events)
    with ProcessPoolExecutor(processes) as pool, progress("events", events) as advance:
        running = {pool.submit(chunk, parts, *item, seed): item for item in todo}
        for future in as_completed(running):
            future.result()
            advance(running[future][2])
    write(folder, [(chunk(parts, *item, seed), item[0]) for item in todo], seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", type=int, default=388_717, help="of training and test together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="default: as many as there are cores")
    args = parser.parse_args()
    simulate(args.folder, args.events, args.seed, args.processes)
    print(f"{args.folder}: train.parquet, test.parquet, normalisation.json")


if __name__ == "__main__":
    main()
