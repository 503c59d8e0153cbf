# SPDX-License-Identifier: Apache-2.0
"""What metrics share: their options, progress, random draws, and features of real and generated pictures.

Every random draw derives from (seed, number of the picture): latents and labels do not depend on the batch
size or on the number of processes. The noise inputs of a generator are drawn per batch, from (seed, number
of its first picture).
"""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import torch

import dnnlib
from metrics import detectors
from metrics.feature_stats import FeatureStats
from metrics.progress import ProgressMonitor
from torch_utils import distributed, misc
from torch_utils.images import picture_pixels

SHARED_LIMIT = 100000  # features of more pictures than this are not kept for the next metric of a call
FEATURE_DTYPE = "float32"


class MetricOptions:
    """What a metric gets. Beyond the family's fields:

    detector     the user's choice, see metrics.detectors.choose; None: NVIDIA's files
    run_dir      where a metric may put further files; None: nowhere
    batch_size   pictures at a time in the detector (None: 64, on a CPU 16, which is faster there);
                 batch_gen: in the generator (None: by resolution)
    seed         what all random draws derive from
    num_workers  processes that read pictures (None: 3 with a GPU, else 0)
    shared       a dict that several metrics of one call pass features in; None: each for itself
    details      filled by the metric: what its numbers depend on
    """

    def __init__(
        self, G=None, G_kwargs=None, dataset_kwargs=None, num_gpus=1, rank=0, device=None, progress=None,
        cache=True, detector=None, run_dir=None, batch_size=None, batch_gen=None, seed=0, num_workers=None,
        shared=None,
    ):  # fmt: skip
        assert 0 <= rank < num_gpus
        if device is None:
            device = distributed.local_device("cuda" if torch.cuda.is_available() else "cpu", rank)
        self.G, self.G_kwargs = G, dnnlib.EasyDict(G_kwargs or {})
        self.dataset_kwargs = dnnlib.EasyDict(dataset_kwargs or {})
        self.num_gpus, self.rank, self.device = num_gpus, rank, torch.device(device)
        self.progress = (progress or ProgressMonitor()).sub() if rank == 0 else ProgressMonitor()
        self.cache = cache
        self.detector, self.run_dir, self.seed, self.shared = detector, run_dir, seed, shared
        self.batch_size = batch_size or (64 if self.device.type == "cuda" else 16)
        self.batch_gen, self.num_workers = batch_gen, num_workers
        self.details = dnnlib.EasyDict(
            dtype=self._dtype(),
            device=self.device.type,
            seed=seed,
            G_kwargs=dict(self.G_kwargs),
            detector=None,
        )

    def _dtype(self):
        """What the generator computes in: its half-precision layers are that on a GPU only."""
        layers = self.G.modules() if isinstance(self.G, torch.nn.Module) else ()
        half = any(getattr(layer, "use_fp16", False) for layer in layers)
        mixed = half and self.device.type == "cuda" and not self.G_kwargs.get("force_fp32")
        return "float16 and float32" if mixed else "float32"


# ----------------------------------------------------------------------------------------
# Several processes


def agreed(opts, fn):
    """What fn() returns; where it raises in one process, all raise, so that none waits for another in vain.

    All processes must call it. The one that failed raises its own exception, the others a PeerError that
    says the same.
    """
    if distributed.get_world_size() == 1:
        return fn()
    result, failure, text = None, None, None
    try:
        result = fn()
    except Exception as err:
        failure, text = err, f"{type(err).__name__}: {err}"
    if distributed.any_rank(failure is not None, device=opts.device):
        texts = [None] * distributed.get_world_size()
        torch.distributed.all_gather_object(texts, text)
        raise failure or distributed.PeerError(f"another process failed, {next(filter(None, texts))}")
    return result


def in_step(opts, items):
    """Yields the items, as many in every process; making each of them is `agreed`."""
    items, end = iter(items), object()
    while (item := agreed(opts, lambda: next(items, end))) is not end:
        yield item


# ----------------------------------------------------------------------------------------
# Detectors


def get_feature_detector_name(url):
    """Name of a detector: the file's, without folder and extension."""
    return detectors.stem(url)


def get_feature_detector(url, device="cpu", num_gpus=1, rank=0, verbose=False):
    """The module of metrics.detectors.load; of several processes the first one fetches the file."""
    if num_gpus > 1 and rank > 0:
        distributed.barrier()
    try:
        return detectors.load(url, device)
    finally:
        if num_gpus > 1 and rank == 0:
            distributed.barrier()


def open_detector(opts, detector_url):
    """The detector's module; its name and the sha256 of its file are noted in opts.details."""
    module = agreed(opts, lambda: get_feature_detector(detector_url, opts.device, opts.num_gpus, opts.rank))
    opts.details.update(
        detector=get_feature_detector_name(detector_url),
        detector_sha256=detectors.sha256_of(detector_url),
        resize=detectors.resize_of(detector_url),
    )
    return module


# ----------------------------------------------------------------------------------------
# Random draws


def latents(opts, numbers, count=1, num_labels=0):
    """Draws of the pictures of these numbers, each from (seed, number) alone.

    Returns z float32 [N, count, z_dim], uniform float32 [N] in [0, 1) and picks int64 [N, count] in
    0..num_labels - 1.
    """
    z, t, picks = [], [], []
    for number in numbers:
        rnd = np.random.Generator(np.random.Philox(key=[opts.seed, number]))
        z.append(rnd.standard_normal([count, opts.G.z_dim], dtype=np.float32))
        t.append(rnd.random(dtype=np.float32))
        picks.append(rnd.integers(max(num_labels, 1), size=count))
    return torch.from_numpy(np.stack(z)), torch.from_numpy(np.array(t, dtype=np.float32)), np.stack(picks)


def labels_for(opts, dataset, picks):
    """Labels float32 [..., c_dim] of these items of the data set, on the device; length 0 without one."""
    if dataset is None:
        return torch.zeros([*picks.shape, 0], device=opts.device)
    found = np.stack([dataset.get_label(int(i)) for i in picks.flat])
    return torch.from_numpy(found).reshape(*picks.shape, -1).to(opts.device)


def label_dataset(opts):
    """The data set that random labels come from; None where opts.G takes none. ValueError if they misfit."""
    if opts.G.c_dim == 0:
        return None
    dataset = open_dataset(opts)
    if dataset.label_dim != opts.G.c_dim:
        raise ValueError(
            f"The network wants labels of length {opts.G.c_dim}, those of {dataset.name} have length"
            f" {dataset.label_dim}"
        )
    return dataset


@contextlib.contextmanager
def seeded(device, *numbers):
    """Inside, torch's random state is what these numbers give; afterwards it is as it was."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
        yield


# ----------------------------------------------------------------------------------------
# Pictures


def copy_of_generator(opts):
    """opts.G for measuring: a copy on the device, in eval mode, without gradients."""
    return copy.deepcopy(opts.G).eval().requires_grad_(False).to(opts.device)


def shares(num_items, opts):
    """The items of this process: rank, rank + num_gpus, ...; as many in each, so the last may be beyond."""
    each = -(-num_items // opts.num_gpus)
    return [i * opts.num_gpus + opts.rank for i in range(each)]


def chunks(items, size):
    """Consecutive slices of `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def default_batch_gen(opts):
    """Pictures at a time in the generator: 4 from 256 pixels on, as in the family; more of smaller ones."""
    return opts.batch_gen or min(opts.batch_size, max(4, (512 // opts.G.img_resolution) ** 2))


@torch.no_grad()
def generated_batches(opts, num_items, batch_size, batch_gen):
    """Yields uint8 pictures [n, C, H, W] of opts.G, n <= batch_size: those of this process."""
    G, dataset = copy_of_generator(opts), label_dataset(opts)
    num_labels = 0 if dataset is None else len(dataset)
    for batch in chunks(shares(num_items, opts), batch_size):
        pictures = []
        for part in chunks(batch, batch_gen):
            z, _, picks = latents(opts, part, num_labels=num_labels)
            c = labels_for(opts, dataset, picks)
            with seeded(opts.device, opts.seed, part[0]):
                pictures.append(picture_pixels(G(z[:, 0].to(opts.device), c[:, 0], **opts.G_kwargs)))
        yield torch.cat(pictures)


def real_batches(opts, dataset, num_items, batch_size, data_loader_kwargs=None):
    """Yields uint8 pictures [n, C, H, W] of the data set on the device: those of this process, in order."""
    if data_loader_kwargs is None:
        workers = 3 if opts.device.type == "cuda" else 0
        workers = workers if opts.num_workers is None else opts.num_workers
        data_loader_kwargs = misc.loader_options(opts.device, workers, pin_memory=True, prefetch_factor=2)
    order = [i % num_items for i in shares(num_items, opts)]
    loader = torch.utils.data.DataLoader(dataset, sampler=order, batch_size=batch_size, **data_loader_kwargs)
    for images, _labels in loader:
        yield images.to(opts.device)


def open_dataset(opts):
    """The data set of the options. ValueError where there is none, or one of another shape than the network's."""
    if "class_name" not in opts.dataset_kwargs:
        raise ValueError("This metric needs a data set; please specify --data")
    dataset = dnnlib.util.construct_class_by_name(**opts.dataset_kwargs)
    made, real = getattr(opts.G, "img_shape", None), dataset.image_shape[1:]
    if made is not None and list(made) != list(real):
        sizes = [f"{width}x{height}" for height, width in (real, made)]
        raise ValueError(f"Pictures of {dataset.name} are {sizes[0]} pixels, those of the network {sizes[1]}")
    return dataset


# ----------------------------------------------------------------------------------------
# Features


def resize_filter_of(dataset_kwargs):
    """The filter that pictures were resized with, as dataset_tool.py writes it into dataset.json; None where
    that does not say. It alone can move an FID by a tenth of its value."""
    path = str(dataset_kwargs.get("path"))
    try:
        if os.path.isdir(path):
            with open(os.path.join(path, "dataset.json"), "rb") as f:
                text = f.read()
        else:
            with zipfile.ZipFile(path) as z:
                text = z.read("dataset.json")
        return json.loads(text)["made_by"]["resize_filter"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def data_fingerprint(dataset_kwargs):
    """sha256 of what the data set's path holds; None where no option names a file or folder.

    A zip: its table of names, sizes and checksums, the same on every machine. A folder: names, sizes and
    times of change. Any other file: size and time of change.
    """
    paths = [value for value in dataset_kwargs.values() if isinstance(value, str) and os.path.exists(value)]
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        for row in _contents(path):
            digest.update(repr(row).encode())
    return digest.hexdigest()


def _contents(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            return sorted((info.filename, info.file_size, info.CRC) for info in z.infolist())
    if os.path.isfile(path):
        return [(os.stat(path).st_size, os.stat(path).st_mtime_ns)]
    files = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
    return sorted((os.path.relpath(f, path), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files)


def compute_feature_stats_for_dataset(
    opts, detector_url, detector_kwargs, rel_lo=0, rel_hi=1, batch_size=None, data_loader_kwargs=None,
    max_items=None, **stats_kwargs,
):  # fmt: skip
    """FeatureStats of the real pictures, the first `max_items` of them (None: all), from the cache where
    they are there.

    stats_kwargs: capture_all, capture_mean_cov. The file in the cache is named after all that the features
    depend on: options and contents of the data set, max_items, the detector's file, what it is asked for,
    the dtype.
    """
    detector_url = detectors.where(detector_url, opts.detector)
    dataset = agreed(opts, lambda: open_dataset(opts))
    detector = open_detector(opts, detector_url)
    num_items = len(dataset) if max_items is None else min(len(dataset), max_items)
    data_hash = data_fingerprint(opts.dataset_kwargs)
    opts.details.update(
        num_real=num_items,
        data=dataset.name,
        data_hash=data_hash,
        data_resize=resize_filter_of(opts.dataset_kwargs),
        mirror=bool(opts.dataset_kwargs.get("xflip")),
    )
    what = opts.details.detector, opts.details.detector_sha256, detector_kwargs
    key = digest("real", dict(opts.dataset_kwargs), num_items, data_hash, what, FEATURE_DTYPE)
    file = None
    if opts.cache and data_hash is not None:
        name = f"{dataset.name}-{opts.details.detector}-{key}.pkl"
        file = dnnlib.make_cache_dir_path("gan-metrics", name)

    def pictures():
        return real_batches(opts, dataset, num_items, batch_size or opts.batch_size, data_loader_kwargs)

    progress = opts.progress.sub("dataset features", num_items, rel_lo=rel_lo, rel_hi=rel_hi)
    return _cached_stats(
        opts, key, file, pictures, detector, detector_kwargs, num_items, progress, stats_kwargs
    )


def compute_feature_stats_for_generator(
    opts, detector_url, detector_kwargs, rel_lo=0, rel_hi=1, batch_size=None, batch_gen=None, jit=False,
    max_items=None, **stats_kwargs,
):  # fmt: skip
    """FeatureStats of `max_items` pictures of opts.G with random latents and the labels of random real
    pictures.

    batch_gen: pictures at a time in the generator. `jit` is there for the family's signature and must be
    False.
    """
    if jit:
        raise ValueError("jit=True is not supported: TorchScript tracing is deprecated")
    assert max_items is not None
    detector_url = detectors.where(detector_url, opts.detector)
    detector = open_detector(opts, detector_url)
    opts.details.num_gen = max_items
    labels_of = dict(opts.dataset_kwargs) if opts.G.c_dim else None
    draws = id(opts.G), dict(opts.G_kwargs), labels_of, max_items, opts.seed
    key = digest("generated", draws, detector_url, detector_kwargs)
    batch_size = batch_size or opts.batch_size

    def pictures():
        return generated_batches(opts, max_items, batch_size, batch_gen or default_batch_gen(opts))

    progress = opts.progress.sub("generator features", max_items, rel_lo=rel_lo, rel_hi=rel_hi)
    return _cached_stats(
        opts, key, None, pictures, detector, detector_kwargs, max_items, progress, stats_kwargs
    )


def compute_both_stats(opts, role, max_real, num_gen, **capture):
    """FeatureStats of up to `max_real` real and of `num_gen` generated pictures, by the detector of a role."""
    source = detectors.choose(role, opts.detector).source
    ask = dict(return_features=True)
    real = compute_feature_stats_for_dataset(
        opts, source, ask, rel_lo=0, rel_hi=0, max_items=max_real, **capture
    )
    made = compute_feature_stats_for_generator(opts, source, ask, max_items=num_gen, **capture)
    return real, made


def digest(*parts):
    """A name for a combination of options, whatever the order in dicts."""
    return hashlib.md5(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _cached_stats(opts, key, file, pictures, detector, detector_kwargs, num_items, progress, stats_kwargs):
    """Statistics of `pictures()`: of an earlier metric of this call, else of the file, else computed."""
    shared = {} if opts.shared is None else opts.shared
    stats = shared.get(key)
    if stats is None and file is not None:
        stats = _load_stats(opts, file)
    if stats is None or not stats.can_give(**stats_kwargs):
        wanted = dict(stats_kwargs)
        if opts.shared is not None and num_items <= SHARED_LIMIT:
            wanted["capture_all"] = True  # all rows answer every metric
        stats = FeatureStats(max_items=num_items, **wanted)
        batches = (detector(detectors.as_rgb(images), **detector_kwargs) for images in pictures())
        for features in in_step(opts, batches):
            stats.append_torch(features.to(torch.float32), num_gpus=opts.num_gpus, rank=opts.rank)
            progress.update(stats.num_items)
        if file is not None and opts.rank == 0:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            stats.save(file)
    shared[key] = stats
    return stats


def _load_stats(opts, file):
    """Statistics of a file, None where it is not there or broken; all processes decide alike."""
    stats = None
    if opts.rank == 0 and os.path.isfile(file):
        try:
            stats = FeatureStats.load(file)
        except (OSError, EOFError, KeyError, pickle.UnpicklingError) as err:
            warnings.warn(f"{file} is broken and will be written again ({err})", stacklevel=2)
    found = distributed.broadcast_object(stats is not None)
    return agreed(opts, lambda: FeatureStats.load(file) if found and opts.rank > 0 else stats)
