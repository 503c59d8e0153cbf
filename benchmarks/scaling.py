# SPDX-License-Identifier: Apache-2.0
"""How time and memory of one training step grow with resolution, batch, width and grid."""

import json
import math
import subprocess
import sys

# What varies -> (its values, the step that they vary: resolution, batch, channel_base, cells of the grid a side).
BASE = dict(resolution=32, batch=4, channel_base=1024, grid=4)
AXES = {
    "resolution": [32, 64, 128, 256, 512, 1024],
    "batch": [2, 4, 8, 16, 32],
    "channel_base": [1024, 2048, 4096, 8192, 16384],
    "grid": [1, 2, 4, 8],
}


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The p of the power law cost = a * size^p, by least squares of the logarithms."""
    xs, ys = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def cost(options: dict) -> tuple[float, float]:
    """(seconds, mebibytes) of one step of G and D of an SSN, in a process of its own: its peak of memory is all that it
    ever had, less what it had before the networks were built. Seconds: the fastest of three."""
    command = [sys.executable, "-m", "benchmarks.scaling", json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    seconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, mebibytes


def report(axes: list[str], quick: bool, threads: int, clock: str) -> list[str]:
    """Lines of Markdown: a table an axis, with the fitted exponents in its last row."""
    lines = [f"One step (Gmain, Dmain) of an SSN; what does not vary: {BASE}", ""]
    for axis in axes:
        sizes = AXES[axis][:3] if quick else AXES[axis]
        costs = [cost(dict(BASE, **{axis: size}, threads=threads, clock=clock)) for size in sizes]
        lines += [f"| {axis} | seconds a step | MiB |", "|---|---|---|"]
        lines += [f"| {n} | {t:.3f} | {m:.0f} |" for n, (t, m) in zip(sizes, costs, strict=True)]
        powers = [exponent(sizes, [each[i] for each in costs]) for i in (0, 1)]
        tail = [exponent(sizes[-2:], [each[i] for each in costs[-2:]]) for i in (0, 1)]
        lines += [f"| exponent | {powers[0]:.2f} | {powers[1]:.2f} |"]
        lines += [f"| of the last two | {tail[0]:.2f} | {tail[1]:.2f} |", ""]
    return lines


def _peak_mebibytes():
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _measure(options):
    import torch

    from benchmarks import cases
    from benchmarks.measure import CLOCKS

    torch.set_num_threads(options["threads"])
    now = CLOCKS[options["clock"]]
    before = _peak_mebibytes()
    settings = cases.Settings(
        resolution=options["resolution"], batch=options["batch"], channel_base=options["channel_base"],
        kinds=("ssn",), grid=(options["grid"],) * 2,
    )  # fmt: skip
    steps = [case for case in cases.training(settings) if ": Gmain" in case.name or ": Dmain" in case.name]
    seconds = []
    for _ in range(3):
        begin = now()
        for step in steps:
            step.run()
        seconds.append(now() - begin)
    return min(seconds), _peak_mebibytes() - before


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
