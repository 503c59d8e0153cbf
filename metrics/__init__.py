# SPDX-License-Identifier: Apache-2.0
"""The judge: measures of generators. metric_main holds the registry and needs no torch to import."""
