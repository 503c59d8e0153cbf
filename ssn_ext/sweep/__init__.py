# SPDX-License-Identifier: Apache-2.0
"""`python -m ssn_ext.sweep`: trainings of equal length from one snapshot, measured, tabled and drawn (docs/sweep.md).

All training is done by train.py and all measuring by calc_metrics.py, each in a process of its own; what they
leave in the run directories is the only state.
"""
