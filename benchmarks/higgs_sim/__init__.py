"""higgs-sim, simulated anew: `python -m benchmarks.higgs_sim --help` (needs the `higgs` extra).

collisions.py makes particles (pythia8), detector.py what a detector sees of them (fastjet), features.py the columns of
UCI HIGGS, __main__.py files of any number of events, compare.py says how well they match others.
"""
