"""Games that ``task=game`` solves exactly: small enough to draw, and to check the theory on.

- `base`: what every game has, and the values of a finite game with the order that the theory gives them.
- `motivating`: two threshold classifiers on the line, in fractions. Both players gain by randomising.
- `triangle`: three classes that conflict in pairs, over all classifiers, in fractions.
- `table`: a table of losses in a file of the user's.
- `points`: labelled points and classifiers of the user's, in the plane.
- `rational`: small games in fractions, proved by their gap.
- `gaussians`: random linear classifiers on three Gaussians in the plane, on whole balls.
- `cells`: balls in the plane cut by lines, and the finite game on the cells.
"""
