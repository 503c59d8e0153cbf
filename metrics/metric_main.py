# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics; running one and reporting its result. Importing this module does not import torch.

A metric is a function (opts: metrics.metric_utils.MetricOptions) -> dict of numbers, or lists of numbers.
The family's own metrics are rows of a table, each naming one function with its settings; plug-ins add
functions with `METRICS.register('name', 'package.module.function')` or with the decorator `register_metric`.
"""

import json
import os
import time

import dnnlib
from dnnlib.plugins import Registry

METRICS = Registry("metric")

# What a metric does to the options of the data set before it looks at it.
ALL_REAL = dict(max_size=None, xflip=False)
AS_TRAINED = dict(max_size=None)  # the run's mirroring stays


def random_subset(size):
    """A fixed random choice of `size` pictures, whatever the run's seed."""
    return dict(max_size=size, xflip=False, random_seed=0)


class Variant:
    """A metric given by a function (opts, name, **settings) -> dict and its settings; imports it when called.

    dataset: overrides of the data set's options. detector: what it needs of one, a key of
    metrics.detectors.URLS; a function of a plug-in may say so, too, in an attribute of that name.
    """

    def __init__(self, name, function, detector, doc, dataset=None, **settings):
        self.name, self.function, self.detector = name, function, detector
        self.dataset, self.settings = dict(dataset or {}), settings
        self.__doc__ = doc

    def __call__(self, opts):
        opts.dataset_kwargs.update(self.dataset)
        return dnnlib.util.call_func_by_name(opts, self.name, func_name=self.function, **self.settings)


def _fid(name, doc, dataset, max_real, num_gen):
    function = "metrics.frechet_inception_distance.fid"
    return Variant(name, function, "inception", doc, dataset, max_real=max_real, num_gen=num_gen)


def _kid(name, doc, dataset, max_real, num_gen):
    function = "metrics.kernel_inception_distance.kid"
    sizes = dict(max_real=max_real, num_gen=num_gen, num_subsets=100, max_subset_size=1000)
    return Variant(name, function, "inception", doc, dataset, **sizes)


def _pr(name, doc, dataset, max_real, num_gen):
    function = "metrics.precision_recall.pr"
    sizes = dict(max_real=max_real, num_gen=num_gen, nhood_size=3, row_batch_size=10000, col_batch_size=10000)
    return Variant(name, function, "vgg16", doc, dataset, **sizes)


def _is(name, doc, num_gen):
    function = "metrics.inception_score.inception_score_of"
    return Variant(name, function, "classes", doc, ALL_REAL, num_gen=num_gen, num_splits=10)


def _ppl(name, doc, space, sampling, crop, num_samples=50000):
    function = "metrics.perceptual_path_length.ppl"
    where = dict(space=space, sampling=sampling, crop=crop)
    return Variant(name, function, "vgg16", doc, num_samples=num_samples, epsilon=1e-4, batch_size=2, **where)


TABLE = [
    _fid(
        "fid50k_full",
        "Frechet inception distance, 50,000 pictures against all real ones",
        ALL_REAL,
        None,
        50000,
    ),
    _kid(
        "kid50k_full",
        "Kernel inception distance, 50,000 pictures against all real ones",
        ALL_REAL,
        1000000,
        50000,
    ),
    _pr(
        "pr50k3_full",
        "Precision and recall, 50,000 pictures against up to 200,000 real ones",
        ALL_REAL,
        200000,
        50000,
    ),
    _ppl("ppl2_wend", "Perceptual path length in W, end points, whole pictures", "w", "end", crop=False),
    _is("is50k", "Inception score of 50,000 pictures", 50000),
    _fid(
        "fid50k",
        "Frechet inception distance, 50,000 pictures against 50,000 real ones",
        AS_TRAINED,
        50000,
        50000,
    ),
    _kid(
        "kid50k",
        "Kernel inception distance, 50,000 pictures against 50,000 real ones",
        AS_TRAINED,
        50000,
        50000,
    ),
    _pr("pr50k3", "Precision and recall, 50,000 pictures against 50,000 real ones", AS_TRAINED, 50000, 50000),
    _ppl(
        "ppl_zfull", "Perceptual path length in Z, anywhere on the path, centre crop", "z", "full", crop=True
    ),
    _ppl(
        "ppl_wfull", "Perceptual path length in W, anywhere on the path, centre crop", "w", "full", crop=True
    ),
    _ppl("ppl_zend", "Perceptual path length in Z, end points, centre crop", "z", "end", crop=True),
    _ppl("ppl_wend", "Perceptual path length in W, end points, centre crop", "w", "end", crop=True),
    _ppl("ppl", "The same as ppl2_wend, under the name that papers use", "w", "end", crop=False),
    _fid(
        "fid5k",
        "Quick look: Frechet inception distance, 5,000 pictures each",
        random_subset(5000),
        5000,
        5000,
    ),
    _kid(
        "kid5k", "Quick look: kernel inception distance, 5,000 pictures each", random_subset(5000), 5000, 5000
    ),
    _pr("pr5k3", "Quick look: precision and recall, 5,000 pictures each", random_subset(5000), 5000, 5000),
    _is("is5k", "Quick look: Inception score of 5,000 pictures", 5000),
    _ppl(
        "ppl2_wend_2k", "Quick look: ppl2_wend from 2,000 samples", "w", "end", crop=False, num_samples=2000
    ),
    _fid(
        "fid1k",
        "Quick look: Frechet inception distance, 1,000 pictures each",
        random_subset(1000),
        1000,
        1000,
    ),
    _kid(
        "kid1k", "Quick look: kernel inception distance, 1,000 pictures each", random_subset(1000), 1000, 1000
    ),
]
for _row in TABLE:
    METRICS.register(_row.name, _row)


def register_metric(fn):
    """Decorator: registers a function (opts) -> dict under its own name."""
    METRICS.register(fn.__name__, fn)
    return fn


def is_valid_metric(metric):
    """Whether a metric of this name is registered."""
    return metric in METRICS


def list_valid_metrics():
    """Names of all metrics, in the order of their registration."""
    return METRICS.names()


def describe(metric):
    """The first line of a metric's documentation."""
    doc = METRICS.resolve(metric).__doc__ or ""
    return doc.strip().split("\n")[0]


def why_unavailable(names, detector=None, verbose=True):
    """One line saying why these metrics cannot be computed here, with what to do about it; None if they can.

    Fetches the detectors' files into the cache where they are not there yet; `verbose` tells of it. All
    processes of a run must call it.
    """
    from metrics import detectors
    from torch_utils import distributed

    def check():
        try:
            for metric in names:
                role = getattr(METRICS.resolve(metric), "detector", None)
                if role is not None:
                    detectors.local_file(detectors.choose(role, detector).source, verbose)
        except OSError as err:
            return str(err)
        return None

    return distributed.broadcast_object(check() if distributed.is_main() else None)


def calc_metric(metric, **kwargs):
    """Computes one metric; the keywords are those of MetricOptions. All processes must call it and get the
    same result.

    EasyDict(results, metric, total_time, total_time_str, num_gpus, details): `details` says what the numbers
    depend on (detector and its sha256, numbers of pictures, hash of the data, dtype, seed, ...). Unknown
    name: ValueError.
    """
    function = METRICS.resolve(metric)
    from metrics import metric_utils
    from torch_utils import distributed

    opts = metric_utils.MetricOptions(**kwargs)
    start = time.time()
    results = metric_utils.agreed(opts, lambda: {key: _plain(value) for key, value in function(opts).items()})
    results, details = distributed.broadcast_object((results, dict(opts.details)))
    seconds = time.time() - start
    return dnnlib.EasyDict(
        results=dnnlib.EasyDict(results),
        metric=metric,
        total_time=seconds,
        total_time_str=dnnlib.util.format_time(seconds),
        num_gpus=opts.num_gpus,
        details=dnnlib.EasyDict(details),
    )


def report_metric(result_dict, run_dir=None, snapshot_pkl=None):
    """Prints a result of calc_metric as a line of JSON and appends it to run_dir/metric-<name>.jsonl."""
    metric = result_dict["metric"]
    assert is_valid_metric(metric)
    if run_dir is not None and snapshot_pkl is not None:
        snapshot_pkl = os.path.relpath(snapshot_pkl, run_dir)
    record = {key: value for key, value in result_dict.items() if key != "details"}
    record.update(snapshot_pkl=snapshot_pkl, timestamp=time.time())
    record["details"] = result_dict.get("details", {})
    line = json.dumps(record)
    print(line, flush=True)
    if run_dir is not None and os.path.isdir(run_dir):
        with open(os.path.join(run_dir, f"metric-{metric}.jsonl"), "a", encoding="utf-8") as f:
            f.write(line + "\n")


def _plain(value):
    """Numbers as float, arrays and tensors as (nested) lists of them, text as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str) else float(value)
