# SPDX-License-Identifier: Apache-2.0
"""What goes into a pickle must open elsewhere: rules for the modules whose source travels along, and proof.

A checkout of the family knows none of our packages but brings its own dnnlib and torch_utils, runs Python 3.7
or later, and executes the module source that the pickle holds.
"""

import ast
import importlib
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
from collections import OrderedDict
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# The modules whose source goes into pickles.
MODULES = ["training/networks.py", "training/augment.py", "ssn_ext/networks.py", "ssn_ext/spade_networks.py"]

# What every checkout of the family has: name -> arguments to be passed by keyword (None: not a function).
OUTSIDE = {
    "dnnlib": {"EasyDict": None, "util": None, "make_cache_dir_path": set()},
    "misc": {
        "assert_shape": {"tensor", "ref_shape"},
        "constant": {"value", "shape", "dtype", "device", "memory_format"},
        "nan_to_num": {"input", "nan", "posinf", "neginf", "out"},
        "suppress_tracer_warnings": set(),
        "profiled_function": set(),
        "params_and_buffers": {"module"},
        "named_params_and_buffers": {"module"},
        "copy_params_and_buffers": {"src_module", "dst_module", "require_all"},
    },
    "persistence": {"persistent_class": set()},
    "bias_act": {
        "bias_act": {"x", "b", "dim", "act", "alpha", "gain", "clamp", "impl"},
        "activation_funcs": None,
    },
    "upfirdn2d": {
        "setup_filter": {"f", "device", "normalize", "flip_filter", "gain", "separable"},
        "upfirdn2d": {"x", "f", "up", "down", "padding", "flip_filter", "gain", "impl"},
        "filter2d": {"x", "f", "padding", "flip_filter", "gain", "impl"},
        "upsample2d": {"x", "f", "up", "padding", "flip_filter", "gain", "impl"},
        "downsample2d": {"x", "f", "down", "padding", "flip_filter", "gain", "impl"},
    },
    "conv2d_resample": {
        "conv2d_resample": {"x", "w", "f", "up", "down", "padding", "groups", "flip_weight", "flip_filter"},
    },
    "conv2d_gradfix": {
        "conv2d": {"input", "weight", "bias", "stride", "padding", "dilation", "groups"},
        "conv_transpose2d": {
            *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        },
        "no_weight_gradients": set(),
    },
    "grid_sample_gradfix": {"grid_sample": {"input", "grid"}},
    "fma": {"fma": {"a", "b", "c"}},
}
PACKAGES = {
    "torch_utils": {"misc", "persistence"},
    "torch_utils.ops": set(OUTSIDE) - {"dnnlib", "misc", "persistence"},
}
WHOLE = {"dnnlib", "numpy", "scipy", "torch"} | set(sys.stdlib_module_names)
NEWER_THAN_37 = {
    "math": {"prod", "dist", "comb", "perm", "isqrt", "lcm", "hypot", "cbrt", "exp2"},
    "functools": {"cache"},
}


def broken_rules(source):
    """Yields one line for each place of a module's source that would not run elsewhere."""
    tree = ast.parse(source, feature_version=(3, 7))
    optional = {id(node) for node in tree.body if _is_optional_import(node)}
    skipped = {id(inner) for node in tree.body if id(node) in optional for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) not in skipped:
            for complaint in _complaints(node):
                yield f"line {node.lineno}: {complaint}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for complaint in _class_complaints(node):
                yield f"line {node.lineno}: {complaint}"


def _is_optional_import(node):
    """try: from torch_utils.ops import ours / except ImportError: ours = None; exactly this form."""
    if not isinstance(node, ast.Try) or len(node.body) != 1 or len(node.handlers) != 1:
        return False
    names = [alias.name for alias in getattr(node.body[0], "names", [])]
    expected = f"try:\n    from torch_utils.ops import {', '.join(names)}\nexcept ImportError:\n    "
    expected += " = ".join(names) + " = None"
    return ast.unparse(node) == expected


def _complaints(node):
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] not in WHOLE or alias.name.startswith("dnnlib."):
                yield f"import {alias.name}"
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            allowed = node.module in ("numpy", "scipy", "torch") or node.module in sys.stdlib_module_names
            allowed = allowed or alias.name in PACKAGES.get(node.module, ())
            if node.level or not allowed or alias.asname:
                yield f"from {'.' * node.level}{node.module or ''} import {alias.name}"
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module, name = node.value.id, node.attr
        if module in OUTSIDE and name not in OUTSIDE[module] or name in NEWER_THAN_37.get(module, ()):
            yield f"{module}.{name}"
    elif isinstance(node, ast.Call):
        yield from _call_complaints(node)
    elif isinstance(node, ast.AnnAssign) or isinstance(node, ast.arg) and node.annotation:
        yield "an annotation"
    elif isinstance(node, ast.Name) and node.id == "__slots__":
        yield "__slots__"
    elif isinstance(node, ast.Name) and node.id == "__file__":
        yield "__file__ does not exist there"


def _call_complaints(node):
    given = {keyword.arg for keyword in node.keywords}
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        known = OUTSIDE.get(node.func.value.id, {}).get(node.func.attr)
        if known is not None and given - known - {None}:
            yield f"{ast.unparse(node.func)} has no argument {sorted(given - known - {None})}"
    if isinstance(node.func, ast.Name) and node.func.id == "zip" and "strict" in given:
        yield "zip(strict=)"


def _class_complaints(node):
    bases = [ast.unparse(base) for base in node.bases]
    if bases in (
        [],
        ["torch.autograd.Function"],
    ):  # cannot be state: the test of the pickle's globals says so
        return
    if bases != ["torch.nn.Module"]:
        yield f"class {node.name} derives from {bases}"
    if [ast.unparse(d) for d in node.decorator_list] != ["persistence.persistent_class"]:
        yield f"class {node.name} is not persistent"


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_the_rules(path):
    assert list(broken_rules((ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import training",
        "import training.networks",
        "from training import networks",
        "from . import networks",
        "from torch_utils import training_stats",
        "from torch_utils.ops import filtered_lrelu",
        "from torch_utils.ops import fma as multiply_add",
        "from dnnlib.util import open_url",
        "from torch_utils import misc\nmisc.print_module_summary(1)",
        "from torch_utils.ops import conv2d_gradfix\nconv2d_gradfix.no_weight_gradients(disable=True)",
        "def f():\n    import ssn_ext",
        "try:\n    from torch_utils.ops import ours\nexcept Exception:\n    ours = None",
        "import torch\nclass Helper(torch.nn.Module):\n    pass",
        "@persistence.persistent_class\nclass Net(networks.Generator):\n    pass",
        "import math\nmath.prod([1])",
        "def f(x: int):\n    pass",
        "zip([], [], strict=True)",
        "class A(torch.autograd.Function):\n    __slots__ = ()",
    ],
)
def test_rules_are_able_to_fail(source):
    assert len(list(broken_rules(source))) == 1


@pytest.mark.parametrize(
    "source", ["(n := 1)", "def f(x, /):\n    pass", "f'{1=}'", "match 1:\n    case 1:\n        pass"]
)
def test_newer_syntax_is_refused(source):
    with pytest.raises(SyntaxError):
        list(broken_rules(source))


def test_optional_fast_path_is_allowed_in_its_one_form():
    source = "try:\n    from torch_utils.ops import ours\nexcept ImportError:\n    ours = None"
    assert list(broken_rules(source)) == []


# ----------------------------------------------------------------------------
# Proof: objects of these modules, opened where only dnnlib and torch_utils exist.

SMALL = dict(img_resolution=16, img_channels=3)
WIDTHS = dict(channel_base=128, channel_max=16)
GENERATOR = dict(c_dim=0, **SMALL, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=WIDTHS)
PIPE = dict.fromkeys(
    ["xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac", "brightness", "cutout"], 1
)

# name: module, class, constructor arguments, shape of the input, arguments of the call
OBJECTS = {
    "G": (
        "training.networks",
        "Generator",
        dict(GENERATOR, z_dim=8, w_dim=8),
        [2, 8],
        dict(c=None, noise_mode="const"),
    ),
    "D": (
        "training.networks",
        "Discriminator",
        dict(c_dim=0, **SMALL, **WIDTHS),
        [4, 3, 16, 16],
        dict(c=None),
    ),
    "augment": ("training.augment", "AugmentPipe", PIPE, [2, 3, 16, 16], {}),
    "SSN": (
        "ssn_ext.networks",
        "SpatialGenerator",
        dict(GENERATOR, z_dim=32, w_dim=32, latent_grid=[2, 2]),
        [2, 32],
        dict(c=None, noise_mode="const"),
    ),
    "SPADE": (
        "ssn_ext.spade_networks",
        "SpadeGenerator",
        dict(GENERATOR, z_dim=32, w_dim=32, latent_grid=[2, 2]),
        [2, 32],
        dict(c=None, noise_mode="const"),
    ),
    "SSN of two grids": (
        "ssn_ext.networks",
        "SpatialGenerator",
        dict(GENERATOR, z_dim=80, w_dim=80, latent_grids=[[2, 2], [4, 4]], grid_splits=[8]),
        [2, 80],
        dict(c=None, noise_mode="const"),
    ),
}

GLOBALS = {
    "torch_utils.persistence _reconstruct_persistent_obj",
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
    "dnnlib.util EasyDict",
}

# Opens the pickles in its folder with nothing of this project but what lies below argument 1, and runs them.
ELSEWHERE = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
with open('calls.pkl', 'rb') as f:
    threads, calls = pickle.load(f)
torch.set_num_threads(threads)
for name, (x, kwargs) in calls.items():
    with open(name + '.pkl', 'rb') as f:
        net = pickle.load(f)
    assert 'training' not in sys.modules and 'ssn_ext' not in sys.modules
    torch.manual_seed(1)
    with torch.no_grad():
        np.save(name + '.npy', net(torch.as_tensor(x), **kwargs).numpy())
"""

# What a checkout does with networks beside calling them: copies, pickles of its own, its force_fp16 (of either
# generation), gradients. Argument 2: what the networks of the family are told by their constructors.
HANDLING = """
import copy, io, pickle, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch_utils import misc, persistence
with open('calls.pkl', 'rb') as f:
    threads, calls = pickle.load(f)

def run(net, x, kwargs):
    torch.manual_seed(1)
    return net(x, **kwargs)

for name, (x, kwargs) in calls.items():
    with open(name + '.pkl', 'rb') as f:
        net = pickle.load(f)
    assert persistence.is_persistent(net) and net.init_args == ()
    x = torch.as_tensor(x).requires_grad_(True)
    out = run(net, x, kwargs)
    out.square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    again = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), type(net)(**net.init_kwargs).eval()]
    misc.copy_params_and_buffers(net.requires_grad_(False), again[-1].requires_grad_(False), require_all=True)
    routes = [] if 'augment' in name else ['top'] if name.startswith('D') else ['nested']
    for route in routes:
        options = copy.deepcopy(net.init_kwargs)
        place = options if route == 'top' else options.setdefault('synthesis_kwargs', {})
        place.update(num_fp16_res=4, conv_clamp=256)
        again.append(type(net)(**options).eval().requires_grad_(False))
        misc.copy_params_and_buffers(net, again[-1], require_all=True)
        halves = any(getattr(m, 'use_fp16', False) for m in again[-1].modules())
        assert halves == (name != 'SPADE'), name  # which takes the options and stays as it is
    for i, other in enumerate(again):
        difference = (run(other, x, kwargs) - out).abs().max() / out.std()
        assert difference <= 1e-5, (name, i, difference)
    if hasattr(net, 'mapping') and hasattr(net, 'synthesis'):
        w = net.mapping(x.detach(), kwargs['c'], truncation_psi=0.7)
        mixed = net.mapping(x.detach(), kwargs['c'], truncation_psi=0.7, truncation_cutoff=2)
        mixed[:, 2:4] = w[:, 2:4]
        assert net.synthesis(mixed, noise_mode='none', force_fp32=True).shape == out.shape
        noises = [n for n, _ in net.synthesis.named_buffers() if n.endswith('.noise_const')]
        assert len(noises) == net.num_ws - 1
        net.train()
        net(x.detach(), kwargs['c'])
"""


@pytest.fixture(scope="module")
def samples():
    """name -> (pickle, input, arguments of the call, what it returns)"""
    return make_samples(OBJECTS)


def make_samples(objects):
    made = {}
    for title, (module, name, options, shape, kwargs) in objects.items():
        torch.manual_seed(0)
        net = getattr(importlib.import_module(module), name)(**options).eval()
        x = torch.randn(shape)
        torch.manual_seed(1)
        with torch.no_grad():
            out = net(x, **kwargs).numpy()
        made[title] = pickle.dumps(net, protocol=4), x.numpy(), kwargs, out
    return made


def run_elsewhere(root, samples, folder, script=ELSEWHERE):
    """Runs a script on pickled samples in a fresh process that has `root` in place of this project: name -> result."""
    calls = {name: (x, kwargs) for name, (_, x, kwargs, _) in samples.items()}
    (folder / "calls.pkl").write_bytes(pickle.dumps((torch.get_num_threads(), calls), protocol=4))
    for name, (data, *_) in samples.items():
        (folder / f"{name}.pkl").write_bytes(data)
    command = [sys.executable, "-I", "-c", script, str(root)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: np.load(folder / f"{name}.npy") for name in samples if (folder / f"{name}.npy").exists()}


@pytest.fixture(scope="module")
def without_this_project(samples, tmp_path_factory):
    root = tmp_path_factory.mktemp("elsewhere")
    for package in ["dnnlib", "torch_utils"]:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return run_elsewhere(root, samples, tmp_path_factory.mktemp("pickles"))


def globals_of(data):
    """Names of the classes and functions that a pickle asks for: 'module name'."""
    strings, memo, found = [], {}, set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            found.add(argument)
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo[argument])
        elif isinstance(argument, str):
            strings.append(argument)
    return found


@pytest.mark.parametrize("name", OBJECTS)
def test_pickle_asks_for_nothing_of_ours(name, samples):
    found = globals_of(samples[name][0])
    assert "torch_utils.persistence _reconstruct_persistent_obj" in found
    assert found <= GLOBALS


def test_globals_are_found():
    data = pickle.dumps([np.float64(1), OrderedDict, OrderedDict(), Decimal(1)], protocol=4)
    assert {"numpy dtype", "collections OrderedDict", "decimal Decimal"} <= globals_of(data)


@pytest.mark.parametrize("name", OBJECTS)
def test_pickle_gives_the_same_result_without_this_project(name, samples, without_this_project):
    assert np.array_equal(without_this_project[name], samples[name][-1])  # bit for bit


# --- in place of an untouched checkout: the names that every one has, and no others

STAND_IN = Path(__file__).with_name("stand_in")
LABEL = torch.eye(3)
MORE = {
    "G with labels": (
        "training.networks", "Generator", dict(GENERATOR, z_dim=8, w_dim=8, c_dim=3), [3, 8],
        dict(c=LABEL, noise_mode="random"),
    ),
    "G resnet": (
        "training.networks", "Generator",
        dict(GENERATOR, z_dim=8, w_dim=8, synthesis_kwargs=dict(WIDTHS, architecture="resnet")), [2, 8],
        dict(c=None, noise_mode="const"),
    ),
    "G wide": (
        "training.networks", "Generator", dict(GENERATOR, z_dim=8, w_dim=8, img_shape=[8, 16]), [2, 8],
        dict(c=None, noise_mode="const", truncation_psi=0.5),
    ),
    "G half": (
        "training.networks", "Generator",
        dict(GENERATOR, z_dim=8, w_dim=8, synthesis_kwargs=dict(WIDTHS, num_fp16_res=4, conv_clamp=256)), [2, 8],
        dict(c=None, noise_mode="const"),
    ),
    "D skip with labels": (
        "training.networks", "Discriminator", dict(c_dim=3, **SMALL, **WIDTHS, architecture="skip"), [3, 3, 16, 16],
        dict(c=LABEL),
    ),
    "D orig": (
        "training.networks", "Discriminator", dict(c_dim=0, **SMALL, **WIDTHS, architecture="orig"), [4, 3, 16, 16],
        dict(c=None),
    ),
    "augment all": (
        "training.augment", "AugmentPipe",
        dict.fromkeys([*PIPE, "contrast", "lumaflip", "hue", "saturation", "imgfilter", "noise"], 1),
        [2, 3, 32, 32], {},
    ),
    "SSN with labels": (
        "ssn_ext.networks", "SpatialGenerator",
        dict(GENERATOR, z_dim=32, w_dim=32, latent_grid=[2, 2], c_dim=3), [3, 32],
        dict(c=LABEL, noise_mode="random"),
    ),
    "SSN wide": (
        "ssn_ext.networks", "SpatialGenerator",
        dict(GENERATOR, z_dim=64, w_dim=64, latent_grid=[2, 4], img_shape=[8, 16]), [2, 64],
        dict(c=None, noise_mode="const", truncation_psi=0.5),
    ),
    "SSN half": (
        "ssn_ext.networks", "SpatialGenerator",
        dict(GENERATOR, z_dim=32, w_dim=32, latent_grid=[2, 2],
             synthesis_kwargs=dict(WIDTHS, num_fp16_res=4, conv_clamp=256)), [2, 32],
        dict(c=None, noise_mode="const"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def many_samples(samples):
    """All kinds of networks and arguments."""
    return {**samples, **make_samples(MORE)}


@pytest.fixture(scope="module")
def with_the_names_of_the_family(many_samples, tmp_path_factory):
    return run_elsewhere(STAND_IN, many_samples, tmp_path_factory.mktemp("pickles"))


@pytest.mark.parametrize("name", [*OBJECTS, *MORE])
def test_pickle_runs_on_the_names_of_the_family(name, many_samples, with_the_names_of_the_family):
    """Convolutions and filters are other code there: equal but for rounding."""
    result, expected = with_the_names_of_the_family[name], many_samples[name][-1]
    assert np.abs(result - expected).max() <= 1e-4 * expected.std()


def test_a_checkout_handles_the_networks_as_its_own(many_samples, tmp_path):
    run_elsewhere(STAND_IN, many_samples, tmp_path, HANDLING)


def test_the_stand_in_has_the_names_of_the_family_only():
    """Else it would prove too little."""
    for module, names in OUTSIDE.items():
        if module == "dnnlib":
            continue
        path = (
            STAND_IN / "torch_utils" / ("" if module in PACKAGES["torch_utils"] else "ops") / f"{module}.py"
        )
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        defined |= {
            t.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for t in node.targets
            if hasattr(t, "id")
        }
        public = {name for name in defined if not name.startswith("_")} - {
            "enabled",
            "weight_gradients_disabled",
        }
        assert public - {"is_persistent"} == set(names), module


@pytest.mark.reference
@pytest.mark.skipif("REFERENCE_CHECKOUTS" not in os.environ, reason="REFERENCE_CHECKOUTS names no checkout")
def test_pickle_opens_in_a_reference_checkout(samples, tmp_path):
    """REFERENCE_CHECKOUTS: paths of untouched stylegan2-ada-pytorch or stylegan3 trees, joined as in PATH."""
    for root in os.environ["REFERENCE_CHECKOUTS"].split(os.pathsep):
        for name, result in run_elsewhere(root, samples, tmp_path).items():
            expected = samples[name][-1]
            assert np.abs(result - expected).max() <= 1e-4 * expected.std(), (root, name)
