# SPDX-License-Identifier: Apache-2.0
"""Find the latents with which a network makes a given picture. In scripts: `projector.project(G, target, ...)`."""

import os
import time

import click

from dnnlib.cli import DEVICE, TRUST_PICKLE, OutDir, progress, user_errors

FPS = 10
FILE = click.Path(exists=True, dir_okay=False)
OPTIONS = [
    click.Option(["--network"], metavar="FILE|URL", required=True, help="Network pickle"),
    click.Option(["--target"], type=FILE, metavar="FILE", required=True,
                 help="The picture; its middle is used, what is transparent counts as white"),
    click.Option(["--outdir"], type=OutDir(), metavar="DIR", required=True, help="Where the results go"),
    click.Option(["--num-steps"], type=click.IntRange(1), default=1000, show_default=True,
                 help="Steps of the search"),
    click.Option(["--seed"], type=click.IntRange(0, 2**32 - 1), default=303, show_default=True,
                 help="Of all random draws"),
    click.Option(["--save-video"], type=bool, metavar="BOOL", default=True, show_default=True,
                 help="Write proj.mp4, target and projection side by side; proj.gif without imageio-ffmpeg"),
    click.Option(["--space"], type=click.Choice(["blocks", "w"]),
                 help="Find the w of every block, or one for all  [default: blocks, where there are any]"),
    click.Option(["--mask"], type=FILE, metavar="FILE",
                 help="Match only what is white in this picture, of the target's size"),
    click.Option(["--detector"], metavar="PATH|NAME",
                 help="Feature detector: folder with NVIDIA's vgg16.pt, a TorchScript file, or efficientnet-lite0,"
                 " which works offline  [default: NVIDIA's, by URL]"),
    click.Option(["--class", "class_idx"], type=int, help="Class of a conditional network"),
    click.Option(["--device"], **DEVICE),
    click.Option(["--trust-pickle"], **TRUST_PICKLE),
    click.Option(["--overwrite"], is_flag=True, help="Replace files that are there already"),
]  # fmt: skip
HELP = """Find the latents with which a network makes a given picture.

\b
  python projector.py --network=demo/lorelei32.pkl --target=face.png --outdir=out --detector=efficientnet-lite0
  python generate.py --network=demo/lorelei32.pkl --outdir=out --projected-w=out/projected_w.npz
  python resample.py --network=demo/lorelei32.pkl --projected-w=out/projected_w.npz --blocks=5,6

Writes target.png, proj.png, projected_w.npz and proj.mp4. Ctrl-C ends the search and writes what was found so far.
"""


def __getattr__(name):
    """projector.project is training.projection.project, imported when it is asked for: --help needs no PyTorch."""
    if name == "project":
        from training.projection import project

        return project
    raise AttributeError(f"module 'projector' has no attribute {name!r}")


def make_job(o):
    """All that the work needs, checked; nothing is written. o: the options. Returns a dict."""
    import torch

    from torch_utils.distributed import choose_device
    from torch_utils.video import has_ffmpeg
    from training import generating, projection

    device = torch.device(choose_device(1, o["device"])[1])
    video = ("proj.mp4" if has_ffmpeg() else "proj.gif") if o["save_video"] else None
    files = {"target": "target.png", "picture": "proj.png", "w": "projected_w.npz", "video": video}
    files = {key: os.path.join(o["outdir"], name) for key, name in files.items() if name}
    generating.check_free(files.values(), o["overwrite"])
    G = generating.load_generator(o["network"], device, trust=o["trust_pickle"])
    label = generating.class_label(G, o["class_idx"], device)
    average = projection.average_picture(G, label, device)
    shape = list(average.shape[2:])
    target = projection.read_target(o["target"], shape, average.shape[1])
    mask = projection.read_mask(o["mask"], o["target"], shape) if o["mask"] else None
    space = projection.choose_space(G, o["space"])
    goal = projection.Target(target, o["detector"], mask, device)
    return dict(
        G=G, goal=goal, label=label, device=device, space=space, target=target, average=average, files=files
    )


def search(job, num_steps, seed):
    """The w [w_dim] after every step, as far as Ctrl-C lets it come."""
    import torch

    from training import projection

    torch.manual_seed(seed)
    path = []
    steps = projection.projection_steps(
        job["G"], job["goal"], num_steps=num_steps, device=job["device"], space=job["space"], c=job["label"]
    )
    try:
        with progress(steps, num_steps, "Projecting", _show_step) as bar:
            for step in bar:
                path.append(step.w)
    except KeyboardInterrupt:
        if not path:
            raise
        click.echo(f"\nStopped after {len(path)} of {num_steps} steps: writing what was found", err=True)
    return torch.stack(path)


def _show_step(step):
    return None if step is None else f"distance {step.distance:.4g}"


def write_results(job, path):
    """All files; the latents first. path: [steps, w_dim]. Returns distance and pixel MSE of the written picture."""
    import numpy as np
    import torch

    from dnnlib.util import open_atomic
    from torch_utils.images import write_png
    from training import generating

    G, goal, files = job["G"], job["goal"], job["files"]
    os.makedirs(os.path.dirname(files["w"]) or ".", exist_ok=True)
    ws = path[-1].repeat(1, G.num_ws, 1)
    with open_atomic(files["w"]) as f:
        np.savez(f, w=ws.cpu().numpy())
    write_png(files["target"], job["target"].transpose(1, 2, 0))
    with torch.no_grad():
        image = generating.synthesize(G, ws)
        numbers = goal.distance(image).item(), goal.mse(image).item()
    write_png(files["picture"], next(generating.pictures(G, [ws])))
    return numbers


def write_progress_video(job, path):
    """Target and projection side by side, a frame a step."""
    import numpy as np

    from torch_utils.video import write_video
    from training import generating

    G, left = job["G"], job["target"].transpose(1, 2, 0)
    batches = (w[:, None].repeat(1, G.num_ws, 1) for w in path.split(generating.batch_size(G)))
    with progress(generating.pictures(G, batches), len(path), "Video") as bar:
        write_video(job["files"]["video"], (np.concatenate([left, right], axis=1) for right in bar), FPS)


@click.command(help=HELP, params=OPTIONS)
def main(**o):
    """Checks the call, searches, writes, says how close it came."""
    with user_errors():
        job = make_job(o)
        start = time.monotonic()
        path = search(job, o["num_steps"], o["seed"])
        seconds = time.monotonic() - start
        distance, mse = write_results(job, path)
        click.echo(
            f"{len(path)} steps in {seconds:.1f} s: distance {distance:.4g}, pixel MSE {mse:.4g}"
            f" (of the average picture: {job['goal'].distance(job['average']).item():.4g},"
            f" {job['goal'].mse(job['average']).item():.4g})"
        )
        if "video" in job["files"]:
            write_progress_video(job, path)
            if job["files"]["video"].endswith(".gif"):
                click.echo("Wrote proj.gif, since proj.mp4 needs imageio-ffmpeg (pip install imageio-ffmpeg)")
    click.echo(
        f"Wrote {os.path.join(o['outdir'], '')}  {' '.join(map(os.path.basename, job['files'].values()))}"
    )


if __name__ == "__main__":
    main()
