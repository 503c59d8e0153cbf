# SPDX-License-Identifier: Apache-2.0
"""Feature detectors: where each comes from, what results of it are called, and how it is called.

A detector is a torch module that takes pictures [N, 3, H, W] in 0..255 and, as NVIDIA's TorchScript files
do, is told by keywords what to return:

    return_features=True                     float [N, F], features for Frechet and kernel distances
    no_output_bias=True                      float [N, classes], class probabilities (Inception only)
    resize_images=False, return_lpips=True   float [N, P]; squared distances are perceptual distances

Results of any other detector than NVIDIA's two carry its name in their key (`result_name`).
"""

import os
import re
import warnings
from dataclasses import dataclass

import torch

import dnnlib
from dnnlib import download
from metrics import efficientnet_lite

BASE_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
OFFICIAL_FILES = ["inception-2015-12-05.pt", "vgg16.pt"]
# What a metric wants -> NVIDIA's file for it. 'classes' are the class probabilities that only Inception has,
# 'maps' perceptual features that say where they lie, as those of OFFLINE do.
URLS = dict(zip(["inception", "vgg16"], [BASE_URL + file for file in OFFICIAL_FILES], strict=True))
URLS.update(classes=URLS["inception"], maps=URLS["vgg16"])
# Detectors that need no download: name -> side of the square that pictures are resized to.
OFFLINE = {"efficientnet-lite0": 224, "efficientnet-lite0-128": 128}
OTHER_NAMES = dict(fid="fd", kid="kd", ppl="ppd")


class DetectorError(OSError):
    """A detector that cannot be had, or cannot do what is asked of it; the message says what to do."""


@dataclass(frozen=True)
class Detector:
    """source: URL, path or name of an offline detector; official: whether results keep the family's keys."""

    source: str
    name: str
    official: bool


# ----------------------------------------------------------------------------------------
# Choosing


def choose(role, choice=None):
    """The Detector for a role (a key of URLS, or a URL of one's own), given the user's choice of --detector.

    choice: None (NVIDIA's files by URL), the name of an offline detector, a folder that holds NVIDIA's
    files, or the path or URL of one TorchScript file. A file under NVIDIA's name stands for the pair of them
    in that place. DetectorError where the choice is none of these, or cannot play the role.
    """
    detector = _choose(role, choice)
    if role == "classes" and not detector.official:
        raise DetectorError(
            f"The Inception score needs {OFFICIAL_FILES[0]}; the detector {detector.name} has no such classes"
        )
    if role == "maps" and detector.source not in OFFLINE:
        raise DetectorError(
            f"The detector {detector.name} does not say where in the picture its features lie: give --detector="
            + " or ".join(OFFLINE)
        )
    return detector


def _choose(role, choice):
    default = URLS.get(role, role)
    file = default.rsplit("/", 1)[-1]
    if choice is None:
        return Detector(default, stem(default), True)
    if choice in OFFLINE:
        return Detector(choice, choice, False)
    if os.path.isdir(choice):
        return Detector(os.path.join(choice, file), stem(file), True)
    folder, last = re.fullmatch(r"(.*[/\\])?([^/\\]*)", choice).groups()
    if last in OFFICIAL_FILES:
        return Detector((folder or "") + file, stem(file), True)
    if os.path.isfile(choice) or dnnlib.util.is_url(choice, allow_file_urls=True):
        return Detector(choice, stem(choice), False)
    raise DetectorError(
        f"--detector: {choice!r} is neither a file, a folder with {' and '.join(OFFICIAL_FILES)}, a URL,"
        f" nor one of {', '.join(OFFLINE)}"
    )


def where(url, choice=None):
    """The source of a detector that a metric names by URL: one of NVIDIA's files is taken from where
    --detector says that these lie; everything else is that URL itself."""
    if url not in URLS.values() or choice is None:
        return url
    detector = _choose(url, choice)
    return detector.source if detector.official else url


def result_name(metric, detector):
    """Key of a result: the metric's name, or one that names the detector and cannot be taken for the
    family's.

    fid5k -> fid5k; with efficientnet-lite0 -> fd5k_efficientnet_lite0 (kid -> kd, ppl -> ppd; others keep
    their name).
    """
    if detector.official:
        return metric
    for prefix, other in OTHER_NAMES.items():
        if metric.startswith(prefix):
            metric = other + metric[len(prefix) :]
            break
    return f"{metric}_{re.sub(r'[^0-9a-z]+', '_', detector.name.lower()).strip('_')}"


def stem(source):
    """Name of a detector: that of its file, without folder and extension."""
    return os.path.splitext(re.split(r"[/\\]", source)[-1])[0]


def resize_of(source):
    """How pictures reach the size that the detector wants, in words, for reports."""
    return (
        f"bilinear, antialiased, {OFFLINE[source]}x{OFFLINE[source]}"
        if source in OFFLINE
        else "by the detector"
    )


# ----------------------------------------------------------------------------------------
# Files


def local_file(source, verbose=True):
    """Path of the detector's file on this machine; downloaded at first use, and the same file ever after."""
    if source in OFFLINE:
        path = efficientnet_lite.weights_path()
        if path is None:
            raise DetectorError(f"The detector {source} needs a package: {efficientnet_lite.INSTALL}")
        return path
    if not dnnlib.util.is_url(source):
        path = source[len("file://") :] if source.startswith("file://") else source
        if not os.path.isfile(path):
            raise DetectorError(f"--detector: {path} is not there")
        return path
    try:
        return dnnlib.util.open_url(source, num_attempts=4, verbose=verbose, return_filename=True)
    except download.ChecksumError as err:
        raise DetectorError(str(err)) from err
    except OSError as err:
        raise DetectorError(_advice(source, err)) from err


def _advice(source, err):
    return (
        f"The detector {source} cannot be fetched ({getattr(err, 'reason', err)}), and is not in"
        f" {dnnlib.make_cache_dir_path('downloads')} (DNNLIB_CACHE_DIR names another cache). Give"
        f" --detector=FOLDER with {' and '.join(OFFICIAL_FILES)} fetched elsewhere, or"
        " --detector=efficientnet-lite0, which works offline and gives results under names of its own"
        f" ({efficientnet_lite.INSTALL})"
    )


_hashes = {}  # (path, size, time of change) -> sha256


def sha256_of(source):
    """sha256 of the detector's file, in hexadecimal; files that did not change are read once a process."""
    return _file_hash(local_file(source))


def _file_hash(path):
    stat = os.stat(path)
    key = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = download.sha256_of(path)
    return _hashes[key]


# ----------------------------------------------------------------------------------------
# Loading and calling

_loaded = {}  # (source, sha256, device) -> module


def load(source, device="cpu"):
    """The module of a detector on a device, ready to be called; `choose` gives the source."""
    path = local_file(source)
    key = (source, _file_hash(path), str(device))
    if key not in _loaded:
        if source in OFFLINE:
            _loaded[key] = efficientnet_lite.load(path, device, input_size=OFFLINE[source])
        else:
            _loaded[key] = ScriptDetector(path, device)
    return _loaded[key]


def load_for(role, choice=None, device="cpu"):
    """`choose`, then `load`: e.g. load_for('vgg16', 'efficientnet-lite0') for perceptual_distance."""
    return load(choose(role, choice).source, device)


class ScriptDetector(torch.nn.Module):
    """A TorchScript file. One that knows neither `return_features` nor `resize_images` is called without
    them."""

    OPTIONAL = ("return_features", "resize_images")

    def __init__(self, path, device):
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(path, map_location=device)
        except RuntimeError as err:
            hint = "; stylegan3's .pkl detectors are not read" if path.endswith(".pkl") else ""
            raise DetectorError(f"The detector {path} is not a TorchScript file{hint}") from err
        self.module = module.eval()
        for parameter in module.parameters():  # a ScriptModule has no requires_grad_ of its own
            parameter.requires_grad_(False)
        self.path = path
        self.keywords = {argument.name for argument in module.forward.schema.arguments}

    def forward(self, images, **flags):
        """images [N, 3, H, W] in 0..255 -> float [N, values]; flags as at the top of this module."""
        unknown = [name for name in flags if name not in self.keywords]
        for name in unknown:
            if name not in self.OPTIONAL:
                raise DetectorError(f"The detector {self.path} does not know {name}, which this metric needs")
        return self.module(images, **{name: value for name, value in flags.items() if name not in unknown})


def as_rgb(images):
    """[N, 1 or 3, H, W] -> [N, 3, H, W]; ValueError for other numbers of channels."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"Detectors take pictures of 1 or 3 channels, not {images.shape[1]}")
    return images if images.shape[1] == 3 else images.repeat(1, 3, 1, 1)


def perceptual_features(detector, images):
    """float32 [N, P] whose squared distances are perceptual ones; images float [N, 1 or 3, H, W] in [-1, 1].
    Differentiable. detector: a module from `load` or `load_for`."""
    pixels = (as_rgb(images) + 1) * 127.5
    return detector(pixels, resize_images=False, return_lpips=True).flatten(1).to(torch.float32)


def feature_shapes(detector):
    """[(C, h, w), ...]: the maps of which perceptual_features are made, each laid out flat, one after another. For a
    detector of the role 'maps'."""
    with torch.no_grad():
        blank = torch.zeros(
            [1, 3, detector.input_size, detector.input_size], device=detector.stem.weight.device
        )
        return [tuple(each.shape[1:]) for each in detector.perceptual_maps(blank)]


def perceptual_distance(detector, img0, img1):
    """Squared distance of perceptual features -> [N]; img0, img1 float [N, 1 or 3, H, W] in [-1, 1].
    Differentiable.

    detector: a module from `load` or `load_for`. NVIDIA's vgg16 gives LPIPS. EfficientNet-Lite0 gives the
    squared difference of features of unit length at each position, averaged over positions and over five
    depths.
    """
    first, second = perceptual_features(detector, torch.cat([img0, img1])).chunk(2)
    return (first - second).square().sum(dim=1)
