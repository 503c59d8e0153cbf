# temporary placeholder
from dnnlib.plugins import Registry
METRICS = Registry("metric")
def is_valid_metric(n): return n in METRICS
def list_valid_metrics(): return METRICS.names()
def why_unavailable(names, **k): return None
