# SPDX-License-Identifier: Apache-2.0
"""Tensor operations of the networks: each a plain function with gradients of any order on every device."""
