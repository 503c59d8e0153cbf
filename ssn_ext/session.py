# SPDX-License-Identifier: Apache-2.0
"""One call of resample.py: make_job checks all that a user can get wrong, resample does the work."""

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssn_ext import blocks as block_tools
from ssn_ext import figures, ranking, resampling, results
from ssn_ext.distortion import discriminator_features
from ssn_ext.grids import block_name, grids_of
from torch_utils.distributed import choose_device
from torch_utils.images import picture_pixels, read_label_map, read_white, write_png
from training import generating
from training.shapes import shape_of
from training.snapshot import SnapshotError, load_network_pkl

DEFAULT_CANDIDATES = 4
DEFAULTS = {
    "trunc": 1.0,
    "noise_mode": "const",
    "class": None,
}  # what a result passes on to those that follow it

Earlier = list[tuple[str, dict[str, Any]]]  # results to go on from: (path of the JSON, its content)


@dataclass(frozen=True)
class Options:
    """The options of resample.py under their own names; None is 'not given'."""

    network: str | None = None
    seeds: list[int] | None = None
    blocks: str | None = None
    mask: str | None = None
    mask_coverage: float = 0.0
    label: list[int] | None = None
    numbering: bool = False
    candidates: int | None = None
    candidate_seed: int = 0
    best: int | None = None
    by: str | None = None
    swap: list[int] | None = None
    source: str | None = None
    pick: int | None = None
    projected_w: str | None = None
    trunc: float | None = None
    noise_mode: str | None = None
    class_idx: int | None = None
    outdir: str = "out"
    device: str = "auto"
    trust_pickle: bool = False


@dataclass(frozen=True)
class Job:
    """A checked call."""

    G: torch.nn.Module
    D: torch.nn.Module | None  # where candidates are ranked by realism
    device: torch.device
    label: torch.Tensor | None  # class label [1, c_dim]
    mask: torch.Tensor  # bool [H, W]: the pixels that are meant to change
    starts: list[results.Start]
    network_source: str  # path or URL
    network_hash: str
    settings: dict[str, Any]  # what decides the pictures, for the JSON
    outdir: str
    name: str  # of the folder, without its number
    numbering: bool

    @property
    def same(self) -> dict[str, Any]:
        """What results must agree in to share a folder."""
        return {"network_hash": self.network_hash, "settings": self.settings}

    @property
    def what(self) -> str:
        """What is re-drawn: 'blocks 5, 6'; of several grids 'blocks 0:5, 1:17'."""
        blocks = [block_name(block, grids_of(self.G)) for block in self.settings["blocks"]]
        return f"block{'s' * (len(blocks) != 1)} {', '.join(blocks)}"


# Make the job.


def make_job(opts: Options, default_network: str) -> Job:
    """All that the work needs; writes nothing. ValueError, one clear line, for every mistake."""
    _check_combinations(opts)
    paths = results.find_results(opts.source) if opts.source else []
    earlier = [(path, results.read_record(path)) for path in paths]
    device = torch.device(choose_device(1, opts.device)[1])
    source = earlier[0][1]["network"]["source"] if earlier else default_network
    source = source if opts.network is None else opts.network
    ranked_by = (opts.by or "realism") if opts.best or opts.by else None
    G, D = _load_networks(source, device, opts.trust_pickle, with_D=ranked_by == "realism")
    network_hash = _check_same_network(source, G, earlier)
    passed_on = _passed_on(opts, earlier)
    label = generating.class_label(G, passed_on["class"], device)
    blocks, mask = _choose_blocks(opts, G)
    starts = _starts(opts, earlier, G, label, passed_on["trunc"], device)
    count = len(opts.swap) if opts.swap else opts.candidates or DEFAULT_CANDIDATES
    if opts.best and opts.best > count:
        raise ValueError(f"--best={opts.best}: there are only {count} candidates to choose from")
    settings = {
        **passed_on,
        "blocks": blocks,
        "mask": _digest(mask.numpy()) if opts.mask else None,
        "candidates": count if blocks else 0,
        "candidate_seed": opts.candidate_seed,
        "swap": opts.swap,
        "from": _from(opts, paths),
        "projected_w": _digest(np.concatenate([s.ws for s in starts])) if opts.projected_w else None,
        **({"by": ranked_by, "best": opts.best or count} if ranked_by else {}),
    }
    return Job(
        G=G,
        D=D,
        device=device,
        label=label,
        mask=mask,
        starts=starts,
        network_source=os.path.abspath(source) if os.path.exists(source) else source,
        network_hash=network_hash,
        settings=settings,
        outdir=opts.outdir,
        name=_folder_name(opts),
        numbering=opts.numbering,
    )


def _check_combinations(opts: Options) -> None:
    """Options that exclude or need each other."""
    if opts.blocks and opts.mask:
        raise ValueError("--blocks and --mask both say what to re-draw: give one of them")
    if not (opts.blocks or opts.mask or opts.numbering):
        raise ValueError(
            "Say what to re-draw, as --blocks=5,6 or --mask=FILE (--numbering shows the numbers)"
        )
    if opts.label is not None and not opts.mask:
        raise ValueError("--label chooses values of a label map: give one with --mask")
    if (opts.best or opts.by) and not (opts.blocks or opts.mask):
        raise ValueError("--best and --by rank candidates: say with --blocks or --mask what to re-draw")
    if (opts.swap or opts.candidates) and not (opts.blocks or opts.mask):
        raise ValueError("--swap and --candidates need --blocks or --mask: what is to be re-drawn?")
    if opts.swap and opts.candidates:
        raise ValueError("--swap makes one candidate of each of its seeds: leave out --candidates")
    if (opts.pick is None) != (opts.source is None):
        raise ValueError(
            "--from and --pick go together: --pick=0 is the original, 1, 2, ... are its candidates"
        )
    if opts.projected_w and (opts.source or opts.seeds):
        raise ValueError("--projected-w gives the pictures to begin with: leave out --from and --seeds")


def _load_networks(
    source: str, device: torch.device, trust: bool, with_D: bool
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The G_ema of a snapshot, if it has a grid of latents, and its D where that is wanted, ready to use."""
    names = ["G_ema", "D"] if with_D else ["G_ema"]
    try:
        networks = load_network_pkl(source, trust=trust, only=names)
    except SnapshotError as err:
        if with_D and "D is missing" in str(err):
            hint = "it ranks by realism; --by=diversity and --by=locality do without"
            raise ValueError(f"--network={source} has no discriminator: {hint}") from err
        raise
    G, D = (
        networks[name].eval().requires_grad_(False).to(device) if name in names else None
        for name in ("G_ema", "D")
    )
    try:
        resampling.check_network(G)
    except ValueError as err:
        raise ValueError(f"--network={source}: {err}") from err
    return G, D


def _check_same_network(source: str, G: torch.nn.Module, earlier: Earlier) -> str:
    """The network's hash, if every earlier result has it too."""
    network_hash = resampling.network_hash(G)
    for path, record in earlier:
        if record["network_hash"] != network_hash:
            raise ValueError(f"{path} is of another network ({record['network']['source']}), not of {source}")
    return network_hash


def _passed_on(opts: Options, earlier: Earlier) -> dict[str, Any]:
    """Truncation, noise and class: as given, but an earlier result has settled them."""
    given = {"trunc": opts.trunc, "noise_mode": opts.noise_mode, "class": opts.class_idx}
    settled = earlier[0][1]["settings"] if earlier else None
    for key, value in given.items():
        if settled and value is not None and value != settled[key]:
            option = key.replace("_", "-")
            raise ValueError(
                f"--{option}={value}: {earlier[0][0]} was made with {settled[key]}, leave the option out"
            )
    if settled:
        return {key: settled[key] for key in given}
    return {key: DEFAULTS[key] if value is None else value for key, value in given.items()}


def _choose_blocks(opts: Options, G: torch.nn.Module) -> tuple[list[int], torch.Tensor]:
    """The blocks to re-draw, and the pixels meant to change: those of the blocks, or the user's mask."""
    shape, grids = shape_of(G), grids_of(G)
    if opts.mask is None:
        blocks = block_tools.parse_blocks(opts.blocks, grids) if opts.blocks else []
        return blocks, block_tools.union_mask(blocks, grids, shape)
    mask = torch.from_numpy(_labelled(opts) if opts.label else read_white(opts.mask) > 127)
    if list(mask.shape) != shape:
        sizes = [f"{width}x{height}" for height, width in (mask.shape, shape)]
        raise ValueError(f"--mask={opts.mask} has {sizes[0]} pixels, the network's pictures have {sizes[1]}")
    blocks = block_tools.blocks_of_mask(mask, grids, opts.mask_coverage)
    if not blocks and opts.label:
        raise ValueError(f"--label covers no more than --mask-coverage={opts.mask_coverage} of any block")
    if not blocks:
        raise ValueError(f"--mask={opts.mask} covers no block: paint white what is to be re-drawn")
    return blocks, mask


def _labelled(opts: Options) -> np.ndarray:
    """Bool [H, W]: where the label map has one of the values wanted."""
    labels = read_label_map(opts.mask)
    there = np.unique(labels).tolist()
    for value in opts.label:
        if value not in there:
            listed = ", ".join(map(str, there[:20])) + (", ..." if len(there) > 20 else "")
            raise ValueError(f"--label={value} is not in {opts.mask}: its values are {listed}")
    return np.isin(labels, opts.label)


def _starts(
    opts: Options,
    earlier: Earlier,
    G: torch.nn.Module,
    label: torch.Tensor | None,
    psi: float,
    device: torch.device,
) -> list[results.Start]:
    """The pictures whose blocks are re-drawn: picks of an earlier call, projected pictures, or seeds."""
    if earlier:
        return _picked(opts, earlier, G)
    if opts.projected_w:
        ws = generating.read_projected_w(opts.projected_w, G).numpy()
        return [results.Start(f"proj{i:02d}", i, ws[i : i + 1], None, []) for i in range(len(ws))]
    starts = []
    for seed in opts.seeds or [0]:
        z = generating.seed_latent(seed, G.z_dim)
        ws = generating.map_seed(G, seed, label, psi, device)
        starts.append(results.Start(f"seed{seed:04d}", seed, ws.cpu().numpy(), z.float().numpy(), []))
    return starts


def _picked(opts: Options, earlier: Earlier, G: torch.nn.Module) -> list[results.Start]:
    """The picked candidate of every earlier result, or of those of the given seeds."""
    there = sorted(record["seed"] for _, record in earlier)
    for seed in opts.seeds or []:
        if seed not in there:
            raise ValueError(f"--from={opts.source} has no seed {seed}, only {', '.join(map(str, there))}")
    wanted = [each for each in earlier if not opts.seeds or each[1]["seed"] in opts.seeds]
    starts = [results.continue_from(path, record, opts.pick) for path, record in wanted]
    for start, (path, _record) in zip(starts, wanted, strict=True):
        wrong_z = start.z is not None and start.z.shape != (1, G.z_dim)
        if start.ws.shape != (1, G.num_ws, G.w_dim) or wrong_z:
            raise ValueError(f"The latents of {path} are not those of its network")
    return starts


def _from(opts: Options, paths: list[str]) -> dict[str, Any] | None:
    """Which call this one goes on from, as its settings say it: the same wherever one stands."""
    if not paths:
        return None
    return {
        "folder": results.relative(os.path.dirname(os.path.abspath(paths[0])), opts.outdir),
        "pick": opts.pick,
    }


def _folder_name(opts: Options) -> str:
    """What a call does, as part of a folder's name: blocks5_6, row0-swap8, mask-hair-from00000-pick3."""
    labels = "_".join(map(str, opts.label or []))
    stem = (
        f"mask-{os.path.splitext(os.path.basename(opts.mask))[0]}" + (f"-{labels}" if labels else "")
        if opts.mask
        else opts.blocks or "numbering"
    )
    name = re.sub(r"[^a-z0-9-]+", "_", stem.lower())[:40]
    name = f"blocks{name}" if name[0].isdigit() else name
    if opts.best or opts.by:
        name += f"-by-{opts.by or 'realism'}"
    if opts.swap:
        name += "-swap" + "_".join(map(str, opts.swap))[:40]
    if opts.source:
        path = os.path.abspath(opts.source)
        folder = os.path.basename(path if os.path.isdir(path) else os.path.dirname(path))
        name += f"-from{folder.split('-')[0]}-pick{opts.pick}"
    return name


def _digest(values: np.ndarray) -> str:
    """A short name for the content of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


# Do it.


@torch.no_grad()
def resample(job: Job, folder: str, start: results.Start) -> dict[str, Any]:
    """Re-draws one picture's blocks and writes all files about it; returns the content of its JSON."""
    settings, blocks = job.settings, job.settings["blocks"]
    donors = settings["swap"] or resampling.donor_seeds(
        settings["candidate_seed"], start.seed, len(start.history), settings["candidates"]
    )
    ws = torch.from_numpy(start.ws).to(job.device)
    if blocks:
        ws = torch.cat([ws, resampling.redraw(job.G, ws, blocks, donors, job.label, settings["trunc"])])
    pictures = resampling.render(job.G, ws, settings["noise_mode"], start.seed)
    pixels = picture_pixels(pictures).permute(0, 2, 3, 1).cpu().numpy()
    features = None if job.D is None else functools.partial(discriminator_features, job.D)
    changes = resampling.measure(pictures[:1], pictures[1:], job.mask, grids_of(job.G), features)
    candidates = [
        {"number": number, "donor": donor, "image": f"{start.name}-{number}.png", **change}
        for number, (donor, change) in enumerate(zip(donors, changes, strict=True), 1)
    ]
    if "by" in settings and candidates:
        _rank(job, candidates, pictures)
    record = {
        "name": start.name,
        "seed": start.seed,
        "network": {"source": job.network_source, **_grid_record(job.G)},
        **job.same,
        "history": start.history,
        "candidates": candidates,
        "files": {"original": f"{start.name}-original.png", "latents": f"{start.name}.npz"},
    }
    arrays = {"ws": ws.cpu().numpy()}
    if start.z is not None:
        arrays["z"] = _latents(job, start, donors if blocks else [])
    results.write_arrays(os.path.join(folder, record["files"]["latents"]), arrays)
    _write_pictures(job, folder, start, record, pixels)
    results.write_record(os.path.join(folder, f"{start.name}.json"), record)  # last: it names the others
    return record


def _grid_record(G: torch.nn.Module) -> dict[str, Any]:
    """What the JSON says about the grid, or about several, whose blocks are numbered in one row."""
    grids = grids_of(G)
    return {"grid": grids[0]} if len(grids) == 1 else {"grids": grids}


def _rank(job: Job, candidates: list[dict[str, Any]], pictures: torch.Tensor) -> None:
    """Adds scores and rank (1 is the best) to the candidates of pictures[1:]; those that are not among the best lose
    their image."""
    by, best = job.settings["by"], job.settings["best"]
    order, distances = ranking.farthest_first(pictures[:1], pictures[1:], job.mask)
    scores = {"diversity": distances, "locality": [each["ratio"] for each in candidates]}
    if job.D is not None:
        settings = (job.settings["trunc"], job.settings["noise_mode"], job.device)
        others = ranking.references(job.G, job.D, job.label, *settings)
        scores["realism"] = ranking.realism(job.D, pictures[1:], others, job.label)
    if by != "diversity":
        order = ranking.best_first(scores[by])
    for rank, place in enumerate(order, 1):
        candidate = candidates[place]
        candidate["scores"], candidate["rank"] = {name: each[place] for name, each in scores.items()}, rank
        if rank > best:
            candidate["image"] = None


def shown_candidates(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of a record that have pictures, the best first where they are ranked."""
    shown = [each for each in record["candidates"] if each["image"] is not None]
    return sorted(shown, key=lambda each: each.get("rank", 0))


def _latents(job: Job, start: results.Start, donors: list[int]) -> np.ndarray:
    """z of the original and of every candidate -> float32 [1 + K, z_dim]."""
    z = torch.from_numpy(start.z)
    fresh = [generating.seed_latent(donor, job.G.z_dim) for donor in donors]
    blocks, grid = job.settings["blocks"], grids_of(job.G)
    return torch.cat([z, *(block_tools.replace_blocks(z, each, blocks, grid) for each in fresh)]).numpy()


def _write_pictures(
    job: Job, folder: str, start: results.Start, record: dict[str, Any], pictures: np.ndarray
) -> None:
    """Single pictures, the sheet of all, the numbering; adds what it wrote to record['files']."""
    files, candidates = record["files"], shown_candidates(record)
    write_png(os.path.join(folder, files["original"]), pictures[0])
    chosen = [pictures[each["number"]] for each in candidates]
    for candidate, picture in zip(candidates, chosen, strict=True):
        write_png(os.path.join(folder, candidate["image"]), picture)
    if candidates:
        files["grid"] = f"{start.name}-grid.png"
        by = job.settings.get("by")
        among = f", the best {len(candidates)} of {len(record['candidates'])} by {by}" if by else ""
        labels = ["original", *(_caption(each, by) for each in candidates)]
        step = sum(earlier["pick"] > 0 for earlier in start.history) + 1
        title = f"{start.name}: {job.what} re-drawn{among}" + (f" (edit number {step})" if step > 1 else "")
        sheet = figures.candidate_sheet(pictures[0], chosen, job.mask.numpy(), labels, title)
        write_png(os.path.join(folder, files["grid"]), sheet)
    if job.numbering:
        files["numbering"] = f"{start.name}-numbering.png"
        numbered = figures.numbering_picture(pictures[0], grids_of(job.G), job.settings["blocks"])
        write_png(os.path.join(folder, files["numbering"]), numbered)


def _caption(candidate: dict[str, Any], by: str | None) -> str:
    """What stands under a candidate."""
    lines = [f"inside {candidate['inside']:.3g}", f"outside {candidate['outside']:.2g}"]
    if by is not None:
        lines.insert(0, f"{by} {candidate['scores'][by]:.3g}")
    return "\n".join([str(candidate["number"]), *lines])
