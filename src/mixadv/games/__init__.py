"""Games that come with the package: small enough to be solved exactly, and to be looked at.

- `motivating`: two threshold classifiers on the line, in fractions. Randomising pays for both players.
- `gaussians`: random linear classifiers on a mixture of Gaussians in the plane, on sampled perturbations.
- `values`: V_rand, V_det and the dual value of any finite game, with the order between them checked.
"""
