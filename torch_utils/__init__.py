# SPDX-License-Identifier: Apache-2.0
"""Torch helpers that know nothing of GANs."""
