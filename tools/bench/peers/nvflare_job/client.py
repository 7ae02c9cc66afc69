"""A client that trains nothing: it returns the model plus noise."""

import sys
from pathlib import Path

import nvflare.client as flare

sys.path.insert(0, str(Path(__file__).parent))

from workload import Noise

flare.init()
noise = Noise(int(flare.get_site_name().rpartition("-")[2]))
while flare.is_running() and (model := flare.receive()) is not None:
    noise.shift()
    params = {name: noise.add_to(values) for name, values in model.params.items()}
    flare.send(flare.FLModel(params=params, params_type="FULL", meta={"NUM_STEPS_CURRENT_ROUND": 1}))
