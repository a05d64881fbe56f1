"""`python -m faultmatrix`: the short subset, in the order that SEED gives; one JSON object a run on stdout, as it ends."""

import dataclasses
import json
import os

import uvloop

from faultmatrix.matrix import Outcome, plan, play


def tell(outcome: Outcome) -> None:
    print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    seed = int(os.environ.get("SEED", "0"))
    uvloop.run(play(plan(0, seed, os.environ.get("FAULT", ""), short=True), seed, tell))
