# SPDX-License-Identifier: Apache-2.0
"""The GAN: data, augmentation, networks, loss and the loop that trains them."""
