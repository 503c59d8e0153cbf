# SPDX-License-Identifier: Apache-2.0
"""Configs: functions that edit the dict of training_loop's options, and make_config, which applies one to a
command.

A config is registered under its --cfg name with a dotted path, so that --help imports nothing. A plug-in
registers further configs and command-line options in its register(); see docs/extending.md.
"""

import math
import os
import re
from collections import namedtuple

import dnnlib
from dnnlib.plugins import Registry
from training.rehearsal import check_parts, check_transfer
from training.settings import (
    ConfigError,
    check_batch,
    check_names,
    check_numbers,
    check_shape,
    set_option,
)
from training.shapes import split_shape

CONFIGS = Registry("config")
for _name in ["auto", "stylegan2", "paper256", "paper512", "paper1024", "cifar", "laptop"]:
    CONFIGS.register(_name, f"training.configs.{_name}")

# A command-line option that a plug-in adds for some configs. `desc` formats the option's value into the name
# of the run directory ('' leaves it out); `kwargs` go to click.option.
PluginOption = namedtuple("PluginOption", "flag name heading configs desc kwargs")
OPTIONS = {}  # name -> PluginOption, in the order of registration


def add_option(flag, heading, configs, desc="", **kwargs):
    """Adds a plug-in's option: `flag` as on the command line, valid with `configs` (names) only."""
    name = flag.lstrip("-").replace("-", "_")
    if name in OPTIONS:
        raise ValueError(f"option {flag} is registered already, by {OPTIONS[name].heading}")
    OPTIONS[name] = PluginOption(flag, name, heading, tuple(configs), desc, kwargs)


# --- the family's configs -----------------------------------------------------------------------------------

# kimg: length; mb: batch; fmaps: factor of the channel counts; ema in kimg; ramp: EMA ramp-up; map: mapping
# layers.
ROWS = {
    "stylegan2": dict(
        ref_gpus=8, kimg=25000, mb=32, mbstd=4, fmaps=1, lrate=0.002, gamma=10, ema=10, ramp=None, map=8
    ),
    "paper256": dict(
        ref_gpus=8, kimg=25000, mb=64, mbstd=8, fmaps=0.5, lrate=0.0025, gamma=1, ema=20, ramp=None, map=8
    ),
    "paper512": dict(
        ref_gpus=8, kimg=25000, mb=64, mbstd=8, fmaps=1, lrate=0.0025, gamma=0.5, ema=20, ramp=None, map=8
    ),
    "paper1024": dict(
        ref_gpus=8, kimg=25000, mb=32, mbstd=4, fmaps=1, lrate=0.002, gamma=2, ema=10, ramp=None, map=8
    ),
    "cifar": dict(
        ref_gpus=2, kimg=100000, mb=64, mbstd=32, fmaps=1, lrate=0.0025, gamma=0.01, ema=500, ramp=0.05, map=2
    ),
}


def auto(c, opts):
    """Settings by heuristics from the resolution and the number of GPUs: a start for new data sets."""
    res, gpus = c.training_set_kwargs.resolution, c.num_gpus
    height, width = opts.img_shape
    share = max(min(gpus * min(4096 // res, 32), 64) // gpus, 1)
    share -= share % 4 if share > 4 else 0  # whole groups of the minibatch statistics, for 3 GPUs, too
    mb = share * gpus
    fmaps = 1 if opts.block_resolution >= 512 else 0.5
    row = dict(ref_gpus=gpus, kimg=25000, mb=mb, mbstd=min(share, 4), fmaps=fmaps)
    gamma = 0.0002 * (height * width) / mb
    row.update(lrate=0.002 if res >= 1024 else 0.0025, gamma=gamma, ema=mb * 10 / 32, ramp=0.05, map=2)
    apply_row(c, **row)


def stylegan2(c, opts):
    """The settings of the StyleGAN2 paper, config F, 1024x1024."""
    apply_row(c, **ROWS["stylegan2"])


def paper256(c, opts):
    """The StyleGAN2-ADA paper's settings for FFHQ and LSUN at 256x256."""
    apply_row(c, **ROWS["paper256"])


def paper512(c, opts):
    """The StyleGAN2-ADA paper's settings at 512x512."""
    apply_row(c, **ROWS["paper512"])


def paper1024(c, opts):
    """The StyleGAN2-ADA paper's settings at 1024x1024."""
    apply_row(c, **ROWS["paper1024"])


def cifar(c, opts):
    """The StyleGAN2-ADA paper's settings for CIFAR-10: no path length, no style mixing, 'orig'
    discriminator."""
    apply_row(c, **ROWS["cifar"])
    c.loss_kwargs.pl_weight = 0
    c.loss_kwargs.style_mixing_prob = 0
    c.D_kwargs.architecture = "orig"


def laptop(c, opts):
    """Small networks for drawn pictures of 32x32 to 64x64 on a CPU: narrow, two mapping layers, no noise inputs.

    On flat drawings noise inputs are a shortcut that the generator takes instead of drawing.
    """
    row = dict(ref_gpus=1, kimg=200, mb=16, mbstd=4, fmaps=1 / 32, lrate=0.0025, gamma=1)
    apply_row(c, **row, ema=5, ramp=0.05, map=2)
    c.G_kwargs.update(z_dim=64, w_dim=64)
    for kwargs in [c.G_kwargs.synthesis_kwargs, c.D_kwargs]:
        kwargs.update(channel_max=96, num_fp16_res=0)
        kwargs.pop("conv_clamp")
    c.G_kwargs.synthesis_kwargs.use_noise = False
    c.update(kimg_per_tick=1, image_snapshot_ticks=10, network_snapshot_ticks=10, ada_kimg=100, metrics=[])


def apply_row(c, *, ref_gpus, kimg, mb, mbstd, fmaps, lrate, gamma, ema, ramp, map):
    """Fills the options with the family's StyleGAN2 networks, Adam, and the numbers of one row."""
    widths = dict(channel_base=int(fmaps * 32768), channel_max=512, num_fp16_res=4, conv_clamp=256)
    easy = dnnlib.EasyDict
    c.G_kwargs = easy(class_name="training.networks.Generator", z_dim=512, w_dim=512)
    c.G_kwargs.mapping_kwargs = easy(num_layers=map)
    c.G_kwargs.synthesis_kwargs = easy(widths)
    c.D_kwargs = easy(
        class_name="training.networks.Discriminator", block_kwargs=easy(), mapping_kwargs=easy()
    )
    c.D_kwargs.epilogue_kwargs = easy(mbstd_group_size=mbstd)
    c.D_kwargs.update(widths)
    for net in ["G", "D"]:
        c[f"{net}_opt_kwargs"] = easy(class_name="torch.optim.Adam", lr=lrate, betas=[0.0, 0.99], eps=1e-8)
    c.loss_kwargs = easy(class_name="training.loss.StyleGAN2Loss", r1_gamma=gamma)
    c.update(total_kimg=kimg, batch_size=mb, batch_gpu=max(mb // ref_gpus, 1), ema_kimg=ema, ema_rampup=ramp)


# --- from a command to options ------------------------------------------------------------------------------

AUG_MODES = ["noaug", "ada", "fixed"]
OPS = ("auto", "reference", "cuda")  # of torch_utils.custom_ops.select
PRECISIONS = ["fp32", "fp16", "bf16"]
AUGPIPES = {
    "blit": "xflip rotate90 xint",
    "geom": "scale rotate aniso xfrac",
    "color": "brightness contrast lumaflip hue saturation",
    "filter": "imgfilter",
    "noise": "noise",
    "cutout": "cutout",
}
for _name, _parts in dict(
    bg="blit geom", bgc="bg color", bgcf="bgc filter", bgcfn="bgcf noise", bgcfnc="bgcfn cutout"
).items():
    AUGPIPES[_name] = " ".join(AUGPIPES[part] for part in _parts.split())


# Values of options that were not given; all others are None then.
OPTION_DEFAULTS = dict(gpus=1, device="auto", seed=0, cfg="auto", workers=3)

# Names and order of the loop's options as the family has them; ours follow.
FAMILY_ORDER = (
    "num_gpus image_snapshot_ticks network_snapshot_ticks metrics random_seed training_set_kwargs data_loader_kwargs"
    " G_kwargs D_kwargs G_opt_kwargs D_opt_kwargs loss_kwargs total_kimg batch_size batch_gpu ema_kimg ema_rampup"
    " ada_target augment_p augment_kwargs resume_pkl ada_kimg cudnn_benchmark allow_tf32"
).split()


def make_config(opts):
    """The training options and the run directory's description for the options of a command.

    opts: dict of option values, None where not given (names as in train.py). Reads the data set and, for
    options that are taken from it, the --resume file; writes nothing. Returns (EasyDict of training_loop's
    options, desc). Raises ConfigError with one line for the user.
    """
    from torch_utils.distributed import choose_processes

    opts = Options({**OPTION_DEFAULTS, **{k: v for k, v in opts.items() if v is not None}})
    c = dnnlib.EasyDict()
    try:
        c.num_gpus, c.device = choose_processes(opts.gpus, opts.device)
    except ValueError as err:
        raise ConfigError(str(err)) from err
    c.image_snapshot_ticks = c.network_snapshot_ticks = 50
    c.metrics = ["fid50k_full"]
    c.metric_kwargs = dnnlib.EasyDict()
    if not 0 <= opts.seed < 2**31:
        raise ConfigError("--seed must be between 0 and 2147483647")
    c.random_seed = opts.seed
    desc = [_dataset(c, opts)]
    c.tick_hooks = []
    if opts.cfg not in CONFIGS:
        raise ConfigError(f"--cfg={opts.cfg} is not known; there are {', '.join(CONFIGS.names())}")
    CONFIGS.resolve(opts.cfg)(c, opts)
    desc += [opts.cfg + (str(c.num_gpus) if opts.cfg == "auto" else "")]
    desc += _overrides(c, opts)
    desc += _augment(c, opts)
    desc += _resume(c, opts)
    desc += _networks(c, opts)
    desc += _start(c, opts)
    desc += _plugin_options(opts)
    for assignment in opts.set or []:
        set_option(c, assignment)
    check_numbers(c)
    check_names(c)
    check_shape(c, opts)
    check_batch(c)
    if opts.set:
        check_parts(c, opts.set)
    if "_source" in opts and "resume_pkl" in c:
        check_transfer(c, opts.source)
    order = [name for name in FAMILY_ORDER if name in c] + [name for name in c if name not in FAMILY_ORDER]
    return dnnlib.EasyDict({name: c[name] for name in order}), "-".join(part for part in desc if part)


class Options(dnnlib.EasyDict):
    """The values of a command's options; a name that was not given is None. `source` reads the --resume file
    once."""

    def __getattr__(self, name):
        return self.get(name)

    @property
    def source(self):
        """Networks of the --resume file (dict with G, D, G_ema), or None without --resume."""
        if self.resume in (None, "noresume"):
            return None
        if "_source" not in self:
            from training import snapshot

            try:
                path = resolve_resume(self.resume)
                self["_source"] = snapshot.load_planned(path, trust=bool(self.trust_pickle))
            except snapshot.SnapshotError as err:
                raise ConfigError(f"--resume: {err}") from err
        return self["_source"]


def demo_file(name):
    """A file of the shipped demo."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "demo", name)


def _dataset(c, opts):
    path = demo_file("lorelei32.zip") if opts.data == "demo" else opts.data
    if not path:
        raise ConfigError("--data is required: a folder or zip of pictures, or 'demo'")
    kwargs = dnnlib.EasyDict(class_name="training.dataset.ImageFolderDataset", path=path, use_labels=True)
    kwargs.update(max_size=None, xflip=False)
    try:
        data = dnnlib.util.construct_class_by_name(**kwargs)
        kwargs.update(resolution=data.resolution, use_labels=data.has_labels, max_size=len(data))
        opts.img_shape = data.image_shape[1:]
        h0, w0, doublings = split_shape(*opts.img_shape)
    except (OSError, ValueError) as err:
        raise ConfigError(f"--data: {err}") from err
    if doublings == 0:
        raise ConfigError(
            f"--data: pictures of {w0}x{h0} pixels cannot be halved; their sides must be even, and 8 at least"
        )
    opts.block_resolution = 4 * 2**doublings  # after which the last block of layers is named
    desc = data.name
    if opts.cond:
        if not data.has_labels:
            raise ConfigError("--cond=True requires labels specified in dataset.json")
        desc += "-cond"
    kwargs.use_labels = bool(opts.cond)
    if opts.subset is not None:
        if not 1 <= opts.subset <= len(data):
            raise ConfigError(f"--subset must be between 1 and {len(data)}")
        desc += f"-subset{opts.subset}"
        if opts.subset < len(data):
            kwargs.update(max_size=opts.subset, random_seed=opts.seed)
    if opts.mirror:
        desc += "-mirror"
        kwargs.xflip = True
    data.close()
    c.training_set_kwargs = kwargs
    return desc


def _overrides(c, opts):
    """Options that replace a number of the config."""
    from training.running import change_running

    desc = []
    if opts.gamma is not None:
        if opts.gamma < 0:
            raise ConfigError("--gamma must be non-negative")
        desc.append(f"gamma{opts.gamma:g}")
        c.loss_kwargs.r1_gamma = opts.gamma
    desc += change_running(c, opts)
    if opts.batch is not None:
        if opts.batch < 1 or opts.batch % c.num_gpus:
            raise ConfigError("--batch must be at least 1 and divisible by --gpus")
        desc.append(f"batch{opts.batch}")
        c.batch_size = opts.batch
        c.batch_gpu = opts.batch // c.num_gpus
    if opts.batch_gpu is not None:
        share = c.batch_size // c.num_gpus
        if opts.batch_gpu < 1 or share % opts.batch_gpu:
            raise ConfigError(
                f"--batch-gpu must be at least 1 and divide the {share} pictures that each process takes of a batch"
            )
        c.batch_gpu = opts.batch_gpu
    return desc


def _augment(c, opts):
    mode = opts.aug or "ada"
    desc = [opts.aug] if opts.aug else []
    if mode not in AUG_MODES:
        raise ConfigError(f"--aug={mode} is not known; there are {', '.join(AUG_MODES)}")
    if opts.augpipe is not None and opts.augpipe not in AUGPIPES:
        raise ConfigError(f"--augpipe={opts.augpipe} is not known; there are {', '.join(AUGPIPES)}")
    if opts.p is not None and mode != "fixed":
        raise ConfigError("--p can only be specified with --aug=fixed")
    if opts.target is not None and mode != "ada":
        raise ConfigError("--target can only be specified with --aug=ada")
    if opts.augpipe is not None and mode == "noaug":
        raise ConfigError("--augpipe cannot be specified with --aug=noaug")
    if mode == "fixed":
        if opts.p is None:
            raise ConfigError("--aug=fixed requires specifying --p")
        if not 0 <= opts.p <= 1:
            raise ConfigError("--p must be between 0 and 1")
        desc.append(f"p{opts.p:g}")
        c.augment_p = opts.p
    if mode == "ada":
        c.ada_target = 0.6 if opts.target is None else opts.target
        if not 0 <= c.ada_target <= 1:
            raise ConfigError("--target must be between 0 and 1")
        if opts.target is not None:
            desc.append(f"target{opts.target:g}")
    if mode != "noaug":
        names = AUGPIPES[opts.augpipe or "bgc"].split()
        c.augment_kwargs = dnnlib.EasyDict(
            class_name="training.augment.AugmentPipe", **{name: 1 for name in names}
        )
    if opts.augpipe is not None:
        desc.append(opts.augpipe)
    return desc


# The family's published networks. The files, and what is trained from them, stay under NVIDIA's licence.
PUBLISHED_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/transfer-learning-source-nets/"
)
PUBLISHED = {
    "ffhq256": "ffhq-res256-mirror-paper256-noaug.pkl",
    "ffhq512": "ffhq-res512-mirror-stylegan2-noaug.pkl",
    "ffhq1024": "ffhq-res1024-mirror-stylegan2-noaug.pkl",
    "celebahq256": "celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl",
    "lsundog256": "lsundog-res256-paper256-kimg100000-noaug.pkl",
}


def resolve_resume(text):
    """Path or URL of what --resume names: a shorthand of a published network, a URL, or a path."""
    return PUBLISHED_URL + PUBLISHED[text] if text in PUBLISHED else text


def check_source(path):
    """ConfigError for a path that is neither a file nor a URL."""
    if not (dnnlib.util.is_url(path, allow_file_urls=True) or os.path.isfile(path)):
        raise ConfigError(f"--resume: {path} is neither a run directory, a file, nor a URL")


def _resume(c, opts):
    if opts.resume is None or opts.resume == "noresume":
        if opts.allow_partial:
            raise ConfigError("--allow-partial has no use without --resume=<networks to start from>")
        return [opts.resume]
    allow = _allow_partial(opts)
    if allow:
        c.allow_partial = allow
    c.resume_pkl = resolve_resume(opts.resume)
    if opts.trust_pickle:
        c.resume_trust = True
    check_source(c.resume_pkl)
    if os.path.isfile(c.resume_pkl):
        _ = opts.source  # a file that is no snapshot ends here, before there is a run directory
    if not c.pop(
        "new_kind", False
    ):  # the average goes on; of networks of another kind it leaves the start behind
        c.ema_rampup = None
    c.setdefault("ada_kimg", 100)
    return [f"resume{opts.resume}" if opts.resume in PUBLISHED else "resumecustom"]


def _networks(c, opts):
    """Options that act on both networks: precision, memory format, frozen layers; and the switches of the backends."""
    widths = [c.G_kwargs.setdefault("synthesis_kwargs", dnnlib.EasyDict()), c.D_kwargs]
    blocks = [widths[0], c.D_kwargs.setdefault("block_kwargs", dnnlib.EasyDict())]
    precision = _precision(opts)
    if precision is not None:
        for each in widths:
            if precision == "fp32":
                each.update(num_fp16_res=0, conv_clamp=None)
            elif not each.get("num_fp16_res"):
                each.update(num_fp16_res=4, conv_clamp=256)
        for each in blocks:
            each.pop("half_dtype", None)
            if precision == "bf16":
                each["half_dtype"] = "bfloat16"
    if opts.nhwc:
        for each in blocks:
            each["fp16_channels_last"] = True
    if opts.ops not in (None, *OPS):
        raise ConfigError(f"--ops={opts.ops} is not known; there are {', '.join(OPS)}")
    if opts.ops == "cuda" and c.device == "cpu":
        raise ConfigError("--ops=cuda needs a GPU; on the CPU PyTorch's operations do everything")
    if opts.ops not in (None, "auto"):
        c.ops = opts.ops
    if opts.nobench:
        c.cudnn_benchmark = False
    if opts.allow_tf32:
        c.allow_tf32 = True
    blocks[1].pop("freeze_layers", None)  # what the training of the --resume file had frozen
    if opts.freezed is None:
        return []
    if opts.freezed < 0:
        raise ConfigError("--freezed must be non-negative")
    blocks[1]["freeze_layers"] = opts.freezed
    return [f"freezed{opts.freezed}"]


def _precision(opts):
    """'fp32', 'fp16', 'bf16' or None from --precision and the family's --fp32."""
    if opts.precision not in (None, *PRECISIONS):
        raise ConfigError(f"--precision={opts.precision} is not known; there are {', '.join(PRECISIONS)}")
    if opts.fp32 is None:
        return opts.precision
    if opts.precision is not None and opts.fp32 != (opts.precision == "fp32"):
        raise ConfigError(f"--fp32={opts.fp32} contradicts --precision={opts.precision}: give one of them")
    return "fp32" if opts.fp32 else opts.precision


def _start(c, opts):
    """Learning rates, and the strength that ADA begins with."""
    desc = []
    for net, name in [("G", "glr"), ("D", "dlr")]:
        rate = opts.get(name)
        if rate is not None:
            if not 0 < rate < math.inf:
                raise ConfigError(f"--{name} must be positive")
            c[f"{net}_opt_kwargs"].lr = rate
            desc.append(f"{name}{rate:g}")
    if opts.initstrength is not None:
        c.augment_p = _initial_strength(opts)
        desc.append(f"initstrength{c.augment_p:g}")
    return desc


def _initial_strength(opts):
    """The number that --initstrength gives, or that of the --resume file for 'resume'."""
    if opts.aug not in (None, "ada"):
        raise ConfigError("--initstrength can only be specified with --aug=ada")
    if opts.initstrength == "resume":
        pipe = (opts.source or {}).get("augment_pipe")
        if pipe is None:
            raise ConfigError(
                "--initstrength=resume needs a --resume file that was trained with augmentation"
            )
        return float(pipe.p)
    try:
        value = float(opts.initstrength)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError("--initstrength must be a non-negative number, or resume")
    return value


def _allow_partial(opts):
    from training.transfer import CATEGORIES

    allow = list(opts.allow_partial or [])
    for name in allow:
        if name not in CATEGORIES:
            raise ConfigError(f"--allow-partial={name} is not known; there are {', '.join(CATEGORIES)}")
    return allow


def _plugin_options(opts):
    desc = []
    for option in OPTIONS.values():
        value = opts.get(option.name)
        if value is None:
            continue
        if opts.cfg not in option.configs:
            raise ConfigError(
                f"{option.flag} has no use with --cfg={opts.cfg}; it goes with {', '.join(option.configs)}"
            )
        desc.append(option.desc.format(value))
    return desc


def check_resume(c):
    """ConfigError where the networks of a URL, which make_config may not have read, cannot be read or do not match;
    then lets go of them where other processes read for themselves."""
    from training import snapshot

    if c.get("resume_pkl") is None or c.get("exact_resume"):
        return
    if dnnlib.util.is_url(c.resume_pkl, allow_file_urls=True):
        try:
            check_transfer(c, snapshot.load_planned(c.resume_pkl, c.get("resume_trust", False)))
        except snapshot.SnapshotError as err:
            raise ConfigError(f"--resume: {err}") from err
    if c.num_gpus > 1:
        snapshot.forget_planned()


# --- run directories ----------------------------------------------------------------------------------------


def run_dirs(outdir):
    """The run directories below outdir: list of (number, path), ascending."""
    if not os.path.isdir(outdir):
        return []
    found = []
    for name in os.listdir(outdir):
        number = re.match(r"\d+", name)
        if number and os.path.isdir(os.path.join(outdir, name)):
            found.append((int(number[0]), os.path.join(outdir, name)))
    return sorted(found)


def next_run_dir(outdir, desc):
    """outdir/%05d-desc with the next free number."""
    number = max((number for number, _path in run_dirs(outdir)), default=-1) + 1
    return os.path.join(outdir, f"{number:05d}-{desc}")
