# SPDX-License-Identifier: Apache-2.0
"""How fast this code is on this machine, as shares of what the machine can do: `python -m benchmarks --help`."""
