# SPDX-License-Identifier: Apache-2.0
"""Spatially Stochastic Networks: a plug-in for this StyleGAN2-ADA-compatible framework (see plugin.py)."""
