# SPDX-License-Identifier: Apache-2.0
def fma(a, b, c):
    return a * b + c
