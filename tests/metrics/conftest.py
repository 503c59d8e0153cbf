# SPDX-License-Identifier: Apache-2.0
"""A tiny detector, a tiny generator and a tiny data set."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch

import dnnlib.util


class TinyDetector(torch.nn.Module):
    """Features: the picture averaged to 2x2 (12 values); perceptual: pixels / 127.5; 4 classes: softmax."""

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        return_lpips: bool = False,
        no_output_bias: bool = False,
        resize_images: bool = True,
    ) -> torch.Tensor:
        x = img.to(torch.float32) / 127.5
        if return_lpips:
            return x.flatten(1)
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        if no_output_bias:
            return pooled[:, :4].softmax(dim=1)
        assert return_features
        return pooled


class TinyGenerator(torch.nn.Module):
    """picture = tanh(0.5 A z + noise); z [N, 5], pictures [N, 3, 8, 8]."""

    def __init__(self, c_dim=0, noise=0.0):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = 5, c_dim, 5, 2
        self.img_resolution, self.img_channels, self.noise = 8, 3, noise
        rnd = torch.Generator().manual_seed(1)
        self.A = torch.nn.Parameter(torch.randn([3 * 8 * 8, 5 + c_dim], generator=rnd))

    def forward(self, z, c, **_):
        x = torch.cat([z, c], dim=1) @ self.A.t()
        return torch.tanh(0.5 * x + self.noise * torch.randn_like(x)).reshape(-1, 3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """A cache of the test's own."""
    dnnlib.util.set_cache_dir(str(tmp_path / "cache"))
    yield tmp_path / "cache"
    dnnlib.util.set_cache_dir(None)


@pytest.fixture(scope="session")
def script():
    """TinyDetector as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(TinyDetector())


@pytest.fixture
def detector_file(script, tmp_path):
    """Path of a TorchScript file under a name of its own."""
    return save_script(script, tmp_path / "tiny-net.pt")


@pytest.fixture
def detector_folder(script, tmp_path):
    """A folder with both files under NVIDIA's names."""
    folder = tmp_path / "detectors"
    folder.mkdir()
    for name in ("inception-2015-12-05.pt", "vgg16.pt"):
        save_script(script, folder / name)
    return str(folder)


def save_script(script, path):
    """Writes TorchScript without its DeprecationWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(script, str(path))
    return str(path)


@pytest.fixture
def pictures():
    """uint8 [30, 8, 8, 3]."""
    return np.random.RandomState(0).randint(256, size=[30, 8, 8, 3]).astype(np.uint8)


@pytest.fixture
def dataset_kwargs(pictures, tmp_path):
    """Options of a folder of 30 pictures, 8x8, labelled 0, 1, 2 in turns."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        PIL.Image.fromarray(picture).save(folder / f"img{i:02d}.png")
    labels = ", ".join(f'["img{i:02d}.png", {i % 3}]' for i in range(len(pictures)))
    (folder / "dataset.json").write_text(f'{{"labels": [{labels}]}}')
    return dict(class_name="training.dataset.ImageFolderDataset", path=str(folder), use_labels=False)


@pytest.fixture
def make_generator():
    """The class of the tiny generator."""
    return TinyGenerator
