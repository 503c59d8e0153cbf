# SPDX-License-Identifier: Apache-2.0
"""Generators as ONNX graphs, for programs that have no PyTorch. Reference operations, float32."""

import contextlib
import copy
import json
import logging
import warnings

import numpy as np
import torch

import dnnlib
from training.formats import MissingPackageError

INSTALL = "pip install onnxscript onnxruntime"
TOLERANCE = 1e-4  # largest difference between the graph's picture and PyTorch's, in standard deviations


def save_onnx(path, G, *, noise_mode="const", truncation_cutoff=None, verify=True):
    """Writes the generator G as one ONNX file, for batches of any size N.

    Inputs, float32: z [N,z_dim]; c [N,c_dim], if G is conditional; psi [1], if G tracks w_avg (1: no
    truncation). Output: img [N,C,H,W], nominally in [-1,1]. noise_mode: 'const' or 'none'. truncation_cutoff:
    truncate only the first so many of the num_ws vectors (None: all).

    verify: run the graph with onnxruntime, if that is installed, on a batch of another size than it was
    recorded with. Returns the largest difference from PyTorch's picture, as a share of that picture's standard
    deviation, or None where it was not measured. ValueError, and no file: onnxscript is not installed, wrong
    options, a network that cannot be exported, or a difference above TOLERANCE.
    """
    if noise_mode not in ("const", "none"):
        raise ValueError(f"noise_mode {noise_mode!r} cannot go into an ONNX file; accepted: 'const', 'none'")
    num_ws = G.mapping.num_ws
    if truncation_cutoff is not None and not 0 <= truncation_cutoff <= num_ws:
        raise ValueError(
            f"truncation_cutoff {truncation_cutoff} is not within 0 to {num_ws}, or None for all"
        )
    net = _Picture(copy.deepcopy(G).cpu(), noise_mode, truncation_cutoff).eval().requires_grad_(False)
    sample, expected = _example(net, num=3, seed=1)  # running once also fills the caches of constants
    model = _export(net, _example(net, num=2, seed=0)[0])
    shape = ", ".join(map(str, expected.shape[1:]))
    model.doc_string = f"Pictures [N, {shape}] of z and c, nominally in [-1, 1]; psi 1: no truncation"
    if hasattr(G, "latent_grid"):  # z's channels x rows x columns of blocks, seen as one axis
        model.metadata_props["latent_grid"] = json.dumps(list(G.latent_grid))
    data = _serialized(model)
    error = _difference(data, sample, expected) if verify else None
    if error is not None and not error <= TOLERANCE:
        raise ValueError(
            f"{path} was not written: the ONNX graph's picture differs from PyTorch's by {error:.1e} standard"
            f" deviations, more than {TOLERANCE:.0e}"
        )
    with dnnlib.util.open_atomic(path) as f:
        f.write(data)
    return error


class _Picture(torch.nn.Module):
    """The graph: mapping, truncation by the tensor psi, synthesis."""

    def __init__(self, G, noise_mode, cutoff):
        super().__init__()
        self.G, self.noise_mode, self.cutoff = G, noise_mode, cutoff

    def forward(self, z, c=None, psi=None):
        """z [N,z_dim], c [N,c_dim], psi [1] -> img [N,C,H,W]."""
        ws = self.G.mapping(z, c)
        if psi is not None:
            near = self.G.mapping.w_avg.lerp(ws, psi)
            cutoff = ws.shape[1] if self.cutoff is None else self.cutoff
            ws = torch.cat([near[:, :cutoff], ws[:, cutoff:]], dim=1)
        return self.G.synthesis(ws, noise_mode=self.noise_mode, force_fp32=True, fused_modconv=False)


def _example(net, num, seed):
    """(the graph's inputs by name, the picture that PyTorch makes of them)."""
    rng, G = np.random.RandomState(seed), net.G
    inputs = dict(z=torch.as_tensor(rng.randn(num, G.z_dim), dtype=torch.float32))
    if G.c_dim > 0:
        inputs["c"] = torch.as_tensor(np.eye(G.c_dim)[rng.randint(G.c_dim, size=num)], dtype=torch.float32)
    if hasattr(G.mapping, "w_avg"):
        inputs["psi"] = torch.tensor([0.7])
    with torch.no_grad():
        return inputs, net(**inputs)


def _export(net, inputs):
    """The ONNX model (onnx_ir) of the graph, recorded on these inputs."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx uses it)
    except ImportError as err:
        raise MissingPackageError(f"ONNX export needs packages that are not installed: {INSTALL}") from err
    batch = torch.export.Dim("N")
    try:
        with _quiet():
            return torch.onnx.export(
                net, kwargs=inputs, dynamo=True, verbose=False, output_names=["img"],
                dynamic_shapes={name: None if name == "psi" else {0: batch} for name in inputs},
            ).model  # fmt: skip
    except torch.onnx.OnnxExporterError as err:
        cause = str(err.__cause__ or err).strip().splitlines() or [type(err).__name__]
        raise ValueError(f"this network cannot be exported to ONNX: {cause[0]}") from err


@contextlib.contextmanager
def _quiet():
    """Without the exporter's remarks on itself: the operations of torchvision, a deprecated check of its own,
    and that two inputs share the name of their batch axis."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: N will not be used", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _serialized(model):
    """The bytes of the file; its tensors included."""
    import onnx_ir

    return onnx_ir.to_proto(model).SerializeToString()


def _difference(data, inputs, expected):
    """Largest difference of the graph's picture from the expected one in standard deviations of the latter;
    None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (img,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    if img.shape != tuple(expected.shape):
        return float("inf")
    return float(np.abs(img - expected.numpy()).max() / expected.std().item())
